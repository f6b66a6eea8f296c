"""LiveCodeBench: tests as JSON text, the private ones packed.

The private tests are JSON, or base64 of zlib of a pickle that holds nothing but a JSON text. A
pickle is a program, so none is run here: its instructions are listed, and anything but one text is
refused.
"""

from __future__ import annotations

import base64
import binascii
import pickletools
import zlib

from o1jax.data.readers import fields
from o1jax.data.readers.faults import BadRow
from o1jax.data.readers.interface import with_interface
from o1jax.types import Problem, TestCase

MAX_TEST_BYTES = 256 << 20  # of one row's private tests, unpacked

_TEXT = {'SHORT_BINUNICODE', 'BINUNICODE', 'BINUNICODE8', 'UNICODE'}
_BYTES = {'SHORT_BINBYTES', 'BINBYTES', 'BINBYTES8'}
# Without effect on what a pickle of one text gives.
_FRAME = {'PROTO', 'FRAME', 'MEMOIZE', 'PUT', 'BINPUT', 'LONG_BINPUT', 'STOP'}


def problem(row: dict) -> Problem:
  """A row as a problem: the public tests first, then the private ones."""
  tests = fields.parsed(row, 'public_test_cases', list) + _private(row)
  kinds = {_test_type(test) for test in tests}
  if len(kinds) > 1:
    raise BadRow(f'tests of more than one kind: {", ".join(sorted(kinds))}')
  functional = kinds == {'functional'}
  name = None
  if functional:
    metadata = fields.parsed(row, 'metadata', dict)
    name = fields.text(metadata, 'func_name')
  starter = fields.text(row, 'starter_code', '')
  return Problem(
    f'livecodebench/{fields.label(row, "question_id")}',
    with_interface(fields.text(row, 'question_content'), starter, name),
    tests=tuple(_test(test, functional) for test in tests),
    entry_point=name,
    starter_code=starter,
    source='livecodebench',
  )


def _private(row: dict) -> list:
  value = row.get('private_test_cases')
  if not isinstance(value, str) or value.lstrip()[:1] in ('', '['):
    return fields.parsed(row, 'private_test_cases', list, [])
  text = unpacked(value)
  tests = fields.decoded(text, 'private_test_cases')
  if not isinstance(tests, list):
    raise BadRow(f"'private_test_cases' holds {fields.quoted(tests)}, not a list")
  return tests


def unpacked(value: str, limit: int = MAX_TEST_BYTES) -> str:
  """The text in base64 of zlib of a pickle.

  Raises:
    BadRow: it is packed otherwise, is larger than `limit` bytes, or the pickle holds or does
      anything else than one text.
  """
  try:
    inflate = zlib.decompressobj()
    data = inflate.decompress(base64.b64decode(value, validate=True), limit)
  except (binascii.Error, ValueError, zlib.error) as error:
    raise BadRow(f"'private_test_cases' is not base64 of zlib: {error}") from None
  if inflate.unconsumed_tail:
    raise BadRow(f"'private_test_cases' unpacks to more than {limit} bytes")
  if not inflate.eof:
    raise BadRow("'private_test_cases' is cut off")
  return pickled_text(data)


def pickled_text(data: bytes) -> str:
  """The one text that a pickle holds, found without unpickling; raises BadRow for any other."""
  found: list[str | bytes] = []
  try:
    for opcode, argument, _ in pickletools.genops(data):
      if opcode.name in _TEXT | _BYTES:
        found.append(argument)
      elif opcode.name not in _FRAME:
        raise BadRow(f'a pickle with the instruction {opcode.name}; only one of a text is read')
    if len(found) != 1:
      raise BadRow(f'a pickle of {len(found)} values; only one of a text is read')
    return found[0].decode() if isinstance(found[0], bytes) else found[0]
  except (ValueError, OverflowError, UnicodeDecodeError) as error:
    if isinstance(error, BadRow):
      raise
    raise BadRow(f'a damaged pickle: {error}') from None


def _test_type(test: object) -> str:
  if not isinstance(test, dict):
    raise BadRow(f'a test is {fields.quoted(test)}, not an object')
  kind = fields.text(test, 'testtype', 'stdin')
  if kind not in ('stdin', 'functional'):
    raise BadRow(f"testtype {kind!r} is neither 'stdin' nor 'functional'")
  return kind


def _test(test: dict, functional: bool) -> TestCase:
  given, wanted = fields.text(test, 'input'), fields.text(test, 'output')
  if functional:
    return fields.call(fields.arguments(given, 'input'), fields.decoded(wanted, 'output'))
  return TestCase(given, wanted)
