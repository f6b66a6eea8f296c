"""The child's side of a remote service: what `remote` sends along with a program.

Each entry runs in a process of its own at the service and says what it has to say in lines
of stdout that start with a token.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from o1jax.sandbox import program, tester, wire


def _say(token: str, text: str) -> None:
  print(f'\n{token}{text}', flush=True)


class _Collected(program.Report):
  """Records that are kept instead of being written to a descriptor."""

  def flush(self) -> None:
    """Keeps them."""


def _framed(payloads: list[str]) -> bytes:
  frames = (bytes.fromhex(payload) for payload in payloads)
  return b''.join(len(frame).to_bytes(4, 'little') + frame for frame in frames)


class _Replay:
  """A channel whose incoming frames are known beforehand."""

  def __init__(self, incoming: list[str]):
    self.incoming = _framed(incoming)
    self.last = ''

  def recv(self, size: int) -> bytes:
    part, self.incoming = self.incoming[:size], self.incoming[size:]
    return part or self.exhausted()

  def exhausted(self) -> bytes:
    return b''

  def sendall(self, data: bytes) -> None:
    self.last = data[4:].hex()


class _Answers(_Replay):
  """The tester's channel: stops the process at the first call without an answer."""

  def __init__(self, incoming: list[str], gone: bool, token: str):
    super().__init__(incoming)
    self.gone, self.token = gone, token

  def exhausted(self) -> bytes:
    if not self.gone:
      _say(self.token, f'call {self.last}')
      os._exit(0)
    return b''


class _Calls(_Replay):
  """The program's channel: says every answer at once."""

  def __init__(self, incoming: list[str], token: str):
    super().__init__(incoming)
    self.token = token

  def sendall(self, data: bytes) -> None:
    _say(self.token, data[4:].hex())


def compile_only(given: dict[str, Any]) -> None:
  """Says whether `code` is a program."""
  kind, payload = wire.OUTPUT, b''
  try:
    program.compile_program(given['code'])
  except Exception as e:
    kind, payload = wire.COMPILE, f'{type(e).__name__}: {e}'.encode(errors='replace')[:500]
  if kind == wire.COMPILE:
    _say(given['token'], wire.pack_record(kind, 0.0, 0.0, payload).hex())


def call_once(given: dict[str, Any]) -> None:
  """Calls the program's function once and says the encoded result."""
  request = given['request']
  code = program.compile_program(request['code'])
  try:
    result = program.run_once(code, request['entry_point'], request['inputs'][0])
    kind, payload = wire.OUTPUT, result
  except BaseException as e:
    kind, payload = program.outcome_of(e)
  if len(payload) >= request['output_bytes']:
    kind, payload = wire.OVERFLOW, b''
  _say(given['token'], wire.pack_record(kind, 0.0, 0.0, payload).hex())


def answer_calls(given: dict[str, Any]) -> None:
  """Runs the program, serves `calls`, and says each answer."""
  server = tester.Server(given['request'])
  server.channel = _Calls(given['calls'], given['token'])
  sys.exit(server.run())


def run_tests(given: dict[str, Any]) -> None:
  """Runs test code against known `answers`; says the next call, or the records."""
  report = _Collected()
  channel = _Answers(given['answers'], given['gone'], given['token'])
  tester.Tester(given['request'], given['test_code'], channel, report).run()
  _say(given['token'], 'records ' + b''.join(report.pending).hex())
