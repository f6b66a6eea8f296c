"""Bad rows are left out with a reason, and packed tests run nothing."""

import base64
import contextlib
import importlib
import io
import json
import pickle
import random
import sys
import tracemalloc
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reader_cases import (
  APPS_CALL,
  EVERY,
  HUMANEVAL_ROW,
  LCB_CALL,
  LCB_STDIN,
  MBPP_ROW,
  PLAIN,
  TACO_STDIN,
  VALUES,
  WRITERS,
  only,
  packed,
  written,
)

from o1jax.data.readers import (
  FORMATS,
  Faults,
  ReadError,
  entries,
  read_problems,
)
from o1jax.data.readers.faults import BadRow
from o1jax.data.readers.livecodebench import pickled_text, unpacked
from o1jax.data.readers.read import to_problem
from o1jax.sandbox import Job

rows_lib = importlib.import_module('o1jax.data.readers.rows')


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
