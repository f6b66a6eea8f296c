"""Looks at problems, checks them, cleans them, and writes what a run found for other trainers.

    python -m o1jax.data inspect PATH  [--against EVAL ...]
    python -m o1jax.data validate PATH [--solutions N] [--out FILE]
    python -m o1jax.data clean PATH --out FILE [--against EVAL ...]
    python -m o1jax.data export RUN --format sft|preference|stepwise|o1coder|o1coder-hard|trees

Exit codes: 0 done, 1 `validate` found rows that cannot be trusted, 2 bad input.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import logging
import os
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence

from o1jax.config import closest
from o1jax.data import export, o1coder, overlap, trust
from o1jax.data.readers import Faults, ReadError, chosen, entries, read_problems, to_row
from o1jax.data.readers.rows import rows_of
from o1jax.data.summary import Summary
from o1jax.sandbox import Job, Limits, Pool, SandboxError
from o1jax.types import Problem, Verdict


def inspect(args: argparse.Namespace) -> int:
  """Prints what was understood of a source."""
  paths = chosen(args.path, args.split)
  if not args.format and _holds_labels(paths[0]):
    return _inspect_labels(paths, args)
  faults, summary, sieve = Faults(args.strict), Summary(), Sieve(args.against)
  for entry in _limited(entries(paths, faults, args.format), args.limit):
    summary.add(entry)
    sieve.drop(entry.problem)
  print(summary.text(faults))
  print(sieve.text())
  return 0


def validate(args: argparse.Namespace) -> int:
  """Runs reference programs on their problems' own tests; names the rows that cannot be trusted."""
  faults = Faults(args.strict)
  total = bad = 0
  found = _limited(entries(chosen(args.path, args.split), faults, args.format), args.limit)
  with (
    Pool(args.workers, Limits(cpu_s=args.cpu_s), allow_unsafe=args.allow_unsafe) as pool,
    _writer(args.out) as write,
  ):
    for finding in trust.findings(found, lambda pairs: _judge(pool, pairs), args.solutions):
      total += 1
      bad += bool(finding.reason)
      if finding.reason:
        print(finding, flush=True)
      elif args.out:
        write(to_row(finding.problem))
  print(f'{total - bad} of {total} problems can be trusted: a reference program passes every test')
  print(faults)
  return int(bad > 0)


def clean(args: argparse.Namespace) -> int:
  """Writes the problems in o1jax's own format, without near-duplicates and overlap."""
  faults, sieve, kept, seen = Faults(args.strict), Sieve(args.against), 0, set()
  with _writer(args.out) as write:
    for entry in _limited(entries(chosen(args.path, args.split), faults, args.format), args.limit):
      match = sieve.drop(entry.problem)
      if match is not None:
        print(match, file=sys.stderr)
      elif entry.problem.id in seen:
        faults.add(entry.fault(f'the id {entry.problem.id!r} was there before'))
      else:
        seen.add(entry.problem.id)
        write(to_row(entry.problem))
        kept += 1
  print(f'{kept} problems written to {args.out}')
  print(sieve.text(shown=0))
  print(faults)
  return 0


def export_run(args: argparse.Namespace) -> int:
  """Writes the trajectories of a run in an open format."""
  if args.format not in export.EXPORTS:
    known = ', '.join(export.EXPORTS)
    near = closest(args.format, export.EXPORTS)
    raise ReadError(f'--format {args.format!r} is no export format; known: {known}{near}')
  faults = Faults(args.strict)
  forest = export.read_run(args.path, faults)
  count = 0
  with _writer(args.out) as write:
    for row in _limited(export.EXPORTS[args.format](forest), args.limit):
      write(row)
      count += 1
  print(f'{count} {args.format} rows of {len(forest)} problems; {faults}', file=sys.stderr)
  return 0


class Sieve:
  """Near-duplicates among problems, and overlap with evaluation sets, found and counted."""

  def __init__(self, against: Sequence[str]):
    problems = itertools.chain.from_iterable(map(read_problems, against))
    self._evaluation = overlap.Evaluation(problems)
    self._unique = overlap.Unique()
    self._matches: list[overlap.Match] = []

  def drop(self, problem: Problem) -> overlap.Match | None:
    """What the problem is too much like, or None."""
    match = self._evaluation.drop(problem) or self._unique.drop(problem)
    if match is not None:
      self._matches.append(match)
    return match

  def text(self, shown: int = 20) -> str:
    """How many were found, and the first `shown` of them."""
    overlaps = sum(match.measure == 'containment' for match in self._matches)
    lines = [
      f'{len(self._matches) - overlaps} near-duplicates '
      f'(resemblance {overlap.RESEMBLANCE} or more), {overlaps} overlap with evaluation sets '
      f'(containment {overlap.CONTAINMENT} or more)'
    ]
    lines += [f'  {match}' for match in self._matches[:shown]]
    return '\n'.join(lines)


