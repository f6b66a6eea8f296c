"""Sampled groups of paths with rewards, as the batch that PPO reads."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from o1jax import rewards
from o1jax.batch import RolloutBatch
from o1jax.config import RlConfig
from o1jax.data.paths import step_ids_of
from o1jax.losses import ppo
from o1jax.losses import returns as returns_lib
from o1jax.stages.context import Run
from o1jax.stages.drawn import Drawn, Verdicts
from o1jax.stages.prm import score_paths
from o1jax.types import ACCEPTED, Problem, Step

KL = {'k1': returns_lib.kl_k1, 'k2': returns_lib.kl_k2, 'k3': returns_lib.kl_k3}


@dataclasses.dataclass(frozen=True)
class Rollouts:
  """Groups of sampled paths: rows `i * group .. (i + 1) * group` answer problem i."""

  problems: list[Problem]
  paths: list[tuple[Step, ...]]
  outcome: np.ndarray  # [B] float32, R by the TCG's tests
  valid: np.ndarray  # [B] float32, 0 where the verdict says nothing
  process: np.ndarray  # [B, M] float32, the PRM's r of each step
  mask: np.ndarray  # [B, M] float32
  tokens: np.ndarray  # [B, T] int32, prompt and path
  generated: np.ndarray  # [B, T] bool
  logprobs: np.ndarray  # [B, T] float32
  step_ids: np.ndarray  # [B, T] int32
  sampled_tokens: int
  version: int  # iterations that the sampling policy had learnt from


def roll_out(run: Run, prm: Any, drawn: Drawn) -> Rollouts:
  """The rewards of drawn paths; they are scored while their programs run.

  A path that was cut off, or has more than `search.depth_limit` steps, is worth `rl.tau_fail` and
  nothing for its process: reasoning that does not come to a program must not pay.
  """
  config, steps = run.config.rl, run.config.search.depth_limit
  scored = score_paths(run, prm, drawn.repeated, drawn.paths)
  verdicts = drawn.verdicts.result()
  ended = [
    v is not None and len(path) <= steps for v, path in zip(verdicts, drawn.paths, strict=True)
  ]
  rates = [v.pass_rate if e else 0.0 for v, e in zip(verdicts, ended, strict=True)]
  valid = np.array([v is None or not v.masked for v in verdicts], np.float32)
  process = np.zeros((len(drawn.paths), steps), np.float32)
  mask = np.zeros_like(process)
  for row, (scores, path) in enumerate(zip(scored, drawn.paths, strict=True)):
    if ended[row]:
      odds = np.maximum(scores, -700.0)  # float64's exp goes no further
      process[row, : len(scores)] = 1.0 / (1.0 + np.exp(-odds))
    mask[row, : max(1, min(len(path), steps))] = 1.0
  tokens, generated, logprobs = _rows(run, drawn)
  step_ids = step_ids_of(tokens, generated, run.tokenizer.step_end_id, run.tokenizer.eos_id)
  return Rollouts(
    drawn.repeated,
    drawn.paths,
    rewards.outcome(np.array(rates, np.float32), config.tau_pass, config.tau_fail),
    valid,
    process,
    mask,
    tokens,
    generated,
    logprobs,
    np.minimum(step_ids, steps),
    int(drawn.lengths.sum()),
    drawn.version,
  )


def _rows(run: Run, drawn: Drawn):
  """Tokens, which of them are generated, log-probabilities: [B, T] each, prompt and path."""
  count, width = len(drawn.lengths), run.row_tokens
  tokens = np.zeros((count, width), np.int32)
  generated = np.zeros((count, width), bool)
  logprobs = np.zeros((count, width), np.float32)
  for row, (problem, length) in enumerate(zip(drawn.repeated, drawn.lengths, strict=True)):
    prompt = run.encoder.prompt(problem)
    start = len(prompt)
    tokens[row, :start] = prompt
    tokens[row, start : start + length] = drawn.tokens[row, :length]
    generated[row, start : start + length] = True
    logprobs[row, start : start + length] = drawn.logprobs[row, :length]
  return tokens, generated, logprobs


def aggregate(config: RlConfig, rollouts: Rollouts, alpha: float) -> tuple[np.ndarray, np.ndarray]:
  """phi of each path [B] and its additive step rewards [B, M], float32."""
  args = (rollouts.outcome, rollouts.process, rollouts.mask, alpha, config.gamma)
  phi, step_rewards = rewards.phi(*args), rewards.step_rewards(*args)
  chex.assert_type([phi, step_rewards], jnp.float32)
  return phi, step_rewards


@functools.partial(jax.jit, static_argnames='normalise')
def _group_advantages(step_rewards, mask, step_ids, normalise):
  """[P, G, M] step rewards -> [P, G, T] advantages relative to the group."""
  relative = functools.partial(returns_lib.group_step_advantages, normalise=normalise)
  togo = jax.vmap(jax.vmap(lambda r, m: returns_lib.returns_to_go(r, m)))(step_rewards, mask)
  advantages = jax.vmap(relative)(togo, mask)
  return jax.vmap(jax.vmap(returns_lib.to_tokens))(advantages, step_ids)


@jax.jit
def _gae(step_rewards, penalty, step_ids, values, mask, lam):
  """Token-level GAE: [B, M], then [B, T] each -> advantages [B, T]."""
  per_token = jax.vmap(returns_lib.at_last_token)(step_rewards, step_ids) - penalty
  run = lambda r, v, m: returns_lib.gae(r, v, m, 1.0, lam)  # noqa: E731
  return jax.vmap(run)(per_token, values, mask)


@jax.jit
def _step_gae(step_rewards, step_mask, step_ids, values, lam):
  """Step-level GAE: [B, M] twice, [B, T] twice -> advantages and targets [B, T]."""
  run = lambda r, v, i, m: returns_lib.step_gae(r, v, i, m, 1.0, lam)  # noqa: E731
  return jax.vmap(run)(step_rewards, values, step_ids, step_mask)


def _advantages(config: RlConfig, rollouts: Rollouts, step_rewards, penalty, mask, values):
  """Advantages and the critic's targets, [B, T] each; `penalty` [B, T] is taken off the rewards."""
  step_ids, step_mask = rollouts.step_ids, rollouts.mask * rollouts.valid[:, None]
  by_token = values is not None and config.gae == 'token'
  if penalty.any() and not by_token:
    sums = functools.partial(returns_lib.over_steps, num_steps=step_rewards.shape[1])
    step_rewards = step_rewards - np.asarray(jax.vmap(sums)(penalty, step_ids))
  if values is None:
    grouped = [
      x.reshape(-1, config.group, x.shape[-1]) for x in (step_rewards, step_mask, step_ids)
    ]
    found = _group_advantages(*map(jnp.asarray, grouped), normalise=config.normalise)
    advantages = targets = np.asarray(found).reshape(mask.shape)
  elif by_token:
    lam = config.gae_lambda
    advantages = np.asarray(_gae(step_rewards, penalty, step_ids, values, mask, lam))
    targets = advantages + values
  else:
    found = _step_gae(step_rewards, step_mask, step_ids, values, config.gae_lambda)
    advantages, targets = map(np.asarray, found)
  if config.whiten:
    advantages = np.asarray(returns_lib.whiten(jnp.asarray(advantages * mask), jnp.asarray(mask)))
  return advantages, targets


