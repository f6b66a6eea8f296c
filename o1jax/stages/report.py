"""The closing tables: what every policy, PRM and search is worth on the test split."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from o1jax.sampling.draw import SAMPLE
from o1jax.stages.context import Run
from o1jax.stages.evaluate import Answers, answer, interval, pass_at_1
from o1jax.stages.prm import held_out_trees, sibling_metrics
from o1jax.stages.tcg import tcg_table
from o1jax.stages.test_time import elected, searched

SEED = 77  # of the report's samples, the same for every policy


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A policy to report, by the name of what made it."""

  stage: str
  params: Any


@dataclasses.dataclass(frozen=True)
class Judged:
  """The PRMs of a round, and the policies whose steps they judge."""

  prm: Any
  renewed: Any | None  # trained anew behind RL, see `prm.renew`
  searcher: Any
  tuned: Any
  improved: Any


def policy_row(run: Run, candidate: Candidate) -> dict[str, Any]:
  """Greedy and sampled pass@1 of one policy on the test split."""

  def body() -> dict[str, Any]:
    found = pass_at_1(run, candidate.params, run.test, seed=SEED)
    outcomes = {k: v.tolist() for k, v in found['outcomes'].items()}
    return {'stage': candidate.stage, **found, 'n': len(run.test), 'outcomes': outcomes}

  return run.stage(f'test_{_flat(candidate.stage)}/report', 'pass@1 on the test split', body)


def policy_rows(run: Run, candidates: Sequence[Candidate]) -> list[dict[str, Any]]:
  """`policy_row` of each, and from the second on what it gained over the stage before.

  `gain` has the stage it is `over` and the differences of greedy and sampled pass@1, each with its
  95 % interval, paired by problem: narrower than what the two intervals by themselves suggest. A
  control is compared with the stage it is a control of, and passed over by those behind it.
  """
  rows, before = [], None
  for candidate in candidates:
    row = dict(policy_row(run, candidate))
    if before is not None:
      row['gain'] = {'over': before['stage']} | gains(
        before['outcomes'], row['outcomes'], run.config.eval.bootstrap
      )
    if not candidate.stage.startswith('control/'):
      before = row
    rows.append(row)
  return rows


def gains(before: Mapping, after: Mapping, resamples: int) -> dict[str, Any]:
  """Mean differences of outcomes that are lists over the same problems, and their `ci95`."""
  change = {k: np.array(after[k]) - np.array(before[k]) for k in after}
  means = {k: round(float(v.mean()), 4) for k, v in change.items()}
  return means | {'ci95': {k: interval(v, resamples) for k, v in change.items()}}


def tcg_rows(run: Run) -> list[dict[str, Any]]:
  """Parse rate and correctness of the test-case generator by training stage."""
  body = lambda: {'rows': tcg_table(run)}  # noqa: E731
  return run.stage('test_tcg/report', 'test-case generator on the test split', body)['rows']


def prm_row(run: Run, round_: int, models: Judged) -> dict[str, Any]:
  """How the PRM of a round orders siblings of held-out roll-outs, beside the sampler's log-prob.

  The roll-outs are those of the policy that the round searched with; under `tuned` those of the
  policy that was fine-tuned on what it found: the harder ones, made where RL begins; and under
  `improved` those of the policy behind RL, which `renewed` judges by the PRM that was made then.
  """

  def body() -> dict[str, Any]:
    problems = run.test[: run.config.eval.prm_problems]

    def judged(policy: Any, *prms: Any) -> list[dict[str, Any]]:
      trees = held_out_trees(run, policy, problems, seed=SEED + 1)
      return [sibling_metrics(run, prm, problems, *trees) for prm in prms]

    row = {'round': round_} | judged(models.searcher, models.prm)[0]
    row |= {'tuned': judged(models.tuned, models.prm)[0]}
    if models.renewed is not None:
      both = judged(models.improved, models.prm, models.renewed)
      row |= dict(zip(('improved', 'renewed'), both, strict=True))
    return row

  return run.stage(f'prm_round{round_}/report', 'sibling order on the test split', body)


