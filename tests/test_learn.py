"""The train step and its objectives: equal however batched, blind to padding, able to learn."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from o1jax.batch import PairBatch, RolloutBatch, StepBatch, TokenBatch
from o1jax.learn import logprobs, microbatch, objectives, optim
from o1jax.learn.state import init_state
from o1jax.learn.update import make_update
from o1jax.losses import dpo, ppo, returns
from o1jax.models.config import ModelConfig
from o1jax.models.heads import ScalarHead, StepHead
from o1jax.models.transformer import Model

B, T, V, M = 8, 12, 19, 3
CONFIG = ModelConfig(
  vocab_size=V,
  hidden_size=16,
  num_layers=2,
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


def now_logprobs(tokens, positions, segments):
  return logprobs.token_logprobs(MODEL, params(), tokens, positions, segments)


def random_like(tree, seed):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32), tree)


def prm_params():
  return {'trunk': params(), 'head': random_like(StepHead.init(CONFIG), 1)}


def actor_critic():
  return {'policy': params(), 'critic': random_like(ScalarHead.init(CONFIG), 2)}


CRITIC = {'kl_coef': 0.1, 'entropy_coef': 0.05, 'value_fn': objectives.value_on_policy}
CASES = {
  'sft': (objectives.sft_loss(MODEL), params, token_batch),
  'sft_chunked': (objectives.sft_loss(MODEL, chunk=4), params, token_batch),
  'dpo': (objectives.dpo_loss(MODEL, 0.2, nll=0.5, label_smoothing=0.1), params, pair_batch),
  'ipo': (objectives.dpo_loss(MODEL, ipo=True, length_normalised=True), params, pair_batch),
  'prm': (objectives.prm_loss(MODEL, pair_coef=0.7), prm_params, step_batch),
  'ppo': (objectives.ppo_loss(MODEL, negative_scale=0.5), params, rollout_batch),
  'ppo_critic': (objectives.ppo_loss(MODEL, **CRITIC), actor_critic, rollout_batch),
  'ppo_rows': (objectives.ppo_loss(MODEL, sequence_mean=True), params, rollout_batch),
}
every_loss = pytest.mark.parametrize('name', CASES)


def mean_loss_and_gradient(loss_fn, weights, batch):
  def mean(weights):
    total, count, _ = loss_fn(weights, batch)
    return total / count

  return jax.jit(jax.value_and_grad(mean))(weights)


def assert_close(a, b, tol):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=tol, rtol=tol), a, b)


# --- log-probabilities ---------------------------------------------------------------


def test_logprobs_are_those_of_each_prefix():
  tokens, positions, segments, _ = rows()
  actual = now_logprobs(tokens, positions, segments)
  assert actual.dtype == jnp.float32
  for b, t in ((0, 1), (1, 4), (3, 5)):
    prefix = tuple(x[b : b + 1, :t] for x in (tokens, positions, segments))
    logits = MODEL.logits(params(), MODEL.hidden(params(), *prefix))[0, -1]
    logits = np.asarray(logits, np.float64)
    expected = logits[tokens[b, t]] - np.log(np.exp(logits).sum())
    np.testing.assert_allclose(actual[b, t], expected, rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(actual[:, 0], 0.0)
  np.testing.assert_array_equal(actual[segments == 0], 0.0)


@pytest.mark.parametrize('chunk', [1, 4, 11, 50])
def test_chunks_change_neither_value_nor_gradient(chunk):
  tokens, positions, segments, mask = rows()

  def total(weights, chunk):
    out = logprobs.token_logprobs(MODEL, weights, tokens, positions, segments, chunk)
    return jnp.sum(mask * out)

  one = jax.value_and_grad(total)(params(), None)
  assert_close(jax.jit(jax.value_and_grad(total), static_argnums=1)(params(), chunk), one, 2e-5)


def sizes(jaxpr):
  """Elements of the largest array that a jaxpr, or one inside it, computes."""
  largest = max((v.aval.size for e in jaxpr.eqns for v in e.outvars), default=0)
  inner = [sizes(j) for e in jaxpr.eqns for p in e.params.values() for j in jaxprs_in(p)]
  return max([largest, *inner])


def jaxprs_in(value):
  for x in value if isinstance(value, (tuple, list)) else [value]:
    x = getattr(x, 'jaxpr', x)
    if hasattr(x, 'eqns'):
      yield x


def test_chunked_logprobs_never_hold_all_logits():
  vocab = 5000
  model = Model(dataclasses.replace(CONFIG, vocab_size=vocab))
  tokens, positions, segments, _ = rows()

  def total(weights, chunk):
    return logprobs.token_logprobs(model, weights, tokens, positions, segments, chunk).sum()

  def largest(chunk):
    grad = lambda w: jax.grad(total)(w, chunk)
    return sizes(jax.make_jaxpr(grad)(model.shapes()).jaxpr)

  assert largest(2) <= max(B * 2 * vocab, vocab * CONFIG.hidden_size)
  assert largest(T) >= B * (T - 1) * vocab  # the measure sees them when they are there


def test_packing_changes_nothing():
  tokens, positions, segments, mask = rows(batch=2)
  lengths = segments.sum(-1)
  packed = [np.zeros((1, 2 * T), x.dtype) for x in (tokens, positions, segments, mask)]
  first, both = lengths[0], lengths.sum()
  for out, x in zip(packed, (tokens, positions, segments, mask), strict=True):
    out[0, :first], out[0, first:both] = x[0, :first], x[1, : lengths[1]]
  packed[2][0, first:both] = 2
  apart = now_logprobs(tokens, positions, segments)
  together = np.asarray(now_logprobs(*packed[:3]))
  np.testing.assert_allclose(together[0, :first], apart[0, :first], atol=2e-6)
  np.testing.assert_allclose(together[0, first:both], apart[1, : lengths[1]], atol=2e-6)
  loss = objectives.sft_loss(MODEL)
  separate = TokenBatch(*map(jnp.asarray, (tokens, positions, segments, mask)))
  packed = TokenBatch(*map(jnp.asarray, packed))
  one, other = (mean_loss_and_gradient(loss, params(), b) for b in (separate, packed))
  assert_close(one, other, 2e-5)


def test_sequence_logprobs_sum_the_answer():
  batch = token_batch()
  expected = now_logprobs(batch.tokens, batch.positions, batch.segments) * batch.loss_mask
  actual = logprobs.sequence_logprobs(MODEL, params(), batch)
  np.testing.assert_allclose(actual, np.sum(expected, -1), rtol=1e-6)


# --- objectives ----------------------------------------------------------------------


class Nudged(Model):
  """Adds an array to the logits, so that a gradient shows what each logit is worth."""

  def logits(self, params, hidden):
    return super().logits(params, hidden) + params['nudge']


@pytest.mark.parametrize('name', ['sft', 'dpo', 'ppo'])
def test_prompt_and_padding_logits_get_exactly_no_gradient(name):
  model = Nudged(CONFIG)
  loss_fn, mask = {
    'sft': (objectives.sft_loss(model), token_batch().loss_mask),
    'dpo': (objectives.dpo_loss(model, nll=1.0), None),
    'ppo': (objectives.ppo_loss(model, entropy_coef=0.1, kl_coef=0.1), rollout_batch().mask),
  }[name]
  batch = CASES[name][2]()
  if mask is None:  # the nudge is shared by both sides
    mask = batch.chosen.loss_mask + batch.rejected.loss_mask
  weights = params() | {'nudge': jnp.zeros((B, T - 1, V))}
  grad = jax.grad(lambda w: loss_fn(w, batch)[0])(weights)['nudge']
  learnt = np.asarray(mask)[:, 1:] > 0
  np.testing.assert_array_equal(grad[~learnt], 0.0)
  assert (np.abs(grad[learnt]).max(-1) > 0).mean() > 0.6  # PPO's clip spares some


def garbled(batch):
  """Other token ids under the padding of every TokenBatch-like part."""
  if isinstance(batch, PairBatch):
    sides = {'chosen': garbled(batch.chosen), 'rejected': garbled(batch.rejected)}
    return dataclasses.replace(batch, **sides)
  other = jnp.where(batch.segments == 0, 7, batch.tokens)
  return dataclasses.replace(batch, tokens=other)


@every_loss
def test_padding_tokens_change_nothing(name):
  loss_fn, make, batch = CASES[name]
  one, other = (mean_loss_and_gradient(loss_fn, make(), b) for b in (batch(), garbled(batch())))
  jax.tree.map(np.testing.assert_array_equal, one, other)


@every_loss
def test_the_order_of_rows_changes_nothing(name):
  loss_fn, make, build = CASES[name]
  batch, order = build(), np.random.default_rng(0).permutation(B)
  if name == 'prm':
    fixed = {'pairs': batch.pairs, 'pair_weights': batch.pair_weights}
    place = jnp.asarray(np.argsort(order), jnp.int32)
    fixed['pairs'] = jnp.concatenate([place[batch.pairs[:, :2]], batch.pairs[:, 2:]], 1)
  moved = jax.tree.map(lambda x: x[order] if x.shape[0] == B else x, batch)
  moved = dataclasses.replace(moved, **fixed) if name == 'prm' else moved
  one, other = (mean_loss_and_gradient(loss_fn, make(), b) for b in (batch, moved))
  assert_close(one, other, 3e-6)


def test_dpo_objective_is_its_parts():
  batch = pair_batch()
  chosen, rejected = (
    np.asarray(logprobs.sequence_logprobs(MODEL, params(), side), np.float64)
    for side in (batch.chosen, batch.rejected)
  )
  margin = (chosen - batch.ref_chosen) - (rejected - batch.ref_rejected)
  nll = -chosen / np.asarray(batch.chosen.loss_mask).sum(-1)
  expected = np.sum(np.log1p(np.exp(-0.1 * margin)) + 2.0 * nll)
  loss, count, metrics = objectives.dpo_loss(MODEL, 0.1, nll=2.0)(params(), batch)
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  assert count == B
  np.testing.assert_allclose(metrics['accuracy'][0], np.sum(margin > 0))
  # The control learns the chosen answers from the same pairs and sees nothing else.
  loss, _, metrics = objectives.dpo_loss(MODEL, nll=1.0, preference=0.0)(params(), batch)
  np.testing.assert_allclose(loss, nll.sum(), rtol=1e-5)
  assert set(metrics) == {'nll'}


def test_padded_pairs_count_for_nothing():
  batch = pair_batch()
  last = jnp.arange(B)[:, None] < B - 2

  def emptied(side):
    return dataclasses.replace(side, loss_mask=side.loss_mask * last)

  padded = dataclasses.replace(
    batch, chosen=emptied(batch.chosen), rejected=emptied(batch.rejected)
  )
  loss_fn = objectives.dpo_loss(MODEL, nll=0.5)
  loss, count, _ = loss_fn(params(), padded)
  expected, _, _ = loss_fn(params(), jax.tree.map(lambda x: x[: B - 2], batch))
  assert count == B - 2
  np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_ipo_refuses_label_smoothing():
  with pytest.raises(ValueError, match=r'label_smoothing=0.1'):
    objectives.dpo_loss(MODEL, ipo=True, label_smoothing=0.1)


@pytest.mark.parametrize('pair_coef, point_coef', [(1.0, 1.0), (0.5, 2.0), (1.0, 0.0), (0.0, 1.0)])
def test_prm_objective_is_a_mean_over_what_is_judged(pair_coef, point_coef):
  batch = step_batch()
  scores = objectives.step_scores(MODEL, StepHead, prm_params(), batch)
  s, v, w = (np.asarray(x, np.float64) for x in (scores, batch.labels, batch.weights))
  total = point_coef * np.sum(w * (np.log1p(np.exp(s)) - v * s))
  count = point_coef * w.sum()
  for (win, lose, j), weight in zip(batch.pairs.tolist(), batch.pair_weights.tolist(), strict=True):
    total += pair_coef * weight * np.log1p(np.exp(s[lose, j - 1] - s[win, j - 1]))
    count += pair_coef * weight
  loss_fn = objectives.prm_loss(MODEL, pair_coef=pair_coef, point_coef=point_coef)
  loss, n, _ = loss_fn(prm_params(), batch)
  np.testing.assert_allclose((loss, n), (total, count), rtol=1e-5)


def test_ppo_objective_is_its_parts():
  batch, weights = rollout_batch(), actor_critic()
  now = np.asarray(now_logprobs(batch.tokens, batch.positions, batch.segments), np.float64)
  hidden = MODEL.hidden(params(), batch.tokens, batch.positions, batch.segments)
  logits = np.asarray(MODEL.logits(params(), hidden), np.float64)
  p = np.exp(logits - logits.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  values = np.asarray(ScalarHead.apply(weights['critic'], hidden), np.float64)
  total = 0.0
  for b, t in np.argwhere(batch.mask):
    old, ref, value, advantage, target, imitate = (
      float(x)
      for x in (
        *(a[b, t] for a in (batch.old_logprobs, batch.ref_logprobs, batch.old_values)),
        *(a[b, t] for a in (batch.advantages, batch.returns)),
        batch.imitate[b],
      )
    )
    ratio, before = np.exp(now[b, t] - old), values[b, t - 1]
    advantage *= 0.5 if advantage < 0 else 1.0
    total -= min(ratio * advantage, np.clip(ratio, 0.8, 1.3) * advantage)
    total += 0.1 * (np.exp(ref - now[b, t]) - 1 - (ref - now[b, t]))
    total += 0.05 * np.sum(p[b, t - 1] * np.log(p[b, t - 1]))
    near = value + np.clip(before - value, -0.2, 0.2)
    total += 0.5 * 0.5 * max((before - target) ** 2, (near - target) ** 2)
    total -= imitate * now[b, t]
  loss_fn = objectives.ppo_loss(MODEL, clip_high=0.3, negative_scale=0.5, **CRITIC)
  loss, count, metrics = loss_fn(weights, batch)
  np.testing.assert_allclose(loss, total, rtol=1e-5)
  assert count == batch.mask.sum() == metrics['entropy'][1]
  own = {'trunk': params(), 'head': weights['critic']}
  other = objectives.value_on_own_trunk(MODEL)(own, None, batch)
  np.testing.assert_allclose(other[:, 1:], values[:, :-1], atol=1e-5)


def test_ppo_sequence_mean_weighs_rows_alike():
  batch = rollout_batch()
  loss_fn = objectives.ppo_loss(MODEL, sequence_mean=True)
  loss, count, _ = loss_fn(params(), batch)
  assert count == B
  rows_alone = []
  for b in range(B):
    row = jax.tree.map(lambda x, b=b: x[b : b + 1], batch)
    total, n, _ = objectives.ppo_loss(MODEL)(params(), row)
    rows_alone.append(total / n)
  np.testing.assert_allclose(loss, sum(rows_alone), rtol=1e-5)


# --- the train step ------------------------------------------------------------------


@every_loss
@pytest.mark.parametrize('accumulate', [2, 4])
def test_accumulation_equals_the_whole_batch(name, accumulate):
  loss_fn, make, build = CASES[name]
  tx = optax.sgd(1.0)  # Adam would divide the error by the gradient's size
  results = []
  for parts in (1, accumulate):
    update = make_update(loss_fn, tx, accumulate=parts)
    results.append(update(init_state(copied(make()), tx), build()))
  (one, metrics), (other, others) = results
  assert_close(one.params, other.params, 2e-6)
  for key in metrics:
    if key != 'pair_weight':  # says what one microbatch held, on average
      np.testing.assert_allclose(metrics[key], others[key], rtol=2e-5, atol=1e-6, err_msg=key)


def test_microbatches_keep_the_pairs_they_hold_whole():
  batch = dataclasses.replace(step_batch(), pairs=jnp.asarray([[0, 4, 1], [1, 2, 2]], jnp.int32))
  batch = dataclasses.replace(batch, pair_weights=jnp.asarray([3.0, 5.0]))
  cut = microbatch.split(batch, 2)
  np.testing.assert_array_equal(cut.tokens[1], batch.tokens[1::2])
  np.testing.assert_array_equal(cut.pair_weights, [[3.0, 0.0], [0.0, 0.0]])  # 1 and 2: parted
  np.testing.assert_array_equal(cut.pairs[0, 0], [0, 2, 1])


def test_rows_that_do_not_divide_are_refused():
  update = make_update(CASES['sft'][0], optax.sgd(0.1), accumulate=3)
  with pytest.raises(ValueError, match=r'batch=8.*accumulate=3'):
    update(init_state(copied(params()), optax.sgd(0.1)), token_batch())
  with pytest.raises(ValueError, match='accumulate=0'):
    make_update(CASES['sft'][0], optax.sgd(0.1), accumulate=0)


def square(weights, batch):
  """sum (w - x)^2 over the rows, for tests of the step itself."""
  error = jnp.sum((weights['w'][None] - batch) ** 2)
  return error, jnp.float32(batch.shape[0]), {'first': (batch[0, 0], jnp.float32(1))}


def test_a_step_that_is_not_finite_is_skipped_and_counted():
  tx = optim.make_optimizer(0.1, steps=10)
  update = make_update(square, tx, donate=False)
  good = jnp.ones((2, 3))
  start, _ = update(init_state({'w': jnp.zeros(3)}, tx), good)
  state = start
  for bad in (jnp.nan, jnp.inf):
    state, metrics = update(state, good.at[1, 2].set(bad))
    assert not jnp.isfinite(metrics['loss'])
  jax.tree.map(np.testing.assert_array_equal, start.params, state.params)
  jax.tree.map(np.testing.assert_array_equal, start.opt_state, state.opt_state)
  assert (int(state.step), int(state.skipped), float(metrics['skipped'])) == (3, 2, 2.0)
  # Afterwards it goes on as if nothing had happened.
  after, _ = update(state, good)
  expected, _ = update(start, good)
  jax.tree.map(np.testing.assert_array_equal, after.params, expected.params)
  assert int(after.skipped) == 2


def test_a_gradient_that_is_not_finite_is_skipped_though_the_loss_is():
  tx = optax.sgd(0.1)
  root = lambda weights, batch: (jnp.sqrt(weights['w']).sum(), jnp.float32(1), {})
  state, metrics = make_update(root, tx)(init_state({'w': jnp.zeros(3)}, tx), jnp.ones(1))
  assert metrics['loss'] == 0.0 and int(state.skipped) == 1
  np.testing.assert_array_equal(state.params['w'], 0.0)


def test_a_batch_with_nothing_to_learn_moves_nothing():
  tx = optax.adam(0.1)
  batch = dataclasses.replace(token_batch(), loss_mask=jnp.zeros((B, T)))
  update = make_update(CASES['sft'][0], tx, donate=False)
  start, _ = update(init_state(params(), tx), token_batch())  # momentum that could move it
  state, metrics = update(start, batch)
  assert int(state.skipped) == 1 and metrics['loss'] == 0.0
  jax.tree.map(np.testing.assert_array_equal, start.params, state.params)


def test_the_state_is_donated_and_metrics_stay_on_the_device():
  tx = optax.sgd(0.1)
  state = init_state({'w': jnp.zeros(3)}, tx)
  new, metrics = make_update(square, tx)(state, jnp.ones((2, 3)))
  assert state.params['w'].is_deleted() and not new.params['w'].is_deleted()
  assert set(metrics) == {'loss', 'grad_norm', 'count', 'skipped', 'first'}
  for value in metrics.values():
    assert isinstance(value, jax.Array) and value.dtype == jnp.float32 and value.shape == ()


def test_constants_reach_every_microbatch():
  def shifted(weights, batch, shift):
    return square(weights, batch + shift[None])

  tx = optax.sgd(0.1)
  update = make_update(shifted, tx, accumulate=2)
  state, _ = update(init_state({'w': jnp.zeros(2)}, tx), jnp.zeros((4, 2)), jnp.array([1.0, 2.0]))
  np.testing.assert_allclose(state.params['w'], [0.2, 0.4], rtol=1e-6)


def fsdp(mesh, tree):
  """First divisible axis over `fsdp`: not how o1jax shards, but some sharding of everything."""

  def place(x):
    axis = next((i for i, n in enumerate(x.shape) if n % 2 == 0 and n > 1), None)
    names = [None] * x.ndim
    if axis is not None:
      names[axis] = 'fsdp'
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*names)))

  return jax.tree.map(place, tree)


@pytest.mark.skipif(jax.device_count() < 8, reason='needs 8 devices')
@pytest.mark.parametrize('accumulate', [1, 2])
def test_a_sharded_state_stays_where_it_is_and_compiles_once(accumulate):
  tx = optim.make_optimizer(1e-2, steps=10)
  traced = []

  def loss_fn(weights, batch):
    traced.append(1)
    return CASES['sft'][0](weights, batch)

  def run(place_state, place_batch, update):
    state, losses = init_state(place_state(copied(params())), tx), []
    before = jax.tree.map(lambda x: x.sharding, state)
    for seed in range(3):
      state, metrics = update(state, place_batch(token_batch(seed)))
      losses.append(float(metrics['loss']))
    assert jax.tree.map(lambda x: x.sharding, state) == before
    return losses

  mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ('data', 'fsdp'))
  by_row = NamedSharding(mesh, PartitionSpec('data'))
  update = make_update(loss_fn, tx, accumulate=accumulate)
  sharded = run(lambda p: fsdp(mesh, p), lambda b: jax.device_put(b, by_row), update)
  once = len(traced)
  assert once <= accumulate  # one trace; accumulation takes a look at the shapes before
  single = run(lambda p: p, lambda b: b, make_update(loss_fn, tx))
  np.testing.assert_allclose(sharded, single, rtol=1e-5)


# --- the optimiser -------------------------------------------------------------------


def test_schedules():
  cosine = optim.make_schedule(2.0, steps=110, warmup=10, final=0.1)
  assert [round(float(cosine(t)), 4) for t in (0, 4, 9, 10, 60, 110, 999)] == [
    0.2,
    1.0,
    2.0,
    2.0,
    1.1,
    0.2,
    0.2,
  ]
  linear = optim.make_schedule(1.0, steps=100, schedule='linear')
  assert [round(float(linear(t)), 4) for t in (0, 25, 100)] == [1.0, 0.75, 0.0]
  constant = optim.make_schedule(1.0, steps=5, schedule='constant')
  assert float(constant(4)) == float(constant(400)) == 1.0


@pytest.mark.parametrize(
  'bad, message',
  [
    ({'schedule': 'cosin'}, "'cosin'.*constant, linear, cosine"),
    ({'warmup': 10}, 'warmup=10 .*steps=10'),
    ({'lr': 0.0}, r'lr=0\.0'),
    ({'clip': -1.0}, r'clip=-1\.0'),
  ],
)
def test_bad_optimiser_settings_are_named(bad, message):
  with pytest.raises(ValueError, match=message):
    optim.make_optimizer(**({'lr': 1e-3, 'steps': 10} | bad))


def test_adamw_is_its_formula_and_spares_norms():
  weights = {'attn_norm': jnp.ones(2), 'gate': jnp.array([1.0, -2.0]), 'q_bias': jnp.ones(2)}
  tx = optim.make_optimizer(
    0.1, steps=10, schedule='constant', weight_decay=0.5, clip=None, b1=0.8, b2=0.9
  )
  state, grads = tx.init(weights), [np.array([0.3, -4.0]), np.array([-0.1, 2.0])]
  m = v = np.zeros(2)
  expected = {k: np.asarray(x, np.float64) for k, x in weights.items()}
  for t, g in enumerate(grads, 1):
    updates, state = tx.update({k: jnp.asarray(g, jnp.float32) for k in weights}, state, weights)
    weights = optax.apply_updates(weights, updates)
    m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
    move = (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.9**t)) + 1e-8)
    for k in expected:
      decay = 0.5 * expected[k] if k == 'gate' else 0.0
      expected[k] = expected[k] - 0.1 * (move + decay)
  assert_close(weights, {k: x.astype(np.float32) for k, x in expected.items()}, 1e-5)


def test_the_clip_bounds_the_gradient():
  tx = optim.make_optimizer(0.1, steps=10, clip=1.0, b1=0.0)
  huge = {'w': jnp.array([3e6, 4e6])}
  _, state = tx.update(huge, tx.init(huge), huge)
  moment = optax.tree_utils.tree_get(state, 'mu')['w']
  np.testing.assert_allclose(moment, [0.6, 0.8], rtol=1e-5)


# --- learning ------------------------------------------------------------------------

ARMS = np.array([0.1, 0.9, 0.3, 0.5])  # chance that an arm pays
BEST = 1


def bandit_logprobs(weights, arms):
  return jax.nn.log_softmax(weights['logits'])[arms]


def grouped(weights, batch):
  """PPO on one-token trajectories whose advantages were made by the group."""
  arms, old, advantages = batch
  logprob = bandit_logprobs(weights, arms)[:, None]
  loss, count = jax.vmap(ppo.policy_loss)(
    logprob, old[:, None], advantages[:, None], jnp.ones_like(logprob)
  )
  return loss.sum(), count.sum(), {}


def with_critic(weights, batch):
  """PPO whose baseline is a learnt value."""
  arms, old, rewards = batch
  value = jnp.broadcast_to(weights['value'], (len(arms), 1))
  ones = jnp.ones_like(value)
  advantages = jax.vmap(returns.gae, (0, 0, 0, None, None))(rewards[:, None], value, ones, 1.0, 1.0)
  loss, count, _ = grouped(weights, (arms, old, advantages[:, 0]))
  error, _ = jax.vmap(ppo.value_loss)(value, value, rewards[:, None], ones)
  return loss + error.sum(), count, {}


def preferring(weights, batch):
  """DPO on pairs of arms against a uniform reference."""
  win, lose = (bandit_logprobs(weights, arms) for arms in batch)
  ref = jnp.full_like(win, -np.log(len(ARMS)))
  loss = jax.vmap(lambda m: dpo.dpo_loss(m, 0.5))(jax.vmap(dpo.margin)(win, lose, ref, ref))
  return loss.sum(), jnp.float32(len(loss)), {}


def play(loss_fn, sign, steps=150):
  """Probability of the best arm after training on what the policy itself tries."""
  rng, tx = np.random.default_rng(0), optax.adam(0.1)
  update = make_update(loss_fn, tx)
  state = init_state({'logits': jnp.zeros(len(ARMS)), 'value': jnp.zeros(())}, tx)
  for _ in range(steps):
    p = np.asarray(jax.nn.softmax(state.params['logits']), np.float64)
    arms = rng.choice(len(ARMS), size=32, p=p / p.sum())
    paid = (rng.random(32) < ARMS[arms]).astype(np.float32)
    old = np.log(p[arms]).astype(np.float32)
    if loss_fn is preferring:
      better = sign * (ARMS[arms[:16]] - ARMS[arms[16:]]) >= 0
      batch = np.where(better, arms[:16], arms[16:]), np.where(better, arms[16:], arms[:16])
    elif loss_fn is grouped:
      batch = arms, old, sign * returns.group_advantages(jnp.asarray(paid), jnp.ones(32), True)
    else:
      batch = arms, old, sign * paid
    state, _ = update(state, jax.tree.map(jnp.asarray, batch))
  return float(jax.nn.softmax(state.params['logits'])[BEST])


@pytest.mark.parametrize('loss_fn', [grouped, with_critic, preferring])
def test_a_bandit_is_solved_and_its_mirror_is_not(loss_fn):
  assert play(loss_fn, sign=1) > 0.9
  assert play(loss_fn, sign=-1) < 0.05
