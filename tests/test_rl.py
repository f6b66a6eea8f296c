"""Which problems RL draws, and its replay: verified paths, and these alone, are trained on."""

import collections
import dataclasses
import pathlib
import types

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


def with_rl(run, **changes):
  config = run.config.model_copy(update={'rl': run.config.rl.model_copy(update=changes)})
  return dataclasses.replace(run, config=config)


def rollouts_of(run, rows=8):
  """Paths of one plan and one program, which some policy has sampled; every other one is right."""
  paths = [path(run, row, ACCEPTED).steps for row in range(rows)]
  tokens, generated = np.zeros((2, rows, run.row_tokens), np.int32)
  step_ids = np.zeros_like(tokens)
  for row, (problem, steps) in enumerate(zip(run.train, paths, strict=False)):
    document = run.encoder.document(problem, steps)
    tokens[row, : len(document.ids)] = document.ids
    generated[row, document.prompt : len(document.ids)] = 1
    step_ids[row] = generated[row] * 2
    first = len(run.encoder.step(steps[0]))
    step_ids[row, document.prompt : document.prompt + first] = 1
  rng = np.random.default_rng(0)
  return Rollouts(
    problems=[],
    paths=paths,
    outcome=np.arange(rows, dtype=np.float32) % 2,
    valid=np.ones(rows, np.float32),
    process=rng.random((rows, 2)).astype(np.float32),
    mask=np.ones((rows, 2), np.float32),
    tokens=tokens,
    generated=generated.astype(bool),
    logprobs=(-2.0 * rng.random(tokens.shape) * generated).astype(np.float32),
    step_ids=step_ids,
    sampled_tokens=int(generated.sum()),
    version=0,
  )


def test_rollouts_of_an_older_policy_are_weighed_by_the_present_one(run):
  rollouts, cap = rollouts_of(run), 1.2
  args = (run.base, run.base, rollouts, 1.0)
  batch, unweighed = (rl._rollout_batch(with_rl(run, importance_cap=c), *args) for c in (cap, 0.0))
  views = TokenBatch(batch.tokens, batch.positions, batch.segments, batch.mask)
  now = np.asarray(rl.row_logprobs(run.model, run.base, views)) * batch.mask
  np.testing.assert_allclose(batch.old_logprobs, now, atol=1e-5)
  weights = np.minimum(np.exp(now - rollouts.logprobs), cap)
  assert (weights[batch.mask > 0] < 0.9).any() and (weights == cap).any()
  np.testing.assert_allclose(batch.advantages, unweighed.advantages * weights, atol=1e-5)
  np.testing.assert_array_equal(unweighed.old_logprobs, rollouts.logprobs * batch.mask)


@pytest.mark.parametrize(
  'changes',
  [
    {'algorithm': 'ppo', 'critic': 'own', 'kl_coef': 0.1, 'kl_in': 'reward', 'gae': 'step'},
    {'algorithm': 'dpo', 'pairs': 'both', 'preference': 1.0},
  ],
)
def test_an_iteration_raises_what_was_paid_for(run, changes):
  """Every algorithm through the stage's own batches and loss: the right paths become likelier."""
  there, rollouts = with_rl(run, **changes, epochs=3, lr=1e-4), rollouts_of(run)
  config = there.config.rl
  start, tx = rl._start(there, run.base), optimizer(config.optim)
  state, update = init_state(start, tx), make_update(rl.loss_of(run.model, config), tx)
  args = (jax.tree.map(np.array, start), run.base, rollouts, 0.9, np.random.default_rng(0))
  state, scalars, broken = rl._learn(there, update, state, *args)
  assert broken == scalars['skipped'] == scalars['empty'] == 0
  assert scalars['updates'] == (6 if config.algorithm == 'dpo' else 3)  # half as many pairs
  views = TokenBatch(
    rollouts.tokens,
    np.broadcast_to(np.arange(run.row_tokens, dtype=np.int32), rollouts.tokens.shape).copy(),
    (rollouts.tokens > 0).astype(np.int32),
    rollouts.generated.astype(np.float32),
  )
  means = [
    (np.asarray(rl.row_logprobs(run.model, params, views)) * views.loss_mask).sum(axis=1)
    for params in (run.base, rl._policy_of(state.params))
  ]
  wrong, right = (means[1] - means[0]).reshape(-1, 2).mean(axis=0)
  assert right > wrong + 0.01


@pytest.mark.parametrize('kept', ['start', 'iteration'])
def test_what_an_iteration_is_told(run, kept, monkeypatch):
  """Reference, alpha and version of each iteration of the stage; the rest is played."""
  there = with_rl(run, iterations=3, reference=kept, alpha_start=1.0, alpha_end=0.5)
  told, recorded = [], []

  def learn(run, update, state, params, reference, rollouts, alpha, rng):
    told.append((params['norm'].mean(), reference['norm'].mean(), alpha))
    params = dict(state.params, norm=state.params['norm'] + 1)
    return dataclasses.replace(state, params=params), {}, 0

  class Ahead:
    def __init__(self, run, round_, tests, later):
      del run, round_, tests, later
      self.refuted = {}

    def blank(self):
      return {}

    saved = blank

    def take(self, iteration, policy, seen):
      own = types.SimpleNamespace(result=list)
      return types.SimpleNamespace(version=max(0, iteration - 1), rng=None, own=own)

  played = {
    'Ahead': Ahead,
    '_learn': learn,
    'roll_out': lambda run, prm, drawn: types.SimpleNamespace(sampled_tokens=1),
    '_record': lambda run, chunks, k, rollouts, name, version: recorded.append(version) or [],
    'refutations': lambda config, rollouts, own: [],
    '_replay': lambda run, imitate, state, seen, seed: (state, 0),
    'summary': lambda config, rollouts, alpha, own: {'outcome': 0.0},
  }
  for name, instead in played.items():
    monkeypatch.setattr(rl, name, instead)
  chunks = there.bench.store.chunks(f'told_{kept}', 'trajectories')
  rl._train(there, f'told_{kept}', 1, run.base, None, {}, [], chunks)
  first = float(run.base['norm'].mean())
  now = [first + k for k in range(3)]
  np.testing.assert_allclose([t[0] for t in told], now, rtol=1e-5)
  references = [first] * 3 if kept == 'start' else now
  np.testing.assert_allclose([t[1] for t in told], references, rtol=1e-5)
  assert [t[2] for t in told] == [1.0, 0.75, 0.5]
  assert recorded == [3, 3, 4]  # of round 1, whose first policy is the third


@pytest.mark.parametrize(
  'schedule, expected',
  [
    ('linear', [1.0, 0.8, 0.6, 0.4, 0.2]),
    ('log', [1 - 0.8 * np.log1p(t) / np.log(5) for t in range(5)]),
    ('constant', [1.0] * 5),
  ],
)
def test_alpha_falls_from_its_start_to_its_end(run, schedule, expected):
  there = with_rl(run, iterations=5, alpha_start=1.0, alpha_end=0.2, alpha_schedule=schedule)
  np.testing.assert_allclose([rl.alpha_at(there, t) for t in range(5)], expected, atol=1e-9)
