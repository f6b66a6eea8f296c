"""The search of a chunk of problems on disk while it grows: a kill costs seconds of it."""

from __future__ import annotations

import base64
import json
import logging
import time
from collections.abc import Callable, Sequence

import numpy as np

from o1jax.parallel import distributed
from o1jax.run import files
from o1jax.run.stop import Stop
from o1jax.sampling.half_grown import Saved
from o1jax.sampling.keys import stable_id
from o1jax.stages.context import Run
from o1jax.types import Problem

logger = logging.getLogger(__name__)


class HalfSaved:
  """What `mcts.Search` has grown of `problems`, with the verdicts that it rests on.

  The file lies among the stage's checkpoints, by the name of the search's settings, and goes with
  them. It is replaced in one move; of several processes the first writes it and reads it for all.
  """

  def __init__(self, run: Run, stage: str, problems: Sequence[Problem], seed: int, stop: Stop):
    self._run, self._stage, self._problems, self._stop = run, stage, problems, stop
    settings = run.config.search.model_dump(mode='json')
    name = files.dumps([settings, seed, [p.id for p in problems]])
    folder = run.bench.store.path(stage, 'checkpoints')
    self.path = folder / f'search-{stable_id(name):08x}.npz'
    self._saved_at = time.monotonic()

  def read(self) -> Saved | None:
    """What was saved, its verdicts told to the executor; None to begin anew."""
    data = distributed.from_first(self._sound)
    if data is None:
      return None
    saved = files.arrays_of(base64.b64decode(data))
    rows = json.loads(saved.pop('verdicts').tobytes())
    self._run.executor.learn(self._problems, rows)
    drawn = sum(len(a) for name, a in saved.items() if name.endswith('.rollout_value'))
    self._run.bench.progress.say(f'{self._stage}: the search goes on behind {drawn} roll-outs')
    return saved

  def boundary(self, state: Callable[[], Saved]) -> None:
    """Saves when `run.checkpoint_every_s` have passed, and before a signal ends the run."""
    due = time.monotonic() - self._saved_at >= self._run.config.run.checkpoint_every_s
    if self._stop.agree(due):
      found = state()
      rows = files.dumps(self._run.executor.known(self._problems)).encode()
      found['verdicts'] = np.frombuffer(rows, np.uint8)
      if distributed.is_first():
        files.write_bytes(self.path, files.bytes_of(found))
      self._saved_at = time.monotonic()
    self._stop.check()

  def _sound(self) -> str | None:
    """The file's bytes as text, which processes exchange."""
    try:
      data = self.path.read_bytes()
    except FileNotFoundError:
      return None
    try:
      json.loads(files.arrays_of(data)['verdicts'].tobytes())
    except Exception as error:  # damage shows in many forms: of zip, of NumPy, of JSON
      logger.warning('%s: passed over damaged half-grown trees (%s)', self.path, error)
      return None
    return base64.b64encode(data).decode()
