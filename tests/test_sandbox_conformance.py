"""The conformance corpus of tests/sandbox, in each tier, as root and as a user.

A run attacks the sandbox, so it happens in a process of its own, after the pool's probes.
"""

import glob
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CORPUS = Path(__file__).parent / 'sandbox'
ROOT = Path(__file__).parents[1]
NOBODY = 65534


def is_public(path):
  """Whether every user may read a path."""
  path = Path(path).resolve()
  return all(p.stat().st_mode & 0o001 for p in (path, *path.parents))


def public_python():
  """An interpreter that any user may run, or None: environments tend to lie in root's home."""
  own = getattr(sys, '_base_executable', sys.executable)
  for path in (own, '/usr/bin/python3', '/usr/local/bin/python3'):
    if os.path.exists(path) and is_public(path) and is_public(CORPUS):
      version = subprocess.run(
        [path, '-c', 'import sys; print(sys.version_info >= (3, 11))'],
        capture_output=True, text=True,
      )  # fmt: skip
      if version.stdout.strip() == 'True':
        return path
  return None


def start(arguments, as_user, timeout=300):
  python = public_python()
  if python is None:
    pytest.skip('no interpreter that every user may run')
  if as_user and os.geteuid() != 0:
    pytest.skip('only root can become another user')
  user = {'user': NOBODY, 'group': NOBODY, 'extra_groups': []} if as_user else {}
  return subprocess.run(
    [python, '-B', *arguments],
    capture_output=True,
    text=True,
    timeout=timeout,
    cwd='/',
    env={'PYTHONPATH': f'{ROOT}:{CORPUS}'},
    **user,
  )


def left_behind():
  names = ('left-behind', 'link', 'folder')
  places = ('/tmp', '/dev/shm', '/var/tmp', '', os.path.dirname(os.__file__))
  found = [p for place in places for name in names for p in glob.glob(f'{place}/o1jax-{name}')]
  for pid in filter(str.isdigit, os.listdir('/proc')):
    try:
      command = Path(f'/proc/{pid}/cmdline').read_bytes()
    except OSError:
      continue
    if b'run_corpus.py' in command:
      found.append(command)
  return found


def run_corpus(tiers, *denied, as_user):
  run = start([CORPUS / 'run_corpus.py', tiers, *denied], as_user, timeout=900)
  if 'no tier of the sandbox' in run.stderr:
    pytest.skip(run.stderr.splitlines()[-1])
  assert run.returncode == 0, run.stderr
  report = json.loads(run.stdout)
  assert report['disagreements'] == []
  assert report['programs'] >= 100
  assert (report['uid'] == NOBODY) == as_user
  assert left_behind() == []
  return report


def test_corpus_in_tier_a():
  report = run_corpus('A', as_user=False)
  assert report['tier'] == 'A'
  assert {'pid namespace', 'mount namespace', 'network namespace', 'landlock', 'seccomp'} <= set(
    report['layers']
  )


def test_corpus_as_a_user_under_a_filter_like_dockers():
  report = run_corpus('ABC', 'docker', as_user=True)
  assert report['tier'] == 'B'
  assert {'landlock', 'seccomp'} <= set(report['layers'])


@pytest.mark.slow
@pytest.mark.parametrize(
  ('tiers', 'denied', 'as_user', 'tier'),
  [
    ('A', (), True, 'A'),
    ('B', (), True, 'B'),
    ('B', (), False, 'B'),
    ('ABC', ('docker',), False, 'B'),
  ],
)
def test_corpus_elsewhere(tiers, denied, as_user, tier):
  assert run_corpus(tiers, *denied, as_user=as_user)['tier'] == tier


@pytest.fixture
def burners():
  """Sixteen busy processes a core."""
  count = 16 * len(os.sched_getaffinity(0))
  # Each in a session of its own: the scheduler may share cores by session.
  busy = [sys.executable, '-c', 'while True: pass']
  running = [subprocess.Popen(busy, start_new_session=True) for _ in range(count)]
  yield
  for process in running:
    process.kill()
    process.wait()


@pytest.mark.slow
def test_verdicts_are_the_same_when_the_machine_is_overloaded(burners):
  run_corpus('ABC', as_user=False)


TIER = """
import deny
from o1jax.sandbox import Job, Pool
from o1jax.types import TestCase
deny.deny({denied!r})
with Pool(1) as pool:
  print(pool.tier, pool.submit(Job('print(input())', (TestCase('a', 'a'),))).result().status)
"""


@pytest.mark.parametrize(
  ('denied', 'said'),
  [
    (['docker', 'landlock'], 'C accepted'),
    (['docker', 'landlock', 'seccomp'], 'no tier of the sandbox'),
    (['seccomp'], 'no tier of the sandbox'),
  ],
)
@pytest.mark.parametrize('as_user', [False, True])
def test_what_is_left_decides_the_tier(denied, said, as_user):
  code = TIER.format(denied=denied)
  run = start(['-c', code], as_user)
  assert said in run.stdout + run.stderr


def test_the_corpus_is_what_it_says(monkeypatch):
  monkeypatch.syspath_prepend(str(CORPUS))
  import broken
  import correct
  import forged
  import hostile

  hostile_cases = [
    case
    for group in (
      hostile.RESOURCES,
      hostile.PROCESSES,
      hostile.KERNEL,
      hostile.FILES,
      hostile.HUNTS,
    )
    for case in group
  ]
  cases = [*correct.CASES, *broken.CASES, *forged.CASES, *hostile_cases]
  assert len(cases) >= 100 and len({case.name for case in cases}) == len(cases)
  assert sum(case.expected == ('accepted',) for case in cases) >= 20
  assert all('accepted' not in case.expected for case in cases[len(correct.CASES) :])
