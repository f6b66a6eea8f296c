"""Wrong and broken programs: what an honest mistake looks like."""

from __future__ import annotations

from case import DOUBLE, LITTLE_MEMORY, PATIENT, SORTED, call, checked, stdio

from o1jax.types import TestCase

WRONG, ERROR, COMPILE = 'wrong_answer', 'runtime_error', 'compile_error'
TIME, MEMORY, OUTPUT = 'time_limit', 'memory_limit', 'output_limit'

CASES = (
  stdio('wrong', WRONG, 'print(3 * int(input()))'),
  stdio('right but for one test', WRONG, 'n = int(input())\nprint(2 * n if n < 100 else 0)'),
  stdio('wrong order', WRONG, 'print("2 1")', (TestCase('', '1 2'),)),
  stdio('wrong order of lines', WRONG, 'print("2\\n1")', (TestCase('', '1\n2'),)),
  stdio('a duplicate too many', WRONG, 'print("1 1 2")', (TestCase('', '1 2'),)),
  stdio('prints nothing', WRONG, 'n = input()'),
  stdio('prints more', WRONG, 'print(2 * int(input()), "done")'),
  stdio('an integer off by rounding', WRONG, 'print(1000001)', (TestCase('', '1000000'),)),
  stdio('a float beyond tolerance', WRONG, 'print(0.334)', (TestCase('', '0.333333'),)),
  stdio('not a number', WRONG, 'print("nan")', (TestCase('', '1.5'),)),
  stdio('bytes that are no text', WRONG, 'import os\nos.write(1, b"\\xff\\xfe")'),
  stdio('raises', ERROR, 'raise KeyError(1)'),
  stdio('raises after the answer', ERROR, 'print(2 * int(input()))\n1 / 0'),
  stdio('status 1 after the answer', ERROR, 'print(2 * int(input()))\nexit(1)'),
  stdio('exits with a message', ERROR, 'import sys\nprint(2 * int(input()))\nsys.exit("bad")'),
  stdio('reads too much', ERROR, 'print(2 * int(input()), input())'),
  stdio('endless recursion', ERROR, 'def f(): f()\nf()'),
  stdio('overflows the stack', ERROR, '''
    import sys
    sys.setrecursionlimit(1 << 30)
    class A:
      def __getattr__(self, name): return getattr(self, name)
    A().a
  ''', DOUBLE[:1], PATIENT),
  stdio('a crash', ERROR, 'import ctypes\nctypes.string_at(8)'),
  stdio('missing module', ERROR, 'import a_module_that_nobody_has'),
  stdio('stops itself with a signal', ERROR, '''
    import os, signal
    os.kill(os.getpid(), signal.SIGKILL)
  '''),
  stdio('aborts', ERROR, 'import os\nprint(2 * int(input()), flush=True)\nos.abort()'),
  stdio('uses up its descriptors', ERROR, 'import os\nwhile True: os.dup(1)'),
  stdio('closes its own descriptors', ERROR, 'import os\nos.closerange(0, 256)\nprint(1)'),
  stdio('not Python', COMPILE, 'int main() { return 0; }'),
  stdio('a null byte', COMPILE, 'print(1)\0'),
  stdio('a lone surrogate', COMPILE, 'print("\ud800")'),
  stdio('brackets beyond the parser', COMPILE, '(' * 5000 + ')' * 5000),
  stdio('an expression beyond the compiler', COMPILE, 'x = ' + '-' * 200_000 + '1'),
  stdio('returns outside of a function', COMPILE, 'return 1'),
  stdio('an endless loop', TIME, 'while True: pass'),
  stdio('an endless loop in one test', TIME, 'n = int(input())\nwhile n == 5: pass\nprint(2 * n)'),
  stdio('a loop in C', TIME, 'print(sum(range(10 ** 12)))'),
  stdio('one operation in C', TIME, 'print(len(str(3 ** 40_000_000)))'),
  stdio('a regular expression that explodes', TIME, 'import re\nre.match("(a+)+b", "a" * 64)'),
  stdio('sleeps for ever', TIME, 'import time\ntime.sleep(10 ** 6)'),
  stdio('a deadlock', TIME, '''
    import threading
    lock = threading.Lock()
    while True: lock.acquire()
  '''),
  stdio('waits for a thread for ever', TIME, '''
    import threading
    threading.Thread(target=threading.Event().wait).start()
  '''),
  stdio('loops at exit', TIME, '''
    import atexit
    @atexit.register
    def last():
      while True: pass
  '''),
  stdio('loops in a destructor', TIME, '''
    class Last:
      def __del__(self):
        while True: pass
    last = Last()
  '''),
  stdio('a list too long', MEMORY, 'x = [0] * 10 ** 9'),
  stdio('grows', MEMORY, 'x = []\nwhile True: x.append("y" * 10 ** 7)',
        DOUBLE[:1], LITTLE_MEMORY),
  stdio('prints for ever', OUTPUT, 'while True: print("x" * 10 ** 5)'),
  call('wrong value', WRONG, 'def f(values): return values'),
  call('returns None', WRONG, 'def f(values): values.sort()'),
  call('True is not 1', WRONG, 'def f(): return True', (TestCase('[]', '1'),)),
  call('1.0 is not 1', WRONG, 'def f(): return 1.0', (TestCase('[]', '1'),)),
  call('the number is not its text', WRONG, 'def f(): return "1"', (TestCase('[]', '1'),)),
  call('a set is not a list', WRONG, 'def f(values): return set(values)'),
  call('wrong order in a list', WRONG, 'def f(values): return sorted(values)[::-1]'),
  call('a generator', WRONG, 'def f(values): yield from sorted(values)'),
  call('not there', ERROR, 'def g(values): return sorted(values)'),
  call('not callable', ERROR, 'f = [1, 2, 3]'),
  call('wrong number of arguments', ERROR, 'def f(a, b): return a'),
  call('a result too large', OUTPUT, 'def f(values): return "x" * 10 ** 8', SORTED[:1],
       limits=PATIENT),
  call('wrong after the first test', WRONG, 'def f(values): return [1, 2, 3]'),
  checked('fails check', WRONG, 'def f(values): return values'),
  checked('fails one assert', WRONG, 'def f(n): return 1', 'assert f(1) == 1\nassert f(2) == 2'),
  checked('raises in check', ERROR, 'def f(values): raise ValueError'),
  checked('the wrong kind of value', WRONG, 'def f(n): return None', 'assert f(1) < 2'),
  checked('does not compile', COMPILE, 'def f(values) return'),
  checked('raises before it is called', ERROR, '1 / 0\ndef f(values): return sorted(values)'),
  checked('never returns', TIME, 'def f(values):\n  while True: pass'),
  checked('dies', ERROR, 'import os\ndef f(values): os._exit(0)'),
)  # fmt: skip
