"""The pool's side of one zygote: starting it, proving its layers, asking it."""

from __future__ import annotations

import dataclasses
import json
import logging
import marshal
import os
import socket
import subprocess
import sys
from pathlib import Path

from o1jax.sandbox import confine, landlock, wire
from o1jax.sandbox.judge import HarnessFailure, Reply
from o1jax.sandbox.protocol import Limits, SandboxError

log = logging.getLogger(__name__)

_START_S = 60.0  # seconds a zygote may take to start
_STOP_S = 2.0  # and to stop
_BOOT = (
  'import sys; sys.path.append(sys.argv.pop(1)); from o1jax.sandbox.worker import main; main()'
)
_PROBE_LIMITS = Limits(cpu_s=2.0, memory_bytes=64 << 20, output_bytes=1 << 16)


class Unavailable(RuntimeError):
  """This system does not let a zygote take the tier."""


@dataclasses.dataclass(frozen=True, slots=True)
class Confirmed:
  """A tier, the layers that were proved for it, and why the tiers above it are not to be had."""

  tier: str
  layers: tuple[str, ...]
  reasons: tuple[str, ...] = ()


class Zygote:
  """One zygote process; not shared between threads. The starting thread must outlive it.

  Raises Unavailable where the system refuses a layer, SandboxError where a layer is there
  but does not stop what it should, HarnessFailure where the process does not start.
  """

  def __init__(self, tier: str):
    self.tier = tier
    self.served = 0
    self.sock, theirs = socket.socketpair()
    self.stderr = os.memfd_create('zygote')
    with theirs:
      self.process = _start(theirs.fileno(), self.stderr, tier)
    try:
      self.layers = self._prove()
    except BaseException:
      self.close()
      raise

  def _prove(self) -> tuple[str, ...]:
    """The layers that this zygote has shown to work."""
    self.sock.settimeout(_START_S)
    with socket.create_server(('127.0.0.1', 0)) as listener:
      request = {**self._probe_request(), 'port': listener.getsockname()[1]}
      header = json.loads(self._exchange(request)[0])
    if not header['ready']:
      raise Unavailable(header['reason'])
    return _layers_of(header['probes'], self.tier)

  def _probe_request(self) -> dict:
    return {
      'mode': wire.PROBE,
      'tier': self.tier,
      'tests': 1,
      'pool_pid': os.getpid(),
      'root': os.geteuid() == 0,
      'landlock': landlock.version(),
      'port': 0,
      **limits_of(_PROBE_LIMITS),
    }

  def prove_again(self) -> None:
    """Runs the probes once more; raises SandboxError if a layer no longer applies."""
    self.sock.settimeout(_START_S)
    answer, _ = self._exchange(self._probe_request())
    _layers_of(json.loads(answer)['probes'], self.tier)

  def _exchange(self, request: dict, test_code: str | None = None) -> tuple[bytes, bytes]:
    """Sends a request; returns the reply, and what the tester reported if there is one."""
    try:
      wire.send_frame(self.sock, marshal.dumps(request))
      records = b'' if test_code is None else self._test(test_code)
      return wire.receive_frame(self.sock), records
    except (OSError, EOFError, ValueError) as e:
      said = os.pread(self.stderr, 2000, max(0, os.fstat(self.stderr).st_size - 2000)).decode()
      raise HarnessFailure(f'a zygote was lost: {type(e).__name__}: {e}. {said}') from None

  def _test(self, test_code: str) -> bytes:
    """Hands the test code to the tester's process itself; returns what that process reports."""
    ours, theirs = socket.socketpair()
    with ours:
      with theirs:
        socket.send_fds(self.sock, [b'.'], [theirs.fileno()])
      ours.settimeout(self.sock.gettimeout())
      parts = []
      try:
        wire.send_frame(ours, test_code.encode(errors='surrogatepass'))
        while part := ours.recv(1 << 16):
          parts.append(part)
      except (BrokenPipeError, ConnectionResetError):
        pass  # the tester was stopped; the zygote says why
      return b''.join(parts)

  def ask(self, request: dict, test_code: str | None = None) -> Reply:
    """Runs one child, or two with `test_code`; raises HarnessFailure without an answer."""
    tests = max(1, request['tests'])
    # A zygote stops its child itself; silence far beyond that means the zygote hangs.
    self.sock.settimeout(60 + 64 * tests * request['cpu_s'] * request['wall_factor'])
    answer, records = self._exchange(request, test_code)
    facts, (report, stdout, stderr) = wire.unpack_reply(answer)
    self.served += 1
    text = stderr.decode(errors='replace')
    if not facts.pop('confined'):
      raise HarnessFailure(f'a child could not be confined: {text}')
    records = wire.unpack_records(report if test_code is None else records, tests)
    return Reply(records=records, stdout=stdout, stderr=text, **facts)

  def close(self) -> None:
    """Ends the process, and with it whatever it had started."""
    self.sock.close()  # an idle zygote ends by itself
    os.close(self.stderr)
    try:
      self.process.wait(timeout=_STOP_S)
    except subprocess.TimeoutExpired:
      self.process.kill()
      self.process.wait()


def limits_of(limits: Limits) -> dict:
  """The part of a request that says what a child may use."""
  return {
    'cpu_s': limits.cpu_s,
    'wall_factor': limits.wall_factor,
    'memory_bytes': limits.memory_bytes,
    'output_bytes': limits.output_bytes,
  }


def _start(fd: int, stderr: int, tier: str) -> subprocess.Popen:
  python = getattr(sys, '_base_executable', None) or sys.executable
  root = str(Path(__file__).resolve().parents[2])
  return subprocess.Popen(
    [python, '-s', '-S', '-P', '-X', 'utf8', '-c', _BOOT, root, str(fd), tier],
    stdin=subprocess.DEVNULL,
    stdout=subprocess.DEVNULL,
    stderr=stderr,
    # A fixed hash seed: the order of a program's sets is the same in every run. Symbols are
    # bound at once: what a child binds later costs it pages of its own.
    env={'PYTHONHASHSEED': '0', 'LD_BIND_NOW': '1'},
    pass_fds=(fd,),
    start_new_session=True,  # a Ctrl-C of the caller is the caller's to handle
  )


def _layers_of(probes: list[dict], tier: str) -> tuple[str, ...]:
  """The layers that blocked everything; raises SandboxError naming what got through."""
  through = [f'{p["layer"]}: {p["act"]} ({p["how"]})' for p in probes if not p['blocked']]
  if through:
    raise SandboxError(f'tier {tier} does not stop: {"; ".join(through)}')
  return tuple(dict.fromkeys(probe['layer'] for probe in probes))


def strongest(tiers: tuple[str, ...] = confine.TIERS) -> tuple[Zygote, Confirmed]:
  """A zygote of the strongest tier that this system gives and that proves itself.

  Raises SandboxError, with the reason for each tier, where there is none.
  """
  reasons = []
  for tier in tiers:
    try:
      zygote = Zygote(tier)
    except (Unavailable, SandboxError) as e:
      reasons.append(f'tier {tier}: {e}')
      continue
    return zygote, Confirmed(tier, zygote.layers, tuple(reasons))
  raise SandboxError('no tier of the sandbox can be had here. ' + '. '.join(reasons))
