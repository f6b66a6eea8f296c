"""RL's replay: verified paths, and these alone, are trained on beside the rollouts."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest

from o1jax.config import load
from o1jax.data.pack import pack
from o1jax.data.steps import program_step
from o1jax.learn.objectives import sft_loss
from o1jax.learn.state import init_state
from o1jax.learn.update import make_update
from o1jax.stages import rl
from o1jax.stages.fit import optimizer, place
from o1jax.stages.setup import opened
from o1jax.types import ACCEPTED, WRONG_ANSWER, Step, Trajectory, Verdict

SMOKE = pathlib.Path(__file__).parents[1] / 'configs/smoke.yaml'


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  folder = tmp_path_factory.mktemp('run')
  config = load(SMOKE, [f'run.dir={folder}', 'rl.replay=3', 'mesh.data=4', 'mesh.tensor=2'])
  with opened(config, ['rl']) as there:
    yield there


def path(run, number, status):
  steps = (Step(1, f'plan {number}'), program_step(f'print({number})'))
  return Trajectory(run.train[number].id, steps, verdict=Verdict(status))


def replayed(run, seen):
  tx = optimizer(run.config.rl.optim)
  loss = sft_loss(run.model)
  state = init_state(place(run.bench, run.model, run.base), tx)
  state, broken = rl._replay(run, make_update(loss, tx), state, seen, seed=5)
  assert broken == 0
  return state


def nll(run, params, trajectory):
  by_id = {p.id: p for p in run.train}
  rows = pack([run.encoder.document(by_id[trajectory.problem_id], trajectory.steps)], 96)
  total, count, _ = sft_loss(run.model)(params, rows)
  return float(total / count)


def test_replay_trains_on_accepted_paths_alone(run):
  good, bad = path(run, 0, ACCEPTED), path(run, 1, WRONG_ANSWER)
  state = replayed(run, [good, bad])
  assert int(state.step) == run.config.rl.replay
  assert nll(run, state.params, good) < nll(run, run.base, good) - 0.01
  without = replayed(run, [good])
  for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(without.params), strict=True):
    np.testing.assert_array_equal(a, b)


def test_without_a_verified_path_or_with_replay_off_nothing_is_trained(run):
  off = dataclasses.replace(
    run, config=run.config.model_copy(update={'rl': run.config.rl.model_copy(update={'replay': 0})})
  )
  for there, seen in ((run, [path(run, 1, WRONG_ANSWER)]), (off, [path(run, 0, ACCEPTED)])):
    assert int(replayed(there, seen).step) == 0
