"""Test code with assertions, kept apart from the program it tests.

HumanEval's `check(candidate)` and MBPP's asserts hold the expected outputs, so they never
share a process with the program. The *program's process* serves calls; the *tester's
process* runs the assertions, with a stand-in that sends each call across and gets a plain
value back. An object with an `__eq__` of its own stays on the other side: the tester sees
a handle that equals nothing. The tester gets the test code straight from the pool, on a
socket that neither the zygote nor the program reads.

Descriptors of the program: 0-2, 3 the tester. Of the tester: 0-2, 3 the program, 4 the pool.
"""

from __future__ import annotations

import _ast
import _thread
import builtins
import itertools
import os
import sys
import time
from collections.abc import Iterator
from types import CodeType
from typing import Any

from o1jax.sandbox import codec, program, wire

PROGRAM_FD, POOL_FD = 3, 4
# CPython 3.11 counts the depth of all trees under construction in one place: two threads at it
# at once raise SystemError.
_PARSING = _thread.allocate_lock()
_MAX_ITEMS = 100_000  # of an iterator that the tester asks to see
# What test code uses without importing it, because the program's own head used to.
_MODULES = 'cmath collections copy datetime heapq itertools math random re typing'


class Channel:
  """A stream descriptor with the two methods that frames need."""

  def __init__(self, fd: int):
    self.fd = fd

  def recv(self, size: int) -> bytes:
    """At most `size` bytes; none at the end."""
    return os.read(self.fd, size)

  def sendall(self, data: bytes) -> None:
    """Writes all of `data`."""
    view = memoryview(data)
    while view:
      view = view[os.write(self.fd, view) :]


def parse(source: str) -> list[_ast.stmt]:
  """The top-level statements of a program; raises what `compile` raises. Safe in threads."""
  with _PARSING:
    return compile(source, 'tests.py', 'exec', _ast.PyCF_ONLY_AST, dont_inherit=True).body


def count_tests(test_code: str) -> int:
  """How many results test code gives: one an assert at top level, one for `check`, at least 1."""
  body = parse(test_code)
  return max(1, sum(isinstance(node, _ast.Assert) for node in body) + defines_check(body))


def defines_check(body: list[_ast.stmt]) -> bool:
  """Whether the statements define HumanEval's `check(candidate)`."""
  return any(isinstance(node, _ast.FunctionDef) and node.name == 'check' for node in body)


# --- the program's process -------------------------------------------------------------


class Server:
  """Serves the tester's requests over one executed program."""

  def __init__(self, request: dict):
    self.request = request
    self.channel = Channel(PROGRAM_FD)
    self.objects: list[Any] = []  # what the tester holds handles on
    self.namespace: dict = {}

  def _keep(self, value: Any) -> dict:
    self.objects.append(value)
    return {'r': len(self.objects) - 1}

  def _reply(self, *parts: Any) -> None:
    payload = codec.encode(list(parts), self._keep)
    if len(payload) > self.request['output_bytes']:
      payload = codec.encode(['overflow'])
    wire.send_frame(self.channel, payload)

  def _answer(self, op: str, target: Any, args: list, kwargs: dict) -> Any:
    if op == 'entry':
      return program.find_callable(self.namespace, target)
    if op == 'get':
      return self.namespace[target]
    if op == 'iterate':
      return list(itertools.islice(target, _MAX_ITEMS))
    return target(*args, **kwargs)

  def run(self) -> int:
    """Serves until the tester is gone; returns the status to exit with."""
    program.shim_stdin_paths(self.request['code'])
    try:
      code = program.compile_program(self.request['code'])
    except Exception as e:
      print(f'{type(e).__name__}: {e}', file=sys.stderr)
      self._reply('compile', f'{type(e).__name__}: {e}'[:500])
      return 1
    self.namespace = program.fresh_module('program')
    try:
      exec(code, self.namespace)
    except BaseException as e:
      return self._fail(e)
    self._reply('ready', [name for name in self.namespace if isinstance(name, str)])
    while True:
      try:
        payload = wire.receive_frame(self.channel)
      except EOFError:
        return 0
      try:
        answer = self._answer(*codec.decode(payload, self.objects.__getitem__))
        self._reply('value', answer)
      except BaseException as e:
        self._fail(e)

  def _fail(self, e: BaseException) -> int:
    kind, _ = program.outcome_of(e)
    sys.stderr.flush()
    if kind == wire.OVERFLOW:
      self._reply('overflow')
    else:
      self._reply('raised', type(e).__name__, str(e)[:500])
    return 1


# --- the tester's process --------------------------------------------------------------


class Gone(Exception):
  """The program's process has ended or no longer speaks the protocol."""


