"""Device batches: frozen pytrees whose fields carry their shapes.

Legend: B rows, T tokens, M steps a row, P pairs. Token t of a row is predicted
from the tokens before it, so everything per token is aligned with the token
it speaks of: `logprobs[b, t] = log p(tokens[b, t] | tokens[b, :t])`.
Rows are padded on the right; padding has `segments == 0`.
"""

from __future__ import annotations

import dataclasses

import jax


def _pytree(cls):
  return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


@_pytree
class TokenBatch:
  """Tokens to read, and which of them to learn."""

  tokens: jax.Array  # [B, T] int32
  positions: jax.Array  # [B, T] int32, restarts at 0 with every segment
  segments: jax.Array  # [B, T] int32, 0 padding, 1.. packed documents
  loss_mask: jax.Array  # [B, T] float32, weight of predicting tokens[b, t]


@_pytree
class PairBatch:
  """Preference pairs; row b of both sides answers the same prompt."""

  chosen: TokenBatch
  rejected: TokenBatch
  ref_chosen: jax.Array  # [B] float32, summed reference log-prob of the answer
  ref_rejected: jax.Array  # [B] float32


@_pytree
class StepBatch:
  """Trajectories with step labels, to train or to ask a process reward model.

  `step_ids[b, t]` is j for the tokens of step j (1..M) and 0 for the prompt
  and padding. `pairs` names siblings inside the batch: rows `win` and `lose`
  agree up to step `step - 1` and differ at step `step`.
  """

  tokens: jax.Array  # [B, T] int32
  positions: jax.Array  # [B, T] int32
  segments: jax.Array  # [B, T] int32
  step_ids: jax.Array  # [B, T] int32
  labels: jax.Array  # [B, M] float32 in [0, 1]
  weights: jax.Array  # [B, M] float32, 0 where there is no such step
  pairs: jax.Array  # [P, 3] int32: win row, lose row, step (1-based)
  pair_weights: jax.Array  # [P] float32, 0 for padding


@_pytree
class RolloutBatch:
  """Sampled trajectories with everything PPO needs about them.

  `mask` is 1 on generated tokens only; every float is float32 and zero outside
  `mask`. `version` is the policy update count that sampled the row.
  """

  tokens: jax.Array  # [B, T] int32
  positions: jax.Array  # [B, T] int32
  segments: jax.Array  # [B, T] int32
  step_ids: jax.Array  # [B, T] int32
  mask: jax.Array  # [B, T] float32
  old_logprobs: jax.Array  # [B, T] float32, of the sampling policy
  ref_logprobs: jax.Array  # [B, T] float32, of the reference policy
  old_values: jax.Array  # [B, T] float32, critic before the update
  advantages: jax.Array  # [B, T] float32
  returns: jax.Array  # [B, T] float32
  imitate: jax.Array  # [B] float32, weight of the NLL term on this row
  version: jax.Array  # [B] int32
