"""Generation for ragged prompts from the host: a few compiled shapes, the caller's order.

Prompts are sorted by length and padded to fixed shapes. A batch whose rows
have mostly stopped is compacted: the live rows move to a smaller batch, so
that stragglers do not pay for the rest. Which batch a row stands in does not
change what it draws, up to the rounding of sums. Over a mesh a row stays on the
devices that have read its prompt (`rows`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from o1jax.models.transformer import Model, Params
from o1jax.parallel.ambient import ambient_ways, constrain
from o1jax.parallel.distributed import fetch
from o1jax.sampling.cache import DecodeState, gather_rows, prefill
from o1jax.sampling.decode import Continuation, begin, run
from o1jax.sampling.draw import SAMPLE, Drawing
from o1jax.sampling.keys import row_keys
from o1jax.sampling.rows import NONE, evenly_full, parts_of, side_by_side, take_rows

PROMPT_MULTIPLE = 32  # prompt columns are padded to this: a compiled prefill each
FEWEST = 8  # prompts are padded to this number or a higher power of two
COLUMN_MULTIPLE = 64  # cache columns are padded to this: a compiled loop each
SHRINK = 4  # a batch is compacted when at most one row in SHRINK is live ...
_DRAWN = ('tokens', 'logprobs', 'lengths')  # what a continuation hands to its `Samples`
SMALLEST = 32  # ... and the smaller one has at least this many rows: fewer gain nothing


@dataclasses.dataclass(frozen=True)
class Samples:
  """What n rows generated, in the caller's order (prompt-major, then sample)."""

  tokens: np.ndarray  # [n, N] int32, 0 after the end
  logprobs: np.ndarray  # [n, N] float32, untruncated at temperature 1, 0 after the end
  lengths: np.ndarray  # [n] int32, the stop token included
  stopped: np.ndarray  # [n] bool, ended by a stop token, not by the limit N
  generated: int  # tokens drawn: the sum of `lengths`
  computed: int  # tokens that went through the model: prompts, padding and dead rows too

  def ids(self, row: int) -> list[int]:
    """The generated tokens of one row, the stop token included."""
    return self.tokens[row, : self.lengths[row]].tolist()


