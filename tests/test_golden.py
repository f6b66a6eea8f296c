"""The losses against numbers that TRL's own functions made (golden/make_golden.py)."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from o1jax.losses import dpo, ppo, prm, returns, sft

GOLDEN = json.loads((pathlib.Path(__file__).parent / 'golden' / 'golden.json').read_text())


def section(name):
  """Inputs as float32 arrays, settings, and outputs as float64."""
  part = GOLDEN[name]
  inputs = {k: jnp.asarray(v, jnp.float32) for k, v in part['inputs'].items()}
  return inputs, part['settings'], {k: np.asarray(v) for k, v in part['outputs'].items()}


def close(actual, expected, tol=2e-5):
  np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=tol, atol=tol)


def total(function, *args):
  """Summed loss over summed count of vmapped rows."""
  loss, count = jax.vmap(function)(*args)
  return loss.sum() / count.sum()


def test_advantages_and_targets_are_those_of_trl():
  x, settings, golden = section('ppo')
  gae = functools.partial(returns.gae, discount=settings['gamma'], lam=settings['lam'])
  advantages = jax.vmap(gae)(x['rewards'], x['values'], x['mask'])
  close(advantages, golden['advantages'])
  close(x['mask'] * (advantages + x['values']), golden['targets'])
  # TRL divides the variance by n - 1.
  n = float(x['mask'].sum())
  close(returns.whiten(advantages, x['mask']) * np.sqrt((n - 1) / n), golden['whitened'])


def test_ppo_losses_and_gradients_are_those_of_trl():
  x, settings, golden = section('ppo')
  mask, clip = x['mask'], settings['cliprange']
  advantages, targets = (jnp.asarray(golden[k], jnp.float32) for k in ('whitened', 'targets'))

  def policy(logprobs):
    loss = functools.partial(ppo.policy_loss, clip_low=clip, clip_high=clip)
    return total(loss, logprobs, x['old_logprobs'], advantages, mask)

  def value(values):
    loss = functools.partial(ppo.value_loss, clip=settings['cliprange_value'])
    return total(loss, values, x['values'] * mask, targets, mask)

  for loss, at, name in ((policy, 'logprobs', 'policy'), (value, 'new_values', 'value')):
    actual, gradient = jax.value_and_grad(loss)(x[at])
    close(actual, golden[f'{name}_loss'])
    close(gradient, golden[f'{name}_gradient'])
  clipped = functools.partial(ppo.clip_fraction, clip_low=clip, clip_high=clip)
  fraction = total(clipped, x['logprobs'], x['old_logprobs'], advantages, mask)
  close(fraction, golden['clip_fraction'])
  close(jnp.sum(mask * ppo.entropy(x['logits'])) / mask.sum(), golden['entropy'])
  close(returns.kl_k1(x['logprobs'], x['old_logprobs']), golden['k1'])
  close(returns.kl_k2(x['logprobs'], x['old_logprobs']), golden['k2'])


def test_group_advantages_are_those_of_trl():
  x, settings, golden = section('grpo')
  group = settings['group']
  rewards = x['rewards'].reshape(-1, group)
  ones = jnp.ones_like(rewards)
  close(jax.vmap(returns.group_advantages)(rewards, ones), golden['centred'])
  divided = jax.vmap(lambda r, m: returns.group_advantages(r, m, True))(rewards, ones)
  # TRL takes the sample deviation and adds 1e-4 to it; ours is the population's.
  close(divided * np.sqrt((group - 1) / group), golden['divided'], 5e-4)


@pytest.mark.parametrize('name', ['by_token', 'by_sequence'])
def test_grpo_loss_with_k3_and_truncated_weights_is_that_of_trl(name):
  x, settings, golden = section('grpo')
  mask = x['mask']
  weigh = functools.partial(ppo.importance_weights, cap=settings['cap'])
  weights = jax.vmap(weigh)(x['old_logprobs'], x['behaviour_logprobs'], mask)
  close(weights, golden['weights'])
  clips = {'clip_low': settings['clip_low'], 'clip_high': settings['clip_high']}

  def loss(logprobs):
    surrogate, count = jax.vmap(functools.partial(ppo.policy_loss, **clips))(
      logprobs, x['old_logprobs'], x['advantages'][:, None] * weights, mask
    )
    kl = jnp.sum(mask * returns.kl_k3(logprobs, x['ref_logprobs']), axis=-1)
    rows = surrogate + settings['beta'] * kl
    return rows.sum() / count.sum() if name == 'by_token' else jnp.mean(rows / count)

  actual, gradient = jax.value_and_grad(loss)(x['logprobs'])
  close(actual, golden[name])
  close(gradient, golden[f'{name}_gradient'])


def test_preference_losses_are_those_of_trl():
  x, settings, golden = section('dpo')
  beta, smoothing = settings['beta'], settings['label_smoothing']
  sums = [x[k] for k in ('chosen', 'rejected', 'ref_chosen', 'ref_rejected')]
  lengths = [x[k] for k in ('chosen_length', 'rejected_length')]
  plain, by_length = jax.vmap(dpo.margin)(*sums), jax.vmap(dpo.margin)(*sums, *lengths)
  each = lambda f, m: jax.vmap(f)(m)  # noqa: E731
  close(each(lambda m: dpo.dpo_loss(m, beta), plain), golden['sigmoid'])
  close(each(lambda m: dpo.dpo_loss(m, beta, smoothing), plain), golden['smoothed'])
  close(each(lambda m: dpo.dpo_loss(m, beta), by_length), golden['length_normalised'])
  close(each(lambda m: dpo.ipo_loss(m, beta), by_length), golden['ipo'])


def test_sft_loss_and_gradient_are_those_of_torch():
  x, _, golden = section('sft')
  targets = x['targets'].astype(jnp.int32)

  def loss(logits):
    logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    return total(sft.nll_loss, logprobs, x['mask'])

  actual, gradient = jax.value_and_grad(loss)(x['logits'])
  close(actual, golden['loss'])
  close(gradient, golden['gradient'])


def test_process_reward_losses_are_those_of_trl_and_torch():
  x, _, golden = section('reward')
  ones = jnp.ones_like(x['win'])
  pair, count = prm.pairwise_loss(x['win'], x['lose'], ones)
  close(pair / count, golden['pairwise'])
  point, count = prm.pointwise_loss(x['win'], x['labels'], ones)
  close(point / count, golden['pointwise'])
