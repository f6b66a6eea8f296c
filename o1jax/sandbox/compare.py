"""Whether an output is the expected one. Plain values only, in the trusted process."""

from __future__ import annotations

import json
import math
from typing import Any

from o1jax.sandbox import codec


def _tokens(text: str) -> list[list[str]]:
  return [tokens for line in text.splitlines() if (tokens := line.split())]


def _token_matches(given: str, expected: str, tolerance: float) -> bool:
  if given == expected:
    return True
  if not any(mark in expected for mark in '.eE'):
    return False  # integers and words are compared as they stand
  try:
    number, wanted = float(given), float(expected)
  except ValueError:
    return False
  if not math.isfinite(number) or not math.isfinite(wanted) or '_' in given + expected:
    return False
  return math.isclose(number, wanted, rel_tol=tolerance, abs_tol=tolerance)


def stdout_matches(printed: bytes, expected: str, tolerance: float) -> bool:
  """Compares lines in order, insensitive to white space and to blank lines.

  A token that is expected to be a decimal number may differ by `tolerance`, absolute
  or relative; everything else must be equal.
  """
  try:
    text = printed.decode()
  except UnicodeDecodeError:
    return False
  if text == expected:
    return True
  given, wanted = _tokens(text), _tokens(expected)
  return len(given) == len(wanted) and all(
    len(a) == len(b) and all(_token_matches(x, y, tolerance) for x, y in zip(a, b, strict=True))
    for a, b in zip(given, wanted, strict=True)
  )


def _key(key: Any) -> str:
  """A dictionary key as JSON writes it."""
  return key if type(key) is str else json.dumps(key)


def values_match(given: Any, expected: Any, tolerance: float) -> bool:
  """Whether a returned plain value is the expected JSON value, types and order included.

  JSON has no tuple and only string keys, so a tuple stands for its list and a key for
  its spelling. `True` is not 1 and `1.0` is not 1; two floats may differ by `tolerance`.
  """
  if type(given) is tuple:
    given = list(given)
  if type(given) is not type(expected):
    return False
  if type(expected) is float:
    return math.isclose(given, expected, rel_tol=tolerance, abs_tol=tolerance) or (
      math.isnan(given) and math.isnan(expected)
    )
  if type(expected) is list:
    return len(given) == len(expected) and all(
      values_match(a, b, tolerance) for a, b in zip(given, expected, strict=True)
    )
  if type(expected) is dict:
    try:
      spelled = {_key(key): value for key, value in given.items()}
    except TypeError:
      return False
    return spelled.keys() == expected.keys() and all(
      values_match(spelled[key], value, tolerance) for key, value in expected.items()
    )
  return given == expected


def result_matches(payload: bytes, expected: str, tolerance: float) -> bool:
  """Whether encoded bytes from a child are the value that the JSON `expected` stands for."""
  try:
    return values_match(codec.decode(payload), json.loads(expected), tolerance)
  except (ValueError, RecursionError):
    return False
