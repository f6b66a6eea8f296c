"""Log-probabilities of given tokens, without a [B, T, V] float32 array.

The output layer is applied to a few columns at a time and recomputed in the backward
pass: at V = 150k the logits of one batch would be larger than the model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from o1jax.batch import TokenBatch
from o1jax.losses import ppo
from o1jax.models.transformer import Model
from o1jax.parallel.ambient import ambient_ways, constrain, on_own_rows, token_ways

# When the caller does not say: logits alive at once on a device (64 MiB of float32), and into how
# many pieces that may cut a row.
_LOGITS_AT_ONCE, _MOST_PIECES = 1 << 24, 8


def predicted(segments: jax.Array) -> jax.Array:
  """Which tokens have a prediction: not padding, and not the first of their document.

  Args:
    segments: [B, T] int32.

  Returns:
    [B, T] bool.
  """
  before = jnp.pad(segments[:, :-1], ((0, 0), (1, 0)))
  return (segments > 0) & (segments == before)


def states(
  model: Model, params: Any, tokens: jax.Array, positions: jax.Array, segments: jax.Array
) -> jax.Array:
  """`Model.hidden`, [B, T, D], with each row on the device of the ambient mesh that holds it.

  Left to itself the compiler takes the layout of the embedding, D over `fsdp`, for the states too:
  every device then works on all rows, and every product of every layer is summed over the devices.
  With rows kept apart it is the parameters that travel.
  """
  x = constrain(model.embed(params, tokens), ('batch', 'tokens', None))
  return model.hidden_from_embeddings(params, x, positions, segments)


def token_logprobs(
  model: Model,
  params: Any,
  tokens: jax.Array,
  positions: jax.Array,
  segments: jax.Array,
  chunk: int | None = None,
) -> jax.Array:
  """`log p(tokens[b, t] | tokens[b, :t])` of every token.

  Args:
    model: the static model.
    params: its parameters.
    tokens: [B, T] int32.
    positions: [B, T] int32.
    segments: [B, T] int32, 0 for padding.
    chunk: columns of logits alive at once; None takes what `columns_at_once` says.

  Returns:
    [B, T] float32; 0 for padding and for the first token of each document.
  """
  hidden = states(model, params, tokens, positions, segments)
  logprobs = over_columns(model, params, hidden, tokens, target_logprobs, chunk)
  return jnp.where(predicted(segments), logprobs, 0.0)


def sequence_logprobs(
  model: Model, params: Any, batch: TokenBatch, chunk: int | None = None
) -> jax.Array:
  """Summed log-probability of each row's tokens under the loss mask: [B] float32."""
  logprobs = token_logprobs(model, params, batch.tokens, batch.positions, batch.segments, chunk)
  return jnp.sum(logprobs * batch.loss_mask, axis=-1)


def target_logprobs(logits: jax.Array, targets: jax.Array) -> jax.Array:
  """Logits [B, C, V] float32 and targets [B, C] int32 -> log-probabilities [B, C]."""
  chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  return chosen - jax.nn.logsumexp(logits, axis=-1)


def target_logprobs_and_entropy(
  logits: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """As `target_logprobs`, and beside it the entropy in nats of each distribution."""
  return target_logprobs(logits, targets), ppo.entropy(logits)


def columns_at_once(model: Model, rows: int, columns: int, ways: int) -> int:
  """How many of `columns` have their logits alive at once, of `rows` that lie on `ways` devices.

  As many as take 64 MiB of a device, and at least one in 8: each piece goes through the whole
  output layer and adds to its gradient, so of narrow ones memory has all the work.
  """
  fit = _LOGITS_AT_ONCE * ways // (rows * model.config.vocab_size)
  return max(fit, -(-columns // _MOST_PIECES))


def over_columns(
  model: Model,
  params: Any,
  hidden: jax.Array,
  tokens: jax.Array,
  read: Callable[[jax.Array, jax.Array], Any],
  chunk: int | None = None,
) -> Any:
  """Apply `read(logits [B, C, V], targets [B, C])` to all columns, C at a time.

  Args:
    model: the static model.
    params: its parameters.
    hidden: [B, T, D], the state after each token.
    tokens: [B, T] int32; token t is the target of the state after token t - 1.
    read: returns a pytree of [B, C] arrays; recomputed in the backward pass when
      the columns take more than one piece.
    chunk: C, or None for what `columns_at_once` says.

  Returns:
    The pytree of `read` with [B, T] arrays, aligned with `tokens`, 0 in column 0.
  """
  rows, width = tokens.shape
  split = token_ways(width)
  last = width if split > 1 else width - 1  # the last state has no target: there to divide
  states, targets = hidden[:, :last], jnp.pad(tokens[:, 1:], ((0, 0), (0, last + 1 - width)))
  columns = last // split
  chunk = chunk or columns_at_once(model, rows, columns, ambient_ways())

  def aligned(x):
    return jnp.pad(x[:, : width - 1], ((0, 0), (1, 0)))

  if chunk >= columns and split == 1:
    return jax.tree.map(aligned, read(model.logits(params, states), targets))
  read_out = lambda k, s, t: read(model.read_out(k, s), t)  # noqa: E731
  in_pieces = functools.partial(_in_pieces, read_out, min(chunk, columns))
  axes, kernel = ('vocab', 'embed'), model.output_rows(params)
  found = on_own_rows(in_pieces, kernel, axes, states, targets, by_tokens=True)
  return jax.tree.map(aligned, found)


def _in_pieces(read, chunk: int, kernel: jax.Array, states: jax.Array, targets: jax.Array) -> Any:
  """`read(kernel, states [B, C, D], targets [B, C])` for all columns -> [B, columns] arrays."""
  rows, columns = targets.shape
  pieces = -(-columns // chunk)

  def cut(x):  # [B, columns, ...] -> [pieces, B, chunk, ...]
    x = jnp.pad(x, ((0, 0), (0, pieces * chunk - columns)) + ((0, 0),) * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(rows, pieces, chunk, *x.shape[2:]), 1, 0)

  def join(x):
    return jnp.moveaxis(x, 0, 1).reshape(rows, pieces * chunk)[:, :columns]

  again = jax.checkpoint(lambda x: read(kernel, *x))
  return jax.tree.map(join, jax.lax.map(again, (cut(states), cut(targets))))
