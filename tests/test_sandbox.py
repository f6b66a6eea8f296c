"""The sandbox's pure parts: encoding, comparing, judging, reading jobs. No process is started."""

import concurrent.futures
import contextlib
import json
import math
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from o1jax import types
from o1jax.sandbox import codec, compare, seccomp, syscalls, wire
from o1jax.sandbox.__main__ import parse_job
from o1jax.sandbox.judge import HarnessFailure, Reply, isolated, judge
from o1jax.sandbox.protocol import Job, Limits
from o1jax.types import TestCase, TestResult, Verdict

SCALARS = st.none() | st.booleans() | st.integers() | st.text() | st.binary() | st.floats()
KEYS = st.booleans() | st.integers() | st.text() | st.tuples(st.integers(), st.text())
PLAIN = st.recursive(
  SCALARS,
  lambda inner: (
    st.lists(inner)
    | st.tuples(inner, inner)
    | st.dictionaries(KEYS, inner)
    | st.frozensets(KEYS).map(set)
  ),
  max_leaves=12,
)


def same(a, b):
  """Equal values of equal types, all the way down; NaN is itself."""
  if type(a) is not type(b):
    return False
  if isinstance(a, float):
    return math.isnan(b) if math.isnan(a) else (a, math.copysign(1, a)) == (b, math.copysign(1, b))
  if isinstance(a, list | tuple):
    return len(a) == len(b) and all(map(same, a, b))
  if isinstance(a, dict):
    return list(map(repr, a)) == list(map(repr, b)) and all(map(same, a.values(), b.values()))
  return a == b


@given(PLAIN)
def test_codec_keeps_values_and_types(value):
  assert same(codec.decode(codec.encode(value)), value)


def test_codec_writes_subclasses_as_what_they_hold():
  class Liar(int):
    def __eq__(self, other):
      return True

    __hash__ = int.__hash__
    __index__ = __add__ = __int__ = lambda self, *_: 99

  class Shelf(list):
    def __iter__(self):
      return iter('lies')

  decoded = codec.decode(codec.encode([Liar(5), Shelf([1, 2])]))
  assert decoded == [5, [1, 2]]
  assert [type(x) for x in decoded] == [int, list]


def test_codec_refuses_what_is_not_plain():
  cycle = []
  cycle.append(cycle)
  for value in (cycle, object(), int, (i for i in ()), {1: object()}):
    with pytest.raises(codec.NotPlain):
      codec.encode(value)
  with pytest.raises(codec.TooLarge):
    codec.encode([0] * (codec.MAX_NODES + 1))


@given(st.binary() | st.text().map(str.encode) | PLAIN.map(lambda v: repr(v).encode()))
def test_codec_reads_hostile_bytes_or_raises_value_error(payload):
  with contextlib.suppress(ValueError):
    codec.decode(payload)


@pytest.mark.parametrize(
  'payload',
  [
    '{"t":1}',
    '{"i":"zz"}',
    '{"f":"1"}',
    '{"s":[[1]]}',
    '{"r":0}',
    '{}',
    '{"t":[],"s":[]}',
    '[' * 9**5,
  ],
)
def test_codec_refuses_wrong_tags(payload):
  with pytest.raises(ValueError, match='canonical'):
    codec.decode(payload.encode())


@given(st.binary(max_size=200), st.integers(0, 5))
def test_records_never_fail_and_times_are_finite(report, limit):
  records = wire.unpack_records(report, limit)
  assert len(records) <= limit
  for kind, cpu_s, wall_s, _ in records:
    assert 0 <= kind <= wire.BAIL and 0 <= cpu_s < 1e6 and 0 <= wall_s < 1e6


def test_records_round_trip_and_end_at_rubbish():
  good = wire.pack_record(wire.OUTPUT, 0.5, 1.0, b'abc')
  assert wire.unpack_records(good + good[:-1], 9) == [(wire.OUTPUT, 0.5, 1.0, b'abc')]
  assert wire.unpack_records(wire.pack_record(wire.ERROR, -1.0, math.nan, b''), 9)[0][1:3] == (0, 0)


@pytest.mark.parametrize(
  ('printed', 'expected', 'right'),
  [
    ('1 2\n3', '1 2\n3\n', True),
    (' 1\t2 \r\n\n3\n\n', '1 2\n3', True),
    ('1\n2\n3', '1 2\n3', False),
    ('2 1', '1 2', False),
    ('', '', True),
    ('', '0', False),
    ('0.3333333', '0.33333333', True),
    ('0.334', '0.333', False),
    ('1', '1.0', True),
    ('1.0', '1', False),
    ('1000001', '1000000', False),
    ('nan', '1.5', False),
    ('1_0.0', '10.0', False),
    ('Yes', 'YES', False),
    ('1e3', '1000.0', True),
  ],
)
def test_stdout(printed, expected, right):
  assert compare.stdout_matches(printed.encode(), expected, 1e-6) is right


