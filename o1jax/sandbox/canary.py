"""Canaries: programs whose verdict is known, judged at the start of a pool and now and then.

Probes ask whether the layers hold; canaries ask whether the verdicts are right.
"""

from __future__ import annotations

from o1jax import types
from o1jax.sandbox.judge import Ask, judge
from o1jax.sandbox.protocol import Job, Limits, SandboxError
from o1jax.types import TestCase

_LIMITS = Limits(cpu_s=0.2, memory_bytes=128 << 20, output_bytes=1 << 20)
_ADD = (TestCase('[1, 2]', '3'), TestCase('[[1], [2]]', '[1, 2]'))
_ECHO = (TestCase('a b\n', 'a b'), TestCase('c\n', 'c'))
_EQUAL = 'class E:\n  __eq__ = lambda *_: True\n  __ne__ = lambda *_: False\n'
_CASES = (
  (Job('print(input())', _ECHO), types.ACCEPTED),
  (Job('print(input()[::-1])', _ECHO), types.WRONG_ANSWER),
  (Job('import os\nprint(input(), flush=True)\nos._exit(0)', _ECHO), types.ACCEPTED),
  (Job('while True: pass', _ECHO), types.TIME_LIMIT),
  (Job('print("', _ECHO), types.COMPILE_ERROR),
  (Job('raise ValueError', _ECHO), types.RUNTIME_ERROR),
  (Job('x = bytearray(2 << 30)', _ECHO), types.MEMORY_LIMIT),
  (Job('while True: print("x" * 9999)', _ECHO), types.OUTPUT_LIMIT),
  (Job('import os\nos.fork()\nprint(input())', _ECHO), types.FORBIDDEN),
  (Job('def add(a, b): return a + b', _ADD, 'add'), types.ACCEPTED),
  (Job(_EQUAL + 'def add(a, b): return E()', _ADD, 'add'), types.WRONG_ANSWER),
  (Job('def f(): return 1', (), 'f', 'def check(c):\n  assert c() == 1'), types.ACCEPTED),
  (Job(_EQUAL + 'def f(): return E()', (), 'f', 'assert f() == 1'), types.WRONG_ANSWER),
)


_NOT_HERE = {
  'unsafe': {types.FORBIDDEN},  # nothing is
  # A service says how a program ended and little of why.
  'remote': {types.FORBIDDEN, types.MEMORY_LIMIT, types.OUTPUT_LIMIT, types.TIME_LIMIT},
}


def check(ask: Ask, tier: str) -> None:
  """Raises SandboxError if a canary's verdict is not the known one."""
  for job, expected in _CASES:
    if expected in _NOT_HERE.get(tier, ()):
      continue
    verdict = judge(job, _LIMITS, ask)
    if verdict.status != expected:
      raise SandboxError(
        f'a canary is judged {verdict.status}, not {expected}: {job.code!r}. {verdict.stderr}'
      )
