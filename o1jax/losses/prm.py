"""Losses of the process reward model, on scores before the sigmoid."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp


def pointwise_loss(
  scores: jax.Array, labels: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Binary cross-entropy of one trajectory's steps (O1-CODER, arXiv 2412.00154, sec. 2.4).

  `-sum_j w_j [v_j log r_j + (1 - v_j) log(1 - r_j)]` with `r = sigmoid(score)`, as
  `softplus(score) - v * score`, which is exact where the sigmoid saturates.

  Args:
    scores: [M] float32, one per step, before the sigmoid.
    labels: [M] float32 in [0, 1], soft or hard.
    weights: [M] float32, 0 where there is no such step.

  Returns:
    (sum, count), float32 scalars, count = sum of the weights.
  """
  arrays = [scores, labels, weights]
  chex.assert_rank(arrays, 1)
  chex.assert_equal_shape(arrays)
  chex.assert_type(arrays, jnp.float32)
  loss = jax.nn.softplus(scores) - labels * scores
  return jnp.sum(weights * loss), jnp.sum(weights)


def pairwise_loss(
  win: jax.Array, lose: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Bradley-Terry loss of pairs of sibling steps (O1-CODER, sec. 2.4).

  `-sum_p w_p log sigmoid(score_win - score_lose)`; the scores are not normalised.

  Args:
    win: [P] float32, scores of the better siblings.
    lose: [P] float32, scores of the worse siblings.
    weights: [P] float32, 0 for padding.

  Returns:
    (sum, count), float32 scalars.
  """
  arrays = [win, lose, weights]
  chex.assert_rank(arrays, 1)
  chex.assert_equal_shape(arrays)
  chex.assert_type(arrays, jnp.float32)
  return -jnp.sum(weights * jax.nn.log_sigmoid(win - lose)), jnp.sum(weights)
