"""The zygote: a small process, exec'd by the pool, that forks a confined child per program.

It holds no expected output, parses nothing that a child says, and reports only what it
measured itself: how the child ended, its CPU seconds, its memory. Started with two
arguments: the descriptor of the socket to the pool, and the tier to take.
"""

from __future__ import annotations

import fcntl
import gc
import importlib
import json
import marshal
import os
import signal
import socket
import sys
from collections.abc import Sequence

from o1jax.sandbox import confine, libc, probes, program, tester, watch, wire

_fork = libc.bare_fork()
_MARK = os.EFD_NONBLOCK | os.EFD_CLOEXEC

# What programs import most; loaded once, here, instead of by every child.
_PRELOADED = 'bisect collections copy functools heapq itertools math operator re string typing'
# The rest of what programs tend to import: needed where a child cannot read the library.
_WIDE = (
  'random json decimal fractions datetime statistics queue threading time array cmath struct '
  'dataclasses enum abc io os sys contextlib textwrap bisect numbers hashlib zlib base64 calendar '
  'unicodedata pprint traceback warnings weakref types inspect ast keyword asyncio pickle glob '
  'concurrent.futures.thread sqlite3 ctypes resource mmap fileinput encodings.idna'
)


_SAMPLE = """
import sys
class Sample:
  def __init__(self, values): self.values = sorted(values)
  def total(self): return sum(v for v in self.values if v % 2)
def main(text='1 2 3'):
  try: return f'{Sample(map(int, text.split())).total():d}'
  except ValueError as e: raise RuntimeError(*e.args) from e
for _ in range(16): main()
"""


def preload(wide: bool) -> None:
  """Loads what programs import most and makes forking cheap."""
  import _sitebuiltins
  import builtins

  for name in (_PRELOADED + (' ' + _WIDE if wide else '')).split():
    importlib.import_module(name)
  builtins.exit = _sitebuiltins.Quitter('exit', 'Ctrl-D (i.e. EOF)')
  builtins.quit = _sitebuiltins.Quitter('quit', 'Ctrl-D (i.e. EOF)')
  # Compiling and running something makes what every child would have to make.
  exec(compile(_SAMPLE, program.FILE, 'exec'), {'__name__': 'sample'})
  gc.disable()
  gc.collect()
  libc.trim_heap()
  gc.freeze()


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


def is_marked(mark: int) -> bool:
  """Whether a child said that it was confined, which it does before its program runs."""
  try:
    return os.eventfd_read(mark) == 1
  except BlockingIOError:
    return False


