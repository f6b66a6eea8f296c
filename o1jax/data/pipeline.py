"""Training batches as a pure function of (seed, step), by grain.

`batches(...)[step]` needs no state, so a run that resumes at a step reads the
data it would have read without the interruption.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import grain
import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class _Rows:
  """The leading axis of a pytree of arrays as a random-access source."""

  tree: object

  def __len__(self) -> int:
    return len(jax.tree.leaves(self.tree)[0])

  def __getitem__(self, index):
    return jax.tree.map(lambda leaf: leaf[index], self.tree)


class Batches:
  """Endless batches of `batch` rows: `self[i]` is batch i, a pytree with rows on axis 0.

  One index over all rows, whoever reads them: a continuation on another number of hosts reads what
  the run would have read.
  """

  def __init__(self, each: grain.MapDataset, batch: int):
    self.batch = batch
    self._each = each
    self._whole = each.batch(batch, batch_fn=_stack)

  def __getitem__(self, step: int):
    return self._whole[step]

  def rows(self, step: int, which: np.ndarray):
    """Only the rows `which` of batch `step`, in that order: a host's own."""
    return _stack([self._each[step * self.batch + int(row)] for row in which])


def batches(tree, *, batch: int, seed: int) -> Batches:
  """Shuffled, endlessly repeated batches of the rows of `tree`.

  Args:
    tree: a pytree of NumPy arrays with one leading axis of rows.
    batch: rows a batch. With fewer rows than that, rows repeat within a batch.
    seed: of the shuffle; every epoch has its own order.

  Returns:
    Batches like `tree`.

  Raises:
    ValueError: `tree` has no rows.
  """
  rows = _Rows(tree)
  if not len(rows):
    raise ValueError('no rows to train on: the stage before found nothing; see its log')
  return Batches(grain.MapDataset.source(rows).seed(seed).shuffle().repeat(), batch)


def of_list(items: Sequence, *, seed: int) -> grain.MapDataset:
  """Ready-made batches in shuffled order, repeated endlessly; element `i` is batch `i`.

  Raises:
    ValueError: there are none.
  """
  if not items:
    raise ValueError('no batches to train on: the stage before found nothing; see its log')
  return grain.MapDataset.source(items).seed(seed).shuffle().repeat()


def _stack(rows: Sequence):
  return jax.tree.map(lambda *leaves: np.stack(leaves), *rows)
