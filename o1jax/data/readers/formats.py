"""The formats of published problem sets, each a name, the fields that tell it, and a function.

`FORMATS` is in the order in which a row is tried: the first whose fields are all there is taken.
"""

from __future__ import annotations

import ast
import dataclasses
import warnings
from collections.abc import Callable, Iterable

from o1jax.config import closest
from o1jax.data.readers import fields, livecodebench
from o1jax.data.readers.faults import BadRow, ReadError
from o1jax.data.readers.interface import with_interface
from o1jax.types import Problem, TestCase


@dataclasses.dataclass(frozen=True, slots=True)
class Format:
  """How rows of one kind become problems."""

  name: str
  needs: frozenset[str]  # fields by which the format is recognised
  read: Callable[[dict], Problem]  # raises BadRow


def by_name(name: str) -> Format:
  """The format called `name`; raises ReadError for another."""
  known = [f.name for f in FORMATS]
  for found in FORMATS:
    if found.name == name:
      return found
  raise ReadError(f'no format {name!r}; known: {", ".join(known)}{closest(name, known)}')


def recognised(rows: Iterable[dict]) -> Format | None:
  """The format of the first row that has the fields of one."""
  for row in rows:
    for found in FORMATS:
      if found.needs <= row.keys():
        return found
  return None


# --- o1jax's own -----------------------------------------------------------------------


def _plain(row: dict) -> Problem:
  """`Problem`'s own fields, tests as {input, output}."""
  entry_point = fields.text(row, 'entry_point', '') or None
  tests = []
  for test in fields.parsed(row, 'tests', list, ()):
    if not isinstance(test, dict):
      raise BadRow(f"'tests' holds {fields.quoted(test)}, not an object of input and output")
    given, wanted = fields.text(test, 'input'), fields.text(test, 'output')
    if entry_point and not isinstance(fields.decoded(given, 'input'), list):
      raise BadRow(f'input {fields.quoted(given)} of a call is not a JSON list of arguments')
    if entry_point:
      fields.decoded(wanted, 'output')
    tests.append(TestCase(given, wanted, fields.text(test, 'origin', 'dataset')))
  return Problem(
    fields.text(row, 'id'),
    fields.text(row, 'statement'),
    tests=tuple(tests),
    entry_point=entry_point,
    solutions=fields.texts(row, 'solutions', ()),
    starter_code=fields.text(row, 'starter_code', ''),
    test_code=fields.text(row, 'test_code', ''),
    source=fields.text(row, 'source', ''),
  )


def to_row(problem: Problem) -> dict:
  """A problem as a row of o1jax's own format, which the readers read back to an equal one."""
  return dataclasses.asdict(problem)


# --- TACO and APPS ---------------------------------------------------------------------


def _taco(row: dict) -> Problem:
  """TACO, and the files in its form that O1-CODER searches."""
  return _judged_by_pairs(row, f'taco/{fields.digest(fields.text(row, "question"))}', 'taco')


def _apps(row: dict) -> Problem:
  """APPS, whose train and test split both count from 0: the digest keeps their ids apart."""
  mark = fields.digest(fields.text(row, 'question'))
  return _judged_by_pairs(row, f'apps/{fields.label(row, "problem_id")}-{mark}', 'apps')


def _judged_by_pairs(row: dict, name: str, source: str) -> Problem:
  given = fields.parsed(row, 'input_output', dict)
  inputs, outputs = (fields.parsed(given, k, list) for k in ('inputs', 'outputs'))
  if len(inputs) != len(outputs):
    raise BadRow(f'{len(inputs)} inputs, but {len(outputs)} outputs')
  entry_point = fields.text(given, 'fn_name', '') or None
  pairs = zip(inputs, outputs, strict=True)
  if entry_point is None:
    tests = [TestCase(fields.lines(i, 'an input'), fields.lines(o, 'an output')) for i, o in pairs]
  else:
    # The two sets wrap the value of a call in a list of one, in all tests of a row or in none.
    wrapped = all(isinstance(o, list) and len(o) == 1 for o in outputs)
    tests = [fields.call(fields.arguments(i, 'an input'), o[0] if wrapped else o) for i, o in pairs]
  starter = fields.text(row, 'starter_code', '')
  return Problem(
    name,
    with_interface(fields.text(row, 'question'), starter, entry_point),
    tests=tuple(tests),
    entry_point=entry_point,
    solutions=_compiling_first(fields.texts(row, 'solutions', ())),
    starter_code=starter,
    source=source,
  )


def _compiling_first(solutions: tuple[str, ...]) -> tuple[str, ...]:
  """The solutions, the first that is Python 3 in front: the first is the reference."""
  for i, solution in enumerate(solutions):
    if is_python(solution):
      return (solution, *solutions[:i], *solutions[i + 1 :])
  return solutions


# --- HumanEval and MBPP ----------------------------------------------------------------


def _humaneval(row: dict) -> Problem:
  """The prompt is statement and beginning of the program; `check` calls what it defines."""
  prompt, name = fields.text(row, 'prompt'), fields.text(row, 'entry_point')
  program = prompt + fields.text(row, 'canonical_solution', '')
  return Problem(
    fields.text(row, 'task_id'),
    prompt,
    entry_point=name,
    solutions=(program,) if 'canonical_solution' in row else (),
    starter_code=prompt,
    test_code=_helpers(prompt, name) + fields.text(row, 'test'),
    source='humaneval',
  )


def _helpers(prompt: str, entry_point: str) -> str:
  """The imports and functions of a prompt that `check` may call besides the entry point.

  They stand in front of the test code: what the test code defines is not asked of the program.
  """
  body = ast.parse(prompt).body if is_python(prompt) else []
  functions = [n for n in body if isinstance(n, ast.FunctionDef) and n.name != entry_point]
  if not functions:
    return ''
  imports = [n for n in body if isinstance(n, ast.Import | ast.ImportFrom)]
  return '\n'.join(ast.unparse(node) for node in (*imports, *functions)) + '\n\n'


def _mbpp(row: dict) -> Problem:
  """The asserts are part of the statement, as they alone say what the function is called."""
  asserts = fields.texts(row, 'test_list')
  setup = [fields.text(row, 'test_setup_code', '')]
  imports = fields.texts(row, 'test_imports', ())
  task = fields.text(row, 'text' if 'text' in row else 'prompt').strip()
  shown = '\n'.join(asserts)
  return Problem(
    f'mbpp/{fields.label(row, "task_id")}',
    f'{task}\nThe program has to pass these tests:\n{shown}',
    solutions=(fields.text(row, 'code'),) if row.get('code') else (),
    test_code='\n'.join(filter(None, (*imports, *setup, *asserts))),
    source='mbpp',
  )


# --- of all -----------------------------------------------------------------------------


def is_python(code: str) -> bool:
  """Whether a text compiles as Python 3."""
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # of escapes such as '\d'
    try:
      compile(code, 'program', 'exec', dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
      return False
  return True


FORMATS = (
  Format('o1jax', frozenset({'id', 'statement'}), _plain),
  Format(
    'livecodebench',
    frozenset({'question_id', 'question_content', 'public_test_cases'}),
    livecodebench.problem,
  ),
  Format('humaneval', frozenset({'task_id', 'prompt', 'entry_point', 'test'}), _humaneval),
  Format('mbpp', frozenset({'task_id', 'code', 'test_list'}), _mbpp),
  Format('apps', frozenset({'problem_id', 'question', 'input_output'}), _apps),
  Format('taco', frozenset({'question', 'input_output'}), _taco),
)
