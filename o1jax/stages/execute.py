"""Programs to verdicts: each distinct program is run once for each set of tests."""

from __future__ import annotations

from collections.abc import Sequence

from o1jax.data import steps as steps_lib
from o1jax.sandbox.pool import Pool
from o1jax.sandbox.protocol import Job
from o1jax.types import (
  COMPILE_ERROR,
  WRONG_ANSWER,
  Problem,
  Step,
  TestCase,
  TestResult,
  Verdict,
)

# Above this share of masked verdicts the sandbox, not the programs, is at fault.
_MAX_MASKED = 0.05


class SandboxFault(RuntimeError):
  """Too many programs could not be judged."""


class Executor:
  """Judges programs of problems, with a memory of what it has run.

  A policy writes the same program for a problem again and again; the verdict is a
  function of program and tests, so it is kept.
  """

  def __init__(self, pool: Pool):
    self._pool = pool
    self._known: dict[tuple[str, tuple[TestCase, ...], str], Verdict] = {}
    self.executed = 0
    self.masked = 0

  def judge(
    self,
    problems: Sequence[Problem],
    paths: Sequence[tuple[Step, ...]],
    tests: Sequence[tuple[TestCase, ...]] | None = None,
  ) -> list[Verdict | None]:
    """A verdict for each path; None for a path that was cut off before its program.

    A terminal step without a fenced program counts as a program that does not compile.
    `tests` replaces each problem's own.

    Raises:
      SandboxFault: more than one in twenty programs could not be judged.
    """
    tests = [p.tests for p in problems] if tests is None else tests
    keys, jobs = [], {}
    for problem, path, cases in zip(problems, paths, tests, strict=True):
      code = steps_lib.program_of(path)
      key = None if code is None else (problem.id, tuple(cases), code)
      keys.append(key)
      if key is not None and key not in self._known and key not in jobs:
        jobs[key] = Job(code, tuple(cases), problem.entry_point, problem.test_code)
    for key, verdict in zip(jobs, self._pool.judge(list(jobs.values())), strict=True):
      self._known[key] = verdict
      self.masked += verdict.masked
    self.executed += len(jobs)
    if self.executed >= 200 and self.masked > _MAX_MASKED * self.executed:
      raise SandboxFault(
        f'{self.masked} of {self.executed} programs could not be judged; '
        'run `python -m o1jax.sandbox --doctor`'
      )
    return [
      self._without_program(path, cases) if key is None else self._known[key]
      for key, path, cases in zip(keys, paths, tests, strict=True)
    ]

  @staticmethod
  def _without_program(path: tuple[Step, ...], cases: Sequence[TestCase]) -> Verdict | None:
    if not path or not path[-1].terminal:
      return None
    return Verdict(COMPILE_ERROR, (TestResult(WRONG_ANSWER),) * len(cases), 'no fenced program')
