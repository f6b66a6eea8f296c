"""Step 5: improve the policy on phi(R, r): PPO, group-relative PPO, or iterative DPO."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from o1jax import rewards
from o1jax.batch import RolloutBatch, TokenBatch
from o1jax.config import RlConfig
from o1jax.data import steps as steps_lib
from o1jax.data import stepwise
from o1jax.data.pack import pack
from o1jax.data.pipeline import batches
from o1jax.learn.logprobs import states, token_logprobs
from o1jax.learn.objectives import (
  dpo_loss,
  ppo_loss,
  sft_loss,
  value_on_own_trunk,
  value_on_policy,
)
from o1jax.learn.state import TrainState, init_state
from o1jax.learn.update import LossFn, make_update, run_updates
from o1jax.models import lora
from o1jax.models.heads import ScalarHead
from o1jax.models.transformer import Model
from o1jax.parallel.ambient import spread
from o1jax.parallel.distributed import fetch
from o1jax.parallel.sharding import batch_sharding, shard
from o1jax.run.stop import deferred
from o1jax.stages.context import Run
from o1jax.stages.drawn import Ahead, Arrays, background
from o1jax.stages.evaluate import brief
from o1jax.stages.fit import optimizer, over_frozen, place, stop_if_broken
from o1jax.stages.pairs import pair_batch
from o1jax.stages.policy_sft import verified_documents
from o1jax.stages.rollouts import KL, Rollouts, refutations, roll_out, rollout_batch, summary
from o1jax.stages.synthesis import as_trajectories
from o1jax.types import TestCase, Trajectory


def improve_policy(
  run: Run,
  round_: int,
  policy: Any,
  prm: Any,
  tests: Mapping[str, tuple[TestCase, ...]],
  known: Sequence[Trajectory],
) -> tuple[Any, list[Trajectory]]:
  """The policy after RL, and every rollout of it, judged by the problems' own tests.

  `known` are the roll-outs of the run so far, whose verified paths `rl.replay` trains on.
  """
  name = f'round{round_}/rl'
  store = run.bench.store
  chunks = store.chunks(name, 'trajectories')

  def body() -> dict[str, Any]:
    judged = _judged(run, round_, tests)
    trained, last, tokens = policy, {}, 0
    if judged:
      trained, last, tokens = _train(run, name, round_, policy, prm, judged, known, chunks)
    else:
      run.bench.progress.say(
        f'{name}: skipped: no training problem has confirmed tests; raise tcg.samples, or set '
        'rl.own_tests=true; the policy stays'
      )
    run.save(name, 'policy', trained)
    result = {'sampled_tokens': tokens} | {k: last[k] for k in ('outcome', 'phi') if k in last}
    return result | brief(run, trained, seed=run.config.run.seed * 1000 + round_)

  run.stage(name, f'{run.config.rl.algorithm} on process and outcome rewards', body)
  found = [stepwise.from_row(row) for row in chunks.rows()]
  return run.load(name, 'policy'), found


def _judged(run: Run, round_: int, tests) -> dict[str, tuple[TestCase, ...]]:
  """What judges each problem that RL can use: generated tests, or its own (none: `test_code`)."""
  known, config = run.known_problems(round_), run.config.rl
  own = {p.id: p.tests for p in known if p.tests or p.test_code} if config.own_tests else {}
  judged = own | {p.id: tests[p.id] for p in known if p.id in tests}
  generated = sum(key in tests for key in judged)
  say = run.bench.progress.say
  say(f'{generated} of {len(judged)} problems are judged by generated tests')
  if 0 < len(judged) < config.problems:
    say(f'rl.problems={config.problems}, but {len(judged)} have tests: an iteration has those')
  return judged


def _train(run: Run, name: str, round_: int, policy, prm, tests, known, chunks):
  config, bench = run.config.rl, run.bench
  loss_fn, start = loss_of(run.model, config), _start(run, policy)
  tx = optimizer(config.optim)
  trained, frozen = lora.partition(start)
  state = init_state(trained, tx)
  update, imitate = (
    functools.partial(_over, make_update(over_frozen(loss), tx), frozen)
    for loss in (loss_fn, imitation(run.model))
  )
  label, last, tokens, broken = f'{name}/policy', {}, 0, 0
  with deferred() as stop, bench.store.checkpoints(name, 'policy') as saves, background() as later:
    ahead = Ahead(run, round_, tests, later)
    found = saves.restore(_kept(state, ahead.blank()))
    begin = 0
    if found is not None:
      begin, kept, meta = found
      state = kept['state'] if config.staleness else kept
      ahead.restore(begin, kept['ahead'] if config.staleness else {}, meta.get('refuted', {}))
      last, tokens, broken = meta['last'], meta['tokens'], meta.get('broken', 0)
    bench.metrics.begin(label, after=begin)
    seen = [*known, *map(stepwise.from_row, chunks.rows(before=begin))]
    with bench.progress.bar(label, config.iterations, begin) as bar:
      for iteration in range(begin, config.iterations):
        seed = (run.config.run.seed * 1000 + round_) * 1000 + iteration
        params = lora.combine(state.params, frozen)
        drawn = ahead.take(iteration, _policy_of(params), seen)
        rollouts = roll_out(run, prm, drawn)
        alpha = alpha_at(run, iteration)
        reference = policy if config.reference == 'start' else _policy_of(params)
        learnt = _learn(run, update, state, params, reference, rollouts, alpha, drawn.rng)
        state, scalars, more = learnt
        version = round_ * config.iterations + drawn.version
        seen += _record(run, chunks, iteration, rollouts, name, version)
        state, again = _replay(run, imitate, state, seen, seed)
        broken += more + again
        stop_if_broken(label, broken)
        tokens += rollouts.sampled_tokens
        own = drawn.own.result()
        for problem, failed in refutations(config, rollouts, own) if config.counterexamples else ():
          ahead.refute(problem, failed)
        last = summary(config, rollouts, alpha, own) | scalars
        last |= {'behind': float(iteration - drawn.version)}
        bench.metrics.write(label, iteration + 1, last)
        bar.update(iteration + 1, f'outcome {last["outcome"]:.3f}')
        meta = {'last': last, 'tokens': tokens, 'broken': broken, 'refuted': ahead.refuted}
        saves.save(iteration + 1, _kept(state, ahead.saved()), meta)
        stop.agree(wait=True)
        stop.check()
  return _policy_of(lora.combine(state.params, frozen)), last, tokens


def _kept(state: TrainState, ahead: Arrays) -> Any:
  """What a checkpoint holds: the state alone where nothing is drawn ahead."""
  return {'state': state, 'ahead': ahead} if ahead else state


def alpha_at(run: Run, iteration: int) -> float:
  """Weight of the outcome at an iteration, from `alpha_start` down to `alpha_end`."""
  config = run.config.rl
  span = config.alpha_start - config.alpha_end
  end = max(config.iterations - 1, 1)
  if config.alpha_schedule == 'linear':
    return rewards.linear_alpha(iteration, config.alpha_start, config.alpha_end, span / end)
  if config.alpha_schedule == 'log':
    rate = span / float(np.log1p(end))
    return rewards.logarithmic_alpha(iteration, config.alpha_start, config.alpha_end, rate)
  return config.alpha_start


def loss_of(model: Model, config: RlConfig) -> LossFn:
  """The loss of the configured algorithm."""
  if config.algorithm == 'dpo':
    return dpo_loss(
      model,
      config.beta,
      nll=config.nll,
      preference=config.preference,
      label_smoothing=config.label_smoothing,
      ipo=config.ipo,
      length_normalised=config.length_normalised,
    )
  return ppo_loss(
    model,
    clip_low=config.clip,
    clip_high=config.clip,
    negative_scale=config.negative_scale,
    kl_coef=config.kl_coef if config.kl_in == 'loss' else 0.0,
    kl=KL[config.kl_estimator],
    entropy_coef=config.entropy_coef,
    sequence_mean=config.loss_mean == 'sequence',
    value_fn=_value_fn(model, config.critic) if config.algorithm == 'ppo' else None,
    value_coef=config.value_coef,
  )


def _start(run: Run, policy: Any) -> Any:
  """What that loss trains, as it is before the first update."""
  start = place(run.bench, run.model, policy)
  if run.config.rl.algorithm != 'ppo':
    return start
  return {'policy': start, 'critic': _critic(run, policy)}


def _critic(run: Run, policy: Any) -> Any:
  """A zero head on the policy's trunk, or on a copy of it that the critic trains for itself."""
  whole = jax.sharding.NamedSharding(run.bench.mesh, jax.sharding.PartitionSpec())
  head = shard(ScalarHead.init(run.model.config), whole)
  if run.config.rl.critic == 'policy':
    return head
  return {'trunk': place(run.bench, run.model, policy), 'head': head}


