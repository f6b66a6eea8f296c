"""Supervised fine-tuning: the weighted negative log-likelihood of tokens."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp


def nll_loss(logprobs: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Negative log-likelihood of one sequence.

  `loss = -sum_t w_t log p(x_t | x_<t)`, `count = sum_t w_t`.

  Args:
    logprobs: [T] float32, log-probability of each token given those before it.
    weights: [T] float32, >= 0; 0 for prompt and padding.

  Returns:
    (sum, count), float32 scalars; their quotient is the mean loss of a token.
  """
  chex.assert_rank([logprobs, weights], 1)
  chex.assert_equal_shape([logprobs, weights])
  chex.assert_type([logprobs, weights], jnp.float32)
  # The inner `where` keeps an infinite log-probability under weight 0 out of the
  # gradient too: 0 * inf would be nan.
  kept = jnp.where(weights > 0, logprobs, 0.0)
  return -jnp.sum(weights * kept), jnp.sum(weights)
