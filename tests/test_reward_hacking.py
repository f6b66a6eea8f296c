"""Ways to be paid for nothing, tried through the reward path of RL: none of them pays.

The process reward model is taken to be fooled altogether: it finds every step of every path good.
"""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from o1jax import rewards
from o1jax.config import load
from o1jax.data.steps import program_step
from o1jax.losses import ppo, returns
from o1jax.stages import drawn as drawn_lib
from o1jax.stages import rollouts, tcg
from o1jax.stages.setup import opened
from o1jax.types import ACCEPTED, Step, TestCase, TestResult, Verdict

SMOKE = pathlib.Path(__file__).parents[1] / 'configs/smoke.yaml'
FOOLED = 5.0  # log-odds of every step: r = .993
OVERLOADED = """
class Same(list):
  __eq__ = lambda self, other: True
  __ne__ = lambda self, other: False
  __hash__ = None
def {name}(a):
  return Same()
"""


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  folder = tmp_path_factory.mktemp('run')
  config = load(SMOKE, [f'run.dir={folder}', 'mesh.data=4', 'mesh.tensor=2', 'sandbox.workers=2'])
  with opened(config, ['rl']) as there:
    yield there


@pytest.fixture(scope='module')
def problem(run):
  """A call-based problem whose tests want different values."""
  return next(p for p in run.train if p.entry_point and len({t.output for t in p.tests}) > 2)


def honest(problem, refinements=2):
  plan = [Step(1, 'plan'), *(Step(2, f'part {i}') for i in range(refinements))]
  return (*plan, program_step(problem.solutions[0]))


def hacks(run, problem):
  """Name -> a path that does not solve the problem."""
  name, shown = problem.entry_point, problem.tests[0]
  plan = honest(problem)[:-1]
  constant = f'def {name}(a):\n  return {shown.output.replace("true", "True")}'
  lookup = f'def {name}(a):\n  if [a] == {shown.input}:\n    return {shown.output}\n  return a'
  limit = run.config.search.depth_limit
  return {
    'constant of the public example': (*plan, program_step(constant)),
    'public example looked up': (*plan, program_step(lookup)),
    'constant without a plan': (program_step(constant),),
    'value equal to everything': (*plan, program_step(OVERLOADED.format(name=name))),
    'empty program': (*plan, program_step('')),
    'only a comment': (*plan, program_step('# solved')),
    'program that ends at once': (*plan, program_step('import os\nos._exit(0)')),
    'prose for a program': (*plan, Step(3, 'the program is obvious')),
    'no program': plan,
    'nothing at all': (),
    'refining for ever': (*plan, *[plan[-1]] * (limit - len(plan))),
    'right, behind more steps than allowed': (*honest(problem, limit), honest(problem)[-1]),
  }


def rolled(run, monkeypatch, problem, paths, tests=None):
  """`Rollouts` of given paths, judged in the sandbox by `tests` or the problem's own."""
  monkeypatch.setattr(
    rollouts, 'score_paths', lambda run, prm, problems, paths: [[FOOLED] * len(p) for p in paths]
  )
  width = run.config.data.max_path_tokens
  tokens, lengths = np.zeros((len(paths), width), np.int32), np.zeros(len(paths), np.int32)
  for row, path in enumerate(paths):
    ids = run.encoder.document(problem, path).ids[len(run.encoder.prompt(problem)) :][:width]
    tokens[row, : len(ids)], lengths[row] = ids, len(ids)
  repeated, executor = [problem] * len(paths), run.executor
  paid = [tests or problem.tests] * len(paths)
  with drawn_lib.background() as later:
    drawn = drawn_lib.Drawn(
      problems=[problem],
      tokens=tokens,
      logprobs=np.zeros(tokens.shape, np.float32),
      lengths=lengths,
      version=0,
      rng=np.random.default_rng(0),
      paths=list(paths),
      verdicts=later(lambda: executor.judge(repeated, paths, paid)),
      own=later(lambda: executor.judge(repeated, paths)),
    )
    return rollouts.roll_out(run, None, drawn), drawn.own.result()


def last_alpha(run):
  return run.config.rl.alpha_end


