"""Readers of published problem sets: rows written here in each set's form, and real files."""

import base64
import contextlib
import gzip
import importlib
import io
import itertools
import json
import os
import pickle
import random
import sys
import tracemalloc
import zlib
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from o1jax.data import o1coder, overlap
from o1jax.data.problems import load_split
from o1jax.data.readers import (
  FORMATS,
  Faults,
  ReadError,
  data_files,
  entries,
  read_problems,
  to_row,
)
from o1jax.data.readers.faults import BadRow
from o1jax.data.readers.livecodebench import pickled_text, unpacked
from o1jax.data.readers.read import to_problem
from o1jax.sandbox import Job
from o1jax.types import Problem, Step, TestCase

rows_lib = importlib.import_module('o1jax.data.readers.rows')

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


# --- what each field becomes ------------------------------------------------------------


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


VALUES = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
  lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
  max_leaves=8,
)


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


def small(i):
  return {'id': f'p{i}', 'statement': f'Print {i}.', 'tests': [{'input': '', 'output': str(i)}]}


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


# --- bad rows ---------------------------------------------------------------------------


BAD = [
  (TACO_STDIN, {'input_output': '{"inputs": ['}, "'input_output' is not JSON"),
  (TACO_STDIN, {'input_output': ''}, "has no 'inputs'"),
  (TACO_STDIN, {'input_output': '[1]'}, 'not an object'),
  (TACO_STDIN, {'input_output': {'inputs': [], 'outputs': []}}, 'has no tests'),
  (TACO_STDIN, {'input_output': {'inputs': ['1'], 'outputs': []}}, '1 inputs, but 0 outputs'),
  (TACO_STDIN, {'input_output': {'inputs': [1], 'outputs': ['1']}}, 'an input is 1'),
  (TACO_STDIN, {'input_output': '[' * 100_000}, 'nested too deep'),
  (TACO_STDIN, {'solutions': '__import__("os").abort()'}, "'solutions' is not JSON"),
  (TACO_STDIN, {'solutions': [1]}, "'solutions' holds 1"),
  (TACO_STDIN, {'question': '  '}, 'the statement is empty'),
  (TACO_STDIN, {'question': 'Say <Step_End>.'}, 'step tag'),
  (TACO_STDIN, {'question': 'half \ud83d'}, 'lone surrogate'),
  (APPS_CALL, {'problem_id': None}, "'problem_id' is None"),
  (HUMANEVAL_ROW, {'test': 'def check(:'}, 'not Python 3'),
  (HUMANEVAL_ROW, {'test': 'return 1'}, 'not Python 3'),
  (MBPP_ROW, {'test_list': [], 'test_setup_code': ''}, 'has no tests'),
  (MBPP_ROW, {'text': None}, "'text' is None"),
  (LCB_CALL, {'metadata': '{}'}, "has no 'func_name'"),
  (LCB_CALL, {'private_test_cases': packed([{'input': '', 'output': ''}])}, 'more than one kind'),
  (LCB_STDIN, {'public_test_cases': '[{"testtype": "files"}]'}, "testtype 'files'"),
  (LCB_STDIN, {'private_test_cases': 'AAAA'}, 'not base64 of zlib'),
  (LCB_STDIN, {'private_test_cases': packed({})}, 'not a list'),
  (PLAIN, {'tests': [{'input': 'x'}]}, "has no 'output'"),
  (PLAIN, {'tests': [{'input': '1', 'output': '2'}], 'entry_point': 'f'}, 'not a JSON list'),
  (PLAIN, {'test_code': 'assert f()'}, 'tests and test code'),
  (PLAIN, {'id': 7}, "'id' is 7"),
]


@pytest.mark.parametrize('good, change, reason', BAD, ids=[reason for _, _, reason in BAD])
def test_a_bad_row_is_left_out_with_its_reason(tmp_path, caplog, good, change, reason):
  path = written(tmp_path / 'p.jsonl', [good, good | change, good])
  assert len(list(read_problems(path))) == 2
  (record,) = caplog.records  # once, at the end
  assert '1 row left out' in record.message
  assert f'{path}, row 2: ' in record.message and reason in record.message
  with pytest.raises(ReadError, match='row 2: '):
    list(read_problems(path, strict=True))


