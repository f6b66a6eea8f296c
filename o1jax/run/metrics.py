"""metrics.jsonl, one object a line, and TensorBoard as a projection of it.

    {"stage": "round0/rl", "step": 12, "time": 1718000000.0, "loss": 0.31, ...}

A stage that resumes at step n first drops its lines after n, so that no step stands twice.
TensorBoard files are rebuilt whenever lines are dropped or the run is reopened: what a killed
process had not flushed comes back.
"""

from __future__ import annotations

import math
import pathlib
import shutil
import time
from collections.abc import Callable, Mapping
from typing import Any

from o1jax.parallel import distributed
from o1jax.run import files


class Metrics:
  """Measurements of one run, written to `folder`. A context manager.

  Of several processes the first writes; on the others all of it does nothing.
  """

  def __init__(
    self,
    folder: pathlib.Path,
    tensorboard: bool = True,
    clock: Callable[[], float] = time.time,
  ):
    self.path = folder / 'metrics.jsonl'
    self._tensorboard = folder / 'tensorboard' if tensorboard else None
    self._clock = clock
    self._writer: Any = None
    self._writes = distributed.is_first()
    if self._writes:
      self._project(list(files.read_jsonl(self.path)))

  def __enter__(self) -> Metrics:
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def begin(self, stage: str, after: int = -1) -> None:
    """Drops the lines of `stage` later than step `after`: the steps that will be taken again."""
    if not self._writes:
      return
    rows = list(files.read_jsonl(self.path))
    kept = [row for row in rows if row['stage'] != stage or row['step'] <= after]
    if len(kept) < len(rows):
      files.write_jsonl(self.path, kept)
      self._project(kept)

  def write(self, stage: str, step: int, values: Mapping[str, Any]) -> None:
    """Appends one line. A value that is not finite is written as null."""
    if not self._writes:
      return
    row = {'stage': stage, 'step': int(step), 'time': round(self._clock(), 3)}
    row |= {name: _finite(value) for name, value in values.items()}
    files.append_jsonl(self.path, [row], sync=False)
    self._add(row)

  def rows(self, stage: str) -> list[dict[str, Any]]:
    """The lines of one stage, in the order in which they were written."""
    return [row for row in files.read_jsonl(self.path) if row['stage'] == stage]

  def close(self) -> None:
    """Flushes TensorBoard."""
    if self._writer is not None:
      self._writer.close()
      self._writer = None

  def _project(self, rows: list[dict[str, Any]]) -> None:
    """Writes the event files anew from `rows`."""
    if self._tensorboard is None:
      return
    import tensorboardX  # 0.1 s, and only where it is wanted

    self.close()
    shutil.rmtree(self._tensorboard, ignore_errors=True)
    self._writer = tensorboardX.SummaryWriter(str(self._tensorboard))
    for row in rows:
      self._add(row)

  def _add(self, row: Mapping[str, Any]) -> None:
    if self._writer is None:
      return
    for name, value in row.items():
      if name not in ('stage', 'step', 'time') and isinstance(value, int | float):
        self._writer.add_scalar(f'{row["stage"]}/{name}', value, row['step'], row['time'])


class Lagged:
  """Hands device scalars to `emit` one push late, when their step has long been computed.

  Reading a scalar waits for its step; reading it after the next step was dispatched leaves the
  device with work to do. A context manager: leaving it without an error emits the last one.
  """

  def __init__(self, emit: Callable[[int, dict[str, float]], None]):
    self._emit = emit
    self._held: tuple[int, Mapping[str, Any]] | None = None

  def __enter__(self) -> Lagged:
    return self

  def __exit__(self, kind, *_) -> None:
    if kind is None:
      self.flush()

  def push(self, step: int, scalars: Mapping[str, Any]) -> None:
    """Holds the scalars of `step`, starts their copy to the host, and emits those held before."""
    for value in scalars.values():
      if hasattr(value, 'copy_to_host_async'):
        value.copy_to_host_async()
    held, self._held = self._held, (step, scalars)
    self._release(held)

  def flush(self) -> None:
    """Emits what is held; before a checkpoint, say, so that its lines are on disk first."""
    held, self._held = self._held, None
    self._release(held)

  def _release(self, held: tuple[int, Mapping[str, Any]] | None) -> None:
    if held is not None:
      step, scalars = held
      self._emit(step, {name: float(value) for name, value in scalars.items()})


def _finite(value: Any) -> Any:
  """A Python number or text; None for NaN and infinities."""
  value = value.item() if hasattr(value, 'item') else value
  return value if not isinstance(value, float) or math.isfinite(value) else None
