"""Step 4: the process reward model, trained on every roll-out as prefix trees."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from o1jax.batch import StepBatch
from o1jax.config import PrmConfig
from o1jax.data.pipeline import of_list
from o1jax.data.prefix_tree import PrefixTree, by_problem
from o1jax.data.step_batches import StepBatchShape, step_batches
from o1jax.learn import prm_metrics
from o1jax.learn.objectives import prm_loss, step_scores
from o1jax.learn.update import LossFn
from o1jax.models import lora
from o1jax.models.heads import StepHead, TokenHead
from o1jax.models.transformer import Model
from o1jax.parallel.ambient import spread
from o1jax.parallel.distributed import fetch
from o1jax.sampling.draw import SAMPLE
from o1jax.stages.context import Run
from o1jax.stages.evaluate import name_ids, sampler
from o1jax.stages.fit import fit
from o1jax.types import Problem, Trajectory

PAIRS_A_ROW = 2  # sibling pairs kept of one batch: so many divide over a mesh as its rows do
SAMPLES = 32  # roll-outs of a held-out problem
DEV_PROBLEMS = 60  # whose trees a stage's closing line judges the PRM on
_ORDERS = ('sibling_auc', 'pair_accuracy', 'auc')


def batch_shape(run: Run) -> StepBatchShape:
  """Shape of the PRM's batches under the run's limits."""
  optim = run.config.prm.optim
  steps = run.config.search.depth_limit
  return StepBatchShape(
    optim.batch, run.row_tokens, steps, PAIRS_A_ROW * optim.batch, optim.accumulate
  )


def initial(run: Run, policy: Any) -> Any:
  """A PRM that starts from the policy's trunk: with a zero head, or the policy's own words."""
  config, trunk = run.config.prm, run.adapted(policy, 'prm')
  if config.readout == 'value':
    return {'trunk': trunk, 'head': StepHead.init(run.model.config)}
  good, bad = (run.tokenizer.single(text) for text in (config.good_token, config.bad_token))
  return {'trunk': trunk, 'head': TokenHead.init(run.model.output_rows(policy), good, bad)}


def loss_of(model: Model, config: PrmConfig) -> LossFn:
  """The point-wise, the pair-wise loss, or both."""
  return prm_loss(
    model,
    pair_coef=config.pair_coef if config.mode != 'pointwise' else 0.0,
    point_coef=0.0 if config.mode == 'pairwise' else 1.0,
  )


def train_prm(
  run: Run, round_: int, policy: Any, found: Sequence[Trajectory], *, renewed: bool = False
) -> Any:
  """The PRM `{'trunk', 'head'}` of a round, or the one behind its RL, begun from a policy."""
  name = f'round{round_}/renewed/prm' if renewed else f'round{round_}/prm'
  config = run.config.prm

  def body() -> dict[str, Any]:
    seed = run.config.run.seed * 1000 + round_
    rng = np.random.default_rng(seed)
    trees = by_problem(found if config.returns == 'terminal' else accepted_returns(found))
    problems = {p.id: p for p in (*run.train, *run.judge)}
    rows = step_batches(
      trees,
      problems,
      run.encoder,
      batch_shape(run),
      rng=rng,
      margin=config.pair_margin,
      hard=config.labels == 'hard',
    )
    if config.mode == 'pairwise':
      rows = [batch for batch in rows if batch.pair_weights.any()]
    start = initial(run, policy)
    if not rows:
      what = 'pairs of siblings' if config.mode == 'pairwise' else 'judged paths'
      run.bench.progress.say(f'{name}: skipped: there are no {what}; it scores as it began')
      run.save(name, 'prm', start)
      return {'trees': len(trees), 'nodes': 0}
    loss = loss_of(run.model, config)
    data = of_list(rows, seed=seed)
    optim = config.optim_of(renewed)
    trained, last = fit(run.bench, name, 'prm', run.model, start, loss, data, optim)
    trained = lora.blended(start, trained, config.blend)
    run.save(name, 'prm', trained)
    keys = ('loss', 'point_loss', 'pair_loss', 'pair_accuracy')
    nodes = sum(len(t.nodes) for t in trees.values())
    dev = run.dev[:DEV_PROBLEMS]
    judged = sibling_metrics(run, trained, dev, *held_out_trees(run, policy, dev, seed=seed))
    result = {'trees': len(trees), 'nodes': nodes} | {k: last[k] for k in keys}
    return result | {f'dev_{k}': v for k, v in judged.items()}

  run.stage(name, 'process reward model on all roll-outs', body)
  return run.load(name, 'prm')


def accepted_returns(found: Iterable[Trajectory]) -> list[Trajectory]:
  """The trajectories with reward 1 for a program that passes every test, else 0.

  Cut-off and masked ones, which have no reward, keep none.
  """
  return [
    t if t.reward is None else dataclasses.replace(t, reward=float(t.accepted)) for t in found
  ]


@functools.partial(jax.jit, static_argnums=0)
def batch_scores(model, params, batch: StepBatch) -> jax.Array:
  """[B, M] log-odds of the steps of a batch."""
  return step_scores(model, params, batch)


def score_paths(
  run: Run, prm: Any, problems: Sequence[Problem], paths: Sequence[tuple]
) -> list[list[float]]:
  """The PRM's log-odds of every step of every path; cut-off paths have fewer."""
  shape = batch_shape(run)
  out: list[list[float]] = []
  for start in range(0, len(paths), shape.rows):
    part = list(zip(problems, paths, strict=True))[start : start + shape.rows]
    batch = _plain_batch(run, shape, part)
    scores = fetch(batch_scores(run.model, prm, spread(batch)))
    out += [scores[i, : len(path)].tolist() for i, (_, path) in enumerate(part)]
  return out