@given(st.sampled_from(EVERY), st.data())
def test_no_value_of_any_field_raises_anything_else(row, data):
  known = next(f for f in FORMATS if f.needs <= row.keys())
  value = data.draw(VALUES)
  key = data.draw(st.sampled_from(sorted(row)))
  if key == 'input_output' and data.draw(st.booleans()):
    inner = st.sampled_from(['inputs', 'outputs', 'fn_name'])
    value = {'inputs': [[1]], 'outputs': [1], 'fn_name': 'f', data.draw(inner): value}
  elif key == 'public_test_cases' and data.draw(st.booleans()):
    value = [{'input': '1', 'output': '1', data.draw(st.sampled_from(['input', 'output'])): value}]
  if data.draw(st.booleans()):
    value = json.dumps(value)
  with contextlib.suppress(BadRow):
    problem = to_problem(rows_lib.Row(1, row | {key: value}), known)
    # What comes out can be judged as it is.
    Job('', problem.tests, problem.entry_point, problem.test_code)


def test_lines_that_are_no_rows(tmp_path):
  path = tmp_path / 'p.jsonl'
  good = json.dumps(PLAIN).encode()
  lines = [b'\xef\xbb\xbf' + good, b'', b'{"id": ', b'[1]', b'\xff', b'1' * 5000, good]
  path.write_bytes(b'\r\n'.join(lines))
  faults = Faults()
  assert [e.row for e in entries([path], faults)] == [1, 7]
  assert [f.row for f in faults.first] == [3, 4, 5, 6]
  assert 'a list, not an object' in str(faults)


def test_faults_are_counted_beyond_those_shown(tmp_path):
  path = written(tmp_path / 'p.jsonl', [PLAIN, *[{}] * 30])
  faults = Faults()
  assert len(list(entries([path], faults))) == 1
  assert faults.count == 30 and 'and 10 more' in str(faults)


def test_a_longer_row_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(rows_lib, 'MAX_ROW_BYTES', 1000)
  long = PLAIN | {'statement': 'x' * 5000}
  faults = Faults()
  path = written(tmp_path / 'p.jsonl', [PLAIN, long, PLAIN])
  assert [e.row for e in entries([path], faults)] == [1, 3]
  path = tmp_path / 'p.json'
  path.write_text(json.dumps([PLAIN, long, PLAIN]))
  monkeypatch.setattr(rows_lib, 'CHUNK', 100)
  assert [e.row for e in entries([path], faults)] == [1]
  assert [f.row for f in faults.first] == [2, 2]


@pytest.mark.parametrize('text', ['[{}, {"a" 1}, {}' + ' ' * 99 + ']', '[{}, {"a": 1', '[{}'])
def test_a_broken_array_ends_where_it_breaks(text):
  *good, last = rows_lib._array(io.StringIO(text))
  assert [row.value for row in good] == [{}]
  assert last.value is None and last.number == 2


