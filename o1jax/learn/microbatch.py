"""Cutting a batch into microbatches: for gradient accumulation, and on a CPU for its caches."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from o1jax.batch import PairBatch, RolloutBatch, StepBatch, TokenBatch
from o1jax.parallel.ambient import ambient_ways
from o1jax.parallel.platform import platform

# Measured on 2 CPU cores, where a step of a small model waits for memory as long as for products:
# of so many tokens at a time on a device, what layers keep stays in caches.
_CACHED_TOKENS = 1536
_SMALL_BYTES = 1 << 26  # of parameters: a larger model's products take longer than that


def parts_in_cache(weights: Any, batch: Any, accumulate: int) -> int:
  """Into how many microbatches a step cuts its batch: `accumulate`, or on a CPU a multiple of it.

  Only a small model's, and only rows that each have a loss of their own: those of a `StepBatch` are
  compared with one another.

  Args:
    weights: pytree of all parameters that the loss reads.
    batch: its rows lie over the ambient mesh.
    accumulate: microbatches asked for.
  """
  small = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(weights)) <= _SMALL_BYTES
  if platform() != 'cpu' or not small:
    return accumulate
  if isinstance(batch, PairBatch):
    (rows, columns), sides = batch.chosen.tokens.shape, 2
  elif isinstance(batch, TokenBatch | RolloutBatch):
    (rows, columns), sides = batch.tokens.shape, 1
  else:
    return accumulate
  own, odd = divmod(rows, accumulate * ambient_ways())  # rows of a microbatch on one device
  if odd:
    return accumulate
  tokens = {n: own // n * columns * sides for n in range(1, own + 1) if own % n == 0}
  cuts = [n for n in tokens if n == 1 or tokens[n] >= _CACHED_TOKENS // 4]
  return accumulate * next((n for n in cuts if tokens[n] <= _CACHED_TOKENS), cuts[-1])


def split(batch: Any, parts: int) -> Any:
  """Cut every array [B, ...] of a batch into [parts, B / parts, ...].

  Microbatch a takes rows a, a + parts, a + 2 parts, ...: rows stay on the device that
  holds them, whatever `parts` is.

  A `StepBatch` keeps its sibling pairs: each microbatch gets all pairs with their rows
  renumbered, and weight only on the pairs whose two rows it holds. Siblings must
  therefore agree in `row % parts`, as `data.step_batches` places them; a pair that does not
  is dropped, which the metric `pair_weight` of `objectives.prm_loss` shows.

  Raises:
    ValueError: the rows do not divide.
  """
  if not isinstance(batch, StepBatch):
    return jax.tree.map(lambda x: _strided(x, parts), batch)
  rows, part = batch.pairs[:, :2], jnp.arange(parts)[:, None]
  inside = jnp.all(rows[None] % parts == part[:, :, None], axis=-1)  # [parts, P]
  pairs = jnp.concatenate([rows // parts, batch.pairs[:, 2:]], axis=1)
  cut = {
    f.name: _strided(getattr(batch, f.name), parts)
    for f in dataclasses.fields(batch)
    if f.name not in ('pairs', 'pair_weights')
  }
  return StepBatch(
    **cut,
    pairs=jnp.broadcast_to(pairs[None], (parts, *pairs.shape)),
    pair_weights=jnp.where(inside, batch.pair_weights[None], 0.0),
  )


def _strided(x: jax.Array, parts: int) -> jax.Array:
  if x.shape[0] % parts:
    raise ValueError(
      f'batch={x.shape[0]} rows do not divide into accumulate={parts} microbatches; '
      f'use a multiple of {parts}'
    )
  return jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)
