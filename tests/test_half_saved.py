"""Half-grown trees on disk: what comes back, what a signal and damage do."""

import os
import signal
import types

import numpy as np
import pytest

from o1jax.config import Config
from o1jax.run.stop import Stopped, deferred
from o1jax.run.store import Store
from o1jax.stages.execute import Executor
from o1jax.stages.half_saved import HalfSaved
from o1jax.types import ACCEPTED, Problem, Step, TestCase, TestResult, Verdict

TESTS = (TestCase('1\n', '2\n'),)
PROBLEMS = [Problem('a', 'double', tests=TESTS), Problem('b', 'treble', tests=TESTS)]
PATH = (Step(3, '```python\nprint(2)\n```'),)
STATE = {'part0.rollout_value': np.array([1.0, np.nan]), 'part0.rollout': np.arange(5)}


class Pool:
  """A sandbox that accepts everything and counts."""

  limits = None

  def __init__(self):
    self.jobs = 0

  def judge(self, jobs):
    jobs = list(jobs)
    self.jobs += len(jobs)
    return [Verdict(ACCEPTED, (TestResult(ACCEPTED, cpu_s=0.25),), '') for _ in jobs]


@pytest.fixture
def run(tmp_path):
  config = Config.model_validate(
    {'run': {'dir': str(tmp_path / 'run'), 'checkpoint_every_s': 1e-6}}
  )
  said = []
  progress = types.SimpleNamespace(say=said.append)
  with Store(config) as store:
    bench = types.SimpleNamespace(store=store, progress=progress)
    yield types.SimpleNamespace(config=config, bench=bench, executor=Executor(Pool()), said=said)


def half(run, stop, seed=7):
  return HalfSaved(run, 'round0/synthesis', PROBLEMS, seed, stop)


def later(run):
  """The same run in a new process: nothing is remembered."""
  run.executor = Executor(Pool())
  return run


def test_trees_come_back_with_their_verdicts_and_nothing_runs_twice(run):
  verdicts = run.executor.judge(PROBLEMS, [PATH, PATH])
  with deferred() as stop:
    assert half(run, stop).read() is None
    half(run, stop).boundary(lambda: dict(STATE))
    later(run)
    saved = half(run, stop).read()
    assert half(run, stop, seed=8).read() is None  # another search
  for name, array in STATE.items():
    np.testing.assert_array_equal(saved[name], array)
  assert saved.keys() == STATE.keys()
  assert 'goes on behind 2 roll-outs' in run.said[0]
  assert run.executor.judge(PROBLEMS, [PATH, PATH]) == verdicts
  assert run.executor._pool.jobs == 0
  run.bench.store.drop_checkpoints('round0/synthesis')
  with deferred() as stop:
    assert half(run, stop).read() is None


def test_a_signal_saves_at_the_boundary_and_stops(run):
  run.config = run.config.model_copy(
    update={'run': run.config.run.model_copy(update={'checkpoint_every_s': 1000.0})}
  )
  with pytest.raises(Stopped), deferred() as stop:
    saves = half(run, stop)
    saves.boundary(lambda: pytest.fail('not due'))
    os.kill(os.getpid(), signal.SIGTERM)
    saves.boundary(lambda: dict(STATE))
  with deferred() as stop:
    assert half(run, stop).read() is not None


@pytest.mark.parametrize('how', ['cut', 'flipped', 'empty'])
def test_damage_is_passed_over_with_a_word(run, caplog, how):
  with deferred() as stop:
    saves = half(run, stop)
    saves.boundary(lambda: dict(STATE))
    data = bytearray(saves.path.read_bytes())
    middle = data.index(b'verdicts.npy') + 60  # behind the entry's header, in its data
    data[middle] ^= 0xFF
    broken = {'cut': data[: len(data) // 2], 'flipped': data, 'empty': b''}[how]
    saves.path.write_bytes(bytes(broken))
    assert half(run, stop).read() is None
  assert 'passed over damaged half-grown trees' in caplog.text
