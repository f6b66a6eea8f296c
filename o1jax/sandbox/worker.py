"""The zygote: a small process, exec'd by the pool, that forks a confined child per program.

It holds no expected output, parses nothing that a child says, and reports only what it
measured itself: how the child ended, its CPU seconds, its memory. Started as
`python -s -S -P -c 'from o1jax.sandbox.worker import main; main()' FD`, where FD is the
socket to the pool.
"""

from __future__ import annotations

import fcntl
import gc
import json
import os
import resource
import select
import signal
import socket
import sys
import time

from o1jax.sandbox import program, wire

_GRACE_S = 0.03  # CPU seconds of slack, above how long a batch may hold a result back
_STARVED = 32  # a process this many times slower than its CPU time is starved, not idle
_STACK = 128 << 20  # bytes that the main thread's stack may grow to
_STACKS = 512 << 20  # bytes of address space on top of the memory limit, for thread stacks
_MAX_FILES = 64


def cpu_seconds(pid: int) -> float:
  """CPU seconds of a live or just ended process, all threads; 0 if it is gone."""
  try:
    return time.clock_gettime((~pid << 3) | 2)  # the kernel's clock of another process
  except OSError:
    return 0.0


def set_limits(request: dict) -> None:
  """The resource limits of a child, set by itself before the program runs."""
  tests = max(1, len(request.get('inputs', ())))
  seconds = int(request['cpu_s'] * tests) + 3  # a backstop: the zygote's clock decides
  memory = request['memory_bytes'] + _STACKS
  output = request['output_bytes']
  for name, value in (
    (resource.RLIMIT_CPU, seconds),
    (resource.RLIMIT_AS, memory),
    (resource.RLIMIT_FSIZE, output),
    (resource.RLIMIT_NOFILE, _MAX_FILES),
    (resource.RLIMIT_CORE, 0),
    (resource.RLIMIT_MEMLOCK, 0),
    (resource.RLIMIT_MSGQUEUE, 0),
  ):
    hard = resource.getrlimit(name)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(name, (value, value))
  hard = resource.getrlimit(resource.RLIMIT_STACK)[1]
  soft = _STACK if hard == resource.RLIM_INFINITY else min(_STACK, hard)
  resource.setrlimit(resource.RLIMIT_STACK, (soft, hard))


def place_descriptors(sources: list[int]) -> None:
  """Makes `sources` the descriptors 0, 1, 2, ... of this process and closes all others."""
  high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 64) for fd in sources]
  for target, fd in enumerate(high):
    os.dup2(fd, target)
  os.closerange(len(high), 1 << 20)


class Zygote:
  """Serves requests from the pool until its socket closes."""

  def __init__(self, sock: socket.socket):
    self.sock = sock

  def serve(self) -> None:
    while True:
      try:
        payload = wire.receive_frame(self.sock)
      except EOFError:
        return
      request = json.loads(payload)
      wire.send_frame(self.sock, self.run(request))
      del request, payload

  def run(self, request: dict) -> bytes:
    """One child for one request; returns the reply to the pool."""
    batch = request['mode'] == wire.BATCH
    stdin, stdout, stderr = (os.memfd_create(name) for name in ('stdin', 'stdout', 'stderr'))
    if not batch and request['entry_point'] is None:
      os.close(stdin)
      stdin = sealed_memfd(request['inputs'][0].encode(errors='surrogatepass'))
    read_end, write_end = os.pipe()
    sources = [stdin, stdout, stderr, write_end] + ([stdin, stdout, stderr] if batch else [])
    try:
      pid = os.fork()
      if pid == 0:
        become_child(request, sources)
      os.close(write_end)
      sources.remove(write_end)
      watch = Watch(pid, read_end, request)
      header = watch.until_exit()
      printed = b'' if batch else os.pread(stdout, request['output_bytes'] + 1, 0)
      size = os.fstat(stderr).st_size
      tail = os.pread(stderr, wire.STDERR_TAIL, max(0, size - wire.STDERR_TAIL))
      header['stderr_full'] = size >= request['output_bytes']
      return wire.pack_message(header, watch.report(), printed, tail)
    finally:
      os.close(read_end)
      for fd in set(sources):
        os.close(fd)


def sealed_memfd(data: bytes) -> int:
  """A file in memory that nobody can change, positioned at its start."""
  fd = os.memfd_create('stdin', os.MFD_ALLOW_SEALING)
  view = memoryview(data)
  while view:
    view = view[os.write(fd, view) :]
  seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
  fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
  os.lseek(fd, 0, os.SEEK_SET)
  return fd