def _value_fn(model: Any, critic: str):
  return value_on_policy if critic == 'policy' else value_on_own_trunk(model)


def _policy_of(params: Any) -> Any:
  return params.get('policy', params)


@functools.partial(jax.jit, static_argnums=0)
def row_logprobs(model, params, batch):
  """[B, T] log-probabilities of the tokens of a `TokenBatch`."""
  return token_logprobs(model, params, batch.tokens, batch.positions, batch.segments)


@functools.partial(jax.jit, static_argnums=(0, 1))
def row_values(model, critic, params, batch):
  """[B, T] values of PPO's critic, a head on the policy's trunk or on its own."""
  hidden = states(model, params['policy'], batch.tokens, batch.positions, batch.segments)
  return _value_fn(model, critic)(params['critic'], hidden, batch)


def _over(update: Callable, frozen: Any, state: Any, batch: Any):
  return update(state, batch, frozen)


def _read(size: int, of: Callable[..., jax.Array], *args: Any) -> np.ndarray:
  """What a model says of the rows of the last argument, a host batch: `size` rows at once.

  Those of an iteration together would need more memory than the updates do.
  """
  *fixed, batch = args
  count = len(jax.tree.leaves(batch)[0])
  parts = []
  for first in range(0, count, size):
    part = jax.tree.map(lambda x, first=first: x[first : first + size], batch)
    parts.append(fetch(of(*fixed, spread(part))))
  return np.concatenate(parts)


