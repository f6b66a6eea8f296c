"""D_process on disk: one JSON object a line, stepwise supervision with values.

Fields: `prompt, completions[], labels[bool]` as TRL's stepwise trainers read
them, with `values[], visits[]` beside (mean return and its count), and what the
loop needs to read a trajectory back: `problem_id, actions[], reward, status,
policy_version, origin, weight`.
"""

from __future__ import annotations

from o1jax.types import Step, TestResult, Trajectory, Verdict


def to_row(trajectory: Trajectory, prompt: str) -> dict:
  """A trajectory as a JSON-ready row; a step is labelled good if it ever led to success."""
  verdict = trajectory.verdict
  return {
    'problem_id': trajectory.problem_id,
    'prompt': prompt,
    'completions': [s.text for s in trajectory.steps],
    'labels': [v > 0 for v in trajectory.values],
    'values': [round(v, 6) for v in trajectory.values],
    'visits': list(trajectory.visits),
    'actions': [s.action for s in trajectory.steps],
    'reward': trajectory.reward,
    'status': verdict.status if verdict else None,
    'tests': [t.status for t in verdict.tests] if verdict else [],
    'policy_version': trajectory.policy_version,
    'origin': trajectory.origin,
    'weight': trajectory.weight,
  }


def from_row(row: dict) -> Trajectory:
  """The trajectory of a row that `to_row` wrote (seconds and stderr are not kept)."""
  verdict = None
  if row['status'] is not None:
    verdict = Verdict(row['status'], tuple(TestResult(status) for status in row['tests']))
  return Trajectory(
    problem_id=row['problem_id'],
    steps=tuple(map(Step, row['actions'], row['completions'])),
    values=tuple(row['values']),
    visits=tuple(row['visits']),
    verdict=verdict,
    reward=row['reward'],
    policy_version=row['policy_version'],
    origin=row['origin'],
    weight=row.get('weight', 1.0),  # rows of earlier versions have none
  )
