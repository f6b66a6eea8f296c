"""Sampled groups of paths as the preference pairs that DPO reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from o1jax.batch import PairBatch, TokenBatch
from o1jax.config import RlConfig
from o1jax.data import preferences
from o1jax.data.preferences import Preference
from o1jax.stages.rollouts import Rollouts, aggregate


def pair_batch(
  config: RlConfig,
  rollouts: Rollouts,
  alpha: float,
  ref_logprobs: Callable[[TokenBatch], np.ndarray],
  limit: int,
) -> PairBatch:
  """Pairs by phi, whole paths before siblings, padded by empty pairs to `limit`.

  Args:
    config: of the stage; `pairs` says what is compared.
    rollouts: groups of `config.group` rows.
    alpha: weight of the outcome.
    ref_logprobs: [limit, T] log-probabilities of a batch's tokens under the reference.
    limit: pairs of the batch; more are left out.
  """
  found = choose(config, rollouts, alpha)[:limit]
  sides = [
    _side(rollouts, [getattr(pair, side) for pair in found], [pair.step for pair in found], limit)
    for side in ('chosen', 'rejected')
  ]
  sums = [(ref_logprobs(side) * side.loss_mask).sum(axis=1) for side in sides]
  return PairBatch(*sides, *[np.asarray(s, np.float32) for s in sums])


def choose(config: RlConfig, rollouts: Rollouts, alpha: float) -> list[Preference]:
  """The pairs that `config.pairs` asks for; both of a pair's rows have tokens to compare."""
  phi, _ = aggregate(config, rollouts, alpha)
  found: list[Preference] = []
  if config.pairs != 'siblings':
    found += preferences.of_paths(phi, rollouts.outcome, config.group)
  if config.pairs != 'paths':
    found += [
      pair
      for pair in preferences.of_siblings(
        rollouts.paths, phi, rollouts.valid, config.group, config.pair_margin
      )
      if all(np.any(rollouts.step_ids[row] == pair.step) for row in (pair.chosen, pair.rejected))
    ]
  return found


def _side(rollouts: Rollouts, rows: Sequence[int], steps: Sequence[int], limit: int) -> TokenBatch:
  picked, step = np.zeros(limit, int), np.zeros((limit, 1), int)
  picked[: len(rows)], step[: len(rows), 0] = rows, steps
  real = (np.arange(limit) < len(rows))[:, None]
  wanted = (step == 0) | (rollouts.step_ids[picked] == step)
  mask = rollouts.generated[picked] & real & wanted
  width = mask.shape[1]
  used = np.arange(width) <= (rollouts.generated[picked].cumsum(1).argmax(1))[:, None]
  positions = np.broadcast_to(np.arange(width, dtype=np.int32), mask.shape).copy()
  return TokenBatch(
    rollouts.tokens[picked], positions, used.astype(np.int32), mask.astype(np.float32)
  )