def _holds_labels(path: pathlib.Path) -> bool:
  row = next((row.value for row in rows_of(path) if row.value is not None), {})
  return row.keys() >= o1coder.NEEDS


def _inspect_labels(paths: Sequence[pathlib.Path], args: argparse.Namespace) -> int:
  """Prints what O1-CODER's files of step labels hold."""
  faults, problems, values, first = Faults(args.strict), set(), [], None
  found = itertools.chain.from_iterable(o1coder.read_labels(path, faults) for path in paths)
  for label in _limited(found, args.limit):
    first = first or label
    problems.add(label.problem_id)
    values.append(label.value)
  good = sum(value > 0 for value in values)
  print(f'{len(values)} labelled steps of {len(problems)} problems (O1-CODER): {good} above 0')
  print(faults)
  if first is not None:
    print(f'first label: {first.value} for step {len(first.prefix) + 1}:\n{first.step.text}')
  return 0


def _judge(pool: Pool, pairs: Sequence[tuple[Problem, str]]) -> list[Verdict | str]:
  jobs: list[Job | str] = []
  for problem, code in pairs:
    try:
      jobs.append(Job(code, problem.tests, problem.entry_point, problem.test_code))
    except ValueError as error:
      jobs.append(str(error))
  verdicts = iter(pool.judge([job for job in jobs if isinstance(job, Job)]))
  return [next(verdicts) if isinstance(job, Job) else job for job in jobs]


def _limited(items: Iterable, limit: int | None) -> Iterator:
  return itertools.islice(items, limit)


@contextlib.contextmanager
def _writer(out: str | None) -> Iterator[Callable[[dict], None]]:
  """Writes JSON Lines to a file, which appears when all are written, or to the terminal."""
  if out is None:
    yield lambda row: print(json.dumps(row, ensure_ascii=False))
    return
  path = pathlib.Path(out)
  temporary = path.with_name(f'.{path.name}.tmp')
  try:
    with temporary.open('w', encoding='utf-8') as file:
      yield lambda row: file.write(json.dumps(row, ensure_ascii=False) + '\n')
    temporary.replace(path)
  finally:
    temporary.unlink(missing_ok=True)


COMMANDS = {'inspect': inspect, 'validate': validate, 'clean': clean, 'export': export_run}


def _count(text: str) -> int:
  if not text.isdecimal() or int(text) < 1:
    raise argparse.ArgumentTypeError(f'{text!r} is no number of 1 or more')
  return int(text)


def parse(argv: Sequence[str]) -> argparse.Namespace:
  """The command line; raises ReadError for an unknown command, SystemExit 2 for other faults."""
  if argv and not argv[0].startswith('-') and argv[0] not in COMMANDS:
    near = closest(argv[0], COMMANDS)
    raise ReadError(f'no command {argv[0]!r}; choose from {", ".join(COMMANDS)}{near}')
  parser = argparse.ArgumentParser(
    'python -m o1jax.data', description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  commands = parser.add_subparsers(dest='command', required=True)
  for name, body in COMMANDS.items():
    command = commands.add_parser(name, help=body.__doc__)
    command.add_argument('path', metavar='RUN' if name == 'export' else 'PATH')
    command.add_argument('--strict', action='store_true', help='stop at the first bad row')
    command.add_argument('--limit', type=_count, metavar='N', help='only the first N')
    command.add_argument(
      '--format', default='', required=name == 'export', help='default: recognised by the fields'
    )
    if name != 'export':
      command.add_argument('--split', metavar='S', help='only train, dev or test of a folder')
    if name in ('inspect', 'clean'):
      command.add_argument('--against', action='append', default=[], metavar='EVAL')
    if name != 'inspect':
      command.add_argument('--out', metavar='FILE', required=name == 'clean')
    if name == 'validate':
      command.add_argument('--solutions', type=_count, default=1, help='tried for each problem')
      command.add_argument('--workers', type=_count, help='programs at a time; default: the cores')
      command.add_argument('--cpu-s', type=float, default=Limits().cpu_s, help='of one test')
      command.add_argument('--allow-unsafe', default='', metavar='SENTENCE')
  return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one command; bad input is one line on stderr and exit code 2."""
  logging.basicConfig(level=logging.WARNING, format='%(message)s')
  try:
    args = parse(list(sys.argv[1:] if argv is None else argv))
    return COMMANDS[args.command](args)
  except BrokenPipeError:  # the reader of a pipe has had enough
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
  except (ValueError, OSError, SandboxError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 2


if __name__ == '__main__':
  sys.exit(main())
