"""Stopping on SIGTERM and SIGINT: at once, or at the next step boundary of a training loop.

    with raising():                       # the whole program: a signal raises `Stopped`
      with deferred() as stop:            # a training loop: a signal is noted
        for step in ...:
          ...
          if stop.agree(save=due):
            save()
          stop.check()                    # raises `Stopped`

Of several processes any may be told; all of them save at the same step and stop together. Outside
of training loops a signal is then noted too (`noting`), and raised on all by the next `pause`.

A second signal while one is noted ends the process there and then, without a save. Signals that the
process was started to ignore (nohup) stay ignored. Handlers are the process's: main thread only.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_AGAIN_S = 0.02


class Stopped(KeyboardInterrupt):
  """A signal asked the process to end; passes through `except Exception` as Ctrl-C does."""

  def __init__(self, signum: int):
    super().__init__(signal.Signals(signum).name)
    self.signum = signum


class Stop:
  """Whether a signal has come; made by `deferred`."""

  def __init__(self, noted: int = 0):
    self.noted = noted  # the signal of this process, 0 for none
    self._agreed = 0  # of any process, known to all of them
    self._vote: Any = None
    self._saved = False  # by the last call

  @property
  def asked(self) -> bool:
    """True from the first signal of this process on."""
    return self.noted != 0

  def agree(self, save: bool = False, wait: bool = False) -> bool:
    """Whether to save now, the same answer on every process.

    True where one of them asks for it by `save`, or has been sent a signal. Over several
    processes the answer is that to the call before, unless `wait`, as at the last step.
    """
    if alone():
      return save or self.asked
    if self._vote is None:
      from o1jax.parallel.distributed import Vote

      self._vote = Vote()
    asked, self._agreed = self._vote.cast((int(save), self.noted), wait)
    # Whoever asked while the save was on its way has meant that one.
    self._saved = bool(asked) and (wait or not self._saved)
    return bool(self._saved or self._agreed)

  def check(self) -> None:
    """Raises `Stopped` if a signal has come: to any process, where several have agreed on it."""
    signum = self.noted if alone() else self._agreed
    if signum:
      raise Stopped(signum)

  def note(self, signum: int, _frame: object) -> None:
    """The handler: the first signal is remembered, the second ends the process."""
    if self.asked:
      os._exit(exit_code(signum))
    self.noted = signum


def alone() -> bool:
  """Whether no other process runs this program too; does not import JAX to find out."""
  if 'jax' not in sys.modules:
    return True
  from o1jax.parallel.distributed import count

  return count() == 1


def exit_code(signum: int) -> int:
  """What a shell says of a process that the signal ended: 130 for SIGINT, 143 for SIGTERM."""
  return 128 + signum


@contextmanager
def raising() -> Iterator[None]:
  """Within, a signal raises `Stopped` where the program stands.

  Where that is a destructor or a callback of the garbage collector, JAX's for one, Python passes
  over what is raised: then it is raised again a moment later.
  """

  def handle(signum: int, _frame: object) -> None:
    raise Stopped(signum)

  def passed_over(found: Any) -> None:
    if isinstance(found.exc_value, Stopped):
      again = threading.Timer(_AGAIN_S, os.kill, (os.getpid(), found.exc_value.signum))
      again.daemon = True
      again.start()
    else:
      before(found)

  before, sys.unraisablehook = sys.unraisablehook, passed_over
  try:
    with _handled_by(handle):
      yield
  finally:
    sys.unraisablehook = before


@contextmanager
def deferred() -> Iterator[Stop]:
  """Within, a signal is noted; it is raised by `check`, at the latest when the block ends."""
  with _noted() as stop:
    yield stop
  if not alone():
    stop.agree(wait=True)
  stop.check()


@contextmanager
def noting() -> Iterator[None]:
  """Around the whole of a run over several processes: a signal is noted until the next `pause`.

  With one process nothing changes, and a signal does what it did.
  """
  if alone():
    yield
    return
  with _noted():
    yield


def pause() -> None:
  """Raises `Stopped` on every process if one has been sent a signal.

  Called where all are at the same place anyway. Does nothing inside `deferred`, where there is
  something to save first, and with one process.
  """
  if len(_stack) == 1 and not alone():
    _stack[0].agree(wait=True)
    _stack[0].check()


_stack: list[Stop] = []  # of `noting` and `deferred`, the innermost last


@contextmanager
def _noted() -> Iterator[Stop]:
  # What was noted outside is heard inside.
  stop = Stop(_stack[-1].noted if _stack else 0)
  _stack.append(stop)
  try:
    with _handled_by(stop.note):
      yield stop
  finally:
    _stack.pop()


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
