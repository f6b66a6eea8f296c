"""The judge, with children that are made up. No process is started."""

import json

import pytest

from o1jax import types
from o1jax.sandbox import wire
from o1jax.sandbox.judge import HarnessFailure, Reply, judge
from o1jax.sandbox.protocol import Job, Limits
from o1jax.types import TestCase

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
