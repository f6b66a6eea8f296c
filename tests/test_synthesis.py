"""Searched trees as the stage writes them: what the sandbox could not judge is masked."""

import contextlib
import types

import numpy as np
import pytest
from sampling_cases import EOS, MODEL, PROMPTS, STEP_END, TERMINAL, tiny_params

from o1jax.config import Config
from o1jax.data import trees
from o1jax.run.store import Store
from o1jax.stages import synthesis
from o1jax.types import ACCEPTED, SANDBOX_FAILURE, WRONG_ANSWER, Problem, TestResult, Verdict

STATUSES = (ACCEPTED, WRONG_ANSWER, SANDBOX_FAILURE)


class Executor:
  """A verdict by the length of a path."""

  def judge(self, problems, paths):
    found = [STATUSES[len(path) % 3] for _, path in zip(problems, paths, strict=True)]
    return [Verdict(s, (TestResult(s),) if s != SANDBOX_FAILURE else ()) for s in found]


PROBLEMS = [Problem(str(i), '') for i in range(len(PROMPTS))]


@contextlib.contextmanager
def a_run(folder, **search):
  """What the stage needs of a run that searches PROBLEMS."""
  config = Config.model_validate(
    {
      'run': {'dir': str(folder / 'run'), 'checkpoint_every_s': 1e6},
      'data': {'max_path_tokens': 12},
      'search': {'rows': 32} | search,
    }
  )
  ids = types.SimpleNamespace(step_end_id=STEP_END, action_ids=(0, 0, TERMINAL), eos_id=EOS)
  encoder = types.SimpleNamespace(
    prompt=lambda problem: PROMPTS[int(problem.id)], steps_of=lambda tokens: tokens
  )
  with Store(config) as store:
    yield types.SimpleNamespace(
      config=config,
      bench=types.SimpleNamespace(store=store),
      model=MODEL,
      tokenizer=ids,
      encoder=encoder,
      executor=Executor(),
      sampling=lambda *trees: contextlib.nullcontext(trees),
    )


def test_paths_without_replacement_are_values_by_their_probability(tmp_path):
  with a_run(tmp_path, rule='distinct', simulations=9) as run:
    searched = synthesis._distinct(run, tiny_params())(PROBLEMS, 3)
    told = {'weights': searched.weights, 'origin': 'x', 'version': 2}
    found = synthesis.as_trajectories(run, searched.problems, searched.paths, **told)
  assert len({(t.problem_id, t.steps) for t in found}) == 9 * len(PROMPTS)
  drawn = 0
  for p in PROBLEMS:
    mine = [t for t in found if t.problem_id == p.id]
    assert sum(t.weight for t in mine) == pytest.approx(9) and len({t.weight for t in mine}) > 3
    judged = [t for t in mine if t.reward is not None]
    for t in mine:
      same = [o for o in judged if o.steps[:1] == t.steps[:1]]
      if same and t.values:
        want = sum(o.weight * o.reward for o in same) / sum(o.weight for o in same)
        assert t.values[0] == pytest.approx(want)
        drawn += 0 < want < 1
  assert drawn  # somewhere the weights decide


def test_failures_of_the_sandbox_are_masked_in_the_trees_of_the_stage(tmp_path):
  with a_run(tmp_path, simulations=10, children=2, keep_trees=True) as run:
    searched = synthesis._trees(run, tiny_params(), None, 'round0/synthesis')(PROBLEMS, 3)
    files = sorted(run.bench.store.path('round0/synthesis', 'trees').iterdir())
  found = [trees.read(file) for file in files]
  assert {t.problem_id for t in found} == {p.id for p in searched.problems}
  assert len(searched.paths) > 20
  failed = 0
  for tree in found:
    values = dict(zip(tree.rollouts, tree.rollout_value, strict=True))
    want = {ACCEPTED: 1.0, WRONG_ANSWER: 0.0, SANDBOX_FAILURE: np.nan}
    whole = {path: v for path, v in values.items() if path[-1] == EOS}
    for path, value in whole.items():
      np.testing.assert_equal(value, want[STATUSES[len(path) % 3]])
    lost = [
      n
      for n, path in zip(tree.rollout_node, tree.rollouts, strict=True)
      if np.isnan(values[path]) and path[-1] == EOS
    ]
    assert set(np.flatnonzero(tree.masked)) == set(lost)
    # What is in no value is in no visit either.
    assert tree.visits[0] == sum(not np.isnan(v) for v in tree.rollout_value)
    failed += len(lost)
  assert failed > 2
