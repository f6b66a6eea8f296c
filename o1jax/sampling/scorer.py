"""Judging candidate steps: the process reward model with a cache of its own.

Legend: P problems, n candidate steps, t tokens of the longest one.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from o1jax.models.heads import states_before, step_head_of
from o1jax.models.transformer import Cache, Model, Params
from o1jax.parallel.ambient import ambient_ways, on_own_rows
from o1jax.parallel.distributed import fetch
from o1jax.sampling.cache import DecodeState, extend, gather_rows, grow, laid_out, prefill
from o1jax.sampling.rows import NONE, parts_of, side_by_side, take_rows
from o1jax.sampling.sampler import COLUMN_MULTIPLE, length_batches, power_of_two, round_up

SHORTEST = 8  # steps are read padded to this or a higher power of two: a compiled chunk each


class Scorer(Protocol):
  """Judges the next step of P problems, and reads the one that is taken. States are opaque."""

  def start(self, tokens: np.ndarray, lengths: np.ndarray) -> Any:
    """The state after prompts [P, T], padded on the right, of the given lengths [P]."""

  def score(self, state: Any, slots: np.ndarray, steps: Sequence[Sequence[int]]) -> np.ndarray:
    """Log-odds [n] of candidate steps; candidate i continues row slots[i] of the state."""

  def advance(self, state: Any, steps: Sequence[Sequence[int]]) -> Any:
    """The state after one more step of each of the P problems: one scored last, or () for none."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ReadSteps:
  """What the model keeps of n steps that it has read: their t columns of a cache."""

  cache: Cache
  mask: jax.Array  # [n, t] bool, the tokens
  hidden: jax.Array  # [n, D], state after each


@dataclasses.dataclass
class Judged:
  """The state of a `PrmScorer`: paths that were taken, and the candidates that were read last."""

  state: DecodeState
  chunks: list[ReadSteps]
  rows: dict[tuple[int, tuple[int, ...]], tuple[int, int]]  # slot, step -> chunk, row of it