def _plain_batch(run: Run, shape: StepBatchShape, part) -> StepBatch:
  """Rows without labels, to be scored."""
  tokens = np.zeros((shape.rows, shape.tokens), np.int32)
  step_ids, segments = np.zeros_like(tokens), np.zeros_like(tokens)
  for row, (problem, path) in enumerate(part):
    ids = list(run.encoder.prompt(problem))
    for j, step in enumerate(path[: shape.steps], start=1):
      new = run.encoder.step(step)
      step_ids[row, len(ids) : len(ids) + len(new)] = j
      ids += new
    ids = ids[: shape.tokens]
    tokens[row, : len(ids)] = ids
    segments[row, : len(ids)] = 1
  positions = np.broadcast_to(np.arange(shape.tokens, dtype=np.int32), tokens.shape).copy()
  zeros = np.zeros((shape.rows, shape.steps), np.float32)
  pairs = np.zeros((shape.pairs, 3), np.int32)
  pair_weights = np.zeros(shape.pairs, np.float32)
  return StepBatch(tokens, positions, segments, step_ids, zeros, zeros, pairs, pair_weights)


def held_out_trees(
  run: Run, policy: Any, problems: Sequence[Problem], *, seed: int
) -> tuple[dict[str, PrefixTree], dict[tuple[str, tuple], float]]:
  """Prefix trees of sampled paths (reward 1 for accepted, else 0), and step log-probs.

  The arguments of `sibling_metrics`: trees by problem id, log-probs by (problem id, prefix).
  """
  prompts = [run.encoder.prompt(p) for p in problems]
  draw = sampler(run, SAMPLE, run.config.eval.rows)
  with run.sampling(policy) as (policy,):
    drawn = draw(policy, prompts, seed=seed, ids=name_ids(problems), samples=SAMPLES)
  repeated = [p for p in problems for _ in range(SAMPLES)]
  paths = [run.encoder.steps_of(drawn.ids(i)) for i in range(len(repeated))]
  verdicts = run.executor.judge(repeated, paths)
  limit = run.config.search.depth_limit
  logprobs: dict[tuple[str, tuple], float] = {}
  kept = []
  for i, (problem, path, verdict) in enumerate(zip(repeated, paths, verdicts, strict=True)):
    ends = np.flatnonzero(drawn.tokens[i] == run.tokenizer.step_end_id)
    if verdict is None or verdict.masked or not 0 < len(path) <= min(limit, len(ends) + 1):
      continue  # steps that were not closed have no log-prob of their own
    kept.append(
      Trajectory(problem.id, path, verdict=verdict, reward=float(verdict.status == 'accepted'))
    )
    start = 0
    for j, end in enumerate(ends[: len(path)], start=1):
      logprobs[problem.id, path[:j]] = float(drawn.logprobs[i, start : end + 1].sum())
      start = end + 1
    logprobs.setdefault((problem.id, path), float(drawn.logprobs[i, start:].sum()))
  return by_problem(kept), logprobs


