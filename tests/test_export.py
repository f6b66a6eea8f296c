"""A run's models as Hub folders: bit-exact, opened by transformers, or not written at all."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from learn_cases import assert_trees_equal

from o1jax import export
from o1jax.config import check
from o1jax.models import StepHead, TokenHead, hf, prm_folder
from o1jax.run import store
from o1jax.stages.setup import model_folder

BASE = model_folder(check({}))
MODEL = hf.read_model(BASE)
SAVED = ('round0/policy_sft/policy', 'round0/rl/policy', 'tcg/sft', 'tcg/control', 'tcg/dpo')
SAVED += ('round2/policy_sft/policy', 'round10/policy_sft/policy', 'expert_iteration/rl/policy')


def policy(seed):
  """Parameters of the base's shapes that no other seed has."""
  leaves, structure = jax.tree.flatten(MODEL.shapes())
  rng = np.random.default_rng(seed)
  draw = [jnp.asarray(rng.normal(0.1, 0.2, x.shape), x.dtype) for x in leaves]
  return jax.tree.unflatten(structure, draw)


def prm(readout):
  if readout == 'token':
    return {'trunk': policy(50), 'head': TokenHead.init(MODEL.output_rows(policy(50)), 5, 6)}
  head = jax.tree.map(lambda x: x + 0.125, StepHead.init(MODEL.config))
  return {'trunk': policy(60), 'head': head}


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  folder = tmp_path_factory.mktemp('runs') / 'mine'
  with store.Store(check({'run': {'dir': str(folder)}})) as opened:
    for seed, name in enumerate(SAVED):
      opened.save_params(*name.rsplit('/', 1), policy(seed))
    for round_, readout in enumerate(('value', 'token')):
      opened.save_params(f'round{round_}/prm', 'prm', prm(readout))
    with opened.checkpoints('round11/rl') as checkpoints:  # under way: nothing to export yet
      checkpoints.save(1, policy(99))
  return folder


@pytest.mark.parametrize('name', SAVED)
def test_round_trip_is_bit_exact(name, run, tmp_path):
  stage = name if name.startswith('tcg') else name.removesuffix('/policy')
  assert export.main([str(run), '--stage', stage, '--out', str(tmp_path / 'a' / 'b')]) == 0
  model, params = hf.load(tmp_path / 'a' / 'b')
  assert model == MODEL
  assert_trees_equal(params, policy(SAVED.index(name)))
  assert [p.name for p in (tmp_path / 'a').iterdir()] == ['b']


def test_saved_models_are_listed_and_checkpoints_are_not(run):
  assert store.saved_params(run) == sorted([*SAVED, 'round0/prm/prm', 'round1/prm/prm'])


def test_default_is_the_last_policy(run, tmp_path):
  export.export(run, tmp_path / 'out')
  assert_trees_equal(hf.load(tmp_path / 'out')[1], policy(SAVED.index('round10/policy_sft/policy')))
  assert export.choose(SAVED[:2], None, run) == 'round0/rl/policy'


@pytest.mark.parametrize('round_, readout', [(0, 'value'), (1, 'token')])
def test_a_prm_keeps_trunk_and_head(round_, readout, run, tmp_path):
  export.export(run, tmp_path / 'prm', f'round{round_}/prm')
  assert_trees_equal(prm_folder.load(tmp_path / 'prm')[1], prm(readout))
  assert_trees_equal(hf.load(tmp_path / 'prm')[1], prm(readout)['trunk'])


def test_a_head_of_another_trunk_is_refused(run, tmp_path):
  export.export(run, tmp_path / 'prm', 'round0/prm')
  export.export(run, tmp_path / 'policy')
  with pytest.raises(FileNotFoundError, match=r'prm_head\.safetensors does not exist'):
    prm_folder.load(tmp_path / 'policy')
  (tmp_path / 'prm' / prm_folder.HEAD).write_bytes(b'\0' * 9)
  with pytest.raises(ValueError, match='not a readable safetensors file'):
    prm_folder.load(tmp_path / 'prm')
  hf.save_file({'kernel': np.zeros(3, np.float32)}, tmp_path / 'prm' / prm_folder.HEAD)
  with pytest.raises(ValueError, match=r"holds \{'kernel': \(3,\)\}; a head of this trunk has"):
    prm_folder.load(tmp_path / 'prm')


def test_the_base_s_type_is_kept_unless_told(run, tmp_path):
  assert export.main([str(run), '--out', str(tmp_path / 'x'), '--dtype', 'bfloat16']) == 0
  model, params = hf.load(tmp_path / 'x')
  assert model.config.dtype == 'bfloat16'
  wide = policy(SAVED.index('round10/policy_sft/policy'))
  assert_trees_equal(params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), wide))
  # A run whose base is of that type gives it back, though the run trained in float32.
  export.export(run, tmp_path / 'y', base=tmp_path / 'x')
  assert_trees_equal(hf.load(tmp_path / 'y')[1], params)


def test_tokenizer_and_generation_config_come_from_the_base(run, tmp_path):
  shutil.copytree(BASE, tmp_path / 'base')
  (tmp_path / 'base' / hf.GENERATION).write_text('{"temperature": 0.7, "eos_token_id": [3, 4]}')
  export.export(run, tmp_path / 'out', base=tmp_path / 'base')
  generation = json.loads((tmp_path / 'out' / hf.GENERATION).read_text())
  assert generation['temperature'] == 0.7 and generation['eos_token_id'] == [3, 4]
  for name in ('tokenizer.model', 'tokenizer_config.json'):
    assert (tmp_path / 'out' / name).read_bytes() == (BASE / name).read_bytes()


