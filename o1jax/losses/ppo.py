"""Proximal policy optimisation of one trajectory, token by token.

Departure from the paper: `negative_scale` multiplies negative advantages. On small
models full-size negatives destroy more than they teach, because lowering one token
raises all the others; 0.1 kept the direction and lost the damage.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp


def _guard(*arrays: jax.Array) -> None:
  chex.assert_rank(arrays, 1)
  chex.assert_equal_shape(arrays)
  chex.assert_type(arrays, jnp.float32)


def _log_ratio(logprobs: jax.Array, old_logprobs: jax.Array, mask: jax.Array) -> jax.Array:
  """`log pi - log pi_old`, 0 where masked, so that no masked infinity reaches a gradient."""
  return jnp.where(mask > 0, logprobs - old_logprobs, 0.0)


def policy_loss(
  logprobs: jax.Array,
  old_logprobs: jax.Array,
  advantages: jax.Array,
  mask: jax.Array,
  clip_low: float = 0.2,
  clip_high: float = 0.2,
  negative_scale: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
  """Clipped surrogate (Schulman et al. 2017, arXiv 1707.06347, eq. 7), to be minimised.

  `-sum_t m_t min(rho_t A_t, clip(rho_t, 1 - low, 1 + high) A_t)`,
  `rho_t = pi(x_t) / pi_old(x_t)`. No gradient reaches `old_logprobs` or `advantages`.

  Args:
    logprobs: [T] float32, of the policy in training.
    old_logprobs: [T] float32, of the policy the ratio is kept close to.
    advantages: [T] float32.
    mask: [T] float32, 1 on the policy's own tokens.
    clip_low: how far below 1 the ratio may fall, in (0, 1).
    clip_high: how far above 1 it may rise; larger than `clip_low` lets rare tokens grow.
    negative_scale: factor on negative advantages, in [0, 1].

  Returns:
    (sum, count), float32 scalars, count = sum of the mask.
  """
  _guard(logprobs, old_logprobs, advantages, mask)
  advantages = jax.lax.stop_gradient(advantages)
  advantages = jnp.where(advantages < 0, negative_scale * advantages, advantages)
  ratio = jnp.exp(_log_ratio(logprobs, jax.lax.stop_gradient(old_logprobs), mask))
  clipped = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
  return -jnp.sum(mask * jnp.minimum(ratio * advantages, clipped * advantages)), jnp.sum(mask)


def clip_fraction(
  logprobs: jax.Array,
  old_logprobs: jax.Array,
  advantages: jax.Array,
  mask: jax.Array,
  clip_low: float = 0.2,
  clip_high: float = 0.2,
) -> tuple[jax.Array, jax.Array]:
  """(sum, count) of the tokens whose gradient the clip of `policy_loss` removes."""
  _guard(logprobs, old_logprobs, advantages, mask)
  ratio = jnp.exp(_log_ratio(logprobs, old_logprobs, mask))
  above = (advantages > 0) & (ratio > 1.0 + clip_high)
  below = (advantages < 0) & (ratio < 1.0 - clip_low)
  return jnp.sum(mask * (above | below)), jnp.sum(mask)


def importance_weights(
  old_logprobs: jax.Array, behaviour_logprobs: jax.Array, mask: jax.Array, cap: float
) -> jax.Array:
  """Truncated weights `min(pi_old / pi_behaviour, cap)` for stale rollouts.

  Multiply the advantages by them when the policy the ratio is kept close to is not
  the one that sampled (decoupled PPO, Hilton et al. 2022, arXiv 2110.00641; truncation
  as in V-trace, Espeholt et al. 2018, arXiv 1802.01561). `policy_loss` is linear in the
  size of its advantages, so that is the same as weighting the loss.

  Args:
    old_logprobs: [T] float32, of the policy at the start of the update.
    behaviour_logprobs: [T] float32, recorded by the sampler.
    mask: [T] float32.
    cap: largest weight, >= 1.

  Returns:
    [T] float32 without gradient, 0 where masked.
  """
  _guard(old_logprobs, behaviour_logprobs, mask)
  log_ratio = _log_ratio(old_logprobs, behaviour_logprobs, mask)
  return jax.lax.stop_gradient(mask * jnp.minimum(jnp.exp(log_ratio), cap))


def value_loss(
  values: jax.Array,
  old_values: jax.Array,
  returns: jax.Array,
  mask: jax.Array,
  clip: float | None = 0.2,
) -> tuple[jax.Array, jax.Array]:
  """Critic's squared error, clipped around its value before the update.

  `sum_t m_t max((V - G)^2, (V_old + clip(V - V_old, -c, c) - G)^2) / 2`, as in
  the PPO of openai/baselines; `clip=None` leaves the plain squared error.

  Args:
    values: [T] float32, of the critic in training.
    old_values: [T] float32, of the critic that made the advantages.
    returns: [T] float32, targets `advantages + old_values`.
    mask: [T] float32.
    clip: c, in the unit of the returns.

  Returns:
    (sum, count), float32 scalars.
  """
  _guard(values, old_values, returns, mask)
  old_values, returns = jax.lax.stop_gradient((old_values, returns))
  error = (values - returns) ** 2
  if clip is not None:
    near = old_values + jnp.clip(values - old_values, -clip, clip)
    error = jnp.maximum(error, (near - returns) ** 2)
  return 0.5 * jnp.sum(mask * error), jnp.sum(mask)


def entropy(logits: jax.Array) -> jax.Array:
  """Entropy in nats of the distribution `softmax(logits)`: [..., V] float32 -> [...]."""
  chex.assert_type(logits, jnp.float32)
  logprobs = jax.nn.log_softmax(logits)
  # A token of probability 0 adds nothing; 0 * -inf would be nan.
  return -jnp.sum(jnp.exp(logprobs) * jnp.where(logprobs > -jnp.inf, logprobs, 0.0), axis=-1)
