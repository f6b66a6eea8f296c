"""Published problems: reference solutions are accepted, broken ones are not.

The files are not part of the repository: `O1JAX_TEST_DATA` names their folder.
"""

import ast
import gzip
import json
import os
from pathlib import Path

import pytest

from o1jax import types
from o1jax.sandbox import Job, Limits, Pool
from o1jax.types import TestCase

DATA = Path(os.environ.get('O1JAX_TEST_DATA', Path(__file__).parents[2] / 'shared' / 'data'))
HUMANEVAL = DATA / 'HumanEval.jsonl.gz'
TACO = DATA / 'taco_train_easy_10.json'

BREAK = """
def __break(value):
  if isinstance(value, bool): return not value
  if isinstance(value, (int, float)): return value + 1
  if isinstance(value, str): return value + '!'
  if isinstance(value, list): return value + [None]
  if isinstance(value, tuple): return value + (None,)
  if isinstance(value, dict): return {**value, None: None}
  return 0 if value is None else None
"""


class Breaker(ast.NodeTransformer):
  """Makes one function return something else than it would."""

  def __init__(self, name):
    self.name, self.inside = name, False

  def visit_FunctionDef(self, node):
    if node.name != self.name:
      return node  # helpers stay as they are
    return self.generic_visit(node)

  def visit_Return(self, node):
    value = node.value or ast.Constant(None)
    return ast.Return(ast.Call(ast.Name('__break', ast.Load()), [value], []))


def broken(code, name):
  tree = Breaker(name).visit(ast.parse(code))
  return BREAK + ast.unparse(ast.fix_missing_locations(tree))


@pytest.fixture(scope='module')
def sandbox():
  with Pool(2, Limits(cpu_s=5.0)) as running:
    yield running


@pytest.mark.skipif(not HUMANEVAL.exists(), reason=f'{HUMANEVAL} is not there')
def test_humaneval(sandbox):
  with gzip.open(HUMANEVAL, 'rt') as lines:
    rows = [json.loads(line) for line in lines]
  assert len(rows) == 164
  codes = [row['prompt'] + row['canonical_solution'] for row in rows]
  names = [row['entry_point'] for row in rows]
  tests = [row['test'] for row in rows]
  right = sandbox.judge([Job(c, (), n, t) for c, n, t in zip(codes, names, tests, strict=True)])
  assert [r['task_id'] for r, v in zip(rows, right, strict=True) if v.status != 'accepted'] == []
  wrong = sandbox.judge(
    [Job(broken(c, n), (), n, t) for c, n, t in zip(codes, names, tests, strict=True)]
  )
  assert [r['task_id'] for r, v in zip(rows, wrong, strict=True) if v.status == 'accepted'] == []
  assert types.SANDBOX_FAILURE not in {v.status for v in wrong}


def taco_jobs(problem):
  """A TACO row's reference programs as jobs; JSON within JSON, results within a list of one."""
  given, solutions = problem['input_output'], problem['solutions']
  given = ast.literal_eval(given) if isinstance(given, str) else given
  solutions = ast.literal_eval(solutions) if isinstance(solutions, str) else solutions
  name = given.get('fn_name')
  pairs = list(zip(given['inputs'], given['outputs'], strict=True))
  if name is None:
    tests = tuple(TestCase(text, expected) for text, expected in pairs)
  else:
    tests = tuple(TestCase(json.dumps(args), json.dumps(out[0])) for args, out in pairs)
  return [Job(code, tests, name) for code in solutions]


_NUMPY = (types.RUNTIME_ERROR, 'imports numpy; programs have the standard library only')
_SHUFFLED = (types.WRONG_ANSWER, "the row's outputs are in another order than its inputs")
# Problem and solution, its verdict, and the reason.
DISAGREEMENTS = {
  (1, 33): _NUMPY,
  (3, 1): _NUMPY,
  (6, 18): (types.WRONG_ANSWER, 'returns 180.0 where the integer 180 is expected'),
  **{(8, k): _SHUFFLED for k in range(5)},
}


@pytest.mark.skipif(not TACO.exists(), reason=f'{TACO} is not there')
def test_taco_references(sandbox):
  problems = json.loads(TACO.read_text())
  refused, total = {}, 0
  for i, problem in enumerate(problems):
    verdicts = sandbox.judge(taco_jobs(problem))
    total += len(verdicts)
    refused |= {(i, k): v.status for k, v in enumerate(verdicts) if v.status != types.ACCEPTED}
  assert total == 244
  assert refused == {which: status for which, (status, _) in DISAGREEMENTS.items()}


@pytest.mark.skipif(not TACO.exists(), reason=f'{TACO} is not there')
def test_taco_broken_references(sandbox):
  for problem in json.loads(TACO.read_text()):
    jobs = [job for job in taco_jobs(problem) if job.entry_point]
    bad = []
    for job in jobs:
      code = broken(job.code, job.entry_point)
      if code.count('__break(') > 1:  # a function with a return, not a lambda
        bad.append(Job(code, job.tests, job.entry_point))
    assert types.ACCEPTED not in {v.status for v in sandbox.judge(bad)}
