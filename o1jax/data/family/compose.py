"""Problems drawn from the family: composition, split, inputs, and the proof that tests are strong.

Everything is a function of the seed. A problem's tests depend on its spec alone, so
`problem_of(spec_of(problem.id)) == problem`.
"""

from __future__ import annotations

import bisect
import collections
import functools
import hashlib
import itertools
import random

from o1jax.data.family import spec as specs
from o1jax.data.family.ops import (
  ANY,
  CONFUSION_GROUP,
  INT,
  LEXICON,
  OPS,
  READOUTS,
  STR,
)
from o1jax.data.family.phrases import CONTEXT_PHRASES, OP_PHRASES, READOUT_PHRASES
from o1jax.data.family.spec import Clause, Spec
from o1jax.types import Problem, TestCase

SPLITS = ('train', 'dev', 'test')
TESTS = 10  # a problem
KILLS = 2  # outputs, at least, that leaving out or confusing any one operation changes
_DRAWS = 24  # inputs tried for a problem's tests
_PROBES, _STANDING = 10, 7  # inputs that a growing spec is tried on; those that must survive
_TRIES = 8  # clauses tried in one place
_COUNTS, _COUNT_WEIGHTS = (2, 3, 4, 5), (0.30, 0.60, 0.85, 1.0)  # operations, cumulative
_WORDS_SHARE = 0.35  # problems on words
_TURN_SHARE = 0.4  # of those, the ones that go on with numbers
_CONTEXT_SHARE = 0.12  # of the clauses after the first
_TURNS = ('length', 'vowels')
_DIGITS = tuple(range(10))

# Operations and read-outs that strong tests reject often are drawn more often.
_WEIGHTS = dict.fromkeys(['le', 'lt', 'ge', 'gt', 'longer', 'shorter'], 3.0)
_WEIGHTS |= dict.fromkeys(['square', 'mod', 'sort_asc', 'sort_desc', 'dup', 'even', 'odd'], 2.0)
_WEIGHTS |= dict.fromkeys(['upper_first', 'vowel', 'consonant', 'sort_len', 'alpha', 'alpha_desc'], 2.0)
_WEIGHTS |= {'count': 4.0, 'words': 4.0, 'max': 4.0, 'min': 4.0, 'letters': 3.0, 'first': 1.5}
_WEIGHTS |= {'list': 0.6, 'join': 0.6}


def _table(entries: dict, item: str) -> tuple[tuple[str, ...], tuple[float, ...]]:
  """The names that can read `item`, with their cumulative weights."""
  names = tuple(n for n, e in entries.items() if e.takes in (ANY, item) and n not in _TURNS)
  return names, tuple(itertools.accumulate(_WEIGHTS.get(n, 1.0) for n in names))


_OPS_ON = {item: _table(OPS, item) for item in (INT, STR)}
_READOUTS_ON = {item: _table(READOUTS, item) for item in (INT, STR)}


@functools.lru_cache(maxsize=1 << 16)
def split_of(names: tuple[str, ...]) -> str:
  """The split that a composition belongs to: train 80 %, dev 10 %, test 10 %.

  The hash is taken after replacing each name by its group of mutual confusions, so that what a
  misread train problem becomes is a train composition too, never one of dev or test.
  """
  text = ' '.join(CONFUSION_GROUP[name] for name in names)
  bucket = hashlib.blake2b(text.encode(), digest_size=4).digest()[0] % 10
  return SPLITS[max(0, bucket - 7)]


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
  return next(n for n, c in zip(_COUNTS, _COUNT_WEIGHTS, strict=True) if u < c)


def _pick(rng: random.Random, table: tuple[tuple[str, ...], tuple[float, ...]]) -> str:
  names, cumulative = table
  return names[bisect.bisect(cumulative, rng.random() * cumulative[-1])]


def _advance(clause: Clause, probes: list[list]) -> list[list] | None:
  """The probes after the clause, or None where it is not worth its place.

  It is worth it where it and its confusion do something different to enough probes, and enough
  of the probes still stand. Without this look ahead four fifths of the specs would be thrown
  away when their tests are drawn.
  """
  op, k = OPS[clause.op], clause.k
  other = OPS[op.confusion].fn
  after = [op.fn(probe, k) for probe in probes]
  moved = sum(x != y for x, y in zip(probes, after, strict=True))
  twisted = sum(x != other(y, k) for x, y in zip(after, probes, strict=True))
  standing = [values for values in after if specs.in_range(values)]
  if min(moved, twisted) <= KILLS or len(standing) < _STANDING:
    return None
  return standing


def _grow(rng: random.Random, count: int, kind: str) -> tuple[list[Clause], str] | None:
  """`count` clauses and the item type they leave, or None where the draws ran into a wall."""
  turn = rng.randrange(count) if kind == 'words' and rng.random() < _TURN_SHARE else -1
  now = STR if kind == 'words' else INT
  probes = [draw_input(rng, kind) for _ in range(_PROBES)]
  clauses: list[Clause] = []
  for i in range(count):
    for _ in range(_TRIES):
      if i == turn:
        clause = _clause(rng, rng.choice(_TURNS))
      elif not clauses or rng.random() >= _CONTEXT_SHARE:
        clause = _clause(rng, _pick(rng, _OPS_ON[now]))
      else:
        clause = _context(rng, clauses[-1])
      after = clause and _advance(clause, probes)
      if after:
        break
    else:
      return None
    clauses.append(clause)
    probes = after
    now = INT if i == turn else now
  return clauses, now


