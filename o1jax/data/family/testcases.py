"""Test cases as text: what the test-case generator reads and writes.

One uniform format for both forms. A case is three lines,

    Input: 3 1 4 1
    Trace: keep x <= 3 -> 3 1 1 | x * x -> 9 1 1 | output sum -> 9 10 11
    Output: 11

the second of which a reader may ignore: it is there so that a small model can work the output
out step by step, as running programs in writing. A function's argument is the list on the input
line; its value is a list where the output line has several items, unless they are joined by `-`.
"""

from __future__ import annotations

import dataclasses
import json
import random
import re
from collections.abc import Iterable, Sequence

from o1jax.data.family import spec as specs
from o1jax.data.family.spec import Spec
from o1jax.types import Problem, TestCase

CASES = 3  # in one test part
PART = '\nTest Part:\n'
FENCE_OPEN, FENCE_CLOSE = '\n```python\n', '\n```'
JOINT = ' - '
_CASE = re.compile(r'Input: ([^\n]+)\n(?:Trace: ([^\n]+)\n)?Output: ([^\n]+)\n')
_NUMBER = re.compile(r'-?\d{1,9}')


@dataclasses.dataclass(frozen=True, slots=True)
class TracedTest:
  """One case as text: the parts behind `Input:`, `Trace: ` and `Output:`.

  `trace` is '' where there is none. Items stand behind one space each.
  """

  input: str
  trace: str
  output: str


def tcg_prompt(problem: Problem, code: str | None) -> str:
  """What the generator reads: the statement, the fenced code unless None, and `Test Part:`."""
  return prompt_of(problem.statement, code)


def prompt_of(statement: str, code: str | None) -> str:
  """`tcg_prompt` of a bare statement; '' gives a prompt of code alone."""
  fenced = '' if code is None else f'{FENCE_OPEN}{code}{FENCE_CLOSE}'
  return f'{statement}{fenced}{PART}'.removeprefix('\n')


def traced(spec: Spec, values: list) -> TracedTest:
  """The case that the spec's program makes of an input.

  Raises:
    ValueError: the input does not suit the spec.
  """
  entries, answer = specs.trace(spec, values)
  text = ' | '.join(f'{name} ->{specs.uniform(after)}' for name, after in entries)
  return TracedTest(specs.uniform(values), text, specs.uniform(answer))


def real_tests(problem: Problem, rng: random.Random, count: int = CASES) -> tuple[TracedTest, ...]:
  """`count` of a family problem's own tests, with the traces of its reference program."""
  spec = specs.spec_of(problem.id)
  tests = rng.sample(problem.tests, count)
  return tuple(traced(spec, _decode_input(spec, test.input)) for test in tests)


def _decode_input(spec: Spec, text: str) -> list:
  if spec.form == 'function':
    return json.loads(text)[0]
  return [int(item) if spec.kind == 'ints' else item for item in text.split()]


def render_tests(tests: Iterable[TracedTest]) -> str:
  """The test part that `parse_tests` reads back."""
  return ''.join(
    f'Input:{t.input}\n' + (f'Trace: {t.trace}\n' if t.trace else '') + f'Output:{t.output}\n'
    for t in tests
  )


def _typed(text: str) -> list:
  items = text.split()
  if all(_NUMBER.fullmatch(item) for item in items):
    return [int(item) for item in items]
  return items


def _value(text: str):
  if JOINT in text:
    return text
  items = _typed(text)
  return items if len(items) > 1 else items[0]


def parse_tests(text: str, entry_point: str | None = None) -> list[TestCase] | None:
  """The cases of a test part, in the encoding of the problem's tests; None where it is malformed.

  Strict: nothing but whole cases, items behind single spaces, no input twice. Trace lines are
  ignored. Where the end of the text cuts a case off, the text is malformed.

  Args:
    text: what the generator wrote.
    entry_point: the problem's: None for text in and out, a name for JSON arguments and value.
  """
  cases, end = [], 0
  while end < len(text):
    match = _CASE.match(text, end)
    if match is None:
      return None
    given, _, wanted = match.groups()
    if any(part != ' '.join(part.split()) for part in (given, wanted)):
      return None
    if entry_point is not None:
      given, wanted = json.dumps([_typed(given)]), json.dumps(_value(wanted))
    cases.append(TestCase(given, wanted, origin='tcg'))
    end = match.end()
  inputs = {case.input for case in cases}
  return cases if cases and len(inputs) == len(cases) else None


def shuffled_answers(
  rng: random.Random, tests: Sequence[TracedTest]
) -> tuple[TracedTest, ...] | None:
  """The same inputs with the answers (traces with them) permuted: a DPO pair's rejected side.

  At least one answer no longer fits its input. None where all outputs are equal, so that no
  permutation could be wrong.
  """
  if len({test.output for test in tests}) < 2:
    return None
  while True:
    order = rng.sample(range(len(tests)), len(tests))
    moved = [tests[i] for i in order]
    if any(a.output != b.output for a, b in zip(tests, moved, strict=True)):
      return tuple(
        TracedTest(own.input, other.trace, other.output)
        for own, other in zip(tests, moved, strict=True)
      )
