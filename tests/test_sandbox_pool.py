"""The pool with real zygotes: verdicts, failures, layers that do not hold."""

import errno
import fcntl
import functools
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest
from sandbox_cases import ECHO, LIMITS, RIGHT, WRONG

from o1jax import types
from o1jax.sandbox import Job, Limits, Pool, SandboxError, pool, wire, zygote
from o1jax.sandbox.judge import HarnessFailure
from o1jax.types import TestCase


@pytest.fixture(scope='module')
def sandbox():
  with Pool(2, LIMITS) as running:
    yield running


def test_verdicts_come_in_order_with_times(sandbox):
  verdicts = sandbox.judge([RIGHT, WRONG] * 10)
  assert [v.status for v in verdicts] == [types.ACCEPTED, types.WRONG_ANSWER] * 10
  assert all(0 < t.cpu_s < 0.5 and t.wall_s > 0 for v in verdicts for t in v.tests)


READERS = {  # each prints the first line and leaves the second
  'input': 'print(input())',
  'readline': 'import sys\nprint(sys.stdin.readline())',
  'binary readline': 'import sys\nprint(sys.stdin.buffer.readline().decode())',
  'peek': 'import sys\nprint(sys.stdin.buffer.peek().decode().split("\\n")[0])',
  'iterator': 'import sys\nprint(next(sys.stdin))',
  'open(0)': 'print(open(0).readline())',
  'os.read': 'import os\nprint(os.read(0, 99).decode().split("\\n")[0])',
  'closes it': 'import sys\nprint(input())\nsys.stdin.close()',
}


def test_each_test_of_a_batch_reads_its_own_input(sandbox):
  many = wire.BATCH_INPUTS * 2 + 3
  tests = tuple(TestCase(f'{i} x\nrest {i}\n', f'{i} x') for i in range(many))
  verdicts = sandbox.judge([Job(code, tests) for code in READERS.values()])
  passed = dict(zip(READERS, (v.passed for v in verdicts), strict=True))
  assert passed == dict.fromkeys(READERS, many)


def test_stdin_is_sealed_in_every_test_of_a_batch(sandbox):
  write = """
    import fcntl, os
    for act in (lambda: os.pwrite(0, b'x', 0), lambda: os.ftruncate(0, 0),
                lambda: os.ftruncate(0, 99)):
      try: act()
      except OSError as e: print(e.errno, end=' ')
    print(fcntl.fcntl(0, fcntl.F_GET_SEALS))
  """
  seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
  said = f'{errno.EPERM} {errno.EPERM} {errno.EPERM} {seals}'
  job = Job(textwrap.dedent(write), tuple(TestCase(f'{i}', said) for i in range(3)))
  call = Job(
    textwrap.dedent(f"""
      import fcntl
      def f(n): return fcntl.fcntl(0, {fcntl.F_GET_SEALS})
    """),
    tuple(TestCase(f'[{i}]', str(seals)) for i in range(3)),
    'f',
  )
  assert [v.passed for v in sandbox.judge([job, call])] == [3, 3]


def test_stderr_is_the_end_of_the_traceback(sandbox):
  (verdict,) = sandbox.judge([Job('def f():\n  return 1 / 0\nf()', ECHO)])
  assert verdict.status == types.RUNTIME_ERROR
  assert 'solution.py", line 2' in verdict.stderr and 'ZeroDivisionError' in verdict.stderr
  assert 'sandbox' not in verdict.stderr


def test_each_assert_counts(sandbox):
  (verdict,) = sandbox.judge(
    [Job('def f(n): return n % 3', (), 'f', 'assert f(1) == 1\n' * 2 + 'assert f(4) == 4')]
  )
  assert (verdict.status, verdict.passed, len(verdict.tests)) == (types.WRONG_ANSWER, 2, 3)


