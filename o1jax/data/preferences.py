"""Which rollouts of a group are preferred to which: pairs of row numbers for DPO.

Rows `i * group .. (i + 1) * group` answer problem i; `returns` is what a row is worth.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

import numpy as np

from o1jax.data.prefix_tree import Prefix


@dataclasses.dataclass(frozen=True)
class Preference:
  """Row `chosen` is preferred to row `rejected`: as a whole, or for one step."""

  chosen: int
  rejected: int
  step: int = 0  # 1-based; the rows agree before it. 0: the whole paths are compared


def of_paths(returns: np.ndarray, outcome: np.ndarray, group: int) -> list[Preference]:
  """Best against worst, second against second worst, ..., of each group.

  Args:
    returns: [B] float, orders the rows of a group.
    outcome: [B] float; a pair is kept only if the better row's outcome is higher.
    group: rows of one problem.
  """
  found = []
  for start in range(0, len(returns), group):
    order = start + np.argsort(-returns[start : start + group], kind='stable')
    for best, worst in zip(order[: group // 2], order[::-1][: group // 2], strict=True):
      if outcome[best] > outcome[worst]:
        found.append(Preference(int(best), int(worst)))
  return found


def of_siblings(
  paths: Sequence[Prefix], returns: np.ndarray, valid: np.ndarray, group: int, margin: float
) -> list[Preference]:
  """Steps that follow the same prefix and are worth different mean returns.

  The paths of a group form a prefix tree; a step is worth the mean return of the rows
  through it. Both sides of a pair are read from the first row that has them.

  Args:
    paths: B paths, each a tuple of steps.
    returns: [B] float.
    valid: [B] float, 0 for rows whose return says nothing.
    group: rows of one problem.
    margin: mean returns must differ by more.

  Returns:
    Pairs of all groups, the largest difference first.
  """
  found: list[tuple[float, Preference]] = []
  for start in range(0, len(paths), group):
    rows_of: dict[Prefix, list[int]] = collections.defaultdict(list)
    children: dict[Prefix, list[Prefix]] = collections.defaultdict(list)
    for row in range(start, start + group):
      for depth in range(1, (len(paths[row]) if valid[row] else 0) + 1):
        prefix = paths[row][:depth]
        if prefix not in rows_of:
          children[prefix[:-1]].append(prefix)
        rows_of[prefix].append(row)
    worth = {prefix: float(np.mean(returns[rows])) for prefix, rows in rows_of.items()}
    for siblings in children.values():
      for i, a in enumerate(siblings):
        for b in siblings[i + 1 :]:
          win, lose = (a, b) if worth[a] > worth[b] else (b, a)
          if worth[win] - worth[lose] > margin:
            pair = Preference(rows_of[win][0], rows_of[lose][0], len(win))
            found.append((worth[win] - worth[lose], pair))
  return [pair for _, pair in sorted(found, key=lambda x: -x[0])]
