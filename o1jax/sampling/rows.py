"""Rows that stay on their device: no row of a key/value cache moves from one to another.

Over a mesh a batch has parts, one for each of the devices along `data` and `fsdp`, and part p holds
the p-th share of its rows. A row taken by an index that the compiler does not know may come from
anywhere, so that it brings all of them to every device. Here the host places what continues a row
in the part that has the row, and each device takes from its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from o1jax.parallel.ambient import ambient_ways
from o1jax.parallel.sharding import RULES

NONE = -1  # in a list of rows, or of slots: none


def parts_in(*rows: int) -> int:
  """Of how many parts batches of so many rows are: 1 where one does not divide over the mesh."""
  ways = ambient_ways()
  return 1 if any(n % ways for n in rows) else ways


def take_rows(tree: Any, index: jax.Array) -> Any:
  """Within jit: the rows `index` [R'] of arrays [R, ...], each device from its own part of them.

  Row i of the result is row `index[i]` if both are of the same part, which is the caller's business
  (`parts_of`); else it is another one of the part of i. With one part any row is taken.
  """
  rows = len(jax.tree.leaves(tree)[0])
  parts = parts_in(rows, len(index))

  def take(tree, index):
    return jax.tree.map(lambda x: jnp.take(x, index, axis=0, mode='clip'), tree)

  def take_own(tree, index):
    return take(tree, index % (rows // parts))

  if parts == 1:
    return take(tree, index)
  by_rows = PartitionSpec(RULES['batch'])
  mapped = jax.shard_map(
    take_own, in_specs=by_rows, out_specs=by_rows, axis_names=set(RULES['batch']), check_vma=False
  )
  return mapped(tree, jnp.asarray(index))


def parts_of(rows: np.ndarray, batch: int) -> list[np.ndarray]:
  """For each part of a batch, which i have their row `rows[i]` in it, in ascending order."""
  count = parts_in(batch)
  part = np.asarray(rows) * count // batch
  return [np.flatnonzero(part == p) for p in range(count)]


def side_by_side(parts: Sequence[Sequence[int]], size: int) -> np.ndarray:
  """A batch of `size` whose parts hold what `parts` say, each from its first row on; then NONE."""
  places = np.full((len(parts), size // len(parts)), NONE)
  for row, part in zip(places, parts, strict=True):
    row[: len(part)] = part
  return places.reshape(-1)


def evenly_full(live: Any) -> Any:
  """How many rows of `live` [R] bool there would be if all parts had as many as the fullest.

  The least batch that holds them without moving any; with one part, their number.
  """
  parts = parts_in(len(live))
  return live.reshape(parts, -1).sum(-1).max() * parts
