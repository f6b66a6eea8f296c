"""Confinement: of a zygote, once and by tier; of each child, before its program runs.

Tier A: namespaces, Landlock, seccomp. Tier B: Landlock, seccomp. Tier C: seccomp with no
file that could be opened. `unsafe`: limits of resources only, for those who asked for it in
words. A tier is taken as a whole: where a part of it fails, `confine_zygote` raises and the
process must exit, because what was done before cannot be undone.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Callable

from o1jax.sandbox import landlock, libc, namespaces, seccomp, syscalls, wire

TIERS = ('A', 'B', 'C')
UNSAFE = 'unsafe'
# Shared objects that Python's extension modules load. Symbolic links are kept as links.
_SHARED = ('/lib', '/lib64', '/usr/lib', '/usr/lib64')
_ZONES = '/usr/share/zoneinfo'
_STACK = 128 << 20  # bytes that the main thread's stack may grow to
_STACKS = 512 << 20  # bytes of address space on top of the memory limit, for thread stacks
_MAX_FILES = 128  # a zygote has the inputs of a batch twice
_MAX_TASKS = 160  # threads; only where the namespace makes the count this program's own
PLACES = 7 + wire.BATCH_INPUTS  # the descriptors of children: the last one is the mark


def library() -> str:
  """The folder of Python's standard library."""
  return os.path.dirname(os.path.realpath(os.__file__))


def _raise_oom_score() -> None:
  """When memory runs out, the kernel takes a program before it takes the caller."""
  try:
    with open('/proc/self/oom_score_adj', 'w') as score:
      score.write('500')
  except OSError:
    pass


def _stay_behind(pid: int) -> None:
  """What is left of the process that entered the namespaces: waits for the zygote and exits."""
  os.closerange(0, 1 << 20)
  _, status = os.waitpid(pid, 0)
  os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def _enter_namespaces(machine: str) -> None:
  namespaces.enter([library(), *_SHARED, _ZONES], machine)
  pid = os.fork()
  if pid:
    _stay_behind(pid)
  libc.prctl(libc.PR_SET_PDEATHSIG, 9)


def confine_zygote(tier: str, before_filter: Callable[[], None]) -> None:
  """Puts this process under a tier's layers; raises OSError where one cannot be had.

  The process that returns may be a child of the one that called. `before_filter` is called
  when every layer but seccomp is in place.
  """
  machine = syscalls.machine()
  _raise_oom_score()
  libc.prctl(libc.PR_SET_PDEATHSIG, 9)
  if tier == 'A':
    _enter_namespaces(machine)
  elif os.geteuid() == 0 and tier != UNSAFE:
    namespaces.become_nobody()
  libc.prctl(libc.PR_SET_CHILD_SUBREAPER, 1)
  libc.prctl(libc.PR_SET_NO_NEW_PRIVS, 1)
  if tier != UNSAFE:
    libc.drop_capabilities()
  libc.prctl(libc.PR_SET_DUMPABLE, 0)
  set_lasting_limits(tier)
  if tier in ('A', 'B'):
    landlock.restrict(landlock_rules())
  before_filter()
  if tier != UNSAFE:
    seccomp.install(seccomp.zygote_filter(machine, files=tier != 'C'))


def landlock_rules() -> list[tuple[str, int]]:
  """What Landlock grants to programs, as paths and rights."""
  return landlock.library_rules(library(), [*_SHARED, _ZONES])


def library_stays_readable() -> bool:
  """Whether Python's library can be read by this process after it has become nobody."""
  if os.geteuid() != 0:
    return True
  path = library()
  while path != '/':
    if not os.stat(path).st_mode & 0o001:
      return False
    path = os.path.dirname(path)
  return True


def set_lasting_limits(tier: str) -> None:
  """The limits that are the same for the zygote and all its children; they cannot be raised."""
  limits = {
    resource.RLIMIT_NOFILE: _MAX_FILES,
    resource.RLIMIT_CORE: 0,
    resource.RLIMIT_MEMLOCK: 0,
    resource.RLIMIT_MSGQUEUE: 0,
  }
  if tier == 'A':
    limits[resource.RLIMIT_NPROC] = _MAX_TASKS
  for name, value in limits.items():
    value, _ = _within_hard(name, value)
    resource.setrlimit(name, (value, value))
  resource.setrlimit(resource.RLIMIT_STACK, _within_hard(resource.RLIMIT_STACK, _STACK))


def _within_hard(name: int, value: int) -> tuple[int, int]:
  """A soft limit that may be set now, and the hard limit as it is. Infinity is -1."""
  hard = resource.getrlimit(name)[1]
  if hard == resource.RLIM_INFINITY:
    return value, hard
  return (hard if value == resource.RLIM_INFINITY else min(value, hard)), hard


class Confinement:
  """Confines the children of one zygote.

  What it can, it does in the zygote, before the fork: every page that a child touches is
  copied, so that each line of Python in a child costs microseconds.
  """

  def __init__(self, tier: str):
    self.tier = tier
    self.filter = None if tier == UNSAFE else seccomp.ChildFilter(syscalls.machine())
    self.limits = (0, 0)
    self.null = os.open('/dev/null', os.O_RDWR)
    for fd in range(PLACES):
      os.dup2(self.null, fd)  # so that nothing else takes these numbers

  def set_limits(self, request: dict) -> None:
    """Sets, on the zygote, what its next child inherits. Children cannot change limits.

    They are soft limits of the zygote, so that it can raise them for the next program.
    """
    limits = request['memory_bytes'] + _STACKS, request['output_bytes']
    if limits != self.limits:
      for name, value in zip((resource.RLIMIT_AS, resource.RLIMIT_FSIZE), limits, strict=True):
        resource.setrlimit(name, _within_hard(name, value))
      self.limits = limits

  def lift_file_limit(self) -> None:
    """Lets the zygote itself write a file of any size, until `set_limits`."""
    limit = _within_hard(resource.RLIMIT_FSIZE, resource.RLIM_INFINITY)
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    self.limits = (0, 0)

  def present(self, descriptors: tuple[int, ...]) -> None:
    """Makes `descriptors` the numbers 0, 1, 2, ... of the zygote, as its next child has them."""
    for place, fd in enumerate(descriptors):
      os.dup2(fd, place)

  def withdraw(self, count: int) -> None:
    """Takes the first `count` descriptors away again, so that a closed end is seen as closed."""
    for place in range(count):
      os.dup2(self.null, place)

  def apply(self, request: dict, descriptors: int, filtered: bool = True) -> None:
    """Confines this new process; it keeps its first `descriptors` descriptors.

    The one behind them is an eventfd on which it says that it is confined, before it loses
    it. The program cannot take that back: a child without the mark was never confined.
    """
    if self.tier != 'A':  # in A, a child cannot outlive the zygote: it is the namespace's first
      libc.prctl(libc.PR_SET_PDEATHSIG, 9)
      seconds = int(request['cpu_s'] * max(1, request['tests'])) + 3
      resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    if self.filter is not None and filtered:
      self.filter.install(os.getpid())
    os.eventfd_write(descriptors, 1)
    os.closerange(descriptors, _MAX_FILES)