@dataclasses.dataclass(frozen=True)
class PrmScorer:
  """A process reward model `{'trunk', 'head'}` with its own cache; reads every step once.

  Candidates are read in chunks of at most `rows` of similar length.
  """

  model: Model
  params: dict[str, Params]
  rows: int = 128

  def start(self, tokens: np.ndarray, lengths: np.ndarray) -> Judged:
    """See `Scorer`."""
    columns = round_up(tokens.shape[1] + SHORTEST, COLUMN_MULTIPLE)
    state = prefill(self.model, self.params['trunk'], tokens, lengths, columns=columns)
    return Judged(state, [], {})

  def score(self, state: Judged, slots: np.ndarray, steps: Sequence[Sequence[int]]) -> np.ndarray:
    """See `Scorer`."""
    state.state = with_room(self.model, state.state, _padded(steps))
    state.chunks, state.rows = [], {}
    scores = np.zeros(len(steps), np.float32)
    for chunk in self._chunks(parts_of(slots, state.state.rows), steps):
      real = chunk != NONE
      tokens, mask = pad_steps([steps[i] if i != NONE else () for i in chunk])
      where = np.where(real, np.asarray(slots)[chunk], 0)
      got, read = score_candidates(self.model, self.params, state.state, where, tokens, mask)
      scores[chunk[real]] = fetch(got)[real]
      for row in np.flatnonzero(real):
        slot, step = int(where[row]), tuple(steps[chunk[row]])
        state.rows[slot, step] = len(state.chunks), int(row)
      state.chunks.append(read)
    return scores

  def _chunks(
    self, parts: list[np.ndarray], steps: Sequence[Sequence[int]]
  ) -> Iterator[np.ndarray]:
    """Candidates of similar length in the parts that have their slots, [rows]; NONE between."""
    rows = round_up(self.rows, ambient_ways())
    cut = []
    for part in parts:
      batches = length_batches([steps[i] for i in part], rows // len(parts))
      cut.append([part[batch] for batch in batches])
    for chunk in itertools.zip_longest(*cut, fillvalue=()):
      yield side_by_side(chunk, rows)

  def advance(self, state: Judged, steps: Sequence[Sequence[int]]) -> Judged:
    """See `Scorer`; nothing is read again."""
    taken = state.state
    where = np.full((len(state.chunks), taken.rows), NONE, np.int32)
    for slot, step in enumerate(steps):
      if len(step):
        chunk, row = state.rows[slot, tuple(step)]
        where[chunk, slot] = row
    for read, rows in zip(state.chunks, where, strict=True):
      taken = adopt(taken, read, rows)
    width = max(read.mask.shape[1] for read in state.chunks)
    return Judged(dataclasses.replace(taken, column=taken.column + width), [], {})


@functools.partial(jax.jit, static_argnames='model')
def score_candidates(
  model: Model, params, state: DecodeState, slots, tokens, mask
) -> tuple[jax.Array, ReadSteps]:
  """Log-odds [n] of the steps [n, t] after the rows `slots` [n] of the state, and what was read."""
  state = gather_rows(state, slots)
  hidden, after = extend(model, params['trunk'], state, tokens, mask)
  scores = score_steps(model, params, state.hidden, hidden, tokens, mask)

  def new(array, axis):
    return jax.lax.dynamic_slice_in_dim(array, state.column, tokens.shape[1], axis)

  cache = tuple((new(keys, 3), new(values, 2)) for keys, values in after.cache)
  return scores, ReadSteps(cache, jnp.asarray(mask), after.hidden)


@functools.partial(jax.jit, donate_argnames='state')
def adopt(state: DecodeState, read: ReadSteps, rows: jax.Array) -> DecodeState:
  """Puts steps that were read behind rows of a state, at its column, which is not moved.

  Args:
    state: is donated, and must have t columns left.
    read: n steps of t columns.
    rows: [R] int32, which of them comes behind each row, of the same part of the batch (see
      `take_rows`); NONE for none.
  """
  taken, width = rows != NONE, read.mask.shape[1]
  counts = read.mask.sum(-1, dtype=jnp.int32)
  new = (read.cache, read.mask, read.hidden, counts)
  cache, mask, hidden, counts = take_rows(new, jnp.maximum(rows, 0))

  def put(old, new, axis):
    there = jax.lax.dynamic_slice_in_dim(old, state.column, width, axis)
    new = jnp.where(taken.reshape(-1, *(1,) * (old.ndim - 1)), new, there)
    return jax.lax.dynamic_update_slice_in_dim(old, new, state.column, axis)

  layers = zip(state.cache, cache, strict=True)
  return laid_out(
    DecodeState(
      cache=tuple((put(k, new_k, 3), put(v, new_v, 2)) for (k, v), (new_k, new_v) in layers),
      valid=put(state.valid, mask, 1),
      position=state.position + jnp.where(taken, counts, 0),
      hidden=jnp.where(taken[:, None], hidden, state.hidden),
      column=state.column,
    )
  )


@functools.partial(jax.jit, static_argnames='model')
def score_steps(model: Model, params, before, hidden, tokens, mask) -> jax.Array:
  """Log-odds [R] of steps, from the state before [R, D] and those of its tokens [R, t, D]."""
  embeddings = model.embed(params['trunk'], tokens)
  logprobs = _logprobs(model, params['trunk'], states_before(before, hidden), tokens)
  head = step_head_of(params['head'])
  return head.apply_step(params['head'], before, hidden, embeddings, logprobs, mask)


def _logprobs(model: Model, trunk: Params, before: jax.Array, tokens: jax.Array) -> jax.Array:
  """Log-prob of each token [R, t] in the state before it [R, t, D], a column of logits at once."""

  def columns(kernel, before, tokens):
    def column(inputs):
      states, targets = inputs
      logits = model.read_out(kernel, states)
      chosen = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
      return chosen - jax.nn.logsumexp(logits, axis=-1)

    return jax.lax.map(column, (jnp.moveaxis(before, 1, 0), tokens.T)).T

  kernel = model.output_rows(trunk)
  return on_own_rows(columns, kernel, ('vocab', 'embed'), before, jnp.asarray(tokens))


def with_room(model: Model, state: DecodeState, new: int) -> DecodeState:
  """The state with room for `new` more columns."""
  needed = int(state.column) + new
  if needed <= state.columns:
    return state
  return grow(model, state, columns=round_up(needed, COLUMN_MULTIPLE))


def pad_steps(steps: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
  """Steps as (tokens [n, t] int32, mask [n, t] bool), t a power of two."""
  shape = len(steps), _padded(steps)
  tokens, mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
  for row, step in enumerate(steps):
    tokens[row, : len(step)] = step
    mask[row, : len(step)] = True
  return tokens, mask


def _padded(steps: Sequence[Sequence[int]]) -> int:
  return max(SHORTEST, power_of_two(max(map(len, steps))))
