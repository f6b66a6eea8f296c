"""Cutting a batch into microbatches for gradient accumulation."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from o1jax.batch import StepBatch


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
