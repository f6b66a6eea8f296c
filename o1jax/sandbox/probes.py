"""Probes: each layer is believed only after the act that it forbids was tried and failed.

A probe runs in a child made and confined as a program is. The filtered ones run under all
layers of the tier; the unfiltered ones before the filter of system calls is set, so that
the other layers show what they stop by themselves. No probe does harm where it succeeds.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import resource
import signal
import socket
import threading
from collections.abc import Callable
from functools import partial

from o1jax.sandbox import confine, libc, namespaces, syscalls

_REPORT_FD = 3
_SEIZE = 0x4206  # PTRACE_SEIZE: attaches without stopping the target
_MORE_THREADS = 400
_X32_GETPID = 0x40000000 | 39
_ALL = 'ABC'


class Allowed(Exception):
  """The forbidden act was possible, or was stopped by something else than it should be."""


def _open_for_writing() -> None:
  os.open('/dev/zero', os.O_WRONLY)  # a device: a read-only mount does not stop this


def _read(path: str) -> None:
  with open(path, 'rb') as file:
    file.read(1)


def _see_host_root() -> None:
  os.stat('/etc')


def _make_folder() -> None:
  os.mkdir('/probe')


def _send_on_loopback() -> None:
  with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
    sock.sendto(b'', ('127.0.0.1', 9))


def _connect(port: int) -> None:
  with socket.socket() as sock:
    sock.connect(('127.0.0.1', port))


def _mount() -> None:
  libc.mount('tmpfs', '/', 'tmpfs', 0)


def _name_machine() -> None:
  socket.sethostname(socket.gethostname())


def _trace_zygote() -> None:
  libc.syscall(syscalls.numbers(syscalls.machine())['ptrace'], _SEIZE, os.getppid(), 0, 0)


def _read_zygote_memory() -> None:
  number = syscalls.numbers(syscalls.machine())['process_vm_readv']
  target = ctypes.c_long()
  local = (ctypes.c_size_t * 2)(ctypes.addressof(target), 8)
  remote = (ctypes.c_size_t * 2)(id(libc.syscall), 8)  # the same place in the zygote: it forked us
  libc.syscall(number, os.getppid(), local, 1, remote, 1, 0)


def _call(name: str, *args: int) -> None:
  libc.syscall(syscalls.numbers(syscalls.machine())[name], *args)


def _evade_by_x32() -> None:
  libc.syscall(_X32_GETPID)
  raise Allowed


def _own_for_zygote() -> None:
  fcntl.fcntl(_REPORT_FD, fcntl.F_SETOWN, os.getppid())  # signals would go there


def _fork() -> None:
  if os.fork() == 0:
    os._exit(0)


def _use_too_much_memory(request: dict) -> None:
  # A mapping: the address space counts even when nothing is written to it.
  bytearray(request['memory_bytes'] + (1 << 30))


def _write_too_much(request: dict) -> None:
  os.ftruncate(1, request['output_bytes'] + 1)


def _raise_a_limit() -> None:
  resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 40, 1 << 40))  # answered, but not done
  if resource.getrlimit(resource.RLIMIT_FSIZE)[0] == 1 << 40:
    raise Allowed
  raise PermissionError(1, 'not permitted')


def _find_a_descriptor() -> None:
  for fd in range(_REPORT_FD + 1, 4096):
    with contextlib.suppress(OSError):
      os.fstat(fd)
      raise Allowed
  raise FileNotFoundError(9, 'none is open')


def _start_threads() -> None:
  threading.stack_size(64 << 10)
  release = threading.Event()
  try:
    for _ in range(_MORE_THREADS):
      threading.Thread(target=release.wait, daemon=True).start()
  except RuntimeError:
    raise PermissionError(11, 'no more threads') from None
  finally:
    release.set()


def _unfiltered(request: dict) -> list[tuple[str, str, str, Callable[[], None]]]:
  """Layer, tiers that have it, what is tried, and the act."""
  hidden = namespaces.DENIED_FILE if os.path.exists(namespaces.DENIED_FILE) else '/etc/passwd'
  probes = [
    ('pid namespace', 'A', 'see the caller', partial(os.kill, request['pool_pid'], 0)),
    ('mount namespace', 'A', 'see the root of the host', _see_host_root),
    ('mount namespace', 'A', 'make a folder', _make_folder),
    ('network namespace', 'A', 'send on loopback', _send_on_loopback),
    ('capabilities', _ALL, 'mount', _mount),
    ('capabilities', _ALL, 'name the machine', _name_machine),
    ('landlock', 'AB', 'write to a device', _open_for_writing),
    ('landlock', 'AB', 'read a file that is there', partial(_read, hidden)),
    ('landlock', 'AB', 'read the log of the kernel', partial(_read, '/dev/kmsg')),
    ('not dumpable', _ALL, 'trace the zygote', _trace_zygote),
    ('not dumpable', _ALL, 'read its memory', _read_zygote_memory),
  ]
  if request['root']:
    probes.append(('user', _ALL, 'become root', partial(os.setuid, 0)))
  if request['port'] and request['landlock'] >= 4:
    probes.append(('landlock', 'AB', 'connect to the caller', partial(_connect, request['port'])))
  return probes


def _filtered(request: dict) -> list[tuple[str, str, str, Callable[[], None]]]:
  probes = [
    ('seccomp', _ALL, 'fork', _fork),
    ('seccomp', _ALL, 'execute', partial(os.execv, '/probe', ['probe'])),
    ('seccomp', _ALL, 'make a socket', socket.socket),
    ('seccomp', _ALL, 'signal the zygote', lambda: os.kill(os.getppid(), 0)),
    ('seccomp', _ALL, 'signal it by a descriptor', _own_for_zygote),
    ('seccomp', _ALL, 'trace the zygote', _trace_zygote),
    ('seccomp', _ALL, 'read its memory', _read_zygote_memory),
    ('seccomp', _ALL, 'change a mode', partial(os.chmod, '/', 0o755)),
    ('seccomp', _ALL, 'change a time', partial(os.utime, '/', (0, 0))),
    ('seccomp', _ALL, 'make a namespace', partial(libc.unshare, namespaces.NEWUSER)),
    ('seccomp', _ALL, 'make a file in memory', partial(os.memfd_create, 'probe')),
    ('seccomp', _ALL, 'start io_uring', partial(_call, 'io_uring_setup', 1, 0)),
    ('seccomp', _ALL, 'become dumpable', partial(libc.prctl, libc.PR_SET_DUMPABLE, 1)),
    ('limits', _ALL, 'use too much memory', partial(_use_too_much_memory, request)),
    ('limits', _ALL, 'write too much', partial(_write_too_much, request)),
    ('limits', _ALL, 'raise a limit', _raise_a_limit),
    ('limits', 'A', 'start many threads', _start_threads),
    ('descriptors', _ALL, 'find one', _find_a_descriptor),
    ('files', _ALL, 'write to a device', _open_for_writing),
    ('files', 'C', 'read a device', partial(_read, '/dev/null')),
    ('files', 'C', 'look up a path', partial(os.stat, '/')),
  ]
  if syscalls.machine() == 'x86_64':
    probes.append(('seccomp', _ALL, 'evade by x32', _evade_by_x32))
  return probes


def attempt(act: Callable[[], None]) -> int:
  """In the child: tries the act and reports whether it was possible."""
  try:
    act()
    said = 'allowed'
  except Allowed:
    said = 'allowed'
  except MemoryError:
    said = 'denied: no memory'
  except OSError as e:
    said = f'denied: {os.strerror(e.errno) if e.errno else e}'
  os.write(_REPORT_FD, said.encode())
  return 0


def _outcomes(probes: list, spawn: Callable, request: dict, filtered: bool) -> list[dict]:
  outcomes = []
  for layer, tiers, name, act in probes:
    if request['tier'] not in tiers:
      continue
    ended_by, said, confined = spawn(act, request, filtered)
    if ended_by == signal.SIGSYS:
      said = 'denied: killed'
    blocked = confined and said.startswith('denied')
    outcomes.append(
      {'layer': layer, 'act': name, 'blocked': blocked, 'how': said or f'signal {ended_by}'}
    )
  return outcomes


def run_unfiltered(spawn: Callable, request: dict) -> list[dict]:
  """Probes of the layers beside seccomp; the zygote must not have set its filter yet."""
  return _outcomes(_unfiltered(request), spawn, request, filtered=False)


def run(spawn: Callable, request: dict) -> list[dict]:
  """Probes under all layers; one dict each with its layer, act, `blocked` and how."""
  if request['tier'] == confine.UNSAFE:
    return []
  return _outcomes(_filtered(request), spawn, request, filtered=True)
