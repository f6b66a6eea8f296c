"""The child's side: one program run over inputs, and what it gave reported.

Everything here runs in the hostile process, after it has been confined. Nothing here
is trusted: a program that tampers with it can only change what it reports of itself,
and a report holds outputs, never a verdict.

The descriptors of a child: 0 stdin, 1 stdout, 2 stderr (memfds), 3 the report. In a batch
4 and 5 are second handles on stdout and stderr, to start each test afresh, and from 6 on
stand the inputs of the tests, sealed; a batch of calls has one, which is empty.
"""

from __future__ import annotations

import _thread
import atexit
import builtins
import errno
import gc
import io
import json
import os
import sys
import threading
import time
import types

from o1jax.sandbox import codec, wire

REPORT_FD = 3
_STDOUT, _STDERR, _INPUTS = 4, 5, 6
FILE = 'solution.py'  # what a program is called in its own traceback
_FLUSH_AFTER_S = 0.02  # results are not held back longer than this, so a killed child keeps them
_FLUSH_BYTES = 32 << 10
_open = io.open  # a program may put its own in its place
_streams: tuple = ()  # the last that `open_streams` made
_STDIN_PATHS = ('/dev/stdin', '/dev/fd/0', '/proc/self/fd/0')


class Report:
  """The records of this child, written out when they are many, old or the last."""

  def __init__(self, fd: int = REPORT_FD):
    self.fd = fd
    self.pending: list[bytes] = []
    self.size = 0
    self.since = time.monotonic()

  def add(self, kind: int, cpu_s: float, wall_s: float, payload: bytes) -> None:
    """Adds one test's record."""
    record = wire.pack_record(kind, cpu_s, wall_s, payload)
    self.pending.append(record)
    self.size += len(record)
    if self.size > _FLUSH_BYTES or time.monotonic() - self.since > _FLUSH_AFTER_S:
      self.flush()

  def flush(self) -> None:
    """Writes out what is pending."""
    data = memoryview(b''.join(self.pending))
    self.pending, self.size = [], 0
    while data:
      data = data[os.write(self.fd, data) :]
    self.since = time.monotonic()


def compile_program(source: str) -> types.CodeType:
  """The program's code; raises what `compile` raises."""
  return compile(source, FILE, 'exec', dont_inherit=True)


def fresh_module(name: str) -> dict:
  """A new module for the program, as a new interpreter would have; returns its namespace.

  A program that reads stdin runs as `__main__`; one that is called is imported, so that a
  main block in it does not wait for an input.
  """
  module = types.ModuleType(name)
  module.__builtins__ = builtins
  module.__file__ = FILE
  sys.modules[name] = module
  return module.__dict__


def open_streams() -> None:
  """New sys.stdin, stdout and stderr over descriptors 0, 1 and 2.

  A zygote calls this once, so that its children have them ready.
  """
  global _streams
  sys.stdin = sys.__stdin__ = _open(0, encoding='utf-8', closefd=False)
  sys.stdout = sys.__stdout__ = _open(1, 'w', encoding='utf-8', closefd=False)
  sys.stderr = sys.__stderr__ = _open(
    2, 'w', encoding='utf-8', errors='backslashreplace', buffering=1, closefd=False
  )
  _streams = (sys.stdin, sys.stdout, sys.stderr)


def renew_streams() -> None:
  """Makes the streams as good as new: the same objects if the last test left them in place."""
  try:
    if (sys.stdin, sys.stdout, sys.stderr) == _streams and not any(s.closed for s in _streams):
      sys.stdin.seek(0, 2)  # drops what was read ahead: a seek within it would keep it
      sys.stdin.seek(0)
      return
  except Exception:  # detached, or replaced by something that cannot be compared
    pass
  open_streams()


def shim_stdin_paths(source: str) -> None:
  """Lets `open('/dev/stdin')` work where there is no /proc: only programs that name it see this."""
  if not any(path in source for path in _STDIN_PATHS):
    return
  genuine = io.open

  def open_(file, *args, **kwargs):
    return genuine(0 if file in _STDIN_PATHS else file, *args, **kwargs)

  builtins.open = io.open = open_


def exit_status(e: SystemExit) -> int:
  """The status with which an interpreter would leave on this exception."""
  if e.code is None:
    return 0
  if isinstance(e.code, int):
    return e.code & 0xFF
  print(e.code, file=sys.stderr)
  return 1


def outcome_of(e: BaseException) -> tuple[int, bytes]:
  """The kind of record and payload for an exception that left the program."""
  if isinstance(e, SystemExit):
    status = exit_status(e)
    return (wire.EXIT, str(status).encode()) if status else (wire.OUTPUT, b'')
  if isinstance(e, MemoryError) or (isinstance(e, OSError) and e.errno == errno.ENOMEM):
    return wire.MEMORY, b''
  if isinstance(e, codec.TooLarge):
    return wire.OVERFLOW, b''
  if isinstance(e, codec.NotPlain):
    return wire.OPAQUE, str(e).encode(errors='replace')
  traceback = e.__traceback__
  while traceback is not None and traceback.tb_frame.f_code.co_filename != FILE:
    traceback = traceback.tb_next  # without the frames of this module
  sys.__excepthook__(type(e), e.with_traceback(traceback), traceback)
  return wire.ERROR, type(e).__name__.encode(errors='replace')


