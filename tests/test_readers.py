"""Readers of published problem sets: rows written here in each set's form, and real files."""

import importlib
import io
import itertools
import json
import sys
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reader_cases import (
  APPS_CALL,
  EVERY,
  HUMANEVAL,
  HUMANEVAL_ROW,
  LCB_CALL,
  LCB_STDIN,
  MBPP_ROW,
  MBPP_SANITIZED,
  TACO,
  TACO_CALL,
  TACO_STDIN,
  VALUES,
  WRITERS,
  needs,
  only,
  small,
  written,
)

from o1jax.data import overlap
from o1jax.data.readers import (
  ReadError,
  read_problems,
  to_row,
)
from o1jax.types import Problem, TestCase

rows_lib = importlib.import_module('o1jax.data.readers.rows')


def test_taco_stdin(tmp_path):
  problem = only(tmp_path, TACO_STDIN)
  assert problem.tests == (TestCase('1 2\n', '3\n'), TestCase('3 4\n', '7\n'))
  assert problem.entry_point is None and problem.statement == 'Add two numbers.'
  assert problem.solutions == ('print(sum(map(int, input().split())))',)
  assert problem.id.startswith('taco/') and problem.source == 'taco'


def test_taco_call(tmp_path):
  problem = only(tmp_path, TACO_CALL)
  # Values out of their list of one; arguments as a list, or as lines of JSON.
  assert problem.tests == (TestCase('[[1, 2]]', '3'), TestCase('[[]]', '0'))
  assert problem.entry_point == 'total'
  assert problem.solutions[0].startswith('def total')  # the first that is Python 3
  assert 'def total(a):' in problem.statement  # the policy reads nothing else


def test_a_call_without_starter_code_is_named(tmp_path):
  assert '`total`' in only(tmp_path, TACO_CALL | {'starter_code': ''}).statement


def test_apps_outputs_stay_where_one_is_not_wrapped(tmp_path):
  problem = only(tmp_path, APPS_CALL)
  assert [t.output for t in problem.tests] == ['[2, 4]', '[10]']
  other = only(tmp_path, APPS_CALL | {'question': 'Another.'})
  assert problem.id.startswith('apps/7-') and problem.id != other.id


def test_humaneval_helpers_stand_in_the_test_code(tmp_path):
  problem = only(tmp_path, HUMANEVAL_ROW)
  assert problem.solutions == (HUMANEVAL_ROW['prompt'] + HUMANEVAL_ROW['canonical_solution'],)
  scope = {'zero': lambda xs: 0.0}
  exec(problem.test_code, scope)
  assert scope['zero']([1]) == 0  # the entry point itself is not among them
  scope['check'](scope['zero'])


def test_mbpp(tmp_path):
  problem = only(tmp_path, MBPP_ROW)
  assert problem.test_code.split('\n') == ['zero = 0', *MBPP_ROW['test_list']]
  assert problem.id == 'mbpp/11' and problem.entry_point is None
  assert 'assert add(1, 2) == 3' in problem.statement
  sanitized = only(tmp_path, MBPP_SANITIZED)
  assert sanitized.test_code.split('\n') == ['import math', *MBPP_ROW['test_list']]
  assert sanitized.statement == problem.statement


def test_livecodebench(tmp_path):
  problem = only(tmp_path, LCB_STDIN)
  assert problem.tests == (TestCase('1 2\n', '2\n'), TestCase('5 3\n', '5\n'))
  assert problem.entry_point is None and problem.id == 'livecodebench/abc301_a'
  problem = only(tmp_path, LCB_CALL)
  assert problem.tests == (TestCase('[[1, 2], 1]', '2'), TestCase('[["a"], 0]', '"a"'))
  assert problem.entry_point == 'pick' and 'class Solution' in problem.statement


CASES = st.builds(TestCase, st.text(), st.text(), st.sampled_from(['dataset', 'tcg']))
PROBLEMS = st.builds(
  Problem,
  id=st.text(min_size=1),
  statement=st.from_regex(r'[^<\s][^<]{0,30}', fullmatch=True),
  tests=st.lists(CASES).map(tuple),
  solutions=st.lists(st.text()).map(tuple),
  starter_code=st.text(),
  source=st.text(),
)


