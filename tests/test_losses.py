"""Every loss against plain float64 loops, gradients, masks, ragged rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from o1jax.losses import dpo, ppo, prm, sft

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


def logsigmoid(x):
  return -np.log1p(np.exp(-x)) if x > 0 else x - np.log1p(np.exp(x))


# --- supervised ----------------------------------------------------------------------


@few
@given(SEEDS)
def test_nll_matches_a_loop(seed):
  rng = np.random.default_rng(seed)
  logprobs, weights = -rng.exponential(size=T), ragged_mask(rng, (T,)) * rng.random(T)
  total = count = 0.0
  for lp, w in zip(logprobs, weights, strict=True):
    total -= w * lp
    count += w
  loss, n = jax.jit(sft.nll_loss)(f32(logprobs), f32(weights))
  close(loss, total)
  close(n, count)


def test_nll_and_value_gradients():
  rng = np.random.default_rng(1)
  at, old, targets = (f32(rng.normal(size=T)) for _ in range(3))
  weights = f32([1.0, 0.5] * (T // 2) + [0.0])

  def value(clip):
    return lambda x: ppo.value_loss(x, old, targets, weights, clip)[0]

  for loss in (lambda x: sft.nll_loss(x, weights)[0], value(None), value(0.3)):
    check_grads(loss, (at,), 1, ['rev'], atol=1e-2, rtol=1e-2)
    assert jax.grad(loss)(at)[-1] == 0.0


def test_nll_survives_an_impossible_token_under_weight_0():
  logprobs, weights = f32([-1.0, -jnp.inf]), f32([1.0, 0.0])
  loss, grad = jax.value_and_grad(lambda x: sft.nll_loss(x, weights)[0])(logprobs)
  assert loss == 1.0
  np.testing.assert_array_equal(grad, [-1.0, 0.0])


# --- preferences ---------------------------------------------------------------------


@few
@given(SEEDS, st.sampled_from([0.0, 0.1, 0.3]), st.sampled_from([0.05, 0.5, 3.0]))
def test_dpo_matches_its_formula(seed, smoothing, beta):
  rng = np.random.default_rng(seed)
  win, lose, ref_win, ref_lose = rng.normal(scale=5, size=4)
  long, short = rng.integers(1, 20, 2)
  plain = (win - ref_win) - (lose - ref_lose)
  by_length = (win - ref_win) / long - (lose - ref_lose) / short
  close(dpo.margin(*map(f32, (win, lose, ref_win, ref_lose))), plain, 1e-4)
  close(dpo.margin(*map(f32, (win, lose, ref_win, ref_lose, long, short))), by_length, 1e-4)
  expected = -(1 - smoothing) * logsigmoid(beta * plain) - smoothing * logsigmoid(-beta * plain)
  close(dpo.dpo_loss(f32(plain), beta, smoothing), expected, 1e-4)
  close(dpo.ipo_loss(f32(plain), beta), (plain - 1 / (2 * beta)) ** 2, 1e-4)


def test_dpo_gradients_and_where_each_loss_stops():
  for m in (-3.0, 0.2, 8.0):
    check_grads(lambda x: dpo.dpo_loss(x, 0.7, 0.1), (f32(m),), 1, ['rev'], atol=1e-2, rtol=1e-2)
    check_grads(lambda x: dpo.ipo_loss(x, 0.7), (f32(m),), 1, ['rev'], atol=1e-2, rtol=1e-2)
  assert jax.grad(dpo.dpo_loss)(f32(1.0), 0.5) < 0  # a larger margin is better ...
  assert jax.grad(dpo.ipo_loss)(f32(1.5), 0.5) > 0  # ... until IPO's target of 1 is passed
  # Smoothed DPO stops where sigmoid(beta m) = 1 - s.
  stop = np.log(0.9 / 0.1) / 0.5
  close(jax.grad(dpo.dpo_loss)(f32(stop), 0.5, 0.1), 0.0, 1e-6)


def test_dpo_refuses_half_a_length_normalisation():
  with pytest.raises(ValueError, match='both'):
    dpo.margin(*[f32(0.0)] * 4, chosen_length=f32(3.0))


# --- process rewards -----------------------------------------------------------------


@few
@given(SEEDS)
def test_prm_losses_match_loops(seed):
  rng = np.random.default_rng(seed)
  scores, lose = rng.normal(scale=3, size=(2, T))
  labels, weights = rng.random(T), ragged_mask(rng, (T,)) * rng.exponential(size=T)
  labels[:2] = [0, 1]
  point = pair = 0.0
  for s, o, v, w in zip(scores, lose, labels, weights, strict=True):
    point -= w * (v * logsigmoid(s) + (1 - v) * logsigmoid(-s))
    pair -= w * logsigmoid(s - o)
  loss, count = prm.pointwise_loss(f32(scores), f32(labels), f32(weights))
  close(loss, point)
  close(count, weights.sum())
  loss, count = prm.pairwise_loss(f32(scores), f32(lose), f32(weights))
  close(loss, pair)
  close(count, weights.sum())


def test_prm_gradients():
  rng = np.random.default_rng(0)
  scores, lose = f32(rng.normal(size=T)), f32(rng.normal(size=T))
  labels, weights = f32(rng.random(T)), f32([1.0] * (T - 2) + [0.0] * 2)

  def point(s):
    return prm.pointwise_loss(s, labels, weights)[0]

  def pair(s, o):
    return prm.pairwise_loss(s, o, weights)[0]

  check_grads(point, (scores,), 1, ['rev'], atol=1e-2, rtol=1e-2)
  check_grads(pair, (scores, lose), 1, ['rev'], atol=1e-2, rtol=1e-2)
  # The point-wise gradient is w (sigmoid(score) - label), and exactly 0 on padding.
  close(jax.grad(point)(scores), weights * (jax.nn.sigmoid(scores) - labels), 1e-6)
  np.testing.assert_array_equal(jax.grad(point)(scores)[-2:], 0.0)
  np.testing.assert_array_equal(jax.grad(pair)(scores, lose)[-2:], 0.0)


def test_prm_stays_finite_where_the_sigmoid_saturates():
  loss, _ = prm.pointwise_loss(f32([200.0]), f32([0.0]), f32([1.0]))
  assert loss == 200.0


# --- PPO -----------------------------------------------------------------------------


def rollout(rng):
  old = -rng.exponential(size=T)
  new = old + rng.normal(scale=0.4, size=T)
  return new, old, rng.normal(size=T), ragged_mask(rng, (T,))


@few
@given(SEEDS, st.sampled_from([1.0, 0.1, 0.0]))
def test_policy_loss_matches_a_loop(seed, scale):
  new, old, advantages, mask = rollout(np.random.default_rng(seed))
  total = clipped = 0.0
  for n, o, a, m in zip(new, old, advantages, mask, strict=True):
    ratio, scaled = np.exp(n - o), a if a > 0 else scale * a
    total -= m * min(ratio * scaled, np.clip(ratio, 0.8, 1.3) * scaled)
    clipped += m * ((a > 0 and ratio > 1.3) or (a < 0 and ratio < 0.8))
  arrays = [f32(x) for x in (new, old, advantages, mask)]
  loss, count = ppo.policy_loss(*arrays, 0.2, 0.3, scale)
  close(loss, total)
  close(count, mask.sum())
  close(ppo.clip_fraction(*arrays, 0.2, 0.3)[0], clipped)


@few
@given(SEEDS)
def test_value_loss_matches_a_loop(seed):
  values, old, targets, mask = rollout(np.random.default_rng(seed))
  total = plain = 0.0
  for v, o, g, m in zip(values, old, targets, mask, strict=True):
    near = o + np.clip(v - o, -0.2, 0.2)
    total += 0.5 * m * max((v - g) ** 2, (near - g) ** 2)
    plain += 0.5 * m * (v - g) ** 2
  arrays = [f32(x) for x in (values, old, targets, mask)]
  close(ppo.value_loss(*arrays, 0.2)[0], total)
  close(ppo.value_loss(*arrays, None)[0], plain)


@few
@given(SEEDS)
def test_importance_weights_are_truncated_and_carry_no_gradient(seed):
  new, old, advantages, mask = rollout(np.random.default_rng(seed))
  behaviour = old - np.random.default_rng(seed + 1).normal(scale=1.5, size=T)
  expected = mask * np.minimum(np.exp(old - behaviour), 2.0)
  weights = ppo.importance_weights(f32(old), f32(behaviour), f32(mask), cap=2.0)
  close(weights, expected)

  def through(o):
    return ppo.importance_weights(o, f32(behaviour), f32(mask), cap=2.0).sum()

  np.testing.assert_array_equal(jax.grad(through)(f32(old)), 0.0)
  # Weighted advantages are the weighted loss.
  total = 0.0
  for n, o, a, w, m in zip(new, old, advantages, expected, mask, strict=True):
    ratio = np.exp(n - o)
    total -= m * w * min(ratio * a, np.clip(ratio, 0.8, 1.2) * a)
  loss, _ = ppo.policy_loss(f32(new), f32(old), f32(advantages) * weights, f32(mask))
  close(loss, total)


def test_policy_gradient_masks_clips_and_signs():
  rng = np.random.default_rng(5)
  old = f32(-rng.exponential(size=6))
  new = old + f32([0.0, 0.5, -0.5, 0.1, 0.0, 0.0])
  advantages = f32([1.0, 1.0, -1.0, -2.0, 5.0, 5.0])
  mask = f32([1, 1, 1, 1, 0, 0])

  def loss(x):
    return ppo.policy_loss(x, old, advantages, mask, negative_scale=0.1)[0]

  check_grads(loss, (new,), 1, ['rev'], atol=1e-2, rtol=1e-2)
  grad = jax.grad(loss)(new)
  close(grad[0], -1.0)  # on-policy: minus the advantage
  np.testing.assert_array_equal(grad[1:3], 0.0)  # clipped on either side
  close(grad[3], 0.1 * 2.0 * np.exp(0.1))  # a scaled negative pushes down
  np.testing.assert_array_equal(grad[4:], 0.0)  # masked

  def whole(o, a):
    return ppo.policy_loss(new, o, a, mask)[0]

  for g in jax.grad(whole, (0, 1))(old, advantages):
    np.testing.assert_array_equal(g, 0.0)


def test_masked_infinities_reach_no_gradient():
  new, old = f32([-1.0, -jnp.inf]), f32([-1.0, -3.0])
  mask, advantages = f32([1.0, 0.0]), f32([1.0, 1.0])
  for first, second in ((new, old), (old, new)):
    grad = jax.grad(lambda x, o=second: ppo.policy_loss(x, o, advantages, mask)[0])(first)
    assert jnp.isfinite(grad).all()


def test_entropy():
  logits = f32(np.random.default_rng(2).normal(size=(3, 7)))
  p = np.exp(np.asarray(logits, np.float64))
  p /= p.sum(-1, keepdims=True)
  close(ppo.entropy(logits), -(p * np.log(p)).sum(-1))
  close(ppo.entropy(f32([[0.0, 0.0, -jnp.inf]])), [np.log(2)])
  check_grads(lambda x: ppo.entropy(x).sum(), (logits,), 1, ['rev'], atol=1e-2, rtol=1e-2)


# --- what holds for all --------------------------------------------------------------

x, ints = jnp.ones(4), jnp.ones(4, jnp.int32)


@pytest.mark.parametrize(
  'call',
  [
    lambda: sft.nll_loss(x, ints),
    lambda: prm.pointwise_loss(x, ints, x),
    lambda: prm.pairwise_loss(x, x[:3], x),
    lambda: dpo.dpo_loss(jnp.ones((), jnp.int32), 0.1),
    lambda: dpo.margin(x, x, x, x),
    lambda: ppo.policy_loss(x, x, ints, x),
    lambda: ppo.policy_loss(x[None], x[None], x[None], x[None]),
    lambda: ppo.value_loss(x, x, ints, x),
    lambda: ppo.entropy(ints),
  ],
)
def test_wrong_dtypes_and_ranks_are_refused(call):
  with pytest.raises(AssertionError):
    call()


BY_ROW = (  # a vmapped function and which of `rollout`'s arrays it takes
  (jax.jit(jax.vmap(ppo.policy_loss)), (0, 1, 2, 3)),
  (jax.jit(jax.vmap(sft.nll_loss)), (0, 3)),
)


@few
@given(SEEDS)
def test_vmapped_rows_are_independent_of_their_order(seed):
  rng = np.random.default_rng(seed)
  rows = [np.stack(x) for x in zip(*(rollout(rng) for _ in range(6)), strict=True)]
  order = rng.permutation(6)
  arrays = [f32(a) for a in rows]
  moved = [a[order] for a in arrays]
  for f, pick in BY_ROW:
    one, other = f(*(arrays[i] for i in pick)), f(*(moved[i] for i in pick))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[order], b), one, other)
