"""Paths drawn ahead: by which policy, how far, the same after a kill, programs meanwhile."""

import contextlib
import json
import threading
import types

import numpy as np
import pytest

from o1jax.config import ConfigError, check
from o1jax.data.steps import program_step
from o1jax.sampling.sampler import empty_samples
from o1jax.stages import drawn as drawn_lib
from o1jax.types import ACCEPTED, Problem, TestCase, Verdict

ITERATIONS, GROUP, WIDTH = 6, 2, 64
PROBLEMS = [Problem(f'p{i}', 'say', tests=(TestCase('', '1'),)) for i in range(9)]
TESTS = {p.id: (TestCase('', '2'),) for p in PROBLEMS[:7]}  # the others cannot be used


class Encoder:
  """A path is one program that says which policy wrote it, a token a letter."""

  def prompt(self, problem):
    return tuple(problem.id.encode())

  def steps_of(self, ids):
    return (program_step(bytes(ids).decode()),)


class Executor:
  """Accepts everything, and tells what it was asked in which order."""

  def __init__(self):
    self.asked = []

  def judge(self, problems, paths, tests=None):
    self.asked.append((paths[0][0].text, tests is not None))
    assert tests is None or tests == [TESTS[p.id] for p in problems]
    return [Verdict(ACCEPTED) for _ in paths]


def settings(staleness):
  rl = {'iterations': ITERATIONS, 'problems': 3, 'group': GROUP, 'minibatch': 6}
  rl |= {'staleness': staleness, 'importance_cap': 2.0}
  return check({'rl': rl, 'data': {'max_path_tokens': WIDTH}})


def stage(staleness, executor=None):
  return types.SimpleNamespace(
    config=settings(staleness),
    encoder=Encoder(),
    executor=executor or Executor(),
    known_problems=lambda round_: PROBLEMS,
    sampling=lambda *trees: contextlib.nullcontext(trees),
  )


@pytest.fixture
def calls(monkeypatch):
  """How many draws there were, and whether the second has begun; tokens tell policy and seed."""
  made = types.SimpleNamespace(count=0, second=threading.Event())

  def sampler(run, how, rows):
    def draw(policy, prompts, *, seed, ids, samples):
      made.count += 1
      if made.count == 2:
        made.second.set()
      out = empty_samples(len(prompts) * samples, WIDTH)
      for row in range(len(out.tokens)):
        text = f'{policy} {seed} {row}'.encode()
        out.tokens[row, : len(text)] = list(text)
        out.logprobs[row, : len(text)] = -np.arange(len(text)) / 7
        out.lengths[row] = len(text)
      return out

    return draw

  monkeypatch.setattr(drawn_lib, 'sampler', sampler)
  return made


def all_of(ahead, begin=0, end=ITERATIONS):
  return [ahead.take(k, f'policy {k}', []) for k in range(begin, end)]


def contents(drawn):
  ids = [p.id for p in drawn.problems]
  order = drawn.rng.permutation(10).tolist()
  return ids, drawn.tokens.tolist(), drawn.logprobs.tolist(), drawn.version, order


@pytest.mark.parametrize('staleness', [0, 1, 2, 9])
def test_no_path_is_older_than_the_bound(staleness, calls):
  run = stage(staleness)
  with drawn_lib.background() as later:
    ahead = drawn_lib.Ahead(run, 0, TESTS, later)
    for k, drawn in enumerate(all_of(ahead)):
      assert k - drawn.version == min(k, staleness)
      text = bytes(drawn.tokens[0, : drawn.lengths[0]].tolist()).decode()
      assert text == f'policy {drawn.version} {k} 0'  # what is recorded is what wrote it
      assert drawn.paths[0] == (program_step(text),)
      assert len(drawn.problems) == 3 and {p.id for p in drawn.problems} <= TESTS.keys()
      assert [p.id for p in drawn.repeated[::GROUP]] == [p.id for p in drawn.problems]
  assert calls.count == ITERATIONS  # nothing is drawn twice, nor behind the end
  assert [paid for _, paid in run.executor.asked] == [True, False] * ITERATIONS


def test_on_policy_nothing_is_kept_and_the_draws_are_of_one_generator(calls):
  with drawn_lib.background() as later:
    ahead = drawn_lib.Ahead(stage(0), 0, TESTS, later)
    assert ahead.saved() == ahead.blank() == {}
    drawn = ahead.take(0, 'policy', [])
  rng = np.random.default_rng(0)
  usable = [p for p in PROBLEMS if p.id in TESTS]
  assert drawn.problems == drawn_lib.draw_problems(settings(0).rl, usable, [], rng)
  np.testing.assert_array_equal(drawn.rng.permutation(10), rng.permutation(10))


@pytest.mark.parametrize('staleness', [0, 1, 3])
@pytest.mark.parametrize('stopped', [1, 2, ITERATIONS - 1])
def test_what_was_drawn_ahead_outlives_a_kill(staleness, stopped, calls):
  with drawn_lib.background() as later:
    whole = [contents(d) for d in all_of(drawn_lib.Ahead(stage(staleness), 0, TESTS, later))]
    first = drawn_lib.Ahead(stage(staleness), 0, TESTS, later)
    all_of(first, 0, stopped)
    kept = first.saved()
    assert {k: (v.shape, v.dtype) for k, v in kept.items()} == {
      k: (v.shape, v.dtype) for k, v in first.blank().items()
    }
    again = drawn_lib.Ahead(stage(staleness), 0, TESTS, later)
    again.restore(stopped, kept, first.refuted)
    rest = [contents(d) for d in all_of(again, stopped)]
  assert rest == whole[stopped:]


def test_an_own_test_that_refuted_a_paid_program_is_paid_for_too(calls):
  class Asked(Executor):
    def judge(self, problems, paths, tests=None):
      if tests is not None:
        self.asked.append({p.id: case for p, case in zip(problems, tests, strict=True)})
      return [Verdict(ACCEPTED) for _ in paths]

  run, resumed, refuted = stage(1, Asked()), stage(1, Asked()), PROBLEMS[1]
  with drawn_lib.background() as later:
    ahead = drawn_lib.Ahead(run, 0, TESTS, later)
    all_of(ahead, 0, 1)
    for _ in range(2):  # the same test twice is one
      ahead.refute(refuted, 0)
    again = drawn_lib.Ahead(resumed, 0, TESTS, later)
    again.restore(1, ahead.saved(), json.loads(json.dumps(ahead.refuted)))
    all_of(ahead, 1)
    all_of(again, 1)
  assert run.executor.asked[1:] == resumed.executor.asked
  expected = {**TESTS, refuted.id: (*TESTS[refuted.id], *refuted.tests)}
  assert any(refuted.id in asked for asked in resumed.executor.asked)
  for asked in resumed.executor.asked:
    assert asked == {key: expected[key] for key in asked}


def test_programs_run_while_the_next_paths_are_drawn(calls):
  class Waiting(Executor):
    def judge(self, problems, paths, tests=None):
      assert calls.second.wait(30), 'the next draw waits for these programs'
      return super().judge(problems, paths, tests)

  with drawn_lib.background() as later:
    drawn = drawn_lib.Ahead(stage(1, Waiting()), 0, TESTS, later).take(0, 'policy 0', [])
    assert [v.status for v in drawn.verdicts.result()] == [ACCEPTED] * 6


def test_stale_rollouts_without_weights_are_refused():
  with pytest.raises(ConfigError, match=r'rl\.staleness=1.*rl\.importance_cap'):
    check({'rl': {'staleness': 1}})
  assert check({'rl': {'staleness': 1, 'algorithm': 'dpo'}}).rl.staleness == 1
