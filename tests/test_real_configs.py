"""The configs for real models: all six steps, on tiny checkpoints and problems from files."""

import gzip
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny_checkpoint

from o1jax import config, export, prepare
from o1jax.data.tokens import Tokenizer
from o1jax.models import hf, lora
from o1jax.run import checkpoints, store

ROOT = pathlib.Path(__file__).parent.parent
SHARED = ROOT.parent / 'shared' / 'data'
NAMES = tuple(tiny_checkpoint.ARCHITECTURES)
# The config's own settings but for sizes: everything is there, little of it is done.
SMALL = """
run.rounds=1 run.log_every=1 metrics.tensorboard=false data.train_problems=40 data.per_round=0
data.dev_problems=2 data.test_problems=2 data.max_prompt_tokens=128 data.max_path_tokens=24
tcg.problems=40 tcg.draws=1 tcg.row_tokens=384 tcg.max_tokens=16 tcg.samples=1 tcg.eval_problems=2
tcg.sft.steps=1 tcg.sft.warmup=0 tcg.sft.batch=2 tcg.sft.accumulate=1
tcg.dpo.steps=1 tcg.dpo.warmup=0 tcg.dpo.batch=2 tcg.dpo.accumulate=1
search.simulations=4 search.children=2 search.depth_limit=3 search.guided_children=2
search.guided_descents=1 search.max_step_tokens=8 search.rows=16
policy_sft.optim.steps=1 policy_sft.optim.warmup=0 policy_sft.optim.batch=2
policy_sft.optim.accumulate=1 prm.optim.steps=1 prm.optim.warmup=0 prm.optim.batch=4
rl.iterations=1 rl.warmup=0 rl.problems=40 rl.group=2 rl.minibatch=16
eval.samples=1 eval.search_children=2 eval.rows=16 eval.bootstrap=20
"""
LESS = ['tcg.control=false', 'rl.control=false', 'eval.test_time=false']
LESS += ['eval.sampling_control=false']


def model_of(folder, name):
  tiny_checkpoint.write(folder / 'hub', name)
  assert prepare.main([str(folder / 'hub'), '--out', str(folder / 'model')]) == 0
  return folder / 'model'


def train(folder, name, source, *extra):
  """The run's folder, by the command that a user types."""
  flags = f'{os.environ.get("XLA_FLAGS", "")} --xla_force_host_platform_device_count=1'
  command = [sys.executable, '-m', 'o1jax.train', '--config', f'configs/{name}.yaml']
  command += [f'run.dir={folder / "run"}', f'model.path={folder / "model"}']
  command += [f'data.source={source}', *SMALL.split(), *extra]
  env = os.environ | {'XLA_FLAGS': flags}
  got = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=1500)
  assert got.returncode == 0, got.stderr[-3000:]
  return folder / 'run', got.stdout + got.stderr


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """The paper's TCG config on both kinds of problems: real tests, and assertions alone."""
  folder = tmp_path_factory.mktemp('tcg')
  model_of(folder, NAMES[2])
  (folder / 'data').mkdir()
  (folder / 'data' / 'train.json').write_text(json.dumps(tiny_checkpoint.taco_rows(20)))
  lines = (json.dumps(row) + '\n' for row in tiny_checkpoint.human_eval_rows(12))
  (folder / 'data' / 'train-assertions.jsonl').write_text(''.join(lines))
  return folder, *train(folder, NAMES[2], folder / 'data', *LESS)


def test_a_run_that_finds_nothing_says_so_and_ends_whole(whole):
  _, run, told = whole
  summary = json.loads((run / 'summary.json').read_text())
  stages = [row['stage'] for row in summary['policy']]
  assert stages == ['base', 'round0/sft', 'round0/rl'] and summary['prm'][0]['round'] == 0
  assert [row['stage'] for row in summary['tcg']] == ['base', 'sft', 'dpo']
  assert 'round0/policy_sft: skipped: no program passed its tests; the policy stays' in told
  # Problems with assertions alone are judged by these, and there are fewer than asked for.
  judged = int(re.search(r'0 of (\d+) problems are judged by generated tests', told)[1])
  assert f'rl.problems=40, but {judged} have tests: an iteration has those' in told
  # The statement that is too long and the one with a tag are left out, the others are read.
  assert 'train: 1 problems left out: 1 have more than data.max_prompt_tokens=128' in told
  assert "contains the step tag '<Step_End>'" in told
  metrics = [json.loads(line) for line in (run / 'metrics.jsonl').read_text().splitlines()]
  assert {'tcg/sft', 'tcg/dpo', 'round0/rl/policy'} <= {row['stage'] for row in metrics}


