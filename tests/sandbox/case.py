"""What a case of the conformance corpus is."""

from __future__ import annotations

import dataclasses
import textwrap

from o1jax.sandbox.protocol import Job, Limits
from o1jax.types import TestCase

# Every stdio case reads a number and has to print its double; the last answer cannot be guessed.
DOUBLE = (
  TestCase('3\n', '6\n'),
  TestCase('5\n', '10\n'),
  TestCase('271828182845\n', '543656365690\n'),
)
# Every call-based case is `f(values)`, the sorted list.
SORTED = (
  TestCase('[[3, 1, 2]]', '[1, 2, 3]'),
  TestCase('[[]]', '[]'),
  TestCase('[[271, 828, 182]]', '[182, 271, 828]'),
)
CHECK = """
def check(candidate):
  assert candidate([3, 1, 2]) == [1, 2, 3]
  assert candidate([]) == []
  assert candidate([271, 828, 182]) == [182, 271, 828]
"""


# For programs that reach the limit of memory: touching memory takes time.
LITTLE_MEMORY = Limits(cpu_s=3.0, memory_bytes=96 << 20, timeouts=1)
PATIENT = Limits(cpu_s=4.0, timeouts=1)


@dataclasses.dataclass(frozen=True)
class Case:
  """A program and the statuses that are right for it."""

  name: str
  code: str
  expected: tuple[str, ...]
  tests: tuple[TestCase, ...] = DOUBLE
  entry_point: str | None = None
  test_code: str = ''
  limits: Limits | None = None

  @property
  def job(self) -> Job:
    code = textwrap.dedent(self.code)
    return Job(
      code, () if self.test_code else self.tests, self.entry_point, self.test_code, self.limits
    )


def stdio(name: str, expected: str, code: str, tests=DOUBLE, limits=None) -> Case:
  return Case(name, code, tuple(expected.split()), tests, limits=limits)


def call(name: str, expected: str, code: str, tests=SORTED, entry_point='f', limits=None) -> Case:
  return Case(name, code, tuple(expected.split()), tests, entry_point, limits=limits)


def checked(name: str, expected: str, code: str, test_code=CHECK, entry_point='f') -> Case:
  return Case(name, code, tuple(expected.split()), (), entry_point, test_code)
