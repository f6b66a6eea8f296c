"""Rows of the vocabulary for tokens that a tokenizer has been given."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from o1jax.models.transformer import Model, Params

_MULTIPLE = 64  # vocabularies grow to a multiple of this: so they divide over a mesh


def with_tokens(
  model: Model, params: Params, pieces: Mapping[int, Sequence[int]]
) -> tuple[Model, Params]:
  """The model with rows for new tokens, each the mean of the rows that it was spelled by.

  A row that the checkpoint has beyond its tokenizer is used; where there are too few, embedding and
  output layer grow, by zeros.

  Args:
    model: the static model.
    params: its parameters, which stay as they are.
    pieces: for each new token id, the ids that its text was cut into before.
  """
  need = max(pieces, default=-1) + 1
  size = model.config.vocab_size
  if need > size:
    size = -(-need // _MULTIPLE) * _MULTIPLE

  def grown(rows: jax.Array) -> jax.Array:
    rows = jnp.pad(rows, ((0, size - rows.shape[0]), (0, 0)))
    for token, parts in pieces.items():
      mean = rows[jnp.asarray(parts)].astype(jnp.float32).mean(axis=0)
      rows = rows.at[token].set(mean.astype(rows.dtype))
    return rows

  new = {name: grown(params[name]) for name in ('embed', 'lm_head') if name in params}
  config = dataclasses.replace(model.config, vocab_size=size)
  return dataclasses.replace(model, config=config), params | new
