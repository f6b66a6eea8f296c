"""Returns, advantages and divergences, from rewards to what the policy loss reads.

A trajectory may be seen token by token ([T]) or step by step ([M]); the recursions
are the same, so `gae` and `returns_to_go` serve both and `to_tokens` /
`at_last_token` / `at_first_token` carry values between the two views.
Masks are float32, 1 where the token or step is real and the policy's own.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp


def _guard(rank: int, *arrays: jax.Array) -> None:
  chex.assert_rank(arrays, rank)
  chex.assert_equal_shape(arrays)
  chex.assert_type(arrays, jnp.float32)


def returns_to_go(rewards: jax.Array, mask: jax.Array, discount: float = 1.0) -> jax.Array:
  """Sum of the rewards from here to the end: `G_j = r_j + discount * G_{j+1}`.

  With the step rewards of `phi` leave `discount` at 1: their gamma is inside.

  Args:
    rewards: [M] float32.
    mask: [M] float32; masked places are skipped over, not counted as steps.
    discount: factor between one real place and the next.

  Returns:
    [M] float32, 0 where masked.
  """
  return gae(rewards, jnp.zeros_like(rewards), mask, discount, 1.0)


def gae(
  rewards: jax.Array,
  values: jax.Array,
  mask: jax.Array,
  discount: float,
  lam: float,
  bootstrap: jax.Array | float = 0.0,
) -> jax.Array:
  """Generalised advantage estimates (Schulman et al. 2016, arXiv 1506.02438, eq. 16).

  `delta_t = r_t + discount * V_{t+1} - V_t`, `A_t = delta_t + discount * lam * A_{t+1}`,
  where t + 1 is the next place under the mask.

  Args:
    rewards: [T] float32.
    values: [T] float32, value of the state *before* token (or step) t is taken.
    mask: [T] float32; masked places are skipped over.
    discount: between neighbouring real places.
    lam: 1 gives Monte-Carlo returns minus the baseline, 0 one-step errors.
    bootstrap: value of the state after the last place; 0 where the trajectory
      ended, the critic's estimate where it was cut off.

  Returns:
    [T] float32 advantages, 0 where masked; `advantages + values` are the critic's targets.
  """
  _guard(1, rewards, values, mask)

  def back(carry, x):
    next_value, next_advantage = carry
    reward, value, here = x
    delta = reward + discount * next_value - value
    advantage = delta + discount * lam * next_advantage
    carry = (
      jnp.where(here > 0, value, next_value),
      jnp.where(here > 0, advantage, next_advantage),
    )
    return carry, jnp.where(here > 0, advantage, 0.0)

  last = (jnp.asarray(bootstrap, jnp.float32), jnp.zeros((), jnp.float32))
  return jax.lax.scan(back, last, (rewards, values, mask), reverse=True)[1]


def group_advantages(returns: jax.Array, mask: jax.Array, normalise: bool = False) -> jax.Array:
  """Returns of G answers to one problem, relative to their mean.

  `A_i = R_i - mean(R)`, divided by `std(R)` when `normalise` (Shao et al. 2024,
  arXiv 2402.03300, eq. 3; without the division Liu et al. 2025, arXiv 2503.20783).

  Args:
    returns: [G] float32, one per trajectory.
    mask: [G] float32, 0 for rows whose verdict says nothing.
    normalise: divide by the group's population standard deviation.

  Returns:
    [G] float32, 0 where masked and, exactly, where all returns are equal.
  """
  _guard(1, returns, mask)
  return group_step_advantages(returns[:, None], mask[:, None], normalise)[:, 0]


def group_step_advantages(
  returns: jax.Array, mask: jax.Array, normalise: bool = False
) -> jax.Array:
  """Step-wise returns-to-go of G answers to one problem, relative to the group.

  `A_ij = G_ij - mean_i G_ij` over the rows that have a step j. With `normalise` every
  entry is divided by one number, the root mean square of all real `A_ij`, so that
  steps keep their sizes relative to one another.

  Args:
    returns: [G, M] float32, from `returns_to_go` of each row.
    mask: [G, M] float32, 0 where row i has no step j.
    normalise: divide by the group's deviation.

  Returns:
    [G, M] float32, 0 where masked; a step that one row alone has gets 0.
  """
  _guard(2, returns, mask)
  rows = jnp.maximum(jnp.sum(mask, axis=0, keepdims=True), 1.0)
  # Measured from one real entry so that equal returns give exactly 0: the rounding
  # of a mean, divided by a deviation as small, would pass for an advantage.
  first = jnp.take_along_axis(returns, jnp.argmax(mask, axis=0)[None, :], axis=0)
  offset = mask * (returns - first)
  centred = mask * (offset - jnp.sum(offset, axis=0, keepdims=True) / rows)
  if not normalise:
    return centred
  variance = jnp.sum(centred**2) / jnp.maximum(jnp.sum(mask), 1.0)
  return centred / (jnp.sqrt(variance) + 1e-6)


def to_tokens(steps: jax.Array, step_ids: jax.Array) -> jax.Array:
  """Give every token the value of its step.

  Args:
    steps: [M] float32.
    step_ids: [T] int32, j for the tokens of step j (1..M), 0 outside all steps.

  Returns:
    [T] float32, 0 outside all steps.
  """
  chex.assert_rank([steps, step_ids], 1)
  chex.assert_type([steps, step_ids], [jnp.float32, jnp.int32])
  return jnp.where(step_ids > 0, steps[jnp.maximum(step_ids - 1, 0)], 0.0)


def at_last_token(steps: jax.Array, step_ids: jax.Array) -> jax.Array:
  """Put the value of each step on its last token and 0 elsewhere.

  Args:
    steps: [M] float32, such as `rewards.step_rewards`.
    step_ids: [T] int32, as in `to_tokens`.

  Returns:
    [T] float32, whose sum is that of the steps that have tokens.
  """
  following = jnp.concatenate([step_ids[1:], jnp.zeros_like(step_ids[:1])])
  return jnp.where(step_ids != following, to_tokens(steps, step_ids), 0.0)


def at_first_token(tokens: jax.Array, step_ids: jax.Array, num_steps: int) -> jax.Array:
  """Read a per-token array at the first token of each step.

  On critic values this is the value of the state in which the step was chosen.

  Args:
    tokens: [T] float32.
    step_ids: [T] int32, as in `to_tokens`.
    num_steps: M.

  Returns:
    [M] float32, 0 for steps without tokens.
  """
  chex.assert_rank([tokens, step_ids], 1)
  chex.assert_type([tokens, step_ids], [jnp.float32, jnp.int32])
  before = jnp.concatenate([jnp.zeros_like(step_ids[:1]), step_ids[:-1]])
  return over_steps(jnp.where(step_ids != before, tokens, 0.0), step_ids, num_steps)


def over_steps(tokens: jax.Array, step_ids: jax.Array, num_steps: int) -> jax.Array:
  """Sum a per-token array over the tokens of each step, as for a KL paid by the step.

  Args:
    tokens: [T] float32.
    step_ids: [T] int32, as in `to_tokens`.
    num_steps: M.

  Returns:
    [M] float32, 0 for steps without tokens.
  """
  chex.assert_rank([tokens, step_ids], 1)
  chex.assert_type([tokens, step_ids], [jnp.float32, jnp.int32])
  return jax.ops.segment_sum(tokens, step_ids, num_steps + 1)[1:]


def step_gae(
  rewards: jax.Array,
  values: jax.Array,
  step_ids: jax.Array,
  mask: jax.Array,
  discount: float,
  lam: float,
) -> tuple[jax.Array, jax.Array]:
  """`gae` with a step for an action: lambda counts steps, and a step's tokens share its advantage.

  The value of step j's state is the critic's at the first token of j. With token-level
  `gae` a reward fades by lambda with every token, here with every step.

  Args:
    rewards: [M] float32, one a step.
    values: [T] float32, value of the state before each token.
    step_ids: [T] int32, as in `to_tokens`.
    mask: [M] float32, 0 where there is no such step.
    discount: between neighbouring steps.
    lam: as in `gae`.

  Returns:
    (advantages, targets), [T] float32, 0 outside all steps; the target of every token is
    the advantage of its step plus the value of that step's state.
  """
  _guard(1, rewards, mask)
  before = at_first_token(values, step_ids, len(rewards))
  advantages = gae(rewards, before, mask, discount, lam)
  targets = mask * (advantages + before)
  return to_tokens(advantages, step_ids), to_tokens(targets, step_ids)


def kl_k1(logprobs: jax.Array, ref_logprobs: jax.Array) -> jax.Array:
  """`log p - log q` on samples of p: unbiased for KL(p, q), of high variance.

  The usual choice when KL is a penalty on the reward (Schulman 2020,
  "Approximating KL Divergence", estimator k1). [...] float32 in and out.
  """
  chex.assert_type([logprobs, ref_logprobs], jnp.float32)
  return logprobs - ref_logprobs


def kl_k2(logprobs: jax.Array, ref_logprobs: jax.Array) -> jax.Array:
  """`(log p - log q)^2 / 2` (estimator k2): biased, but its gradient is the KL's."""
  return 0.5 * kl_k1(logprobs, ref_logprobs) ** 2


def kl_k3(logprobs: jax.Array, ref_logprobs: jax.Array) -> jax.Array:
  """`q/p - 1 - log(q/p)` (estimator k3): unbiased, never negative, of low variance."""
  log_ratio = -kl_k1(logprobs, ref_logprobs)
  return jnp.expm1(log_ratio) - log_ratio


def whiten(x: jax.Array, mask: jax.Array, shift_mean: bool = True) -> jax.Array:
  """Scale the real entries to mean 0 and variance 1 (population moments).

  Args:
    x: float32 of any rank, often a whole batch of advantages.
    mask: float32, same shape.
    shift_mean: False keeps the mean, as for rewards.

  Returns:
    float32, 0 where masked.
  """
  chex.assert_equal_shape([x, mask])
  chex.assert_type([x, mask], jnp.float32)
  count = jnp.maximum(jnp.sum(mask), 1.0)
  mean = jnp.sum(mask * x) / count
  variance = jnp.sum(mask * (x - mean) ** 2) / count
  whitened = (x - mean) * jax.lax.rsqrt(variance + 1e-8)
  return mask * (whitened if shift_mean else whitened + mean)
