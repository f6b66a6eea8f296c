"""A run in a bucket, `run.dir=gs://lab/...`, on a stand-in for Cloud Storage that runs here."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys

import fake_bucket
import jax.numpy as jnp
import numpy as np
import pytest
from test_loop import RESULTS as KEYS
from test_loop import ROOT, SMALL

from o1jax import config as config_lib
from o1jax.config import ConfigError
from o1jax.run import bucket, lease
from o1jax.run.checkpoints import Checkpoints, load_tree, save_tree, trees_below
from o1jax.run.metrics import Metrics
from o1jax.run.store import Store, check_folder

# Imported later: with the settings of the stand-in.
pytestmark = pytest.mark.skipif(not importlib.util.find_spec('gcsfs'), reason='needs gcsfs')


@pytest.fixture(scope='module')
def lab():
  with fake_bucket.served('lab') as served, pytest.MonkeyPatch.context() as patch:
    for name, value in served.env.items():
      patch.setenv(name, value)
    yield served


@pytest.fixture
def folder(lab, request):
  return bucket.place('gs://lab/' + re.sub(r'\W+', '_', request.node.name))


def config_at(folder, **rl):
  return config_lib.check({'run': {'dir': str(folder)}, 'rl': rl})


def state_of(seed):
  return {'w': jnp.arange(4096.0).reshape(64, 64) * seed, 'step': jnp.int32(seed)}


def names(lab, folder):
  start = str(folder).removeprefix('gs://lab/') + '/'
  return sorted(key.removeprefix(start) for key in lab.objects if key.startswith(start))


# places


@pytest.mark.parametrize(
  'given, told',
  [
    ('s3://lab/run', 'cannot be written by Orbax; use gs://'),
    ('gs://lab', 'names no folder in the bucket'),
    ('gs://lab/run[1]', 'holds one of *?['),
    ('gs://elsewhere/run', 'cannot be written (FileNotFoundError'),
  ],
)
def test_a_bad_bucket_is_one_clear_error(lab, given, told):
  with pytest.raises(ConfigError) as caught:
    check_folder(config_at(given))
  assert told in str(caught.value) and given in str(caught.value)


def test_without_gcsfs_it_says_what_to_install(monkeypatch):
  monkeypatch.setattr(bucket.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ConfigError, match=r"pip install 'o1jax\[bucket\]'"):
    check_folder(config_at('gs://lab/run'))


# the run's folder


def test_stages_chunks_and_growing_files(lab, folder):
  check_folder(config_at(folder))
  assert names(lab, folder) == []  # a check leaves nothing behind
  with Store(config_at(folder)) as store, Metrics(store.local) as metrics:
    chunks = store.chunks('round0/synthesis', 'trajectories')
    assert chunks.done() == set()
    for index in (1, 0):
      chunks.write(index, [{'n': index}])
    metrics.begin('round0/rl')
    for step in range(3):
      metrics.write('round0/rl', step, {'loss': 0.5})
    assert store.done('round0/synthesis') is None
    assert 'metrics.jsonl' not in names(lab, folder)  # not yet
    store.finish('round0/synthesis', {'solved': 3})
    assert 'metrics.jsonl' in names(lab, folder)
  with Store(config_at(folder)) as store, Metrics(store.local) as metrics:
    assert store.done('round0/synthesis') == {'solved': 3}
    assert list(store.chunks('round0/synthesis', 'trajectories').rows()) == [{'n': 0}, {'n': 1}]
    metrics.begin('round0/rl', after=1)
    metrics.write('round0/rl', 2, {'loss': 0.25})
    assert [row['loss'] for row in metrics.rows('round0/rl')] == [0.5, 0.5, 0.25]
    store.forget('round0/synthesis')
    assert store.done('round0/synthesis') is None
  left = names(lab, folder)
  assert [n for n in left if not n.startswith('tensorboard/')] == [
    'config.yaml',
    'metrics.jsonl',
    'run.json',
  ]
  assert len(left) == 4  # one file of events, of the last session


def test_another_config_and_strangers_are_refused(lab, folder):
  Store(config_at(folder, lr=1e-4)).close()
  with pytest.raises(ConfigError, match=r'rl\.lr'):
    Store(config_at(folder, lr=1e-3))
  Store(config_at(folder, lr=1e-3), force=True).close()
  (folder / 'other' / 'thesis.tex').write_text('x')
  with pytest.raises(ConfigError, match=r'holds thesis\.tex but no run'):
    Store(config_at(folder / 'other'))


# checkpoints


@pytest.mark.parametrize('how', ['flipped bit', 'half written'])
def test_checkpoints_come_back_and_damage_is_passed_over(lab, folder, caplog, how):
  with Checkpoints(folder) as saves:
    assert saves.restore(state_of(0)) is None
    for step in (1, 2, 3):
      saves.save(step, state_of(step), {'cursor': step})
  assert {n.partition('/')[0] for n in names(lab, folder)} == {'2', '3'}
  start = str(folder / '3').removeprefix('gs://lab/')
  if how == 'flipped bit':
    keys = [key for key in lab.objects if key.startswith(start)]
    largest = max(keys, key=lambda key: len(lab.objects[key]))
    data = bytearray(lab.objects[largest])
    data[len(data) // 2] ^= 0x40
    lab.put(largest, bytes(data))
  else:
    lab.take(f'{start}/commit_success.txt')  # is written last
  with Checkpoints(folder) as saves:
    step, state, meta = saves.restore(state_of(0))
    assert (step, meta) == (2, {'cursor': 2})
    np.testing.assert_array_equal(state['w'], state_of(2)['w'])
    assert ('passed over damaged step 3' in caplog.text) == (how == 'flipped bit')
    saves.save(3, state_of(3))
    assert saves.restore(state_of(0))[0] == 3


def test_trees_replace_one_another_and_are_found(lab, folder):
  for seed in (1, 2):
    save_tree(folder / 'stages' / 'round0' / 'rl' / 'policy', state_of(seed))
  found = load_tree(folder / 'stages' / 'round0' / 'rl' / 'policy')
  np.testing.assert_array_equal(found['w'], state_of(2)['w'])
  assert trees_below(folder / 'stages') == ['round0/rl/policy']
  start = str(folder / 'stages/round0/rl/policy').removeprefix('gs://lab/')
  lab.take(f'{start}/commit_success.txt')
  assert trees_below(folder / 'stages') == []


# the lease


class Clock:
  """Time that passes while one sleeps; `do` is done meanwhile."""

  def __init__(self, do=lambda: None):
    self.now, self.do = 0.0, do

  def __call__(self):
    return self.now

  def sleep(self, seconds):
    self.now += seconds
    self.do()


def held_by(folder, **holder):
  row = {'id': 'another', 'pid': 1, 'machine': 'elsewhere/0', 'beat': 0} | holder
  (folder / '.lock').write_bytes(json.dumps(row).encode())


def test_one_that_lives_is_not_disturbed(folder):
  first = lease.Lease(folder)
  clock = Clock(first.renew)
  with pytest.raises(lease.Held, match=f'process {os.getpid()} on .* is running in it'):
    lease.Lease(folder, clock, clock.sleep)
  assert clock.now <= lease.RENEW_S
  first.close()
  lease.Lease(folder, clock, clock.sleep).close()
  assert not (folder / '.lock').exists()


def test_a_killed_one_is_followed_at_once_here_and_in_a_minute_elsewhere(folder):
  with subprocess.Popen([sys.executable, '-c', '']) as gone:
    pass
  clock = Clock()
  held_by(folder, pid=gone.pid, machine=lease._machine())
  lease.Lease(folder, clock, clock.sleep).close()
  assert clock.now == 0
  held_by(folder, pid=gone.pid)
  lease.Lease(folder, clock, clock.sleep).close()
  assert lease.LEASE_S <= clock.now <= lease.LEASE_S + 2


def test_one_that_lost_its_lease_stops_before_it_saves(lab, folder):
  store = Store(config_at(folder))
  held_by(folder)
  store._lock.renew()
  with pytest.raises(ConfigError, match='process 1 on elsewhere has taken it over'):
    store.finish('tcg', {})
  assert 'stages/tcg/done.json' not in names(lab, folder)
  with pytest.raises(ConfigError):
    store.close()
  assert (folder / '.lock').exists()  # the other's


# a whole run


@pytest.mark.slow
def test_killed_in_a_bucket_it_ends_as_on_a_disk(lab, tmp_path):
  config = tmp_path / 'small.yaml'
  config.write_text(SMALL.replace('checkpoint_every_s: 1000', 'checkpoint_every_s: 0.001'))
  cache = {'JAX_COMPILATION_CACHE_DIR': str(tmp_path / 'compiled')}
  cache |= {'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.2', 'PYTHONPATH': str(ROOT)}
  plain = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}  # one device
  told = tmp_path / 'told.txt'

  def train(run):
    command = [sys.executable, '-m', 'o1jax.train', '--config', str(config), f'run.dir={run}']
    with told.open('a') as file:
      return subprocess.Popen(command, stdout=file, stderr=file, cwd=ROOT, env=plain | cache)

  def summary(run):
    found = json.loads((run / 'summary.json').read_bytes())
    untimed = lambda row: {k: v for k, v in row.items() if k != 'seconds'}  # noqa: E731
    return {key: [untimed(row) for row in found[key]] for key in KEYS}

  assert train(tmp_path / 'run').wait(1500) == 0, told.read_text()[-3000:]
  run = bucket.place('gs://lab/whole')
  for stage in ('round0/policy_sft', 'round0/rl'):  # killed in each, behind a save
    saved = re.compile(f'stages/{stage}/checkpoints/.*/commit_success.txt')
    process = train(run)
    while process.poll() is None and not any(map(saved.fullmatch, names(lab, run))):
      with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(0.05)
    process.kill()
    assert process.wait() == -signal.SIGKILL, told.read_text()[-3000:]
  assert train(run).wait(1500) == 0, told.read_text()[-3000:]
  assert summary(run) == summary(tmp_path / 'run')
  lines = [json.loads(line) for line in (run / 'metrics.jsonl').read_bytes().splitlines()]
  steps = [(line['stage'], line['step']) for line in lines]
  assert len(set(steps)) == len(steps)
  want = [json.loads(line) for line in (tmp_path / 'run/metrics.jsonl').read_text().splitlines()]
  assert sorted(steps) == sorted((line['stage'], line['step']) for line in want)
