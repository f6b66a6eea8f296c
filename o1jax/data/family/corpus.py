"""The corpus that the base model of the embedded default is pretrained on.

Four kinds of document, each a prompt and a completion: paths to a program (misread as the noise
table says), test cases for a program, test cases from the question alone, and drills that run
short programs. Every composition is of the train split.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Mapping

from o1jax.data import steps
from o1jax.data.family import draw
from o1jax.data.family import spec as specs
from o1jax.data.family.noise import NoiseTable
from o1jax.data.family.ops import READOUTS
from o1jax.data.family.spec import Spec
from o1jax.data.family.splits import split_of
from o1jax.data.family.testcases import CASES, prompt_of, render_tests, traced

MIX: Mapping[str, float] = {'solve': 0.2, 'tests': 0.45, 'question': 0.05, 'drill': 0.3}
DRILL_CASES = 4
_INPUT_DRAWS = 30


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
  """One document: `kind` is a key of `MIX`; the model reads `prompt` and learns `completion`."""

  kind: str
  prompt: str
  completion: str


def _cases(spec: Spec, rng: random.Random, count: int) -> str | None:
  """`count` cases on distinct inputs that suit the spec, as text; None where few inputs do."""
  chain, readout = specs.chain_of(spec.clauses), READOUTS[spec.clauses[-1].op]
  tests, seen = [], set()
  for _ in range(_INPUT_DRAWS):
    values = draw.draw_input(rng, spec.kind)
    if tuple(values) in seen or specs.run(chain, readout, values) is None:
      continue
    seen.add(tuple(values))
    tests.append(traced(spec, values))
    if len(tests) == count:
      return render_tests(tests)
  return None


def _drill(rng: random.Random) -> Spec:
  """A spec of one or two operations; tests decide nothing here, so any parameters do."""
  while True:
    spec = draw.draw_short(rng, draw.draw_kind(rng))
    if split_of(specs.composition(spec)) == 'train':
      return spec


def _document(kind: str, rng: random.Random, noise: NoiseTable) -> Document | None:
  if kind == 'drill':
    spec = _drill(rng)
    cases = _cases(spec, rng, DRILL_CASES)
    return cases and Document(kind, prompt_of('', specs.program(spec)), cases)
  spec = draw.draw_spec(rng, draw.draw_count(rng), draw.draw_kind(rng), 'train')
  read, statement = noise.misread(spec, rng), specs.statement(spec)
  if kind == 'solve':
    return Document(kind, f'{statement}\n', steps.render(specs.reference_steps(read)))
  cases = _cases(read, rng, CASES)
  code = specs.program(read) if kind == 'tests' else None
  return cases and Document(kind, prompt_of(statement, code), cases)


def corpus(
  seed: int,
  count: int,
  mix: Mapping[str, float] | None = None,
  noise: NoiseTable | None = None,
) -> Iterator[Document]:
  """`count` documents, deterministic from the seed.

  Args:
    seed: of the documents; the noise table has its own.
    count: how many.
    mix: kind -> share (they need not add up to 1); None: `MIX`. A kind left out has share 0.
    noise: the table that misreads the statements; None: `NoiseTable(0)`.

  Raises:
    ValueError: an unknown kind, or no kind with a positive share.
  """
  mix = dict(MIX if mix is None else mix)
  if unknown := sorted(set(mix) - set(MIX)):
    raise ValueError(f'mix has unknown kinds {unknown}; use {", ".join(MIX)}')
  if min(mix.values(), default=0) < 0 or sum(mix.values()) <= 0:
    raise ValueError(f'mix={mix}: give at least one kind a positive share, none a negative one')
  return _documents(random.Random(f'corpus {seed}'), count, mix, noise or NoiseTable())


def _documents(rng, count, mix, noise) -> Iterator[Document]:
  kinds, shares = list(mix), list(mix.values())
  for _ in range(count):
    [kind] = rng.choices(kinds, shares)
    document = None
    while document is None:  # an input that suits the spec was not found: another spec
      document = _document(kind, rng, noise)
    yield document
