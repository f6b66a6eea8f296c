"""System calls that Python has no function for."""

from __future__ import annotations

import ctypes
import errno
import os

PR_SET_PDEATHSIG = 1
PR_GET_DUMPABLE = 3
PR_SET_DUMPABLE = 4
PR_SET_SECCOMP = 22
PR_CAPBSET_DROP = 24
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
PR_GET_NO_NEW_PRIVS = 39
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_CLEAR_ALL = 4

# PyDLL holds the interpreter's lock across a call: a zygote has one thread, and so has a
# child of it when these are called.
_LIBC = ctypes.PyDLL(None, use_errno=True)
_LIBC.syscall.restype = ctypes.c_long


def check(result: int, what: str) -> int:
  """`result`, unless it is -1: then raises OSError with errno's text and `what`."""
  if result == -1:
    number = ctypes.get_errno()
    raise OSError(number, f'{what}: {os.strerror(number)}')
  return result


def syscall(number: int, *args: object) -> int:
  """A raw system call; raises OSError."""
  values = [ctypes.c_long(a) if isinstance(a, int) else a for a in args]
  return check(_LIBC.syscall(ctypes.c_long(number), *values), f'syscall {number}')


def prctl(option: int, *args: int) -> int:
  """prctl(2); raises OSError."""
  values = [ctypes.c_ulong(a) for a in (*args, 0, 0, 0, 0)[:4]]
  return check(_LIBC.prctl(ctypes.c_int(option), *values), f'prctl {option}')


_PRCTL_SECCOMP = (ctypes.c_int(PR_SET_SECCOMP), ctypes.c_ulong(2))  # SECCOMP_MODE_FILTER


def set_filter(header: ctypes.Array) -> None:
  """Sets the filter that a struct sock_fprog describes; raises OSError.

  Everything but the call is prepared beforehand: each page that a fresh child touches is a
  fault, and a fault costs as much as several system calls.
  """
  if _LIBC.prctl(*_PRCTL_SECCOMP, header):
    check(-1, 'prctl seccomp')


def unshare(flags: int) -> None:
  """unshare(2); raises OSError."""
  check(_LIBC.unshare(ctypes.c_int(flags)), 'unshare')


def mount(source: str | None, target: str, kind: str | None, flags: int, data: str = '') -> None:
  """mount(2); raises OSError."""
  text = [None if part is None else os.fsencode(part) for part in (source, target, kind)]
  result = _LIBC.mount(*text, ctypes.c_ulong(flags), data.encode() or None)
  check(result, f'mount {source} on {target}')


def umount_lazily(target: str) -> None:
  """umount2(2) with MNT_DETACH; raises OSError."""
  check(_LIBC.umount2(os.fsencode(target), 2), f'umount {target}')


def bare_fork():
  """The C library's `_Fork` where it has one, else `os.fork`; returns -1 or raises on failure.

  `os.fork` runs hooks in the child that touch a hundred more pages, at 0.4 ms. A zygote has
  one thread, so there is no lock that those hooks would have to mend.
  """
  return getattr(_LIBC, '_Fork', os.fork)


def trim_heap() -> None:
  """Gives free memory back: a fork pays for every page its parent has."""
  if hasattr(_LIBC, 'malloc_trim'):
    _LIBC.malloc_trim(0)


def drop_capabilities() -> None:
  """Gives up every capability of this process, for good; raises OSError."""
  for capability in range(64):
    try:
      prctl(PR_CAPBSET_DROP, capability)
    except OSError as e:
      if e.errno == errno.EINVAL:  # beyond the last one this kernel knows
        break
      if e.errno != errno.EPERM:  # without CAP_SETPCAP there is nothing to give up
        raise
  prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
  header = (ctypes.c_uint32 * 2)(0x20080522, 0)
  check(_LIBC.capset(header, (ctypes.c_uint32 * 6)()), 'capset')
