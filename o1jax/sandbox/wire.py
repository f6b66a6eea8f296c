"""What crosses the borders of the sandbox: frames between processes, records of a child.

Three processes speak here. The *pool* (the caller, trusted, holds the expected
outputs) sends a request to a *zygote* (trusted, holds none); the zygote forks a
*child* (hostile) whose report it passes on unread. A frame is a 32-bit length and
that many bytes: a request is marshalled, because the pool is trusted and the same Python;
what comes back is plain numbers and raw bytes, because a zygote is trusted less.
Imports little on purpose: every zygote carries it.
"""

from __future__ import annotations

import struct
from typing import Any

_LENGTH = struct.Struct('<I')
_RECORD = struct.Struct('<BffI')  # kind, CPU seconds, wall seconds, length of the payload

# Of a reply: whether the child was confined, whether it filled stderr, how it ended (-1 and 0:
# it did not end that way), what stopped it and its tester, CPU and wall seconds, resident bytes.
_FACTS = (
  'confined', 'stderr_full', 'exit', 'signal', 'killed', 'tester_killed', 'cpu_s', 'wall_s',
  'rss_bytes',
)  # fmt: skip
_REPLY = struct.Struct('<??iiBBddQIII')
# What may stop a child.
NOTHING, CPU, WALL, FLOOD, DONE = range(5)

# Kinds of record that a child reports, one per test.
OUTPUT = 0  # payload: what the program printed, or the encoded value it returned
ERROR = 1  # an exception came out; payload: the name of its type
MEMORY = 2  # MemoryError came out
EXIT = 3  # sys.exit with a status other than 0; payload: the status
OVERFLOW = 4  # printed or returned more than the limit
OPAQUE = 5  # returned a value that has no plain form
COMPILE = 6  # not a Python program; payload: the message
BAIL = 7  # this test and those behind it must run in a process of their own

BATCH, STRICT, CHECK, PROBE = 'batch', 'strict', 'check', 'probe'
BATCH_INPUTS = 32  # tests on stdin in one batch: each has a descriptor of its own

STDERR_TAIL = 2000  # bytes of standard error that a verdict keeps


def send_frame(sock, payload: bytes) -> None:
  """Sends one frame on a stream socket; raises OSError when the other side is gone."""
  sock.sendall(_LENGTH.pack(len(payload)) + payload)


def receive_exactly(sock, size: int) -> bytes:
  """`size` bytes from a stream socket; raises EOFError when it ends before."""
  parts = []
  while size:
    part = sock.recv(min(size, 1 << 16))
    if not part:
      raise EOFError('the other side closed the connection')
    parts.append(part)
    size -= len(part)
  return b''.join(parts)


def receive_frame(sock, limit: int = 1 << 31) -> bytes:
  """One frame from a stream socket; raises EOFError at its end, ValueError above `limit` bytes."""
  (size,) = _LENGTH.unpack(receive_exactly(sock, 4))
  if size > limit:
    raise ValueError(f'a frame of {size} bytes is above the limit of {limit}')
  return receive_exactly(sock, size)


def pack_reply(*facts: Any, blobs: tuple[bytes, ...]) -> bytes:
  """A zygote's reply on one request: the facts of `unpack_reply` in their order, then blobs."""
  return _REPLY.pack(*facts, *map(len, blobs)) + b''.join(blobs)


def unpack_reply(payload: bytes) -> tuple[dict[str, Any], list[bytes]]:
  """What a zygote measured of one child, and three blobs: report, stdout, tail of stderr."""
  values = _REPLY.unpack_from(payload)
  facts = dict(zip(_FACTS, values[: len(_FACTS)], strict=True))
  blobs, at = [], _REPLY.size
  for length in values[len(_FACTS) :]:
    blobs.append(payload[at : at + length])
    at += length
  return facts, blobs


def pack_record(kind: int, cpu_s: float, wall_s: float, payload: bytes) -> bytes:
  """One test's record, as a child reports it."""
  return _RECORD.pack(kind, cpu_s, wall_s, len(payload)) + payload


def unpack_records(report: bytes, limit: int) -> list[tuple[int, float, float, bytes]]:
  """The whole records at the front of a report, at most `limit`.

  The report comes from hostile code: what does not parse ends the list, and a time
  that is not a finite positive number reads as 0.
  """
  records, at = [], 0
  while len(records) < limit and at + _RECORD.size <= len(report):
    kind, cpu_s, wall_s, size = _RECORD.unpack_from(report, at)
    at += _RECORD.size
    if kind > BAIL or at + size > len(report):
      break
    cpu_s, wall_s = (x if 0 <= x < 1e6 else 0.0 for x in (cpu_s, wall_s))
    records.append((kind, cpu_s, wall_s, report[at : at + size]))
    at += size
  return records
