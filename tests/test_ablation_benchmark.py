"""The ablation's bookkeeping: what a variant starts from, and how seeds are pooled."""

import importlib.util
import json
import pathlib

import pytest

FILE = pathlib.Path(__file__).parents[1] / 'benchmarks/ablation.py'


@pytest.fixture(scope='module')
def ablation():
  spec = importlib.util.spec_from_file_location('ablation', FILE)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def finish(folder, *stages):
  for stage in stages:
    (folder / 'stages' / stage).mkdir(parents=True)
    (folder / 'stages' / stage / 'done.json').write_text(json.dumps({'seconds': 1}))


def test_a_variant_starts_behind_the_prm_and_no_later(ablation, tmp_path):
  source, folder = tmp_path / 'run', tmp_path / 'variant'
  (source / 'stages/tcg_tests/tests').mkdir(parents=True)
  (source / 'run.json').write_text('{}')
  finish(source, *ablation.BEFORE[:-1], 'round0/rl', 'round1/synthesis', 'test_base/report')
  with pytest.raises(SystemExit, match='round0/prm is not finished'):
    ablation.prepared(source, folder)
  assert not folder.exists()
  finish(source, ablation.BEFORE[-1])
  ablation.prepared(source, folder)
  stages = {p.parent.relative_to(folder / 'stages').as_posix() for p in folder.rglob('done.json')}
  assert stages == set(ablation.BEFORE) and (folder / 'stages/tcg_tests/tests').is_dir()
  (folder / 'mark').touch()
  ablation.prepared(source, folder)  # what is there is left alone
  assert (folder / 'mark').exists()


def test_variants_change_settings_that_there_are(ablation):
  quickstart = FILE.parents[1] / 'configs/quickstart.yaml'
  plain = ablation.load(quickstart).rl
  for overrides in ablation.VARIANTS.values():
    changed = ablation.load(quickstart, overrides).rl
    assert changed != plain and changed.rows * changed.iterations == plain.rows * plain.iterations


def test_seeds_are_averaged_by_problem_before_they_are_compared(ablation):
  def row(greedy, tokens=10):
    sampled = [g / 2 for g in greedy]
    means = {'greedy': sum(greedy) / 4, 'sampled': sum(sampled) / 4}
    return means | {'outcomes': {'greedy': greedy, 'sampled': sampled}, 'tokens': tokens}

  full = [row([1, 1, 0, 0]), row([0, 0, 1, 1])]  # on average every problem is solved half the time
  found = ablation.pooled([row([1, 1, 1, 1], 10), row([0, 0, 0, 0], 20)], full)
  assert (found['greedy'], found['sampled'], found['sampled_tokens']) == (0.5, 0.25, 15)
  assert found['by_seed'] == [[1.0, 0.5], [0.0, 0.0]]
  assert found['over_full'] == {
    'greedy': 0.0,
    'sampled': 0.0,
    'ci95': {'greedy': [0.0, 0.0], 'sampled': [0.0, 0.0]},
  }
  better = ablation.pooled([row([1, 1, 1, 0])] * 2, full)['over_full']
  assert better['greedy'] == 0.25 and better['ci95']['greedy'] == [-0.25, 0.5]
