"""Documents into fixed-shape rows: packed for language modelling, one a row otherwise."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from o1jax.batch import TokenBatch

_OPEN_ROWS = 64  # rows a document may still join; more packs tighter and slower


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
  """Token ids; the first `prompt` of them are read but not learnt."""

  ids: tuple[int, ...]
  prompt: int = 0


def pack(documents: Sequence[Document], length: int) -> TokenBatch:
  """Packs documents into rows of `length` tokens, first fit, in order.

  Positions restart and segments count up with each document, so attention that
  stays within a segment gives every document the result it has alone.

  Returns:
    A `TokenBatch` of NumPy arrays `[N, length]`.

  Raises:
    ValueError: a document is longer than `length`.
  """
  rows: list[list[Document]] = []
  open_rows: list[tuple[int, int]] = []  # (row, tokens left)
  for document in documents:
    size = len(document.ids)
    if size > length:
      raise ValueError(
        f'a document of {size} tokens does not fit rows of {length}; raise the length'
      )
    for slot, (row, left) in enumerate(open_rows):
      if size <= left:
        rows[row].append(document)
        open_rows[slot] = (row, left - size)
        break
    else:
      rows.append([document])
      open_rows.append((len(rows) - 1, length - size))
      open_rows = open_rows[-_OPEN_ROWS:]
  return _fill(rows, length)


def pad(documents: Sequence[Document], length: int) -> TokenBatch:
  """One document a row, in order, padded on the right to `length`.

  Raises:
    ValueError: a document is longer than `length`.
  """
  longest = max((len(d.ids) for d in documents), default=0)
  if longest > length:
    raise ValueError(
      f'a document of {longest} tokens does not fit rows of {length}; raise the length'
    )
  return _fill([[d] for d in documents], length)


def _fill(rows: Sequence[Sequence[Document]], length: int) -> TokenBatch:
  shape = (len(rows), length)
  tokens = np.zeros(shape, np.int32)
  positions = np.zeros(shape, np.int32)
  segments = np.zeros(shape, np.int32)
  mask = np.zeros(shape, np.float32)
  for r, row in enumerate(rows):
    start = 0
    for s, document in enumerate(row, start=1):
      end = start + len(document.ids)
      tokens[r, start:end] = document.ids
      positions[r, start:end] = np.arange(end - start)
      segments[r, start:end] = s
      mask[r, start + max(document.prompt, 1) : end] = 1.0
      start = end
  return TokenBatch(tokens, positions, segments, mask)
