"""Programs to verdicts: each distinct program is run once for each set of tests.

Over several processes each runs the programs of its own problems in its own sandbox, and all know
all verdicts.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from o1jax.data import steps as steps_lib
from o1jax.parallel import distributed
from o1jax.run import stop
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

_Key = tuple[str, tuple[TestCase, ...], str]  # problem id, tests, program


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
    self._known: dict[_Key, Verdict] = {}

  def judge(
    self,
    problems: Sequence[Problem],
    paths: Iterable[tuple[Step, ...]],
    tests: Sequence[tuple[TestCase, ...]] | None = None,
  ) -> list[Verdict | None]:
    """A verdict for each path; None for a path that was cut off before its program.

    `paths` may still be to be read: programs run while those after them are.

    A terminal step without a fenced program counts as a program that does not compile.
    `tests` replaces each problem's own; an empty tuple leaves it with its `test_code`.

    Raises:
      SandboxError: too many programs could not be judged, or a layer stopped applying.
    """
    tests = [p.tests for p in problems] if tests is None else tests
    keys: list[_Key | None] = []
    read: list[tuple[Step, ...]] = []
    new: dict[_Key, Problem] = {}  # in the order in which each process meets them

    def jobs() -> Iterator[Job]:
      for problem, path, cases in zip(problems, paths, tests, strict=True):
        code = steps_lib.program_of(path)
        key = None if code is None else (problem.id, tuple(cases), code)
        keys.append(key)
        read.append(path)
        if key is not None and key not in self._known and key not in new:
          new[key] = problem
          if self._is_own(problem.id):
            yield self._job(problem, cases, code)

    stop.pause()
    run = lambda: self._run([p for p in problems if self._is_own(p.id)], jobs())  # noqa: E731
    shares = [iter(share) for share in distributed.gather(run)]
    for key in new:  # each process judged its own in this order
      self._known[key] = _verdict(next(shares[self._owner(key[0])]))
    return [
      self._without_program(path, cases) if key is None else self._known[key]
      for key, path, cases in zip(keys, read, tests, strict=True)
    ]

  def known(self, problems: Sequence[Problem]) -> list[list[Any]]:
    """What was judged of `problems` by their own tests, as plain values: for `learn`."""
    at = {p.id: i for i, p in enumerate(problems)}
    return [
      [at[key[0]], key[2], dataclasses.asdict(verdict)]
      for key, verdict in self._known.items()
      if key[0] in at and key[1] == problems[at[key[0]]].tests
    ]

  def learn(self, problems: Sequence[Problem], rows: Sequence[Sequence[Any]]) -> None:
    """Remembers what `known` of another session told of the same problems."""
    for i, code, said in rows:
      self._known[problems[i].id, problems[i].tests, code] = _verdict(said)

  def _run(self, problems: Sequence[Problem], jobs: Iterator[Job]):
    """Verdicts of programs, as plain values where they go to other processes."""
    self._time_references(problems)
    verdicts = self._pool.judge(jobs)
    return verdicts if distributed.count() == 1 else [dataclasses.asdict(v) for v in verdicts]

  def _job(self, problem: Problem, cases: Sequence[TestCase], code: str) -> Job:
    assertions = '' if cases else problem.test_code  # what replaces tests replaces these too
    limits = self._limits.get(problem.id)
    return Job(code, tuple(cases), problem.entry_point, assertions, limits)

  def _owner(self, problem_id: str) -> int:
    return zlib.crc32(problem_id.encode()) % distributed.count()

  def _is_own(self, problem_id: str) -> bool:
    return self._owner(problem_id) == distributed.index()

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


def _verdict(said: Verdict | dict[str, Any]) -> Verdict:
  """A verdict, or what `dataclasses.asdict` and JSON made of it."""
  if isinstance(said, Verdict):
    return said
  return Verdict(said['status'], tuple(TestResult(**t) for t in said['tests']), said['stderr'])
