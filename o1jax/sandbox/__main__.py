"""`python -m o1jax.sandbox < jobs.jsonl > verdicts.jsonl`, and `--doctor`.

A job is a line `{"id", "code", "tests": [{"input", "output"}], "entry_point"?, "limits"?}` or
`{"id", "code", "test_code", "entry_point"?, "limits"?}`; a verdict is a line `{"id", "status",
"passed", "total", "tests": [{"status", "cpu_s", "wall_s"}], "stderr"}`, in the order of the
jobs. A line that is not a job gets `{"line", "error"}` in its place, and the rest goes on.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import difflib
import json
import logging
import sys
import time
from collections.abc import Iterator
from typing import Any

from o1jax.sandbox import confine
from o1jax.sandbox.pool import ALLOW_UNSAFE, Pool
from o1jax.sandbox.protocol import Job, Limits, SandboxError
from o1jax.types import TestCase, Verdict

_JOB_KEYS = ('id', 'code', 'tests', 'test_code', 'entry_point', 'limits')
_LIMIT_KEYS = tuple(field.name for field in dataclasses.fields(Limits))
_IN_FLIGHT = 256
_DOCTOR_S = 1.0  # seconds to measure each rate


def _check_keys(given: Any, known: tuple[str, ...], what: str) -> None:
  if not isinstance(given, dict):
    raise ValueError(f'{what} must be an object, not {type(given).__name__}')
  for key in given:
    if key not in known:
      close = difflib.get_close_matches(key, known, 1)
      hint = f'; did you mean {close[0]!r}?' if close else f'; known: {", ".join(known)}'
      raise ValueError(f'{what} has no key {key!r}{hint}')


def _text(value: Any, what: str, called: bool) -> str:
  """A test's input or output as text; of a call, the JSON value itself may stand there."""
  if isinstance(value, str):
    return value
  if called:
    return json.dumps(value)
  raise ValueError(f'{what} must be text, not {type(value).__name__}')


def _parse_test(test: Any, what: str, called: bool) -> TestCase:
  _check_keys(test, ('input', 'output'), what)
  if len(test) != 2:
    raise ValueError(f'{what} needs "input" and "output"')
  given, expected = (_text(test[key], f'{what}.{key}', called) for key in ('input', 'output'))
  return TestCase(given, expected)


def parse_job(line: str, limits: Limits) -> tuple[Any, Job]:
  """The id and the job of a line; raises ValueError saying what is wrong with it."""
  given = json.loads(line)
  _check_keys(given, _JOB_KEYS, 'a job')
  code, entry_point = given.get('code'), given.get('entry_point')
  if not isinstance(code, str):
    raise ValueError('a job needs "code", a text')
  if not isinstance(entry_point, str | None):
    raise ValueError('"entry_point" must be a text')
  tests = given.get('tests') or ()
  if not isinstance(tests, list | tuple):
    raise ValueError('"tests" must be a list')
  cases = tuple(_parse_test(t, f'tests[{i}]', entry_point is not None) for i, t in enumerate(tests))
  own = given.get('limits') or {}
  _check_keys(own, _LIMIT_KEYS, 'limits')
  test_code = given.get('test_code') or ''
  if not isinstance(test_code, str):
    raise ValueError('"test_code" must be a text')
  if not cases and not test_code:
    raise ValueError('a job needs "tests" or "test_code"')
  limits = dataclasses.replace(limits, **own)
  return given.get('id'), Job(code, cases, entry_point, test_code, limits)


def verdict_line(job_id: Any, verdict: Verdict) -> dict:
  """A verdict as it is written."""
  return {
    'id': job_id,
    'status': verdict.status,
    'passed': verdict.passed,
    'total': len(verdict.tests),
    'tests': [
      {'status': t.status, 'cpu_s': round(t.cpu_s, 6), 'wall_s': round(t.wall_s, 6)}
      for t in verdict.tests
    ],
    'stderr': verdict.stderr,
  }


def judge_lines(pool: Pool, lines: Iterator[str]) -> Iterator[dict]:
  """A verdict or an error for each line that is not blank, in order."""
  waiting: collections.deque = collections.deque()
  for number, line in enumerate(lines, 1):
    if not line.strip():
      continue
    try:
      job_id, job = parse_job(line, pool.limits)
      waiting.append((job_id, pool.submit(job)))
    except (ValueError, TypeError, RecursionError) as e:
      waiting.append(({'line': number, 'error': str(e)}, None))
    while len(waiting) >= _IN_FLIGHT or (waiting and _is_done(waiting[0])):
      yield _result(*waiting.popleft())
  while waiting:
    yield _result(*waiting.popleft())


def _is_done(entry: tuple) -> bool:
  return entry[1] is None or entry[1].done()


def _result(job_id: Any, future: Any) -> dict:
  return job_id if future is None else verdict_line(job_id, future.result())


def doctor(pool: Pool) -> dict:
  """What this machine gives: the tier, its layers, and programs a second and worker."""
  tests = tuple(TestCase(f'{i}\n', f'{2 * i}\n') for i in range(10))
  rates = {}
  for name, job in (
    ('programs_of_1_test', Job('print(2 * int(input()))', tests[:1])),
    ('programs_of_10_tests', Job('print(2 * int(input()))', tests)),
  ):
    start, done = time.monotonic(), 0
    while time.monotonic() - start < _DOCTOR_S:
      done += len(pool.judge([job] * 50))
    rates[name] = round(done / (time.monotonic() - start) / pool.workers)
  return {
    'tier': pool.tier,
    'layers': pool.layers,
    'not_available': pool.confirmed.reasons,
    'workers': pool.workers,
    'per_second_and_worker': rates,
  }


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
  """The command line."""
  parser = argparse.ArgumentParser('python -m o1jax.sandbox', description=__doc__.split('\n')[0])
  parser.add_argument('--workers', type=int, help='programs at a time; default: one a core')
  parser.add_argument('--tiers', default=''.join(confine.TIERS), help='which may be taken')
  parser.add_argument('--url', default='', help='an HTTP service that runs the programs')
  parser.add_argument('--allow-unsafe', default='', metavar='SENTENCE', help=repr(ALLOW_UNSAFE))
  parser.add_argument('--doctor', action='store_true', help='say what this machine gives')
  for field in dataclasses.fields(Limits):
    option = '--' + field.name.replace('_', '-')
    parser.add_argument(option, type=type(field.default), default=field.default)
  return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
  """0: every line was judged; 1: some were not jobs; 2: there is no sandbox, or no sense."""
  args = parse_arguments(argv)
  logging.basicConfig(level=logging.WARNING, format='%(message)s')
  try:
    limits = Limits(**{key: getattr(args, key) for key in _LIMIT_KEYS})
    options = {'allow_unsafe': args.allow_unsafe, 'tiers': tuple(args.tiers), 'url': args.url}
    with Pool(args.workers, limits, **options) as pool:
      print(f'tier {pool.tier}: {", ".join(pool.layers)}', file=sys.stderr)
      if args.doctor:
        print(json.dumps(doctor(pool), indent=2))
        return 0
      faults = 0
      for line in judge_lines(pool, sys.stdin):
        faults += 'error' in line
        print(json.dumps(line), flush=True)
      return int(faults > 0)
  except (SandboxError, ValueError) as e:
    print(f'error: {e}', file=sys.stderr)
    return 2


if __name__ == '__main__':
  sys.exit(main())
