"""Near-duplicates among problems, and problems that an evaluation set has too.

A statement is its set of shingles: runs of `WORDS` words, case folded (Broder, "On the resemblance
and containment of documents", 1997). Two measures on these sets, both exact, each erring to the
safe side:

- *resemblance* |A & B| / |A | B|, against the problems kept before. Signs count as words: HumanEval
  56 and 61 differ in the kind of bracket alone. What an index of min-hashes proposes is compared
  shingle by shingle. The index lies in a temporary file, so memory does not grow with the number of
  problems.
- *containment* |A & E| / |E| of an evaluation problem E, so that one told within a longer story is
  found. Signs are left out: what differs by them alone must not be trained on. Every shingle of the
  evaluation set is held, 12 bytes each, none of the problems'.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
import sqlite3
import unicodedata
from collections.abc import Iterable, Iterator

import numpy as np

from o1jax.types import Problem

WORDS = 5  # of a shingle; a shorter statement is one shingle
RESEMBLANCE = 0.7  # a near-duplicate from here on
CONTAINMENT = 0.5  # an overlap from here on

# 20 bands of 3 min-hashes: a pair of resemblance s is proposed with probability 1 - (1 - s^3)^20,
# 0.9998 at 0.7 and nearly 1 above.
_BANDS, _ROWS = 20, 3
_CACHE_KIB = 32 << 10  # of the index's pages in memory
_WORD = re.compile(r'\w+')
_WORD_OR_SIGN = re.compile(r'\w+|[^\w\s]')
_MIX = np.random.default_rng(0).integers(1 << 63, size=(2, _BANDS * _ROWS), dtype=np.uint64)
_FACTORS, _OFFSETS = 2 * _MIX[0] + 1, _MIX[1]
_PLACES = 2 * np.random.default_rng(1).integers(1 << 63, size=WORDS, dtype=np.uint64) + 1


@dataclasses.dataclass(frozen=True, slots=True)
class Match:
  """A problem that is too much like another one."""

  id: str
  other: str  # the problem kept, or the evaluation problem
  similarity: float  # in [0, 1], of the measure
  measure: str  # 'resemblance' or 'containment'

  def __str__(self) -> str:
    return f'{self.id} is like {self.other}: {self.measure} {self.similarity:.2f}'


def shingles(text: str, signs: bool) -> np.ndarray:
  """The distinct shingles of a text: `[S]` uint64 hashes, sorted; none of a text without words.

  With `signs`, each sign that is neither letter nor white space is a word of its own.
  """
  pattern = _WORD_OR_SIGN if signs else _WORD
  words = pattern.findall(unicodedata.normalize('NFKC', text).casefold())
  hashes = np.array([_word_hash(word) for word in words], np.uint64)
  if not len(hashes):
    return hashes
  width = min(WORDS, len(hashes))
  runs = np.lib.stride_tricks.sliding_window_view(hashes, width)
  # A factor for each place: the same words in another order are another shingle.
  return np.unique((runs * _PLACES[:width]).sum(axis=1, dtype=np.uint64))


class Unique:
  """Keeps the first of near-duplicates; `drop` says what a problem is too much like."""

  def __init__(self, resemblance: float = RESEMBLANCE):
    self._resemblance = resemblance
    self._db = sqlite3.connect('')  # a temporary file that goes with the connection
    self._db.execute(f'PRAGMA cache_size = -{_CACHE_KIB}')
    self._db.execute('PRAGMA journal_mode = OFF')
    self._db.execute('CREATE TABLE kept (item INTEGER PRIMARY KEY, id TEXT, shingles BLOB)')
    self._db.execute(
      'CREATE TABLE bands (key INTEGER, item INTEGER, PRIMARY KEY (key, item)) WITHOUT ROWID'
    )
    self._items = 0

  def drop(self, problem: Problem) -> Match | None:
    """The kept problem that this one resembles most; None where it is kept as new."""
    found = shingles(problem.statement, signs=True)
    keys = _band_keys(found)
    best = max(self._candidates(found, keys), default=None)
    if best is not None and best[0] >= self._resemblance:
      return Match(problem.id, best[1], best[0], 'resemblance')
    self._items += 1
    row = (self._items, problem.id, found.tobytes())
    self._db.execute('INSERT INTO kept VALUES (?, ?, ?)', row)
    pairs = [(key, self._items) for key in keys]
    self._db.executemany('INSERT OR IGNORE INTO bands VALUES (?, ?)', pairs)
    return None

  def _candidates(self, found: np.ndarray, keys: list[int]) -> Iterator[tuple[float, str]]:
    marks = ','.join('?' * len(keys))
    query = (
      'SELECT id, shingles FROM kept WHERE item IN '
      f'(SELECT DISTINCT item FROM bands WHERE key IN ({marks}))'
    )
    for name, blob in self._db.execute(query, keys):
      other = np.frombuffer(blob, np.uint64)
      shared = len(np.intersect1d(found, other, assume_unique=True))
      union = len(found) + len(other) - shared
      yield (shared / union if union else 1.0), name


class Evaluation:
  """The problems that must not be trained on; `drop` says which of them a problem contains."""

  def __init__(self, problems: Iterable[Problem], containment: float = CONTAINMENT):
    self._containment = containment
    self._ids: list[str] = []
    parts = []
    for problem in problems:
      parts.append(shingles(problem.statement, signs=False))
      self._ids.append(problem.id)
    self._sizes = np.array([len(part) for part in parts], np.int64)
    keys = np.concatenate([np.empty(0, np.uint64), *parts])
    owners = np.repeat(np.arange(len(parts), dtype=np.int32), self._sizes)
    order = np.argsort(keys, kind='stable')
    self._keys, self._owners = keys[order], owners[order]

  def drop(self, problem: Problem) -> Match | None:
    """The evaluation problem that is contained most, where that is too much; else None."""
    found = shingles(problem.statement, signs=False)
    left = np.searchsorted(self._keys, found, 'left')
    right = np.searchsorted(self._keys, found, 'right')
    spans = [self._owners[a:b] for a, b in zip(left, right, strict=True) if b > a]
    if not spans:
      return None
    shared = np.bincount(np.concatenate(spans), minlength=len(self._ids))
    shares = shared / np.maximum(self._sizes, 1)
    best = int(shares.argmax())
    if shares[best] < self._containment:
      return None
    return Match(problem.id, self._ids[best], float(shares[best]), 'containment')


def _band_keys(found: np.ndarray) -> list[int]:
  """One signed 64-bit key a band, of its min-hashes; none for a statement without words."""
  if not len(found):
    return []
  mixed = found[:, None] * _FACTORS + _OFFSETS  # [S, bands * rows], modulo 2^64
  least = (mixed ^ (mixed >> np.uint64(32))).min(axis=0).reshape(_BANDS, _ROWS)
  folded = (least * _FACTORS.reshape(_BANDS, _ROWS)).sum(axis=1, dtype=np.uint64)
  return (folded + np.arange(_BANDS, dtype=np.uint64)).view(np.int64).tolist()


@functools.lru_cache(1 << 16)
def _word_hash(word: str) -> int:
  data = word.encode(errors='surrogatepass')
  return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), 'little')
