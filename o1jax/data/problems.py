"""Problem splits: the embedded family, a file, or a folder of files in any known format."""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Callable, Collection, Iterator

from o1jax.data import family, overlap
from o1jax.data.readers import SPLITS, Entry, Faults, data_files, entries
from o1jax.types import Problem

logger = logging.getLogger(__name__)

_TENTHS = 10
_HELD_OUT = {'dev': 0, 'test': 1}  # the tenth of the problems that is a split the source lacks
_SHOWN = 20  # dropped problems that the log names


def load_split(
  source: str,
  split: str,
  count: int,
  *,
  seed: int,
  usable: Callable[[Problem], bool] = lambda problem: True,
) -> tuple[Problem, ...]:
  """The first `count` `usable` problems of a split, the same on every machine.

  A folder with files of the split's name is read from them. Splits that a source lacks are held out
  by a hash of the statement: a tenth of the train files each, or of all files where none is called
  train. From train and dev, near-duplicates are dropped and what the later splits (dev, test)
  contain, see `overlap`; nothing is dropped from test.

  Rows that make no problem or repeat an id, and problems dropped, are logged in one warning each.
  In o1jax's own format nothing is dropped, and a row that makes no problem is an error.

  Args:
    source: 'embedded', or what `readers.read_problems` takes.
    split: 'train', 'dev' or 'test'.
    count: how many; a source may hold fewer.
    seed: of the embedded family's drawing.
    usable: says which problems count; asked in the source's order.

  Raises:
    ValueError: a source of no known format or without problems; a bad row in o1jax's own format,
      with file, row and reason.
    FileNotFoundError: there is no such source, or no data in it.
  """
  if source == 'embedded':
    there, faults = family.problems(split, count, seed), Faults()
  else:
    faults = Faults()
    there = _wanted(source, split, faults)
  try:
    found = tuple(itertools.islice(filter(usable, there), count))
  finally:
    if faults.count:
      logger.warning('%s, %s: %s', source, split, faults)
  if not found:
    raise ValueError(f'data.source={source!r} holds no problems for {split}: {faults}')
  return found


def _wanted(source: str, split: str, faults: Faults) -> Iterator[Problem]:
  """The problems of a split without those that are dropped."""
  later = SPLITS[SPLITS.index(split) + 1 :]
  evaluation = unique = None
  seen: set[str] = set()
  dropped: list[overlap.Match] = []
  try:
    for entry in _held(source, split, faults):
      problem = entry.problem
      if problem.id in seen:
        faults.add(entry.fault(f'the id {problem.id!r} was there before'))
        continue
      seen.add(problem.id)
      if later and entry.format != 'o1jax':
        if evaluation is None:
          others = (e.problem for name in later for e in _held(source, name, Faults()))
          evaluation, unique = overlap.Evaluation(others), overlap.Unique()
        match = evaluation.drop(problem) or unique.drop(problem)
        if match is not None:
          dropped.append(match)
          continue
      yield problem
  finally:
    if dropped:
      lines = [f'  {match}' for match in dropped[:_SHOWN]]
      lines += [f'  and {len(dropped) - _SHOWN} more'] if len(dropped) > _SHOWN else []
      logger.warning('%s, %s: %d dropped\n%s', source, split, len(dropped), '\n'.join(lines))


def _held(source: str, split: str, faults: Faults) -> Iterator[Entry]:
  """The problems that a split's files and its share of them hold."""
  files = data_files(source)
  names, tenths = _division(source, files.keys(), split)
  for entry in entries([path for name in names for path in files[name]], faults, trusted='o1jax'):
    if _tenth(entry.problem.statement) in tenths:
      yield entry


def _division(source: str, there: Collection[str], split: str) -> tuple[list[str], set[int]]:
  """Which files a split is read from, and which tenths of their problems are its own."""
  if split in there and split != 'train' and 'train' in there:
    return [split], set(range(_TENTHS))
  if 'train' not in there and len(there) > 1:
    raise FileNotFoundError(
      f'data.source={source!r} has files for {", ".join(sorted(filter(None, there)))}, but none '
      'for train; add train.jsonl, or name one file'
    )
  lacking = {s: i for s, i in _HELD_OUT.items() if s not in there or 'train' not in there}
  rest = set(range(_TENTHS)) - set(lacking.values())
  names = ['train'] if 'train' in there else list(there)
  return names, {lacking[split]} if split in lacking else rest


def _tenth(statement: str) -> int:
  digest = hashlib.blake2b(statement.encode(), digest_size=8).digest()
  return int.from_bytes(digest, 'big') % _TENTHS