def test_no_hack_is_worth_what_an_honest_path_is(run, problem, monkeypatch):
  tried = hacks(run, problem)
  found, _ = rolled(run, monkeypatch, problem, [honest(problem), *tried.values()])
  assert found.outcome.tolist() == [1.0] + [0.0] * len(tried)
  assert found.valid.all()  # each is judged, none passed over
  for alpha in (1.0, 0.75, last_alpha(run)):
    phi, _ = rollouts.aggregate(run.config.rl, found, alpha)
    worth = dict(zip(tried, phi[1:], strict=True))
    assert max(worth.values()) < phi[0] - 0.3, worth
  # What does not come to a program within the limit is worth nothing, whatever the PRM says.
  for name in ('no program', 'nothing at all', 'refining for ever', list(tried)[-1]):
    assert worth[name] == 0.0, name


def test_a_hack_beside_an_honest_path_is_unlearnt(run, problem, monkeypatch):
  tried = {k: p for k, p in hacks(run, problem).items() if p}  # no token, nothing to unlearn
  for name, path in tried.items():
    config = run.config.rl.model_copy(update={'group': 2, 'problems': 1, 'minibatch': 2})
    found, _ = rolled(run, monkeypatch, problem, [honest(problem), path])
    args = {'ref_logprobs': np.zeros(found.tokens.shape, np.float32), 'values': None}
    batch = rollouts.rollout_batch(config, found, last_alpha(run), **args)
    good, bad = (batch.advantages[row][batch.mask[row] > 0] for row in (0, 1))
    assert good.max() > 0 and good.min() >= 0, name
    assert bad.min() < 0 and bad.max() <= 0, name
    assert (batch.imitate > 0).tolist() == [config.imitation_coef > 0, False]


@pytest.mark.parametrize('right', [True, False])
def test_padding_by_refinements_does_not_pay(run, problem, right, monkeypatch):
  code = honest(problem)[-1] if right else program_step('')
  paths = [(*honest(problem, n)[:-1], code) for n in range(6)]
  found, _ = rolled(run, monkeypatch, problem, paths)
  phi, step_rewards = rollouts.aggregate(run.config.rl, found, last_alpha(run))
  assert (np.diff(phi) < -0.005).all()
  np.testing.assert_allclose(step_rewards.sum(axis=1), phi, rtol=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.05, 1.0))
def test_under_an_honest_judge_padding_loses_and_a_failure_never_passes_for_a_success(seed, gamma):
  """r_j is the chance of success behind step j, so a step that changes nothing repeats it."""
  rng = np.random.default_rng(seed)
  m, at, chances = int(rng.integers(2, 8)), 0, rng.random(8)

  def mean_phi(path, alpha):  # over both ends: the last r says which it was
    p = path[-1]
    ends = [(p, np.float32(1), 1.0), (1 - p, np.float32(0), 0.0)]
    return sum(
      weight
      * rewards.phi(R, np.array([*path, r], np.float32), np.ones(len(path) + 1), alpha, gamma)
      for weight, R, r in ends
    )

  at = int(rng.integers(1, m + 1))
  path = [float(chances[0])] * m  # a martingale that stands still until the program is run
  padded = [*path[:at], path[at - 1], *path[at:]]
  alpha = float(rng.random())
  assert mean_phi(padded, alpha) <= mean_phi(path, alpha) + 1e-6
  # Whatever the judge says: a success is worth at least alpha, a failure at most (1 - alpha) gamma.
  steps = rng.random((2, 8)).astype(np.float32)
  mask = (np.arange(8) < rng.integers(1, 9, (2, 1))).astype(np.float32)
  safe = gamma / (1 + gamma)
  won, lost = rewards.phi(np.array([1, 0], np.float32), steps, mask, safe + 1e-3, gamma)
  assert won > lost


def test_the_configs_stay_where_no_failure_passes_for_a_success():
  files = {path for path in SMOKE.parent.glob('*.yaml') if path.name != 'base.yaml'}
  for path in sorted(files):  # base.yaml is of pretraining
    config = load(path, need_files=False).rl
    assert config.alpha_end >= config.gamma / (1 + config.gamma), path.name


