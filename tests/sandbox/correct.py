"""Correct programs, most of them unusual: each must be accepted."""

from __future__ import annotations

from case import PATIENT, Case, call, checked, stdio

from o1jax.types import TestCase

OK = 'accepted'


def correct(name: str, code: str, tests: tuple[TestCase, ...] | None = None) -> Case:
  return stdio(name, OK, code) if tests is None else stdio(name, OK, code, tests)


STDIO = (
  correct('plain', 'print(2 * int(input()))'),
  correct('reads open(0)', 'print(2 * int(open(0).read()))'),
  correct('os.read and os.write', 'import os\nos.write(1, b"%d" % (2 * int(os.read(0, 1 << 20))))'),
  correct('sys.stdin as an iterator', 'import sys\nfor line in sys.stdin: print(2 * int(line))'),
  correct('binary streams', '''
    import sys
    sys.stdout.buffer.write(b'%d' % (2 * int(sys.stdin.buffer.readline())))
  '''),
  correct('/dev/stdin', 'print(2 * int(open("/dev/stdin").readline()))'),
  correct('fileinput', 'import fileinput\nfor line in fileinput.input(): print(2 * int(line))'),
  correct('prints at exit', '''
    import atexit
    n = int(input())
    atexit.register(lambda: print(2 * n))
  '''),
  correct('prints when an object dies', '''
    class Last:
      def __del__(self): print(2 * self.n)
    last = Last()
    last.n = int(input())
    last.itself = last
  '''),
  correct('leaves an open file to flush', '''
    out = open(1, 'w', closefd=False)
    out.write(str(2 * int(input())))
  '''),
  correct('300 KB of output', '''
    for i in range(int(input()) * 10000): print(i)
  ''', (TestCase('5\n', '\n'.join(map(str, range(50000)))),) * 2),
  correct('300 KB of standard error', '''
    import sys
    print('x' * 300_000, file=sys.stderr)
    print(2 * int(input()))
  '''),
  correct('ignores its input', 'print(42)', (TestCase('1\n', '42\n'), TestCase('x', '42'))),
  correct('deep recursion on a big thread stack', '''
    import sys, threading
    sys.setrecursionlimit(1 << 20)
    threading.stack_size(256 << 20)
    def depth(n): return 0 if n == 0 else 1 + depth(n - 1)
    def main(): print(2 * int(input()) + depth(60_000) - 60_000)
    thread = threading.Thread(target=main)
    thread.start()
    thread.join()
  '''),
  correct('a thread that nobody joins', '''
    import threading
    threading.Thread(target=lambda: print(2 * int(input()))).start()
  '''),
  correct('daemon threads that go on', '''
    import threading, time
    def spin():
      while True: time.sleep(0.01)
    for _ in range(4): threading.Thread(target=spin, daemon=True).start()
    print(2 * int(input()))
  '''),
  correct('a pool of threads, not shut down', '''
    from concurrent.futures import ThreadPoolExecutor
    pool = ThreadPoolExecutor(2)
    print(pool.submit(lambda n: 2 * n, int(input())).result())
  '''),
  correct('asyncio', '''
    import asyncio
    async def main():
      await asyncio.sleep(0.001)
      print(2 * int(input()))
    asyncio.run(main())
  '''),
  correct('os._exit', 'import os\nprint(2 * int(input()), flush=True)\nos._exit(0)'),
  correct('exit()', 'print(2 * int(input()))\nexit()'),
  correct('sys.exit in a function', '''
    import sys
    def main():
      print(2 * int(input()))
      sys.exit(0)
    if __name__ == '__main__': main()
  '''),
  correct('replaces sys.stdout', '''
    import io, sys
    real, sys.stdout = sys.stdout, io.StringIO()
    print(2 * int(input()))
    real.write(sys.stdout.getvalue())
  '''),
  correct('patches builtins for itself', '''
    import builtins
    keep = builtins.print
    builtins.print = lambda *a: keep(*[2 * x for x in a])
    print(int(input()))
  ''', (TestCase('3\n', '6\n'),)),
  correct('closes stdin', 'import sys\nn = int(input())\nsys.stdin.close()\nprint(2 * n)'),
  correct('a duplicate of descriptor 1', '''
    import os
    with os.fdopen(os.dup(1), 'w') as out: out.write(str(2 * int(input())))
  '''),
  correct('sets limits', '''
    import resource, sys
    resource.setrlimit(resource.RLIMIT_STACK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print(2 * int(input()))
  '''),
  correct('handles signals of its own', '''
    import os, signal
    signal.signal(signal.SIGALRM, lambda *_: print(2 * n))
    n = int(input())
    signal.setitimer(signal.ITIMER_REAL, 0.01)
    signal.pause()
  '''),
  stdio('a quarter of a gigabyte', OK, 'x = bytearray(250 << 20)\nprint(2 * int(input()))',
        limits=PATIENT),
  correct('sleeps', 'import time\ntime.sleep(0.05)\nprint(2 * int(input()))'),
  correct('huge integers', '''
    import sys
    sys.set_int_max_str_digits(0)
    print(str(10 ** 20000)[:1].replace('1', str(2 * int(input()))))
  '''),
  correct('keeps its class findable', '''
    import __main__, copy, dataclasses, pickle
    @dataclasses.dataclass
    class Box: n: int
    print(2 * pickle.loads(pickle.dumps(copy.copy(__main__.Box(int(input()))))).n)
  '''),
  correct('standard modules', '''
    import decimal, fractions, hashlib, json, random, statistics, datetime, sqlite3, unicodedata
    random.seed(1)
    rows = sqlite3.connect(':memory:').execute('select 2 * ?', (int(input()),))
    print(json.dumps(list(rows)[0][0]))
  '''),
  correct('/dev/null', 'print("noise", file=open("/dev/null", "w"))\nprint(2 * int(input()))'),
  correct('other white space', 'print(" ", 2 * int(input()), end=" \\r\\n\\n\\n")'),
  correct('floats within tolerance', 'print(float(input()) / 3)',
          (TestCase('1', '0.333333333'), TestCase('2', '0.66666667'))),
)  # fmt: skip

