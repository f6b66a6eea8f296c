"""The train step: equal however batched, sharded where it was, safe from nan; the optimiser."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from learn_cases import (
  CASES,
  B,
  T,
  assert_close,
  copied,
  mean_loss_and_gradient,
  params,
  step_batch,
  token_batch,
)

from o1jax.config import OptimConfig
from o1jax.learn import microbatch, optim
from o1jax.learn.state import init_state
from o1jax.learn.update import make_update, run_updates
from o1jax.stages import fit


@pytest.mark.parametrize('name, accumulate', [*((n, 4) for n in CASES), ('sft', 1), ('sft', 2)])
def test_accumulation_equals_the_whole_batch(name, accumulate):
  loss_fn, make, build = CASES[name]
  (loss, metrics), gradient = mean_loss_and_gradient(loss_fn, make(), build())
  tx = optax.sgd(1.0)  # Adam would divide the error by the gradient's size
  update = make_update(loss_fn, tx, accumulate=accumulate, donate=False)
  state, others = update(init_state(make(), tx), build())
  largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradient))
  moved = jax.tree.map(lambda old, new: (old - new) / largest, make(), state.params)
  assert_close(moved, jax.tree.map(lambda g: g / largest, gradient), 1e-6)
  np.testing.assert_allclose(others['loss'], loss, rtol=1e-6)
  for key, (total, count) in metrics.items():
    if key != 'pair_weight':  # says what one microbatch held, on average
      np.testing.assert_allclose(others[key], total / count, rtol=2e-5, atol=1e-6, err_msg=key)


def test_microbatches_keep_the_pairs_they_hold_whole():
  batch = dataclasses.replace(step_batch(), pairs=jnp.asarray([[0, 4, 1], [1, 2, 2]], jnp.int32))
  batch = dataclasses.replace(batch, pair_weights=jnp.asarray([3.0, 5.0]))
  cut = microbatch.split(batch, 2)
  np.testing.assert_array_equal(cut.tokens[1], batch.tokens[1::2])
  np.testing.assert_array_equal(cut.pair_weights, [[3.0, 0.0], [0.0, 0.0]])  # 1 and 2: parted
  np.testing.assert_array_equal(cut.pairs[0, 0], [0, 2, 1])


@pytest.mark.parametrize('name', ['sft', 'dpo', 'ppo_critic'])
def test_a_step_cut_for_the_caches_is_the_same(name, monkeypatch):
  loss_fn, make, build = CASES[name]
  tx, found = optax.sgd(1.0), []
  for most in (1 << 20, 2 * T):
    monkeypatch.setattr(microbatch, '_CACHED_TOKENS', most)
    update = make_update(loss_fn, tx, donate=False)
    found.append(update(init_state(make(), tx), build()))
  (whole, metrics), (state, others) = found
  assert_close(state.params, whole.params, 1e-5)
  assert_close(others, metrics, 1e-5)


def test_how_a_step_is_cut():
  batch, weights = token_batch(), copied(params())
  parts = lambda weights, batch, n=1: microbatch.parts_in_cache(weights, batch, n)  # noqa: E731
  rows = lambda n, columns: jax.tree.map(lambda x: jnp.zeros((n, columns), x.dtype), batch)  # noqa: E731
  assert [parts(weights, rows(n, 96)) for n in (16, 32, 64)] == [1, 2, 4]
  assert parts(weights, rows(64, 96), 2) == 4
  assert parts(weights, rows(31, 96)) == 1  # a row at a time gains nothing
  assert parts(weights, rows(4, 4096)) == 4
  assert parts(jnp.zeros(1 << 25), rows(64, 96)) == 1
  assert parts(weights, step_batch()) == 1


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
  assert int(state.empty) == 0
  # Afterwards it goes on as if nothing had happened.
  after, _ = update(state, good)
  expected, _ = update(start, good)
  jax.tree.map(np.testing.assert_array_equal, after.params, expected.params)
  assert int(after.skipped) == 2


def test_a_gradient_that_is_not_finite_is_skipped_though_the_loss_is():
  tx = optax.sgd(0.1)

  def root(weights, batch):
    return (jnp.sqrt(weights['w']).sum(), jnp.float32(1), {})

  state, metrics = make_update(root, tx)(init_state({'w': jnp.zeros(3)}, tx), jnp.ones(1))
  assert metrics['loss'] == 0.0 and int(state.skipped) == 1
  np.testing.assert_array_equal(state.params['w'], 0.0)


def test_a_batch_with_nothing_to_learn_moves_nothing():
  tx = optax.adam(0.1)
  batch = dataclasses.replace(token_batch(), loss_mask=jnp.zeros((B, T)))
  update = make_update(CASES['sft'][0], tx, donate=False)
  start, _ = update(init_state(params(), tx), token_batch())  # momentum that could move it
  state, metrics = update(start, batch)
  assert (int(state.empty), int(state.skipped)) == (1, 0) and metrics['loss'] == 0.0
  assert (metrics['empty'], metrics['skipped']) == (1.0, 0.0)
  jax.tree.map(np.testing.assert_array_equal, start.params, state.params)


def test_the_state_is_donated_and_metrics_stay_on_the_device():
  tx = optax.sgd(0.1)
  state = init_state({'w': jnp.zeros(3)}, tx)
  new, metrics = make_update(square, tx)(state, jnp.ones((2, 3)))
  assert state.params['w'].is_deleted() and not new.params['w'].is_deleted()
  assert set(metrics) == {'loss', 'grad_norm', 'count', 'skipped', 'empty', 'first'}
  for value in metrics.values():
    assert isinstance(value, jax.Array) and value.dtype == jnp.float32 and value.shape == ()


def test_constants_reach_every_microbatch():
  def shifted(weights, batch, shift):
    return square(weights, batch + shift[None])

  tx = optax.sgd(0.1)
  update = make_update(shifted, tx, accumulate=2)
  state, _ = update(init_state({'w': jnp.zeros(2)}, tx), jnp.zeros((4, 2)), jnp.array([1.0, 2.0]))
  np.testing.assert_allclose(state.params['w'], [0.2, 0.4], rtol=1e-6)


def drifting(weights, batch):
  """Learns towards the batch; `old_kl` says how far the weights have gone from 0."""
  error = jnp.sum((weights['w'][None] - batch) ** 2)
  return error, jnp.float32(1), {'old_kl': (jnp.abs(weights['w']).max(), jnp.float32(1))}


@pytest.mark.parametrize('max_kl, made', [(None, 8), (0.35, 5), (0.0, 2), (100.0, 8)])
def test_updates_end_where_the_policy_has_moved_enough(max_kl, made):
  tx = optax.sign_sgd(0.1)  # the k-th update finds the weights at 0.1 (k - 1)
  state = init_state({'w': jnp.zeros(2)}, tx)
  batches = [jnp.full((1, 2), 9.0)] * 8
  state, last, broken = run_updates(make_update(drifting, tx), state, batches, max_kl=max_kl)
  assert (int(state.step), last['updates'], broken) == (made, made, 0)
  assert made == 8 or last['old_kl'] > max_kl


def test_updates_count_what_is_not_finite_and_not_what_is_empty():
  tx, good = optax.sgd(0.1), jnp.ones((2, 3))
  state = init_state({'w': jnp.zeros(3)}, tx)
  batches = [good, good.at[0, 0].set(jnp.nan), good * jnp.inf, good]
  _, _, broken = run_updates(make_update(square, tx), state, batches)
  assert broken == 2
  empty = dataclasses.replace(token_batch(), loss_mask=jnp.zeros((B, T)))
  update = make_update(CASES['sft'][0], tx)
  state, _, broken = run_updates(update, init_state(copied(params()), tx), [empty])
  assert (int(state.empty), int(state.skipped), broken) == (1, 0, 0)


def test_a_limit_that_nothing_measures_is_refused():
  tx = optax.sgd(0.1)
  state = init_state({'w': jnp.zeros(3)}, tx)
  with pytest.raises(ValueError, match=r'max_kl=0.1 .*old_kl'):
    run_updates(make_update(square, tx, donate=False), state, [jnp.ones((2, 3))], max_kl=0.1)
  with pytest.raises(ValueError, match='empty'):
    run_updates(make_update(square, tx), state, [])


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
    moments = optax.tree_utils.tree_get(before.opt_state, 'mu')
    assert moments == before.params  # laid out like the parameters they belong to
    return losses

  mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ('data', 'fsdp'))
  by_row = NamedSharding(mesh, PartitionSpec('data'))
  update = make_update(loss_fn, tx, accumulate=accumulate)
  sharded = run(lambda p: fsdp(mesh, p), lambda b: jax.device_put(b, by_row), update)
  once = len(traced)
  assert once <= accumulate  # one trace; accumulation takes a look at the shapes before
  single = run(lambda p: p, lambda b: b, make_update(loss_fn, tx))
  np.testing.assert_allclose(sharded, single, rtol=1e-5)


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
    ({'optimizer': 'adam'}, "'adam'.*adamw, adafactor, lion or sgd"),
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


@pytest.mark.parametrize('name', ['adafactor', 'lion', 'sgd'])
def test_other_optimisers_of_optax_by_name(name):
  tx = fit.optimizer(OptimConfig(optimizer=name, lr=0.02, steps=200, weight_decay=0.1))
  state = init_state({'w': jnp.zeros(3), 'norm': jnp.ones(2)}, tx)

  def loss(weights, batch):
    return jnp.sum((weights['w'] - batch[0]) ** 2), jnp.float32(1), {}

  update = make_update(loss, tx)
  for _ in range(200):
    state, metrics = update(state, jnp.array([[1.0, -2.0, 0.5]]))
  assert metrics['loss'] < 0.1 and metrics['skipped'] == 0
  np.testing.assert_array_equal(state.params['norm'], 1.0)  # no gradient, and no decay
  moments = sum(x.size for x in jax.tree.leaves(state.opt_state) if x.ndim)
  assert moments < 2 * 5 + 4  # AdamW has two for each weight


def test_the_clip_bounds_the_gradient():
  tx = optim.make_optimizer(0.1, steps=10, clip=1.0, b1=0.0)
  huge = {'w': jnp.array([3e6, 4e6])}
  _, state = tx.update(huge, tx.init(huge), huge)
  moment = optax.tree_utils.tree_get(state, 'mu')['w']
  np.testing.assert_allclose(moment, [0.6, 0.8], rtol=1e-5)
