"""Log-probabilities and objectives: their formulas, blind to padding, packing and order."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from learn_cases import (
  CASES,
  CONFIG,
  CRITIC,
  MODEL,
  B,
  T,
  V,
  actor_critic,
  assert_close,
  every_loss,
  mean_loss_and_gradient,
  now_logprobs,
  pair_batch,
  params,
  prm_params,
  rollout_batch,
  rows,
  step_batch,
  token_batch,
)

from o1jax.batch import PairBatch, TokenBatch
from o1jax.learn import logprobs, objectives
from o1jax.models.heads import ScalarHead
from o1jax.models.transformer import Model


def test_logprobs_are_those_of_each_prefix():
  tokens, positions, segments, _ = rows()
  actual = now_logprobs(tokens, positions, segments)
  assert actual.dtype == jnp.float32
  weights = params()
  read = jax.jit(lambda *prefix: MODEL.logits(weights, MODEL.hidden(weights, *prefix)))
  for b, t in ((0, 1), (1, 4), (3, 5)):
    prefix = (x * (np.arange(T) < t) for x in (tokens, positions, segments))
    logits = np.asarray(read(*prefix)[b, t - 1], np.float64)
    expected = logits[tokens[b, t]] - np.log(np.exp(logits).sum())
    np.testing.assert_allclose(actual[b, t], expected, rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(actual[:, 0], 0.0)
  np.testing.assert_array_equal(actual[segments == 0], 0.0)


@pytest.mark.parametrize('chunk', [1, 4, 11])
def test_chunks_change_neither_value_nor_gradient(chunk):
  tokens, positions, segments, mask = rows()

  def total(weights, chunk):
    out = logprobs.token_logprobs(MODEL, weights, tokens, positions, segments, chunk)
    return jnp.sum(mask * out)

  both = jax.jit(jax.value_and_grad(total), static_argnums=1)
  assert_close(both(params(), chunk), both(params(), None), 2e-5)


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
    def grad(w):
      return jax.grad(total)(w, chunk)

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


def test_packing_changes_nothing_for_ppo():
  loss_fn, make, build = CASES['ppo_critic']
  batch = dataclasses.replace(build(), imitate=jnp.zeros(B))  # weighs whole rows

  def pack(name, x):
    if x.ndim == 1:
      return x[: B // 2]
    first, second = x[: B // 2], x[B // 2 :]
    if name == 'segments':
      second = jnp.where(second > 0, 2, 0)
    return jnp.concatenate([first, second], axis=1)

  packed = {f.name: pack(f.name, getattr(batch, f.name)) for f in dataclasses.fields(batch)}
  one, other = (mean_loss_and_gradient(loss_fn, make(), b) for b in (batch, type(batch)(**packed)))
  assert_close(one, other, 2e-5)


def test_what_nothing_predicts_counts_for_nothing():
  tokens, positions, segments, _ = map(jnp.asarray, rows())
  everything = TokenBatch(tokens, positions, segments, jnp.ones((B, T)))
  loss, count, _ = CASES['sft'][0](params(), everything)
  assert count == segments.sum() - B  # neither padding nor the first token of a row
  np.testing.assert_allclose(loss, -now_logprobs(tokens, positions, segments).sum(), rtol=1e-5)


def test_sequence_logprobs_sum_the_answer():
  batch = token_batch()
  expected = now_logprobs(batch.tokens, batch.positions, batch.segments) * batch.loss_mask
  actual = logprobs.sequence_logprobs(MODEL, params(), batch)
  np.testing.assert_allclose(actual, np.sum(expected, -1), rtol=1e-6)


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
  batch = {'sft': token_batch, 'dpo': pair_batch, 'ppo': rollout_batch}[name]()
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
  if name.startswith('prm'):
    fixed = {'pairs': batch.pairs, 'pair_weights': batch.pair_weights}
    place = jnp.asarray(np.argsort(order), jnp.int32)
    fixed['pairs'] = jnp.concatenate([place[batch.pairs[:, :2]], batch.pairs[:, 2:]], 1)
  moved = jax.tree.map(lambda x: x[order] if x.shape[0] == B else x, batch)
  moved = dataclasses.replace(moved, **fixed) if name.startswith('prm') else moved
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
  loss_fn = jax.jit(objectives.dpo_loss(MODEL, nll=0.5))
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
  scores = objectives.step_scores(MODEL, prm_params(), batch)
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


@pytest.mark.parametrize('name', ['advantages', 'old_logprobs', 'ref_logprobs', 'imitate'])
def test_ppo_refuses_what_is_not_float32(name):
  batch = rollout_batch()
  for dtype in (jnp.int32, jnp.bfloat16):
    wrong = dataclasses.replace(batch, **{name: getattr(batch, name).astype(dtype)})
    with pytest.raises(AssertionError, match='float32'):
      CASES['ppo_rows'][0](params(), wrong)


def test_ppo_sequence_mean_weighs_rows_alike():
  batch = rollout_batch()
  loss, count, _ = CASES['ppo_rows'][0](params(), batch)
  assert count == B
  by_token, rows_alone = jax.jit(objectives.ppo_loss(MODEL)), []
  for b in range(B):
    row = jax.tree.map(lambda x, b=b: x[b : b + 1], batch)
    total, n, _ = by_token(params(), row)
    rows_alone.append(total / n)
  np.testing.assert_allclose(loss, sum(rows_alone), rtol=1e-5)