def test_a_cut_gzip_file_ends_where_it_is_cut(tmp_path):
  rows = [PLAIN | {'statement': random.Random(i).randbytes(999).hex()} for i in range(200)]
  WRITERS['p.jsonl.gz'](tmp_path / 'p.jsonl.gz', rows)
  data = (tmp_path / 'p.jsonl.gz').read_bytes()
  (tmp_path / 'p.jsonl.gz').write_bytes(data[: len(data) // 2])
  faults = Faults()
  found = list(entries([tmp_path / 'p.jsonl.gz'], faults))
  assert 50 < len(found) < 150 and faults.count == 1 and 'cannot be read' in str(faults)


def test_an_unknown_format_names_what_it_saw(tmp_path):
  path = written(tmp_path / 'p.jsonl', [{'foo': 1, 'bar': 2}])
  with pytest.raises(ReadError, match=r"fields \['bar', 'foo'\].*name one of o1jax"):
    list(read_problems(path))
  with pytest.raises(ReadError, match='did you mean humaneval'):
    list(read_problems(path, format='human_eval'))


def test_a_forced_format(tmp_path):
  row = HUMANEVAL_ROW | {'id': 'x', 'statement': 'y'}
  assert only(tmp_path, row).id == 'x'
  assert only(tmp_path, row, format='humaneval').id == 'HumanEval/32'


# --- packed tests -----------------------------------------------------------------------


class Bomb:
  def __reduce__(self):
    return exec, ('import o1jax; o1jax.exploded = True',)


def packed_bytes(data):
  return base64.b64encode(zlib.compress(data)).decode()


HOSTILE = {
  'exec': pickle.dumps(Bomb()),
  'exec, protocol 0': pickle.dumps(Bomb(), 0),
  'a list': pickle.dumps(['text']),
  'a name': b'cos\nsystem\n.',
  'an instance': b"(S'ls'\nios\nsystem\n.",
  'two texts': b'\x8c\x01a\x8c\x01b.',
  'a number': pickle.dumps(1 << 100),
  'an extension': b'\x82\x01.',
  'an object of the caller': b'\x8c\x01aQ.',
  'the length of a terabyte': b'\x8d' + (1 << 40).to_bytes(8, 'little') + b'a.',
  'nothing': b'.',
  'no end': b'\x8c\x01a',
  'no pickle': b'[{"input": ""}]',
}


@pytest.mark.parametrize('data', HOSTILE.values(), ids=HOSTILE)
def test_a_pickle_of_anything_but_a_text_is_refused(tmp_path, data):
  with pytest.raises(BadRow, match='pickle'):
    unpacked(packed_bytes(data))
  row = LCB_STDIN | {'private_test_cases': packed_bytes(data)}
  assert len(list(read_problems(written(tmp_path / 'p.jsonl', [LCB_STDIN, row])))) == 1
  assert not hasattr(sys.modules['o1jax'], 'exploded')


@given(st.text(), st.integers(0, 5))
def test_a_pickled_text_is_found_in_every_protocol(text, protocol):
  assert pickled_text(pickle.dumps(text, protocol)) == text
  if protocol >= 3:
    assert pickled_text(pickle.dumps(text.encode(), protocol)) == text


@given(st.binary(max_size=60))
def test_any_bytes_give_a_text_or_a_reason(data):
  with contextlib.suppress(BadRow):
    assert isinstance(pickled_text(data), str)


def test_a_zip_bomb_is_not_unpacked():
  bomb = packed_bytes(pickle.dumps('0' * (64 << 20)))
  tracemalloc.start()
  try:
    with pytest.raises(BadRow, match='more than 1000000 bytes'):
      unpacked(bomb, limit=1_000_000)
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
  finally:
    tracemalloc.stop()


# --- folders and splits -----------------------------------------------------------------


@pytest.mark.parametrize(
  'names, split',
  [
    (['train.jsonl', 'test.jsonl'], 'test'),
    (['data/train-00000-of-00002.jsonl', 'data/validation-00000.jsonl'], 'dev'),
    (['test.jsonl', 'test2.jsonl', 'test6.jsonl'], 'test'),
    (['train/data-0.jsonl', 'test/data-0.jsonl', 'dataset_dict.json'], 'train'),
    (['openai_humaneval/test-00000.jsonl', '.cache/train.jsonl'], 'test'),
  ],
)
def test_splits_of_a_hub_folder(tmp_path, names, split):
  for name in names:
    written(tmp_path / name, [PLAIN])
  files = data_files(tmp_path)
  assert split in files and '' not in files
  kept = [n for n in names if not n.startswith('.') and n != 'dataset_dict.json']
  assert sum(map(len, files.values())) == len(kept)


def test_several_configurations_are_not_mixed(tmp_path):
  for name in ('full/train.jsonl', 'sanitized/train.jsonl'):
    written(tmp_path / name, [PLAIN])
  with pytest.raises(ReadError, match="'full', 'sanitized'; name the folder of one"):
    data_files(tmp_path)


def taco(i, text):
  return TACO_STDIN | {'question': f'{text} {i}'}


def words(i):
  """A statement of its own."""
  return ' '.join(random.Random(i).choices(WORDS, k=40))


WORDS = [f'word{i}' for i in range(3000)]


def test_load_split_reads_a_folder_of_o1jax_files(tmp_path):
  for split in ('train', 'dev', 'test'):
    written(tmp_path / f'{split}.jsonl', [small(split), small('twin')])
    assert load_split(str(tmp_path), split, 1, seed=0)[0].id == f'p{split}'
  # In our own files nothing is dropped, and a bad row is an error.
  assert len(load_split(str(tmp_path), 'train', 9, seed=0)) == 2
  written(tmp_path / 'dev.jsonl', [small(1), {'id': 'x'}])
  with pytest.raises(ValueError, match=r'dev.jsonl, row 2: has no .statement.'):
    load_split(str(tmp_path), 'dev', 9, seed=0)
  (tmp_path / 'train.jsonl').unlink()
  with pytest.raises(FileNotFoundError, match='none for train'):
    load_split(str(tmp_path), 'train', 9, seed=0)


def test_load_split_divides_one_file(tmp_path):
  path = written(tmp_path / 'p.jsonl', [taco(i, words(i)) for i in range(300)])
  found = {s: load_split(str(path), s, 999, seed=0) for s in ('train', 'dev', 'test')}
  ids = [p.id for problems in found.values() for p in problems]
  assert len(ids) == len(set(ids)) == 300
  assert all(15 < len(found[s]) < 50 for s in ('dev', 'test'))
  # The order of the rows says nothing about the split.
  path.write_text(''.join(reversed(path.read_text().splitlines(keepends=True))))
  assert {p.id for p in load_split(str(path), 'test', 999, seed=0)} == {p.id for p in found['test']}


def test_load_split_holds_out_what_a_folder_lacks(tmp_path):
  written(tmp_path / 'train.jsonl', [taco(i, words(i)) for i in range(200)])
  written(tmp_path / 'test.jsonl', [taco(i, words(i)) for i in range(200, 220)])
  found = {s: load_split(str(tmp_path), s, 999, seed=0) for s in ('train', 'dev', 'test')}
  assert len(found['test']) == 20
  assert len(found['train']) + len(found['dev']) == 200 and 8 < len(found['dev']) < 40


def kept_id(folder):
  return next(read_problems(folder / 'test.jsonl')).id


def test_load_split_drops_twins_and_what_is_tested(tmp_path, caplog):
  story = words(0)
  written(tmp_path / 'test.jsonl', [taco(0, story), taco(0, story)])
  rows = [taco(1, words(1)), taco(2, words(1)), taco(3, f'{words(9)} {story} {words(8)}')]
  written(tmp_path / 'train.jsonl', [*rows, taco(4, words(4)), {'question': 1}])
  written(tmp_path / 'dev.jsonl', [taco(5, words(5))])
  kept = load_split(str(tmp_path), 'train', 9, seed=0)
  assert [p.statement[-1] for p in kept] == ['1', '4']
  dropped, left_out = sorted((r.message for r in caplog.records), key=len, reverse=True)
  assert '2 dropped' in dropped and 'resemblance 0.9' in dropped and 'containment 0.9' in dropped
  assert kept[0].id in dropped
  assert '1 row left out' in left_out and 'row 5' in left_out
  caplog.clear()
  assert len(load_split(str(tmp_path), 'test', 9, seed=0)) == 1  # one id, once
  assert f'test.jsonl, row 2: the id {kept_id(tmp_path)!r} was there before' in caplog.text


def test_load_split_without_problems_says_why(tmp_path):
  path = written(tmp_path / 'p.jsonl', [TACO_STDIN | {'input_output': ''}])
  with pytest.raises(ValueError, match=r"holds no problems for train.*\n.*has no 'inputs'"):
    load_split(str(path), 'train', 9, seed=0)
  with pytest.raises(FileNotFoundError, match='did you mean'):
    load_split(str(path) + 'x', 'train', 9, seed=0)


# --- near-duplicates --------------------------------------------------------------------


def as_problem(i, text):
  return Problem(f'q{i}', text)


def exact(a, b, signs):
  """Shared and all shingles of two texts, by sets of tuples."""
  sets = []
  for text in (a, b):
    cut = text.casefold()
    found = ''.join(f' {c} ' if not c.isalnum() else c for c in cut).split()
    found = found if signs else [w for w in found if w.isalnum()]
    n = min(overlap.WORDS, len(found))
    sets.append({tuple(found[i : i + n]) for i in range(len(found) - n + 1)} if found else set())
  return sets


TEXTS = st.lists(st.sampled_from(['a', 'b', 'C', '(', ',', 'dd']), max_size=30).map(' '.join)


@given(TEXTS, TEXTS, st.booleans())
def test_shingles_are_sets_of_runs(a, b, signs):
  left, right = exact(a, b, signs)
  hashed = [set(overlap.shingles(text, signs).tolist()) for text in (a, b)]
  assert [len(h) for h in hashed] == [len(left), len(right)]
  assert len(hashed[0] & hashed[1]) == len(left & right)


@given(TEXTS, TEXTS)
def test_resemblance_is_exact(a, b):
  unique = overlap.Unique(resemblance=1e-9)
  assert unique.drop(as_problem(0, a)) is None
  match = unique.drop(as_problem(1, b))
  left, right = exact(a, b, signs=True)
  if match is not None and left | right:
    assert match.similarity == pytest.approx(len(left & right) / len(left | right))
  if left == right and left:
    assert match is not None and match.similarity == 1


@given(TEXTS, TEXTS)
def test_containment_is_exact(told, tested):
  match = overlap.Evaluation([as_problem(0, tested)], 1e-9).drop(as_problem(1, told))
  left, right = exact(told, tested, signs=False)
  share = len(left & right) / len(right) if right else 0
  assert (match.similarity if match else 0) == pytest.approx(share)


def test_near_duplicates_are_found_among_many():
  rng, unique, missed, seen = random.Random(0), overlap.Unique(), [], 0
  for i in range(400):
    text = [rng.choice(WORDS) for _ in range(100)]
    assert unique.drop(as_problem(i, ' '.join(text))) is None
    for place in rng.sample(range(100), 3):
      text[place] = 'changed'
    twin = ' '.join(text)
    match = unique.drop(as_problem(f'{i}b', twin))
    seen += match is not None
    if match is not None and match.other != f'q{i}':
      missed.append(match)
  # Three changed words of a hundred touch at most 15 of 96 shingles: 81 / 111 = 0.73.
  assert seen == 400 and missed == []


def test_one_sign_tells_problems_apart_but_not_from_a_test():
  a, b = (
    f'brackets is a string of "{x}" and "{y}", say whether it closes' for x, y in ('<>', '()')
  )
  unique = overlap.Unique()
  assert unique.drop(as_problem(0, a)) is None and unique.drop(as_problem(1, b)) is None
  assert overlap.Evaluation([as_problem(0, a)]).drop(as_problem(1, b)).similarity == 1


def test_memory_of_the_index_does_not_grow_with_the_problems(monkeypatch):
  monkeypatch.setattr(overlap, '_CACHE_KIB', 256)
  unique, process, count = overlap.Unique(), psutil.Process(), 600
  for i in range(count + 100):
    if i == 100:  # what Python and NumPy keep is there by now
      before = process.memory_info().rss
    text = ' '.join(random.Random(i).choices(WORDS, k=5000))
    assert unique.drop(as_problem(i, text)) is None
  # The shingles alone are 8 bytes each.
  assert process.memory_info().rss - before < count * 5000 * 8 / 2


# --- O1-CODER's step labels -------------------------------------------------------------

STEP_TEXT = st.text(st.characters(blacklist_categories=['Cs']), max_size=30).map(str.strip)


@given(
  st.lists(st.tuples(st.sampled_from([1, 2]), STEP_TEXT), max_size=4),
  st.booleans(),
  st.floats(0, 1),
)
def test_step_labels_come_back(steps, final, value):
  path = [Step(action, text) for action, text in steps if not text.endswith('###')]
  path.append(Step(3, '```python\nprint(1)\n```') if final else Step(1, 'plan'))
  row = json.loads(json.dumps(o1coder.to_row('Do it.', path[:-1], path[-1], value)))
  label = o1coder.to_label(row)
  assert (*label.prefix, label.step) == tuple(path)
  assert label.value == value and label.visits == 1


@pytest.mark.parametrize(
  'change, reason',
  [
    ({'label': ['good']}, "label 'good'"),
    ({'label': [1.5]}, 'label 1.5'),
    ({'label': [True]}, 'label True'),
    ({'label': [1, 0]}, 'has 2 values'),
    ({'response': 'no steps'}, 'holds no step'),
    ({'has_final_step': True}, "'has_final_step' is True"),
  ],
)
def test_bad_step_labels(change, reason):
  row = o1coder.to_row('Do it.', [], Step(1, 'plan'), 'negative')
  assert o1coder.to_label(row).value == 0
  with pytest.raises(BadRow, match=reason):
    o1coder.to_label(row | change)


def test_steps_of_a_released_response():
  response = 'Step 1: <Action 1> plan\n\n### Step 2: <Action 2> refine  \nmore\n\n###'
  assert o1coder.parse_response(response) == [Step(1, 'plan'), Step(2, 'refine  \nmore')]
  coded = '### Step 1: <Action 2> code\n```python\nprint(1)\n```\n\n### Step 2: <Action 2> no'
  (step,) = o1coder.parse_response(coded)
  assert step.terminal and 'print(1)' in step.text


# --- real files -------------------------------------------------------------------------


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


@pytest.mark.parametrize('path', PRM, ids=lambda p: p.name)
def test_real_step_labels(path):
  if not path.exists():
    pytest.skip(f'{path} is not there')
  labels = list(o1coder.read_labels(path, Faults(strict=True)))
  raw = json.loads(path.read_text())
  assert len(labels) == len(raw) == 5
  for label, row in zip(labels, raw, strict=True):
    assert label.step.terminal == row['has_final_step']
    assert [s.action for s in (*label.prefix, label.step)][:2] == [1, 2]
    assert label.value == {'positive': 1, 'negative': 0}.get(row['label'][0], row['label'][0])
  assert labels[0].problem_id == labels[1].problem_id