def test_a_job_without_tests_is_compiled(sandbox):
  verdicts = sandbox.judge([Job('x = 1'), Job('x = ')])
  assert [v.compiled for v in verdicts] == [True, False]


def test_a_job_may_bring_its_own_limits(sandbox):
  slow = 'x = sum(range(30_000_000))\nprint(input())'
  own = Limits(cpu_s=20.0)
  verdicts = sandbox.judge(
    [Job(slow, ECHO[:1], limits=Limits(cpu_s=0.05)), Job(slow, ECHO[:1], limits=own)]
  )
  assert [v.status for v in verdicts] == [types.TIME_LIMIT, types.ACCEPTED]


def test_big_inputs_reach_the_program(sandbox):
  text = 'x' * (12 << 20)
  job = Job('import sys\nprint(len(sys.stdin.read()))', (TestCase(text, str(12 << 20)),))
  strict = Job('import os, sys\nprint(len(sys.stdin.read()), flush=True)\nos._exit(0)', job.tests)
  assert [v.status for v in sandbox.judge([job, strict])] == [types.ACCEPTED] * 2


def test_the_caller_keeps_nothing(sandbox):
  sandbox.judge([RIGHT] * 4)
  before = len(os.listdir('/proc/self/fd'))
  sandbox.judge([RIGHT, WRONG, Job('def f(): return 1', (), 'f', 'assert f() == 1')] * 20)
  assert len(os.listdir('/proc/self/fd')) == before


def test_processes_end_with_the_pool():
  children = lambda: set(psutil.Process().children())  # noqa: E731
  before = children()
  with Pool(1, LIMITS) as running:
    started = children() - before
    assert started
    running.judge([RIGHT])
  with pytest.raises(SandboxError, match='closed'):
    running.submit(RIGHT)
  assert not started & children()


def test_a_zygote_dies_with_its_caller():
  code = (
    'import os\nfrom o1jax.sandbox import zygote\n'
    'one, _ = zygote.strongest()\nprint(one.process.pid, flush=True)\n'
    'os.kill(os.getpid(), 9)'
  )
  run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
  assert run.returncode == -signal.SIGKILL
  stat = Path(f'/proc/{int(run.stdout)}/stat')
  for _ in range(100_000):
    if not stat.exists() or stat.read_text().rpartition(')')[2].split()[0] == 'Z':
      return
  pytest.fail('the zygote is still there')


# --- failures of the sandbox --------------------------------------------------------------


def test_a_lost_zygote_is_replaced_and_the_job_judged():
  with Pool(1, LIMITS) as running:
    asked = zygote.Zygote.ask
    lost = []

    def ask(self, request, test_code=None):
      if len(lost) < 2:
        lost.append(self.process.pid)
        self.process.kill()
        self.process.wait()
      return asked(self, request, test_code)

    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(zygote.Zygote, 'ask', ask)
      assert running.submit(RIGHT).result().status == types.ACCEPTED
    assert len(set(lost)) == 2


def test_three_failures_mask_the_sample_and_many_stop_the_run():
  def ask(self, request, test_code=None):
    raise HarnessFailure('made to fail')

  with Pool(1, LIMITS) as running, pytest.MonkeyPatch.context() as patch:
    patch.setattr(zygote.Zygote, 'ask', ask)
    patch.setattr(pool, '_MASKED_AT_LEAST', 2)
    verdict = running.submit(WRONG).result()
    assert verdict.status == types.SANDBOX_FAILURE and verdict.masked and not verdict.tests
    with pytest.raises(SandboxError, match=r'2 of 2 programs got no verdict.*made to fail'):
      running.judge([WRONG, RIGHT])


