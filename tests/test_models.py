"""The decoder: causal, segment-wise, cached equals uncached, fast paths equal plain ones."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

from o1jax.models import (
  Model,
  ModelConfig,
  RopeScaling,
  ScalarHead,
  StepHead,
  TokenHead,
  attention,
  ops,
)

BASE = ModelConfig(61, 32, 2, 4, 2, 48, initializer_range=0.2, max_position=64)
QWEN3 = dataclasses.replace(
  BASE, architecture='Qwen3ForCausalLM', qk_norm=True, head_dim=12, tie_embeddings=False
)
CONFIGS = {
  'gqa': BASE,
  'mqa': dataclasses.replace(BASE, num_kv_heads=1),
  'mha': dataclasses.replace(BASE, num_kv_heads=4),
  'qwen2': dataclasses.replace(
    BASE,
    architecture='Qwen2ForCausalLM',
    qkv_bias=True,
    sliding_window=4,
    sliding_layers=(False, True),
  ),
  'qwen3': QWEN3,
  'llama3': dataclasses.replace(BASE, o_bias=True, rope_scaling=RopeScaling('llama3', 8.0)),
  'scanned': dataclasses.replace(BASE, num_layers=9, sliding_window=5),
  'no_table': dataclasses.replace(BASE, max_position=1 << 20),
}


def make(name, rows=3, length=11):
  """A model, parameters far from their initial ones and zeros, and a batch, all from NumPy."""
  model, rng = Model(CONFIGS[name]), np.random.default_rng(1)

  def draw(shape):
    is_norm = shape.shape[-1:] == shape.shape[1:]
    return jnp.asarray(rng.normal(1.0 if is_norm else 0.0, 0.2, shape.shape), jnp.float32)

  params = jax.tree.map(draw, model.shapes())
  tokens = jnp.asarray(rng.integers(0, model.config.vocab_size, (rows, length)), jnp.int32)
  positions = jnp.asarray(np.tile(np.arange(length, dtype=np.int32), (rows, 1)))
  return model, params, tokens, positions, jnp.asarray(np.ones((rows, length), np.int32))


hidden_of = jax.jit(Model.hidden, static_argnums=0)
extend = jax.jit(Model.extend, static_argnums=0)


@pytest.mark.parametrize('name', CONFIGS)
def test_causality(name):
  model, params, tokens, positions, segments = make(name)
  x = params['embed'][tokens]

  @jax.jit
  @jax.grad
  def gradient(x, t):
    hidden = model.hidden_from_embeddings(params, x, positions, segments)
    return model.logits(params, jnp.take(hidden, t, axis=1)).sum()

  for t in (0, 5):
    grads = np.abs(gradient(x, t)).max(axis=(0, 2))
    assert (grads[t + 1 :] == 0).all()
    assert (grads[max(0, t - 3) : t + 1] > 0).all()


@pytest.mark.parametrize('name', ['gqa', 'qwen2', 'scanned'])
def test_packed_equals_unpacked(name):
  model, params, tokens, _, _ = make(name, rows=1, length=12)
  lengths = (5, 4)
  positions = jnp.array([[*range(5), *range(4), 0, 0, 0]])
  segments = jnp.array([[1] * 5 + [2] * 4 + [0] * 3])
  packed = hidden_of(model, params, tokens, positions, segments)
  start = 0
  for length in lengths:
    part = slice(start, start + length)
    steps = jnp.arange(length)[None]
    alone = hidden_of(model, params, tokens[:, part], steps, jnp.ones_like(steps))
    np.testing.assert_allclose(packed[:, part], alone, atol=1e-5)
    start += length
  assert np.isfinite(packed).all()  # padding sees nothing and must not become NaN


@pytest.mark.parametrize('name', sorted(CONFIGS.keys() - {'scanned'}))  # the cache has no scan
def test_cached_equals_full(name):
  """Prefill of ragged, left-padded rows, then single tokens, with a hole in the cache.

  The single tokens are read as a decoding loop reads them, with the parameters apart.
  """
  model, params, tokens, positions, segments = make(name)
  full = hidden_of(model, params, tokens, positions, segments)
  rows, columns, offsets = 3, 20, jnp.array([0, 2, 3])[:, None]  # padding before each row
  column = jnp.arange(6)[None]
  source = jnp.maximum(column - offsets, 0)
  valid = jnp.pad(column >= offsets, ((0, 0), (0, columns - 6)))
  prompt = jnp.take_along_axis(tokens, source, axis=1)
  cache = model.empty_cache(rows, columns)
  hidden, cache = extend(model, params, cache, prompt, source, jnp.int32(0), valid)
  for row, offset in enumerate((0, 2, 3)):
    np.testing.assert_allclose(hidden[row, offset:], full[row, : 6 - offset], atol=1e-5)

  apart = jax.jit(Model.apart, static_argnums=0)(model, params)
  for step in range(5):
    column = 6 + step + (step > 1)  # column 8 stays a hole
    position = 6 - offsets + step
    valid = valid.at[:, column].set(True)
    token = jnp.take_along_axis(tokens, position, axis=1)
    hidden, cache = extend(model, apart, cache, token, position, jnp.int32(column), valid)
    expected = jnp.take_along_axis(full, position[:, :, None], axis=1)
    np.testing.assert_allclose(hidden, expected, atol=1e-5)
    said = model.logits(apart, hidden), model.logits(params, expected)
    np.testing.assert_allclose(*said, atol=1e-4)


def test_rows_of_a_cache_are_independent():
  model, params, tokens, positions, _ = make('mqa')
  valid = jnp.ones((3, 11), bool)
  column = jnp.int32(0)
  _, cache = extend(model, params, model.empty_cache(3, 11), tokens, positions, column, valid)
  order = np.array([2, 0])
  part = jax.tree.map(lambda a: np.asarray(a)[order], cache)
  last = (tokens[:, :1], positions[:, 10:])
  straight, _ = extend(model, params, cache, *last, jnp.int32(10), valid)
  last = [np.asarray(a)[order] for a in last]
  swapped, _ = extend(model, params, part, *last, jnp.int32(10), valid[:2])
  np.testing.assert_allclose(swapped, np.asarray(straight)[order], atol=1e-6)


@pytest.mark.parametrize('name', ['mqa', 'scanned'])
def test_jit_equals_eager(name):
  model, params, *batch = make(name)
  eager = model.hidden(params, *batch)
  np.testing.assert_allclose(hidden_of(model, params, *batch), eager, atol=1e-5)


@pytest.mark.parametrize('name', ['mqa', 'scanned'])
def test_remat_changes_nothing(name):
  model, params, *batch = make(name)

  def loss(params, model):
    return jnp.square(model.logits(params, model.hidden(params, *batch))).mean()

  remat = dataclasses.replace(model, remat=True)
  grads = [jax.jit(jax.grad(loss), static_argnums=1)(params, m) for m in (model, remat)]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *grads)


def test_attention_equals_plain_softmax():
  """Against NumPy, and the one-token form against the general one."""
  q, k, v = (
    jax.random.normal(jax.random.key(i), (2, 5, heads, 8)) for i, heads in enumerate((6, 2, 2))
  )
  mask = jnp.tril(jnp.ones((5, 5), bool))[None].repeat(2, 0)
  out = attention.attend(q, k, v, mask)
  for head in range(6):
    scores = np.einsum('bth,bsh->bts', q[:, :, head], k[:, :, head // 3]) / np.sqrt(8)
    scores = np.where(mask, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum('bts,bsh->bth', weights, v[:, :, head // 3])
    np.testing.assert_allclose(out[:, :, head], expected, atol=1e-5)
  k, v = k[:, :, :1], v[:, :, :1]
  one = attention.attend_cached(
    q[:, 4:], k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3), mask[:, 4:]
  )
  np.testing.assert_allclose(one, attention.attend(q, k, v, mask)[:, 4:], atol=1e-5)


def test_gradients_of_products():
  x, kernel = jax.random.normal(jax.random.key(0), (5, 3)), jnp.arange(12.0).reshape(3, 4) / 9
  check_grads(ops.linear, (x, kernel), order=1, modes=['rev'])
  check_grads(ops.gated_silu, (x, 2 * x - 1), order=1, modes=['rev'])
  np.testing.assert_allclose(ops.gated_silu(x, 2 * x), jax.nn.silu(x) * 2 * x, atol=1e-6)


def test_bfloat16_is_near_float32():
  model, params, *batch = make('gqa')
  half = Model(dataclasses.replace(model.config, dtype='bfloat16'))
  low = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)

  @functools.partial(jax.jit, static_argnums=0)
  @functools.partial(jax.value_and_grad, argnums=1, has_aux=True)
  def run(model, params):
    logits = model.logits(params, model.hidden(params, *batch))
    return logits.mean(), logits

  (_, logits), grads = run(half, low)
  exact = run(model, params)[0][1]
  assert logits.dtype == jnp.float32
  assert np.abs(logits - exact).max() < 0.1 * np.abs(exact).max()
  assert all(g.dtype == jnp.bfloat16 for g in jax.tree.leaves(grads))


def test_init_is_finite_and_learns():
  model, _, *batch = make('mqa')
  tx, params = optax.adam(1e-2), jax.jit(model.init)(jax.random.key(0))
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, model.shapes())

  def loss(params):
    logits = model.logits(params, model.hidden(params, *batch)[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[0][:, 1:]).mean()

  @jax.jit
  def step(params, state):
    value, grads = jax.value_and_grad(loss)(params)
    updates, state = tx.update(grads, state)
    return optax.apply_updates(params, updates), state, value

  state, values = tx.init(params), []
  for _ in range(40):
    params, state, value = step(params, state)
    values.append(float(value))
  assert values[-1] < 0.1 < 3 < values[0]


def test_config_errors_name_the_value():
  with pytest.raises(ValueError, match='num_heads=4 is not a multiple of num_kv_heads=3'):
    dataclasses.replace(BASE, num_kv_heads=3)
  with pytest.raises(ValueError, match='hidden_size=30 does not divide over num_heads=4'):
    ModelConfig(61, 30, 3, 4, 2, 48)
  with pytest.raises(ValueError, match='sliding_layers names 1 layers'):
    dataclasses.replace(BASE, sliding_layers=(True,))


def step_head():
  keys = jax.random.split(jax.random.key(4), 5)
  params = {
    'kernel': jax.random.normal(keys[0], (6,)),
    'bias': jnp.float32(0.3),
    'bilinear': jax.random.normal(keys[1], (6, 6)),
    'logprob': jnp.float32(0.7),
  }
  hidden, embeddings = (jax.random.normal(k, (2, 9, 6)) for k in keys[2:4])
  logprobs = -jax.random.exponential(keys[4], (2, 9))
  step_ids = jnp.array([[0, 0, 1, 1, 1, 2, 3, 3, 0], [0, 1, 1, 2, 2, 2, 2, 2, 2]])
  return params, hidden, embeddings, logprobs, step_ids


def test_step_head_equals_its_formula():
  params, hidden, embeddings, logprobs, step_ids = step_head()
  scores = StepHead.apply(params, hidden, embeddings, logprobs, step_ids, 4)
  for row in range(2):
    for step in range(1, 5):
      where = np.flatnonzero(step_ids[row] == step)
      expected = 0.0
      if where.size:
        expected = hidden[row, where[-1]] @ params['kernel'] + params['bias']
        for t in where:
          expected += hidden[row, t - 1] @ params['bilinear'] @ embeddings[row, t]
          expected += 0.7 * logprobs[row, t]
      np.testing.assert_allclose(scores[row, step - 1], expected, atol=1e-4)
  last = ScalarHead.apply({k: params[k] for k in ('kernel', 'bias')}, hidden)
  np.testing.assert_allclose(last, hidden @ params['kernel'] + 0.3, atol=1e-5)


def test_step_head_incremental_equals_full():
  params, hidden, embeddings, logprobs, step_ids = step_head()
  full = StepHead.apply(params, hidden, embeddings, logprobs, step_ids, 3)
  start, width = jnp.array([2, 1]), 4  # step 1 of both rows; 3 and 2 tokens long
  index = start[:, None] + jnp.arange(width)[None]
  take = lambda x: jnp.take_along_axis(x, index[:, :, None], axis=1)  # noqa: E731
  mask = jnp.take_along_axis(step_ids, index, axis=1) == 1
  before = hidden[jnp.arange(2), start - 1]
  step = (take(hidden), take(embeddings), jnp.take_along_axis(logprobs, index, axis=1))
  score = StepHead.apply_step(params, before, *step, mask)
  np.testing.assert_allclose(score, full[:, 0], atol=1e-5)
  nothing = jnp.zeros_like(mask)
  assert (StepHead.apply_step(params, before, *step, nothing) == 0).all()


def test_token_head_is_the_good_token_against_the_bad_where_a_step_ends():
  _, hidden, embeddings, logprobs, step_ids = step_head()
  output = jax.random.normal(jax.random.key(5), (7, 6))
  params = TokenHead.init(output, good=2, bad=4)
  scores = TokenHead.apply(params, hidden, embeddings, logprobs, step_ids, 4)
  logits = np.asarray(hidden @ output.T, np.float64)
  for row in range(2):
    for step in range(1, 5):
      where = np.flatnonzero(step_ids[row] == step)
      if not where.size:
        assert scores[row, step - 1] == 0
        continue
      good, bad = np.exp(logits[row, where[-1]][[2, 4]])
      actual = jax.nn.sigmoid(scores[row, step - 1])
      np.testing.assert_allclose(actual, good / (good + bad), rtol=1e-4, atol=1e-6)
  with pytest.raises(ValueError, match='good=3 and bad=3'):
    TokenHead.init(output, 3, 3)


def test_token_head_incremental_equals_full():
  _, hidden, embeddings, logprobs, step_ids = step_head()
  params = TokenHead.init(jax.random.normal(jax.random.key(5), (7, 6)), 0, 1)
  full = TokenHead.apply(params, hidden, embeddings, logprobs, step_ids, 3)
  start, width = jnp.array([2, 1]), 4  # step 1 of both rows; 3 and 2 tokens long
  index = start[:, None] + jnp.arange(width)[None]
  take = lambda x: jnp.take_along_axis(x, index[:, :, None], axis=1)  # noqa: E731
  mask = jnp.take_along_axis(step_ids, index, axis=1) == 1
  before = hidden[jnp.arange(2), start - 1]
  step = (take(hidden), take(embeddings), jnp.take_along_axis(logprobs, index, axis=1))
  score = TokenHead.apply_step(params, before, *step, mask)
  np.testing.assert_allclose(score, full[:, 0], atol=1e-5)
  nothing = jnp.zeros_like(mask)
  assert (TokenHead.apply_step(params, before, *step, nothing) == 0).all()


def test_a_fresh_step_head_says_what_the_policy_thinks_and_a_fresh_scalar_nothing():
  _, hidden, embeddings, logprobs, step_ids = step_head()
  config = dataclasses.replace(BASE, hidden_size=6, head_dim=8)
  params = StepHead.init(config, jax.random.key(0))
  scores = StepHead.apply(params, hidden, embeddings, logprobs, step_ids, 3)
  sums = [(logprobs * (step_ids == j)).sum(1) for j in (1, 2, 3)]
  np.testing.assert_allclose(scores, jnp.stack(sums, 1), rtol=1e-6)
  assert (ScalarHead.apply(ScalarHead.init(config), hidden) == 0).all()
