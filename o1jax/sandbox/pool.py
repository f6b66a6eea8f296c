"""The pool: zygotes, one thread of the caller for each, and a queue of jobs.

Zygotes are exec'd, never forked from the caller: a process that has started JAX has
threads, and a fork of it can deadlock.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Iterable
from concurrent.futures import Future

from o1jax import types
from o1jax.sandbox import canary, confine, judge, zygote
from o1jax.sandbox.judge import HarnessFailure
from o1jax.sandbox.protocol import Job, Limits, SandboxError
from o1jax.sandbox.remote import Service
from o1jax.sandbox.zygote import Confirmed, Unavailable, Zygote
from o1jax.types import Verdict

log = logging.getLogger(__name__)

ALLOW_UNSAFE = 'run programs without a sandbox'
_ATTEMPTS = 3
_MASKED_SHARE = 0.02  # of the jobs; above it the run stops
_MASKED_AT_LEAST = 10
_CHECK_EVERY = 2000  # programs of one zygote between two rounds of canaries and probes


class Pool:
  """Judges programs in `workers` zygotes at once.

  Starting takes the strongest tier that proves itself on this machine (see `confine`), and
  then runs canaries: programs whose verdict is known. Both are repeated now and then; a
  layer or a canary that fails stops the pool.

  Args:
    workers: how many programs run at the same time; one a core is right. Default: the
      number of cores this process may use.
    limits: what a program may use, where its job does not say otherwise.
    allow_unsafe: where no tier can be had, the pool refuses to start, unless this is the
      sentence `ALLOW_UNSAFE`: programs can then do what the caller can.
    tiers: which tiers may be taken, strongest first.
    url: an HTTP service that runs the programs instead of this machine (see `remote`); the
      tier is then 'remote', and `workers` is the number of requests at a time.

  A verdict whose `masked` is true says that the sandbox failed three times; it must not
  become a reward. When such verdicts pass 2 % of all, `judge` raises SandboxError.
  """

  def __init__(
    self,
    workers: int | None = None,
    limits: Limits | None = None,
    *,
    allow_unsafe: str = '',
    tiers: tuple[str, ...] = confine.TIERS,
    url: str = '',
  ):
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    if workers < 1:
      raise ValueError(f'workers={workers} must be at least 1')
    if allow_unsafe not in ('', ALLOW_UNSAFE):
      raise ValueError(f'allow_unsafe={allow_unsafe!r} must be empty or {ALLOW_UNSAFE!r}')
    self.workers = workers
    self.limits = limits or Limits()
    self.judged = 0
    self.masked = 0
    self._url = url
    self._tiers = (*tiers, confine.UNSAFE) if allow_unsafe else tiers
    self._lock = threading.Lock()
    self._error: SandboxError | None = None
    self._jobs: queue.SimpleQueue = queue.SimpleQueue()
    self._started: Future[Confirmed] = Future()
    self._threads: list[threading.Thread] = []
    self._start_thread(first=True)
    self.confirmed = self._started.result()
    for _ in range(workers - 1):
      self._start_thread()

  @property
  def tier(self) -> str:
    """'A', 'B', 'C', 'unsafe' or 'remote'."""
    return self.confirmed.tier

  @property
  def layers(self) -> tuple[str, ...]:
    """The layers that were seen to stop what they are there to stop."""
    return self.confirmed.layers

  def __enter__(self) -> Pool:
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def close(self) -> None:
    """Ends the zygotes. Jobs already submitted are judged first."""
    for _ in self._threads:
      self._jobs.put(None)
    for thread in self._threads:
      thread.join()
    self._threads = []

  def submit(self, job: Job) -> Future[Verdict]:
    """Queues a job; raises SandboxError when the pool is closed or has stopped."""
    if self._error is not None:
      raise self._error
    if not self._threads:
      raise SandboxError('the pool is closed')
    future: Future[Verdict] = Future()
    self._jobs.put((job, future))
    return future

  def judge(self, jobs: Iterable[Job]) -> list[Verdict]:
    """The verdicts on `jobs`, in their order; raises SandboxError when the sandbox has failed.

    The first run while the next are still being made, where `jobs` makes them one by one.
    """
    futures = [self.submit(job) for job in jobs]
    log.info('sandbox: %d jobs, tier %s: %s', len(futures), self.tier, ', '.join(self.layers))
    return [future.result() for future in futures]

  def _start_thread(self, first: bool = False) -> None:
    # A zygote dies with the thread that started it, so each thread starts its own.
    thread = threading.Thread(target=self._serve, args=(first,), name='sandbox', daemon=True)
    self._threads.append(thread)
    thread.start()

  def _serve(self, first: bool) -> None:
    worker = _Worker(self)
    if first:
      try:
        self._started.set_result(worker.choose_tier())
      except BaseException as e:
        self._started.set_exception(e)
        return
    while (item := self._jobs.get()) is not None:
      job, future = item
      if not future.set_running_or_notify_cancel():
        continue
      try:
        if self._error is not None:
          raise self._error
        verdict = worker.judge(job)
      except SandboxError as e:
        self._error = self._error or e
        future.set_exception(self._error)
        continue
      except BaseException as e:
        future.set_exception(e)
        continue
      self._count(verdict)
      future.set_result(verdict)
    worker.close()

  def _count(self, verdict: Verdict) -> None:
    with self._lock:
      self.judged += 1
      self.masked += verdict.masked
      if self.masked >= max(_MASKED_AT_LEAST, _MASKED_SHARE * self.judged) and not self._error:
        masked = f'{self.masked} of {self.judged} programs got no verdict'
        self._error = SandboxError(f'{masked}; the last cause: {verdict.stderr}')


class _Worker:
  """One thread's zygote, or its service, replaced when it fails."""

  def __init__(self, pool: Pool):
    self.pool = pool
    self.zygote: Zygote | Service | None = None

  def choose_tier(self) -> Confirmed:
    """Starts the first zygote, in the strongest tier there is; raises SandboxError."""
    for attempt in range(_ATTEMPTS):
      try:
        confirmed = self._first()
        canary.check(self.zygote.ask, confirmed.tier)
        break
      except HarnessFailure as e:
        self.close()
        if attempt == _ATTEMPTS - 1:
          raise SandboxError(f'the sandbox does not start: {e}') from None
    for reason in confirmed.reasons:
      log.warning('sandbox: %s', reason)
    return confirmed

  def _first(self) -> Confirmed:
    if self.pool._url:
      self.zygote = Service(self.pool._url)
      return Confirmed('remote', Service.layers)
    self.zygote, confirmed = zygote.strongest(self.pool._tiers)
    return confirmed

  def _replacement(self) -> Zygote | Service:
    if self.pool._url:
      return Service(self.pool._url)
    try:
      return Zygote(self.pool.tier)
    except Unavailable as e:
      raise SandboxError(f'tier {self.pool.tier} is no longer to be had: {e}') from None

  def judge(self, job: Job) -> Verdict:
    """The verdict on a job; a zygote that fails is replaced, twice at most."""
    cause = ''
    for _ in range(_ATTEMPTS):
      try:
        self.zygote = self.zygote or self._replacement()
        if self.zygote.served >= _CHECK_EVERY:
          self.zygote.prove_again()
          canary.check(self.zygote.ask, self.pool.tier)
          self.zygote.served = 0
        return judge.judge(job, job.limits or self.pool.limits, self.zygote.ask)
      except HarnessFailure as e:
        cause = str(e)
        log.warning('sandbox: %s', cause)
        self.close()
    return Verdict(types.SANDBOX_FAILURE, stderr=cause)

  def close(self) -> None:
    """Ends the zygote, if there is one."""
    if self.zygote is not None:
      self.zygote.close()
      self.zygote = None
