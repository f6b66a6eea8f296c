"""The config: every fault named in one message, with the remedy, and without starting JAX."""

from __future__ import annotations

import subprocess
import sys

import pytest

from o1jax import config as config_lib
from o1jax.config import Config, ConfigError


@pytest.fixture
def write(tmp_path):
  def write(text: str):
    path = tmp_path / 'run.yaml'
    path.write_text(text)
    return path

  return write


def faults(path, *overrides):
  with pytest.raises(ConfigError) as caught:
    config_lib.load(path, overrides)
  return list(caught.value.faults)


def test_defaults_survive_partial_sections(write):
  config = config_lib.load(write('tcg:\n  dpo: {lr: 1e-5}\nprm:\n'), ['search.simulations=3'])
  assert config.tcg.dpo.lr == 1e-5  # YAML reads 1e-5 as a string
  assert config.tcg.dpo.steps == Config().tcg.dpo.steps != Config().tcg.sft.steps
  assert config.search.simulations == 3
  assert config.prm == Config().prm


def test_overrides_win_and_are_read_as_yaml(write):
  path = write('run: {seed: 1}\nsandbox: {workers: 2}\n')
  config = config_lib.load(path, ['run.seed=2', 'sandbox.workers=null', 'rl.control=false'])
  assert (config.run.seed, config.sandbox.workers, config.rl.control) == (2, None, False)


def test_frozen():
  with pytest.raises(ValueError, match='frozen'):
    Config().run.seed = 3


def test_all_faults_in_one_message(write):
  path = write(
    'serach: {simulations: 3}\n'
    'rl: {lr: fast, kl_estimator: k9}\n'
    'tcg: {problems: 900, sft: {batch: 10, accumulate: 4}}\n'
    'prm: 3\n'
    'model: {path: /nowhere}\n'
  )
  found = faults(path, 'search.simulatoins=3', 'eval.samples=0', 'broken')
  text = '\n'.join(found)
  assert len(found) == 10, text
  for part in (
    'serach: no such key; did you mean search?',
    'search.simulatoins=3: no such key; did you mean search.simulations?',
    "rl.lr='fast': expected a valid number",
    "rl.kl_estimator='k9': expected 'k1', 'k2' or 'k3'",
    'tcg.problems=900 exceeds data.train_problems=400; use at most that',
    'tcg.sft: batch=10 does not divide by accumulate=4; use a multiple of 4',
    'prm=3: expected a section of keys',
    'eval.samples=0: expected greater than or equal to 1',
    "model.path='/nowhere': no such folder",
    "'broken' is no override; expected section.key=value",
  ):
    assert part in text


def test_a_round_has_no_more_problems_than_there_are(write):
  found = faults(write('data: {train_problems: 40, per_round: 50}\nrl: {problems: 48}\n'))
  assert [text.split(';')[0] for text in found] == [
    'tcg.problems=400 exceeds data.train_problems=40',
    'data.per_round=50 exceeds data.train_problems=40',
  ]


@pytest.mark.parametrize(
  'override, meant',
  [
    ('rl.gruop=4', 'rl.group'),
    ('rl.simulations=4', 'search.simulations'),
    ('policy_sft.lr=4', 'policy_sft.optim.lr'),
    ('seed=4', 'run.seed'),
    ('sandbx.cpu_s=4', 'sandbox'),
  ],
)
def test_did_you_mean(write, override, meant):
  (fault,) = faults(write(''), override)
  assert fault.endswith(f'no such key; did you mean {meant}?')


def test_a_key_of_several_types_is_one_fault(write):
  found = faults(write(''), 'mesh.sampling=most', 'prm.renew=never', 'rl.lrr=1')
  assert found == [
    "mesh.sampling='most': expected 'auto' or 'train' or a valid integer, unable to parse string "
    'as an integer',
    "prm.renew='never': expected 'last' or a valid boolean, unable to interpret input",
    'rl.lrr=1: no such key; did you mean rl.lr?',
  ]
  (fault,) = faults(write('mesh: {sampling: 0}'))
  assert fault.startswith('mesh.sampling=0: expected')


def test_a_prm_is_renewed_behind_every_or_the_last_round(write):
  renewed = lambda value: [  # noqa: E731
    config_lib.load(write(f'prm: {{renew: {value}}}')).prm.renews(i, 3) for i in range(3)
  ]
  assert renewed('true') == [True] * 3
  assert renewed('false') == [False] * 3
  assert renewed('last') == [False, False, True]


def test_held_back_problems_are_tried(write):
  for prm in ('{}', '{renew: last}'):
    (fault,) = faults(write(f'data: {{judge_problems: 9}}\nprm: {prm}'))
    assert fault == (
      'data.judge_problems=9 are for PRMs that learn from roll-outs; set prm.samples to 16, or so'
    )
  config_lib.load(write('data: {judge_problems: 9}\nprm: {samples: 4}'))
  prm = config_lib.load(write('prm: {renew: last, renew_steps: 7}')).prm
  assert (prm.optim_of(True).steps, prm.optim_of(False).steps) == (7, 200)
  assert config_lib.load(write('prm: {renew: last}')).prm.optim_of(True).steps == 200