CALLS = (
  call('sorted', OK, 'def f(values): return sorted(values)'),
  call('sorts its input in place', OK, 'def f(values):\n  values.sort()\n  return values'),
  call('Solution', OK, 'class Solution:\n  def f(self, values): return sorted(values)'),
  call('Solution().f', OK, 'class Solution:\n  def f(self, values): return sorted(values)',
       entry_point='Solution().f'),
  call('a tuple for a list', OK, 'def f(values): return tuple(sorted(values))'),
  call('a named tuple', OK, '''
    from collections import namedtuple
    Pair = namedtuple('Pair', 'a b')
    def f(a, b): return [Pair(a, b)]
  ''', (TestCase('[1, "x"]', '[[1, "x"]]'),)),
  call('Counter and defaultdict', OK, '''
    from collections import Counter, defaultdict
    def f(text):
      d = defaultdict(list)
      for c in text: d[c].append(len(d[c]))
      return [Counter(text), d]
  ''', (TestCase('["aab"]', '[{"a": 2, "b": 1}, {"a": [0, 1], "b": [0]}]'),)),
  call('integer keys', OK, 'def f(n): return {n: None, n + 1: True}',
       (TestCase('[1]', '{"1": null, "2": true}'),)),
  call('an enum of integers', OK, '''
    from enum import IntEnum
    class Two(IntEnum): TWO = 2
    def f(): return Two.TWO
  ''', (TestCase('[]', '2'),)),
  call(
    'floats',
    OK,
    'def f(x): return [x / 3, float("inf")]',
    (TestCase('[1]', '[0.33333333, Infinity]'),),
  ),
  call('prints beside', OK, 'def f(values):\n  print(values)\n  return sorted(values)'),
  call('a main block', OK, '''
    def f(values): return sorted(values)
    if __name__ == '__main__': print(f(input()))
  '''),
  call('a big result', OK, 'def f(n): return list(range(n))',
       (TestCase('[100000]', str(list(range(100000)))),)),
  call('a huge integer', OK, 'def f(n): return 10 ** n', (TestCase('[3000]', '1' + '0' * 3000),)),
  call('remembers', OK, '''
    seen = {}
    def f(values, cache={}):
      assert not seen, 'every test starts afresh'
      seen[0] = cache[0] = 1
      return sorted(values)
  '''),
  checked('check', OK, 'def f(values): return sorted(values)'),
  checked('asserts', OK, 'def f(values): return sorted(values)',
          'import math\nassert f([2, 1]) == [1, 2]\nassert math.prod(f([3, 2])) == 6'),
  checked('classes of the program', OK, '''
    class Pair:
      def __init__(self, a, b): self.a, self.b = a, b
    def f(pairs): return sum(p.a * p.b for p in pairs)
  ''', 'assert f([Pair(1, 2), Pair(3, b=4)]) == 14\nassert f([]) == 0'),
  checked('exceptions', OK, 'def f(x): raise ValueError("no")', '''
try:
  f(1)
  assert False
except ValueError as e:
  assert str(e) == 'no'
  '''),
  checked('an iterator', OK, 'def f(n):\n  yield from range(n)', 'assert list(f(3)) == [0, 1, 2]'),
  checked('a name like a built-in', OK, 'def sum(a, b): return a + b', 'assert sum(1, 2) == 3',
          entry_point='sum'),
  checked('sets, tuples and floats', OK, 'def f(x): return {x, (x, 1.5)}',
          'assert f(2) == {2, (2, 1.5)}\nassert type(f(2)) is set'),
)  # fmt: skip

CASES = STDIO + CALLS
