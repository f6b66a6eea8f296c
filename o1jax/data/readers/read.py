"""Problems of a source, one at a time, with the rows that make none counted and reported."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import pathlib
from collections.abc import Iterable, Iterator

from o1jax.data import steps as steps_lib
from o1jax.data.readers.faults import BadRow, Fault, Faults, ReadError
from o1jax.data.readers.files import SPLITS, data_files
from o1jax.data.readers.formats import FORMATS, Format, by_name, is_python, recognised
from o1jax.data.readers.rows import Row, rows_of
from o1jax.types import Problem

logger = logging.getLogger(__name__)

_PEEKED = 20  # rows that the format is recognised from


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
  """A problem, and where it stands."""

  problem: Problem
  path: pathlib.Path
  row: int  # line of a JSON Lines file, else element or record, from 1
  format: str

  def fault(self, reason: str) -> Fault:
    """Why the problem is left out after all."""
    return Fault(self.path, self.row, reason)


def read_problems(
  source: str | pathlib.Path, *, split: str | None = None, format: str = '', strict: bool = False
) -> Iterator[Problem]:
  """The problems of a file or a folder, in order, held one at a time.

  Rows that make no problem are left out, and logged in one warning when the iterator ends.

  Args:
    source: a file (`.jsonl`, `.json`, each also `.gz`; `.parquet`, `.arrow`) or a folder of them.
    split: 'train', 'dev' or 'test' reads only the files of that split; None reads all.
    format: one of `FORMATS` by name; empty recognises each file by the fields of its first rows.
    strict: a row that makes no problem is an error.

  Raises:
    ReadError: the source cannot be read, its format is not known, or, with `strict`, at the first
      bad row: with its file, row and reason.
    FileNotFoundError: there is no such source.
  """
  faults = Faults(strict)
  try:
    for entry in entries(chosen(source, split), faults, format):
      yield entry.problem
  finally:
    if faults.count:
      logger.warning('%s: %s', source, faults)


def chosen(source: str | pathlib.Path, split: str | None = None) -> list[pathlib.Path]:
  """The files of a source, or those of one split; raises ReadError where it has none of that."""
  files = data_files(source)
  if split is None:
    return [path for paths in files.values() for path in paths]
  if split not in files:
    there = ', '.join(repr(name) for name in SPLITS if name in files) or 'no file that names one'
    raise ReadError(f'{str(source)!r} has no split {split!r}; it has {there}')
  return files[split]


def entries(
  paths: Iterable[pathlib.Path], faults: Faults, format: str = '', trusted: str = ''
) -> Iterator[Entry]:
  """The problems of some files with their places.

  Bad rows go to `faults`, save those of the format called `trusted`: they raise ReadError.
  """
  forced = by_name(format) if format else None
  for path in paths:
    rows = rows_of(path)
    known, rows = (forced, rows) if forced else _recognise(path, rows)
    for row in rows:
      try:
        yield Entry(to_problem(row, known), path, row.number, known.name)
      except BadRow as bad:
        fault = Fault(path, row.number, str(bad))
        if known.name == trusted:
          raise ReadError(str(fault)) from None
        faults.add(fault)


def _recognise(path: pathlib.Path, rows: Iterator[Row]) -> tuple[Format, Iterator[Row]]:
  first = list(itertools.islice(rows, _PEEKED))
  found = recognised(row.value for row in first if row.value is not None)
  if found is not None:
    return found, itertools.chain(first, rows)
  if not first:
    raise ReadError(f'{path} holds no rows')
  names = ', '.join(f.name for f in FORMATS)
  fields = next((sorted(row.value) for row in first if row.value is not None), None)
  seen = f'row {first[0].number}: {first[0].fault}' if fields is None else f'fields {fields}'
  raise ReadError(f'{path} is of no known format ({seen}); name one of {names}')


def to_problem(row: Row, known: Format) -> Problem:
  """The row's problem, fit for a run: raises BadRow where the loop could not use it."""
  if row.value is None:
    raise BadRow(row.fault)
  problem = known.read(row.value)
  if not problem.id or not problem.statement.strip():
    raise BadRow(f'the {"statement" if problem.id else "id"} is empty')
  if known.name != 'o1jax' and not (problem.tests or problem.test_code.strip()):
    raise BadRow('has no tests')
  if problem.tests and problem.test_code:
    raise BadRow('has tests and test code; a problem is judged by one of them')
  if problem.test_code and not is_python(problem.test_code):
    raise BadRow('the test code is not Python 3')
  try:
    steps_lib.prompt_of(problem.statement).encode()
  except UnicodeEncodeError:
    raise BadRow('the statement holds half a character (a lone surrogate)') from None
  except ValueError as error:
    raise BadRow(str(error)) from None
  return problem
