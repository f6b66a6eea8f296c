"""Programs to verdicts: each distinct program is run once for each set of tests."""

from __future__ import annotations

from collections.abc import Sequence

from o1jax.data import steps as steps_lib
from o1jax.sandbox.pool import Pool
from o1jax.sandbox.protocol import Job, Limits
from o1jax.types import (
  ACCEPTED,
  COMPILE_ERROR,
  WRONG_ANSWER,
  Problem,
  Step,
  TestCase,
  TestResult,
  Verdict,
)


class Executor:
  """Judges programs of problems, with a memory of what it has run.

  A policy writes the same program for a problem again and again; the verdict is a
  function of program and tests, so it is kept.
  """

  def __init__(self, pool: Pool, headroom: float = 3.0):
    """Programs get `headroom` times the CPU seconds that their problem's reference needs."""
    self._pool = pool
    self._headroom = headroom
    self._limits: dict[str, Limits] = {}
    self._known: dict[tuple[str, tuple[TestCase, ...], str], Verdict] = {}

  def judge(
    self,
    problems: Sequence[Problem],
    paths: Sequence[tuple[Step, ...]],
    tests: Sequence[tuple[TestCase, ...]] | None = None,
  ) -> list[Verdict | None]:
    """A verdict for each path; None for a path that was cut off before its program.

    A terminal step without a fenced program counts as a program that does not compile.
    `tests` replaces each problem's own; an empty tuple leaves it with its `test_code`.

    Raises:
      SandboxError: too many programs could not be judged, or a layer stopped applying.
    """
    tests = [p.tests for p in problems] if tests is None else tests
    self._time_references(problems)
    keys, jobs = [], {}
    for problem, path, cases in zip(problems, paths, tests, strict=True):
      code = steps_lib.program_of(path)
      key = None if code is None else (problem.id, tuple(cases), code)
      keys.append(key)
      if key is not None and key not in self._known and key not in jobs:
        limits = self._limits.get(problem.id)
        assertions = '' if cases else problem.test_code  # what replaces tests replaces these too
        jobs[key] = Job(code, tuple(cases), problem.entry_point, assertions, limits)
    for key, verdict in zip(jobs, self._pool.judge(list(jobs.values())), strict=True):
      self._known[key] = verdict
    return [
      self._without_program(path, cases) if key is None else self._known[key]
      for key, path, cases in zip(keys, paths, tests, strict=True)
    ]

  def _time_references(self, problems: Sequence[Problem]) -> None:
    """Runs the references of problems not met before; a trusted one sets the CPU limit."""
    new = {p.id: p for p in problems if p.solutions and p.id not in self._limits}
    jobs = [Job(p.solutions[0], p.tests, p.entry_point, p.test_code) for p in new.values()]
    for key, verdict in zip(new, self._pool.judge(jobs) if jobs else (), strict=True):
      trusted = verdict.status == ACCEPTED
      limits = self._pool.limits
      self._limits[key] = limits.with_headroom(verdict, self._headroom) if trusted else limits

  @staticmethod
  def _without_program(path: tuple[Step, ...], cases: Sequence[TestCase]) -> Verdict | None:
    if not path or not path[-1].terminal:
      return None
    return Verdict(COMPILE_ERROR, (TestResult(WRONG_ANSWER),) * len(cases), 'no fenced program')
