"""Decoding state over a column-aligned key/value cache with holes.

Legend: R rows, S cache columns, T prompt tokens, t new tokens, D width.
All rows write the same column, so the cache is updated in place by one slice
and never scattered. What a row did not write there (it is finished, or its
chunk is shorter) is a hole: `valid` is False and no query sees it. Rotary
positions are kept per row, so holes and left padding do not shift them.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from o1jax.models.transformer import Cache, Model, Params
from o1jax.parallel.ambient import constrain
from o1jax.sampling.rows import take_rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
  """R sequences, each ready to be continued."""

  cache: Cache  # keys and values, a pair for each layer, rows on axis 0
  valid: jax.Array  # [R, S] bool, columns that hold a token of the row
  position: jax.Array  # [R] int32, rotary position of the next token
  hidden: jax.Array  # [R, D], state after the last token: the next one is read from it
  column: jax.Array  # int32 scalar, where every row writes next

  @property
  def rows(self) -> int:
    """R."""
    return self.valid.shape[0]

  @property
  def columns(self) -> int:
    """S: `column` must never pass it, which callers check (see `grow`)."""
    return self.valid.shape[1]


def laid_out(state: DecodeState) -> DecodeState:
  """Within jit: rows over `data` and `fsdp` of the ambient mesh, key heads over `tensor`."""
  return DecodeState(
    cache=constrain(state.cache, ('batch', 'kv_heads')),
    valid=constrain(state.valid, ('batch',)),
    position=constrain(state.position, ('batch',)),
    hidden=constrain(state.hidden, ('batch',)),
    column=state.column,
  )


def read_tokens(
  model: Model, params: Params, cache: Cache, tokens: jax.Array, *where: jax.Array
) -> tuple[jax.Array, Cache]:
  """Within jit: `Model.extend` with each row on the devices of the ambient mesh that hold it.

  Left to itself the compiler lays the states out by width, as the embedding is, and sums every
  product over all devices.
  """
  x = constrain(model.embed(params, tokens), ('batch', None, None))
  return model.extend_from_embeddings(params, cache, x, *where)


@functools.partial(jax.jit, static_argnames=('model', 'columns'))
def prefill(
  model: Model, params: Params, tokens: jax.Array, lengths: jax.Array, *, columns: int = 0
) -> DecodeState:
  """Reads the prompts.

  Args:
    model: the decoder.
    params: its parameters.
    tokens: [R, T] int32, padded on the right; they are moved to the right here,
      so that the next token of every row goes to column T.
    lengths: [R] int32 in 1..T, real tokens of each row.
    columns: S, at least T; 0 for T.

  Raises:
    ValueError: `columns` does not hold the prompts.
  """
  width = tokens.shape[1]
  if columns and columns < width:
    raise ValueError(f'columns={columns} cannot hold prompts of {width}; use at least {width}')
  source = jnp.arange(width)[None] - (width - lengths[:, None])  # negative on the padding
  valid = source >= 0
  aligned = jnp.take_along_axis(tokens, jnp.maximum(source, 0), axis=1)
  hidden, cache = read_tokens(
    model,
    params,
    model.empty_cache(tokens.shape[0], width),
    aligned,
    jnp.maximum(source, 0),
    jnp.int32(0),
    valid,
  )
  state = laid_out(DecodeState(cache, valid, lengths, hidden[:, -1], jnp.int32(width)))
  return _pad_columns(model, state, max(columns, width))


def _pad_columns(model: Model, state: DecodeState, columns: int) -> DecodeState:
  def place(small, large):
    return jax.lax.dynamic_update_slice(large, small, (0,) * small.ndim)

  # Into a fresh cache at the origin: which axis holds the columns is the model's business.
  larger = model.empty_cache(state.rows, columns)
  state = dataclasses.replace(
    state,
    cache=jax.tree.map(place, state.cache, larger),
    valid=jnp.pad(state.valid, ((0, 0), (0, columns - state.columns))),
  )
  return laid_out(state)


@functools.partial(jax.jit, static_argnames=('model', 'columns'))
def grow(model: Model, state: DecodeState, *, columns: int) -> DecodeState:
  """The same sequences with room for `columns` >= S columns."""
  return _pad_columns(model, state, columns)


@jax.jit
def gather_rows(state: DecodeState, index: jax.Array) -> DecodeState:
  """The rows `index` [R'] of the state, in that order; rows may repeat.

  Over a mesh each must stand in the part of the batch that it comes from, see `take_rows`.
  """
  rows = take_rows((state.cache, state.valid, state.position, state.hidden), index)
  # + 0: a buffer of its own, which `extend` may be given without deleting that of `state`.
  return laid_out(DecodeState(*rows, column=state.column + 0))


def repeat_rows(state: DecodeState, count: int) -> DecodeState:
  """Each row `count` times in succession: row r becomes rows r*count .. r*count+count-1."""
  return gather_rows(state, jnp.repeat(jnp.arange(state.rows), count))


@functools.partial(jax.jit, static_argnames='model', donate_argnames='state')
def extend(
  model: Model, params: Params, state: DecodeState, tokens: jax.Array, mask: jax.Array
) -> tuple[jax.Array, DecodeState]:
  """Reads given tokens: t columns for every row.

  Args:
    model: the decoder.
    params: its parameters.
    state: is donated, and must have t columns left.
    tokens: [R, t] int32.
    mask: [R, t] bool, the real tokens of each row, which come first; the rest are holes.

  Returns:
    Hidden states [R, t, D] (arbitrary where `mask` is False) and the longer state.
  """
  width = tokens.shape[1]
  counts = mask.sum(-1, dtype=jnp.int32)
  offsets = jnp.minimum(jnp.arange(width)[None], jnp.maximum(counts - 1, 0)[:, None])
  valid = jax.lax.dynamic_update_slice(state.valid, mask, (0, state.column))
  hidden, cache = read_tokens(
    model, params, state.cache, tokens, state.position[:, None] + offsets, state.column, valid
  )
  last = jnp.take_along_axis(hidden, jnp.maximum(counts - 1, 0)[:, None, None], axis=1)[:, 0]
  state = DecodeState(
    cache=cache,
    valid=valid,
    position=state.position + counts,
    hidden=jnp.where(counts[:, None] > 0, last, state.hidden),
    column=state.column + width,
  )
  return hidden, laid_out(state)
