"""Problem splits: the embedded family, or a folder of JSON Lines."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator

from o1jax.data import family
from o1jax.types import Problem, TestCase

SPLITS = ('train', 'dev', 'test')


def load_split(source: str, split: str, count: int, *, seed: int) -> tuple[Problem, ...]:
  """The first `count` problems of a split.

  Args:
    source: 'embedded', or a folder with train.jsonl, dev.jsonl and test.jsonl, a
      `Problem` a line (fields as in `o1jax.types`, tests as {input, output}).
    split: 'train', 'dev' or 'test'.
    count: how many; a folder may hold fewer.
    seed: of the embedded family's drawing.

  Raises:
    ValueError: a line that is no problem, with file, line and reason; an empty file.
    FileNotFoundError: the split's file is missing.
  """
  if source == 'embedded':
    return tuple(family.problems(split, count, seed))
  path = pathlib.Path(source) / f'{split}.jsonl'
  if not path.is_file():
    raise FileNotFoundError(f'data.source={source!r} has no {path.name}; it needs {SPLITS}')
  found = tuple(problem for problem, _ in zip(_read(path), range(count), strict=False))
  if not found:
    raise ValueError(f'{path} holds no problems')
  return found


def _read(path: pathlib.Path) -> Iterator[Problem]:
  with path.open(encoding='utf-8') as file:
    for number, line in enumerate(file, start=1):
      try:
        yield _problem(json.loads(line))
      except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f'{path}, line {number} is no problem: {error!r}') from None


def _problem(row: dict) -> Problem:
  tests = tuple(TestCase(t['input'], t['output']) for t in row.get('tests', ()))
  solutions = tuple(row.get('solutions', ()))
  fields = {k: row[k] for k in ('entry_point', 'starter_code', 'test_code', 'source') if k in row}
  return Problem(row['id'], row['statement'], tests=tests, solutions=solutions, **fields)