@dataclasses.dataclass(frozen=True)
class Sampler:
  """Samples continuations with one model under fixed limits.

  `rows` is the batch size, `max_new` the most tokens generated a row,
  `stop_ids` the tokens that end one.
  """

  model: Model
  max_new: int
  stop_ids: tuple[int, ...]
  how: Drawing = SAMPLE
  rows: int = 512

  def __call__(
    self,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    seed: int = 0,
    ids: np.ndarray | None = None,
    samples: int = 1,
  ) -> Samples:
    """Continues every prompt `samples` times; a prompt is read once for all of them.

    Where prompts are so few that parts of the mesh would be idle, each is read in several parts.

    Args:
      params: the model's parameters.
      prompts: token ids, none empty.
      seed: with `ids` and the sample's number it decides what a row draws.
      ids: [prompts] or [prompts, P] non-negative ints that name each prompt's
        draws; None for 0, 1, 2, ... Equal ids draw equal numbers.
      samples: continuations of each prompt.

    Raises:
      ValueError: an empty prompt.
    """
    ids = named(prompts, ids)
    ways = ambient_ways()
    own = round_up(self.rows, ways) // ways
    each = _divisor(samples, own)  # begin together where a prompt has been read
    copies = _divisor(samples // each, max(1, ways // max(1, len(prompts))))
    share = samples // copies
    todo = np.repeat(np.arange(len(prompts)), copies)
    largest = own // each * ways
    parts = []  # (index of the result, samples)
    computed = 0
    for batch in length_batches([prompts[i] for i in todo], largest):
      tokens, lengths = pad_prompts([prompts[i] for i in todo[batch]], largest)
      columns = round_up(tokens.shape[1] + self.max_new, COLUMN_MULTIPLE)
      state = prefill(self.model, params, tokens, lengths, columns=columns)
      computed += tokens.size
      slots = np.repeat(np.arange(len(batch)), each)
      source, copy = todo[batch][slots], np.asarray(batch)[slots] % copies
      for first in range(0, share, each):
        number = copy * share + first + np.tile(np.arange(each), len(batch))
        names = np.column_stack([ids[source], number])
        parts.append((source * samples + number, self.resume(params, state, slots, seed, names)))
    return _join(parts, len(prompts) * samples, self.max_new, computed)

  def resume(
    self, params: Params, state: DecodeState, slots: np.ndarray, seed: int, ids: np.ndarray
  ) -> Samples:
    """Continues rows of a state, which stays as it is.

    Args:
      params: the model's parameters.
      state: with `max_new` columns left.
      slots: [n] rows of the state, n <= `rows`; a row may stand there several times. Over a mesh
        no part of the state has more than its share of `rows` there.
      seed: with `ids` it decides every draw.
      ids: [n, P] non-negative ints that name each continuation's draws.

    Raises:
      ValueError: the state has no room for `max_new` more columns, or the model no positions.
    """
    if (room := state.columns - int(state.column)) < self.max_new:
      raise ValueError(f'max_new={self.max_new} but the state has room for {room}; grow it first')
    longest, limit = int(fetch(state.position)[slots].max()), self.model.config.max_position
    if longest + self.max_new > limit:
      raise ValueError(
        f'{longest} tokens and max_new={self.max_new} exceed max_position={limit} of the model; '
        f'use max_new of at most {limit - longest}'
      )
    out = empty_samples(len(slots), self.max_new)
    parts = parts_of(slots, state.rows)
    where = side_by_side(parts, self._size(len(parts) * max(map(len, parts))))
    live, row = where != NONE, np.maximum(where, 0)
    keys = row_keys(seed, np.where(live[:, None], ids[row], 0))
    rows = gather_rows(state, np.where(live, slots[row], 0))
    rows = begin(rows, keys, live, max_new=self.max_new)
    computed = self._drain(params, rows, where, out)
    return dataclasses.replace(out, generated=int(out.lengths.sum()), computed=computed)

  def _size(self, live: int) -> int:
    """The least of `rows`, `rows / SHRINK`, ... that holds so many and divides over the mesh."""
    size = round_up(self.rows, ambient_ways())
    while _smaller(size) >= max(live, 1):
      size = _smaller(size)
    return size

  def _drain(self, params, rows: Continuation, where: np.ndarray, out: Samples) -> int:
    """Runs rows to their end, compacting; row r goes to `out` row where[r], unless it is NONE."""
    computed = done = 0
    while True:
      size = len(where)
      until = {'leave': _smaller(size), 'evenly': True}
      rows = run(self.model, params, rows, stop_ids=self.stop_ids, how=self.how, **until)
      got = fetch({name: getattr(rows, name) for name in ('live', *_DRAWN)})
      live, steps = got['live'], int(rows.steps)
      computed += size * (steps - done)
      done = steps
      real = where != NONE
      for field in _DRAWN:
        getattr(out, field)[where[real]] = got[field][real]
      out.stopped[where[real]] = ~live[real]
      if steps == self.max_new or not live.any():
        return computed
      rows, where = compact(rows, where, self._size(int(evenly_full(live))))


def _divisor(count: int, most: int) -> int:
  """The largest divisor of `count` that is not above `most`."""
  return max(k for k in range(1, most + 1) if count % k == 0)


def _smaller(size: int) -> int:
  """The next smaller size of a batch; 0 if it gains nothing or does not divide over the mesh."""
  smaller = size // SHRINK
  return smaller if smaller >= SMALLEST and smaller % ambient_ways() == 0 else 0


def empty_samples(count: int, max_new: int) -> Samples:
  """`count` rows that have generated nothing yet."""
  return Samples(
    tokens=np.zeros((count, max_new), np.int32),
    logprobs=np.zeros((count, max_new), np.float32),
    lengths=np.zeros(count, np.int32),
    stopped=np.zeros(count, bool),
    generated=0,
    computed=0,
  )


def _join(parts: list[tuple[np.ndarray, Samples]], count: int, max_new: int, computed: int):
  """One `Samples` of batches; `computed` are the tokens of their prompts."""
  out = empty_samples(count, max_new)
  for where, part in parts:
    for field in ('tokens', 'logprobs', 'lengths', 'stopped'):
      getattr(out, field)[where] = getattr(part, field)
  return dataclasses.replace(
    out,
    generated=sum(part.generated for _, part in parts),
    computed=computed + sum(part.computed for _, part in parts),
  )


def compact(rows: Continuation, where: np.ndarray, size: int) -> tuple[Continuation, np.ndarray]:
  """The live rows in a batch of `size` rows, and where they go; the rest is dead padding."""
  live = fetch(rows.live)
  index = np.flatnonzero(live)
  place = side_by_side(parts_of(index, len(live)), size)
  alive = place != NONE
  index = np.where(alive, index[np.maximum(place, 0)], 0)
  return _gather(rows, index, alive), np.where(alive, where[index], NONE)


@jax.jit
def _gather(rows: Continuation, index: jax.Array, alive: jax.Array) -> Continuation:
  taken = (rows.uniforms, rows.tokens, rows.logprobs, rows.lengths, rows.marked, rows.mark)
  (*fields, marked, mark), alive = constrain((take_rows(taken, index), alive), ('batch',))
  state = gather_rows(rows.state, index)
  return Continuation(state, *fields, live=alive, steps=rows.steps, marked=marked, mark=mark)


def named(prompts: Sequence[Sequence[int]], ids: np.ndarray | None) -> np.ndarray:
  """The ids that name each prompt's draws, [prompts, P]; None stands for 0, 1, 2, ...

  Raises:
    ValueError: an empty prompt, or ids that do not name every prompt.
  """
  ids = np.arange(len(prompts)) if ids is None else np.asarray(ids)
  if empty := [i for i, p in enumerate(prompts) if not len(p)]:
    raise ValueError(f'prompt {empty[0]} is empty; begin it with a bos token at least')
  if len(ids) != len(prompts):
    raise ValueError(f'{len(ids)} ids for {len(prompts)} prompts; give one (or one row) each')
  return ids.reshape(len(prompts), -1)


def length_batches(prompts: Sequence[Sequence[int]], size: int) -> Iterator[list[int]]:
  """Indices of the prompts in batches of at most `size`, of similar length."""
  order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
  for first in range(0, len(order), size):
    yield order[first : first + size]


def pad_prompts(prompts: Sequence[Sequence[int]], largest: int) -> tuple[np.ndarray, np.ndarray]:
  """Prompts padded to a fixed shape: (tokens [P, T] int32, lengths [P] int32).

  P is a power of two from FEWEST on, or `largest` if that is less, rounded up to what divides over
  the ambient mesh; T a multiple of PROMPT_MULTIPLE. Padding rows are prompts of one token 0.
  """
  count = min(largest, max(FEWEST, power_of_two(len(prompts))))
  count = round_up(count, ambient_ways())
  width = round_up(max(map(len, prompts)), PROMPT_MULTIPLE)
  tokens = np.zeros((count, width), np.int32)
  lengths = np.ones(count, np.int32)
  for row, prompt in enumerate(prompts):
    tokens[row, : len(prompt)] = prompt
    lengths[row] = len(prompt)
  return tokens, lengths


def power_of_two(count: int) -> int:
  """The least power of two that is not below `count`."""
  return 1 << max(0, count - 1).bit_length()


def round_up(value: int, multiple: int) -> int:
  """The least multiple of `multiple` that is not below `value`."""
  return -(-value // multiple) * multiple
