"""From what children reported to a verdict, in the process that holds the expected outputs.

A program's tests first run in one child (a batch). That is enough for most programs:

* everything matches and the child exits cleanly: accepted;
* nothing matches: the first test ran in a fresh process, so its failure stands and the
  program is not accepted;
* some match, some do not, and the program keeps nothing from one test to the next (`isolated`):
  every failure stands;
* otherwise the failures run again, one process each, and that decides.

A test that passed is never run again: the expected output was not there to be copied.
"""

from __future__ import annotations

import ast
import dataclasses
import signal
from collections.abc import Callable

from o1jax import types
from o1jax.sandbox import compare, tester, wire
from o1jax.sandbox.protocol import Job, Limits
from o1jax.types import TestCase, TestResult, Verdict

_SIGNALS = {
  signal.SIGSYS: types.FORBIDDEN,
  signal.SIGXFSZ: types.OUTPUT_LIMIT,
  signal.SIGXCPU: types.TIME_LIMIT,
}
_KINDS = {
  wire.ERROR: types.RUNTIME_ERROR,
  wire.MEMORY: types.MEMORY_LIMIT,
  wire.EXIT: types.RUNTIME_ERROR,
  wire.OVERFLOW: types.OUTPUT_LIMIT,
  wire.OPAQUE: types.WRONG_ANSWER,
  wire.COMPILE: types.COMPILE_ERROR,
}
_KILLED = {
  wire.CPU: types.TIME_LIMIT,
  wire.WALL: types.TIME_LIMIT,
  wire.FLOOD: types.OUTPUT_LIMIT,
}


@dataclasses.dataclass(frozen=True, slots=True)
class Reply:
  """What a zygote measured of one child, and what that child reported."""

  records: list[tuple[int, float, float, bytes]]  # kind, CPU seconds, wall seconds, payload
  stdout: bytes
  stderr: str  # the tail
  stderr_full: bool
  exit: int  # status; -1 if a signal ended it
  signal: int  # 0 if none did
  killed: int  # what the zygote stopped it for, as `wire` names it
  cpu_s: float
  wall_s: float
  rss_bytes: int
  tester_killed: int = wire.NOTHING

  @property
  def clean(self) -> bool:
    """Whether the child ended by itself with status 0."""
    return self.exit == 0 and self.killed == wire.NOTHING


class HarnessFailure(RuntimeError):
  """The sandbox itself failed; says nothing about the program."""


Ask = Callable[..., Reply]  # (request, test_code=None), of a zygote; raises HarnessFailure

# Names that reach what outlives one execution of a program's code. This is no defence: a
# program that slips through can only make its own failures stand.
_SHARED_STATE = (
  'setattr delattr globals exec eval compile __import__ __builtins__ open vars breakpoint'
)
_STATELESS = (
  'math cmath collections itertools functools heapq bisect string operator re typing sys copy '
  'fractions numbers abc array'
)


def _root(node: ast.expr) -> str:
  """The name that a chain of attributes starts from."""
  while isinstance(node, ast.Attribute):
    node = node.value
  return node.id if isinstance(node, ast.Name) else ''


