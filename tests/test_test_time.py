"""Search at test time: who is elected by hand, and that an answer depends on its problem alone."""

import contextlib
import dataclasses
import types

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sampling_cases import EOS, MODEL, PROMPTS, STEP_END, STEPS, TERMINAL, tiny_params

from o1jax.config import Config
from o1jax.models.heads import StepHead
from o1jax.sampling import Search, TreeScorer
from o1jax.sampling.draw import SAMPLE
from o1jax.sampling.forest import Rollout
from o1jax.sampling.sampler import Sampler
from o1jax.stages import test_time
from o1jax.stages.evaluate import Answers
from o1jax.stages.report import votes
from o1jax.types import Problem, Step

PROBLEMS = [Problem(str(i), '') for i in range(len(PROMPTS))]
A, B, C = (TERMINAL, 7, EOS), (TERMINAL, 8, EOS), (TERMINAL, 9, EOS)  # programs
PLAN, OTHER = (5, STEP_END), (6, STEP_END)


@pytest.fixture(scope='module')
def prm():
  head = StepHead.init(MODEL.config)
  rng = np.random.default_rng(2)
  head = jax.tree.map(lambda x: x + 0.3 * rng.normal(size=x.shape).astype(np.float32), head)
  return {'trunk': tiny_params(), 'head': head}


def a_run(**settings):
  config = Config.model_validate(
    {
      'data': {'max_path_tokens': 12},
      'search': {'rows': 32, 'depth_limit': 4, 'max_step_tokens': 6},
      'eval': {'search_children': 3, 'search_simulations': 3} | settings,
    }
  )
  return types.SimpleNamespace(
    config=config,
    model=MODEL,
    tokenizer=types.SimpleNamespace(step_end_id=STEP_END, action_ids=(0, 0, TERMINAL), eos_id=EOS),
    encoder=types.SimpleNamespace(prompt=lambda problem: PROMPTS[int(problem.id)]),
    sampling=lambda *trees: contextlib.nullcontext(trees),
  )


@given(st.lists(st.sampled_from([EOS, STEP_END, TERMINAL, 7, 8]), max_size=12))
def test_the_steps_of_a_path_are_its_tokens_cut_behind_the_delimiters(path):
  steps = STEPS.split(path)
  assert sum(steps, ()) == tuple(path)
  assert all(step[-1] in STEPS.stops for step in steps[:-1])
  assert not any(token in STEPS.stops for step in steps for token in step[:-1])


def elected(*votes):
  programs, weights, ties = zip(*votes, strict=True)
  return test_time.elected(programs, weights, ties)


def test_equal_programs_vote_together_and_the_best_of_them_answers():
  assert elected(('a', 0.8, 0.8), ('b', 0.5, 0.5), ('b', 0.5, 0.6)) == 2
  assert elected(('a', 0.8, 0.8), ('b', 0.36, 0.6), ('b', 0.36, 0.6)) == 0
  assert elected(('c', 0.6, 0.6), ('a', 0.4, 0.4), ('a', 0.4, 0.4), ('a', 0.45, 0.5)) == 3
  assert elected(('a', 0.5, 0.1), ('b', 0.5, 0.2)) == 1  # equal weights
  assert elected((None, 9.0, 9.0), (None, 9.0, 9.0), ('a', 0.0, 0.0)) == 2  # none has no vote


def test_majority_and_likeliest_of_samples():
  one, two = (Step(3, 'a'),), (Step(3, 'b'),)
  paths = [[one, two, (Step(1, 'plan'), *two)], [one, two, two]]
  accepted = np.array([[1, 0, 1], [1, 0, 0]], np.float32)
  logprobs = np.array([[-1.0, -3.0, -2.0], [-1.0, -3.0, -3.0]], np.float32)
  majority, best = votes(Answers(paths, accepted, logprobs, 0))
  assert majority.tolist() == [1.0, 0.0]  # the likelier of the two that are b
  assert best.tolist() == [1.0, 1.0]


