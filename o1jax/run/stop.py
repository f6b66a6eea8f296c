"""Stopping on SIGTERM and SIGINT: at once, or at the next step boundary of a training loop.

    with raising():                       # the whole program: a signal raises `Stopped`
      with deferred() as stop:            # a training loop: a signal is noted
        for step in ...:
          ...
          if stop.asked:
            save()
          stop.check()                    # raises `Stopped`

A second signal inside `deferred` ends the process there and then, without a save. Signals that the
process was started to ignore (nohup) stay ignored. Handlers are the process's: main thread only.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
  """A signal asked the process to end; passes through `except Exception` as Ctrl-C does."""

  def __init__(self, signum: int):
    super().__init__(signal.Signals(signum).name)
    self.signum = signum


class Stop:
  """Whether a signal has come; made by `deferred`."""

  def __init__(self):
    self._signum: int | None = None

  @property
  def asked(self) -> bool:
    """True from the first signal on."""
    return self._signum is not None

  def check(self) -> None:
    """Raises `Stopped` if a signal has come."""
    if self._signum is not None:
      raise Stopped(self._signum)

  def note(self, signum: int, _frame: object) -> None:
    """The handler: the first signal is remembered, the second ends the process."""
    if self.asked:
      os._exit(exit_code(signum))
    self._signum = signum


def exit_code(signum: int) -> int:
  """What a shell says of a process that the signal ended: 130 for SIGINT, 143 for SIGTERM."""
  return 128 + signum


@contextmanager
def raising() -> Iterator[None]:
  """Within, a signal raises `Stopped` where the program stands."""

  def handle(signum: int, _frame: object) -> None:
    raise Stopped(signum)

  with _handled_by(handle):
    yield


@contextmanager
def deferred() -> Iterator[Stop]:
  """Within, a signal is noted; it is raised by `check`, at the latest when the block ends."""
  stop = Stop()
  with _handled_by(stop.note):
    yield stop
  stop.check()


@contextmanager
def _handled_by(handler: Callable[[int, object], None]) -> Iterator[None]:
  heeded = [s for s in SIGNALS if signal.getsignal(s) is not signal.SIG_IGN]
  before = {s: signal.signal(s, handler) for s in heeded}
  try:
    yield
  finally:
    for s, old in before.items():
      # None: set outside Python, and cannot be set again from here.
      signal.signal(s, signal.SIG_DFL if old is None else old)
