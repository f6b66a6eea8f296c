"""Judging candidate steps: the process reward model with a cache of its own.

Legend: P problems, n candidate steps, t tokens of the longest one.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from o1jax.models.heads import states_before, step_head_of
from o1jax.models.transformer import Model, Params
from o1jax.parallel.distributed import fetch
from o1jax.parallel.sharding import ambient_ways, on_own_rows
from o1jax.sampling.cache import DecodeState, extend, gather_rows, grow, prefill
from o1jax.sampling.sampler import COLUMN_MULTIPLE, length_batches, round_up

SHORTEST = 8  # steps are read padded to this or a higher power of two: a compiled chunk each


class Scorer(Protocol):
  """Judges the next step of P problems, and reads the one that is taken. States are opaque."""

  def start(self, tokens: np.ndarray, lengths: np.ndarray) -> Any:
    """The state after prompts [P, T], padded on the right, of the given lengths [P]."""

  def score(self, state: Any, slots: np.ndarray, steps: Sequence[Sequence[int]]) -> np.ndarray:
    """Log-odds [n] of candidate steps; candidate i continues row slots[i] of the state."""

  def advance(self, state: Any, steps: Sequence[Sequence[int]]) -> Any:
    """The state after one more step (or none, if empty) of each of the P problems."""


@dataclasses.dataclass(frozen=True)
class PrmScorer:
  """A process reward model `{'trunk', 'head'}` with its own cache; reads new tokens only.

  Candidates are read in chunks of at most `rows` of similar length.
  """

  model: Model
  params: dict[str, Params]
  rows: int = 128

  def start(self, tokens: np.ndarray, lengths: np.ndarray) -> DecodeState:
    """See `Scorer`."""
    columns = round_up(tokens.shape[1] + SHORTEST, COLUMN_MULTIPLE)
    return prefill(self.model, self.params['trunk'], tokens, lengths, columns=columns)

  def score(
    self, state: DecodeState, slots: np.ndarray, steps: Sequence[Sequence[int]]
  ) -> np.ndarray:
    """See `Scorer`."""
    state = with_room(self.model, state, _padded(steps))
    scores = np.zeros(len(steps), np.float32)
    rows = round_up(self.rows, ambient_ways())
    for chunk in length_batches(steps, rows):
      tokens, mask = pad_steps([steps[i] for i in chunk], rows)
      where = np.pad(np.asarray(slots)[chunk], (0, rows - len(chunk)))
      got = score_candidates(self.model, self.params, state, where, tokens, mask)
      scores[chunk] = fetch(got)[: len(chunk)]
    return scores

  def advance(self, state: DecodeState, steps: Sequence[Sequence[int]]) -> DecodeState:
    """See `Scorer`."""
    return read_steps(self.model, self.params['trunk'], state, steps)


@functools.partial(jax.jit, static_argnames='model')
def score_candidates(model: Model, params, state: DecodeState, slots, tokens, mask) -> jax.Array:
  """Log-odds [n] of the steps [n, t] after the rows `slots` [n] of the state."""
  state = gather_rows(state, slots)
  hidden, _ = extend(model, params['trunk'], state, tokens, mask)
  return score_steps(model, params, state.hidden, hidden, tokens, mask)


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


def read_steps(
  model: Model, params: Params, state: DecodeState, steps: Sequence[Sequence[int]]
) -> DecodeState:
  """The state after one step (or none, if empty) of every row; donates the one given."""
  tokens, mask = pad_steps(steps, state.rows)
  return extend(model, params, with_room(model, state, tokens.shape[1]), tokens, mask)[1]


def pad_steps(steps: Sequence[Sequence[int]], rows: int) -> tuple[np.ndarray, np.ndarray]:
  """Steps as (tokens [rows, t] int32, mask [rows, t] bool), t a power of two."""
  width = _padded(steps)
  tokens, mask = np.zeros((rows, width), np.int32), np.zeros((rows, width), bool)
  for row, step in enumerate(steps):
    tokens[row, : len(step)] = step
    mask[row, : len(step)] = True
  return tokens, mask


def _padded(steps: Sequence[Sequence[int]]) -> int:
  return max(SHORTEST, 1 << (max(map(len, steps)) - 1).bit_length())
