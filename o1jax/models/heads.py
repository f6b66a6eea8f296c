"""Read-outs on a decoder's hidden states: the critic's scalar and the PRM's step scores.

Pure `init` / `apply` pairs on float32 parameters. A fresh `ScalarHead` says 0 everywhere; a fresh
`StepHead` scores a step by the log-probability that its trunk, still the policy, gives it; a fresh
`TokenHead` asks the language model itself. Scores of steps are log-odds: r_j = sigmoid(score_j).
Shapes: B rows, T tokens, M steps, R search rows, t tokens of one step, D width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from o1jax.models.config import ModelConfig

HeadParams = dict[str, jax.Array]


class ScalarHead:
  """One number for each hidden state: value[...] = w . h[..., :] + b."""

  @staticmethod
  def init(config: ModelConfig, key: jax.Array | None = None) -> HeadParams:
    """Zeros {'kernel': [D], 'bias': []}; `key` is taken for a uniform signature only."""
    del key
    return {'kernel': jnp.zeros((config.hidden_size,)), 'bias': jnp.zeros(())}

  @staticmethod
  def apply(params: HeadParams, hidden: jax.Array) -> jax.Array:
    """hidden [..., D] -> values [...] float32."""
    return hidden.astype(jnp.float32) @ params['kernel'] + params['bias']


class StepHead:
  """The score of a reasoning step, from the states before its tokens.

      score_j = w . h[last token of j] + b + sum_{t in j} (a log p(x_t) + h[t - 1]^T W e(x_t))

  with p the trunk's own next-token distribution and a = 1, W = 0, w = 0 at the start: the head
  begins as what the policy thinks of the step and learns where that is wrong. The bilinear term
  judges every token as an action in the state before it; a plain last-token head learns several
  times slower.
  """

  @staticmethod
  def init(config: ModelConfig, key: jax.Array | None = None) -> HeadParams:
    """{'kernel': [D], 'bias': [], 'bilinear': [D, D]} zeros, 'logprob': [] one; no `key` needed."""
    d = config.hidden_size
    extra = {'bilinear': jnp.zeros((d, d)), 'logprob': jnp.ones(())}
    return ScalarHead.init(config, key) | extra

  @staticmethod
  def apply(
    params: HeadParams,
    hidden: jax.Array,
    embeddings: jax.Array,
    logprobs: jax.Array,
    step_ids: jax.Array,
    num_steps: int,
  ) -> jax.Array:
    """Scores of all steps of a row.

    Args:
      params: from `init`.
      hidden: [B, T, D] after the final norm.
      embeddings: [B, T, D], the trunk's embedding of each token.
      logprobs: [B, T] float32, the trunk's log-probability of each token.
      step_ids: [B, T] int32, j for the tokens of step j (1..M, contiguous), else 0.
      num_steps: M.

    Returns:
      [B, M] float32 in column j - 1; 0 where a row has no step j.
    """
    before = jnp.pad(hidden[:, :-1], ((0, 0), (1, 0), (0, 0)))
    following = jnp.pad(step_ids[:, 1:], ((0, 0), (0, 1)))
    scores = _token_scores(params, before, hidden, embeddings, logprobs, step_ids != following)
    steps = jnp.arange(1, num_steps + 1)
    members = (step_ids[:, :, None] == steps[None, None, :]).astype(jnp.float32)
    return jnp.einsum('bt,btm->bm', scores, members)

  @staticmethod
  def apply_step(
    params: HeadParams,
    previous: jax.Array,
    hidden: jax.Array,
    embeddings: jax.Array,
    logprobs: jax.Array,
    mask: jax.Array,
  ) -> jax.Array:
    """Score of one new step a row, as search meets it; equals `apply` on the whole row.

    Args:
      params: from `init`.
      previous: [R, D], hidden state of the last token before the step.
      hidden: [R, t, D] and
      embeddings: [R, t, D] and
      logprobs: [R, t] of the step's tokens.
      mask: [R, t] bool, true on the step's tokens, which come first.

    Returns:
      [R] float32; 0 where a row's mask is empty.
    """
    before = states_before(previous, hidden)
    last = mask & ~jnp.pad(mask[:, 1:], ((0, 0), (0, 1)))
    scores = _token_scores(params, before, hidden, embeddings, logprobs, last)
    return jnp.sum(jnp.where(mask, scores, 0.0), axis=1)


class TokenHead:
  """The score of a reasoning step as a word: "good" against "bad" where the step ends.

      score_j = h[last token of j] . (u_good - u_bad)

  `u` are rows of the output layer, so r_j = sigmoid(score_j) is the probability of the
  good token among the two, in the state after the step's closing tag (the way of
  O1-CODER's released PRM). Departures from it: the rows are copied out of the language
  model and trained as the head's own; and the closing tag of a step takes the part of the
  word " Rating", which a problem's statement may contain.
  """

  @staticmethod
  def init(output: jax.Array, good: int, bad: int) -> HeadParams:
    """{'good': [D], 'bad': [D]} from the output layer.

    Args:
      output: [V, D], from `Model.output_rows`.
      good: token id that speaks for a step.
      bad: token id that speaks against it.

    Raises:
      ValueError: the two ids are one.
    """
    if good == bad:
      raise ValueError(f'good={good} and bad={bad} are one token; choose two')
    return {'good': output[good].astype(jnp.float32), 'bad': output[bad].astype(jnp.float32)}

  @staticmethod
  def apply(
    params: HeadParams,
    hidden: jax.Array,
    embeddings: jax.Array,
    logprobs: jax.Array,
    step_ids: jax.Array,
    num_steps: int,
  ) -> jax.Array:
    """Scores of all steps of a row; arguments and result as `StepHead.apply`."""
    del embeddings, logprobs
    following = jnp.pad(step_ids[:, 1:], ((0, 0), (0, 1)))
    ends = jnp.where(step_ids != following, step_ids, 0)
    steps = jnp.arange(1, num_steps + 1)
    last = (ends[:, :, None] == steps[None, None, :]).astype(jnp.float32)
    return jnp.einsum('bt,btm->bm', TokenHead._log_odds(params, hidden), last)

  @staticmethod
  def apply_step(
    params: HeadParams,
    previous: jax.Array,
    hidden: jax.Array,
    embeddings: jax.Array,
    logprobs: jax.Array,
    mask: jax.Array,
  ) -> jax.Array:
    """Score of one new step a row; arguments and result as `StepHead.apply_step`."""
    del previous, embeddings, logprobs
    last = mask & ~jnp.pad(mask[:, 1:], ((0, 0), (0, 1)))
    return jnp.sum(jnp.where(last, TokenHead._log_odds(params, hidden), 0.0), axis=1)

  @staticmethod
  def _log_odds(params: HeadParams, hidden: jax.Array) -> jax.Array:
    return hidden.astype(jnp.float32) @ (params['good'] - params['bad'])


def step_head_of(params: HeadParams) -> type[StepHead] | type[TokenHead]:
  """The step read-out that parameters belong to, told by their names."""
  return TokenHead if 'good' in params else StepHead


def states_before(previous: jax.Array, hidden: jax.Array) -> jax.Array:
  """The state that each token of a step was written in: [R, D] and [R, t, D] -> [R, t, D]."""
  return jnp.concatenate([previous[:, None], hidden[:, :-1]], axis=1)


def _token_scores(params, before, hidden, embeddings, logprobs, is_last) -> jax.Array:
  """What each token adds to its step's score, [B, T] float32."""
  before, embeddings = before.astype(jnp.float32), embeddings.astype(jnp.float32)
  actions = jnp.sum((before @ params['bilinear']) * embeddings, axis=-1)
  actions += params['logprob'] * logprobs.astype(jnp.float32)
  return actions + jnp.where(is_last, ScalarHead.apply(params, hidden), 0.0)
