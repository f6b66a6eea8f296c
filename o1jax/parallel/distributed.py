"""Several processes as one program: they join, agree, and read what lies on other hosts.

Every process runs the same code in lockstep, and whatever decides a branch is exchanged first: an
answer of the file system, a verdict, a clock, a signal. With one process all of it is local and
free. JAX's own runtime (`jax.distributed`) is the engine; what is exchanged is JSON.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from o1jax.config import ConfigError

T = TypeVar('T')
_LAST_S = 2.0  # seconds that the first process gives the others to leave before it


def count() -> int:
  """How many processes run this program together."""
  return jax.process_count() if jax.distributed.is_initialized() else 1


def index() -> int:
  """Which of them this is."""
  return jax.process_index() if jax.distributed.is_initialized() else 0


def is_first() -> bool:
  """Whether this is the one that writes: logs, metrics, records, markers."""
  return index() == 0


def gather(body: Callable[[], Any]) -> list[Any]:
  """What `body` returns on each process, in their order, as JSON carries it.

  All processes call it at the same place. With one, the value comes back as it is.

  Raises:
    RuntimeError: `body` raised on another process; a `ConfigError` there is one here too. The
      process itself raises what `body` raised.
  """
  if count() == 1:
    return [body()]
  value = fault = own = None
  try:
    value = body()
  except Exception as error:
    own, fault = error, [type(error).__name__, str(error)]
  said = _exchange({'value': value, 'fault': fault})
  if own is not None:
    raise own
  faults = {i: found['fault'] for i, found in enumerate(said) if found['fault']}
  for process, (kind, text) in faults.items():
    if kind == ConfigError.__name__:
      raise ConfigError(f'process {process}', [text])
    raise RuntimeError(f'process {process} of {count()} failed: {kind}: {text}')
  return [found['value'] for found in said]


def together(body: Callable[[], T]) -> T:
  """What `body` returns here, once it has succeeded on every process; raises as `gather` does."""
  kept: list[T] = []
  gather(lambda: kept.append(body()))
  return kept[0]


def from_first(body: Callable[[], Any]) -> Any:
  """What `body` returns on process 0, which alone calls it; raises on all where it raised."""
  return gather(lambda: body() if is_first() else None)[0]


def _exchange(value: Any) -> list[Any]:
  """The JSON `value` of every process."""
  payload = np.frombuffer(json.dumps(value).encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.int32(len(payload)))
  # Powers of two: a compiled gather for each.
  padded = np.zeros(1 << max(8, (int(sizes.max()) - 1).bit_length()), np.uint8)
  padded[: len(payload)] = payload
  rows = multihost_utils.process_allgather(padded)
  return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def fetch(tree: Any) -> Any:
  """The arrays of `tree` whole on every host, as NumPy arrays; all processes call it together."""
  spread = [x for x in jax.tree.leaves(tree) if not _is_here(x)]
  if spread:
    mesh = spread[0].sharding.mesh
    tree = jax.tree.map(lambda x: x if _is_here(x) else _whole(mesh)(x), tree)
  return jax.tree.map(np.asarray, tree)


def _is_here(x: Any) -> bool:
  return not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated


@functools.lru_cache(maxsize=8)
def _whole(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
  return jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))


class Vote:
  """Numbers of every process, and the largest of each known to all one call later.

  The vote travels behind the step that was just dispatched, so that no host waits for a device to
  ask whether to save.
  """

  def __init__(self):
    self._held: jax.Array | None = None

  def cast(self, numbers: Sequence[int], wait: bool = False) -> tuple[int, ...]:
    """The largest numbers of the call before (zeros at first); with `wait`, of this one too."""
    held, self._held = self._held, _largest(np.asarray(numbers, np.int32))
    found = np.zeros(len(numbers), np.int32) if held is None else np.asarray(held)
    if wait:
      found = np.maximum(found, np.asarray(self._held))
      self._held = None
    return tuple(found.tolist())


def _largest(numbers: np.ndarray) -> jax.Array:
  """[n] of this process -> [n], the largest over processes, still under way."""
  devices = np.array(jax.devices()).reshape(count(), -1)
  mesh = Mesh(devices, ('processes', 'devices'))
  rows = NamedSharding(mesh, PartitionSpec('processes'))
  shards = [jax.device_put(numbers[None], device) for device in jax.local_devices()]
  votes = jax.make_array_from_single_device_arrays((count(), len(numbers)), rows, shards)
  return _max_over_rows(mesh)(votes)


@functools.lru_cache(maxsize=1)
def _max_over_rows(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
  return jax.jit(lambda x: x.max(0), out_shardings=NamedSharding(mesh, PartitionSpec()))


def leave(code: int, error: BaseException | None = None) -> NoReturn:
  """Ends this process at once with exit code `code`, printing `error` with its traceback.

  Without the farewell of `jax.distributed`, which waits for processes that may wait for this one:
  they notice that it is gone. Without an error it is a signal that ends it, in a training one that
  all have agreed on: then the first one, whose end aborts the others, goes last.
  """
  if error is not None:
    traceback.print_exception(error)
    text = 'the others stop with it; if one of them ended first, the cause stands in its output'
    print(f'process {index()} of {count()} stops: {text}', file=sys.stderr)
  sys.stdout.flush()
  sys.stderr.flush()
  if error is None and is_first():
    time.sleep(_LAST_S)
  os._exit(code)