class Zygote:
  """Serves requests from the pool until its socket closes."""

  def __init__(self, sock: socket.socket, tier: str):
    self.sock = sock
    self.confinement = confine.Confinement(tier)
    program.open_streams()
    sys.argv = [program.FILE]
    self.alone = tier == 'A'

  def serve(self) -> None:
    """Answers requests, one at a time. What fails here ends the process: the pool tells it."""
    while True:
      try:
        request = marshal.loads(wire.receive_frame(self.sock))
      except EOFError:
        return
      if request['mode'] == wire.PROBE:
        reply = json.dumps({'probes': probes.run(self.spawn_probe, request)}).encode()
      else:
        reply = self.run_check(request) if request['mode'] == wire.CHECK else self.run(request)
      self.sweep()
      wire.send_frame(self.sock, reply)

  def sweep(self) -> None:
    """Fails if a process has outlived its program: no layer should have let it be made."""
    if self.alone:
      try:
        os.kill(-1, signal.SIGKILL)  # in its namespace everybody but the zygote
      except ProcessLookupError:
        return
    try:
      os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
      return
    raise RuntimeError('a process outlived its program')

  def spawn(self, run, request: dict, descriptors: tuple[int, ...], filtered: bool = True) -> int:
    """Forks a child that confines itself and exits with `run()`; returns its process id.

    The child has `descriptors` as its 0, 1, 2, ...; the last one is its mark.
    """
    self.confinement.set_limits(request)
    self.confinement.present(descriptors)
    pid = _fork()
    if pid:
      self.confinement.withdraw(len(descriptors))
      if pid < 0:
        raise OSError('no process could be made')
      return pid
    status = 126
    try:
      self.confinement.apply(request, len(descriptors) - 1, filtered)
      status = run()
    except BaseException as e:
      os.write(2, f'{type(e).__name__}: {e}'.encode(errors='replace')[: wire.STDERR_TAIL])
    finally:
      os._exit(status)

  def streams(self, inputs: Sequence[str] = ('',)) -> list[int]:
    """Files in memory for a child's stdout and stderr, then a sealed one for each input."""
    fds = [os.memfd_create('stdout'), os.memfd_create('stderr')]
    for text in inputs:
      data = text.encode(errors='surrogatepass')
      if len(data) >= self.confinement.limits[1]:
        self.confinement.lift_file_limit()
      fds.append(sealed_memfd(data))
    return fds

  def follow(self, pid: int, request: dict, pipe: int) -> tuple[watch.Child, bytes]:
    """Sees a single child through to its end; returns it and its report."""
    wall_s = request['cpu_s'] * request['wall_factor']
    child = watch.Child(pid, request['cpu_s'], wall_s, request['tests'])
    return child, watch.collect(child, pipe, 2 * request['output_bytes'] + (1 << 16))

  def run(self, request: dict) -> bytes:
    """One child for a batch or a single test; returns the reply to the pool."""
    batch = request['mode'] == wire.BATCH
    texts = request['inputs'] if request['entry_point'] is None else ()
    fds = [os.eventfd(0, _MARK), *os.pipe(), *self.streams(texts or ('',))]
    mark, pipe, end, stdout, stderr, *inputs = fds
    os.set_blocking(pipe, False)
    again = (stdout, stderr, *inputs) if batch else ()
    given = (inputs[0], stdout, stderr, end, *again, mark)
    pid = self.spawn(lambda: program.run(request), request, given)
    child, report = self.follow(pid, request, pipe)
    printed = b'' if batch else os.pread(stdout, os.fstat(stdout).st_size, 0)
    reply = reply_of(child, is_marked(mark), stderr, request, report, printed)
    for fd in fds:
      os.close(fd)
    return reply

  def run_check(self, request: dict) -> bytes:
    """A program's process and a tester's; the tester reports to the pool on its own socket."""
    _, (to_pool,), _, _ = socket.recv_fds(self.sock, 1, 1)
    seconds = request['cpu_s'] * request['tests']
    fds = [*self.streams(), *self.streams(), os.eventfd(0, _MARK), os.eventfd(0, _MARK)]
    stdout, stderr, stdin, test_stdout, test_stderr, test_stdin, *marks = fds
    ours, theirs = (end.detach() for end in socket.socketpair())
    # The program first: it must not inherit anything of the tester's.
    given = (stdin, stdout, stderr, theirs, marks[0])
    pid = self.spawn(tester.Server(request).run, request, given)
    served = watch.Child(pid, seconds, seconds * request['wall_factor'])
    given = (test_stdin, test_stdout, test_stderr, ours, to_pool, marks[1])
    pid = self.spawn(lambda: tester.run_tests(request), request, given)
    testing = watch.Child(pid, 2 * seconds, 2 * seconds * request['wall_factor'])
    for fd in (ours, theirs, to_pool):
      os.close(fd)
    watch.collect_pair(testing, served)
    confined = all(map(is_marked, marks))
    reply = reply_of(served, confined, stderr, request, b'', b'', testing.killed)
    for fd in fds:
      os.close(fd)
    return reply

  def spawn_probe(self, act, request: dict, filtered: bool) -> tuple[int, str, bool]:
    """Runs one probe in a child; returns the signal that ended it, what it said and its mark."""
    fds = [*self.streams(), *os.pipe(), os.eventfd(0, _MARK)]
    stdout, stderr, stdin, pipe, end, mark = fds
    os.set_blocking(pipe, False)
    given = (stdin, stdout, stderr, end, mark)
    pid = self.spawn(lambda: probes.attempt(act), request, given, filtered)
    child, said = self.follow(pid, request, pipe)
    confined = is_marked(mark)
    for fd in fds:
      os.close(fd)
    return child.signal, said.decode(errors='replace'), confined


def reply_of(
  child: watch.Child,
  confined: bool,
  stderr: int,
  request: dict,
  report: bytes,
  printed: bytes,
  tester_killed: int = wire.NOTHING,
) -> bytes:
  """The reply on an ended child."""
  size = os.fstat(stderr).st_size
  tail = os.pread(stderr, wire.STDERR_TAIL, max(0, size - wire.STDERR_TAIL)) if size else b''
  full = size >= request['output_bytes']
  facts = (confined, full, child.exit, child.signal, child.killed, tester_killed)
  used = (child.used_s, child.was_s, child.rss_bytes)
  return wire.pack_reply(*facts, *used, blobs=(report, printed, tail))


def main() -> None:
  """Entry point of the exec'd process."""
  # High numbers: the low ones are for children.
  fd, errors = (
    fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 2 * confine.PLACES) for fd in (int(sys.argv[1]), 2)
  )
  os.close(int(sys.argv[1]))
  tier = sys.argv[2]
  sys.path.pop()  # the folder of this package: programs have no business there
  try:
    serve(socket.socket(fileno=fd), tier)
  except BaseException as e:
    where = f' in line {e.__traceback__.tb_next.tb_lineno}' if e.__traceback__.tb_next else ''
    os.write(errors, f'{type(e).__name__}: {e}{where}'.encode())


def serve(sock: socket.socket, tier: str) -> None:
  """Takes the tier, proves it to the pool, and serves."""
  unfiltered: list[dict] = []
  try:
    preload(wide=tier == 'C' or (tier == 'B' and not confine.library_stays_readable()))
    request = marshal.loads(wire.receive_frame(sock))
    zygote = Zygote(sock, tier)
    confine.confine_zygote(
      tier, lambda: unfiltered.extend(probes.run_unfiltered(zygote.spawn_probe, request))
    )
  except (OSError, ValueError) as e:
    wire.send_frame(sock, json.dumps({'ready': False, 'reason': str(e)}).encode())
    return
  reply = {'ready': True, 'probes': unfiltered + probes.run(zygote.spawn_probe, request)}
  wire.send_frame(sock, json.dumps(reply).encode())
  zygote.serve()
