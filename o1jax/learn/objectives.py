"""Loss functions for `update.make_update`: a model, a batch type and a loss, bound together.

Each builder returns `loss_fn(params, batch) -> (sum, count, metrics)` with `metrics`
mapping a name to (sum, count). Settings are closed over, so they are constants of the
compiled step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from o1jax.batch import PairBatch, RolloutBatch, StepBatch, TokenBatch
from o1jax.learn import logprobs as lp
from o1jax.learn.update import LossFn
from o1jax.losses import dpo, ppo, prm, returns, sft
from o1jax.models.heads import ScalarHead, step_head_of
from o1jax.models.transformer import Model

# Integer rewards would truncate, and bfloat16 ratios would round to 1.
_ROLLOUT_FLOATS = (
  'mask',
  'old_logprobs',
  'ref_logprobs',
  'old_values',
  'advantages',
  'returns',
  'imitate',
)
# (critic params, hidden [B, T, D] of the policy, batch) -> [B, T] values, aligned:
# entry t is the value of the state before token t.
ValueFn = Callable[[Any, jax.Array, RolloutBatch], jax.Array]


def sft_loss(model: Model, *, chunk: int | None = None) -> LossFn:
  """Weighted NLL of a `TokenBatch`, packed or not; mean over the weights."""

  def loss_fn(params: Any, batch: TokenBatch):
    logprobs = lp.token_logprobs(
      model, params, batch.tokens, batch.positions, batch.segments, chunk
    )
    loss, count = jax.vmap(sft.nll_loss)(logprobs, _weights(batch))
    return loss.sum(), count.sum(), {}

  return loss_fn


def dpo_loss(
  model: Model,
  beta: float = 0.1,
  *,
  nll: float = 0.0,
  preference: float = 1.0,
  label_smoothing: float = 0.0,
  ipo: bool = False,
  length_normalised: bool = False,
  chunk: int | None = None,
) -> LossFn:
  """Preference loss of a `PairBatch`, mean over pairs; padded pairs have empty masks.

  `preference * dpo(margin) + nll * NLL(chosen) / |chosen|` for each pair: the NLL
  term (Pang et al. 2024, arXiv 2404.19733) keeps the chosen answer likely. With
  `preference=0` it is the control: SFT on the chosen answers of the same pairs.

  Args:
    model: the static model.
    beta: weight of the implicit KL to the reference.
    nll: weight of the NLL term.
    preference: weight of the preference term.
    label_smoothing: share of labels taken to be flipped (sigmoid loss only).
    ipo: squared loss in place of the sigmoid.
    length_normalised: margins of means over tokens in place of sums.
    chunk: as in `logprobs.token_logprobs`.

  Raises:
    ValueError: `label_smoothing` together with `ipo`.
  """
  if ipo and label_smoothing:
    raise ValueError(f'label_smoothing={label_smoothing} has no meaning with ipo; set it to 0')

  def pair_loss(margin):
    return dpo.ipo_loss(margin, beta) if ipo else dpo.dpo_loss(margin, beta, label_smoothing)

  def loss_fn(params: Any, batch: PairBatch):
    chex.assert_type([batch.ref_chosen, batch.ref_rejected], jnp.float32)
    chosen, tokens = _answer(model, params, batch.chosen, chunk)
    pair = (tokens > 0).astype(jnp.float32)
    count, mean_nll = pair.sum(), -chosen / jnp.maximum(tokens, 1.0)
    loss, metrics = nll * mean_nll, {'nll': (jnp.sum(pair * mean_nll), count)}
    if preference:
      rejected, rejected_tokens = _answer(model, params, batch.rejected, chunk)
      lengths = (tokens, rejected_tokens) if length_normalised else ()
      margin = jax.vmap(dpo.margin)(
        chosen, rejected, batch.ref_chosen, batch.ref_rejected, *lengths
      )
      loss += preference * jax.vmap(pair_loss)(margin)
      metrics |= {
        'margin': (jnp.sum(pair * margin), count),
        'accuracy': (jnp.sum(pair * (margin > 0)), count),
        'chosen_gain': (jnp.sum(pair * (chosen - batch.ref_chosen)), count),
      }
    return jnp.sum(pair * loss), count, metrics

  return loss_fn


def step_scores(model: Model, params: Any, batch: StepBatch) -> jax.Array:
  """Scores before the sigmoid of all steps of a batch: [B, M] float32.

  `params` is {'trunk': policy-shaped, 'head': of a `StepHead` or a `TokenHead`}.
  """
  hidden = lp.states(model, params['trunk'], batch.tokens, batch.positions, batch.segments)
  embeddings = model.embed(params['trunk'], batch.tokens)
  logprobs = lp.over_columns(model, params['trunk'], hidden, batch.tokens, lp.target_logprobs)
  num_steps = batch.labels.shape[1]
  head = step_head_of(params['head'])
  return head.apply(params['head'], hidden, embeddings, logprobs, batch.step_ids, num_steps)


def prm_loss(model: Model, pair_coef: float = 1.0, point_coef: float = 1.0) -> LossFn:
  """Process reward loss of a `StepBatch`: point-wise BCE and Bradley-Terry on siblings.

  A weighted mean over everything that is judged: a label counts `point_coef` times its
  weight, a pair `pair_coef` times its own; one coefficient 0 leaves the other loss alone.
  """

  def loss_fn(params: Any, batch: StepBatch):
    scores = step_scores(model, params, batch)
    point, labels = jax.vmap(prm.pointwise_loss)(scores, batch.labels, batch.weights)
    column = jnp.maximum(batch.pairs[:, 2] - 1, 0)  # padding says step 0
    win, lose = scores[batch.pairs[:, 0], column], scores[batch.pairs[:, 1], column]
    pair, pairs = prm.pairwise_loss(win, lose, batch.pair_weights)
    metrics = {
      'point_loss': (point.sum(), labels.sum()),
      'pair_loss': (pair, pairs),
      'pair_accuracy': (jnp.sum(batch.pair_weights * (win > lose)), pairs),
      'pair_weight': (pairs, jnp.ones(())),
    }
    loss = point_coef * point.sum() + pair_coef * pair
    return loss, point_coef * labels.sum() + pair_coef * pairs, metrics

  return loss_fn


def ppo_loss(
  model: Model,
  *,
  clip_low: float = 0.2,
  clip_high: float = 0.2,
  negative_scale: float = 1.0,
  kl_coef: float = 0.0,
  kl: Callable[[jax.Array, jax.Array], jax.Array] = returns.kl_k3,
  entropy_coef: float = 0.0,
  sequence_mean: bool = False,
  value_fn: ValueFn | None = None,
  value_coef: float = 0.5,
  value_clip: float | None = 0.2,
  chunk: int | None = None,
) -> LossFn:
  """Clipped policy loss of a `RolloutBatch`, mean over the generated tokens.

  For each token: policy loss + `value_coef` * value loss + `kl_coef` * KL to the
  reference - `entropy_coef` * entropy + `imitate` of its row * NLL.

  Args:
    model: the static model of the policy.
    clip_low: largest fall of the ratio below 1.
    clip_high: largest rise above 1.
    negative_scale: factor on negative advantages.
    kl_coef: weight of the KL to the reference in the loss.
    kl: its estimator, one of `returns.kl_k1`, `kl_k2`, `kl_k3`. k1's gradient has mean
      zero, so k1 belongs into the reward, not here.
    entropy_coef: weight of the entropy bonus; 0 does not compute it.
    sequence_mean: average the tokens of each row first, then the rows.
    value_fn: a critic. Params are then {'policy': ..., 'critic': ...} and it is called
      with the critic's; without one, params are the policy's alone.
    value_coef: weight of the critic's loss.
    value_clip: as `ppo.value_loss`.
    chunk: as in `logprobs.token_logprobs`.
  """

  def loss_fn(params: Any, batch: RolloutBatch):
    chex.assert_type([getattr(batch, name) for name in _ROLLOUT_FLOATS], jnp.float32)
    policy = params if value_fn is None else params['policy']
    hidden = lp.states(model, policy, batch.tokens, batch.positions, batch.segments)
    mask = batch.mask * lp.predicted(batch.segments)
    logprobs, entropy = _read(model, policy, hidden, batch.tokens, entropy_coef != 0, chunk)
    logprobs = jnp.where(mask > 0, logprobs, 0.0)
    ratio_args = (logprobs, batch.old_logprobs, batch.advantages, mask, clip_low, clip_high)
    axes = (0, 0, 0, 0, None, None)
    surrogate, tokens = jax.vmap(ppo.policy_loss, (*axes, None))(*ratio_args, negative_scale)
    clipped, _ = jax.vmap(ppo.clip_fraction, axes)(*ratio_args)
    nll, _ = jax.vmap(sft.nll_loss)(logprobs, mask)
    terms = {
      'policy_loss': (1.0, surrogate),
      'kl': (kl_coef, jnp.sum(mask * kl(logprobs, batch.ref_logprobs), -1)),
      'entropy': (-entropy_coef, jnp.sum(mask * entropy, -1)),
      'imitation': (1.0, batch.imitate * nll),
    }
    if value_fn is not None:
      values = value_fn(params['critic'], hidden, batch)
      error, _ = jax.vmap(ppo.value_loss, (0, 0, 0, 0, None))(
        values, batch.old_values, batch.returns, mask, value_clip
      )
      terms['value_loss'] = (value_coef, error)
    drift = jnp.sum(mask * returns.kl_k3(batch.old_logprobs, logprobs), -1)
    seen = {name: sums for name, (_, sums) in terms.items()}
    seen |= {'old_kl': drift, 'clip_fraction': clipped}
    metrics = {name: (sums.sum(), tokens.sum()) for name, sums in seen.items()}
    rows = sum(weight * sums for weight, sums in terms.values())  # [B]
    if sequence_mean:
      real = (tokens > 0).astype(jnp.float32)
      return jnp.sum(real * rows / jnp.maximum(tokens, 1.0)), real.sum(), metrics
    return rows.sum(), tokens.sum(), metrics

  return loss_fn


def value_on_policy(critic: Any, hidden: jax.Array, batch: RolloutBatch) -> jax.Array:
  """A `ValueFn`: a `ScalarHead` on the policy's own states, which it trains along."""
  del batch
  return jnp.pad(ScalarHead.apply(critic, hidden[:, :-1]), ((0, 0), (1, 0)))