@pytest.mark.parametrize(
  ('value', 'expected', 'right'),
  [
    (1, '1', True),
    (True, '1', False),
    (1.0, '1', False),
    (1, '1.0', False),
    (0.1 + 0.2, '0.3', True),
    (math.nan, 'NaN', True),
    ((1, [2]), '[1, [2]]', True),
    ({1: 'a', None: 2}, '{"1": "a", "null": 2}', True),
    ({1: 'a'}, '{"1": "a", "2": "b"}', False),
    ({1, 2}, '[1, 2]', False),
    ([1, 2], '[2, 1]', False),
    ('1', '1', False),
    (None, 'null', True),
    (b'a', '"a"', False),
    ({(1, 2): 3}, '{"(1, 2)": 3}', False),
  ],
)
def test_values(value, expected, right):
  assert compare.result_matches(codec.encode(value), expected, 1e-6) is right


@pytest.mark.parametrize(
  ('code', 'alone'),
  [
    ('import sys\nfrom math import *\nprint(sum(map(int, sys.stdin)))', True),
    ('class A:\n  def __init__(self): self.n = 1', True),
    ('import os\nprint(1)', False),
    ('import sys\nsys.stdout = None', False),
    ('import math as m\nm.pi = 3', False),
    ('import math\ndel math.pi', False),
    ('exec("1")', False),
    ('import random\nrandom.seed(1)', False),
    ('print(open(0).read())', False),
    ('def f(', False),
  ],
)
def test_isolated(code, alone):
  assert isolated(code) is alone


# --- the judge, with children that are made up ------------------------------------------

TESTS = tuple(TestCase(str(i), str(2 * i)) for i in range(5))
LIMITS = Limits(cpu_s=1.0)


def reply(records=(), **kwargs):
  values = {
    'stdout': b'', 'stderr': '', 'stderr_full': False, 'exit': 0, 'signal': 0,
    'killed': wire.NOTHING, 'cpu_s': 0.0, 'wall_s': 0.0, 'rss_bytes': 0,
  }  # fmt: skip
  return Reply(records=list(records), **{**values, **kwargs})


class Children:
  """Answers requests from the outputs of a batch and of single runs; counts them."""

  def __init__(self, batch, strict=None, **ending):
    self.batch, self.strict, self.ending = batch, strict or {}, ending
    self.asked = []

  def __call__(self, request, test_code=None):
    self.asked.append((request['mode'], request['inputs']))
    assert not any(test.output in json.dumps(request) for test in TESTS if len(test.output) > 1)
    if request['mode'] == wire.STRICT:
      given = self.strict[request['inputs'][0]]
      return given if isinstance(given, Reply) else reply(stdout=given.encode())
    records = [
      (wire.OUTPUT, 0.1, 0.1, self.batch[text].encode())
      for text in request['inputs'] if text in self.batch
    ]  # fmt: skip
    return reply(records, **self.ending)

  @property
  def modes(self):
    return [mode for mode, _ in self.asked]


RIGHT = {str(i): str(2 * i) for i in range(5)}
WRONG = {str(i): str(2 * i + 1) for i in range(5)}
SHARES_STATE = 'import os\n'


def test_one_batch_is_enough_for_a_right_program():
  children = Children(RIGHT)
  verdict = judge(Job(SHARES_STATE, TESTS), LIMITS, children)
  assert (verdict.status, verdict.passed, children.modes) == (types.ACCEPTED, 5, [wire.BATCH])


def test_one_batch_is_enough_for_a_program_that_is_wrong_everywhere():
  children = Children(WRONG)
  verdict = judge(Job(SHARES_STATE, TESTS), LIMITS, children)
  assert (verdict.status, verdict.passed, children.modes) == (types.WRONG_ANSWER, 0, [wire.BATCH])


def test_failures_of_an_isolated_program_stand():
  children = Children(RIGHT | {'3': 'x'})
  verdict = judge(Job('print(1)', TESTS), LIMITS, children)
  assert (verdict.status, verdict.passed, children.modes) == (types.WRONG_ANSWER, 4, [wire.BATCH])


def test_failures_beside_passes_run_again_alone():
  children = Children(RIGHT | {'3': 'x', '4': 'y'}, {'3': '6', '4': '9'})
  verdict = judge(Job(SHARES_STATE, TESTS), LIMITS, children)
  assert children.asked[1:] == [(wire.STRICT, ['3']), (wire.STRICT, ['4'])]
  assert [t.status for t in verdict.tests] == [types.ACCEPTED] * 4 + [types.WRONG_ANSWER]


