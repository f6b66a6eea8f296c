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
from o1jax.types import Problem

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
  return test_time.elected([path for path, _ in votes], [values for _, values in votes], STEPS)


def test_equal_programs_vote_together_by_the_product_of_their_steps():
  # .8 against twice .5, by different plans.
  assert elected((A, [0.8]), (PLAN + B, [0.5, 1.0]), (OTHER + B, [1.0, 0.5])) == PLAN + B
  # Two steps of .6 are worth .36 each: less than .8 together.
  assert elected((A, [0.8]), (PLAN + B, [0.6, 0.6]), (OTHER + B, [0.6, 0.6])) == A
  # What was found twice votes twice, and of the elected program's paths the best answers.
  assert elected((C, [0.6]), (A, [0.4]), (A, [0.4]), (PLAN + A, [0.5, 0.9])) == PLAN + A
  assert elected((A, [0.4]), (B, [0.6]), (A, [0.4])) == A
  assert test_time.elected([], [], STEPS) == ()


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