@settings(max_examples=30)
@given(st.lists(PROBLEMS, min_size=1, max_size=4))
def test_o1jax_rows_come_back(tmp_path_factory, problems):
  path = tmp_path_factory.mktemp('rows') / 'p.jsonl'
  written(path, map(to_row, problems))
  assert list(read_problems(path, strict=True)) == problems


# --- files ------------------------------------------------------------------------------


@pytest.mark.parametrize('name', WRITERS)
@pytest.mark.parametrize('row', EVERY, ids=lambda row: next(iter(row)) + str(len(row)))
def test_every_format_from_every_file(tmp_path, name, row):
  if name in ('p.parquet', 'p.arrow') and row in (TACO_CALL,):
    row = row | {'input_output': json.dumps(row['input_output'])}  # lists of mixed types
  WRITERS[name](tmp_path / name, [row, row])
  expected = only(tmp_path / 'plain', row)
  assert list(read_problems(tmp_path / name, strict=True)) == [expected, expected]


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
  (tmp_path / 'p.parquet').write_bytes(b'PAR1')
  monkeypatch.setitem(sys.modules, 'pyarrow', None)
  with pytest.raises(ReadError, match=r'pip install .o1jax\[data\]'):
    list(read_problems(tmp_path / 'p.parquet'))


@given(
  st.lists(st.dictionaries(st.text(), VALUES, max_size=3)),
  st.sampled_from([None, 1, 20]),
  st.integers(1, 40),
)
def test_an_array_is_decoded_in_pieces_of_any_size(rows, indent, chunk):
  text = json.dumps(rows, indent=indent, ensure_ascii=chunk % 2 == 0)
  before, rows_lib.CHUNK = rows_lib.CHUNK, chunk
  try:
    found = list(rows_lib._array(io.StringIO(text)))
  finally:
    rows_lib.CHUNK = before
  assert [row.value for row in found] == rows
  assert [row.number for row in found] == list(range(1, len(rows) + 1))


@pytest.mark.parametrize('chunk', [1, 2, 3, 99])
def test_a_number_that_is_cut_is_one_element(monkeypatch, chunk):
  monkeypatch.setattr(rows_lib, 'CHUNK', chunk)
  found = list(rows_lib._array(io.StringIO('[12345, {}, 1.5e10, "}"]')))
  assert [row.value for row in found] == [None, {}, None, None]
  assert found[0].fault == 'a int, not an object'


@pytest.mark.parametrize('name', ['p.jsonl', 'p.json'])
def test_a_hundred_thousand_rows_in_little_memory(tmp_path, name):
  count, path = 100_000, tmp_path / name
  between, ends = ('\n', '') if name == 'p.jsonl' else (',\n', '[]')
  with path.open('w') as file:
    file.write(ends[:1])
    for i in range(count):
      file.write((between if i else '') + json.dumps(small(i)))
    file.write(ends[1:])
  problems = read_problems(path, strict=True)
  next(problems)
  tracemalloc.start()
  try:
    assert sum(1 for _ in problems) == count - 1
    peak = tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()
  assert peak < 2 << 20  # the problems together are some 60 MB


def test_only_what_is_asked_for_is_read(tmp_path):
  path = written(tmp_path / 'p.jsonl', map(small, range(100)))
  path.write_text(path.read_text() + 'not JSON\n')
  first = list(itertools.islice(read_problems(path, strict=True), 50))
  assert [p.id for p in first] == [f'p{i}' for i in range(50)]


@needs(HUMANEVAL)
def test_real_humaneval():
  problems = list(read_problems(HUMANEVAL, strict=True))
  assert len(problems) == 164
  helped = [p.id for p in problems if not p.test_code.lstrip().startswith(('META', 'def check'))]
  # In 10 the helper is only the program's; of the others `check` calls it.
  assert helped == [f'HumanEval/{i}' for i in (10, 32, 38, 50)]
  unique = overlap.Unique()
  assert [p.id for p in problems if unique.drop(p)] == []
  itself = overlap.Evaluation(problems)
  assert all(itself.drop(p).similarity == 1 for p in problems)


@needs(TACO)
def test_real_taco():
  problems = list(read_problems(TACO, strict=True))
  raw = json.loads(TACO.read_text())
  assert [p.entry_point for p in problems] == [r['input_output'].get('fn_name') for r in raw]
  assert [len(p.tests) for p in problems] == [len(r['input_output']['inputs']) for r in raw]
  assert problems[0].tests[0] == TestCase('["hello"]', '"h2ll4"')
