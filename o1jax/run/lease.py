"""Who holds a run's folder in a bucket: an object that its holder renews while it lives.

A bucket has no lock that ends with its process. The object `.lock` is made only where there is none
(a precondition of the upload) and written anew every `RENEW_S` seconds. One that has not changed
for `LEASE_S` seconds, or whose process is known to be gone since it ran on this machine, is taken
over: a killed run goes on at once on its own machine, and after a minute on another.

What it does not do: two that take over in the same second could both believe to hold it; the one
that was overwritten finds out within `RENEW_S` and ends at its next save. The same ends a holder
that was suspended for longer than its lease.
"""

from __future__ import annotations

import json
import logging
import os
import pathlib
import socket
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

from o1jax.run import bucket

logger = logging.getLogger(__name__)

RENEW_S = 15.0
LEASE_S = 60.0


class Held(Exception):
  """Another process holds the folder; says which."""


class Lease:
  """The folder, held from here until `close`.

  Raises:
    Held: another process renews its own lease of it.
  """

  def __init__(
    self,
    folder: bucket.Path,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
  ):
    self._path = folder / '.lock'
    self._holder = {'id': uuid.uuid4().hex, 'pid': os.getpid(), 'machine': _machine(), 'beat': 0}
    self._clock, self._ended = clock, threading.Event()
    self._lost = ''
    while not self._create():
      self._wait_for_holder(sleep)
    self._renewed = clock()
    self._thread = threading.Thread(target=self._keep, daemon=True)
    self._thread.start()

  def check(self) -> None:
    """Raises `Held` if the lease was lost on the way."""
    if self._lost:
      raise Held(self._lost)

  def close(self) -> None:
    """Lets another process have the folder."""
    self._ended.set()
    self._thread.join()
    if not self._lost and (self._read() or {}).get('id') == self._holder['id']:
      self._path.unlink(missing_ok=True)

  def renew(self) -> None:
    """Writes the object anew; notes where it has become another's."""
    found = self._read()
    if found is not None and found.get('id') != self._holder['id']:
      self._lost = f'process {_spell(found)} has taken it over'
      return
    self._holder['beat'] += 1
    self._path.write_bytes(json.dumps(self._holder).encode())
    self._renewed = self._clock()

  def _keep(self) -> None:
    while not self._lost and not self._ended.wait(RENEW_S):
      try:
        self.renew()
      except Exception as error:  # the network has gone: it may come back
        if self._clock() - self._renewed > LEASE_S:
          self._lost = f'its lease could not be renewed for {LEASE_S:.0f} s ({error})'

  def _create(self) -> bool:
    try:
      data = json.dumps(self._holder).encode()
      bucket.filesystem().pipe_file(str(self._path), data, mode='create')
    except FileExistsError:
      return False
    return True

  def _wait_for_holder(self, sleep: Callable[[float], None]) -> None:
    """Returns once the object is gone: removed here if its holder is no more."""
    found, since = self._read(), self._clock()
    if found is not None and not _is_gone(found):
      logger.warning(
        '%s is held by process %s; waiting up to %.0f s for a sign of life',
        self._path.parent,
        _spell(found),
        LEASE_S,
      )
    while found is not None:
      if _is_gone(found) or self._clock() - since > LEASE_S:
        self._path.unlink(missing_ok=True)
        return
      sleep(1.0)
      latest = self._read()
      if latest is not None and latest != found:
        raise Held(f'process {_spell(latest)} is running in it')
      found = latest

  def _read(self) -> dict[str, Any] | None:
    try:
      return json.loads(self._path.read_bytes())
    except FileNotFoundError:
      return None


def _machine() -> str:
  """This machine since it was started; containers on it have other names."""
  boot = pathlib.Path('/proc/sys/kernel/random/boot_id')
  return f'{socket.gethostname()}/{boot.read_text().strip() if boot.exists() else ""}'


def _is_gone(holder: dict[str, Any]) -> bool:
  """Whether a process of this machine has ended; False for those of others."""
  if holder['machine'] != _machine() or holder['pid'] == os.getpid():
    return False
  try:
    os.kill(holder['pid'], 0)
  except ProcessLookupError:
    return True
  except PermissionError:
    return False
  return False


def _spell(holder: dict[str, Any]) -> str:
  return f'{holder["pid"]} on {holder["machine"].partition("/")[0]}'
