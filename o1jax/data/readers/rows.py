"""Rows of one file, one at a time: JSON Lines, a JSON array, Parquet, Arrow; gzip or not.

A row that cannot be read comes as a `Row` without a value, so the one who reads on decides. Memory
holds one row and a piece of the file: an array is decoded as it arrives.
"""

from __future__ import annotations

import dataclasses
import gzip
import io
import itertools
import json
import pathlib
import re
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

from o1jax.data.readers.faults import ReadError

MAX_ROW_BYTES = 256 << 20  # a longer row is refused (characters, in an array)
CHUNK = 1 << 16  # characters read at a time of an array
_RECORDS = 64  # of a Parquet file at a time
_GAP = re.compile(r'[ \t\r\n]*')
# An error this near to the end of what was read can be a literal or an escape that was cut.
_CUT = 16


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
  """One row, or why it could not be read."""

  number: int  # line of a JSON Lines file, else element or record, from 1
  value: dict[str, Any] | None
  fault: str = ''


def rows_of(path: pathlib.Path) -> Iterator[Row]:
  """The rows of a file. Damage to the file itself ends it with a faulty row.

  Raises:
    ReadError: Parquet or Arrow without pyarrow.
    OSError: the file cannot be opened.
  """
  last = 0
  try:
    for row in _columnar(path) if path.suffix in ('.parquet', '.arrow') else _json(path):
      last = row.number
      yield row
  except (EOFError, zlib.error, gzip.BadGzipFile, UnicodeDecodeError) as error:
    yield Row(last + 1, None, f'the rest of the file cannot be read: {error}')


def _json(path: pathlib.Path) -> Iterator[Row]:
  with path.open('rb') as raw:
    packed = raw.read(2) == b'\x1f\x8b'
    raw.seek(0)
    with gzip.open(raw) if packed else raw as file:
      first = _first_byte(file)
      file.seek(0)
      if first == b'[':
        yield from _array(io.TextIOWrapper(file, encoding='utf-8-sig'))
      else:
        yield from _lines(file)


def _first_byte(file: BinaryIO) -> bytes:
  """The first byte that is neither white space nor a byte-order mark."""
  while (byte := file.read(1)) and byte in b' \t\r\n\xef\xbb\xbf':
    pass
  return byte


def _lines(file: BinaryIO) -> Iterator[Row]:
  for number in itertools.count(1):
    line = file.readline(MAX_ROW_BYTES + 1)
    if not line:
      return
    if len(line) > MAX_ROW_BYTES:
      while line and not line.endswith(b'\n'):
        line = file.readline(MAX_ROW_BYTES)
      yield Row(number, None, f'longer than {MAX_ROW_BYTES >> 20} MiB')
    elif line.strip():
      yield _parsed(number, line)


def _parsed(number: int, line: bytes) -> Row:
  try:
    return _checked(number, json.loads(line.decode('utf-8-sig')))
  except RecursionError:
    return Row(number, None, 'nested too deep')
  except ValueError as error:
    return Row(number, None, f'not JSON: {error}')


def _checked(number: int, value: Any) -> Row:
  if isinstance(value, dict):
    return Row(number, value)
  return Row(number, None, f'a {type(value).__name__}, not an object')


def _array(text: io.TextIOBase) -> Iterator[Row]:
  """Elements of a JSON array; a syntax error ends it: where the next row begins is not known."""
  decoder = json.JSONDecoder()
  buffer, start, opening = '', 0, True
  for number in itertools.count(1):
    while True:
      start = _GAP.match(buffer, start).end()
      if start < len(buffer) and buffer[start] == ('[' if opening else ','):
        start, opening = start + 1, False
        start = _GAP.match(buffer, start).end()
      if not opening and buffer.startswith(']', start):
        return
      error = ''
      try:
        value, end = decoder.raw_decode(buffer, start)
      except RecursionError:
        error = 'nested too deep'
      except json.JSONDecodeError as e:
        open_string = e.msg.startswith('Unterminated string')
        if not open_string and e.pos < len(buffer) - _CUT:
          error = f'not JSON: {e.msg}'
      except ValueError as e:  # an integer of thousands of digits
        error = f'not JSON: {e}'
      else:
        if end < len(buffer) or buffer[end - 1] in '}]"':  # else a number could go on
          yield _checked(number, value)
          start = end
          break
      if not error and len(buffer) - start > MAX_ROW_BYTES:
        error = f'longer than {MAX_ROW_BYTES >> 20} MiB'
      # Twice as much each time: a long row is decoded again only a few times.
      more = '' if error else text.read(max(CHUNK, len(buffer) - start))
      if not more:
        reason = error or 'the file ends before the array does'
        yield Row(number, None, f'{reason}; the rest of the file is not read')
        return
      buffer, start = buffer[start:] + more, 0


def _columnar(path: pathlib.Path) -> Iterator[Row]:
  try:
    import pyarrow
    from pyarrow import ipc, parquet
  except ImportError:
    text = f"reading {path} needs pyarrow; install it with: pip install 'o1jax[data]'"
    raise ReadError(text) from None
  number = 0
  try:
    if path.suffix == '.parquet':
      batches = parquet.ParquetFile(path).iter_batches(_RECORDS)
    else:
      batches = ipc.open_stream(pyarrow.memory_map(str(path)))
    for batch in batches:
      for start in range(0, batch.num_rows, _RECORDS):
        for value in batch.slice(start, _RECORDS).to_pylist():
          number += 1
          yield Row(number, value)
  except (pyarrow.ArrowException, OSError) as error:
    yield Row(number + 1, None, f'the rest of the file cannot be read: {error}')
