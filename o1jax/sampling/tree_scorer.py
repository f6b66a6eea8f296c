"""The process reward model in a tree search: every step of the tree is read once."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from o1jax.models.transformer import Model, Params
from o1jax.sampling.guided import StepIds
from o1jax.sampling.paths import Path, Paths, check_memory
from o1jax.sampling.scorer import score_steps


class TreeScorer:
  """Process rewards in a tree search, as `mcts.Score`: the PRM reads every step once.

  Args:
    model: the decoder of the PRM.
    params: its parameters, `{'trunk', 'head'}`.
    prompts: those of the search.
    steps: what delimits a path; nothing follows a terminal step, so it is not kept.
    tokens: whose keys and values are kept; what is evicted is read again.
    nodes: steps that are kept, prompts included.
    rows: steps read at once.

  Raises:
    ValueError: the keys and values do not fit into memory, see `check_memory`.
  """

  def __init__(
    self,
    model: Model,
    params: dict[str, Params],
    prompts: Sequence[Sequence[int]],
    steps: StepIds,
    *,
    tokens: int,
    nodes: int,
    rows: int = 128,
  ):
    check_memory(model, slots=tokens, states=nodes, rows=rows, columns=max(map(len, prompts)))
    self.model, self.params, self.steps = model, params, steps
    self.paths = Paths(model, params['trunk'], prompts, slots=tokens, states=nodes, rows=rows)
    self._known: dict[Path, float] = {}
    self.scored = sum(map(len, prompts))  # tokens read so far: prompts and distinct steps

  def __call__(self, paths: Sequence[Path]) -> np.ndarray:
    """Probabilities [n] that the last steps of the paths are good."""
    new = [p for p in dict.fromkeys(paths) if p not in self._known]
    if new:
      self.paths.read(list(dict.fromkeys(p[:-1] for p in new)))
      scores = self.paths.read_steps(new, self._measure, self._keep)
      self._known.update(zip(new, scores, strict=True))
      self.scored += sum(len(p[-1]) for p in new)
    return 1 / (1 + np.exp(-np.array([self._known[p] for p in paths])))

  def of_steps(self, paths: Sequence[tuple[int, Sequence[int]]]) -> list[list[float]]:
    """Probabilities of all steps of whole paths: (problem index, tokens after the prompt) each."""
    whole = [(problem, *self.steps.split(tokens)) for problem, tokens in paths]
    prefixes = [[path[:n] for n in range(2, len(path) + 1)] for path in whole]
    distinct = list(dict.fromkeys(prefix for each in prefixes for prefix in each))
    known = dict(zip(distinct, self(distinct).tolist(), strict=True))
    return [[known[prefix] for prefix in each] for each in prefixes]

  def _measure(self, before, hidden, tokens, mask) -> jax.Array:
    return score_steps(self.model, self.params, before, hidden, tokens, mask)

  def _keep(self, path: Path) -> bool:
    return not self.steps.is_terminal(path[-1])