def test_a_tree_answers_with_what_its_roll_outs_elect(prm, monkeypatch):
  seen = []
  real = test_time.elected
  monkeypatch.setattr(test_time, 'elected', lambda *a: seen.append((*a, real(*a))) or seen[-1][-1])
  run = a_run(search='voted')
  found = test_time.searched(run, tiny_params(), prm, PROBLEMS, 3)
  assert len(seen) == sum(map(bool, found.paths)) > 1
  answers = {STEPS.split(path)[-1] for path in found.paths if path}
  assert answers == {programs[best] for programs, _, _, best in seen}
  # A product of several probabilities is no more than the worst of them.
  assert all(w <= t for _, weights, ties, _ in seen for w, t in zip(weights, ties, strict=True))
  assert any(w < t for _, weights, ties, _ in seen for w, t in zip(weights, ties, strict=True))


def rollout(path, value=1.0):
  return Rollout(0, 0, 1, 0, (), path, (0.0,) * len(path), value)


def test_a_vote_is_decided_by_the_lead_over_all_that_is_second():
  decided = test_time.Decided(2, STEPS)
  assert not decided([]) and not decided([rollout(A)])
  assert decided([rollout(PLAN + A), rollout(OTHER + A)])  # by program, whatever led to it
  assert not decided([rollout(A), rollout(A), rollout(B)])
  assert decided([rollout(A), rollout(A), rollout(B), rollout(A)])
  assert decided([rollout(A), rollout(A), rollout(PLAN, np.nan)])  # without an end: no vote
  assert not decided([rollout(A), rollout(A), rollout(B), rollout(B), rollout(C)])


@pytest.mark.parametrize('overlap', [False, True])
def test_a_decided_tree_grows_no_more_and_the_others_are_as_they_were(overlap):
  sampler = Sampler(MODEL, 12, (EOS,), SAMPLE, 32)
  grow = Search(sampler, STEPS, width=2, simulations=4, max_depth=4, overlap=overlap)
  enough = test_time.Decided(1, STEPS)
  judge = lambda jobs: [0.5] * len(jobs)  # noqa: E731
  whole = grow(tiny_params(), PROMPTS, judge, seed=3)
  short = dataclasses.replace(grow, enough=enough)(tiny_params(), PROMPTS, judge, seed=3)
  ended = set()
  for problem in range(len(PROMPTS)):
    full, part = ([r for r in f.rollouts if r.problem == problem] for f in (whole, short))
    counts = [n for n in range(2, len(full), 2) if enough(full[:n])]
    assert part == full[: counts[0] if counts else len(full)]
    ended.add(len(part))
  assert len(ended) > 1 and short.generated < whole.generated


@pytest.mark.parametrize('way', ['guided', 'voted'])
def test_an_answer_does_not_depend_on_the_other_problems(prm, way, monkeypatch):
  run = a_run(search=way)
  whole = test_time.searched(run, tiny_params(), prm, PROBLEMS, 3)
  monkeypatch.setattr(test_time, 'CHUNK', 2)
  assert test_time.searched(run, tiny_params(), prm, PROBLEMS, 3) == whole
  assert len(whole.paths) == len(PROBLEMS) and any(whole.paths)
  assert whole.generated > sum(map(len, whole.paths))
  assert test_time.searched(run, tiny_params(), prm, PROBLEMS, 4).paths != whole.paths


def test_the_scorer_tells_every_step_of_a_path_and_what_it_read(prm):
  scorer = TreeScorer(MODEL, prm, PROMPTS, STEPS, tokens=400, nodes=64)
  prompts = sum(map(len, PROMPTS))
  assert scorer.scored == prompts
  first, second = scorer.of_steps([(1, PLAN + OTHER + A), (1, PLAN + B)])
  assert [len(first), len(second)] == [3, 2] and first[0] == second[0]
  assert scorer.scored == prompts + len(PLAN + OTHER + A + B)
  np.testing.assert_allclose(
    first, scorer([(1, *STEPS.split(PLAN + OTHER + A)[:n]) for n in (1, 2, 3)])
  )
  scorer.of_steps([(1, PLAN + B)])
  assert scorer.scored == prompts + len(PLAN + OTHER + A + B)