def test_relation_names_values_and_remedy(write):
  (fault,) = faults(write('rl: {minibatch: 100}'))
  assert fault == 'rl.minibatch=100 does not divide rl.problems*rl.group=384; use 96'
  assert config_lib.load(write('rl: {minibatch: 128}')).rl.optim.steps == 24 * 3


def test_search_settings_of_trees_are_not_set_for_descents(write):
  (fault,) = faults(write('search: {mix: 0.5}'))
  assert fault.startswith("search.mix=0.5 has no meaning with search.rule='guided'")
  (fault,) = faults(write('search: {most_children: 4}'))
  assert 'leaves no room above search.children=4' in fault
  found = config_lib.load(write('search: {rule: gumbel, mix: 0.5, most_children: 6}'))
  assert found.search.rule == 'gumbel'


def test_paths_without_replacement_are_drawn_as_the_policy_would(write):
  found = faults(write('search: {rule: distinct, temperature: 0.7, top_k: 5, mix: 0.5}'))
  assert len(found) == 3
  assert "search.mix=0.5 has no meaning with search.rule='distinct'" in found[0]
  assert "search.temperature=0.7 has no meaning with search.rule='distinct'" in found[1]
  assert found[1].endswith('set it to 1') and found[2].endswith('set it to 0')
  (fault,) = faults(write('search: {rule: distinct, keep_trees: true}'))
  assert fault.startswith("search.keep_trees=True has no meaning with search.rule='distinct'")


def test_no_follow_up_faults_from_the_default_of_a_faulty_key(write):
  # With the default group of 8, 40 rows would not divide 12 problems * 8.
  found = faults(write('rl: {problems: 12, minibatch: 40, group: x}'))
  assert len(found) == 1 and found[0].startswith("rl.group='x'")


@pytest.mark.parametrize(
  'text, part',
  [
    ('rl: {lr: 1, lr: 2}', "key 'lr' stands twice"),
    ('rl: [', 'not YAML: line 1'),
    ('- 1', 'holds a list'),
    ('1: 2', '1=2: no such key'),
    ('rl: {lr: .nan}', 'rl.lr=nan'),
  ],
)
def test_unreadable(write, text, part):
  (fault,) = faults(write(text))
  assert part in fault


def test_missing_file_names_its_neighbour(write):
  path = write('')
  (fault,) = faults(path.with_name('rnu.yaml'))
  assert fault == f'no such file; did you mean {path}?'


def test_model_folder_without_weights(write, tmp_path):
  folder = tmp_path / 'model'
  folder.mkdir()
  (folder / 'config.json').write_text('{}')
  (fault,) = faults(write(f'model: {{path: {folder}}}'))
  assert 'lacks *.safetensors, tokenizer*' in fault


def test_yaml_round_trip_and_diff(write):
  config = config_lib.load(write('rl: {lr: 1e-4}\nrun: {dir: a}'))
  assert config_lib.load(write(config_lib.to_yaml(config))) == config
  other = config_lib.load(write('rl: {lr: 1e-3}\nrun: {dir: b}'))
  assert config_lib.diff(config, other) == ['rl.lr: 0.0001 -> 0.001']
  assert 'run.dir' in config_lib.diff(config, other, ignore=())[1]
  old = config.model_dump(mode='json')
  del old['rl']['group']
  assert config_lib.diff(old, config) == ['rl.group: (absent) -> 8']


def test_a_program_with_its_own_schema(write):
  class Pretrain(config_lib.Section):
    optim: config_lib.OptimConfig = config_lib.OptimConfig(steps=1000)

  config = config_lib.load(write('optim: {lr: 3e-3}'), ['optim.batch=8'], schema=Pretrain)
  assert config == Pretrain(optim=config_lib.OptimConfig(lr=3e-3, steps=1000, batch=8))
  with pytest.raises(ConfigError, match=r'did you mean optim\.steps'):
    config_lib.check({'optim': {'stesp': 1}}, schema=Pretrain)


def test_reads_without_jax():
  code = (
    'import sys, o1jax.config; o1jax.config.check({});'
    'sys.exit(any(m in sys.modules for m in ("jax", "numpy", "transformers")))'
  )
  assert subprocess.run([sys.executable, '-c', code]).returncode == 0


@pytest.mark.parametrize(
  'given, text',
  [
    ({'policy': {'modules': ['w_proj']}}, "'w_proj' is none of q_proj, k_proj"),
    ({'policy': {'modules': []}}, r"chooses nothing; use \['\*_proj'\]"),
    ({'base': 'nf4', 'policy': {'rank': 1}}, 'lora.tcg.rank=0 trains all weights; use a rank of 1'),
  ],
)
def test_adapters_that_cannot_be(given, text):
  with pytest.raises(ConfigError, match=text):
    config_lib.check({'lora': given})
