"""Keys and values of many tokens in one pool on the device, one slot a token.

A path of a tree search is a list of slots: those of the prompt, then those of each step. They are
gathered into the columns of a decoding state, and what is read or drawn there goes back into free
slots, so paths share all that they have in common. Which slot holds what is the host's business
(`paths`).

Legend: P slots, E states, R rows, W columns of a gathered prefix, n new columns, M tokens or
states stored at once, D width, K key/value heads, H their width.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from o1jax.models.transformer import Model
from o1jax.parallel.ambient import constrain
from o1jax.sampling.cache import DecodeState, laid_out
from o1jax.sampling.rows import NONE, take_rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KvPool:
  """Keys, values and states; a slot that no path points to holds garbage."""

  keys: tuple[jax.Array, ...]  # a layer: [P, K, H]
  values: tuple[jax.Array, ...]  # a layer: [P, K, H]
  hidden: jax.Array  # [E, D], each the state after the last token of a step


@functools.partial(jax.jit, static_argnames=('model', 'slots', 'states'))
def empty_pool(model: Model, slots: int, states: int) -> KvPool:
  """A pool for `slots` tokens and the states after `states` steps."""
  c = model.config
  layers = lambda: tuple(  # noqa: E731
    jnp.zeros((slots, c.num_kv_heads, c.head_dim), jnp.dtype(c.dtype)) for _ in range(c.num_layers)
  )
  return KvPool(layers(), layers(), jnp.zeros((states, c.hidden_size), jnp.dtype(c.dtype)))


def token_bytes(model: Model) -> int:
  """Bytes of the keys and values of one token, in a pool as in a cache."""
  c = model.config
  return 2 * c.num_layers * c.num_kv_heads * c.head_dim * jnp.dtype(c.dtype).itemsize


def state_bytes(model: Model) -> int:
  """Bytes of one state."""
  return model.config.hidden_size * jnp.dtype(model.config.dtype).itemsize


@functools.partial(jax.jit, static_argnames=('model', 'new'))
def gather(
  model: Model, pool: KvPool, table: jax.Array, states: jax.Array, *, new: int
) -> DecodeState:
  """Rows that have read the paths of `table`, with room for n more columns.

  Args:
    model: the decoder.
    pool: where the keys and values are.
    table: [R, W] int32 slots, aligned to the right, NONE on the left; a row of NONE is empty.
    states: [R] int32, the state after each path (any for an empty row).
    new: n, columns after the W gathered ones.
  """
  rows, width = table.shape
  flat = jnp.maximum(table, 0).reshape(-1)

  def columns(array):  # [P, K, H] -> [R, W, K, H]
    return array[flat].reshape(rows, width, *array.shape[1:])

  cache = tuple(
    (_put(columns(k).transpose(0, 2, 3, 1), keys), _put(columns(v).transpose(0, 2, 1, 3), values))
    for k, v, (keys, values) in zip(
      pool.keys, pool.values, model.empty_cache(rows, width + new), strict=True
    )
  )
  return laid_out(
    DecodeState(
      cache=cache,
      valid=jnp.pad(table != NONE, ((0, 0), (0, new))),
      position=(table != NONE).sum(-1, dtype=jnp.int32),
      hidden=jnp.take(pool.hidden, states, axis=0, mode='clip'),
      column=jnp.int32(width),
    )
  )


@functools.partial(jax.jit, static_argnames=('model', 'new'))
def refill(
  model: Model,
  pool: KvPool,
  old: DecodeState,
  take: jax.Array,
  table: jax.Array,
  states: jax.Array,
  *,
  new: int,
) -> DecodeState:
  """Rows of a state that go on, and rows that begin in the places of those that do not.

  Args:
    model: the decoder.
    pool: where the keys and values are.
    old: a state of at most W + n columns; the tokens of a row that goes on lie in the last W that
      are written.
    take: [R] int32, the row of `old` that goes on here, of the same part of the batch (see
      `take_rows`), or NONE for one that begins.
    table: [R, W] and
    states: [R] int32 of the rows that begin, as in `gather`.
    new: n.
  """
  width = table.shape[1]
  more = max(0, width + new - old.columns)
  fresh = gather(model, pool, table, states, new=new)
  on = (old.cache, old.valid, old.position, old.hidden)
  cache, valid, position, hidden = take_rows(on, jnp.maximum(take, 0))

  def last(array, axis):  # the last W columns that are written
    wider = jnp.pad(array, [(more if i == axis else 0, 0) for i in range(array.ndim)])
    return jax.lax.dynamic_slice_in_dim(wider, old.column + more - width, width, axis)

  def choose(kept, begun):
    return jnp.where((take != NONE).reshape(-1, *(1,) * (begun.ndim - 1)), kept, begun)

  cache = tuple(
    (choose(_put(last(k, 3), keys), keys), choose(_put(last(v, 2), values), values))
    for (k, v), (keys, values) in zip(cache, fresh.cache, strict=True)
  )
  valid = jnp.pad(last(valid, 1), ((0, 0), (0, new)))
  return laid_out(
    DecodeState(
      cache=cache,
      valid=choose(valid, fresh.valid),
      position=choose(position, fresh.position),
      hidden=choose(hidden, fresh.hidden),
      column=fresh.column,
    )
  )


@functools.partial(jax.jit, donate_argnames='pool')
def store(
  pool: KvPool,
  state: DecodeState,
  tokens: tuple[jax.Array, jax.Array, jax.Array],
  hidden: jax.Array,
  ends: tuple[jax.Array, jax.Array],
) -> KvPool:
  """Copies tokens of a state into the pool, and states after steps.

  Args:
    pool: is donated.
    state: R rows.
    tokens: (rows, columns, slots), each [M] int32: which token goes to which slot. A slot beyond
      the last is padding.
    hidden: [M', D] and
    ends: (states, [M'] int32; rows of `hidden`, [M']): which of them goes where; padding as above.
  """
  rows, columns, slots = tokens
  # Of two index arrays with slices between them, NumPy's rule puts the indexed axis first.
  new = [(k[rows, :, :, columns], v[rows, :, columns]) for k, v in state.cache]
  into, source = ends
  return _put_in(pool, new, slots, hidden[source], into)


def store_last(pool: KvPool, state: DecodeState, slots: jax.Array, ends: jax.Array) -> KvPool:
  """Within jit: copies the last columns of every row into the pool, and the state after them.

  Args:
    pool: the pool.
    state: R rows.
    slots: [R, t] int32, of each of the last t columns; padding as in `store`.
    ends: [R] int32, of each row's state.
  """
  count = slots.shape[1]

  def last(array, axis):  # [R * t, K, H]
    new = jax.lax.dynamic_slice_in_dim(array, state.column - count, count, axis)
    return jnp.moveaxis(new, axis, 1).reshape(-1, *pool.keys[0].shape[1:])

  new = [(last(k, 3), last(v, 2)) for k, v in state.cache]
  return _put_in(pool, new, slots.reshape(-1), state.hidden, ends)


def _put_in(pool: KvPool, new, slots, hidden, ends) -> KvPool:
  """The pool with keys and values [M, K, H] of each layer in slots [M], and states in theirs."""

  def put(array, where, new):
    return array.at[where].set(new.astype(array.dtype), mode='drop')

  layers = zip(pool.keys, pool.values, new, strict=True)
  both = [(put(keys, slots, k), put(values, slots, v)) for keys, values, (k, v) in layers]
  # Any row may read any slot: a pool is split by key heads, never by slots.
  keys, values = constrain(tuple(zip(*both, strict=True)), (None, 'kv_heads'))
  return KvPool(keys, values, put(pool.hidden, ends, hidden))


def _put(small: jax.Array, large: jax.Array) -> jax.Array:
  return jax.lax.dynamic_update_slice(large, small, (0,) * small.ndim)