def become_child(request: dict, sources: list[int]) -> None:
  """Confines this new process and runs the program in it; never returns."""
  status = 126
  try:
    place_descriptors(sources)
    set_limits(request)
    status = program.run(request)
  except BaseException as e:
    os.write(2, f'{type(e).__name__}: {e}'.encode(errors='replace')[: wire.STDERR_TAIL])
  finally:
    os._exit(status)


class Watch:
  """Reads one child's report and stops the child when it is over its limits.

  `read_end` is the pipe of its records. CPU time is counted from the last sign of
  progress, and progress is believed at most once per test.
  """

  def __init__(self, pid: int, read_end: int, request: dict):
    self.pid = pid
    self.read_end = read_end
    self.cpu_s = request['cpu_s'] + _GRACE_S
    self.wall_s = request['cpu_s'] * request['wall_factor']
    self.report_limit = 2 * request['output_bytes'] + (1 << 16)
    self.signs_left = len(request.get('inputs', ()))
    self.parts: list[bytes] = []
    self.size = 0
    self.last_cpu, self.last_wall = 0.0, time.monotonic()
    self.killed: str | None = None

  def report(self) -> bytes:
    return b''.join(self.parts)

  def kill(self, reason: str) -> None:
    if self.killed is None:
      self.killed = reason
      os.kill(self.pid, signal.SIGKILL)

  def check(self) -> float:
    """Kills the child if it is over time; returns the seconds until the next look."""
    used = cpu_seconds(self.pid)
    cpu, wall = used - self.last_cpu, time.monotonic() - self.last_wall
    if cpu > self.cpu_s:
      self.kill('cpu')
    elif wall > self.wall_s and wall > _STARVED * cpu:
      self.kill('wall')
    return min(max(0.002, self.cpu_s - cpu), max(0.01, self.wall_s - wall))

  def drain(self) -> bool:
    """Reads what there is; False when the child's end of the pipe is closed."""
    part = os.read(self.read_end, 1 << 20)
    self.size += len(part)
    if self.size > self.report_limit:
      self.kill('output')
    else:
      self.parts.append(part)
    if part and self.signs_left:
      self.signs_left -= 1
      self.last_cpu, self.last_wall = cpu_seconds(self.pid), time.monotonic()
    return bool(part)

  def until_exit(self) -> dict:
    """Waits for the child to end; returns how it ended and what it used."""
    pidfd = os.pidfd_open(self.pid)
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    poll.register(self.read_end, select.POLLIN)
    wait_s, ended = self.check(), False
    while not ended:
      for fd, _ in poll.poll(1000 * wait_s):
        if fd == pidfd:
          ended = True
        elif not self.drain():
          poll.unregister(self.read_end)
      if not ended:
        wait_s = self.check()
    os.close(pidfd)
    os.set_blocking(self.read_end, False)
    try:
      while self.drain():
        pass
    except BlockingIOError:
      pass
    _, status, usage = os.wait4(self.pid, 0)
    code = os.waitstatus_to_exitcode(status)
    return {
      'exit': code if code >= 0 else None,
      'signal': -code if code < 0 else None,
      'killed': self.killed,
      'cpu_s': usage.ru_utime + usage.ru_stime,
      'rss_bytes': usage.ru_maxrss << 10,
      'wall_s': 0.0,
    }


def prepare_interpreter() -> None:
  """Loads what programs import most and makes forking cheap."""
  import _sitebuiltins
  import bisect
  import builtins
  import collections
  import copy
  import functools
  import heapq
  import itertools
  import math
  import operator
  import re
  import string
  import typing

  builtins.exit = _sitebuiltins.Quitter('exit', 'Ctrl-D (i.e. EOF)')
  builtins.quit = _sitebuiltins.Quitter('quit', 'Ctrl-D (i.e. EOF)')
  del _sitebuiltins, bisect, collections, copy, functools, heapq, itertools, math
  del operator, re, string, typing
  gc.disable()
  gc.collect()
  gc.freeze()


def main() -> None:
  """Entry point of the exec'd process."""
  sock = socket.socket(fileno=int(sys.argv[1]))
  prepare_interpreter()
  wire.send_frame(sock, json.dumps({'ready': True}).encode())
  Zygote(sock).serve()