def value_on_own_trunk(model: Model) -> ValueFn:
  """A `ValueFn` with a trunk to itself; critic params are {'trunk': ..., 'head': ...}."""

  def value_fn(critic: Any, hidden: jax.Array, batch: RolloutBatch) -> jax.Array:
    del hidden
    own = lp.states(model, critic['trunk'], batch.tokens, batch.positions, batch.segments)
    return value_on_policy(critic['head'], own, batch)

  return value_fn


def _weights(batch: TokenBatch) -> jax.Array:
  """The loss mask without the tokens that nothing predicts: [B, T] float32."""
  return batch.loss_mask * lp.predicted(batch.segments)


def _answer(model: Model, params: Any, batch: TokenBatch, chunk: int | None):
  """Weighted log-probability of each row and its weight: two [B] float32."""
  logprobs = lp.token_logprobs(model, params, batch.tokens, batch.positions, batch.segments, chunk)
  loss, count = jax.vmap(sft.nll_loss)(logprobs, _weights(batch))
  return -loss, count


def _read(model: Model, params: Any, hidden: jax.Array, tokens, with_entropy: bool, chunk):
  """Log-probabilities and (or zeros) entropies of all tokens: two [B, T] float32."""
  if with_entropy:
    return lp.over_columns(model, params, hidden, tokens, lp.target_logprobs_and_entropy, chunk)
  logprobs = lp.over_columns(model, params, hidden, tokens, lp.target_logprobs, chunk)
  return logprobs, jnp.zeros_like(logprobs)
