"""Products and element-wise pieces of a block, with gradients shaped for speed.

The backward pass that JAX derives for `x @ w` forms w's gradient as the transpose
of dy^T x. On CPUs XLA then fuses the element-wise work before it into a strided
copy of dy, which cost as much as the whole block; written as x^T dy it does not.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def linear(x: jax.Array, kernel: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
  """x [M, I] times kernel [I, O] -> [M, O], in `dtype` or that of x."""
  return jnp.matmul(x, kernel, preferred_element_type=dtype)


def _linear_forward(x, kernel, dtype):
  return linear(x, kernel, dtype), (x, kernel)


def _linear_backward(dtype, residuals, dy):
  del dtype
  x, kernel = residuals
  dy = dy.astype(x.dtype)
  dx = jax.lax.dot_general(dy, kernel, (((1,), (1,)), ((), ())))
  return dx, jax.lax.dot_general(x, dy, (((0,), (0,)), ((), ())))


linear.defvjp(_linear_forward, _linear_backward)


@jax.custom_vjp
def gated_silu(gate: jax.Array, up: jax.Array) -> jax.Array:
  """silu(gate) * up, element by element; the sigmoid is recomputed, not kept."""
  return gate * _sigmoid(gate) * up


def _gated_forward(gate, up):
  return gated_silu(gate, up), (gate, up)


def _gated_backward(residuals, dy):
  # Without the barrier XLA keeps the forward pass's tanh in memory to reuse it here.
  gate, up = jax.lax.optimization_barrier(residuals)
  s = _sigmoid(gate)
  return dy * up * (s * (1 + gate * (1 - s))), dy * (gate * s)


def _sigmoid(x):
  return 0.5 + 0.5 * jnp.tanh(0.5 * x)  # XLA's CPU division costs more than its tanh


gated_silu.defvjp(_gated_forward, _gated_backward)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
  """x [..., D] over its root mean square, times scale [D]; statistics in float32."""
  wide = x.astype(jnp.float32)
  inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
  return (wide * inverse).astype(x.dtype) * as_last(scale, x)


def as_last(vector: jax.Array, x: jax.Array) -> jax.Array:
  """vector [D] with the rank of x, for broadcasting over the last axis."""
  return vector.reshape((1,) * (x.ndim - 1) + vector.shape)
