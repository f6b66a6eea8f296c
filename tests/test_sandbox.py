"""The sandbox's pure parts: comparing, reading jobs, filters. No process is started."""

import concurrent.futures
import json
import math
import sys

import pytest

from o1jax import types
from o1jax.sandbox import codec, compare, seccomp, syscalls
from o1jax.sandbox.__main__ import parse_job
from o1jax.sandbox.judge import isolated
from o1jax.sandbox.protocol import Job, Limits
from o1jax.types import TestCase, TestResult, Verdict

TESTS = tuple(TestCase(str(i), str(2 * i)) for i in range(5))
LIMITS = Limits(cpu_s=1.0)


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
