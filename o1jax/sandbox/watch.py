"""Watching children: CPU clocks, wall clock, and how each one ended."""

from __future__ import annotations

import os
import select
import signal
import time

from o1jax.sandbox import wire

_GRACE_S = 0.03  # CPU seconds of slack, above how long a child may hold a record back
_PIPE_BYTES = 1 << 16  # what a pipe holds
_STARVED = 32  # a process this many times slower than its CPU time is starved, not idle


def cpu_seconds(pid: int) -> float:
  """CPU seconds of a live or just ended process, all threads; 0 if it is gone."""
  try:
    return time.clock_gettime((~pid << 3) | 2)  # the kernel's clock of another process
  except OSError:
    return 0.0


class Child:
  """One child: its limits, what it has used, and how it ended.

  CPU time is counted from the last sign of progress. Wall time only counts against a child
  that idles: on a loaded machine a correct program waits for a core, which is not its fault.

  Args:
    pid: the child.
    cpu_s: CPU seconds between two signs of progress.
    wall_s: seconds it may idle between two signs of progress.
    signs: how many signs of progress are believed, one a test.
  """

  __slots__ = (
    'cpu_s', 'exit', 'killed', 'last_cpu', 'last_wall', 'pid', 'pidfd', 'rss_bytes', 'signal',
    'signs_left', 'started', 'used_s', 'wall_s', 'was_s',
  )  # fmt: skip

  def __init__(self, pid: int, cpu_s: float, wall_s: float, signs: int = 0):
    self.pid = pid
    self.pidfd = os.pidfd_open(pid)
    self.cpu_s, self.wall_s = cpu_s + _GRACE_S, wall_s
    self.signs_left = signs
    self.started = self.last_wall = time.monotonic()
    self.last_cpu = 0.0
    self.killed = wire.NOTHING
    self.exit = -1  # until it has ended, and if it ended by a signal
    self.signal = 0

  def kill(self, reason: int) -> None:
    """Ends the child at once; the first reason is the one that is reported."""
    if self.killed == wire.NOTHING:
      self.killed = reason
      os.kill(self.pid, signal.SIGKILL)

  def progress(self) -> None:
    """Starts the clocks of the next test, if there is one."""
    if self.signs_left:
      self.signs_left -= 1
      self.last_cpu, self.last_wall = cpu_seconds(self.pid), time.monotonic()

  def check(self) -> float:
    """Kills the child if it is over time; returns the seconds until the next look."""
    cpu = cpu_seconds(self.pid) - self.last_cpu
    wall = time.monotonic() - self.last_wall
    if cpu > self.cpu_s:
      self.kill(wire.CPU)
    elif wall > self.wall_s and wall > _STARVED * cpu:
      self.kill(wire.WALL)
    return min(max(0.002, self.cpu_s - cpu), max(0.01, self.wall_s - wall))

  def reap(self) -> None:
    """Collects the ended child: sets how it ended and what it used."""
    os.close(self.pidfd)
    _, status, usage = os.wait4(self.pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
      self.exit = code
    else:
      self.signal = -code
    self.used_s = usage.ru_utime + usage.ru_stime
    self.was_s = time.monotonic() - self.started
    self.rss_bytes = usage.ru_maxrss << 10


def collect(child: Child, pipe: int, limit: int) -> bytes:
  """Waits for `child` to end, reading its report from `pipe`; returns the report.

  `pipe` does not block, and its other end stays open here: the end of the child is the
  only end, whatever it closes. A report beyond `limit` bytes ends the child.
  """
  poll = select.poll()
  poll.register(child.pidfd, select.POLLIN)
  poll.register(pipe, select.POLLIN)
  parts, size = [], 0
  wait_s = min(child.cpu_s, child.wall_s)
  ended = False
  while not ended:
    for fd, _ in poll.poll(1000 * wait_s):
      if fd == child.pidfd:
        ended = True
        continue
      parts.append(os.read(pipe, _PIPE_BYTES))
      size += len(parts[-1])
      if size > limit:
        child.kill(wire.FLOOD)
        parts.clear()
      child.progress()
    if not ended:
      wait_s = child.check()
  child.reap()
  while size <= limit:
    try:
      parts.append(os.read(pipe, _PIPE_BYTES))
    except BlockingIOError:
      break
    size += len(parts[-1])
  return b''.join(parts)


def collect_pair(main: Child, other: Child) -> None:
  """Waits for `main` to end and then ends `other`; both keep to their limits."""
  poll = select.poll()
  alive = {child.pidfd: child for child in (main, other)}
  for fd in alive:
    poll.register(fd, select.POLLIN)
  while main.pidfd in alive:
    wait_s = min(child.check() for child in alive.values())
    for fd, _ in poll.poll(1000 * wait_s):
      poll.unregister(fd)
      alive.pop(fd).reap()
  for child in alive.values():
    child.kill(wire.DONE)  # not its fault: it was waiting for the next call
    child.reap()
