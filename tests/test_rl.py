"""Which problems RL draws, and its replay: verified paths, and these alone, are trained on."""

import collections
import dataclasses
import pathlib

import jax
import numpy as np
import pytest

from o1jax.batch import TokenBatch
from o1jax.config import RlConfig, load
from o1jax.data.pack import pack
from o1jax.data.steps import program_step
from o1jax.learn.objectives import sft_loss
from o1jax.learn.state import init_state
from o1jax.learn.update import make_update
from o1jax.stages import rl
from o1jax.stages.drawn import draw_problems
from o1jax.stages.fit import optimizer, place
from o1jax.stages.rollouts import Rollouts
from o1jax.stages.setup import opened
from o1jax.types import ACCEPTED, WRONG_ANSWER, Problem, Step, Trajectory, Verdict

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


def tried(problem, version, *statuses):
  return [
    Trajectory(problem, (), verdict=Verdict(s), policy_version=version, origin='rl')
    for s in statuses
  ]


def drawn(prioritised, seen, times=3000):
  config = RlConfig(problems=2, minibatch=16, prioritised=prioritised)
  problems = [Problem(name, '') for name in ('solved', 'half', 'failed', 'new')]
  rng = np.random.default_rng(0)
  counts = collections.Counter()
  for _ in range(times):
    found = draw_problems(config, problems, seen, rng)
    assert len({p.id for p in found}) == 2
    counts.update(p.id for p in found)
  return {name: counts[name] / times for name in ('solved', 'half', 'failed', 'new')}


def test_what_failed_last_is_drawn_oftener():
  seen = [
    *tried('solved', 0, WRONG_ANSWER, WRONG_ANSWER),  # an older policy's: does not count
    *tried('failed', 0, ACCEPTED, ACCEPTED),
    *tried('solved', 1, ACCEPTED, ACCEPTED),
    *tried('half', 1, ACCEPTED, WRONG_ANSWER),
    *tried('failed', 1, WRONG_ANSWER, WRONG_ANSWER),
  ]
  share = drawn(True, seen)
  # Two draws without replacement by weights .05, .55, 1.05, 1.05 of 2.70 in all.
  weights = {'solved': 0.05, 'half': 0.55, 'failed': 1.05, 'new': 1.05}
  expected = {
    a: (w + sum(v * w / (2.7 - v) for b, v in weights.items() if b != a)) / 2.7
    for a, w in weights.items()
  }
  for name, rate in expected.items():
    assert share[name] == pytest.approx(rate, abs=0.03)
  assert all(rate == pytest.approx(0.5, abs=0.03) for rate in drawn(False, seen).values())


def test_rollouts_of_an_older_policy_are_weighed_by_the_present_one(run):
  cap, rows = 1.2, 8
  weighed, plain = (
    dataclasses.replace(
      run,
      config=run.config.model_copy(
        update={'rl': run.config.rl.model_copy(update={'importance_cap': c})}
      ),
    )
    for c in (cap, 0.0)
  )
  documents = [
    run.encoder.document(p, path(run, i, ACCEPTED).steps) for i, p in enumerate(run.train)
  ]
  tokens, generated = np.zeros((2, rows, run.row_tokens), np.int32)
  for row, document in enumerate(documents[:rows]):
    tokens[row, : len(document.ids)] = document.ids
    generated[row, document.prompt : len(document.ids)] = 1
  rng = np.random.default_rng(0)
  older = (-2.0 * rng.random(tokens.shape) * generated).astype(np.float32)
  rollouts = Rollouts(
    problems=[],
    paths=[()] * rows,
    outcome=rng.integers(0, 2, rows).astype(np.float32),
    valid=np.ones(rows, np.float32),
    process=np.zeros((rows, 1), np.float32),
    mask=np.ones((rows, 1), np.float32),
    tokens=tokens,
    generated=generated.astype(bool),
    logprobs=older,
    step_ids=generated,
    sampled_tokens=int(generated.sum()),
    version=0,
  )
  args = (run.base, run.base, rollouts, 1.0)
  batch, unweighed = (rl._rollout_batch(there, *args) for there in (weighed, plain))
  views = TokenBatch(batch.tokens, batch.positions, batch.segments, batch.mask)
  now = np.asarray(rl.row_logprobs(run.model, run.base, views)) * batch.mask
  np.testing.assert_allclose(batch.old_logprobs, now, atol=1e-5)
  weights = np.minimum(np.exp(now - older), cap)
  assert (weights[batch.mask > 0] < 0.9).any() and (weights == cap).any()
  expected = unweighed.advantages * weights
  np.testing.assert_allclose(batch.advantages, expected, atol=1e-5)
  np.testing.assert_array_equal(unweighed.old_logprobs, older * batch.mask)
