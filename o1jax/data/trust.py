"""Which problems can be trusted: those whose reference program passes their own tests."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

from o1jax.data.readers import Entry
from o1jax.types import ACCEPTED, Problem, Verdict

_BATCH = 64  # problems whose programs are judged together

# Verdicts on programs of problems, in order. A text says why a job could not be made.
Judge = Callable[[Sequence[tuple[Problem, str]]], Sequence[Verdict | str]]


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
  """A problem and why it cannot be trusted."""

  entry: Entry
  problem: Problem  # with a program that passes in front, where there is one
  reason: str = ''  # empty: trusted

  def __str__(self) -> str:
    entry = self.entry
    return f'{entry.path}, row {entry.row} ({entry.problem.id}): {self.reason}'


def findings(entries: Iterable[Entry], judge: Judge, most: int) -> Iterator[Finding]:
  """One finding for each entry, in order; at most `most` reference programs of each are run."""
  entries = iter(entries)
  while batch := list(itertools.islice(entries, _BATCH)):
    pairs = [(e.problem, code) for e in batch for code in e.problem.solutions[:most]]
    verdicts = iter(judge(pairs))
    for entry in batch:
      yield _finding(entry, list(itertools.islice(verdicts, len(entry.problem.solutions[:most]))))


def _finding(entry: Entry, verdicts: Sequence[Verdict | str]) -> Finding:
  problem = entry.problem
  if not verdicts:
    return Finding(entry, problem, 'has no reference program')
  for i, verdict in enumerate(verdicts):
    if not isinstance(verdict, str) and verdict.status == ACCEPTED:
      rest = (*problem.solutions[:i], *problem.solutions[i + 1 :])
      solutions = (problem.solutions[i], *rest)
      return Finding(entry, dataclasses.replace(problem, solutions=solutions))
  return Finding(entry, problem, _reason(verdicts[0]))


def _reason(verdict: Verdict | str) -> str:
  if isinstance(verdict, str):
    return verdict
  if verdict.masked:
    return f'the sandbox could not judge it: {verdict.stderr[-200:]}'
  last = verdict.stderr.strip().split('\n')[-1][:200]
  text = f'{verdict.status}, {verdict.passed} of {len(verdict.tests)} tests passed'
  return f'{text}; {last}' if last else text
