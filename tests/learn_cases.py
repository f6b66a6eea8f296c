"""One small model, and for every objective a batch of ragged rows that exercises it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from o1jax.batch import PairBatch, RolloutBatch, StepBatch, TokenBatch
from o1jax.learn import logprobs, objectives
from o1jax.models.config import ModelConfig
from o1jax.models.heads import ScalarHead, StepHead, TokenHead
from o1jax.models.transformer import Model

B, T, V, M = 8, 12, 19, 3
CONFIG = ModelConfig(
  vocab_size=V,
  hidden_size=16,
  num_layers=1,
  num_heads=2,
  num_kv_heads=1,
  intermediate_size=24,
  initializer_range=0.3,
)
MODEL = Model(CONFIG)


@functools.cache
def params():
  return MODEL.init(jax.random.key(0))


def copied(tree):
  return jax.tree.map(jnp.copy, tree)


def rows(seed=0, batch=B):
  """Ragged right-padded rows: tokens, positions, segments, and a mask without the prompt."""
  rng = np.random.default_rng(seed)
  lengths = rng.integers(6, T + 1, batch)
  place = np.broadcast_to(np.arange(T), (batch, T))
  real = place < lengths[:, None]
  tokens = np.where(real, rng.integers(1, V, (batch, T)), 0)
  prompts = rng.integers(2, 4, batch)
  mask = real & (place >= prompts[:, None])
  ints = (np.asarray(x, np.int32) for x in (tokens, place * real, real))
  return (*ints, mask.astype(np.float32))


def token_batch(seed=0):
  tokens, positions, segments, mask = rows(seed)
  weights = mask * np.random.default_rng(seed).random((B, T)).astype(np.float32)
  return TokenBatch(*map(jnp.asarray, (tokens, positions, segments, weights)))


def pair_batch():
  refs = np.random.default_rng(2).normal(-30, 3, (2, B)).astype(np.float32)
  sides = [TokenBatch(*map(jnp.asarray, rows(seed))) for seed in (3, 4)]
  return PairBatch(*sides, *map(jnp.asarray, refs))


def step_ids_of(mask):
  ids = np.minimum(1 + (np.cumsum(mask, -1) - 1) // 3, M) * mask
  return ids.astype(np.int32)


def step_batch():
  tokens, positions, segments, mask = rows(5)
  rng = np.random.default_rng(5)
  step_ids = step_ids_of(mask)
  exists = (np.arange(1, M + 1)[None] <= step_ids.max(-1, keepdims=True)).astype(np.float32)
  # Rows of a pair agree modulo 4, so that up to 4 microbatches keep them together.
  pairs = np.array([[0, 4, 1], [5, 1, 2], [2, 6, 1], [0, 0, 0]], np.int32)
  return StepBatch(
    *map(jnp.asarray, (tokens, positions, segments, step_ids)),
    labels=jnp.asarray(rng.random((B, M)), jnp.float32),
    weights=jnp.asarray(exists * rng.integers(1, 5, (B, M)), jnp.float32),
    pairs=jnp.asarray(pairs),
    pair_weights=jnp.asarray([1.0, 0.5, 2.0, 0.0], jnp.float32),
  )


def rollout_batch():
  tokens, positions, segments, mask = rows(6)
  rng = np.random.default_rng(6)
  noise = [mask * rng.normal(size=(B, T)).astype(np.float32) for _ in range(4)]
  now = mask * np.asarray(now_logprobs(tokens, positions, segments))
  return RolloutBatch(
    *map(jnp.asarray, (tokens, positions, segments, step_ids_of(mask), mask)),
    old_logprobs=jnp.asarray(now + 0.3 * noise[0]),
    ref_logprobs=jnp.asarray(now + 0.3 * noise[1]),
    old_values=jnp.asarray(noise[2]),
    advantages=jnp.asarray(noise[3]),
    returns=jnp.asarray(noise[2] + noise[3]),
    imitate=jnp.asarray(rng.integers(0, 2, B), jnp.float32),
    version=jnp.zeros(B, jnp.int32),
  )


TOKEN_LOGPROBS = jax.jit(logprobs.token_logprobs, static_argnums=(0, 5))


def now_logprobs(*arrays):
  return TOKEN_LOGPROBS(MODEL, params(), *arrays)


def random_like(tree, seed):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32), tree)


def prm_params():
  return {'trunk': params(), 'head': random_like(StepHead.init(CONFIG), 1)}


def token_prm_params():
  return {'trunk': params(), 'head': TokenHead.init(MODEL.output_rows(params()), 3, 5)}


def actor_critic():
  return {'policy': params(), 'critic': random_like(ScalarHead.init(CONFIG), 2)}


CRITIC = {'kl_coef': 0.1, 'entropy_coef': 0.05, 'value_fn': objectives.value_on_policy}
CASES = {
  'sft': (objectives.sft_loss(MODEL), params, token_batch),
  'dpo': (objectives.dpo_loss(MODEL, 0.2, nll=0.5, label_smoothing=0.1), params, pair_batch),
  'ipo': (objectives.dpo_loss(MODEL, ipo=True, length_normalised=True), params, pair_batch),
  'prm': (objectives.prm_loss(MODEL, pair_coef=0.7), prm_params, step_batch),
  'prm_token': (objectives.prm_loss(MODEL), token_prm_params, step_batch),
  'ppo_critic': (objectives.ppo_loss(MODEL, **CRITIC), actor_critic, rollout_batch),
  'ppo_rows': (objectives.ppo_loss(MODEL, sequence_mean=True), params, rollout_batch),
}
every_loss = pytest.mark.parametrize('name', CASES)


@functools.partial(jax.jit, static_argnums=0)
def mean_loss_and_gradient(loss_fn, weights, batch):
  def mean(weights):
    total, count, metrics = loss_fn(weights, batch)
    return total / count, metrics

  return jax.value_and_grad(mean, has_aux=True)(weights)


def assert_close(a, b, tol):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=tol, rtol=tol), a, b)


def assert_trees_equal(a, b):
  """Same names, types and bits."""
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