def test_its_adapters_are_exported_merged_and_apart(whole, tmp_path):
  folder, run, _ = whole
  for name in ('tcg/dpo', 'round0/prm'):
    export.export(run, tmp_path / name / 'merged', name)
    export.export(run, tmp_path / name / 'peft', name, adapter=True)
    settings = json.loads((tmp_path / name / 'peft' / 'adapter_config.json').read_text())
    assert settings['base_model_name_or_path'] == str(folder / 'model')
  assert settings['rank_pattern'] == {'q_proj': 24, 'v_proj': 24}  # the PRM's above the policy's
  assert (tmp_path / 'round0/prm/peft/prm_head.safetensors').is_file()
  base, model = hf.load(folder / 'model')[1], hf.load(tmp_path / 'tcg/dpo/merged')[1]
  assert jax.tree.map(np.shape, model) == jax.tree.map(np.shape, base)
  np.testing.assert_array_equal(model['embed'], base['embed'])
  packed = lora.merged(lora.quantised(base))
  moved = np.abs(np.float32(model['layers']['q']) - np.float32(packed['layers']['q'])).max()
  assert 0 < moved < 0.01  # one step from the base in four bits


@pytest.mark.parametrize('name', NAMES)
def test_the_config_says_what_it_needs_and_fits_the_checkpoint(name, tmp_path):
  text = (ROOT / 'configs' / f'{name}.yaml').read_text()
  head = text[: text.index('run:')]
  assert f'--config configs/{name}.yaml' in head and 'GB' in head and 'GPU' in head
  folder, source = model_of(tmp_path, name), tmp_path / 'taco.json'
  source.write_text(json.dumps(tiny_checkpoint.taco_rows(4)))
  found = config.load(
    ROOT / 'configs' / f'{name}.yaml', [f'model.path={folder}', f'data.source={source}']
  )
  assert found.lora.used and found.model.chat and found.model.remat
  tags = Tokenizer(folder, chat=True)
  assert len({*tags.action_ids, tags.step_end_id}) == 4
  model, params = hf.load(folder)
  assert max(tags.action_ids) < model.config.vocab_size
  before = hf.load(tmp_path / 'hub')[1]
  pieces = Tokenizer(tmp_path / 'hub').encode('<Step_End>')
  for rows in {'embed', 'lm_head'} & params.keys():
    mean = np.float32(before[rows])[pieces].mean(0)
    np.testing.assert_allclose(np.float32(params[rows][tags.step_end_id]), mean, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize('name', NAMES)
def test_all_rounds_on_real_problems(name, tmp_path):
  if not SHARED.is_dir():
    pytest.skip(f'{SHARED} is not there')
  model_of(tmp_path, name)
  (tmp_path / 'data').mkdir()
  taco = json.loads((SHARED / 'taco_train_easy_10.json').read_text())
  (tmp_path / 'data' / 'train.json').write_text(json.dumps(taco))
  text = gzip.decompress((SHARED / 'HumanEval.jsonl.gz').read_bytes()).decode()
  (tmp_path / 'data' / 'train-assertions.jsonl').write_text(text)
  run, _ = train(tmp_path, name, tmp_path / 'data', 'run.rounds=2', 'data.max_prompt_tokens=512')
  summary = json.loads((run / 'summary.json').read_text())
  assert [row['stage'] for row in summary['policy']][-1] == 'round1/rl'
  assert len(summary['prm']) == 2 and len(summary['search']) == 3


@pytest.mark.slow
def test_adapters_learn_in_every_stage(tmp_path):
  """The embedded base, which solves problems: nothing is skipped, only adapters are kept."""
  run = tmp_path / 'run'
  flags = f'{os.environ.get("XLA_FLAGS", "")} --xla_force_host_platform_device_count=1'
  command = [sys.executable, '-m', 'o1jax.train', '--config', 'configs/smoke.yaml']
  command += [f'run.dir={run}', 'lora.base=nf4', 'lora.policy.rank=8', 'lora.tcg.rank=1']
  command += ['lora.prm.rank=4', 'lora.prm.modules=[q_proj, v_proj]', 'rl.algorithm=ppo']
  env = os.environ | {'XLA_FLAGS': flags}
  got = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=1500)
  assert got.returncode == 0, got.stderr[-3000:]
  assert 'skipped:' not in got.stdout
  whole = sum(x.size for x in jax.tree.leaves(hf.read_model(ROOT / 'o1jax/base_model').shapes()))
  for name in store.saved_params(run):
    params = checkpoints.load_tree(run / 'stages' / name)
    assert lora.is_detached(params), name
    assert sum(x.size for x in jax.tree.leaves(params)) < whole / 4, name
  moved = checkpoints.load_tree(run / 'stages/round1/prm/prm')['trunk']['layers']
  assert np.abs(moved['q']['b']).max() > 0 and np.abs(moved['q']['base']['frozen']['b']).max() > 0
  export.export(run, tmp_path / 'out')
  export.export(run, tmp_path / 'prm', 'round1/prm')
