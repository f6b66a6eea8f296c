"""Rows of published problem sets in the form of each, and where real files are."""

import base64
import gzip
import importlib
import json
import os
import pickle
import zlib
from pathlib import Path

import pytest
from hypothesis import strategies as st

from o1jax.data.readers import (
  read_problems,
)

DATA = Path(os.environ.get('O1JAX_TEST_DATA', Path(__file__).parents[2] / 'shared' / 'data'))
HUMANEVAL = DATA / 'HumanEval.jsonl.gz'
TACO = DATA / 'taco_train_easy_10.json'
PRM = [DATA / f'prm_{kind}_label_examples.json' for kind in ('hard', 'soft')]


def needs(path):
  return pytest.mark.skipif(not path.exists(), reason=f'{path} is not there')


def packed(tests):
  """Private tests as LiveCodeBench packs them."""
  return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests)))).decode()


# One row of each set, as it is published.
TACO_STDIN = {
  'question': 'Add two numbers.',
  'solutions': json.dumps(['print(sum(map(int, input().split())))']),
  'starter_code': '',
  'input_output': json.dumps({'inputs': ['1 2\n', ['3 4', '']], 'outputs': ['3\n', ['7', '']]}),
  'difficulty': 'EASY',
  'tags': "['Maths']",
}
TACO_CALL = {
  'question': 'Sum a list.',
  'solutions': ['print "python 2"', 'def total(a):\n  return sum(a)'],
  'starter_code': 'def total(a):\n\t',
  'input_output': {'fn_name': 'total', 'inputs': [[[1, 2]], '[]\n'], 'outputs': [[3], [0]]},
}
APPS_CALL = TACO_CALL | {
  'problem_id': 7,
  'input_output': json.dumps(
    {'fn_name': 'double', 'inputs': [[[1, 2]], [[5]]], 'outputs': [[2, 4], [10]]}
  ),
}
HUMANEVAL_ROW = {
  'task_id': 'HumanEval/32',
  'prompt': 'import math\n\ndef poly(xs):\n  """p"""\n  return math.fsum(xs)\n\n'
  'def zero(xs):\n  """Find it."""\n',
  'entry_point': 'zero',
  'canonical_solution': '  return 0.0\n',
  'test': 'def check(candidate):\n  assert poly([candidate([1])]) == 0\n',
}
MBPP_ROW = {
  'task_id': 11,
  'text': 'Write a function to add.',
  'code': 'def add(a, b):\n  return a + b',
  'test_list': ['assert add(1, 2) == 3', 'assert add(0, 0) == 0'],
  'test_setup_code': 'zero = 0',
  'challenge_test_list': ['assert add(-1, 1) == zero'],
}
MBPP_SANITIZED = {k: v for k, v in MBPP_ROW.items() if k not in ('text', 'test_setup_code')} | {
  'prompt': 'Write a function to add.',
  'test_imports': ['import math'],
}
LCB_STDIN = {
  'question_id': 'abc301_a',
  'question_content': 'Print the larger.',
  'starter_code': '',
  'public_test_cases': json.dumps([{'input': '1 2\n', 'output': '2\n', 'testtype': 'stdin'}]),
  'private_test_cases': packed([{'input': '5 3\n', 'output': '5\n', 'testtype': 'stdin'}]),
  'metadata': '{}',
}
LCB_CALL = LCB_STDIN | {
  'question_id': '2777',
  'starter_code': 'class Solution:\n    def pick(self, a: List[int], k: int) -> int:\n        ',
  'public_test_cases': json.dumps(
    [{'input': '[1, 2]\n1', 'output': '2', 'testtype': 'functional'}]
  ),
  'private_test_cases': json.dumps(
    [{'input': '["a"]\n0', 'output': '"a"', 'testtype': 'functional'}]
  ),
  'metadata': json.dumps({'func_name': 'pick'}),
}
PLAIN = {
  'id': 'p1',
  'statement': 'Say hi.',
  'tests': [{'input': '', 'output': 'hi\n'}],
  'solutions': ["print('hi')"],
}
EVERY = [TACO_STDIN, TACO_CALL, APPS_CALL, HUMANEVAL_ROW, MBPP_ROW, LCB_STDIN, LCB_CALL, PLAIN]


def written(path, rows):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return path


def only(tmp_path, row, **options):
  """The one problem of a file with one row."""
  (problem,) = read_problems(written(tmp_path / 'one.jsonl', [row]), strict=True, **options)
  return problem


def small(i):
  return {'id': f'p{i}', 'statement': f'Print {i}.', 'tests': [{'input': '', 'output': str(i)}]}


def parquet(path, rows):
  pa = pytest.importorskip('pyarrow')
  importlib.import_module('pyarrow.parquet').write_table(pa.Table.from_pylist(rows), path)


def arrow(path, rows):
  pa = pytest.importorskip('pyarrow')
  table = pa.Table.from_pylist(rows)
  with pa.ipc.new_stream(str(path), table.schema) as sink:
    sink.write_table(table)


WRITERS = {
  'p.jsonl': lambda path, rows: written(path, rows),
  'p.json': lambda path, rows: path.write_text(json.dumps(rows, indent=4)),
  'p.jsonl.gz': lambda path, rows: path.write_bytes(
    gzip.compress(''.join(json.dumps(r) + '\n' for r in rows).encode())
  ),
  'p.json.gz': lambda path, rows: path.write_bytes(gzip.compress(json.dumps(rows).encode())),
  'p.parquet': parquet,
  'p.arrow': arrow,
}

VALUES = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
  lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
  max_leaves=8,
)

WORDS = [f'word{i}' for i in range(3000)]
