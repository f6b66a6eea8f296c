"""Plain values as bytes: the only form in which a result leaves a child.

A tagged JSON in which types stay apart (`1`, `1.0`, `True`, `(1,)`, `[1]`, `{1}`).
Subclasses of plain types are written as the plain value they hold, so an object with
an `__eq__` of its own cannot reach the process that compares. Nothing here evaluates
or imports what it reads.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

MAX_DEPTH = 96
MAX_NODES = 2_000_000


class NotPlain(ValueError):
  """The value has no plain form: an object, a cycle, or nesting beyond `MAX_DEPTH`."""


class TooLarge(ValueError):
  """The value has more than `MAX_NODES` parts, or more bytes than the limit."""


class _Encoder:
  """Walks a value once; `opaque` (or None) turns anything else into a handle."""

  def __init__(self, opaque: Callable[[Any], dict] | None):
    self.opaque = opaque
    self.nodes = 0

  def items(self, values, depth: int) -> list:
    return [self.node(value, depth) for value in values]

  def node(self, value: Any, depth: int) -> Any:
    self.nodes += 1
    if self.nodes > MAX_NODES:
      raise TooLarge(f'more than {MAX_NODES} parts')
    kind = type(value)
    if value is None or kind is bool:
      return value
    if kind is int:
      # JSON readers refuse decimal numbers of thousands of digits; hexadecimal has no such limit.
      return value if -(1 << 63) < value < 1 << 63 else {'i': hex(value)}
    if kind is str:
      return value
    if kind is float:
      return value if math.isfinite(value) else {'f': repr(value)}
    if depth > MAX_DEPTH:
      raise NotPlain(f'nested deeper than {MAX_DEPTH}')
    if kind is list:
      return self.items(value, depth + 1)
    if kind is tuple:
      return {'t': self.items(value, depth + 1)}
    if kind is dict:
      return {'d': [self.items(pair, depth + 1) for pair in value.items()]}
    if kind is set or kind is frozenset:
      return {'s': self.items(value, depth + 1)}
    if kind is bytes or kind is bytearray:
      return {'b': value.hex()}
    if kind is complex:
      return {'c': [repr(value.real), repr(value.imag)]}
    return self.subclass(value, depth)

  def subclass(self, value: Any, depth: int) -> Any:
    # type.__mro__, not isinstance: `__class__` can lie and `__instancecheck__` can raise.
    for base in type(value).__mro__[1:]:
      if base is int:
        return self.node(int.__add__(value, 0), depth)
      if base is float:
        return self.node(float.__add__(value, 0.0), depth)
      if base is str:
        return self.node(str.__getitem__(value, slice(None)), depth)
      if base is list:
        return self.node(list.__getitem__(value, slice(None)), depth)
      if base is tuple:
        return self.node(tuple.__getitem__(value, slice(None)), depth)
      if base is dict:
        return self.node(dict(dict.items(value)), depth)
      if base is set or base is frozenset:
        return self.node(set(base.__iter__(value)), depth)
    if self.opaque is None:
      raise NotPlain(f'a value of type {type(value).__name__} has no plain form')
    return self.opaque(value)


def encode(value: Any, opaque: Callable[[Any], dict] | None = None) -> bytes:
  """The canonical bytes of a plain value; raises NotPlain or TooLarge.

  `opaque` may return a one-key dict of its own tag for what has no plain form.
  """
  return json.dumps(_Encoder(opaque).node(value, 0), separators=(',', ':')).encode()


def _build(node: Any, handle: Callable[[Any], Any] | None) -> Any:
  if isinstance(node, list):
    return [_build(child, handle) for child in node]
  if not isinstance(node, dict):
    return node
  if len(node) != 1:
    raise ValueError('a tagged value has one tag')
  ((tag, body),) = node.items()
  if tag == 'i':
    return int(body, 16)
  if tag == 'f':
    return {'nan': math.nan, 'inf': math.inf, '-inf': -math.inf}[body]
  if tag == 't':
    return tuple(_build(child, handle) for child in body)
  if tag == 's':
    return {_build(child, handle) for child in body}
  if tag == 'd':
    return {_build(key, handle): _build(value, handle) for key, value in body}
  if tag == 'b':
    return bytes.fromhex(body)
  if tag == 'c':
    real, imaginary = body
    return complex(float(real), float(imaginary))
  if tag == 'r' and handle is not None:
    return handle(body)
  raise ValueError(f'unknown tag {tag!r}')


def decode(payload: bytes, handle: Callable[[Any], Any] | None = None) -> Any:
  """The value of `encode`'s bytes; raises ValueError for anything that is not such bytes.

  The bytes may come from hostile code. `handle` builds what stands for the tag `r`.
  """
  try:
    return _build(json.loads(payload), handle)
  except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as e:
    raise ValueError(f'not a canonical value: {type(e).__name__}') from None
