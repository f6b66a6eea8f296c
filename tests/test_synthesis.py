"""Searched trees as the stage writes them: what the sandbox could not judge is masked."""

import contextlib
import types

import numpy as np
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


def test_failures_of_the_sandbox_are_masked_in_the_trees_of_the_stage(tmp_path):
  config = Config.model_validate(
    {
      'run': {'dir': str(tmp_path / 'run'), 'checkpoint_every_s': 1e6},
      'data': {'max_path_tokens': 12},
      'search': {'simulations': 10, 'children': 2, 'rows': 32, 'keep_trees': True},
    }
  )
  problems = [Problem(str(i), '') for i in range(len(PROMPTS))]
  with Store(config) as store:
    run = types.SimpleNamespace(
      config=config,
      bench=types.SimpleNamespace(store=store),
      model=MODEL,
      tokenizer=types.SimpleNamespace(
        step_end_id=STEP_END, action_ids=(0, 0, TERMINAL), eos_id=EOS
      ),
      encoder=types.SimpleNamespace(
        prompt=lambda problem: PROMPTS[int(problem.id)], steps_of=lambda tokens: tokens
      ),
      executor=Executor(),
      sampling=lambda *trees: contextlib.nullcontext(trees),
    )
    find = synthesis._trees(run, tiny_params(), None, 'round0/synthesis')
    searched = find(problems, 3)
    files = sorted(store.path('round0/synthesis', 'trees').iterdir())
  found = [trees.read(file) for file in files]
  assert {t.problem_id for t in found} == {p.id for p in searched.problems} and len(
    searched.paths
  ) > 20
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
