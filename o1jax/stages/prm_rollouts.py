"""Paths that a policy samples for the PRM to learn from, beside those that search has found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from o1jax.data import steps as steps_lib
from o1jax.data import stepwise
from o1jax.sampling.draw import SAMPLE
from o1jax.stages.context import Run
from o1jax.stages.evaluate import answer
from o1jax.stages.synthesis import CHUNK, as_trajectories
from o1jax.types import Problem, Trajectory


def sample_tuned(run: Run, round_: int, policy: Any) -> list[Trajectory]:
  """`prm.samples` roll-outs of the fine-tuned policy for each of the round's problems, judged."""
  return _sampled(run, round_, f'round{round_}/rollouts/prm', policy, run.new_problems(round_))


def sample_unseen(run: Run, round_: int, policy: Any) -> list[Trajectory]:
  """`prm.samples` roll-outs of the policy behind RL for each held-back problem, judged.

  For the PRM alone: a policy that learnt from them would no longer show what it gets wrong.
  """
  return _sampled(run, round_, f'round{round_}/unseen/prm', policy, run.judge)


def sample_held_back(run: Run, round_: int, policy: Any) -> list[Trajectory]:
  """`prm.samples` roll-outs of the fine-tuned policy for the round's share of held-back problems.

  For the PRM alone, like those of `sample_unseen`.
  """
  each = len(run.judge) // run.config.run.rounds
  share = run.judge[round_ * each : (round_ + 1) * each]
  return _sampled(run, round_, f'round{round_}/held_back/prm', policy, share)


def _sampled(
  run: Run, round_: int, name: str, policy: Any, problems: Sequence[Problem]
) -> list[Trajectory]:
  samples = run.config.prm.samples
  if not samples or not problems:
    return []
  chunks = run.bench.store.chunks(name, 'trajectories')

  def body() -> dict[str, Any]:
    parts = [problems[i : i + CHUNK] for i in range(0, len(problems), CHUNK)]
    done, seed = chunks.done(), run.config.run.seed * 1000 + round_ + 700
    with run.bench.progress.bar(name, len(parts), len(done)) as bar:
      for index, part in enumerate(parts):
        if index in done:
          continue
        drawn = answer(run, policy, part, SAMPLE, samples=samples, seed=seed)
        repeated = [p for p in part for _ in range(samples)]
        paths = [path for each in drawn.paths for path in each]
        found = as_trajectories(run, repeated, paths, origin=name, version=round_)
        prompts = {p.id: steps_lib.prompt_of(p.statement) for p in part}
        chunks.write(index, [stepwise.to_row(t, prompts[t.problem_id]) for t in found])
        bar.update(index + 1)
    rows = list(chunks.rows())
    solved = {row['problem_id'] for row in rows if row['status'] == 'accepted'}
    return {'trajectories': len(rows), 'problems': len(problems), 'solved': len(solved)}

  run.stage(name, f'{samples} roll-outs for each of {len(problems)} problems', body)
  return [stepwise.from_row(row) for row in chunks.rows()]