SABOTAGE = {
  'landlock': ('AB', 'import o1jax.sandbox.landlock as m; m.restrict = lambda rules: None'),
  'capabilities': ('A', 'import o1jax.sandbox.libc as m; m.drop_capabilities = lambda: None'),
  'not dumpable': (
    'ABC',
    'import o1jax.sandbox.libc as m; old = m.prctl; '
    'm.prctl = lambda o, *a: old(o, *((1,) if o == 4 else a))',
  ),
  'seccomp': (
    'ABC',
    'import o1jax.sandbox.seccomp as m; m.ChildFilter.install = lambda self, pid: None',
  ),
  'files': (
    'C',
    'import o1jax.sandbox.seccomp as m; old = m.zygote_filter; '
    'm.zygote_filter = lambda machine, files: old(machine, True)',
  ),
  'limits': (
    'ABC',
    'import o1jax.sandbox.confine as m; m.Confinement.set_limits = lambda self, request: None',
  ),
  'network namespace': (
    'A',
    'import o1jax.sandbox.namespaces as m; m._APART &= ~m.NEWNET',
  ),
  'descriptors': ('ABC', 'import os; os.closerange = lambda a, b: os.close(a)'),
}


@functools.cache
def why_unavailable(tier):
  try:
    zygote.Zygote(tier).close()
  except zygote.Unavailable as e:
    return str(e)
  return ''


@pytest.mark.parametrize(
  ('layer', 'tier'), [(layer, tier) for layer, (tiers, _) in SABOTAGE.items() for tier in tiers]
)
def test_a_layer_that_does_not_hold_is_found_out(layer, tier, monkeypatch):
  boot = zygote._BOOT.replace('from o1jax', f'\n{SABOTAGE[layer][1]}\nfrom o1jax', 1)
  if reason := why_unavailable(tier):
    pytest.skip(f'tier {tier} is not to be had here: {reason}')
  monkeypatch.setattr(zygote, '_BOOT', boot)
  with pytest.raises(SandboxError, match=f'does not stop: .*{layer}'):
    zygote.Zygote(tier)


def test_a_layer_that_stops_applying_stops_the_run(monkeypatch):
  monkeypatch.setattr(pool, '_CHECK_EVERY', 4)
  with Pool(1, LIMITS) as running:
    running.judge([RIGHT] * 6)
    layers_of = zygote._layers_of
    broken = {'layer': 'seccomp', 'act': 'fork', 'blocked': False, 'how': 'allowed'}
    monkeypatch.setattr(zygote, '_layers_of', lambda probes, tier: layers_of([broken], tier))
    with pytest.raises(SandboxError, match='does not stop: seccomp: fork'):
      running.judge([RIGHT] * 6)
    with pytest.raises(SandboxError, match='does not stop'):
      running.submit(RIGHT)


def test_a_wrong_canary_stops_the_pool(monkeypatch):
  from o1jax.sandbox import canary

  monkeypatch.setattr(canary, '_CASES', ((WRONG, types.ACCEPTED),))
  with pytest.raises(SandboxError, match='canary is judged wrong_answer, not accepted'):
    Pool(1, LIMITS)


def test_without_a_tier_the_pool_refuses_unless_told_in_words(monkeypatch):
  with pytest.raises(SandboxError, match='no tier of the sandbox'):
    Pool(1, LIMITS, tiers=())
  with pytest.raises(ValueError, match=r'allow_unsafe=.yes. must be'):
    Pool(1, LIMITS, tiers=(), allow_unsafe='yes')
  with Pool(1, LIMITS, tiers=(), allow_unsafe=pool.ALLOW_UNSAFE) as running:
    assert running.tier == 'unsafe' and not running.layers
    assert running.submit(RIGHT).result().status == types.ACCEPTED


def test_no_workers_is_an_error():
  with pytest.raises(ValueError, match='workers=0'):
    Pool(0)


def test_jax_is_not_imported():
  code = (
    'import sys\nfrom o1jax.sandbox import Pool\nfrom o1jax.sandbox.__main__ import main\n'
    'print([m for m in sys.modules if m.partition(".")[0] in ("jax", "numpy", "flax")])'
  )
  run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  assert run.stdout.strip() == '[]'
