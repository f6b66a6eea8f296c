"""Executions of programs a second and core: the sandbox, and the usual ways beside it.

    python benchmarks/sandbox.py [--seconds 3] [--growth 100000]

Everything is pinned to one core, the caller included, so that a rate is a rate a core. The
program reads a number and prints another. `strict` is one process a test, `batched` ten tests
a process; `subprocess` starts `python -c`, `process` a `multiprocessing.Process` that executes
the program with its streams redirected and answers on a pipe, as the usual harnesses do. The
ways take turns, so that a busy machine slows all of them; executions a CPU second say what a
core to itself would give. `--growth N` runs N tests more, half
of them strict, and says what the processes hold before and after. The last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from o1jax.sandbox import wire, zygote
from o1jax.sandbox.judge import judge, request_for, strict_result
from o1jax.sandbox.protocol import Job, Limits
from o1jax.types import ACCEPTED, TestCase

CODE = 'n = int(input())\nprint(sum(i * i for i in range(n)))\n'
TESTS = tuple(TestCase(f'{n}\n', f'{sum(i * i for i in range(n))}\n') for n in range(10, 20))
LIMITS = Limits()


def by_subprocess(test: TestCase) -> str:
  command = [sys.executable, '-c', CODE]
  return subprocess.run(command, input=test.input, capture_output=True, text=True).stdout


def _target(text: str, pipe) -> None:
  sys.stdin, out = io.StringIO(text), io.StringIO()
  with contextlib.redirect_stdout(out):
    exec(compile(CODE, 'program', 'exec'), {'__name__': '__main__'})
  pipe.send(out.getvalue())


def by_process(test: TestCase) -> str:
  context = multiprocessing.get_context('fork')
  ours, theirs = context.Pipe(duplex=False)
  process = context.Process(target=_target, args=(test.input, theirs))
  process.start()
  answer = ours.recv()
  process.join()
  process.close()
  ours.close()
  theirs.close()
  return answer


class Rate:
  """Counts executions, seconds and CPU seconds over the turns that one way gets."""

  def __init__(self, turn: Callable[[], int], cpu_seconds: Callable[[], float]):
    self.turn, self.cpu_seconds = turn, cpu_seconds
    self.done, self.wall_s, self.cpu_s = 0, 0.0, 0.0

  def run(self, seconds: float) -> None:
    start, cpu = time.perf_counter(), self.cpu_seconds()
    while (now := time.perf_counter() - start) < seconds:
      self.done += self.turn()
    self.wall_s += now
    self.cpu_s += self.cpu_seconds() - cpu


def _require(right: bool) -> None:
  if not right:
    raise SystemExit('a correct program was not accepted')


def ways(one: zygote.Zygote) -> dict[str, Rate]:
  """Each way as a function that runs some tests and returns how many."""

  def strict() -> int:
    for test in TESTS:
      job = Job(CODE, (test,))
      reply = one.ask(request_for(wire.STRICT, job, LIMITS, [test]))
      _require(strict_result(reply, job, test, LIMITS).status == ACCEPTED)
    return len(TESTS)

  def batched() -> int:
    _require(judge(Job(CODE, TESTS), LIMITS, one.ask).status == ACCEPTED)
    return len(TESTS)

  def single(run: Callable[[TestCase], str]) -> Callable[[], int]:
    def turn() -> int:
      _require(run(TESTS[0]).split() == TESTS[0].output.split())
      return 1

    return turn

  turns = {
    'strict': strict,
    'batched': batched,
    'subprocess': single(by_subprocess),
    'process': single(by_process),
  }
  pids = family(one.process.pid)
  return {name: Rate(turn, lambda: spent(pids)) for name, turn in turns.items()}


def family(pid: int) -> list[int]:
  """A process and its children."""
  children = Path(f'/proc/{pid}/task/{pid}/children').read_text().split()
  return [pid, *(p for child in children for p in family(int(child)))]


def spent(pids: list[int]) -> float:
  """CPU seconds of this process, of what it waited for, and of a zygote with its children."""
  own = resource.getrusage(resource.RUSAGE_CHILDREN)
  total = time.process_time() + own.ru_utime + own.ru_stime
  for pid in pids:
    fields = Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()
    total += sum(map(int, fields[11:15])) / os.sysconf('SC_CLK_TCK')
  return total


def held(pid: int) -> dict[str, int]:
  """What a zygote's processes hold: resident bytes (shared pages counted in each), processes."""
  pids = family(pid)
  resident = 0
  for each in pids:
    status = Path(f'/proc/{each}/status').read_text()
    resident += int(status.partition('VmRSS:')[2].split()[0]) << 10
  return {
    'resident_bytes': resident,
    'processes': len(pids),
    'files': len(os.listdir('/proc/self/fd')),
  }


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--seconds', type=float, default=3.0, help='for each way')
  parser.add_argument('--growth', type=int, default=0, metavar='N', help='tests to run more')
  args = parser.parse_args()
  os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
  one, confirmed = zygote.strongest()
  rates = ways(one)
  for rate in rates.values():  # the first call of each way, uncounted
    rate.turn()
  turns = 5
  for _ in range(turns):
    for rate in rates.values():
      rate.run(args.seconds / turns)
  report: dict = {}
  for name, rate in rates.items():
    report[f'{name}_per_core'] = round(rate.done / rate.wall_s, 1)
    report[f'{name}_per_cpu_second'] = round(rate.done / rate.cpu_s, 1)
    per_second, per_cpu = report[f'{name}_per_core'], report[f'{name}_per_cpu_second']
    print(f'{name:12} {per_second:8.0f} a second, {per_cpu:8.0f} a CPU second')
  before = held(one.process.pid)
  megabytes = before['resident_bytes'] / 2**20
  print(f'a zygote holds {megabytes:.1f} MB in {before["processes"]} processes')
  growth = {}
  if args.growth:
    done = 0
    while done < args.growth:
      done += rates['batched'].turn() + rates['strict'].turn()
    after = held(one.process.pid)
    growth = {'runs': done, 'before': before, 'after': after}
    print(f'after {done} more tests: {after}, before: {before}')
  one.close()
  report |= {'tier': confirmed.tier, 'zygote_bytes': before['resident_bytes'], 'cores_pinned': 1}
  print(json.dumps(report | ({'growth': growth} if growth else {})))


if __name__ == '__main__':
  main()
