"""phi, its decomposition over steps, alpha schedules, outcome and terminal rewards."""

import doctest
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from o1jax import rewards

few = settings(max_examples=25, deadline=None)
SHARES = st.floats(0, 1)


def paths(seed):
  rng = np.random.default_rng(seed)
  lengths = rng.integers(1, 7, size=4)
  mask = (np.arange(6)[None] < lengths[:, None]).astype(np.float64)
  return rng.random(4), rng.random((4, 6)), mask, lengths


@few
@given(st.integers(0, 10**6), SHARES, SHARES)
def test_phi_is_the_papers_sum(seed, alpha, gamma):
  R, r, mask, lengths = paths(seed)
  actual = rewards.phi(R, r, mask, alpha, gamma)
  for i, m in enumerate(lengths):
    process = sum(gamma**j * r[i, j - 1] for j in range(1, m + 1)) / m
    np.testing.assert_allclose(actual[i], alpha * R[i] + (1 - alpha) * process, atol=1e-12)


@few
@given(st.integers(0, 10**6), SHARES, SHARES)
def test_step_rewards_sum_to_phi(seed, alpha, gamma):
  R, r, mask, lengths = paths(seed)
  steps = rewards.step_rewards(R, r, mask, alpha, gamma)
  np.testing.assert_allclose(steps.sum(-1), rewards.phi(R, r, mask, alpha, gamma), atol=1e-12)
  np.testing.assert_array_equal(steps[mask == 0], 0.0)
  for i, m in enumerate(lengths):
    # The outcome sits on the last step and nowhere else.
    without = rewards.step_rewards(0 * R, r, mask, alpha, gamma)
    expected = np.zeros(6)
    expected[m - 1] = alpha * R[i]
    np.testing.assert_allclose((steps - without)[i], expected, atol=1e-12)


def test_numpy_and_jax_agree_and_jit():
  R, r, mask, _ = (np.asarray(x, np.float32) for x in paths(7))
  for f in (rewards.phi, rewards.step_rewards):
    host = f(R, r, mask, 0.3, 0.9)
    device = jax.jit(f)(jnp.asarray(R), jnp.asarray(r), jnp.asarray(mask), 0.3, 0.9)
    assert isinstance(host, np.ndarray) and host.dtype == np.float32
    assert device.dtype == jnp.float32
    np.testing.assert_allclose(host, device, atol=1e-6)


def test_phi_extremes_and_a_path_without_steps():
  R, r, mask, _ = paths(1)
  np.testing.assert_array_equal(rewards.phi(R, r, mask, 1.0, 0.9), R)
  np.testing.assert_allclose(
    rewards.phi(R, r, mask, 0.0, 1.0), (r * mask).sum(-1) / mask.sum(-1), atol=1e-12
  )
  # gamma counts from j = 1: the first step too is discounted.
  one = np.ones((1, 1))
  assert rewards.phi(np.ones(1), one, one, 0.0, 0.9)[0] == 0.9
  assert rewards.phi(np.ones(1), one, 0 * one, 0.25, 0.9)[0] == 0.25
  np.testing.assert_array_equal(rewards.step_rewards(np.ones(1), one, 0 * one, 0.25, 0.9), 0.0)


def test_integer_rewards_are_refused_by_name():
  one = np.ones((2, 3))
  with pytest.raises(ValueError, match=r'^r has dtype int64'):
    rewards.phi(np.ones(2), one.astype(np.int64), one, 0.5, 0.9)
  with pytest.raises(ValueError, match='pass_rate'):
    rewards.outcome(np.array([1, 0]))


def test_alpha_schedules():
  assert [rewards.linear_alpha(t) for t in (0, 50, 90, 1000)] == [1.0, 0.5, 0.1, 0.1]
  assert rewards.linear_alpha(3, start=0.8, end=0.5, rate=0.05) == pytest.approx(0.65)
  assert rewards.linear_alpha(99, start=0.8, end=0.5, rate=0.05) == 0.5
  assert rewards.logarithmic_alpha(0) == 1.0
  assert rewards.logarithmic_alpha(math.e - 1, rate=0.3) == pytest.approx(0.7)
  assert rewards.logarithmic_alpha(10**9) == 0.1
  curve = [rewards.logarithmic_alpha(t) for t in range(80)]
  drops = -np.diff(curve)
  assert (drops > 0).all() and (np.diff(drops) < 0).all()  # falls, ever more slowly


def test_outcome():
  share = np.array([0.0, 0.5, 1.0])
  np.testing.assert_array_equal(rewards.outcome(share), [0, 0, 1])
  np.testing.assert_array_equal(rewards.outcome(share, 2.0, -1.0), [-1, -1, 2])
  np.testing.assert_array_equal(rewards.outcome(share, 2.0, -1.0, use_share=True), [0, 0.5, 2])


def test_terminal_reward():
  assert rewards.terminal_reward(True, 0.5, 0.2) == pytest.approx(0.6)
  assert rewards.terminal_reward(False, 0.0, 0.2) == 0.0
  assert rewards.terminal_reward(1, 1.0, 0.3) == pytest.approx(1.0)
  with pytest.raises(ValueError, match=r'compile_weight=1.5'):
    rewards.terminal_reward(1, 1.0, 1.5)


def test_the_docstring_is_true():
  assert doctest.testmod(rewards).failed == 0