def draw_spec(rng: random.Random, count: int, kind: str, split: str) -> Spec:
  """A random spec of `count` operations on `kind` in a split; whether it has strong tests is open.

  The read-out is drawn among those that put the composition into the split.
  """
  while True:
    grown = _grow(rng, count, kind)
    if grown is None:
      continue
    clauses, now = grown
    names = tuple(c.op for c in clauses)
    fitting = {n for n in _READOUTS_ON[now][0] if split_of((*names, n)) == split}
    if not fitting:
      continue
    while (readout := _pick(rng, _READOUTS_ON[now])) not in fitting:
      pass
    clauses.append(Clause(readout, None, rng.randrange(len(READOUT_PHRASES[readout]))))
    return Spec(rng.choice(specs.FORMS), kind, tuple(clauses))


def draw_kind(rng: random.Random) -> str:
  """Words or ints, by their shares of the problems."""
  return 'words' if rng.random() < _WORDS_SHARE else 'ints'


def draw_input(rng: random.Random, kind: str) -> list:
  """Four to six digits, or four to six words of the lexicon; repeats occur."""
  items, draw = (_DIGITS if kind == 'ints' else LEXICON), rng.random
  return [items[int(draw() * len(items))] for _ in range(4 + int(draw() * 3))]


def confused(clause: Clause) -> Clause:
  """The clause with its confusion in the place of its operation."""
  op = OPS.get(clause.op) or READOUTS[clause.op]
  return clause._replace(op=op.confusion)


def _differs(chain: list, values: list, answer) -> bool:
  try:
    for fn, k in chain:
      values = fn(values, k)
  except (TypeError, IndexError, ValueError, AttributeError):
    return True  # a program that raises has failed the test
  return values != answer


def _strong(spec: Spec, runs: list) -> bool:
  """True where every omission and every confusion changes `KILLS` of the outputs or more."""
  chain = specs.chain_of(spec.clauses)
  twisted = specs.chain_of([confused(c) for c in spec.clauses])
  last = len(chain) - 1
  for i in range(len(chain)):
    rest = chain[i + 1 :]
    for mutant in ([twisted[i], *rest], rest)[: 1 + (i < last)]:
      changed = (_differs(mutant, states[i], answer) for states, answer in runs)
      if len(list(itertools.islice(filter(None, changed), KILLS))) < KILLS:
        return False
  return True


def draw_runs(spec: Spec) -> list | None:
  """`TESTS` strong (states, answer) pairs of the spec with distinct inputs, or None."""
  rng = random.Random(specs.problem_id(spec))
  readout = READOUTS[spec.clauses[-1].op]
  chain = specs.chain_of(spec.clauses)
  runs, inputs, answers = [], set(), collections.Counter()
  for draws in range(_DRAWS):
    if len(runs) + _DRAWS - draws < TESTS or (draws == _DRAWS // 3 and len(answers) < 3):
      return None
    values = draw_input(rng, spec.kind)
    result = specs.run(chain, readout, values)
    if result is None or tuple(values) in inputs:
      continue
    answer = str(result[1])
    if answers[answer] > TESTS - readout.distinct:
      continue
    answers[answer] += 1
    inputs.add(tuple(values))
    runs.append(result)
    if len(runs) == TESTS:
      return runs if len(answers) >= readout.distinct and _strong(spec, runs) else None
  return None


def problem_of(spec: Spec) -> Problem:
  """The problem of a spec, with its tests and reference program.

  Raises:
    ValueError: no strong tests were found for the spec.
  """
  problem = _build(spec)
  if problem is None:
    raise ValueError(f'{specs.problem_id(spec)} has no strong tests; use specs made by problems()')
  return problem


def _build(spec: Spec) -> Problem | None:
  runs = draw_runs(spec)
  if runs is None:
    return None
  tests = tuple(
    TestCase(specs.encode_input(spec, states[0]), specs.encode_output(spec, answer))
    for states, answer in runs
  )
  return Problem(
    id=specs.problem_id(spec),
    statement=specs.statement(spec),
    tests=tests,
    entry_point='solve' if spec.form == 'function' else None,
    solutions=(specs.program(spec),),
    source='family',
  )


def problems(split: str, count: int, seed: int = 0) -> list[Problem]:
  """`count` problems of a split with distinct statements.

  Deterministic, and a prefix of what a larger count gives.

  Args:
    split: train, dev or test; no composition occurs in two of them.
    count: how many.
    seed: which of the many lists of that split.

  Raises:
    ValueError: no such split, or a negative count.
  """
  if count < 0 or split not in SPLITS:
    raise ValueError(f'split={split!r}, count={count}: use one of {SPLITS} and 0 or more')
  rng = random.Random(f'{split} {seed}')
  found: dict[str, Problem] = {}
  while len(found) < count:
    # Number and kind are settled first: rejection must not make problems shorter.
    operations, kind, before = draw_count(rng), draw_kind(rng), len(found)
    while len(found) == before:
      spec = draw_spec(rng, operations, kind, split)
      text = specs.statement(spec)
      if text not in found and (problem := _build(spec)) is not None:
        found[text] = problem
  return list(found.values())