def find_callable(namespace: dict, entry_point: str):
  """The function a call-based problem asks for: by name, or as a method of `Solution`."""
  name = entry_point.replace('Solution().', '').replace('Solution.', '')
  if name in namespace and name == entry_point:
    return namespace[name]
  if 'Solution' in namespace:
    return getattr(namespace['Solution'](), name)
  raise NameError(f'the program defines no {entry_point!r}')


def run_once(code: types.CodeType, entry_point: str | None, text: str) -> bytes:
  """Executes the program afresh; returns the encoded result of a call, or nothing for stdio."""
  namespace = fresh_module('__main__' if entry_point is None else 'program')
  exec(code, namespace)
  if entry_point is None:
    return b''
  return codec.encode(find_callable(namespace, entry_point)(*json.loads(text)))


def end_program(source: str) -> None:
  """What an interpreter does when a program ends, short of ending the process."""
  if atexit._ncallbacks():
    atexit._run_exitfuncs()
  for name in ('__main__', 'program'):
    module = sys.modules.get(name)
    if module is not None:
      module.__dict__.clear()  # objects with `__del__`, files left open
  if '__del__' in source or 'open(' in source:
    gc.collect()
  for stream in (sys.stdout, sys.stderr, *_streams[1:]):  # a program may have put others there
    if stream is not None and not getattr(stream, 'closed', True):
      stream.flush()


class Batch:
  """All tests of a program in this one process: the fast path."""

  def __init__(self, request: dict, report: Report):
    self.source = request['code']
    self.entry_point = request['entry_point']
    self.inputs = request['inputs']
    self.limit = request['output_bytes']
    self.report = report

  def _start_test(self, index: int) -> None:
    """Makes ready for a test behind the first, which finds everything ready."""
    stdin = _INPUTS + index if self.entry_point is None else _INPUTS
    os.ftruncate(_STDOUT, 0)
    if os.fstat(_STDERR).st_size > self.limit // 2:  # stderr adds up over the tests
      os.ftruncate(_STDERR, 0)
    for fd, source in enumerate((stdin, _STDOUT, _STDERR)):
      os.dup2(source, fd)  # the last test may have closed it
    os.lseek(0, 0, os.SEEK_SET)
    os.lseek(1, 0, os.SEEK_SET)
    os.lseek(2, 0, os.SEEK_END)
    sys.setrecursionlimit(1000)
    sys.argv = [FILE]
    renew_streams()

  def _end_test(self, kind: int, payload: bytes) -> tuple[int, bytes]:
    for thread in threading.enumerate():
      if thread is not threading.main_thread() and not thread.daemon:
        if 'concurrent.futures.thread' in sys.modules:
          return wire.BAIL, b''  # its workers only end with the interpreter
        thread.join()
    if _thread._count():
      return wire.BAIL, b''
    end_program(self.source)
    if kind == wire.OUTPUT and self.entry_point is None:
      payload = os.pread(_STDOUT, os.fstat(_STDOUT).st_size, 0)
    return kind, payload

  def run(self, code: types.CodeType) -> None:
    """Reports one record per test; stops where only a process of its own can tell."""
    for index, text in enumerate(self.inputs):
      if index:
        self._start_test(index)
      cpu, wall = time.process_time(), time.monotonic()
      try:
        kind, payload = wire.OUTPUT, run_once(code, self.entry_point, text)
      except BaseException as e:
        kind, payload = outcome_of(e)
      try:
        kind, payload = self._end_test(kind, payload)
      except BaseException as e:
        kind, payload = outcome_of(e)
      written = max(os.fstat(_STDOUT).st_size, os.fstat(_STDERR).st_size, len(payload))
      if kind != wire.BAIL and written >= self.limit:
        kind, payload = wire.OVERFLOW, b''
      self.report.add(kind, time.process_time() - cpu, time.monotonic() - wall, payload)
      if kind == wire.BAIL:
        break


def run_strict(request: dict, code: types.CodeType, report: Report) -> int:
  """The one test of this process, as an interpreter would run it; returns the exit status.

  A stdio program reports nothing: its parent reads descriptor 1 after the process is gone.
  """
  source, entry_point, (text,) = request['code'], request['entry_point'], request['inputs']
  cpu, wall, status = time.process_time(), time.monotonic(), 0
  try:
    kind, payload = wire.OUTPUT, run_once(code, entry_point, text)
  except BaseException as e:
    kind, payload = outcome_of(e)
    status = int(payload) if kind == wire.EXIT else int(kind != wire.OUTPUT)
  if entry_point is not None or kind != wire.OUTPUT:
    if len(payload) >= request['output_bytes']:
      kind, payload = wire.OVERFLOW, b''
    report.add(kind, time.process_time() - cpu, time.monotonic() - wall, payload)
    report.flush()
  if _thread._count() or 'concurrent.futures.thread' in sys.modules:
    threading._shutdown()  # waits for threads that are not daemons
  end_program(source)
  return status


def run(request: dict) -> int:
  """Runs a request's program in this process and returns the status to exit with."""
  report = Report()
  gc.enable()
  try:
    code = compile_program(request['code'])
  except Exception as e:
    text = f'{type(e).__name__}: {e}'.encode(errors='replace')
    os.write(2, text)
    report.add(wire.COMPILE, 0.0, 0.0, text[:500])
    report.flush()
    return 1
  shim_stdin_paths(request['code'])
  if request['mode'] == wire.STRICT:
    return run_strict(request, code, report)
  Batch(request, report).run(code)
  report.flush()
  return 0
