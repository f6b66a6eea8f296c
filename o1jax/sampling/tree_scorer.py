"""The process reward model in a tree search: every step of the tree is read once."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import jax
import numpy as np

from o1jax.models.transformer import Model, Params
from o1jax.sampling.forest import halves
from o1jax.sampling.guided import StepIds
from o1jax.sampling.memory import check_memory
from o1jax.sampling.paths import Path, Paths
from o1jax.sampling.scorer import score_steps


class TreeScorer:
  """Process rewards in a tree search, as `mcts.Score`: the PRM reads every step once.

  The two halves of the forest have a pool each, so that they can be asked about at once.

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
    parts = halves(len(prompts))
    columns = max(map(len, prompts))
    check_memory(model, slots=tokens, states=nodes, rows=rows * len(parts), columns=columns)
    self.steps, self._prompts = steps, sum(map(len, prompts))
    self._halves = []
    for part in parts:
      share = len(part) / len(prompts)
      held = {'slots': math.ceil(tokens * share), 'states': math.ceil(nodes * share), 'rows': rows}
      paths = Paths(model, params['trunk'], prompts, **held)
      self._halves.append(_Half(params, paths, steps))
    self._second = len(parts[0])  # the first problem of the second half

  @property
  def pools(self) -> list[Paths]:
    """Where the steps are kept."""
    return [half.paths for half in self._halves]

  @property
  def scored(self) -> int:
    """Tokens read so far: prompts and distinct steps."""
    return self._prompts + sum(half.scored for half in self._halves)

  def __call__(self, paths: Sequence[Path]) -> np.ndarray:
    """Probabilities [n] that the last steps of the paths are good."""
    found = np.zeros(len(paths))
    of = np.array([path[0] >= self._second for path in paths], int)
    for i in np.unique(of):
      mine = np.flatnonzero(of == i)
      found[mine] = self._halves[i]([paths[k] for k in mine])
    return 1 / (1 + np.exp(-found))

  def of_steps(self, paths: Sequence[tuple[int, Sequence[int]]]) -> list[list[float]]:
    """Probabilities of all steps of whole paths: (problem index, tokens after the prompt) each."""
    whole = [(problem, *self.steps.split(tokens)) for problem, tokens in paths]
    prefixes = [[path[:n] for n in range(2, len(path) + 1)] for path in whole]
    distinct = list(dict.fromkeys(prefix for each in prefixes for prefix in each))
    known = dict(zip(distinct, self(distinct).tolist(), strict=True))
    return [[known[prefix] for prefix in each] for each in prefixes]


class _Half:
  """The PRM's log-odds for the steps of half of the forest."""

  def __init__(self, params: dict[str, Params], paths: Paths, steps: StepIds):
    self.head, self.paths, self.steps = params['head'], paths, steps
    self.scored = 0  # tokens of steps read so far
    self._known: dict[Path, float] = {}
    self._lock = threading.Lock()

  def __call__(self, paths: Sequence[Path]) -> list[float]:
    with self._lock:
      new = [p for p in dict.fromkeys(paths) if p not in self._known]
      if new:
        self.paths.read(list(dict.fromkeys(p[:-1] for p in new)))
        scores = self.paths.read_steps(new, _log_odds, self.head, self._keep)
        self._known.update(zip(new, scores.tolist(), strict=True))
        self.scored += sum(len(p[-1]) for p in new)
      return [self._known[p] for p in paths]

  def _keep(self, path: Path) -> bool:
    return not self.steps.is_terminal(path[-1])


def _log_odds(model: Model, trunk: Params, head: Params, *read) -> jax.Array:
  """Of the steps that were read, as `paths.Measure`."""
  return score_steps(model, {'trunk': trunk, 'head': head}, *read)
