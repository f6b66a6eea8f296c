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


def batches(tree, *, batch: int, seed: int) -> grain.MapDataset:
  """Shuffled, endlessly repeated batches of the rows of `tree`.

  Args:
    tree: a pytree of NumPy arrays with one leading axis of rows.
    batch: rows a batch. With fewer rows than that, rows repeat within a batch.
    seed: of the shuffle; every epoch has its own order.

  Returns:
    A grain dataset whose element `i` is batch `i`, a pytree like `tree`.

  Raises:
    ValueError: `tree` has no rows.
  """
  rows = _Rows(tree)
  if not len(rows):
    raise ValueError('no rows to train on: the stage before found nothing; see its log')
  return grain.MapDataset.source(rows).seed(seed).shuffle().repeat().batch(batch, batch_fn=_stack)


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
