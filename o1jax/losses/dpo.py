"""Direct preference optimisation of one pair of answers.

Both losses act on the margin between the policy's and the reference's log-ratios,
so `margin` is computed once and the loss is chosen by passing the function.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp


def margin(
  chosen: jax.Array,
  rejected: jax.Array,
  ref_chosen: jax.Array,
  ref_rejected: jax.Array,
  chosen_length: jax.Array | None = None,
  rejected_length: jax.Array | None = None,
) -> jax.Array:
  """How much more than its reference the policy prefers the chosen answer.

  `m = (log pi(w) - log ref(w)) / |w| - (log pi(l) - log ref(l)) / |l|`, with both
  lengths 1 unless they are given.

  Args:
    chosen: [] float32, summed log-probability of the chosen answer's tokens.
    rejected: [] float32, the same of the rejected answer.
    ref_chosen: [] float32, the reference's sum for the chosen answer.
    ref_rejected: [] float32, the reference's sum for the rejected answer.
    chosen_length: [] float32, tokens of the chosen answer; makes the margin one
      of means over tokens (length-normalised DPO, and what IPO expects).
    rejected_length: [] float32, given exactly when `chosen_length` is.

  Returns:
    [] float32.

  Raises:
    ValueError: one length is given without the other.
  """
  if (chosen_length is None) != (rejected_length is None):
    raise ValueError('give both chosen_length and rejected_length, or neither')
  scalars = [chosen, rejected, ref_chosen, ref_rejected]
  chex.assert_rank(scalars, 0)
  chex.assert_type(scalars, jnp.float32)
  win, lose = chosen - ref_chosen, rejected - ref_rejected
  if chosen_length is None:
    return win - lose
  return win / jnp.maximum(chosen_length, 1.0) - lose / jnp.maximum(rejected_length, 1.0)


def dpo_loss(m: jax.Array, beta: float, label_smoothing: float = 0.0) -> jax.Array:
  """Sigmoid preference loss (Rafailov et al. 2023, arXiv 2305.18290, eq. 7).

  `-(1 - s) log sigmoid(beta m) - s log sigmoid(-beta m)`; `s > 0` is conservative
  DPO: a share `s` of the labels is taken to be flipped.

  Args:
    m: [] float32, from `margin`.
    beta: weight of the implicit KL to the reference, > 0.
    label_smoothing: s in [0, 0.5).

  Returns:
    [] float32.
  """
  chex.assert_rank(m, 0)
  chex.assert_type(m, jnp.float32)
  kept, flipped = jax.nn.log_sigmoid(beta * m), jax.nn.log_sigmoid(-beta * m)
  return -(1.0 - label_smoothing) * kept - label_smoothing * flipped


def ipo_loss(m: jax.Array, beta: float) -> jax.Array:
  """Squared preference loss `(m - 1 / (2 beta))^2` (Azar et al. 2023, arXiv 2310.12036, eq. 17).

  Unlike the sigmoid it stops pushing once the margin is `1 / (2 beta)`.

  Args:
    m: [] float32, from `margin`, usually length-normalised.
    beta: the paper's tau, > 0.

  Returns:
    [] float32.
  """
  chex.assert_rank(m, 0)
  chex.assert_type(m, jnp.float32)
  return (m - 1.0 / (2.0 * beta)) ** 2
