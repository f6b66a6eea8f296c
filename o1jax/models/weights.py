"""The tensors of a checkpoint's safetensors files, read in pieces.

A file is mapped for the time of one tensor only: mapped pages count as memory of the process, and
with the whole file mapped a model would be there twice at the end of its loading.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

WEIGHTS, INDEX = 'model.safetensors', 'model.safetensors.index.json'
DTYPES = ('F64', 'F32', 'F16', 'BF16')  # what a parameter can be read from
_BLOCK_BYTES = 1 << 18  # of one reading by a thread
# Rows copied at once. A copy into a transposed view goes down the columns: with more rows their
# cache lines displace each other (bfloat16 [5632, 2048] on one core: 1.2 GB/s, with 256 rows 0.7).
_STRIP = 64
_THREADS = min(8, os.cpu_count() or 1)
_ALIGNMENT = 64  # bytes; JAX adopts a host array as a CPU buffer where it is aligned so


class Weights:
  """The tensors of a Hub folder, by name.

  `shapes` and `dtypes` (safetensors' names of them) are known without reading a tensor.
  """

  def __init__(self, folder: Path):
    """Opens every file once, for its header.

    Raises:
      FileNotFoundError: no weights, or files are missing that the index names.
      ValueError: a file is not what its name says.
    """
    self.shapes: dict[str, tuple[int, ...]] = {}
    self.dtypes: dict[str, str] = {}
    self._paths: dict[str, Path] = {}
    for path in _files(folder):
      try:
        with safe_open(path, framework='numpy') as file:
          slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
          self.shapes |= {name: tuple(part.get_shape()) for name, part in slices.items()}
          self.dtypes |= {name: part.get_dtype() for name, part in slices.items()}
          self._paths |= dict.fromkeys(slices, path)
      except SafetensorError as error:
        raise ValueError(f'{path} is not a readable safetensors file: {error}') from error

  def read(self, name: str, region: Sequence[slice], out: np.ndarray) -> None:
    """Fills `out` with `tensor[region]`, converted to its type.

    Args:
      name: of the tensor.
      region: a slice with both ends for each axis.
      out: of the region's shape, a view of any strides.
    """
    first, *rest = region
    rows = max(1, _BLOCK_BYTES // max(1, out[:1].nbytes))
    with safe_open(self._paths[name], framework='numpy') as file:
      tensor = file.get_slice(name)

      def copy(start: int) -> None:
        stop = min(start + rows, first.stop)
        block = tensor[slice(start, stop), *rest]
        target = out[start - first.start : stop - first.start]
        for row in range(0, stop - start, _STRIP):
          target[row : row + _STRIP] = block[row : row + _STRIP]

      starts = range(first.start, first.stop, rows)
      if len(starts) == 1:
        copy(first.start)
      else:
        with ThreadPoolExecutor(_THREADS) as threads:  # numpy copies without the GIL
          list(threads.map(copy, starts))


def empty(shape: Sequence[int], dtype: Any) -> np.ndarray:
  """An uninitialised array that JAX takes over on CPU without a copy."""
  size = math.prod(shape) * np.dtype(dtype).itemsize
  memory = np.empty(size + _ALIGNMENT, np.uint8)
  start = -memory.ctypes.data % _ALIGNMENT
  return memory[start : start + size].view(dtype).reshape(shape)


def _files(folder: Path) -> list[Path]:
  if (folder / WEIGHTS).is_file():
    return [folder / WEIGHTS]
  if not (folder / INDEX).is_file():
    raise FileNotFoundError(f'{folder} has no weights: neither {WEIGHTS} nor {INDEX}')
  try:
    names = sorted(set(json.loads((folder / INDEX).read_text())['weight_map'].values()))
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(f'{folder / INDEX} is no index of safetensors files: {error!r}') from error
  absent = [name for name in names if not (folder / name).is_file()]
  if absent:
    raise FileNotFoundError(f'{folder} lacks {", ".join(absent)}, which {INDEX} names')
  return [folder / name for name in names]
