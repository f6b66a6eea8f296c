"""Continuing paths of the pool: a batch whose finished rows are replaced while it decodes.

The device decodes until some rows have stopped, then they are handed over and the next ones of the
queue take their places, each with its prefix gathered from the pool so that it ends at the common
column. The steps that rows begin with go back into the pool. What a row draws depends on its
name alone, up to the rounding of sums.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from o1jax.models.transformer import Model
from o1jax.parallel.ambient import ambient_ways, constrain
from o1jax.parallel.distributed import fetch
from o1jax.sampling.cache import DecodeState, laid_out
from o1jax.sampling.decode import Continuation, run
from o1jax.sampling.keys import fold
from o1jax.sampling.kv_pool import KvPool, gather, refill
from o1jax.sampling.paths import Path, Paths
from o1jax.sampling.rows import NONE, evenly_full, parts_of, side_by_side
from o1jax.sampling.sampler import (
  COLUMN_MULTIPLE,
  SHRINK,
  Sampler,
  Samples,
  empty_samples,
  power_of_two,
  round_up,
)

CHUNK = 16  # tokens drawn between two replacements, at most
FEWEST_ROWS = 16  # of a batch
NARROWEST = 32  # columns of the prefixes of single steps, see `_roomy`
DEAD_SHARE = 3  # rows are replaced when one in so many has stopped: each time copies the batch
_DRAWN = ('tokens', 'logprobs', 'lengths', 'live', 'marked')  # what the host reads of a batch


def continue_paths(
  sampler: Sampler,
  paths: Paths,
  todo: Sequence[Path],
  *,
  seed: int,
  ids: np.ndarray,
  marks: tuple[int, ...] = (),
  keep: Callable[[Path], bool] = lambda path: True,
) -> Samples:
  """Continues every path, each row with draws of its own.

  Args:
    sampler: model, limits and drawing; its model is that of `paths`.
    paths: where they are, or are put.
    todo: [n] paths to continue; one may stand there several times, best in succession.
    seed: with `ids` it decides every draw.
    ids: [n, I] non-negative ints that name each row's draws.
    marks: tokens that end a step. A row's path and its first new step go into the pool as one ...
    keep: ... if this is true of it.

  Returns:
    The samples; `computed` is without what `paths` read, which it counts itself.

  Raises:
    ValueError: a path and `max_new` exceed the model's positions; or see `Paths.read`.
  """
  return _Queue(sampler, paths, todo, seed, ids, marks, keep).run()


def widest(sampler: Sampler, longest: int) -> int:
  """Columns of the cache in which paths of up to `longest` tokens are continued."""
  return round_up(longest + sampler.max_new, COLUMN_MULTIPLE) + CHUNK


class _Queue:
  def __init__(self, sampler: Sampler, paths: Paths, todo, seed: int, ids, marks, keep):
    self.sampler, self.paths, self.todo = sampler, paths, list(todo)
    self.marks, self.keep = marks, keep
    self.lengths = np.array([paths.length(path) for path in todo])
    longest, limit = int(self.lengths.max()), sampler.model.config.max_position
    if longest + sampler.max_new > limit:
      raise ValueError(
        f'{longest} tokens and max_new={sampler.max_new} exceed max_position={limit} of the model; '
        f'use max_new of at most {limit - longest}'
      )
    # Columns before those that are drawn next. Where rows end with a step they begin as narrow as
    # their prefixes are; whole roll-outs fill them anyway, and each width is compiled.
    self.full = widest(sampler, longest) - CHUNK
    self.width = 0 if set(sampler.stop_ids) >= set(marks) > set() else self.full
    self.out = empty_samples(len(todo), sampler.max_new)
    self.uniforms = _uniforms(seed, ids, sampler.max_new)
    self.next = self.ready = 0  # of `todo`: the first not begun, the first not read
    self.stored = np.zeros(len(todo), bool)
    self.computed = 0

  def run(self) -> Samples:
    state, where = None, np.zeros(0, int)  # row -> index in `todo`, NONE for a dead one
    while True:
      rows, where = self._arrange(state, where)
      if rows is None:
        break
      state, where = self._decode(rows, where)
    generated = int(self.out.lengths.sum())
    return dataclasses.replace(self.out, generated=generated, computed=self.computed)

  def _arrange(
    self, state: DecodeState | None, where: np.ndarray
  ) -> tuple[Continuation | None, np.ndarray]:
    """A batch of the rows that go on and of new ones; None where there are none."""
    on = np.flatnonzero(where != NONE)
    stay = parts_of(on, len(where))
    wanted = min(len(on) + len(self.todo) - self.next, self.sampler.rows)
    wanted = max(wanted, len(stay) * max(map(len, stay)))
    rows = min(self.sampler.rows, max(FEWEST_ROWS, power_of_two(wanted)))
    rows = round_up(rows, ambient_ways())
    new = np.arange(self.next, min(self.next + rows - len(on), len(self.todo)))
    self.next += len(new)
    self._read_ahead(new)
    if not len(on) and not len(new):
      return None, np.zeros(0, int)
    # Who goes on keeps its order and comes first in its part; the parts are filled evenly.
    take = side_by_side([on[part] for part in stay], rows).astype(np.int32)
    free = np.flatnonzero(take == NONE)
    free = free[np.argsort(free % (rows // len(stay)), kind='stable')]
    where = np.append(where, NONE)[take]  # NONE is the last
    begun: list[Path] = [()] * rows
    for row, i in zip(free, new, strict=False):
      where[row], begun[row] = i, self.todo[i]
    self.width = max(self.width, self._needed(where))
    table, states = self.paths.table(begun, rows, self.width)
    live = where != NONE
    rows = _begin(
      self.sampler.model,
      self.paths.pool,
      (table, states),
      None if state is None else (state, take),
      self._chunk(where),
      live,
      self.stored[where] | ~live,
    )
    return rows, where

  def _needed(self, where: np.ndarray) -> int:
    """Columns that hold what the rows have read and drawn so far, padded."""
    chosen = where[where != NONE]
    return min(self.full, _roomy(int((self.lengths + self.out.lengths)[chosen].max())))

  def _read_ahead(self, new: np.ndarray) -> None:
    """Reads the paths of the next rows, and holds them until they are continued."""
    while self.ready < (new[-1] + 1 if len(new) else 0):
      block = self.todo[self.ready : self.ready + self.sampler.rows]
      rows_of = collections.Counter(block)
      self.paths.read(list(rows_of))
      for path, count in rows_of.items():
        self.paths.pin(path, count)
      self.ready += len(block)

  def _decode(self, rows: Continuation, where: np.ndarray) -> tuple[DecodeState, np.ndarray]:
    """Draws tokens until enough rows have stopped; the rows that go on."""
    live = where != NONE
    waiting = self.next < len(self.todo)
    size = len(where)
    # Where nothing waits, a much smaller batch is worth a new shape.
    smaller = size // SHRINK if size // SHRINK >= FEWEST_ROWS else 0
    leave = size - size // DEAD_SHARE if waiting else smaller
    count = live.sum() if waiting else evenly_full(live)
    rows = run(
      self.sampler.model,
      self.paths.params,
      rows,
      stop_ids=self.sampler.stop_ids,
      how=self.sampler.how,
      leave=min(leave, int(count) - 1),
      evenly=not waiting,
      mark_ids=self.marks,
    )
    self.computed += size * int(rows.steps)
    done = self.out.lengths[np.maximum(where, 0)]  # before these
    got = fetch({name: getattr(rows, name) for name in _DRAWN})
    self._hand_over(got, where)
    self._store(rows, got['marked'], where, done)
    on = got['live'] & live & (self.out.lengths[where] < self.sampler.max_new)
    ended = collections.Counter(self.todo[i] for i in where[live & ~on].tolist())
    for path, count in ended.items():
      self.paths.pin(path, -count)
    return rows.state, np.where(on, where, NONE)

  def _chunk(self, where: np.ndarray) -> np.ndarray:
    """The next uniforms of each row, [R, CHUNK]."""
    done = self.out.lengths[np.maximum(where, 0)]
    columns = np.minimum(done[:, None] + np.arange(CHUNK), self.sampler.max_new - 1)
    return self.uniforms[np.maximum(where, 0)[:, None], columns]

  def _hand_over(self, got: dict[str, np.ndarray], where: np.ndarray) -> None:
    """Appends what was drawn to the samples."""
    out, rows = self.out, np.flatnonzero(where != NONE)
    i = where[rows]
    done, drawn = out.lengths[i], got['lengths'][rows]
    count = np.minimum(drawn, self.sampler.max_new - done)  # the rest is beyond the limit
    r, t = np.nonzero(np.arange(CHUNK) < count[:, None])
    to, at = (i[r], done[r] + t), (rows[r], t)
    out.tokens[to], out.logprobs[to] = got['tokens'][at], got['logprobs'][at]
    out.lengths[i] = done + count
    out.stopped[i] = ~got['live'][rows] & (count == drawn)

  def _store(self, rows: Continuation, marked: np.ndarray, where: np.ndarray, done) -> None:
    """Puts the first steps that were completed into the pool, each distinct one once."""
    news: dict[Path, tuple[Path, int, int, int]] = {}
    ended = np.flatnonzero(marked & (where != NONE) & ~self.stored[where])
    index = where[ended]
    self.stored[index] = True
    drawn = self.out.tokens[index]
    ends = np.isin(drawn, self.marks) & (np.arange(drawn.shape[1]) < self.out.lengths[index, None])
    counts = np.where(ends.any(1), ends.argmax(1) + 1, 0)  # 0: its end lies beyond the limit
    # Token t of a row lies t columns after its first, which `done` tokens before lie left of W.
    first = self.width - done[ended]
    found = zip(*(x.tolist() for x in (ended, index, first, counts, drawn)), strict=True)
    for r, i, column, count, tokens in found:
      path = (*self.todo[i], tuple(tokens[:count]))
      if count and path not in news and path not in self.paths and self.keep(path):
        news[path] = (path, r, column, count)
    self.paths.store(rows.state, rows.mark, list(news.values()))


def _roomy(columns: int) -> int:
  """The least of NARROWEST times 1, 2, 3, 4, 6, 8, 12, ... that is not below: few are compiled."""
  power = NARROWEST << max(0, (columns - 1) // NARROWEST).bit_length()
  between = power // 4 * 3
  return between if columns <= between and between % NARROWEST == 0 else power


def _uniforms(seed: int, ids: np.ndarray, count: int) -> np.ndarray:
  """All random numbers of the rows, [n, count]; a power of two of rows, to compile seldom."""
  size = power_of_two(len(ids))
  names = np.pad(np.asarray(ids, np.uint32), ((0, size - len(ids)), (0, 0)))
  return np.asarray(_draw(np.uint32(seed), names, count))[: len(ids)]


@functools.partial(jax.jit, static_argnames='count')
def _draw(seed: jax.Array, ids: jax.Array, count: int) -> jax.Array:
  keys = fold(seed, ids)
  return jax.vmap(lambda key: jax.random.uniform(key, (count,)))(keys)


@functools.partial(jax.jit, static_argnames='model')
def _begin(model: Model, pool: KvPool, paths, on, uniforms, live, marked) -> Continuation:
  """A batch about to draw: rows behind `paths` (table, states), and those that go `on` if any.

  See `gather` and `refill`; `on` is (state, take).
  """
  if on is None:
    state = gather(model, pool, *paths, new=CHUNK)
  else:
    state = refill(model, pool, *on, *paths, new=CHUNK)
  by_row = functools.partial(constrain, names=('batch',))
  return Continuation(
    state=laid_out(state),
    uniforms=by_row(uniforms),
    tokens=by_row(jnp.zeros(uniforms.shape, jnp.int32)),
    logprobs=by_row(jnp.zeros(uniforms.shape, jnp.float32)),
    lengths=by_row(jnp.zeros(live.shape, jnp.int32)),
    live=by_row(live),
    steps=jnp.int32(0),
    marked=by_row(marked),
    mark=by_row(jnp.zeros_like(state.hidden)),
  )
