"""Problems and reasoning paths as token ids, each step encoded once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from o1jax.data import steps as steps_lib
from o1jax.data.pack import Document
from o1jax.data.tokens import Tokenizer
from o1jax.types import Problem, Step


class PathEncoder:
  """Encodes prompts and steps with a cache; steps begin and end on token borders.

  The step tags are tokens of their own, so the ids of a path are the ids of its
  steps one after the other.
  """

  def __init__(self, tokenizer: Tokenizer):
    self.tokenizer = tokenizer
    self._steps: dict[Step, tuple[int, ...]] = {}
    self._prompts: dict[str, tuple[int, ...]] = {}

  def prompt(self, problem: Problem) -> tuple[int, ...]:
    """What the policy reads before its first step."""
    if problem.id not in self._prompts:
      text = steps_lib.prompt_of(problem.statement)
      self._prompts[problem.id] = tuple(self.tokenizer.prompt_ids(text))
    return self._prompts[problem.id]

  def step(self, step: Step) -> tuple[int, ...]:
    """Ids of one rendered step."""
    if step not in self._steps:
      self._steps[step] = tuple(self.tokenizer.encode(steps_lib.render_step(step)))
    return self._steps[step]

  def document(self, problem: Problem, steps: Sequence[Step]) -> Document:
    """Prompt + path (+ eos after a terminal step), the path to be learnt."""
    prompt = self.prompt(problem)
    ids = list(prompt)
    for step in steps:
      ids += self.step(step)
    if steps and steps[-1].terminal:
      ids.append(self.tokenizer.eos_id)
    return Document(tuple(ids), len(prompt))

  def steps_of(self, ids: Iterable[int]) -> tuple[Step, ...]:
    """The steps in generated ids."""
    return steps_lib.parse(self.tokenizer.decode(list(ids)))


def step_ids_of(
  ids: np.ndarray, generated: np.ndarray, step_end_id: int, eos_id: int
) -> np.ndarray:
  """Which step each generated token belongs to.

  Args:
    ids: `[B, T]` int token ids.
    generated: `[B, T]` bool, True on the tokens of the path.
    step_end_id: the delimiter; it belongs to the step that it ends.
    eos_id: the end of the document; it belongs to the last step before it.

  Returns:
    `[B, T]` int32: 1.. within the path, 0 elsewhere. An unfinished step at the end
    of a path that was cut off is a step of its own, as `steps.parse` has it.
  """
  ends = (ids == step_end_id) & generated
  before = np.cumsum(ends, axis=1) - ends
  step = before + 1 - ((ids == eos_id) & (before > 0))
  return np.where(generated, step, 0).astype(np.int32)
