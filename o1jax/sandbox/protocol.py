"""What callers hand to the sandbox and what it may use: `Job` and `Limits`."""

from __future__ import annotations

import dataclasses
import json

from o1jax.types import TestCase, Verdict


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
  """What one program may use.

  CPU seconds are the limit that decides; the wall clock is a backstop against
  sleeping, because wall-clock limits fail correct programs on a loaded machine.
  """

  cpu_s: float = 3.0  # CPU seconds per test, all threads together
  wall_factor: float = 10.0  # a test that idles this many times `cpu_s` is stopped
  memory_bytes: int = 512 << 20  # resident bytes
  output_bytes: int = 8 << 20  # bytes of stdout, of stderr, or of an encoded value, per test
  timeouts: int = 2  # after this many tests over time the others are not run and count as such
  float_tolerance: float = 1e-6  # absolute or relative, whichever is wider

  def __post_init__(self):
    for name in ('cpu_s', 'wall_factor', 'memory_bytes', 'output_bytes', 'timeouts'):
      value = getattr(self, name)
      if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ValueError(f'limits.{name}={value!r} must be a number above 0')
    if not 0 <= self.float_tolerance < 1:
      raise ValueError(f'limits.float_tolerance={self.float_tolerance!r} must lie in [0, 1)')

  def with_headroom(self, reference: Verdict, factor: float = 3.0) -> Limits:
    """CPU limit at `factor` times what a correct program needed, never below a tenth of a second.

    `reference` is the verdict of a trusted program over the same tests.
    """
    slowest = max((test.cpu_s for test in reference.tests), default=0.0)
    return dataclasses.replace(self, cpu_s=max(0.1, factor * slowest))


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
  """One program to judge: either over `tests`, or by the assertions of `test_code`.

  Without `entry_point` the program reads stdin and prints. With it, each test calls
  that function (or `Solution().method`) with the JSON list of arguments. With
  `test_code` (HumanEval's `check(candidate)` or MBPP's assert lists) `tests` stays empty.
  """

  code: str
  tests: tuple[TestCase, ...] = ()
  entry_point: str | None = None
  test_code: str = ''
  limits: Limits | None = None  # None: those of the pool

  def __post_init__(self):
    if self.tests and self.test_code:
      raise ValueError('a job has tests or test_code, not both; send two jobs')
    if self.entry_point is not None:
      for i, test in enumerate(self.tests):
        _check_json(test.input, f'tests[{i}].input', list)
        _check_json(test.output, f'tests[{i}].output')
    if self.test_code:
      try:
        compile(self.test_code, 'test_code', 'exec', dont_inherit=True)
      except (SyntaxError, ValueError) as e:
        raise ValueError(f'test_code is not Python: {e}') from None


def _check_json(text: str, what: str, kind: type = object) -> None:
  # A test that no program can pass would silently turn every reward to 0.
  try:
    value = json.loads(text)
  except ValueError as e:
    raise ValueError(f'{what}={text[:80]!r} of a call must be JSON: {e}') from None
  if not isinstance(value, kind):
    raise ValueError(f'{what}={text[:80]!r} of a call must be the JSON list of its arguments')


class SandboxError(RuntimeError):
  """The sandbox cannot give verdicts: a layer is missing, or it fails too often."""
