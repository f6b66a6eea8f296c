"""Returns, advantages, divergences against plain float64 loops on ragged rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from o1jax.losses import returns

# Eager scans compile anew at each call; these keep what they compiled.
gae = jax.jit(returns.gae)
step_gae = jax.jit(returns.step_gae)
returns_to_go = jax.jit(returns.returns_to_go)
group_advantages = jax.jit(returns.group_advantages, static_argnums=2)
each_gae = jax.jit(jax.vmap(functools.partial(returns.gae, discount=0.9, lam=0.8)))
group_step_advantages = jax.jit(returns.group_step_advantages, static_argnums=2)
SEEDS = st.integers(0, 10**6)
few = settings(max_examples=20, deadline=None)
T = 9


def f32(x):
  return jnp.asarray(x, jnp.float32)


def ragged_mask(rng, shape):
  """Ones in a random window of each row, possibly with a hole or empty."""
  mask = np.zeros(shape)
  for row in mask.reshape(-1, shape[-1]):
    start, stop = sorted(rng.integers(0, shape[-1] + 1, 2))
    row[start:stop] = 1
    if rng.random() < 0.3:
      row[rng.integers(shape[-1])] = 0
  return mask


def close(actual, expected, tol=2e-5):
  np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=tol, atol=tol)


def loop_gae(rewards, values, mask, discount, lam, bootstrap):
  """Straight from the definition: the real places alone, sums of discounted errors."""
  places = [t for t in range(len(mask)) if mask[t]]
  out = np.zeros(len(mask))
  for i, t in enumerate(places):
    for k, u in enumerate(places[i:]):
      following = values[places[i + k + 1]] if i + k + 1 < len(places) else bootstrap
      out[t] += (discount * lam) ** k * (rewards[u] + discount * following - values[u])
  return out


@few
@given(SEEDS, st.sampled_from([1.0, 0.9]), st.sampled_from([0.0, 0.7, 1.0]))
def test_gae_and_returns_match_the_definition(seed, discount, lam):
  rng = np.random.default_rng(seed)
  rewards, values, mask = rng.normal(size=T), rng.normal(size=T), ragged_mask(rng, (T,))
  bootstrap = rng.normal()
  expected = loop_gae(rewards, values, mask, discount, lam, bootstrap)
  close(gae(f32(rewards), f32(values), f32(mask), discount, lam, bootstrap), expected)
  expected = loop_gae(rewards, np.zeros(T), mask, discount, 1.0, 0.0)
  close(returns_to_go(f32(rewards), f32(mask), discount), expected)


@few
@given(SEEDS)
def test_gae_with_lambda_1_plus_values_is_the_return(seed):
  rng = np.random.default_rng(seed)
  rewards, values = f32(rng.normal(size=T)), f32(rng.normal(size=T))
  mask = f32(np.ones(T))
  advantages = gae(rewards, values, mask, 0.9, 1.0)
  close(advantages + values, returns_to_go(rewards, mask, 0.9))


@few
@given(SEEDS, st.booleans())
def test_group_advantages_match_a_loop(seed, normalise):
  rng = np.random.default_rng(seed)
  values, mask = rng.normal(size=(5, 4)), np.zeros((5, 4))
  for row in mask:
    row[: rng.integers(0, 5)] = 1  # row i has its first m_i steps
  expected = np.zeros_like(values)
  for j in range(4):
    rows = [i for i in range(5) if mask[i, j]]
    for i in rows:
      expected[i, j] = values[i, j] - np.mean([values[k, j] for k in rows])
  if normalise and mask.any():
    expected /= np.sqrt(np.mean([expected[i, j] ** 2 for i, j in np.argwhere(mask)])) + 1e-6
  close(group_step_advantages(f32(values), f32(mask), normalise), expected, 1e-4)

  scalar = values[:, 0]
  kept = [scalar[i] for i in range(5) if mask[i, 0]] or [0.0]
  expected = mask[:, 0] * (scalar - np.mean(kept))
  if normalise:
    expected = expected / (np.std(kept) + 1e-6)
  close(group_advantages(f32(scalar), f32(mask[:, 0]), normalise), expected, 1e-4)


def test_equal_returns_give_exactly_no_advantage():
  seven = f32(np.full(7, 0.1))  # their mean in float32 is not 0.1
  advantages = group_advantages(seven, jnp.ones(7), normalise=True)
  np.testing.assert_array_equal(advantages, 0.0)


def test_steps_to_tokens_and_back():
  step_ids = jnp.asarray([0, 0, 1, 1, 2, 3, 3, 3, 0], jnp.int32)
  steps = f32([5.0, 7.0, 9.0, 11.0])  # step 4 has no tokens
  np.testing.assert_array_equal(returns.to_tokens(steps, step_ids), [0, 0, 5, 5, 7, 9, 9, 9, 0])
  np.testing.assert_array_equal(returns.at_last_token(steps, step_ids), [0, 0, 0, 5, 7, 0, 0, 9, 0])
  full = jnp.asarray([0, 1, 1, 2, 2], jnp.int32)  # no padding behind the last step
  np.testing.assert_array_equal(returns.at_last_token(steps, full), [0, 0, 5, 0, 7])
  tokens = f32(np.arange(9))
  np.testing.assert_array_equal(returns.at_first_token(tokens, step_ids, 4), [2, 4, 5, 0])


def test_step_gae_is_token_gae_when_each_step_is_one_token():
  rng = np.random.default_rng(3)
  step_ids = jnp.asarray([0, 0, 1, 2, 3, 4, 0], jnp.int32)
  rewards, values = f32(rng.normal(size=4)), f32(rng.normal(size=7))
  mask = (step_ids > 0).astype(jnp.float32)
  tokens = gae(returns.at_last_token(rewards, step_ids), values, mask, 0.9, 0.8)
  before = returns.at_first_token(values, step_ids, 4)
  steps = gae(rewards, before, jnp.ones(4), 0.9, 0.8)
  close(returns.to_tokens(steps, step_ids), tokens, 1e-6)


def ragged_steps(rng, steps=4):
  """Step ids of a prompt, some steps of ragged length and padding; the mask of the steps."""
  lengths = rng.integers(1, 4, rng.integers(1, steps + 1))
  ids = [0] * rng.integers(0, 3) + [j for j, n in enumerate(lengths, 1) for _ in range(n)]
  ids += [0] * (16 - len(ids))
  return np.array(ids, np.int32), (np.arange(steps) < len(lengths)).astype(np.float64)


@few
@given(SEEDS, st.sampled_from([1.0, 0.9]), st.sampled_from([0.0, 0.7, 1.0]))
def test_step_gae_matches_the_definition_on_ragged_steps(seed, discount, lam):
  rng = np.random.default_rng(seed)
  step_ids, mask = ragged_steps(rng)
  rewards, values = rng.normal(size=4), rng.normal(size=16)
  before = np.zeros(4)
  for j in range(1, int(mask.sum()) + 1):
    before[j - 1] = values[np.flatnonzero(step_ids == j)[0]]
  expected = loop_gae(rewards, before, mask, discount, lam, 0.0)
  advantages, targets = step_gae(f32(rewards), f32(values), step_ids, f32(mask), discount, lam)
  for t, j in enumerate(step_ids):
    close(advantages[t], expected[j - 1] if j else 0.0)
    close(targets[t], expected[j - 1] + before[j - 1] if j else 0.0)


@few
@given(SEEDS)
def test_sums_over_steps_match_a_loop(seed):
  rng = np.random.default_rng(seed)
  step_ids, _ = ragged_steps(rng)
  tokens = rng.normal(size=16)
  expected = [tokens[step_ids == j].sum() for j in range(1, 5)]
  close(returns.over_steps(f32(tokens), jnp.asarray(step_ids), 4), expected)


def test_gradients_are_those_of_finite_differences():
  rng = np.random.default_rng(7)
  a, b = f32(rng.normal(size=T)), f32(rng.normal(size=T))
  mask = f32([1, 1, 0, 1, 1, 1, 1, 0, 0])
  step_ids = jnp.asarray([0, 1, 1, 2, 2, 2, 3, 0, 0], jnp.int32)
  estimators = {
    'gae': lambda r, v: returns.gae(r, v, mask, 0.9, 0.8),
    'returns_to_go': lambda r, v: returns.returns_to_go(r + v, mask, 0.9),
    'step_gae': lambda r, v: returns.step_gae(r[:3], v, step_ids, jnp.ones(3), 0.9, 0.8)[0],
    'over_steps': lambda r, v: returns.over_steps(r * v, step_ids, 3),
    'group': lambda r, v: returns.group_advantages(r + v, mask, True),
    'whiten': lambda r, v: returns.whiten(r * v, mask),
    'k1': returns.kl_k1,
    'k2': returns.kl_k2,
    'k3': returns.kl_k3,
  }
  for name, f in estimators.items():
    weights = f32(rng.normal(size=f(a, b).shape))
    total = jax.jit(lambda r, v, f=f, w=weights: jnp.sum(w * f(r, v)))
    check_grads(total, (a, b), 1, ['rev'], atol=1e-2, rtol=1e-2)
    if name in ('gae', 'returns_to_go', 'group', 'whiten'):  # masked places reach nothing
      for g in jax.grad(total, (0, 1))(a, b):
        np.testing.assert_array_equal(g[mask == 0], 0.0)


def test_kl_estimators_estimate_the_kl():
  logits_p, logits_q = np.random.default_rng(1).normal(size=(2, 6))
  p, q = (np.exp(x) / np.exp(x).sum() for x in (logits_p, logits_q))
  log_p, log_q = f32(np.log(p)), f32(np.log(q))
  true = float(np.sum(p * np.log(p / q)))
  close(np.sum(p * np.asarray(returns.kl_k1(log_p, log_q))), true)
  close(np.sum(p * np.asarray(returns.kl_k3(log_p, log_q))), true)
  assert (returns.kl_k3(log_p, log_q) >= 0).all()
  close(returns.kl_k2(log_p, log_q), 0.5 * np.log(p / q) ** 2)

  # k2's expected gradient is the KL's own; k1's is zero.
  def expected_gradient(kl):
    def per_token(x):
      return kl(jax.nn.log_softmax(x), log_q)

    return p @ np.asarray(jax.jacobian(per_token)(f32(logits_p)), np.float64)

  def kl_of(x):
    return jnp.sum(jax.nn.softmax(x) * (jax.nn.log_softmax(x) - log_q))

  close(expected_gradient(returns.kl_k2), jax.grad(kl_of)(f32(logits_p)))
  close(expected_gradient(returns.kl_k1), np.zeros(6))


@few
@given(SEEDS)
def test_whitening_uses_the_real_entries_only(seed):
  rng = np.random.default_rng(seed)
  x, mask = rng.normal(3, 5, size=(4, T)), ragged_mask(rng, (4, T))
  kept = x[mask > 0] if mask.sum() > 1 else None
  white = np.asarray(returns.whiten(f32(x), f32(mask)))
  np.testing.assert_array_equal(white[mask == 0], 0.0)
  if kept is not None:
    close(white[mask > 0], (kept - kept.mean()) / np.sqrt(kept.var() + 1e-8), 1e-4)
    kept_mean = np.asarray(returns.whiten(f32(x), f32(mask), shift_mean=False))[mask > 0]
    close(kept_mean.mean(), kept.mean(), 1e-3)


x, ints = jnp.ones(4), jnp.ones(4, jnp.int32)


@pytest.mark.parametrize(
  'call',
  [
    lambda: returns.gae(ints, x, x, 1.0, 1.0),
    lambda: returns.gae(x, x[:2], x, 1.0, 1.0),
    lambda: returns.returns_to_go(ints, x),
    lambda: returns.step_gae(ints, x, ints, x, 1.0, 1.0),
    lambda: returns.step_gae(x, x, x, x, 1.0, 1.0),
    lambda: returns.over_steps(ints, ints, 2),
    lambda: returns.group_advantages(ints, x),
    lambda: returns.group_step_advantages(x, x),
    lambda: returns.to_tokens(ints, ints),
    lambda: returns.whiten(ints, x),
    lambda: returns.kl_k3(ints, x),
  ],
)
def test_wrong_dtypes_and_ranks_are_refused(call):
  with pytest.raises(AssertionError):
    call()


@few
@given(SEEDS)
def test_vmapped_rows_are_independent_of_their_order(seed):
  rng = np.random.default_rng(seed)
  arrays = [f32(rng.normal(size=(6, T))) for _ in range(2)] + [f32(ragged_mask(rng, (6, T)))]
  order = rng.permutation(6)
  one, other = each_gae(*arrays), each_gae(*(a[order] for a in arrays))
  np.testing.assert_array_equal(one[order], other)
