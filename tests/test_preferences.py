"""Rollouts as preference pairs and as PPO's batch: whom they compare, what they pay."""

import dataclasses
import itertools
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from o1jax import config as config_lib
from o1jax import rewards
from o1jax.config import RlConfig
from o1jax.data import preferences
from o1jax.data.preferences import Preference
from o1jax.losses import returns
from o1jax.stages import fit, pairs, rollouts

SEEDS = st.integers(0, 10**6)
few = settings(max_examples=30, deadline=None)
ROOT = pathlib.Path(__file__).parent.parent
GROUP, ROWS, STEPS, TOKENS = 4, 8, 3, 14


def config(**changes):
  return RlConfig(problems=2, group=GROUP, minibatch=ROWS, gamma=0.9, **changes)


def sampled(seed=0):
  """Two groups of ragged paths over few distinct steps, so that some share prefixes."""
  rng = np.random.default_rng(seed)
  paths, step_ids = [], np.zeros((ROWS, TOKENS), np.int32)
  for row in range(ROWS):
    path = tuple(int(x) for x in rng.integers(0, 2, rng.integers(1, STEPS + 1)))
    ids = [j for j, step in enumerate(path, 1) for _ in range(1 + step)]
    step_ids[row, 2 : 2 + len(ids)] = ids  # behind a prompt of two tokens
    paths.append(path)
  generated, lengths = step_ids > 0, np.array([len(p) for p in paths])
  mask = (np.arange(STEPS) < lengths[:, None]).astype(np.float32)
  return rollouts.Rollouts(
    problems=[],
    paths=paths,
    outcome=rng.integers(0, 2, ROWS).astype(np.float32),
    valid=np.array([1, 1, 1, 0] * 2, np.float32),
    process=(mask * rng.random((ROWS, STEPS))).astype(np.float32),
    mask=mask,
    tokens=rng.integers(1, 9, (ROWS, TOKENS)).astype(np.int32),
    generated=generated,
    logprobs=(-1.0 * generated * rng.exponential(size=generated.shape)).astype(np.float32),
    step_ids=step_ids,
    sampled_tokens=int(generated.sum()),
    version=3,
  )


def made(settings, drawn, **changes):
  zeros = np.zeros(drawn.tokens.shape, np.float32)
  args = {'ref_logprobs': zeros, 'values': None} | changes
  return rollouts.rollout_batch(settings, drawn, 0.5, **args)


def random_floats(seed, drawn):
  noise = np.random.default_rng(seed).normal(-1, 0.5, drawn.tokens.shape)
  return (noise * drawn.generated).astype(np.float32)


# --- pairs ---------------------------------------------------------------------------


def test_paths_are_paired_best_against_worst():
  worth = np.array([0.1, 0.9, 0.5, 0.4, 1.0, 1.0, 1.0, 1.0])
  outcome = np.array([0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0])
  assert preferences.of_paths(worth, outcome, 4) == [Preference(1, 0), Preference(2, 3)]


@few
@given(SEEDS, st.sampled_from([0.0, 0.2]))
def test_siblings_are_those_of_the_definition(seed, margin):
  drawn, rng = sampled(seed), np.random.default_rng(seed)
  worth = rng.random(ROWS)
  found = preferences.of_siblings(drawn.paths, worth, drawn.valid, GROUP, margin)
  expected = set()
  for start, depth in itertools.product((0, GROUP), range(1, STEPS + 1)):
    rows = [r for r in range(start, start + GROUP) if drawn.valid[r]]
    rows = [r for r in rows if len(drawn.paths[r]) >= depth]
    for a, b in itertools.permutations({drawn.paths[r][:depth] for r in rows}, 2):
      through = [[r for r in rows if drawn.paths[r][:depth] == x] for x in (a, b)]
      gap = np.mean(worth[through[0]]) - np.mean(worth[through[1]])
      if a[:-1] == b[:-1] and gap > margin:
        expected.add(Preference(min(through[0]), min(through[1]), depth))
  assert set(found) == expected and len(found) == len(expected)