def test_an_unclean_exit_accepts_nothing():
  children = Children(RIGHT, RIGHT | {'2': reply(stdout=b'4', exit=1)}, exit=1)
  verdict = judge(Job(SHARES_STATE, TESTS), LIMITS, children)
  assert children.modes == [wire.BATCH] + [wire.STRICT] * 5
  assert (verdict.status, verdict.passed) == (types.RUNTIME_ERROR, 4)


def test_a_batch_goes_on_behind_the_test_that_ended_it():
  children = Children({k: v for k, v in RIGHT.items() if k != '2'}, killed=wire.CPU, exit=-1)

  def until_the_gap(request, test_code=None):
    gap = request['inputs'].index('2') if '2' in request['inputs'] else None
    whole = Children(RIGHT)(request)
    children.asked.append((request['mode'], request['inputs']))
    return whole if gap is None else reply(whole.records[:gap], killed=wire.CPU, exit=-1)

  verdict = judge(Job('print(1)', TESTS), LIMITS, until_the_gap)
  assert [t.status for t in verdict.tests].index(types.TIME_LIMIT) == 2
  assert verdict.passed == 4


@pytest.mark.parametrize('code', ['print(1)', SHARES_STATE])
def test_a_batch_has_as_many_tests_on_stdin_as_a_child_has_descriptors(monkeypatch, code):
  monkeypatch.setattr(wire, 'BATCH_INPUTS', 2)
  children = Children(RIGHT | {'3': 'x'}, {'3': 'x'})
  verdict = judge(Job(code, TESTS), LIMITS, children)
  assert children.asked[:3] == [(wire.BATCH, part) for part in (['0', '1'], ['2', '3'], ['4'])]
  assert (verdict.passed, len(children.asked)) == (4, 4 if code == SHARES_STATE else 3)


def test_after_some_timeouts_the_rest_does_not_run():
  late = reply(killed=wire.CPU, exit=-1)
  children = Children({}, dict.fromkeys(RIGHT, late), killed=wire.CPU, exit=-1)
  verdict = judge(Job(SHARES_STATE, TESTS), Limits(timeouts=2), children)
  assert children.modes.count(wire.STRICT) == 2
  assert {t.status for t in verdict.tests} == {types.TIME_LIMIT}


@pytest.mark.parametrize(
  ('ended', 'status'),
  [
    ({'signal': 31, 'exit': -1}, types.FORBIDDEN),
    ({'signal': 11, 'exit': -1}, types.RUNTIME_ERROR),
    ({'killed': wire.WALL, 'exit': -1}, types.TIME_LIMIT),
    ({'killed': wire.FLOOD, 'exit': -1}, types.OUTPUT_LIMIT),
    ({'rss_bytes': 1 << 40}, types.MEMORY_LIMIT),
    ({'stderr_full': True}, types.OUTPUT_LIMIT),
    ({'cpu_s': 1.5}, types.TIME_LIMIT),
    ({'exit': 3}, types.RUNTIME_ERROR),
  ],
)
def test_endings(ended, status):
  children = Children({}, {'0': reply(stdout=b'0', **ended)}, exit=1)
  assert judge(Job('', TESTS[:1]), LIMITS, children).status == status


def test_a_harness_failure_is_not_a_verdict():
  def ask(request, test_code=None):
    raise HarnessFailure('gone')

  with pytest.raises(HarnessFailure):
    judge(Job('', TESTS), LIMITS, ask)


# --- what callers hand over ---------------------------------------------------------------


@pytest.mark.parametrize('change', [{'cpu_s': 0}, {'memory_bytes': -1}, {'float_tolerance': 2}])
def test_limits_name_the_value(change):
  ((name, value),) = change.items()
  with pytest.raises(ValueError, match=rf'limits\.{name}={value}'):
    Limits(**change)


def test_headroom_is_three_times_what_a_correct_program_needs():
  reference = Verdict(types.ACCEPTED, (TestResult(types.ACCEPTED, 0.2), TestResult(types.ACCEPTED)))
  assert Limits().with_headroom(reference).cpu_s == pytest.approx(0.6)
  assert Limits().with_headroom(Verdict(types.ACCEPTED)).cpu_s == 0.1


@pytest.mark.parametrize(
  'fields',
  [
    {'tests': TESTS, 'test_code': 'assert f()'},
    {'test_code': 'assert ('},
    {'tests': (TestCase("['a']", '1'),), 'entry_point': 'f'},
    {'tests': (TestCase('1', '1'),), 'entry_point': 'f'},
    {'tests': (TestCase('[1]', 'True'),), 'entry_point': 'f'},
  ],
)
def test_a_job_that_nothing_could_pass_is_refused(fields):
  with pytest.raises(ValueError, match=r'job|Python|JSON'):
    Job('', **fields)