class Client:
  """Asks the program's process; marks the exceptions that come from it."""

  def __init__(self, channel: Channel, limit: int):
    self.channel = channel
    self.limit = limit
    self.raised: BaseException | None = None  # the last exception that came across
    self.overflowed = False

  def receive(self) -> list:
    """The next answer, a list that starts with a verb; raises Gone."""
    try:
      answer = codec.decode(wire.receive_frame(self.channel, self.limit), self._handle)
    except (OSError, EOFError, ValueError):
      raise Gone from None
    if not isinstance(answer, list) or not answer:
      raise Gone
    return answer

  def _handle(self, number: Any) -> Remote:
    return Remote(self, number)

  def ask(self, op: str, target: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
    """The value of one operation; raises what the program raised, or Gone."""
    payload = codec.encode([op, target, list(args), kwargs or {}], self._name_of)
    try:
      wire.send_frame(self.channel, payload)
    except OSError:
      raise Gone from None
    verb, *rest = self.receive()
    if verb == 'value' and len(rest) == 1:
      return rest[0]
    if verb == 'overflow':
      self.overflowed = True
      raise Gone
    if verb == 'raised' and [type(part) for part in rest] == [str, str]:
      self.raised = exception_named(*rest)
      raise self.raised
    raise Gone

  def _name_of(self, value: Any) -> dict:
    if type(value) is Remote:
      return {'r': value._number}
    raise codec.NotPlain(f'test code passed a {type(value).__name__}, which cannot be sent')


class Remote:
  """A stand-in for something that lives in the program's process. Equals only itself."""

  def __init__(self, client: Client, number: Any):
    self._client, self._number = client, number

  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    """Calls it there; raises what it raises, as a built-in exception."""
    return self._client.ask('call', self, args, kwargs)

  def __iter__(self) -> Iterator:
    return iter(self._client.ask('iterate', self))


def exception_named(name: str, message: str) -> Exception:
  """An exception of the built-in type that the program raised, else a RuntimeError."""
  kind = getattr(builtins, name, None)
  if isinstance(kind, type) and issubclass(kind, Exception):
    try:
      return kind(message)
    except TypeError:
      pass
  return RuntimeError(f'{name}: {message}')


def names_in(code: CodeType) -> set[str]:
  """All names that compiled code looks up, nested functions included."""
  nested = (names_in(const) for const in code.co_consts if isinstance(const, CodeType))
  return set(code.co_names).union(*nested)


class Tester:
  """Runs the assertions one by one and reports a record for each."""

  def __init__(self, request: dict, test_code: str, channel: Channel, report: program.Report):
    self.entry_point = request['entry_point']
    self.client = Client(channel, request['output_bytes'])
    self.report = report
    self.namespace = program.fresh_module('tests')
    self.test_code = test_code

  def _bind_names(self, offered: set[str]) -> None:
    """Binds what the test code names and the program defines; built-ins stay built-ins."""
    if self.entry_point is not None:
      self.namespace['candidate'] = self.client.ask('entry', self.entry_point)
      self.namespace[self.entry_point.rpartition('.')[2]] = self.namespace['candidate']
    names = names_in(compile(self.test_code, 'tests.py', 'exec', dont_inherit=True))
    for name in sorted(names - set(self.namespace)):
      if name in _MODULES.split():
        self.namespace[name] = __import__(name)
      elif name in offered and not hasattr(builtins, name):
        self.namespace[name] = self.client.ask('get', name)

  def _attempt(self, code: CodeType, source: str, counts: bool) -> bool:
    """Runs one piece of test code; reports it if it counts or fails. True if it ended well."""
    cpu, wall = time.process_time(), time.monotonic()
    kind, payload = wire.OUTPUT, b''
    try:
      exec(code, self.namespace)
    except BaseException as e:
      kind, payload = (
        self._kind_of(e),
        f'{source}: {type(e).__name__}: {e}'.encode(errors='replace'),
      )
    if counts or kind != wire.OUTPUT:
      spent = time.process_time() - cpu, time.monotonic() - wall
      self.report.add(kind, *spent, payload[: wire.STDERR_TAIL])
    return kind == wire.OUTPUT

  def _kind_of(self, e: BaseException) -> int:
    if isinstance(e, Gone):
      return wire.OVERFLOW if self.client.overflowed else wire.BAIL
    if e is self.client.raised:
      return wire.MEMORY if isinstance(e, MemoryError) else wire.ERROR
    return wire.OPAQUE  # an assertion, or an operation that the returned value does not have

  def run(self) -> int:
    """Reports records to the pool; the first that is not of a test ends the report."""
    try:
      verb, *rest = self.client.receive()
      if verb == 'compile':
        self.report.add(wire.COMPILE, 0.0, 0.0, str(rest).encode(errors='replace'))
        return 0
      if verb != 'ready':
        self.report.add(wire.ERROR, 0.0, 0.0, str(rest).encode(errors='replace'))
        return 0
      self._bind_names({name for name in rest[0] if isinstance(name, str)})
    except BaseException as e:
      self.report.add(self._kind_of(e), 0.0, 0.0, f'{type(e).__name__}: {e}'.encode())
      return 0
    finally:
      self.report.flush()
    self._run_statements(parse(self.test_code))
    self.report.flush()
    return 0

  def _run_statements(self, body: list[_ast.stmt]) -> None:
    tests = sum(isinstance(node, _ast.Assert) for node in body)
    lines = self.test_code.splitlines()
    for node in body:
      counts = isinstance(node, _ast.Assert)
      piece = compile(_ast.Module([node], []), 'tests.py', 'exec', dont_inherit=True)
      if not self._attempt(piece, lines[node.lineno - 1][:200], counts) and not counts:
        return
    if defines_check(body):
      self._attempt(compile('check(candidate)', 'tests.py', 'exec'), 'check', True)
    elif not tests:
      self.report.add(wire.OUTPUT, 0.0, 0.0, b'')


def run_tests(request: dict) -> int:
  """Gets the test code from the pool and runs it in this process; returns the exit status."""
  test_code = wire.receive_frame(Channel(POOL_FD)).decode(errors='surrogatepass')
  return Tester(request, test_code, Channel(PROGRAM_FD), program.Report(POOL_FD)).run()
