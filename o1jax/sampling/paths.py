"""Which slots of the pool hold which path: a path is read once, and evicted when it must be.

A path is a prompt and the steps after it. Each of its steps owns the slots of its own tokens, and
a path whose end is in the pool has all of its steps there: what is evicted is always a last step.
A path that is not there (evicted, or never stored) is read from where the pool leaves off.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from o1jax.models.transformer import Model, Params
from o1jax.parallel.ambient import ambient_ways
from o1jax.parallel.distributed import fetch
from o1jax.sampling.cache import DecodeState, extend
from o1jax.sampling.kv_pool import KvPool, empty_pool, gather, store, store_last
from o1jax.sampling.memory import alike
from o1jax.sampling.rows import NONE
from o1jax.sampling.sampler import FEWEST, PROMPT_MULTIPLE, length_batches, power_of_two, round_up

Path = tuple[Any, ...]  # (index of the prompt, *steps), a step being a tuple of token ids
SMALLEST = 64  # tokens copied at once are padded to this or a higher power of two
SHORTEST = 4  # likewise those of a step that is read; steps that are padded alike are read together
# Model, parameters, the `extra` of `Paths.read_steps`, state before [R, D], states [R, t, D],
# tokens [R, t], mask [R, t] -> a number for each row. A function of its module, within jit.
Measure = Callable[..., jax.Array]


@dataclasses.dataclass(slots=True)
class _Entry:
  """A step in the pool."""

  parent: _Entry | None  # the step before it, None of a prompt
  slots: np.ndarray  # [tokens] int32, its own
  chain: np.ndarray  # those of the whole path
  state: int  # row of the pool's `hidden`
  used: int  # when it was last asked for
  children: int = 0  # steps after it that are in the pool
  pins: int = 0  # rows that are being continued from here


class Paths:
  """The paths of some prompts under one model's parameters.

  Args:
    model: the decoder.
    params: its parameters.
    prompts: token ids, none empty.
    slots: tokens that the pool holds. See `memory` for what fits.
    states: steps that it holds, prompts included.
    rows: paths read at once.

  `computed` counts positions that went through the model, padding included; `read_again` the
  tokens among them that had been read or drawn before (they were evicted, or there was no room).
  """

  def __init__(
    self,
    model: Model,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    slots: int,
    states: int,
    rows: int,
  ):
    self.model, self.params, self.rows = model, params, rows
    self.prompts = [tuple(p) for p in prompts]
    self.slots = slots
    self.pool = empty_pool(model, alike(slots), alike(states))
    self.computed = self.read_again = self.evicted = 0
    self._entries: dict[Path, _Entry] = {}
    self._seen: set[Path] = set()
    self._free = np.arange(slots, dtype=np.int32)
    self._free_states = list(range(states))
    self._clock = 0

  def __contains__(self, path: Path) -> bool:
    return path in self._entries

  def tokens(self, path: Path) -> tuple[int, ...]:
    """The path's own tokens: of its last step, or of the prompt."""
    return path[-1] if len(path) > 1 else self.prompts[path[0]]

  def length(self, path: Path) -> int:
    """Tokens of the whole path, prompt included."""
    return len(self.prompts[path[0]]) + sum(map(len, path[1:]))

  def read(self, paths: Sequence[Path]) -> None:
    """Puts the paths into the pool, as far as they are not in it. See `pin`.

    Raises:
      ValueError: the pool cannot hold so many paths at once.
    """
    self._clock += 1
    for path in paths:
      self._touch(path)
    while missing := list(dict.fromkeys(filter(None, map(self._first_missing, paths)))):
      self.read_steps(missing)

  def read_steps(
    self,
    paths: Sequence[Path],
    measure: Measure | None = None,
    extra: Any = None,
    keep: Callable[[Path], bool] = lambda path: True,
  ) -> np.ndarray:
    """Reads the last steps of paths whose parents are in the pool.

    Args:
      paths: none of them in the pool.
      measure: something to know of every step.
      extra: parameters of its own.
      keep: which of them are put into the pool.

    Returns:
      What `measure` says, [paths] float32.

    Raises:
      ValueError: as `read`.
    """
    out, said = np.zeros(len(paths), np.float32), []
    widths = [self._width(p) for p in paths]
    for batch in length_batches([self.tokens(p) for p in paths], self.rows):
      for width, same in itertools.groupby(batch, key=widths.__getitem__):
        part = list(same)
        said.append((part, self._read_batch([paths[i] for i in part], width, measure, extra, keep)))
    for part, values in said if measure else ():  # behind them all: the device need not wait
      out[part] = fetch(values)[: len(part)]
    return out

  def _width(self, path: Path) -> int:
    """Columns that its last step is padded to where it is read."""
    tokens = len(self.tokens(path))
    return (
      round_up(tokens, PROMPT_MULTIPLE) if len(path) == 1 else max(SHORTEST, power_of_two(tokens))
    )

  def _read_batch(self, paths: list[Path], width: int, measure, extra, keep) -> jax.Array:
    steps = [self.tokens(p) for p in paths]
    rows = round_up(min(self.rows, max(FEWEST, power_of_two(len(paths)))), ambient_ways())
    tokens, mask = np.zeros((rows, width), np.int32), np.zeros((rows, width), bool)
    for r, step in enumerate(steps):
      tokens[r, : len(step)] = step
      mask[r, : len(step)] = True
    self.computed += tokens.size
    self.read_again += sum(len(s) for p, s in zip(paths, steps, strict=True) if p in self._seen)
    before = self.table([p[:-1] for p in paths], rows)
    slots = np.full((rows, width), alike(self.slots), np.int32)  # beyond the last: not stored
    ends = np.full(rows, len(self.pool.hidden), np.int32)
    kept = [r for r, p in enumerate(paths) if keep(p)]
    entries = self._add([paths[r] for r in kept], [len(steps[r]) for r in kept])
    if len(entries) < len(kept):
      for r in kept[: len(entries)]:
        self._evict(paths[r])
      raise ValueError(
        f'a pool of {self.slots} tokens cannot hold the {len(paths)} paths that are continued at '
        f'once; raise pool_tokens or lower rows'
      )
    for r, entry in zip(kept, entries, strict=True):
      slots[r, : len(entry.slots)] = entry.slots
      ends[r] = entry.state
    places = (slots, ends)
    self.pool, said = _read(
      self.model, self.params, extra, self.pool, before, tokens, mask, places, measure=measure
    )
    return said

  def store(
    self, state: DecodeState, hidden: jax.Array, news: Sequence[tuple[Path, int, int, int]]
  ) -> int:
    """Puts last steps of paths into the pool, as far as there is room.

    Args:
      state: which has read them.
      hidden: [R, D], for each row the state after the step.
      news: of each: the path, whose parent is in the pool; its row; its first column; its tokens.

    Returns:
      How many are in the pool now.
    """
    if not news:
      return 0
    paths, ends, first, counts = zip(*news, strict=True)
    entries = self._add(paths, counts)
    if entries:
      fit = len(entries)
      slots = np.concatenate([entry.slots for entry in entries])
      counts = np.array(counts[:fit])
      # Token k of all belongs to a step that began `k - within` tokens before.
      within = np.arange(len(slots)) - np.repeat(np.cumsum(counts) - counts, counts)
      rows, columns = np.repeat(ends[:fit], counts), np.repeat(first[:fit], counts) + within
      tokens = ((rows, 0), (columns, 0), (slots, alike(self.slots)))
      states = [entry.state for entry in entries]
      self.pool = store(
        self.pool,
        state,
        tuple(_padded(values, fill) for values, fill in tokens),
        hidden,
        (_padded(states, len(self.pool.hidden)), _padded(ends[:fit], 0)),
      )
    return len(entries)

  def table(
    self, paths: Sequence[Path], rows: int, width: int = 0
  ) -> tuple[np.ndarray, np.ndarray]:
    """Slots [rows, W] and states [rows] of paths in the pool, for `gather`.

    An empty path, and a row beyond the last path, is a row of NONE. W is `width`, or the
    longest path's length rounded up.
    """
    entries = [(r, self._entries[path]) for r, path in enumerate(paths) if path]
    longest = max((len(entry.chain) for _, entry in entries), default=0)
    width = width or round_up(longest, PROMPT_MULTIPLE)
    table, states = np.full((rows, width), NONE, np.int32), np.zeros(rows, np.int32)
    for r, entry in entries:
      table[r, width - len(entry.chain) :] = entry.chain
      states[r] = entry.state
    return table, states

  def hidden(self, paths: Sequence[Path], rows: int) -> jax.Array:
    """States after paths in the pool, [rows, D]; those beyond the last path are arbitrary."""
    states = [self._entries[p].state for p in paths]
    return self.pool.hidden[np.pad(states, (0, rows - len(paths)))]

  def pin(self, path: Path, count: int) -> None:
    """Keeps a path from eviction until it has been unpinned (a negative `count`) as often."""
    self._entries[path].pins += count

  def retire(self, path: Path) -> None:
    """Evicts a path before all others: it will not be asked for again."""
    if path in self._entries:
      self._entries[path].used = -1

  def _touch(self, path: Path) -> None:
    found = (self._entries.get(path[:n]) for n in range(len(path), 0, -1))
    entry = next(filter(None, found), None)
    while entry is not None:  # what is in the pool has all that is before it there
      entry.used, entry = self._clock, entry.parent

  def _first_missing(self, path: Path) -> Path | None:
    if path in self._entries:
      return None
    return next(p for p in _prefixes(path) if p not in self._entries)

  def _add(self, paths: Sequence[Path], counts: Sequence[int]) -> list[_Entry]:
    """Slots and states for last steps of so many tokens, for the first that there is room for."""
    self._seen.update(paths)
    self._make_room(sum(counts), len(paths))
    ends = np.cumsum(counts)
    fit = min(int(np.searchsorted(ends, len(self._free), side='right')), len(self._free_states))
    if not fit:
      return []
    self._free, taken = np.split(self._free, [len(self._free) - ends[fit - 1]])
    found, start = [], 0
    for path, end in zip(paths[:fit], ends.tolist(), strict=False):
      slots, start = taken[start:end], end
      parent = self._entries[path[:-1]] if len(path) > 1 else None
      chain = slots
      if parent is not None:
        parent.children += 1
        chain = np.concatenate((parent.chain, slots))
      entry = _Entry(parent, slots, chain, self._free_states.pop(), self._clock)
      self._entries[path] = entry
      found.append(entry)
    return found

  def _make_room(self, tokens: int, states: int) -> None:
    """Evicts what has not been used for longest until as much is free, if it can be."""
    free = lambda: len(self._free) >= tokens and len(self._free_states) >= states  # noqa: E731
    if free():
      return
    idle = [
      (entry.used, path)
      for path, entry in self._entries.items()
      if not entry.children and not entry.pins and entry.used < self._clock
    ]
    for _, path in sorted(idle, key=lambda item: item[0]):
      self._evict(path)
      if free():
        return
    if idle:  # their parents are idle now, perhaps
      self._make_room(tokens, states)

  def _evict(self, path: Path) -> None:
    entry = self._entries.pop(path)
    self._free = np.concatenate([self._free, entry.slots])
    self._free_states.append(entry.state)
    self.evicted += 1
    if entry.parent is not None:
      entry.parent.children -= 1


@functools.partial(jax.jit, static_argnames=('model', 'measure'), donate_argnames='pool')
def _read(
  model: Model, params: Params, extra, pool: KvPool, paths, tokens, mask, places, *, measure
) -> tuple[KvPool, jax.Array]:
  """Reads steps [R, t] behind `paths` (table, states) and stores them at `places` (slots, ends).

  Returns the pool, which is donated, and what `measure` says.
  """
  before = gather(model, pool, *paths, new=tokens.shape[1])
  hidden, state = extend(model, params, before, tokens, mask)
  said = measure and measure(model, params, extra, before.hidden, hidden, tokens, mask)
  return store_last(pool, state, *places), said


def _prefixes(path: Path) -> Iterator[Path]:
  """The path's beginnings, the prompt first and itself last."""
  return (path[:n] for n in range(1, len(path) + 1))


def _padded(values: Sequence[int] | np.ndarray, fill: int) -> np.ndarray:
  """Indices, padded to a power of two of at least SMALLEST."""
  padded = np.full(max(SMALLEST, power_of_two(len(values))), fill, np.int32)
  padded[: len(values)] = values
  return padded