def isolated(code: str) -> bool:
  """Whether a program keeps nothing in its process that a second execution could see.

  True only for code that imports nothing but stateless modules, sets no attribute of what
  it imported and names no function that reaches the interpreter's shared state.
  """
  try:
    tree = ast.Module(tester.parse(code), [])
  except (SyntaxError, ValueError, RecursionError, MemoryError):
    return False
  shared, stateless = set(_SHARED_STATE.split()), set(_STATELESS.split())
  shared_names = set()  # modules, and what was taken from them
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      names = [alias.name.partition('.')[0] for alias in node.names]
      shared_names.update(alias.asname or alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      names = [(node.module or '').partition('.')[0]]
      shared_names.update(alias.asname or alias.name for alias in node.names)
    elif isinstance(node, ast.Name) and node.id in shared:
      return False
    else:
      continue
    if not stateless.issuperset(names):
      return False
  return not any(
    isinstance(node, ast.Attribute)
    and isinstance(node.ctx, ast.Store | ast.Del)
    and _root(node) in shared_names
    for node in ast.walk(tree)
  )


def request_for(mode: str, job: Job, limits: Limits, tests: list[TestCase]) -> dict:
  """What a zygote is told: the program and the inputs, never an expected output."""
  return {
    'mode': mode,
    'code': job.code,
    'entry_point': job.entry_point,
    'inputs': [test.input for test in tests],
    'tests': len(tests),
    'cpu_s': limits.cpu_s,
    'wall_factor': limits.wall_factor,
    'memory_bytes': limits.memory_bytes,
    'output_bytes': limits.output_bytes,
  }


def _matches(payload: bytes, job: Job, test: TestCase, limits: Limits) -> bool:
  matches = compare.stdout_matches if job.entry_point is None else compare.result_matches
  return matches(payload, test.output, limits.float_tolerance)


def strict_result(reply: Reply, job: Job, test: TestCase, limits: Limits) -> TestResult:
  """The result of one test that ran in a process of its own."""

  def result(status: str) -> TestResult:
    return TestResult(status, reply.cpu_s, reply.wall_s)

  kind, payload = (reply.records[0][0], reply.records[0][3]) if reply.records else (None, b'')
  if reply.rss_bytes > limits.memory_bytes:
    return result(types.MEMORY_LIMIT)
  if reply.killed:
    return result(_KILLED[reply.killed])
  if len(reply.stdout) >= limits.output_bytes or reply.stderr_full:
    return result(types.OUTPUT_LIMIT)
  if reply.signal in _SIGNALS:
    return result(_SIGNALS[reply.signal])
  if kind in _KINDS:
    return result(_KINDS[kind])
  if reply.cpu_s > limits.cpu_s:
    return result(types.TIME_LIMIT)
  if not reply.clean or (job.entry_point is not None and kind != wire.OUTPUT):
    return result(types.RUNTIME_ERROR)
  output = reply.stdout if job.entry_point is None else payload
  return result(types.ACCEPTED if _matches(output, job, test, limits) else types.WRONG_ANSWER)


class Judgement:
  """The results of one job's tests as they come in."""

  def __init__(self, job: Job, limits: Limits, ask: Ask):
    self.job, self.limits, self.ask = job, limits, ask
    self.tests = list(job.tests)
    self.results: list[TestResult | None] = [None] * len(self.tests)
    self.isolated: bool | None = None  # not looked at yet
    self.stderr = ''

  def _keep_stderr(self, reply: Reply) -> None:
    self.stderr = self.stderr or reply.stderr

  def _is_isolated(self) -> bool:
    if self.isolated is None:
      self.isolated = isolated(self.job.code)
    return self.isolated

  def _out_of_time(self) -> bool:
    timeouts = sum(r is not None and r.status == types.TIME_LIMIT for r in self.results)
    return timeouts >= self.limits.timeouts

  def _run_strict(self, index: int) -> None:
    test = self.tests[index]
    if self._out_of_time():
      self.results[index] = TestResult(types.TIME_LIMIT)
      return
    reply = self.ask(request_for(wire.STRICT, self.job, self.limits, [test]))
    self._keep_stderr(reply)
    self.results[index] = strict_result(reply, self.job, test, self.limits)

  def _run_batch(self, start: int) -> tuple[int, bool]:
    """Runs tests from `start` on in one child, of those that read stdin as many as it can hold.

    Returns the first test without a result, and whether the child ended for a reason of its
    own there: then that test has to run alone.
    """
    most = len(self.tests) if self.job.entry_point is not None else wire.BATCH_INPUTS
    tests = self.tests[start : start + most]
    end = start + len(tests)
    reply = self.ask(request_for(wire.BATCH, self.job, self.limits, tests))
    self._keep_stderr(reply)
    if reply.rss_bytes > self.limits.memory_bytes:
      return start, True  # which test it was, only processes of their own can tell
    at = start
    for kind, cpu_s, wall_s, payload in reply.records:
      if kind == wire.BAIL:
        break
      if kind == wire.OUTPUT:
        right = _matches(payload, self.job, self.tests[at], self.limits)
        status = types.ACCEPTED if right else types.WRONG_ANSWER
      else:
        status = _KINDS[kind]
      if cpu_s > self.limits.cpu_s:
        status = types.TIME_LIMIT
      self.results[at] = TestResult(status, cpu_s, wall_s)
      at += 1
    if at < end and reply.killed == wire.CPU and self._is_isolated():
      self.results[at] = TestResult(types.TIME_LIMIT, self.limits.cpu_s, reply.wall_s)
      return at + 1, False
    if at == end and not reply.clean:
      self.results[start:end] = [None] * len(tests)
      return start, True
    return at, at < end

  def run_all(self) -> None:
    """A batch, further batches behind a test that ended one, and single runs where needed."""
    at, total = 0, len(self.tests)
    while at < total and not self._out_of_time():
      reached, alone = self._run_batch(at)
      if reached == at or (alone and not self._is_isolated()):
        break
      at = reached
      if alone:
        self._run_strict(at)
        at += 1
    first = self.results[0]
    if first is not None and first.status == types.COMPILE_ERROR:
      self.results = [TestResult(types.COMPILE_ERROR)] * total
      return
    for index in self._to_run_again():
      self._run_strict(index)

  def _to_run_again(self) -> list[int]:
    """The tests whose failure in a batch does not stand (see the head of this module)."""
    missing = [i for i, r in enumerate(self.results) if r is None]
    failed = [i for i, r in enumerate(self.results) if r and r.status != types.ACCEPTED]
    passed = len(self.tests) - len(missing) - len(failed)
    if (missing or passed) and failed and not self._is_isolated():
      return sorted(missing + failed)
    memory = [i for i in failed if self.results[i].status == types.MEMORY_LIMIT]
    return sorted(missing + memory)

  def verdict(self) -> Verdict:
    """The verdict, once all tests have a result."""
    bad = [r.status for r in self.results if r.status != types.ACCEPTED]
    return Verdict(bad[0] if bad else types.ACCEPTED, tuple(self.results), self.stderr)


def ended_status(reply: Reply, limits: Limits) -> str:
  """Why a program's process ended while it was still needed."""
  if reply.rss_bytes > limits.memory_bytes:
    return types.MEMORY_LIMIT
  if reply.stderr_full:
    return types.OUTPUT_LIMIT
  if reply.killed in _KILLED:
    return _KILLED[reply.killed]
  return _SIGNALS.get(reply.signal, types.RUNTIME_ERROR)


def checked_verdict(job: Job, limits: Limits, ask: Ask) -> Verdict:
  """The verdict by a job's test code, from what the tester's process reported."""
  total = tester.count_tests(job.test_code)
  request = {**request_for(wire.CHECK, job, limits, []), 'tests': total}
  reply = ask(request, job.test_code)
  results, failed = [], ended_status(reply, limits)
  message = ''
  for kind, cpu_s, wall_s, payload in reply.records:
    status = types.ACCEPTED if kind == wire.OUTPUT else _KINDS.get(kind, failed)
    if status != types.ACCEPTED and not message:
      message = payload.decode(errors='replace')
    if status == types.COMPILE_ERROR:
      return Verdict(status, (TestResult(status),) * total, reply.stderr or message)
    results.append(TestResult(status, cpu_s, wall_s))
  if len(results) < total:
    # The tester stopped: at a failure outside of any test, or because it was stopped itself.
    if results and results[-1].status != types.ACCEPTED:
      failed = results[-1].status
    elif reply.tester_killed in _KILLED:
      failed = _KILLED[reply.tester_killed]
    results += [TestResult(failed)] * (total - len(results))
  if reply.rss_bytes > limits.memory_bytes:
    results = [TestResult(types.MEMORY_LIMIT, r.cpu_s, r.wall_s) for r in results]
  bad = [r.status for r in results if r.status != types.ACCEPTED]
  return Verdict(bad[0] if bad else types.ACCEPTED, tuple(results), reply.stderr or message)


def judge(job: Job, limits: Limits, ask: Ask) -> Verdict:
  """The verdict on a job; raises HarnessFailure when the sandbox failed.

  The program's status is that of the first test it does not pass. A job without tests
  is only compiled: its verdict is `accepted` with no test, or `compile_error`.
  """
  if job.test_code:
    return checked_verdict(job, limits, ask)
  judgement = Judgement(job, limits, ask)
  if judgement.tests:
    judgement.run_all()
    return judgement.verdict()
  reply = ask(request_for(wire.BATCH, job, limits, []))
  broken = any(kind == wire.COMPILE for kind, *_ in reply.records) or not reply.clean
  return Verdict(types.COMPILE_ERROR if broken else types.ACCEPTED, (), reply.stderr)
