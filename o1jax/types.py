"""Host records: what a problem, a step, a verdict and a trajectory are.

Frozen dataclasses of plain values. Nothing here imports JAX, so the sandbox,
the data readers and the search share them without starting a device.
"""

from __future__ import annotations

import dataclasses

# Verdict statuses, in the order in which a judge decides between them.
ACCEPTED = 'accepted'
WRONG_ANSWER = 'wrong_answer'
COMPILE_ERROR = 'compile_error'
RUNTIME_ERROR = 'runtime_error'
TIME_LIMIT = 'time_limit'
MEMORY_LIMIT = 'memory_limit'
OUTPUT_LIMIT = 'output_limit'
FORBIDDEN = 'forbidden'
SANDBOX_FAILURE = 'sandbox_failure'  # the harness failed: never a reward
STATUSES = (
  ACCEPTED,
  WRONG_ANSWER,
  COMPILE_ERROR,
  RUNTIME_ERROR,
  TIME_LIMIT,
  MEMORY_LIMIT,
  OUTPUT_LIMIT,
  FORBIDDEN,
  SANDBOX_FAILURE,
)


@dataclasses.dataclass(frozen=True, slots=True)
class TestCase:
  """One input and the output that a correct program gives for it.

  For a stdin problem both are text. For a call-based problem `input` is the
  JSON list of arguments and `output` the JSON of the returned value.
  """

  __test__ = False  # not a pytest class

  input: str
  output: str
  origin: str = 'dataset'  # 'dataset' or 'tcg'


@dataclasses.dataclass(frozen=True, slots=True)
class Problem:
  """A programming problem: what the model reads and how an answer is judged."""

  id: str
  statement: str
  tests: tuple[TestCase, ...] = ()
  entry_point: str | None = None  # None: the program reads stdin and prints
  solutions: tuple[str, ...] = ()  # reference programs, the first is trusted
  starter_code: str = ''
  test_code: str = ''  # HumanEval / MBPP style assertions, instead of `tests`
  source: str = ''


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
  """One reasoning action: 1 plan, 2 refine, 3 write the program (terminal)."""

  action: int
  text: str

  @property
  def terminal(self) -> bool:
    """Whether the step writes the program and so ends the path."""
    return self.action == 3


@dataclasses.dataclass(frozen=True, slots=True)
class TestResult:
  """What one test did: its status and its CPU and wall seconds."""

  __test__ = False

  status: str
  cpu_s: float = 0.0
  wall_s: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
  """The parent's judgement of one program over its tests.

  `tests` has one result per test case, in order. `masked` verdicts
  (`sandbox_failure`) carry no information about the program and must not be
  turned into a reward.
  """

  status: str
  tests: tuple[TestResult, ...] = ()
  stderr: str = ''  # the tail

  @property
  def masked(self) -> bool:
    """Whether the harness failed, so that the verdict says nothing about the program."""
    return self.status == SANDBOX_FAILURE

  @property
  def compiled(self) -> bool:
    """Whether the program was seen to compile; False for a masked verdict."""
    return self.status not in (COMPILE_ERROR, SANDBOX_FAILURE)

  @property
  def passed(self) -> int:
    """Number of tests passed."""
    return sum(t.status == ACCEPTED for t in self.tests)

  @property
  def pass_rate(self) -> float:
    """Share of tests passed, in [0, 1]; 0 where there are none."""
    return self.passed / len(self.tests) if self.tests else 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class Trajectory:
  """One path from the question to a program, or to where it was cut off.

  `values[j]` is the mean return of the node after step j+1 in the tree the
  path comes from and `visits[j]` how many returns that mean is over.
  A path that the depth or length limit cut has `verdict` None. `weight` says how many samples of
  the policy it stands for, where paths are not samples.
  """

  problem_id: str
  steps: tuple[Step, ...]
  values: tuple[float, ...] = ()
  visits: tuple[int, ...] = ()
  verdict: Verdict | None = None
  reward: float | None = None  # None: cut off or masked; takes no part in values
  policy_version: int = 0
  origin: str = ''  # which stage or search rule made it
  weight: float = 1.0

  @property
  def accepted(self) -> bool:
    """Whether its program passed every test."""
    return self.verdict is not None and self.verdict.status == ACCEPTED


@dataclasses.dataclass(frozen=True, slots=True)
class StepLabel:
  """A step after its prefix, with the mean return (in [0, 1]) seen below it."""

  problem_id: str
  prefix: tuple[Step, ...]
  step: Step
  value: float
  visits: int


@dataclasses.dataclass(frozen=True, slots=True)
class StepPair:
  """Two sibling steps after one prefix; `win` had the higher mean return."""

  problem_id: str
  prefix: tuple[Step, ...]
  win: Step
  lose: Step
  margin: float  # difference of the two mean returns, > 0
