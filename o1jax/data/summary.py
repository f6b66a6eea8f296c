"""What `inspect` says about a source: counts, sizes, and the first problem."""

from __future__ import annotations

import array
import collections
import pathlib
import statistics
import textwrap

from o1jax.data.readers import Entry, Faults
from o1jax.types import Problem

_LINES = 12  # of a statement or a program that are shown
_WIDTH = 96  # characters of a line that are shown


class Summary:
  """Gathers counts over entries, holding a few numbers of each problem."""

  def __init__(self):
    self._files: dict[pathlib.Path, collections.Counter] = {}
    self._judged = collections.Counter()
    self._sizes = {name: array.array('q') for name in ('tests', 'solutions', 'characters')}
    self._first: Problem | None = None

  def add(self, entry: Entry) -> None:
    """Counts one problem."""
    problem = entry.problem
    self._first = self._first or problem
    self._files.setdefault(entry.path, collections.Counter())[entry.format] += 1
    self._judged[_judged_by(problem)] += 1
    self._sizes['tests'].append(len(problem.tests))
    self._sizes['solutions'].append(len(problem.solutions))
    self._sizes['characters'].append(len(problem.statement))

  @property
  def count(self) -> int:
    """Problems added."""
    return self._judged.total()

  def text(self, faults: Faults) -> str:
    """The report, for a terminal."""
    lines = [f'{self.count} problems; files that hold some: {len(self._files)}']
    for path, formats in self._files.items():
      kinds = ', '.join(f'{count} {name}' for name, count in formats.items())
      lines.append(f'  {path} ({path.stat().st_size:,} bytes): {kinds}')
    if self._first is not None:
      judged = ', '.join(f'{count} by {how}' for how, count in self._judged.most_common())
      bare = self._sizes['solutions'].count(0)
      lines += [f'judged: {judged}', f'without a reference program: {bare}']
      lines += [_spread(name, sizes) for name, sizes in self._sizes.items()]
    lines.append(str(faults))
    if self._first is not None:
      lines += ['first problem:', *_shown(self._first)]
    return '\n'.join(lines)


def _judged_by(problem: Problem) -> str:
  if problem.test_code:
    return 'test code'
  if not problem.tests:
    return 'nothing'
  return 'stdin and stdout' if problem.entry_point is None else 'calls'


def _spread(name: str, sizes: array.array) -> str:
  what = 'characters of a statement' if name == 'characters' else f'{name} a problem'
  return f'{what}: {min(sizes)} to {max(sizes)}, median {statistics.median(sizes):g}'


def _shown(problem: Problem) -> list[str]:
  lines = [f'  id: {problem.id}', '  statement:', *_block(problem.statement)]
  if problem.entry_point:
    lines.append(f'  entry point: {problem.entry_point}')
  for test in problem.tests[:1]:
    lines += [f'  first test: {_cut(repr(test.input))} -> {_cut(repr(test.output))}']
  if problem.test_code:
    lines += ['  test code:', *_block(problem.test_code)]
  for solution in problem.solutions[:1]:
    lines += ['  reference program:', *_block(solution)]
  return lines


def _block(text: str) -> list[str]:
  lines = text.strip('\n').split('\n')
  shown = [_cut(line) for line in lines[:_LINES]]
  if len(lines) > _LINES:
    shown.append(f'... {len(lines) - _LINES} more lines')
  return textwrap.indent('\n'.join(shown), '    ').split('\n')


def _cut(line: str) -> str:
  return line if len(line) <= _WIDTH else f'{line[:_WIDTH]}...'
