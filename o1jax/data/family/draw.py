"""Specs and inputs drawn at random, with an eye on what tests could tell apart."""

from __future__ import annotations

import itertools
import operator
import random
from collections.abc import Callable, Sequence

from o1jax.data.family import spec as specs
from o1jax.data.family.ops import ANY, INT, LEXICON, OPS, READOUTS, STR
from o1jax.data.family.phrases import CONTEXT_PHRASES, OP_PHRASES, READOUT_PHRASES
from o1jax.data.family.spec import RAISES, Clause, Spec
from o1jax.data.family.splits import split_of

KILLS = 2  # outputs, at least, that leaving out or confusing any one operation changes
_PROBES, _STANDING = 9, 6  # inputs that a growing spec is tried on; those that must survive
_TRIES = 8  # clauses tried in one place
_COUNTS, _CUMULATIVE = (2, 3, 4, 5), (0.30, 0.60, 0.85, 1.0)  # operations of a problem
_WORDS_SHARE = 0.35  # problems on words
_TURN_SHARE = 0.4  # of those, the ones that go on with numbers
_CONTEXT_SHARE = 0.12  # of the clauses after the first
_DRILL_TURN_SHARE = 0.3
_TURNS = ('length', 'vowels')
_DIGITS = tuple(range(10))

# Operations and read-outs that strong tests reject often are drawn more often.
_WEIGHTS = {
  **dict.fromkeys(['lt', 'gt', 'shorter'], 5.0),
  **dict.fromkeys(['le', 'ge', 'longer'], 4.0),
  **dict.fromkeys(['even', 'odd', 'upper_first', 'sort_len'], 2.0),
  **dict.fromkeys(['vowel', 'consonant', 'alpha', 'alpha_desc', 'upper'], 3.0),
  **dict.fromkeys(['square', 'sort_asc', 'sort_desc', 'dup', 'diffs', 'once'], 1.5),
  **dict.fromkeys(['rotl', 'rotr'], 0.8),
  **dict.fromkeys(['list', 'join'], 0.7),
  **dict.fromkeys(['first', 'last'], 1.5),
  **dict.fromkeys(['max', 'letters'], 5.0),
  **dict.fromkeys(['min', 'count', 'words'], 8.0),
}


def _table(entries: dict, item: str) -> tuple[tuple[str, ...], tuple[float, ...]]:
  """The names that can read `item`, with their weights."""
  names = tuple(n for n, e in entries.items() if e.takes in (ANY, item) and n not in _TURNS)
  return names, tuple(_WEIGHTS.get(n, 1.0) for n in names)


_OPS_ON = {item: _table(OPS, item) for item in (INT, STR)}
_READOUTS_ON = {item: _table(READOUTS, item) for item in (INT, STR)}


def _context(rng: random.Random, before: Clause) -> Clause | None:
  """A clause that refers to `before`, or None where the drawn kind cannot follow it."""
  context = rng.choice(tuple(CONTEXT_PHRASES))
  op = OPS[before.op]
  if not op.repeatable:
    return None
  new_k = None
  if context == 'same':
    if len(op.params) < 2:
      return None
    new_k = rng.choice([k for k in op.params if k != before.k])
  if context == 'more' and before.k not in op.params[:-1]:
    return None
  if context == 'opposite' and not op.opposite:
    return None
  name, k = specs.resolve(context, before.op, before.k, new_k)
  return Clause(name, k, rng.randrange(len(CONTEXT_PHRASES[context])), context)


def _clause(rng: random.Random, name: str) -> Clause:
  params = OPS[name].params
  phrase = rng.randrange(len(OP_PHRASES[name]))
  return Clause(name, rng.choice(params) if params else None, phrase)


def draw_count(rng: random.Random) -> int:
  """How many operations a problem has: 2 to 5, by weight."""
  u = rng.random()
  return next(n for n, c in zip(_COUNTS, _CUMULATIVE, strict=True) if u < c)


def _pick(rng: random.Random, names: Sequence[str], weights: Sequence[float]) -> str:
  return rng.choices(names, weights)[0]


def _apply(fn: Callable, track: list[list | None], k: int | None) -> list[list | None]:
  """The lists after `fn`; None where the program raises now or has raised before."""
  try:
    return [fn(values, k) for values in track]
  except RAISES:  # rare: find out which
    return [_attempt(fn, values, k) for values in track]


def _attempt(fn: Callable, values: list | None, k: int | None) -> list | None:
  try:
    return None if values is None else fn(values, k)
  except RAISES:
    return None


