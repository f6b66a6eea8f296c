"""The six steps end to end, by the command that a user types."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent


def train(tmp_path, *extra):
  command = [sys.executable, '-m', 'o1jax.train', '--config', str(ROOT / 'configs/smoke.yaml')]
  return subprocess.run(
    [*command, f'run.dir={tmp_path / "run"}', *extra],
    capture_output=True,
    text=True,
    cwd=ROOT,
    env={k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'},  # one device, as a user has
    timeout=1500,
  )


@pytest.mark.parametrize(
  ('fault', 'told'),
  [
    ('rl.gruop=4', 'did you mean'),
    ('rl.lr=fast', 'rl.lr'),
    ('mesh.data=3', 'needs 3 devices'),
    ('model.path=/nowhere', '/nowhere'),
    ('rl.minibatch=7', 'does not divide'),
    ('run.dir=/proc/nowhere', 'cannot be written'),
    ('policy_sft.optim.batch=100000000', 'lower policy_sft.optim.batch'),
  ],
)
def test_a_bad_config_is_one_clear_error(tmp_path, fault, told):
  got = train(tmp_path, fault, '--dry-run')
  assert got.returncode == 2, got.stderr[-2000:]
  assert told in got.stderr
  assert 'Traceback' not in got.stderr
  assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_the_six_steps_run_and_run_again_for_nothing(tmp_path):
  first = train(tmp_path)
  assert first.returncode == 0, first.stderr[-3000:]
  summary = json.loads((tmp_path / 'run/summary.json').read_text())
  stages = [row['stage'] for row in summary['policy']]
  assert stages[:3] == ['base', 'round0/sft', 'round0/rl']
  assert [row['stage'] for row in summary['tcg']] == ['base', 'sft', 'sft_control', 'dpo']
  assert [row['round'] for row in summary['prm']] == [0, 1]
  assert len(summary['search']) == 3
  again = train(tmp_path)
  assert again.returncode == 0, again.stderr[-3000:]
  kept = json.loads((tmp_path / 'run/summary.json').read_text())
  for key in ('policy', 'tcg', 'prm', 'search'):
    assert kept[key] == summary[key]