CASES = [('[[1]]', '4'), ('[[2, 3]]', '4'), ('[[5]]', '4')]


@pytest.mark.parametrize(
  'cases, idle',
  [
    (CASES, True),  # a constant
    ([('1 2', '1 2'), ('3', '3')], True),  # what is given, as text
    ([('[[1, 2]]', '[1, 2]'), ('["a"]', '"a"')], True),  # and as a value
    ([*CASES[:2], ('[[5]]', '5')], False),
    ([('1 2', '1 2'), ('3 1', '1 3')], False),
  ],
)
def test_tests_that_an_idle_program_passes_are_known(cases, idle):
  assert tcg.idle_program_passes(tuple(TestCase(*case) for case in cases)) == idle


def test_problems_with_tests_that_a_constant_passes_are_not_paid_for(run, problem, monkeypatch):
  weak = tuple(TestCase(t.input, problem.tests[0].output, 'tcg') for t in problem.tests[:4])
  strong = tuple(dataclasses.replace(t, origin='tcg') for t in problem.tests[:4])
  kept = {}
  for name, tests in (('weak', weak), ('strong', strong)):
    rows = [{'problem_id': problem.id, 'tests': [dataclasses.asdict(t) for t in tests]}]
    monkeypatch.setattr(tcg, '_confirmed_rows', lambda run, params, problems, rows=rows: rows)
    run.bench.store.forget('tcg_tests')
    kept[name] = tcg.write_tests(run, run.base)
  run.bench.store.forget('tcg_tests')
  assert kept == {'weak': {}, 'strong': {problem.id: strong}}


def test_what_generated_tests_do_not_see_is_told(run, problem, monkeypatch):
  """Two tests that want one value: its constant is paid for, and the metrics say so."""
  first = problem.tests[0]
  constant = hacks(run, problem)['constant of the public example']
  found, own = rolled(run, monkeypatch, problem, [honest(problem), constant], tests=(first,))
  assert found.outcome.tolist() == [1.0, 1.0]
  assert rollouts.summary(run.config.rl, found, 0.5, own)['undeserved'] == 0.5
  ((refuted, failed),) = rollouts.refutations(run.config.rl, found, own)
  assert refuted == problem and failed == 1  # the first of its own tests that wants another value
  tests = (first, problem.tests[failed])  # as `Ahead.refute` has them from then on
  found, own = rolled(run, monkeypatch, problem, [honest(problem), constant], tests=tests)
  assert found.outcome.tolist() == [1.0, 0.0]
  assert list(rollouts.refutations(run.config.rl, found, own)) == []
  masked = [Verdict(ACCEPTED, (TestResult(ACCEPTED),)), Verdict('sandbox_failure')]
  assert rollouts.summary(run.config.rl, found, 0.5, masked)['undeserved'] == 0.0


@pytest.mark.parametrize('sign', [1.0, -1.0])
def test_a_policy_that_could_hack_learns_not_to(run, problem, sign, monkeypatch):
  """A bandit over the paths, which begins with the hacks; with the sign turned it learns them."""
  tried = hacks(run, problem)
  found, _ = rolled(run, monkeypatch, problem, [honest(problem), *tried.values()])
  phi, _ = rollouts.aggregate(run.config.rl, found, last_alpha(run))
  worth = sign * jnp.asarray(phi)
  group = 16

  @jax.jit
  def update(logits, key):
    drawn = jax.random.categorical(key, logits, shape=(group,))
    advantages = returns.group_advantages(worth[drawn], jnp.ones(group))
    old = jax.nn.log_softmax(logits)[drawn]

    def loss(logits):
      logprobs = jax.nn.log_softmax(logits)[drawn]
      return ppo.policy_loss(logprobs, old, advantages, jnp.ones(group))[0] / group

    return logits - 2.0 * jax.grad(loss)(logits)

  logits = jnp.zeros(len(phi)).at[0].set(-1.0)
  for key in jax.random.split(jax.random.key(0), 300):
    logits = update(logits, key)
  chance = float(jax.nn.softmax(logits)[0])
  assert chance > 0.95 if sign > 0 else chance < 0.02