@pytest.mark.parametrize('kind', ['paths', 'siblings', 'both'])
def test_a_pair_batch_asks_for_the_tokens_it_compares(kind):
  drawn, limit = sampled(4), 6
  settings = config(algorithm='dpo', pairs=kind, pair_margin=0.0)
  chosen = pairs.choose(settings, drawn, 0.5)
  assert {p.step > 0 for p in chosen} == {'paths': {False}, 'siblings': {True}}.get(
    kind, {False, True}
  )
  batch = pairs.pair_batch(settings, drawn, 0.5, lambda side: 0.5 * side.loss_mask, limit)
  assert batch.ref_chosen.dtype == np.float32
  for i in range(limit):
    for side, name in ((batch.chosen, 'chosen'), (batch.rejected, 'rejected')):
      if i >= len(chosen):
        assert side.loss_mask[i].sum() == 0
        continue
      row, step = getattr(chosen[i], name), chosen[i].step
      asked = drawn.generated[row] if step == 0 else drawn.step_ids[row] == step
      np.testing.assert_array_equal(side.loss_mask[i], asked)
      np.testing.assert_array_equal(side.tokens[i], drawn.tokens[row])
      assert getattr(batch, f'ref_{name}')[i] == 0.5 * asked.sum()


# --- PPO's batch ---------------------------------------------------------------------


def step_rewards(drawn):
  return rewards.step_rewards(drawn.outcome, drawn.process, drawn.mask, 0.5, 0.9)