@pytest.mark.parametrize(
  'arguments, text',
  [
    (['--stage', 'round0/r1'], "--stage 'round0/r1' has no model.*did you mean round0/rl?"),
    (['--stage', 'tcg'], "'tcg' has several models; name one of tcg/control, tcg/dpo, tcg/sft"),
    (['--stage', 'round11/rl'], "--stage 'round11/rl' has no model"),
    (['--dtype', 'bfloat61'], "--dtype 'bfloat61' is none of.*did you mean bfloat16?"),
    (['--base', 'nowhere'], "--base 'nowhere' holds no config.json; name the base model"),
  ],
)
def test_a_fault_is_one_line_and_writes_nothing(arguments, text, run, tmp_path, capsys):
  assert export.main([str(run), '--out', str(tmp_path / 'out'), *arguments]) == 2
  error = capsys.readouterr().err
  assert error.count('\n') == 1 and error.startswith('error: ')
  for part in text.split('.*'):
    assert part in error
  assert not list(tmp_path.iterdir())


def test_what_is_no_run(run, tmp_path, capsys):
  assert export.main([str(run.parent / 'mime'), '--out', str(tmp_path / 'out')]) == 2
  assert 'no such folder; name the run.dir of a run; did you mean mine?' in capsys.readouterr().err
  with pytest.raises(FileNotFoundError, match=r'has no run\.json'):
    export.export(tmp_path, tmp_path / 'out')
  with pytest.raises(ValueError, match='has trained nothing yet'):
    export.choose([], None, run)
  with pytest.raises(ValueError, match=r'has no policy yet.*there are tcg/sft$'):
    export.choose(['tcg/sft'], None, run)


def test_a_base_of_other_shapes_is_refused(run, tmp_path):
  shutil.copytree(BASE, tmp_path / 'base')
  config = json.loads((BASE / hf.CONFIG).read_text()) | {'intermediate_size': 280}
  (tmp_path / 'base' / hf.CONFIG).write_text(json.dumps(config))
  with pytest.raises(ValueError, match=r'layers/down \(3, 288, 96\) for \(3, 280, 96\).*--base'):
    export.export(run, tmp_path / 'out', base=tmp_path / 'base')
  assert not (tmp_path / 'out').exists()


def test_only_force_replaces_and_only_an_export(run, tmp_path):
  out = tmp_path / 'out'
  export.export(run, out, 'round0/prm')
  with pytest.raises(ValueError, match='is not empty; name another folder, or replace by --force'):
    export.export(run, out)
  assert (out / prm_folder.HEAD).exists()
  export.export(run, out, 'tcg/dpo', force=True)
  assert not (out / prm_folder.HEAD).exists()
  assert_trees_equal(hf.load(out)[1], policy(SAVED.index('tcg/dpo')))
  (out / 'thesis.tex').write_text('five years')
  with pytest.raises(ValueError, match=r'holds thesis\.tex, which no export wrote'):
    export.export(run, out, force=True)
  with pytest.raises(ValueError, match='is a file; name a folder'):
    export.export(run, out / 'thesis.tex', force=True)
  assert (out / 'thesis.tex').read_text() == 'five years'


def test_a_failure_half_way_leaves_what_was_there(run, tmp_path, monkeypatch, capsys):
  out = tmp_path / 'out'
  export.export(run, out, 'tcg/dpo')

  def full(source, folder):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(hf, 'copy_tokenizer', full)
  assert export.main([str(run), '--out', str(out), '--force']) == 2
  assert export.main([str(run), '--out', str(tmp_path / 'new')]) == 2
  assert 'No space left' in capsys.readouterr().err
  assert [path.name for path in tmp_path.iterdir()] == ['out']
  assert_trees_equal(hf.load(out)[1], policy(SAVED.index('tcg/dpo')))


@pytest.mark.parametrize('stage', [None, 'tcg/dpo', 'round0/prm', 'round1/prm'])
def test_transformers_opens_it_with_the_same_logits(stage, run, tmp_path):
  torch = pytest.importorskip('torch')
  import transformers

  export.export(run, tmp_path / 'out', stage)
  theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'out').eval()
  assert theirs.dtype == torch.float32
  assert theirs.generation_config.eos_token_id == MODEL.config.eos_token_id
  model, params = hf.load(tmp_path / 'out')
  tokens = np.random.default_rng(1).integers(4, 61, (3, 14)).astype(np.int32)
  positions = np.tile(np.arange(14, dtype=np.int32), (3, 1))
  hidden = model.hidden(params, tokens, positions, np.ones_like(tokens))
  with torch.no_grad():
    expected = theirs(input_ids=torch.from_numpy(tokens).long()).logits.numpy()
  logits = np.asarray(model.logits(params, hidden))
  np.testing.assert_allclose(logits, expected, atol=1e-4 * max(1, np.abs(expected).max()))
  tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / 'out')
  original = transformers.AutoTokenizer.from_pretrained(BASE)
  assert tokenizer('a step').input_ids == original('a step').input_ids
