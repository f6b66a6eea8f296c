"""The whole method in one command: six steps, round after round.

    python -m o1jax.train --config configs/quickstart.yaml

O1-CODER (Zhang et al. 2024, arXiv 2412.00154), Algorithm 1. `loop` below is the way
of one problem; each call is a stage that resumes where it was killed.
"""

from __future__ import annotations

import resource
import sys
from typing import Any

from o1jax import cli


def loop(run) -> dict[str, Any]:
  """Trains through all rounds and returns the summary of the run."""
  from o1jax.stages.control import expert_iteration
  from o1jax.stages.policy_sft import finetune_policy
  from o1jax.stages.prm import train_prm
  from o1jax.stages.prm_rollouts import sample_held_back, sample_tuned, sample_unseen
  from o1jax.stages.report import (
    Candidate,
    Judged,
    policy_rows,
    prm_row,
    search_row,
    tcg_rows,
  )
  from o1jax.stages.rl import improve_policy
  from o1jax.stages.synthesis import synthesize
  from o1jax.stages.tcg import train_tcg, write_tests

  policy, prm, found, unseen = run.base, None, [], []
  policies, judged = [Candidate('base', policy)], []
  tcg = train_tcg(run)  # step 1: a model that writes test cases
  tests = write_tests(run, tcg)  # and what it writes, confirmed by the references
  rounds = run.config.run.rounds
  for round_ in range(rounds):
    searcher, renewed = policy, None
    found += synthesize(run, round_, searcher, prm, found)  # steps 2 and 6: search, execute
    tuned = finetune_policy(run, round_, searcher, found)  # step 3: learn verified paths
    policies.append(Candidate(f'round{round_}/sft', tuned))
    found += sample_tuned(run, round_, tuned)
    unseen += sample_held_back(run, round_, tuned)  # from these, only PRMs learn
    first = prm = train_prm(run, round_, tuned, found + unseen)  # step 4: learn to judge a step
    known = list(found)
    policy, rollouts = improve_policy(run, round_, tuned, prm, tests, known)  # step 5
    policies.append(Candidate(f'round{round_}/rl', policy))
    found += rollouts
    if round_ == 0 and run.config.rl.control:
      spent = run.bench.store.done('round0/rl')['sampled_tokens']
      seed = run.config.run.seed
      control = expert_iteration(run, tuned, known, spent, seed=seed)
      policies.append(Candidate('control/expert_iteration', control))
    if run.config.prm.renews(round_, rounds):  # the policy has outgrown the PRM it learnt from
      unseen += sample_unseen(run, round_, policy)
      renewed = prm = train_prm(run, round_, policy, found + unseen, renewed=True)
    judged.append(Judged(first, renewed, searcher, tuned, policy))
  rows = {
    'policy': policy_rows(run, policies),
    'tcg': tcg_rows(run),
    'prm': [prm_row(run, i, models) for i, models in enumerate(judged)],
    'search': [],
  }
  if run.config.eval.test_time:
    asked = [
      (policies[0], judged[0].prm),
      (policies[1], judged[0].prm),
      (Candidate(f'round{round_}/rl', policy), prm),
    ]
    rows['search'] = [search_row(run, candidate, scorer) for candidate, scorer in asked]
  return rows


def train(arguments: cli.Arguments) -> None:
  """One run, from a checked command line to its summary."""
  from o1jax.stages.context import NotAsked
  from o1jax.stages.report import show
  from o1jax.stages.setup import dry_run, opened

  if arguments.dry_run:
    dry_run(arguments.config, arguments.force)
    return
  with opened(arguments.config, arguments.stages, arguments.force) as run:
    try:
      rows = loop(run)
    except NotAsked as end:
      run.bench.progress.say(str(end))
      return
    seconds = run.seconds()
    summary = rows | {
      'seconds': seconds,
      'total_seconds': round(sum(seconds.values()), 1),
      'peak_memory_bytes': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
      'seeds': [run.config.run.seed],
    }
    run.write_summary(summary)
    show(run, summary)
    run.bench.progress.say(f'{run.bench.store.dir}/summary.json')


def main() -> int:
  """Command line; returns the exit code."""
  return cli.main(train, __doc__)


if __name__ == '__main__':
  cli.restart_with_huge_pages()
  sys.exit(main())
