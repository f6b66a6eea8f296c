"""The data files of a path, by split: one file, or a folder as the Hub lays data sets out."""

from __future__ import annotations

import pathlib
import re

from o1jax.config import closest
from o1jax.data.readers.faults import ReadError

SPLITS = ('train', 'dev', 'test')
SUFFIXES = ('.jsonl', '.ndjson', '.json', '.parquet', '.arrow')

_WORDS = {
  'train': 'train',
  'training': 'train',
  'dev': 'dev',
  'valid': 'dev',
  'val': 'dev',
  'validation': 'dev',
  'test': 'test',
  'testing': 'test',
  'eval': 'test',
  'evaluation': 'test',
}
# JSON files that describe a data set instead of holding it.
_ABOUT = ('dataset_info', 'dataset_infos', 'dataset_dict', 'state', 'config', 'metadata')


def data_files(source: str | pathlib.Path) -> dict[str, list[pathlib.Path]]:
  """Files by split, sorted by name; those that name no split stand under ''.

  A split is a word of the file's name, or of a folder above it within `source`:
  `test-00000.parquet`, `test2.jsonl`, `data/validation.json`, `train/0000.arrow`.

  Raises:
    FileNotFoundError: there is no such path, or the folder holds no data.
    ReadError: a file with an unknown ending, or a folder with several configurations of a data set.
  """
  path = pathlib.Path(source)
  if path.is_file():
    if not _is_data(path):
      raise ReadError(f'{str(path)!r} ends in none of {", ".join(SUFFIXES)} (or these and .gz)')
    return {'': [path]}
  if not path.is_dir():
    near = closest(str(path), [str(beside) for beside in path.parent.glob('*')])
    raise FileNotFoundError(f'{str(path)!r}: no such file or folder{near}')
  found: dict[str, list[pathlib.Path]] = {}
  folders = set()
  for file in sorted(path.rglob('*')):
    relative = file.relative_to(path)
    if any(part.startswith('.') for part in relative.parts) or not _is_data(file):
      continue
    if not file.is_file() or _stem(file) in _ABOUT:
      continue
    found.setdefault(_split_of(relative), []).append(file)
    folders.add(_configuration(relative))
  if not found:
    raise FileNotFoundError(
      f'{str(path)!r} holds no file that ends in one of {", ".join(SUFFIXES)}'
    )
  if len(folders) > 1:
    names = ', '.join(sorted(repr(name) for name in folders if name))
    raise ReadError(f'{str(path)!r} holds several configurations: {names}; name the folder of one')
  return found


def _is_data(path: pathlib.Path) -> bool:
  return path.name.removesuffix('.gz').endswith(SUFFIXES)


def _stem(path: pathlib.Path) -> str:
  return path.name.split('.')[0]


def _words(text: str) -> list[str]:
  return re.findall('[a-z]+', text.lower())


def _split_of(relative: pathlib.Path) -> str:
  """The split that a file's name or one of its folders states, the nearest to the file first."""
  for part in (_stem(relative), *reversed(relative.parent.parts)):
    for word in _words(part):
      if word in _WORDS:
        return _WORDS[word]
  return ''


def _configuration(relative: pathlib.Path) -> str:
  """The folder of a file, without parts that only say what the split is."""
  parts = relative.parent.parts
  return '/'.join(p for p in parts if p != 'data' and not set(_words(p)) & _WORDS.keys())
