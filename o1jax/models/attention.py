"""Rotary positions, masks, and causal attention with grouped key/value heads.

Shapes as in `transformer`: q [B, T, N, H], k and v [B, S, K, H], G = N / K
query heads share one key/value head. Softmax is in float32.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from o1jax.models.config import ModelConfig
from o1jax.parallel.platform import platform

# Finite, so that a row that sees nothing (padding) is uniform and not NaN.
MASKED = -1e30
# Up to this many entries cosines are constants of the program: computed in it, XLA
# repeats them in every layer.
_TABLE_SIZE = 1 << 18
# Of narrower parts of the queries products take longer than what they leave out.
_LEAST_QUERIES = 32


class Masks(NamedTuple):
  """Which key each query sees, [B, T, S] bool: in plain and in sliding layers."""

  full: jax.Array
  window: jax.Array | None

  def layer(self, window: int | None) -> jax.Array:
    """The mask of a layer with this attention window."""
    return self.full if window is None else self.window


def inverse_frequencies(config: ModelConfig) -> np.ndarray:
  """RoPE frequencies [H / 2] in radians a token, with the config's scaling applied."""
  exponent = np.arange(0, config.head_dim, 2, dtype=np.float32) / config.head_dim
  frequencies = (1.0 / (config.rope_theta**exponent)).astype(np.float32)
  scaling = config.rope_scaling
  if scaling is None:
    return frequencies
  if scaling.kind == 'linear':
    return frequencies / np.float32(scaling.factor)
  # Llama 3.1: wavelengths beyond original/low are stretched, those below
  # original/high are kept, a linear ramp in 1/wavelength lies between.
  turns = scaling.original_max_position * frequencies / (2 * math.pi)
  ramp = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
  keep = np.clip(ramp, 0.0, 1.0)
  return (keep * frequencies + (1 - keep) * frequencies / scaling.factor).astype(np.float32)