def search_row(run: Run, candidate: Candidate, prm: Any) -> dict[str, Any]:
  """Greedy, majority, log-prob best-of-n and search with the PRM at equal generated tokens.

  The search's tokens set the budget: majority and best-of-n get as many samples as
  fit, rounded up. Majority is over equal program texts, ties broken by log-prob.
  """

  def body() -> dict[str, Any]:
    problems, config = run.test, run.config.eval
    found = searched(run, candidate.params, prm, problems, SEED + 2)
    paths = [run.encoder.steps_of(path) for path in found.paths]
    verdicts = run.executor.judge(problems, paths)
    outcomes = np.array([v is not None and v.status == 'accepted' for v in verdicts], float)
    one = policy_row(run, candidate)
    per_problem = found.generated / len(problems)
    samples = max(1, int(np.ceil(per_problem / one['greedy_tokens'])))
    drawn = answer(run, candidate.params, problems, SAMPLE, samples=samples, seed=SEED + 3)
    majority, best = votes(drawn)
    greedy = np.array(one['outcomes']['greedy'], float)
    rows = {'greedy': greedy, 'majority': majority, 'logprob': best, 'search_prm': outcomes}
    means = {k: float(v.mean()) for k, v in rows.items()}
    rival = max(('greedy', 'majority', 'logprob'), key=means.get)
    lead = outcomes - rows[rival]
    return {
      'policy': candidate.stage,
      'tokens_per_problem': per_problem,
      'prm_tokens_per_problem': found.scored / len(problems),
      'samples': samples,
      **means,
      'ci95': {k: interval(v, config.bootstrap) for k, v in rows.items()},
      'lead_over_best': float(lead.mean()),
      'lead_ci95': interval(lead, config.bootstrap),
    }

  return run.stage(f'search_{_flat(candidate.stage)}/report', 'test-time search', body)


def votes(drawn: Answers) -> tuple[np.ndarray, np.ndarray]:
  """Outcome of the majority answer and of the likeliest answer of each problem."""
  majority, best = [], []
  for accepted, paths, logprobs in zip(drawn.accepted, drawn.paths, drawn.logprobs, strict=True):
    best.append(accepted[np.argmax(logprobs)])
    majority.append(accepted[elected([p[-1:] for p in paths], [1.0] * len(paths), logprobs)])
  return np.array(majority, float), np.array(best, float)


def show(run: Run, summary: dict[str, Any]) -> None:
  """The tables on the terminal."""
  progress = run.bench.progress

  def ranged(row, key):
    low, high = row['ci95'][key]
    return f'{row[key]:.3f} [{low:.3f}, {high:.3f}]'

  def gained(row):
    gain = row.get('gain')
    if gain is None:
      return ''
    low, high = gain['ci95']['greedy']
    return f'{gain["greedy"]:+.3f} [{low:+.3f}, {high:+.3f}] over {gain["over"]}'

  progress.table(
    f'Policy, pass@1 on {len(run.test)} test problems (95 % bootstrap)',
    ('after', 'greedy', 'sampled', 'greedy gain, paired'),
    [(r['stage'], ranged(r, 'greedy'), ranged(r, 'sampled'), gained(r)) for r in summary['policy']],
  )
  tcg_keys = ('stage', 'parse_rate', 'correct', 'n')
  progress.table(
    'Test-case generator', tcg_keys, [[r[k] for k in tcg_keys] for r in summary['tcg']]
  )
  prm_keys = ('sibling_auc', 'logprob_sibling_auc', 'pair_accuracy', 'logprob_pair_accuracy')
  progress.table(
    'Process reward model, siblings within a problem',
    ('round', 'roll-outs of', *prm_keys, 'AUC over log-prob'),
    [
      (row['round'], whose, *(r[k] for k in prm_keys), _lead(r))
      for row in summary['prm']
      for whose, r in judged_rows(row)
    ],
  )
  search_keys = (
    'policy',
    'tokens_per_problem',
    'prm_tokens_per_problem',
    'greedy',
    'majority',
    'logprob',
    'search_prm',
  )
  progress.table(
    'Test time, equal generated tokens (greedy: one path)',
    search_keys,
    [[r[k] for k in search_keys] for r in summary['search']],
  )


def judged_rows(row: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
  """Whose roll-outs a round's PRM judged, and how, from a row of `prm_row`."""
  found = [('the searching policy', row), ('the fine-tuned policy', row['tuned'])]
  if 'renewed' in row:
    found += [('the policy behind RL', row['improved']), ('the same, PRM renewed', row['renewed'])]
  return found


def _lead(row: Mapping[str, Any]) -> str:
  low, high = row['lead_ci95']
  return f'{row["sibling_auc_lead"]:+.3f} [{low:+.3f}, {high:+.3f}]'


def _flat(stage: str) -> str:
  return stage.replace('/', '_')
