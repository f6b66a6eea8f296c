"""Programs to verdicts: the reference's time is the limit, and nothing runs twice."""

import pytest

from o1jax.data.steps import program_step
from o1jax.sandbox.pool import Pool
from o1jax.sandbox.protocol import Limits
from o1jax.stages.execute import Executor
from o1jax.types import (
  ACCEPTED,
  COMPILE_ERROR,
  TIME_LIMIT,
  WRONG_ANSWER,
  Problem,
  Step,
  TestCase,
)

DOUBLE = 'print(2 * int(input()))'
TESTS = (TestCase('1', '2'), TestCase('4', '8'))
PROBLEM = Problem('double', 'double it', tests=TESTS, solutions=(DOUBLE,))
SLOW = 'import time\nwhile time.process_time() < 0.6: pass\n' + DOUBLE


class Counting(Pool):
  jobs = 0

  def judge(self, jobs):
    jobs = list(jobs)
    self.jobs += len(jobs)
    return super().judge(jobs)


@pytest.fixture(scope='module')
def pool():
  with Counting(1, Limits(cpu_s=5.0)) as running:
    yield running


def statuses(executor, problem, *paths):
  got = executor.judge([problem] * len(paths), paths)
  return [None if v is None else v.status for v in got]


def test_cut_paths_and_missing_programs(pool):
  plan = Step(1, 'plan')
  prose = Step(3, 'no program here')
  got = statuses(Executor(pool), PROBLEM, (), (plan,), (plan, prose), (program_step(DOUBLE),))
  assert got == [None, None, COMPILE_ERROR, ACCEPTED]


def test_each_program_runs_once(pool):
  executor = Executor(pool)
  path = (program_step(DOUBLE),)
  statuses(executor, PROBLEM, path, path)
  before = pool.jobs
  assert statuses(executor, PROBLEM, path) == [ACCEPTED]
  assert pool.jobs == before


def test_a_program_is_handed_over_before_the_next_path_is_read(pool, monkeypatch):
  handed = []
  submit = pool.submit
  monkeypatch.setattr(pool, 'judge', lambda jobs: Pool.judge(pool, jobs))  # which lists none
  monkeypatch.setattr(pool, 'submit', lambda job: handed.append(job.code) or submit(job))
  paths = [(program_step(DOUBLE),), (), (program_step('print(2)'),)]

  def read():
    for i, path in enumerate(paths):
      assert len(handed) == 1 + min(i, 1)  # the reference, and the first path's program
      yield path

  got = Executor(pool).judge([PROBLEM] * 3, read())
  assert [v and v.status for v in got] == [ACCEPTED, None, WRONG_ANSWER]


def test_the_reference_sets_the_cpu_limit(pool):
  path = (program_step(SLOW),)
  assert statuses(Executor(pool), PROBLEM, path) == [TIME_LIMIT]
  untimed = Problem('no reference', '', tests=TESTS)
  assert statuses(Executor(pool), untimed, path) == [ACCEPTED]
  wrong = Problem('wrong reference', '', tests=TESTS, solutions=('print(0)',))
  assert statuses(Executor(pool), wrong, path) == [ACCEPTED]


def test_given_tests_take_the_place_of_assertions(pool):
  """Generated cases of a HumanEval problem; an empty tuple leaves it with its own assertions."""
  code = 'def add(x):\n    return x + 1'
  problem = Problem(
    'add',
    '',
    entry_point='add',
    solutions=(code,),
    test_code='def check(candidate):\n    assert candidate(1) == 2\ncheck(add)',
  )
  wrong = (TestCase('[1]', '3', origin='tcg'),)
  path = (program_step(code),)
  own, generated = Executor(pool).judge([problem] * 2, [path] * 2, [(), wrong])
  assert own.status == ACCEPTED and len(own.tests) == 1
  assert generated.status == WRONG_ANSWER