def sibling_metrics(
  run: Run,
  prm: Any,
  problems: Sequence[Problem],
  trees: dict[str, PrefixTree],
  logprobs: dict[tuple[str, tuple], float],
) -> dict[str, Any]:
  """How well step scores order siblings of held-out trees, beside the policy's log-prob.

  A step is good if some roll-out through it was accepted, bad if none was. AUC is
  over all (good, bad) sibling pairs of a prefix, ties count half; pair accuracy is
  over siblings whose mean returns differ by more than `prm.pair_margin`; `auc` is over all steps
  of all problems, and also tells easy problems from hard ones. All are 0 where there is nothing
  to compare. `sibling_auc_lead` is how far the PRM's stands above the log-prob's, `lead_ci95` its
  interval, problems resampled, and `wins` what it is made of: of each problem pairs won by the
  PRM, by the log-prob, and all. Log-loss (nats a step), accuracy and the calibration curve
  (`[predicted, observed]`, 0 in an empty bin) compare r of every step with its mean return.

  Args:
    run: the run.
    prm: its parameters.
    problems: whose trees are judged.
    trees: by problem id; rewards there are 1 for accepted and 0 for anything else.
    logprobs: (problem id, prefix) -> log-prob of the prefix's last step.
  """
  by_id = {p.id: p for p in problems}
  where = [(i, path) for i, tree in trees.items() for path in tree.paths]
  scored = score_paths(run, prm, [by_id[i] for i, _ in where], [path for _, path in where])
  scores: dict[tuple[str, tuple], float] = {}
  for (problem_id, path), values in zip(where, scored, strict=True):
    scores |= {(problem_id, path[:j]): v for j, v in enumerate(values, start=1)}
  if not scores:
    none = {'pairs': 0, 'sibling_auc_lead': 0.0, 'lead_ci95': [0.0, 0.0], 'wins': []}
    return none | {prefix + name: 0.0 for prefix in ('', 'logprob_') for name in _ORDERS}
  numbers: dict[tuple[str, tuple], int] = {}
  parents = [numbers.setdefault((i, prefix[:-1]), len(numbers)) for i, prefix in scores]
  seen = np.array([trees[i].nodes[prefix].value for i, prefix in scores])
  said = np.array(list(scores.values()))
  sampled = np.array([logprobs[key] for key in scores])
  margin = run.config.prm.pair_margin
  found: dict[str, Any] = {'pairs': len(prm_metrics.pairs(seen, parents, margin)[0])}
  places = {p.id: i for i, p in enumerate(problems)}
  of, count = [places[i] for i, _ in scores], len(problems)
  ours, theirs = (prm_metrics.wins(x, seen > 0, parents, of, count) for x in (said, sampled))
  lead, ci95 = prm_metrics.auc_lead(ours, theirs, run.config.eval.bootstrap)
  found |= {
    'sibling_auc_lead': float(np.nan_to_num(lead)),
    'lead_ci95': np.nan_to_num(ci95).tolist(),
    'wins': np.column_stack([ours[:, 0], theirs]).tolist(),
  }
  for prefix, judged in (('', said), ('logprob_', sampled)):
    orders = (
      prm_metrics.within_group_auc(judged, seen > 0, parents),
      prm_metrics.pair_accuracy(judged, seen, parents, margin),
      prm_metrics.auc(judged, seen > 0),
    )
    named = zip(_ORDERS, np.nan_to_num(orders).tolist(), strict=True)
    found |= {prefix + name: value for name, value in named}
  curve = prm_metrics.calibration(said, seen)
  return found | {
    'log_loss': prm_metrics.log_loss(said, seen),
    'accuracy': prm_metrics.accuracy(said, seen),
    'calibration_error': curve.error,
    'calibration_counts': curve.counts.tolist(),
    'calibration_curve': np.nan_to_num(np.stack([curve.predicted, curve.observed])).tolist(),
  }