def test_the_default_is_relative_to_the_group_by_step():
  drawn, batch = sampled(1), made(config(), sampled(1))
  real = drawn.mask * drawn.valid[:, None]
  togo = np.cumsum((step_rewards(drawn) * real)[:, ::-1], axis=1)[:, ::-1]
  for b, t in np.ndindex(batch.advantages.shape):
    j = drawn.step_ids[b, t] - 1
    expected = 0.0
    if j >= 0 and drawn.valid[b]:
      rows = [r for r in range(b // GROUP * GROUP, b // GROUP * GROUP + GROUP) if real[r, j]]
      expected = togo[b, j] - np.mean(togo[rows, j])
    np.testing.assert_allclose(batch.advantages[b, t], expected, atol=1e-6)
  np.testing.assert_array_equal(batch.returns, batch.advantages)
  assert (batch.version == 3).all()
  divided = made(config(normalise=True), drawn).advantages
  for group in (range(GROUP), range(GROUP, ROWS)):
    where = [
      (b, int(np.argmax(drawn.step_ids[b] == j + 1)))
      for b in group
      for j in range(STEPS)
      if real[b, j]
    ]
    size = np.sqrt(np.mean([batch.advantages[place] ** 2 for place in where]))
    for place in where:
      np.testing.assert_allclose(divided[place] * size, batch.advantages[place], atol=1e-4)


def test_ppo_counts_lambda_by_token_or_by_step():
  drawn, settings = sampled(2), config(algorithm='ppo', gae_lambda=0.8)
  values = random_floats(5, drawn)
  by_token = made(settings, drawn, values=values)
  by_step = made(config(algorithm='ppo', gae_lambda=0.8, gae='step'), drawn, values=values)
  for b in range(ROWS):
    rewarded = returns.at_last_token(step_rewards(drawn)[b], jnp.asarray(drawn.step_ids[b]))
    mask = by_token.mask[b]
    v = jnp.asarray(values[b] * mask)
    expected = returns.gae(rewarded, v, jnp.asarray(mask), 1.0, 0.8)
    np.testing.assert_allclose(by_token.advantages[b], expected, atol=1e-6)
    steps = drawn.mask[b] * drawn.valid[b]
    args = (step_rewards(drawn)[b], v, jnp.asarray(drawn.step_ids[b]), jnp.asarray(steps))
    advantages, targets = returns.step_gae(*args, 1.0, 0.8)
    np.testing.assert_allclose(by_step.advantages[b], advantages * mask, atol=1e-6)
    np.testing.assert_allclose(by_step.returns[b], targets * mask, atol=1e-6)


@pytest.mark.parametrize('estimator', ['k1', 'k2', 'k3'])
def test_a_kl_in_the_reward_is_taken_off_what_follows(estimator):
  drawn = sampled(3)
  ref = random_floats(6, drawn)
  kl = np.asarray(rollouts.KL[estimator](jnp.asarray(drawn.logprobs), jnp.asarray(ref)))
  changes = {'kl_coef': 0.2, 'kl_in': 'reward', 'kl_estimator': estimator}
  values = np.zeros_like(ref)
  settings = config(algorithm='ppo', gae_lambda=1.0, **changes)
  paid = made(settings, drawn, ref_logprobs=ref, values=values)
  free = made(config(algorithm='ppo', gae_lambda=1.0), drawn, ref_logprobs=ref, values=values)
  togo = np.cumsum((0.2 * kl * paid.mask)[:, ::-1], axis=1)[:, ::-1]
  np.testing.assert_allclose(free.advantages - paid.advantages, togo * paid.mask, atol=1e-5)
  # Relative to the group, a step pays for all of its tokens.
  grouped = made(config(**changes), drawn, ref_logprobs=ref)
  by_step = np.stack([(kl * (drawn.step_ids == j)).sum(1) for j in range(1, STEPS + 1)], axis=1)
  expected = rollouts._advantages(
    config(), drawn, step_rewards(drawn) - 0.2 * by_step, 0 * ref, grouped.mask, None
  )[0]
  np.testing.assert_allclose(grouped.advantages, expected * grouped.mask, atol=1e-5)


def test_whitened_advantages_have_mean_0_and_variance_1():
  batch = made(config(whiten=True), sampled(1))
  kept = batch.advantages[batch.mask > 0]
  np.testing.assert_allclose((kept.mean(), kept.std()), (0.0, 1.0), atol=1e-4)


def test_stale_rollouts_are_weighed_and_the_ratio_starts_at_the_present_policy():
  drawn, settings = sampled(1), config(importance_cap=1.5)
  now, plain = random_floats(7, drawn), made(config(), drawn)
  batch = made(settings, drawn, now_logprobs=now)
  np.testing.assert_array_equal(batch.old_logprobs, now * plain.mask)
  weights = np.minimum(np.exp(now - drawn.logprobs), 1.5)
  np.testing.assert_allclose(batch.advantages, plain.advantages * weights, rtol=1e-5, atol=1e-7)
  fresh = made(settings, drawn, now_logprobs=drawn.logprobs)
  np.testing.assert_allclose(fresh.advantages, plain.advantages, rtol=1e-6)


def test_everything_that_is_paid_is_float32():
  drawn = sampled(1)
  with pytest.raises(AssertionError, match='float32'):
    made(config(), dataclasses.replace(drawn, outcome=drawn.outcome.astype(np.float64)))


@pytest.mark.parametrize(
  'overrides, message',
  [
    (['preference=0', 'nll=0'], 'nothing to learn'),
    (['ipo=true', 'label_smoothing=0.1'], 'label_smoothing=0.1'),
    (['max_kl=0.1'], 'max_kl=0.1'),
  ],
)
def test_settings_that_dpo_cannot_use_are_named(overrides, message):
  overrides = [f'rl.{text}' for text in overrides]
  with pytest.raises(config_lib.ConfigError, match=message):
    config_lib.load(ROOT / 'configs/smoke.yaml', [*overrides, 'rl.algorithm=dpo'])
  if 'smoothing' in message:
    in_tcg = [text.replace('rl.', 'tcg.') for text in overrides]
    with pytest.raises(config_lib.ConfigError, match=message):
      config_lib.load(ROOT / 'configs/smoke.yaml', in_tcg)
  if 'max_kl' in message:
    assert config_lib.load(ROOT / 'configs/smoke.yaml', overrides).rl.max_kl == 0.1


def test_twenty_updates_that_are_not_finite_are_enough():
  fit.stop_if_broken('round0/rl/policy', 20)
  with pytest.raises(FloatingPointError, match='round0/rl/policy: 21 updates'):
    fit.stop_if_broken('round0/rl/policy', 21)
