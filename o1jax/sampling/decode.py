"""The decoding loop: one compiled `while_loop` that ends when the rows do.

Legend: R rows, N the most new tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from o1jax.models.transformer import Model, Params
from o1jax.parallel.ambient import constrain
from o1jax.sampling.cache import DecodeState, laid_out, read_tokens
from o1jax.sampling.draw import SAMPLE, Drawing, draw
from o1jax.sampling.rows import evenly_full


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Continuation:
  """What R rows have generated so far, and whether they go on."""

  state: DecodeState
  uniforms: jax.Array  # [R, N] float32, the whole randomness of the rows
  tokens: jax.Array  # [R, N] int32, 0 after the end
  logprobs: jax.Array  # [R, N] float32, untruncated at temperature 1, 0 after the end
  lengths: jax.Array  # [R] int32, tokens generated, the stop token included
  live: jax.Array  # [R] bool, not stopped yet
  steps: jax.Array  # int32 scalar, tokens drawn for the longest row
  marked: jax.Array  # [R] bool, a token of `mark_ids` was drawn
  mark: jax.Array  # [R, D], state after the first of those, where `marked`


@functools.partial(jax.jit, static_argnames='max_new', donate_argnames='state')
def begin(state: DecodeState, keys: jax.Array, live: jax.Array, *, max_new: int) -> Continuation:
  """Rows about to generate at most `max_new` tokens each.

  A row's uniforms come from its own key alone, so it draws the same tokens in
  whatever batch it stands.

  Args:
    state: R sequences; donated.
    keys: [R] typed PRNG keys, each used here and never again.
    live: [R] bool, rows that shall generate at all.
    max_new: N, new tokens at most.
  """
  rows, by_row = live.shape[0], functools.partial(constrain, names=('batch',))
  return Continuation(
    state=laid_out(state),
    uniforms=by_row(jax.vmap(lambda key: jax.random.uniform(key, (max_new,)))(keys)),
    tokens=by_row(jnp.zeros((rows, max_new), jnp.int32)),
    logprobs=by_row(jnp.zeros((rows, max_new), jnp.float32)),
    lengths=by_row(jnp.zeros(rows, jnp.int32)),
    live=by_row(live),
    steps=jnp.int32(0),
    marked=by_row(jnp.zeros(rows, bool)),
    mark=by_row(jnp.zeros_like(state.hidden)),
  )


@functools.partial(
  jax.jit, static_argnames=('model', 'stop_ids', 'how', 'mark_ids'), donate_argnames='rows'
)
def run(
  model: Model,
  params: Params,
  rows: Continuation,
  *,
  stop_ids: tuple[int, ...],
  how: Drawing,
  leave: jax.Array | int = 0,
  evenly: jax.Array | bool = False,
  mark_ids: tuple[int, ...] = (),
) -> Continuation:
  """Generates until at most `leave` rows are live or N tokens are drawn.

  A row stops after a token of `stop_ids`, which is its last and is read into
  its cache like the others, so that the row can be continued later.

  Args:
    model: the decoder.
    params: its parameters.
    rows: is donated; its state must have N - `steps` columns left.
    stop_ids: tokens that end a row.
    how: temperature and truncation.
    leave: live rows at which to come back (to compact the batch, say).
    evenly: they are counted as `evenly_full` does.
    mark_ids: tokens after the first of which a row's state is kept in `mark`.
  """
  max_new, params = rows.tokens.shape[1], model.apart(params)

  def unfinished(rows):
    live = jnp.where(evenly, evenly_full(rows.live), rows.live.sum())
    return (rows.steps < max_new) & (live > leave)

  return jax.lax.while_loop(
    unfinished, functools.partial(_next_token, model, params, stop_ids, how, mark_ids), rows
  )


def _next_token(model, params, stop_ids, how, mark_ids, rows: Continuation) -> Continuation:
  state, live = rows.state, rows.live
  uniform = jax.lax.dynamic_slice_in_dim(rows.uniforms, rows.steps, 1, axis=1)[:, 0]
  token, logprob = draw(model.logits(params, state.hidden), uniform, how)
  token = jnp.where(live, token, 0)
  valid = jax.lax.dynamic_update_slice(state.valid, live[:, None], (0, state.column))
  hidden, cache = read_tokens(
    model, params, state.cache, token[:, None], state.position[:, None], state.column, valid
  )
  state = laid_out(
    DecodeState(
      cache=cache,
      valid=valid,
      position=state.position + live,
      hidden=jnp.where(live[:, None], hidden[:, 0], state.hidden),
      column=state.column + 1,
    )
  )
  stopped = _is_one_of(token, stop_ids)
  marking = live & ~rows.marked & _is_one_of(token, mark_ids)
  at = (0, rows.steps)
  return dataclasses.replace(
    rows,
    state=state,
    tokens=jax.lax.dynamic_update_slice(rows.tokens, token[:, None], at),
    logprobs=jax.lax.dynamic_update_slice(
      rows.logprobs, jnp.where(live, logprob, 0.0)[:, None], at
    ),
    lengths=rows.lengths + live,
    live=live & ~stopped,
    steps=rows.steps + 1,
    marked=rows.marked | marking,
    mark=jnp.where(marking[:, None], state.hidden, rows.mark) if mark_ids else rows.mark,
  )


def _is_one_of(token: jax.Array, ids: tuple[int, ...]) -> jax.Array:
  return functools.reduce(jnp.logical_or, [token == i for i in ids], jnp.zeros(token.shape, bool))


def decode(
  model: Model,
  params: Params,
  state: DecodeState,
  keys: jax.Array,
  *,
  max_new: int,
  stop_ids: tuple[int, ...],
  how: Drawing = SAMPLE,
  live: np.ndarray | jax.Array | None = None,
) -> Continuation:
  """Continues every row (or those of `live`) until it stops or has `max_new` tokens.

  See `begin` and `run`. `state` is donated; use the one that comes back.
  """
  live = np.ones(state.rows, bool) if live is None else np.asarray(live)
  rows = begin(state, keys, live, max_new=max_new)
  return run(model, params, rows, stop_ids=stop_ids, how=how)