def _learn(run: Run, update, state, params, reference, rollouts: Rollouts, alpha, rng):
  """The updates of one iteration: the state, the last metrics, how many were not finite."""
  config = run.config.rl
  rows = batch_sharding(run.bench.mesh)
  batches = _minibatches(run, params, reference, rollouts, alpha, rng)
  placed = (shard(batch, rows) for batch in batches)
  state, scalars, broken = run_updates(update, state, placed, max_kl=config.max_kl or None)
  wanted = (
    'loss',
    'grad_norm',
    'skipped',
    'empty',
    'clip_fraction',
    'old_kl',
    'accuracy',
    'margin',
  )
  wanted = (*wanted, 'updates')
  if config.algorithm != 'dpo':
    wanted = (*wanted, 'policy_loss', 'kl', 'imitation')
    wanted = (*wanted, 'entropy') if config.entropy_coef else wanted
  return state, {k: scalars[k] for k in wanted if k in scalars}, broken


def _minibatches(run: Run, params, reference, rollouts: Rollouts, alpha, rng):
  config = run.config.rl
  size = config.minibatch
  if config.algorithm == 'dpo':
    size = max(1, config.minibatch // 2)
    ref_logprobs = lambda side: _read(size, row_logprobs, run.model, reference, side)  # noqa: E731
    whole = pair_batch(config, rollouts, alpha, ref_logprobs, config.rows // 2)
  else:
    whole = _rollout_batch(run, params, reference, rollouts, alpha)
  count = len(jax.tree.leaves(whole)[0])
  ways = run.bench.mesh.shape['data'] * run.bench.mesh.shape['fsdp']
  size = min(size, max(count // ways, 1) * ways)  # fewer problems than asked for have tests
  for _ in range(config.epochs):
    order = rng.permutation(count)
    for start in range(0, count - size + 1, size):
      picked = order[start : start + size]
      yield jax.tree.map(lambda leaf, picked=picked: leaf[picked], whole)


def _rollout_batch(run: Run, params, reference, rollouts: Rollouts, alpha) -> RolloutBatch:
  """The iteration's batch, with what the configured loss reads of the models."""
  config = run.config.rl
  args = {'ref_logprobs': np.zeros(rollouts.tokens.shape, np.float32)}
  plain = rollout_batch(config, rollouts, alpha, values=None, **args)
  views = TokenBatch(plain.tokens, plain.positions, plain.segments, plain.mask)
  if config.kl_coef:
    args['ref_logprobs'] = _read(config.minibatch, row_logprobs, run.model, reference, views)
  if config.importance_cap:
    args['now_logprobs'] = _read(
      config.minibatch, row_logprobs, run.model, _policy_of(params), views
    )
  values = None
  if config.algorithm == 'ppo':
    values = _read(config.minibatch, row_values, run.model, config.critic, params, views)
  return rollout_batch(config, rollouts, alpha, values=values, **args)


def imitation(model: Model) -> LossFn:
  """SFT on the policy within what the configured loss trains."""
  loss = sft_loss(model)
  return lambda params, batch: loss(_policy_of(params), batch)


def _replay(run: Run, update, state, seen: Sequence[Trajectory], seed: int):
  """`rl.replay` updates on the verified paths so far: the state, how many were not finite."""
  config = run.config
  limit = config.policy_sft.max_paths_per_problem
  documents = verified_documents(run, seen, limit=limit, seed=seed) if config.rl.replay else []
  if not documents:
    return state, 0
  batch = config.policy_sft.optim.batch
  data = batches(pack(documents, run.row_tokens), batch=batch, seed=seed)
  rows = batch_sharding(run.bench.mesh)
  placed = (shard(data[i], rows) for i in range(config.rl.replay))
  state, _, broken = run_updates(update, state, placed)
  return state, broken


def _record(
  run: Run, chunks, iteration: int, rollouts: Rollouts, origin: str, version: int
) -> list[Trajectory]:
  """Keeps the iteration's rollouts in the open format, judged by the problems' own tests."""
  found = as_trajectories(run, rollouts.problems, rollouts.paths, origin=origin, version=version)
  prompts = {p.id: steps_lib.prompt_of(p.statement) for p in rollouts.problems}
  chunks.write(iteration, [stepwise.to_row(t, prompts[t.problem_id]) for t in found])
  return found