@functools.partial(jax.jit, static_argnames='cap')
def _truncated(now, behaviour, mask, cap):
  """Importance weights [B, T] of rollouts that an older policy sampled."""
  weights = functools.partial(ppo.importance_weights, cap=cap)
  return jax.vmap(weights)(now, behaviour, mask)


def rollout_batch(
  config: RlConfig,
  rollouts: Rollouts,
  alpha: float,
  *,
  ref_logprobs: np.ndarray,
  values: np.ndarray | None,
  now_logprobs: np.ndarray | None = None,
) -> RolloutBatch:
  """The batch of one iteration; with `values` [B, T] by GAE, else relative to the group.

  Args:
    config: of the stage.
    rollouts: groups of `config.group` rows.
    alpha: weight of the outcome.
    ref_logprobs: [B, T] float32, of the reference.
    values: [B, T] float32, the critic's, or None without one.
    now_logprobs: [B, T] float32, of the policy before the first update, where the rollouts
      may be an older one's: the ratio is then kept close to it, and the advantages carry
      importance weights of at most `config.importance_cap`.
  """
  _, step_rewards = aggregate(config, rollouts, alpha)
  mask = rollouts.generated.astype(np.float32) * rollouts.valid[:, None]
  values = None if values is None else values * mask
  old, penalty = rollouts.logprobs * mask, np.zeros_like(mask)
  if config.kl_coef and config.kl_in == 'reward':
    kl = KL[config.kl_estimator](jnp.asarray(old), jnp.asarray(ref_logprobs * mask))
    penalty = np.asarray(config.kl_coef * kl)
  advantages, targets = _advantages(config, rollouts, step_rewards, penalty, mask, values)
  if now_logprobs is not None:
    now_logprobs = now_logprobs * mask
    weights = _truncated(now_logprobs, old, mask, cap=config.importance_cap)
    advantages, old = advantages * np.asarray(weights), now_logprobs
  positions = np.broadcast_to(np.arange(mask.shape[1], dtype=np.int32), mask.shape).copy()
  used = np.arange(mask.shape[1])[None] < (rollouts.generated.cumsum(1).argmax(1) + 1)[:, None]
  solved = rollouts.outcome >= config.tau_pass
  return RolloutBatch(
    tokens=rollouts.tokens,
    positions=positions,
    segments=used.astype(np.int32),
    step_ids=rollouts.step_ids,
    mask=mask,
    old_logprobs=old,
    ref_logprobs=ref_logprobs * mask,
    old_values=np.zeros_like(mask) if values is None else values.astype(np.float32),
    advantages=(advantages * mask).astype(np.float32),
    returns=(targets * mask).astype(np.float32),
    imitate=(config.imitation_coef * solved).astype(np.float32),
    version=np.full(len(mask), rollouts.version, np.int32),
  )


