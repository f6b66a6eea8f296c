"""Problems of the family: a spec, its inputs, and the proof that its tests are strong.

Everything is a function of the seed. A problem's tests depend on its spec alone, so
`problem_of(spec_of(problem.id)) == problem`.
"""

from __future__ import annotations

import collections
import itertools
import random

from o1jax.data.family import draw
from o1jax.data.family import spec as specs
from o1jax.data.family.ops import READOUTS
from o1jax.data.family.spec import RAISES, Spec
from o1jax.data.family.splits import SPLITS
from o1jax.types import Problem, TestCase

TESTS = 10  # a problem
_DRAWS = 36  # inputs tried for a problem's tests
_SAME = 3  # tests of a problem that may have the same output


def _differs(chain: list, values: list, answer) -> bool:
  try:
    for fn, k in chain:
      values = fn(values, k)
  except RAISES:
    return True  # a program that raises has failed the test
  return values != answer


def _strong(spec: Spec, runs: list) -> bool:
  """True where every omission and every confusion changes `draw.KILLS` of the outputs or more."""
  chain = specs.chain_of(spec.clauses)
  twisted = specs.chain_of([specs.confused(c) for c in spec.clauses])
  last = len(chain) - 1
  for i in range(len(chain)):
    rest = chain[i + 1 :]
    for mutant in ([twisted[i], *rest], rest)[: 1 + (i < last)]:
      changed = (_differs(mutant, states[i], answer) for states, answer in runs)
      if len(list(itertools.islice(filter(None, changed), draw.KILLS))) < draw.KILLS:
        return False
  return True


def draw_runs(spec: Spec) -> list | None:
  """`TESTS` strong (states, answer) pairs of the spec with distinct inputs, or None."""
  rng = random.Random(specs.problem_id(spec))
  readout = READOUTS[spec.clauses[-1].op]
  chain = specs.chain_of(spec.clauses)
  runs, inputs, answers = [], set(), collections.Counter()
  for draws in range(_DRAWS):
    if len(runs) + _DRAWS - draws < TESTS or (draws == _DRAWS // 3 and len(answers) < 4):
      return None
    values = draw.draw_input(rng, spec.kind)
    result = specs.run(chain, readout, values)
    if result is None or tuple(values) in inputs:
      continue
    answer = str(result[1])
    if answers[answer] >= _SAME:
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
    operations, kind, before = draw.draw_count(rng), draw.draw_kind(rng), len(found)
    while len(found) == before:
      spec = draw.draw_spec(rng, operations, kind, split)
      text = specs.statement(spec)
      if text not in found and (problem := _build(spec)) is not None:
        found[text] = problem
  return list(found.values())