def test_a_line_becomes_a_job():
  test = {'input': [1], 'output': {'a': 2}}
  line = {'id': 7, 'code': 'c', 'entry_point': 'f', 'tests': [test], 'limits': {'cpu_s': 2}}
  job_id, job = parse_job(json.dumps(line), LIMITS)
  assert job_id == 7 and job.limits == Limits(cpu_s=2)
  assert job.tests == (TestCase('[1]', '{"a": 2}'),)


@pytest.mark.parametrize(
  ('line', 'said'),
  [
    ('{', 'Expecting'),
    ('[]', 'must be an object'),
    ('{"code": 1}', '"code"'),
    ('{"code": "", "test": []}', "did you mean 'tests'"),
    ('{"code": "", "tests": [{"input": "1"}]}', 'tests[0]'),
    ('{"code": "", "tests": [{"input": 1, "output": "1"}]}', 'tests[0].input must be text'),
    ('{"code": ""}', 'needs "tests" or "test_code"'),
    ('{"code": "", "tests": [{"input": "", "output": ""}], "limits": {"cpu": 1}}', "'cpu_s'"),
  ],
)
def test_a_wrong_line_says_what_is_wrong(line, said):
  with pytest.raises(ValueError) as caught:
    parse_job(line, LIMITS)
  assert said in str(caught.value)


# --- the filter's own language ---------------------------------------------------------------


def run_filter(code, nr, args=(0,) * 6, arch=None, machine='x86_64'):
  """What the kernel would answer: a small interpreter of the instructions that are used."""
  arch = syscalls.AUDIT_ARCH[machine] if arch is None else arch
  data = nr.to_bytes(4, 'little') + arch.to_bytes(4, 'little') + bytes(8)
  data += b''.join((arg % 2**64).to_bytes(8, 'little') for arg in args)
  at = value = 0
  while True:
    op, yes, no, k = (
      int.from_bytes(code[8 * at : 8 * at + 2], 'little'), code[8 * at + 2], code[8 * at + 3],
      int.from_bytes(code[8 * at + 4 : 8 * at + 8], 'little'),
    )  # fmt: skip
    at += 1
    if op == 0x20:
      value = int.from_bytes(data[k : k + 4], 'little')
    elif op == 0x54:
      value &= k
    elif op in (0x15, 0x35):
      at += yes if (value == k if op == 0x15 else value >= k) else no
    else:
      assert op == 0x06
      return k


ALLOW, KILL = 0x7FFF0000, 0x80000000


@pytest.mark.parametrize('machine', list(syscalls.AUDIT_ARCH))
def test_filters_do_what_they_say(machine):
  number = syscalls.numbers(machine)
  large, small = seccomp.zygote_filter(machine, files=True), seccomp.child_filter(machine, 77)

  def large_says(name, *args):
    return run_filter(large, number[name], (*args, *(0,) * 6)[:6], machine=machine)

  def small_says(name, *args):
    return run_filter(small, number[name], (*args, *(0,) * 6)[:6], machine=machine)

  assert large_says('read') == large_says('openat') == large_says('mmap') == ALLOW
  assert large_says('execve') == large_says('socket') == large_says('fchmodat') == KILL
  assert large_says('mkdirat') & 0xFFFF == 30 and large_says('clone3') & 0xFFFF == 38
  assert large_says('socketpair', 1) == ALLOW and large_says('socketpair', 2) == KILL
  assert large_says('sendto', 3) == ALLOW
  assert large_says('sendto', 3, 0, 0, 0, 1 << 40) == KILL
  assert run_filter(large, number['read'], arch=0x40000003) == KILL
  assert run_filter(large, number['read'] | 0x40000000, machine=machine) == KILL
  closed = seccomp.zygote_filter(machine, files=False)
  assert run_filter(closed, number['openat'], machine=machine) & 0xFFFF == 13

  thread = 0x3D0F00
  assert small_says('clone', thread) == ALLOW
  for flags in (17, 0, thread | 0x10000000, thread | 0x4000, thread & ~0x10000):
    assert small_says('clone', flags) == KILL
  assert small_says('kill', 77) == small_says('tgkill', 77) == ALLOW
  assert small_says('kill', 1) == small_says('kill', 0) == small_says('kill', -1) == KILL
  assert small_says('prlimit64', 0, 7, 0) == ALLOW
  assert (
    small_says('prlimit64', 0, 7, 1 << 33) & 0xFFFF == 0 != small_says('prlimit64', 0, 7, 1 << 33)
  )
  assert small_says('fcntl', 3, 4) == ALLOW and small_says('fcntl', 3, 8) & 0xFFFF == 1
  assert small_says('read') == ALLOW


def test_programs_are_parsed_by_many_threads_at_once():
  source = 'def solve(a):\n  return ' + ' + '.join(f'(a[{i}] * {i})' for i in range(300))
  before = sys.getswitchinterval()
  sys.setswitchinterval(1e-6)
  try:
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
      assert all(threads.map(isolated, [source] * 400))
  finally:
    sys.setswitchinterval(before)
