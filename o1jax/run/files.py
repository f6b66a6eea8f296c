"""JSON and JSON Lines that survive a kill at any moment.

A whole file is replaced by `write to a temporary name, fsync, rename`, in a bucket by one upload: a
reader sees the old one or the new one. An appended file can end in half a line; readers drop it and
say so, and the next append cuts it off. Paths are those of `bucket.place`.
"""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from o1jax.parallel import distributed
from o1jax.run.bucket import Path, on_disk

logger = logging.getLogger(__name__)


def dumps(value: Any, indent: int | None = None) -> str:
  """JSON of plain values, frozen records (as dictionaries), and NumPy or JAX scalars and arrays.

  Raises ValueError for NaN and infinities, which JSON does not have.
  """
  return json.dumps(value, default=_plain, ensure_ascii=False, allow_nan=False, indent=indent)


def write_text(path: Path, text: str) -> None:
  """Replaces `path` by UTF-8 in one move, making its folder first where there is none."""
  write_bytes(path, text.encode('utf-8'))


def write_bytes(path: Path, data: bytes) -> None:
  """Replaces `path` in one move, making its folder first where there is none."""
  if not on_disk(path):
    path.write_bytes(data)
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f'.{path.name}.tmp')
  with temporary.open('wb') as file:
    file.write(data)
    file.flush()
    os.fsync(file.fileno())
  temporary.replace(path)
  folder = os.open(path.parent, os.O_RDONLY)
  try:
    os.fsync(folder)  # else a power cut can forget the rename
  finally:
    os.close(folder)


def write_json(path: Path, value: Any) -> None:
  """Replaces `path` by the JSON of `value` in one move."""
  write_text(path, dumps(value, indent=2) + '\n')


def read_json(path: Path) -> Any:
  """The value in `path`, or None where there is no such file; raises ValueError on damage."""
  try:
    return json.loads(path.read_text(encoding='utf-8'))
  except FileNotFoundError:
    return None
  except ValueError as error:
    raise ValueError(f'{path} is damaged ({error}); restore it or remove it') from None


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
  """Replaces `path` by one JSON object a line, in one move."""
  write_text(path, ''.join(dumps(row) + '\n' for row in rows))


def append_jsonl(path: pathlib.Path, rows: Iterable[Any], sync: bool = True) -> None:
  """Adds rows at the end, after cutting off what a killed append left there.

  On a disk only: a bucket does not append. Without `sync` the rows outlive a killed process, but
  not a power cut.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  text = ''.join(dumps(row) + '\n' for row in rows)
  with path.open('ab+') as file:
    _cut_tail(path, file)
    file.write(text.encode('utf-8'))
    file.flush()
    if sync:
      os.fsync(file.fileno())


def read_jsonl(path: Path) -> Iterator[Any]:
  """Yields the rows of `path`, none where there is no such file; drops half a line at the end.

  Raises:
    ValueError: a line that is whole is not JSON; names file and line.
  """
  if not path.exists():
    return
  with path.open('rb') as file:
    for number, data in enumerate(file, start=1):
      line = data.decode('utf-8', errors='replace')
      if not line.endswith('\n'):
        logger.warning('%s: dropped the half-written line %d', path, number)
        return
      try:
        row = json.loads(line)
      except ValueError as error:
        raise ValueError(f'{path}, line {number} is damaged ({error}); remove the line') from None
      yield row


def bytes_of(arrays: Mapping[str, np.ndarray]) -> bytes:
  """Named arrays as a compressed `.npz`, with a checksum of each."""
  buffer = io.BytesIO()
  np.savez_compressed(buffer, **arrays)
  return buffer.getvalue()


def arrays_of(data: bytes) -> dict[str, np.ndarray]:
  """The arrays of `bytes_of`; raises in many forms where bytes are missing or were changed."""
  with np.load(io.BytesIO(data), allow_pickle=False) as file:
    return dict(file)


class Chunks:
  """A data set in numbered files, each written whole: the unit that a killed stage repeats.

  `write(7, rows)` makes `00007.jsonl`; what is done is what `done()` lists. Of several processes
  the first writes and reads, and tells the others.
  """

  def __init__(self, folder: Path):
    self.folder = folder

  def done(self) -> set[int]:
    """Numbers of the chunks that are whole."""
    return set(distributed.from_first(lambda: [int(path.stem) for path in self._paths()]))

  def write(self, index: int, rows: Iterable[Any]) -> None:
    """Writes or replaces one chunk in one move."""
    if distributed.is_first():
      write_jsonl(self.folder / f'{index:05d}.jsonl', rows)

  def rows(self, before: int | None = None) -> Iterator[Any]:
    """All rows, in the order of the chunks; with `before`, of the chunks of lower numbers."""
    if distributed.count() == 1:
      return self._rows(before)
    return iter(distributed.from_first(lambda: [*self._rows(before)]))

  def _rows(self, before: int | None) -> Iterator[Any]:
    for path in self._paths():
      if before is None or int(path.stem) < before:
        yield from read_jsonl(path)

  def _paths(self) -> list[Path]:
    found = self.folder.iterdir() if self.folder.exists() else ()
    return sorted(p for p in found if p.suffix == '.jsonl' and p.stem.isdigit())


def _cut_tail(path: pathlib.Path, file: Any) -> None:
  """Truncates an open file after its last newline, and leaves the position at the end."""
  end = size = file.seek(0, os.SEEK_END)
  while end:
    start = max(0, end - 4096)
    file.seek(start)
    newline = file.read(end - start).rfind(b'\n')
    if newline >= 0:
      end = start + newline + 1
      break
    end = start
  if end < size:
    logger.warning('%s: cut off %d bytes of a half-written line', path, size - end)
    file.truncate(end)
  file.seek(0, os.SEEK_END)


def _plain(value: Any) -> Any:
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
  if hasattr(value, 'tolist'):  # NumPy and JAX arrays and scalars
    return value.tolist()
  if isinstance(value, pathlib.PurePath):
    return str(value)
  raise TypeError(f'{type(value).__name__} {value!r} has no JSON form; turn it into plain values')