def _advance(clause: Clause, tracks: list[list]) -> list[list] | None:
  """The tracks after the clause, or None where some clause would not be worth its place.

  `tracks[0]` has the lists of a few probing inputs; every further track has the lists that the
  same inputs give when one operation so far is left out or confused. A clause is refused where
  it ends too many probes or makes a track equal to the true one: without this look ahead nine
  in ten specs would be thrown away when their tests are drawn.
  """
  final = clause.op in READOUTS
  op, k = (READOUTS if final else OPS)[clause.op], clause.k
  before, truth = tracks[0], [op.fn(values, k) for values in tracks[0]]
  if final:
    if len(set(map(str, truth))) < op.distinct - 2:
      return None
    keep = [i for i, values in enumerate(before) if specs.answerable(op, values)]
  else:
    keep = [i for i, values in enumerate(truth) if specs.in_range(values)]
  if len(keep) < _STANDING:
    return None
  truth = [truth[i] for i in keep]
  confusion = (READOUTS if final else OPS)[op.confusion].fn
  grown = [truth]
  new = [[confusion(before[i], k) for i in keep]]
  if not final:
    new.append([before[i] for i in keep])
  old = (_apply(op.fn, [track[i] for i in keep], k) for track in tracks[1:])
  for track in itertools.chain(new, old):
    if sum(map(operator.ne, track, truth)) <= KILLS:
      return None
    grown.append(track)
  return grown


def _leads_to(split: str, clauses: list[Clause], last: Clause, now: str) -> bool:
  """True where some read-out after the clauses gives a composition of the split."""
  names = tuple(c.op for c in (*clauses, last))
  readouts = _READOUTS_ON[INT if last.op in _TURNS else now][0]
  return any(split_of((*names, readout)) == split for readout in readouts)


def _grow(rng: random.Random, count: int, kind: str, split: str):
  """`count` clauses, the tracks behind them and their item type; None at a dead end."""
  turn = rng.randrange(count) if kind == 'words' and rng.random() < _TURN_SHARE else -1
  now = STR if kind == 'words' else INT
  tracks = [[draw_input(rng, kind) for _ in range(_PROBES)]]
  clauses: list[Clause] = []
  for i in range(count):
    for _ in range(_TRIES if split == 'train' else 3 * _TRIES):
      if i == turn:
        clause = _clause(rng, rng.choice(_TURNS))
      elif not clauses or rng.random() >= _CONTEXT_SHARE:
        clause = _clause(rng, _pick(rng, *_OPS_ON[now]))
      else:
        clause = _context(rng, clauses[-1])
      if clause is None or (i + 1 == count and not _leads_to(split, clauses, clause, now)):
        continue
      after = _advance(clause, tracks)
      if after is not None:
        break
    else:
      return None
    clauses.append(clause)
    tracks = after
    now = INT if i == turn else now
  return clauses, tracks, now


def draw_spec(rng: random.Random, count: int, kind: str, split: str) -> Spec:
  """A random spec of `count` operations on `kind` in a split; strong tests are likely, not sure.

  Among the read-outs, those that put the composition into the split are eligible.
  """
  while True:
    grown = _grow(rng, count, kind, split)
    if grown is None:
      continue
    clauses, tracks, now = grown
    names, weights = _READOUTS_ON[now]
    done = tuple(c.op for c in clauses)
    fitting = [split_of((*done, n)) == split and w for n, w in zip(names, weights, strict=True)]
    while any(fitting):
      readout = _pick(rng, names, fitting)
      last = _last(rng, readout)
      if _advance(last, tracks):
        return Spec(rng.choice(specs.FORMS), kind, (*clauses, last))
      fitting[names.index(readout)] = 0.0  # it would fail again


def draw_short(rng: random.Random, kind: str) -> Spec:
  """A random spec of one or two operations, no matter whether tests could tell them apart."""
  now = STR if kind == 'words' else INT
  clauses = []
  for _ in range(rng.randint(1, 2)):
    name = _pick(rng, *_OPS_ON[now])
    if now == STR and rng.random() < _DRILL_TURN_SHARE:
      name, now = rng.choice(_TURNS), INT
    clauses.append(_clause(rng, name))
  last = _last(rng, _pick(rng, *_READOUTS_ON[now]))
  return Spec(rng.choice(specs.FORMS), kind, (*clauses, last))


def _last(rng: random.Random, readout: str) -> Clause:
  return Clause(readout, None, rng.randrange(len(READOUT_PHRASES[readout])))


def draw_kind(rng: random.Random) -> str:
  """Words or ints, by their shares of the problems."""
  return 'words' if rng.random() < _WORDS_SHARE else 'ints'


def draw_input(rng: random.Random, kind: str) -> list:
  """Four to six digits, or four to six words of the lexicon; repeats occur."""
  items, draw = (_DIGITS if kind == 'ints' else LEXICON), rng.random
  return [items[int(draw() * len(items))] for _ in range(4 + int(draw() * 3))]