def rope_table(config: ModelConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
  """positions [B, T] -> (cos, sin), each [B, T, 1, H / 2] float32.

  A position of `max_position` or more may come out as NaN.
  """
  frequencies = inverse_frequencies(config)
  if config.max_position * frequencies.size > _TABLE_SIZE:
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies.reshape(1, 1, 1, -1)
    return jnp.cos(angles), jnp.sin(angles)
  angles = np.arange(config.max_position, dtype=np.float32)[:, None] * frequencies
  cos, sin = (jnp.asarray(table, jnp.float32) for table in (np.cos(angles), np.sin(angles)))
  return jnp.take(cos, positions, axis=0)[:, :, None], jnp.take(sin, positions, axis=0)[:, :, None]


def rotate(x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Rotates x [B, T, heads, H]: the halves of H are the two coordinates of each plane."""
  cos, sin = rope
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def full_masks(
  config: ModelConfig,
  positions: jax.Array,
  segments: jax.Array,
  first: jax.Array | int = 0,
  count: int | None = None,
) -> Masks:
  """Causal masks inside equal non-zero segments, from [B, T] positions and segments.

  Of the `count` queries from `first` on, if not of all.
  """
  count = segments.shape[1] if count is None else count
  own = lambda x: jax.lax.dynamic_slice_in_dim(x, first, count, axis=1)  # noqa: E731
  causal = (first + jnp.arange(count))[None, :, None] >= jnp.arange(segments.shape[1])[None, None]
  same = (own(segments)[:, :, None] == segments[:, None, :]) & (segments[:, None, :] > 0)
  return _masks(config, causal & same, own(positions), positions)


def cache_masks(
  config: ModelConfig, positions: jax.Array, column: jax.Array, valid: jax.Array
) -> Masks:
  """Masks of t new tokens at columns `column..` over valid [R, S] cache columns."""
  queries = column + jnp.arange(positions.shape[1])
  causal = queries[None, :, None] >= jnp.arange(valid.shape[1])[None, None, :]
  # A row's positions count its real tokens, so its columns' positions do too.
  key_positions = jnp.cumsum(valid, axis=1) - 1
  return _masks(config, causal & valid[:, None, :], positions, key_positions)


def _masks(config: ModelConfig, full, queries: jax.Array, keys: jax.Array) -> Masks:
  if config.sliding_window is None:
    return Masks(full, None)
  near = queries[:, :, None] - keys[:, None, :] < config.sliding_window
  return Masks(full, full & near)


def attend_causal(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
  """As `attend` of all T = S tokens, under a mask that lets none see a later one.

  On a CPU a part of the queries at a time, with the keys up to its end: the rest would be masked.
  """
  tokens = q.shape[1]
  fits = (n for n in (4, 3, 2) if tokens % n == 0 and tokens // n >= _LEAST_QUERIES)
  parts = next(fits, 1) if platform() == 'cpu' else 1
  ends = [tokens // parts * (i + 1) for i in range(parts)]
  done = [
    attend(q[:, start:end], k[:, :end], v[:, :end], mask[:, start:end, :end])
    for start, end in zip([0, *ends], ends, strict=False)
  ]
  return jnp.concatenate(done, axis=1) if parts > 1 else done[0]


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
  """softmax(q k^T / sqrt(H)) v over the keys that mask [B, T, S] allows.

  q [B, T, N, H], k and v [B, S, K, H] -> [B, T, N, H]. Query heads that share a
  key head are rows of one product, so keys and values are never repeated. A query that
  sees nothing gets a mean of the values, which is to be ignored: so is its gradient.
  """
  batch, t, heads, width = q.shape
  kv_heads = k.shape[2]
  if kv_heads == 1:  # an axis of size 1 in the products costs copies of the scores
    return _one_head(q, k[:, :, 0], v[:, :, 0], mask)
  groups = q.reshape(batch, t, kv_heads, heads // kv_heads, width)
  out = jax.vmap(_one_head, (2, 2, 2, None), 2)(groups, k, v, mask)
  return out.reshape(q.shape)


@jax.custom_vjp
def _one_head(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
  """Attention of all query heads [B, T, G, H] to one key head, k and v [B, S, H]."""
  return _one_head_forward(q, k, v, mask)[0]


def _one_head_forward(q, k, v, mask):
  batch, t, group, width = q.shape
  rows = (q * width**-0.5).astype(k.dtype).reshape(batch, t * group, width)
  scores = jnp.einsum('bqh,bsh->bqs', rows, k, preferred_element_type=jnp.float32)
  weights = _weights(scores.reshape(batch, t, group, -1), mask[:, :, None])
  weights = weights.reshape(scores.shape)
  inverse = 1 / weights.sum(-1, keepdims=True)
  weights = weights.astype(v.dtype)
  out = jnp.einsum('bqs,bsh->bqh', weights, v, preferred_element_type=jnp.float32)
  out = (out * inverse).astype(q.dtype)
  return out.reshape(q.shape), (rows, k, v, weights, inverse, out)


def _one_head_backward(residuals, dout):
  rows, k, v, weights, inverse, out = residuals
  shape, width = dout.shape, dout.shape[-1]
  dout = dout.reshape(rows.shape).astype(jnp.float32) * inverse
  shared = jnp.sum(dout * out, axis=-1, keepdims=True)  # of the softmax: sum of weights * dweights
  dout = dout.astype(v.dtype)
  dweights = jnp.einsum('bqh,bsh->bqs', dout, v, preferred_element_type=jnp.float32)
  dscores = (weights * (dweights - shared)).astype(k.dtype)
  dq = jnp.einsum('bqs,bsh->bqh', dscores, k, preferred_element_type=jnp.float32) * width**-0.5
  dk, dv = _over_queries(rows, dscores), _over_queries(dout, weights)
  return dq.astype(rows.dtype).reshape(shape), dk, dv, None


def _over_queries(rows: jax.Array, scores: jax.Array) -> jax.Array:
  """rows [B, Q, H] and scores [B, Q, S] -> scores^T rows [B, S, H].

  Behind the barrier the [H, S] product is turned over; without, XLA turns over the [Q, S] scores.
  """
  return jax.lax.optimization_barrier(jnp.einsum('bqh,bqs->bhs', rows, scores)).swapaxes(1, 2)


_one_head.defvjp(_one_head_forward, _one_head_backward)


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
  """`attend` of a cache, which has the layout of products: k [B, K, H, S], v [B, K, S, H]."""
  batch, t, heads, width = q.shape
  kv_heads, columns = v.shape[1:3]
  group = heads // kv_heads
  rows = (q * width**-0.5).astype(k.dtype).reshape(batch, t, kv_heads, group, width)
  rows = rows.transpose(0, 2, 1, 3, 4).reshape(batch, kv_heads, t * group, width)
  scores = jnp.einsum('bkqh,bkhs->bkqs', rows, k, preferred_element_type=jnp.float32)
  scores = scores.reshape(batch, kv_heads, t, group, columns)
  weights = _weights(scores, mask[:, None, :, None, :])
  total = weights.sum(-1)
  weights = weights.astype(v.dtype).reshape(batch, kv_heads, t * group, columns)
  out = jnp.einsum('bkqs,bksh->bkqh', weights, v, preferred_element_type=jnp.float32)
  # Dividing the [.., H] output, not the [.., S] weights, saves a pass.
  out = out.reshape(batch, kv_heads, t, group, width) / total[..., None]
  return out.transpose(0, 2, 1, 3, 4).reshape(q.shape).astype(q.dtype)


def _weights(scores: jax.Array, mask: jax.Array) -> jax.Array:
  """exp(scores - their maximum), 0 where masked; scores float32."""
  scores = jnp.where(mask, scores, MASKED)
  return jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))


def attend_cached(q: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array) -> jax.Array:
  """Attention of t new tokens to a cache that holds them already.

  q [R, t, N, H], keys [R, K, H, S], values [R, K, S, H], mask [R, t, S] -> [R, t, N, H].
  """
  one_token = q.shape[1] == 1 and keys.shape[1] == 1 < q.shape[2]
  multiply = one_token and platform() == 'cpu'
  return (_attend_one if multiply else _attend)(q, keys, values, mask)


def _attend_one(q: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array) -> jax.Array:
  """`_attend` for one token a row and one key head, by multiplying and adding.

  For a product per row XLA's CPU compiler copies the whole cache in every step of
  a decoding loop: measured 4 times slower at 256 rows. With more key heads, or with
  axes of size 1 left in, it is the product that is faster.
  """
  width = q.shape[-1]
  rows = (q[:, 0] * width**-0.5).astype(keys.dtype)  # [R, N, H]
  keys, values = keys[:, 0], values[:, 0]  # [R, H, S], [R, S, H]
  scores = jnp.sum(rows[..., None] * keys[:, None], axis=2, dtype=jnp.float32)
  weights = _weights(scores, mask)
  out = jnp.sum(weights.astype(values.dtype)[..., None] * values[:, None], axis=2)
  return (out / weights.sum(-1)[..., None])[:, None].astype(q.dtype)