def refutations(
  config: RlConfig, rollouts: Rollouts, own: Verdicts
) -> Iterator[tuple[Problem, int]]:
  """Problems for which a wrong program was paid as solved, and the first own test that it fails."""
  for problem, outcome, verdict in zip(rollouts.problems, rollouts.outcome, own, strict=True):
    if outcome >= config.tau_pass and verdict is not None and not verdict.masked:
      failed = [i for i, test in enumerate(verdict.tests) if test.status != ACCEPTED]
      if failed and problem.tests:
        yield problem, failed[0]


def summary(config: RlConfig, rollouts: Rollouts, alpha: float, own: Verdicts) -> dict[str, float]:
  """Means over the rollouts of an iteration, for its line of metrics.

  `undeserved` is the share that is paid as solved and fails the problem's own tests (`own`): where
  it grows, the policy has found out what the generated tests do not see.
  """
  phi, _ = aggregate(config, rollouts, alpha)
  failed = np.array([v is None or not (v.masked or v.status == ACCEPTED) for v in own])
  undeserved = failed & (rollouts.outcome >= config.tau_pass)
  real = np.maximum(rollouts.mask.sum(), 1.0)
  return {
    'outcome': float(rollouts.outcome.mean()),
    'undeserved': float(undeserved.mean()),
    'phi': float(phi.mean()),
    'process': float((rollouts.process * rollouts.mask).sum() / real),
    'alpha': alpha,
    'path_tokens': rollouts.sampled_tokens / len(rollouts.paths),
    'masked': float((1.0 - rollouts.valid).sum()),
  }
