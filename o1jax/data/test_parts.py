"""Test parts of any problem: real cases to text, and what a generator wrote back to cases.

Problems of the family have their own format with traces (`data.family.testcases`). Cases of other
problems are written as they stand, one line each for input and output:

    Input: 3\\n1 2 3
    Output: 6

Text in and out has its line breaks and backslashes escaped; a function's arguments and value are
JSON. The same `family.render_tests` writes both.

Everything drawn here is a function of the problems and a seed.
"""

from __future__ import annotations

import dataclasses
import json
import random
import re
from collections.abc import Sequence

from o1jax.batch import TokenBatch
from o1jax.data import family
from o1jax.data.family.testcases import CASES
from o1jax.data.pack import Document, pad
from o1jax.data.tokens import Tokenizer
from o1jax.types import Problem, TestCase

_CASE = re.compile(r'Input: ([^\n]*)\nOutput: ([^\n]*)\n')
_ESCAPED = re.compile(r'\\(.)')
_WIDTH_MULTIPLE = 32  # pair rows are as wide as the longest document, rounded up to this


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
  """A test part to learn: the text before it and its real cases."""

  prompt: str
  tests: tuple[family.TracedTest, ...]


def draw_parts(problems: Sequence[Problem], *, draws: int, bare: float, seed: int) -> list[Part]:
  """`draws` test parts of real cases for each problem, every problem once before any twice.

  A share `bare` of the prompts shows the question alone, and so do those of problems without a
  reference program. Problems with too few tests have no part.
  """
  parts = []
  for draw in range(draws):
    for problem in problems:
      rng = random.Random(f'tcg {seed} {draw} {problem.id}')
      tests = draw_cases(problem, rng)
      if tests is not None:
        alone = rng.random() < bare or not problem.solutions
        code = None if alone else problem.solutions[0]
        parts.append(Part(family.tcg_prompt(problem, code), tests))
  return parts


def documents(tokenizer: Tokenizer, parts: Sequence[Part], longest: int) -> list[Document]:
  """The parts as documents, without those of more than `longest` tokens."""
  encoded = (_document(tokenizer, part.prompt, part.tests) for part in parts)
  return [document for document in encoded if len(document.ids) <= longest]


def shuffled_pairs(
  tokenizer: Tokenizer, parts: Sequence[Part], *, longest: int, most: int, seed: int
) -> tuple[TokenBatch, TokenBatch]:
  """Real cases, and row by row the same inputs with shuffled outputs: NumPy, `[pairs, T]` each.

  At most `most` pairs, of documents of at most `longest` tokens. A part whose outputs are all
  equal makes no pair.
  """
  rng = random.Random(f'tcg pairs {seed}')
  real, wrong = [], []
  for part in parts:
    shuffled = family.shuffled_answers(rng, part.tests)
    if shuffled is not None and len(real) < most:
      sides = [_document(tokenizer, part.prompt, tests) for tests in (part.tests, shuffled)]
      if max(len(side.ids) for side in sides) <= longest:
        real.append(sides[0])
        wrong.append(sides[1])
  widest = max((len(document.ids) for document in (*real, *wrong)), default=1)
  width = -(-widest // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE
  return pad(real, width), pad(wrong, width)


def _document(tokenizer: Tokenizer, prompt: str, tests: Sequence[family.TracedTest]) -> Document:
  """Prompt, cases and eos, the cases to be learnt."""
  start = tokenizer.prompt_ids(prompt)
  answer = tokenizer.encode(family.render_tests(tests))
  return Document((*start, *answer, tokenizer.eos_id), len(start))


def draw_cases(problem: Problem, rng: random.Random) -> tuple[family.TracedTest, ...] | None:
  """Three of a problem's own tests, ready to be rendered; None where it has fewer."""
  if len(problem.tests) < CASES:
    return None
  if problem.source == 'family':
    return family.real_tests(problem, rng, CASES)
  spell = _one_line if problem.entry_point is None else _json_line
  return tuple(
    family.TracedTest(f' {spell(t.input)}', '', f' {spell(t.output)}')
    for t in rng.sample(problem.tests, CASES)
  )


def read_cases(problem: Problem, text: str) -> tuple[TestCase, ...] | None:
  """The cases of a generated test part, as a judge takes them.

  None where the text is not three whole cases with three different inputs.
  """
  if problem.source == 'family':
    cases = family.parse_tests(text, problem.entry_point) or []
  else:
    cases = _read_plain(text, problem.entry_point is not None)
  whole = len(cases) == CASES == len({case.input for case in cases})
  return tuple(cases) if whole else None


def _read_plain(text: str, called: bool) -> list[TestCase]:
  """Cases of a problem outside the family; none where anything else stands in the text."""
  cases, end = [], 0
  while end < len(text):
    match = _CASE.match(text, end)
    if match is None or (called and not _is_call(*match.groups())):
      return []
    given, wanted = match.groups() if called else map(_many_lines, match.groups())
    cases.append(TestCase(given, wanted, origin='tcg'))
    end = match.end()
  return cases


def _is_call(arguments: str, value: str) -> bool:
  try:
    json.loads(value)
    return isinstance(json.loads(arguments), list)
  except (ValueError, RecursionError):
    return False


def _json_line(text: str) -> str:
  return json.dumps(json.loads(text), ensure_ascii=False)


def _one_line(text: str) -> str:
  return text.rstrip('\n').replace('\\', '\\\\').replace('\n', '\\n')


def _many_lines(text: str) -> str:
  return _ESCAPED.sub(lambda m: '\n' if m.group(1) == 'n' else m.group(1), text)
