"""Landlock: which files this process and all its children may open. Linux 5.13 or later."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable

from o1jax.sandbox import libc

_CREATE, _ADD_RULE, _RESTRICT = 444, 445, 446  # the same numbers on every machine
_PATH_BENEATH = 1

WRITE_FILE = 1 << 1
READ_FILE = 1 << 2
READ_DIR = 1 << 3
TRUNCATE = 1 << 14
_TCP = 3  # bind and connect
_SCOPES = 3  # abstract unix sockets, signals
# The highest right to files that each version of the interface knows, starting at version 1.
_LAST_FS_BIT = (12, 13, 14, 14, 15)


def version() -> int:
  """The version of the kernel's Landlock; 0 where there is none or it is denied."""
  try:
    return libc.syscall(_CREATE, None, 0, 1)
  except OSError:
    return 0


def restrict(rules: Iterable[tuple[str, int]]) -> None:
  """Denies this process all files but those beneath the paths of `rules`, and all of TCP.

  A rule is a path and the rights granted beneath it; a path that does not exist is passed
  over. Needs no_new_privs. Raises OSError where the kernel has no Landlock.
  """
  abi = version()
  if abi < 1:
    raise OSError('this kernel has no Landlock, or it is denied')
  handled = (2 << _LAST_FS_BIT[min(abi, len(_LAST_FS_BIT)) - 1]) - 1
  words = [handled] + ([_TCP] if abi >= 4 else []) + ([_SCOPES] if abi >= 6 else [])
  attributes = (ctypes.c_uint64 * len(words))(*words)
  ruleset = libc.syscall(_CREATE, attributes, ctypes.sizeof(attributes), 0)
  try:
    for path, rights in rules:
      _grant(ruleset, path, rights & handled)
    libc.syscall(_RESTRICT, ruleset, 0)
  finally:
    os.close(ruleset)


def _grant(ruleset: int, path: str, rights: int) -> None:
  try:
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
  except OSError:
    return
  try:
    # struct landlock_path_beneath_attr is packed: 64 bits of rights, 32 bits of descriptor.
    rule = rights.to_bytes(8, 'little') + fd.to_bytes(4, 'little')
    libc.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, ctypes.c_char_p(rule), 0)
  finally:
    os.close(fd)


def _readable(path: str) -> tuple[str, int]:
  return path, READ_FILE | READ_DIR if os.path.isdir(path) else READ_FILE


def library_rules(library: str, shared: Iterable[str]) -> list[tuple[str, int]]:
  """What a program may read: Python's library without installed packages, shared objects, and
  the harmless devices, of which it may also write /dev/null."""
  rules = [(library, READ_DIR)]
  if os.access(library, os.R_OK):
    names = (n for n in os.listdir(library) if n not in ('site-packages', 'dist-packages'))
    rules += [_readable(os.path.join(library, name)) for name in names]
  for folder in shared:
    if os.path.isdir(folder) and not os.path.islink(folder):
      # Packages installed for the system's own Python may lie here: with this project, its data.
      names = (name for name in os.listdir(folder) if not name.startswith('python'))
      rules += [_readable(os.path.join(folder, name)) for name in names]
  rules += [(path, READ_FILE) for path in ('/dev/zero', '/dev/urandom', '/dev/random')]
  return [*rules, ('/dev/null', READ_FILE | WRITE_FILE | TRUNCATE)]
