"""Namespaces: a root with nothing in it to write, no other processes, no network.

A plain user gets them through a user namespace. Root builds the root file system first and
then becomes nobody, so that the namespaces of a hostile program belong to no one it can be.
"""

from __future__ import annotations

import ctypes
import os

from o1jax.sandbox import libc

NEWNS, NEWCGROUP, NEWUTS, NEWIPC = 0x00020000, 0x02000000, 0x04000000, 0x08000000
NEWUSER, NEWPID, NEWNET = 0x10000000, 0x20000000, 0x40000000
_APART = NEWUSER | NEWPID | NEWNET | NEWIPC | NEWUTS | NEWCGROUP
_NOSUID, _NODEV, _BIND, _REC, _PRIVATE = 2, 4, 0x1000, 0x4000, 0x40000
_RDONLY_ATTR, _NOSUID_ATTR, _NODEV_ATTR = 1, 2, 4
_MOUNT_SETATTR, _PIVOT_ROOT = 442, {'x86_64': 155, 'aarch64': 41}
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_DEVICES = ('/dev/null', '/dev/zero', '/dev/urandom', '/dev/random')
_NEW_ROOT = '/proc'  # a directory that every machine has and nothing is taken from
DENIED_FILE = '/denied'  # exists in the new root and is granted to nobody: for the probes

NOBODY = 65534
_INNER_ID = 1000


def become_nobody() -> None:
  """Gives up root for good; raises OSError."""
  os.setgroups([])
  os.setresgid(NOBODY, NOBODY, NOBODY)
  os.setresuid(NOBODY, NOBODY, NOBODY)
  # Changing the user clears both: our own /proc entries must stay writable for the id maps.
  libc.prctl(libc.PR_SET_DUMPABLE, 1)
  libc.prctl(libc.PR_SET_PDEATHSIG, 9)


def _set_attributes(path: str, attributes: int) -> None:
  attr = (ctypes.c_uint64 * 4)(attributes, 0, 0, 0)
  path_ = ctypes.c_char_p(os.fsencode(path))
  libc.syscall(_MOUNT_SETATTR, _AT_FDCWD, path_, _AT_RECURSIVE, attr, ctypes.sizeof(attr))


def _bind(source: str, attributes: int) -> None:
  """Puts `source` at the same place in the new root, read-only."""
  target = _NEW_ROOT + source
  os.makedirs(os.path.dirname(target), exist_ok=True)
  if os.path.islink(source):
    os.symlink(os.readlink(source), target)
    return
  if os.path.isdir(source):
    os.makedirs(target, exist_ok=True)
  else:
    os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o444))
  libc.mount(source, target, None, _BIND | _REC)
  _set_attributes(target, attributes)


def _build_root(readable: list[str], machine: str) -> None:
  """Makes a read-only tmpfs with `readable` and the harmless devices the root of this process."""
  libc.mount(None, '/', None, _REC | _PRIVATE)
  libc.mount('tmpfs', _NEW_ROOT, 'tmpfs', _NOSUID | _NODEV, 'size=1m,mode=755')
  for path in readable:
    if os.path.lexists(path):
      _bind(path, _RDONLY_ATTR | _NOSUID_ATTR | _NODEV_ATTR)
  for path in _DEVICES:
    _bind(path, _RDONLY_ATTR | _NOSUID_ATTR)
  os.close(os.open(_NEW_ROOT + DENIED_FILE, os.O_CREAT | os.O_WRONLY, 0o444))
  _set_attributes(_NEW_ROOT, _RDONLY_ATTR)
  os.chdir(_NEW_ROOT)
  here = ctypes.c_char_p(b'.')
  libc.syscall(_PIVOT_ROOT[machine], here, here)
  libc.umount_lazily('.')
  os.chdir('/')


def _write(directory: int, path: str, text: str) -> None:
  fd = os.open(path, os.O_WRONLY, dir_fd=directory)
  try:
    os.write(fd, text.encode())
  finally:
    os.close(fd)


def _map_ids(proc: int, uid: int, gid: int) -> None:
  """Makes this process an ordinary user of its new user namespace."""
  _write(proc, 'self/setgroups', 'deny')
  _write(proc, 'self/uid_map', f'{_INNER_ID} {uid} 1')
  _write(proc, 'self/gid_map', f'{_INNER_ID} {gid} 1')


def enter(readable: list[str], machine: str) -> None:
  """Moves this process into namespaces of its own; its children are alone in the last of them.

  The process must have one thread. It can see `readable` and four devices afterwards, and
  nothing else; its next child is the first process of a new process namespace. Raises
  OSError where the system does not allow it, at any stage: the caller must then exit.
  """
  proc = os.open('/proc', os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
  try:
    if os.geteuid() == 0:
      libc.unshare(NEWNS)
      _build_root(readable, machine)
      become_nobody()
      libc.unshare(_APART)
      _map_ids(proc, NOBODY, NOBODY)
    else:
      uid, gid = os.geteuid(), os.getegid()
      libc.unshare(_APART | NEWNS)
      _map_ids(proc, uid, gid)
      _build_root(readable, machine)
  finally:
    os.close(proc)
