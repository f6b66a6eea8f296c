"""Fields of a row, taken with a reason where they are not what they should be."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from o1jax.data.readers.faults import BadRow
from o1jax.types import TestCase

_QUOTED = 60  # characters of a value that a reason shows


def text(row: dict, key: str, default: str | None = None) -> str:
  """The text in a field; `default`, if there is one, where it is missing or null."""
  value = row.get(key)
  if value is None and default is not None:
    return default
  if not isinstance(value, str):
    raise BadRow(f'{key!r} is {quoted(value)}, not a text' if key in row else f'has no {key!r}')
  return value


def label(row: dict, key: str) -> str:
  """A text or a whole number that tells rows apart."""
  value = row.get(key)
  if isinstance(value, int) and not isinstance(value, bool):
    return str(value)
  return text(row, key)


def parsed(row: dict, key: str, kind: type, default: Any = None) -> Any:
  """A list or an object, which may stand in the field as JSON text; empty where it is blank.

  `default`, if there is one, stands for a field that is missing.
  """
  if key not in row:
    if default is None:
      raise BadRow(f'has no {key!r}')
    return default
  value = row[key]
  if isinstance(value, str) and value.strip():
    value = decoded(value, key)
  if value is None or (isinstance(value, str) and not value.strip()):
    return kind()
  if not isinstance(value, kind):
    raise BadRow(f'{key!r} is {quoted(value)}, not {"a list" if kind is list else "an object"}')
  return value


def texts(row: dict, key: str, default: Any = None) -> tuple[str, ...]:
  """A list of texts, which may stand in the field as JSON text; `default` as in `parsed`."""
  values = parsed(row, key, list, default)
  for value in values:
    if not isinstance(value, str):
      raise BadRow(f'{key!r} holds {quoted(value)}, not a text')
  return tuple(values)


def decoded(value: str, what: str) -> Any:
  """The value of a JSON text."""
  try:
    return json.loads(value)
  except RecursionError:
    raise BadRow(f'{what!r} is nested too deep') from None
  except ValueError as error:
    raise BadRow(f'{what!r} is not JSON: {error}') from None


def arguments(value: Any, what: str) -> list:
  """A call's arguments: a list, or one JSON text a line, as LeetCode's judges write them."""
  if isinstance(value, list):
    return value
  if isinstance(value, str):
    return [decoded(line, what) for line in value.split('\n') if line.strip()]
  raise BadRow(f'{what} is {quoted(value)}, not a list of arguments')


def lines(value: Any, what: str) -> str:
  """What goes in or out by a stream: a text, or a list of its lines."""
  if isinstance(value, list) and all(isinstance(line, str) for line in value):
    return '\n'.join(value)
  if isinstance(value, str):
    return value
  raise BadRow(f'{what} is {quoted(value)}, not a text')


def call(args: Sequence, result: Any) -> TestCase:
  """A test of a call."""
  try:
    return TestCase(json.dumps(args), json.dumps(result))
  except (TypeError, ValueError) as error:  # a date of a Parquet file, for one
    raise BadRow(f'a test has no JSON form: {error}') from None


def digest(value: str) -> str:
  """Twelve hexadecimal digits that name a text: the id of what has none of its own."""
  return hashlib.blake2b(value.encode(errors='surrogatepass'), digest_size=6).hexdigest()


def quoted(value: Any) -> str:
  """The beginning of a value, for a reason."""
  shown = repr(value)
  return shown if len(shown) <= _QUOTED else f'{shown[:_QUOTED]}...'
