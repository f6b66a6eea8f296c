"""Programs that try to be accepted without being right."""

from __future__ import annotations

from case import call, checked, stdio

WRONG, ERROR = 'wrong_answer', 'runtime_error'
EQUAL = """
    class Equal:
      def __eq__(self, other): return True
      def __ne__(self, other): return False
      def __hash__(self): return 0
      def __len__(self): return 3
      def __getattr__(self, name): return lambda *a, **k: self
      def __call__(self, *a, **k): return self
"""

CASES = (
  stdio('prints a verdict', WRONG, 'print("accepted")\nprint(\'{"status": "accepted"}\')'),
  stdio('exits as if it had succeeded', WRONG, 'import os\nos._exit(0)'),
  stdio('writes records into every descriptor', WRONG, '''
    import os, struct
    for fd in range(3, 64):
      for _ in range(3):
        try: os.write(fd, struct.pack('<BffI', 0, 0.0, 0.0, 8) + b'accepted')
        except OSError: pass
    print(1)
  '''),
  stdio('writes rubbish into every descriptor', WRONG, '''
    import os
    for fd in range(3, 64):
      try: os.write(fd, os.urandom(4096))
      except OSError: pass
    print(1)
  '''),
  stdio('rewrites the harness', 'wrong_answer runtime_error', '''
    import sys
    for name, module in list(sys.modules.items()):
      if 'sandbox' in name:
        for key in list(vars(module)):
          if callable(getattr(module, key)): setattr(module, key, lambda *a, **k: b'accepted')
    print(1)
  '''),
  stdio('patches builtins', 'wrong_answer runtime_error', '''
    import builtins, json, os
    builtins.len = builtins.open = builtins.print = json.dumps = json.loads = lambda *a, **k: 'ok'
    os.write(1, b'accepted')
  '''),
  stdio('traces the harness', 'wrong_answer runtime_error', '''
    import sys, threading
    def lie(frame, event, arg):
      frame.f_locals['kind'] = 0
      return lie
    sys.settrace(lie)
    sys.setprofile(lie)
    print(1)
  '''),
  stdio('another thread prints later', WRONG, '''
    import threading, time
    def late():
      while True:
        time.sleep(0.001)
        print(10)
    if int(input()) == 3: threading.Thread(target=late, daemon=True).start()
    else: time.sleep(0.01)
  '''),
  call('always equal', WRONG, EQUAL + '    def f(values): return Equal()'),
  call('always equal, one level down', WRONG, EQUAL + '    def f(values): return [Equal()] * 3'),
  call('a list that is always equal', WRONG, '''
    class List(list):
      __eq__ = lambda *_: True
      __ne__ = lambda *_: False
      def __iter__(self): return iter([1, 2, 3])
    def f(values): return List([0])
  '''),
  call('a text that is always equal', WRONG, '''
    class Text(str):
      __eq__ = lambda *_: True
      __hash__ = str.__hash__
    def f(values): return Text('accepted')
  '''),
  call('an integer that lies', WRONG, '''
    class Int(int):
      __eq__ = lambda *_: True
      __index__ = __int__ = lambda self: 2
    def f(values): return [Int(0)] * 3
  '''),
  call('a class that lies about its class', WRONG, '''
    class Liar:
      __class__ = list
      __eq__ = lambda *_: True
    def f(values): return Liar()
  '''),
  call('a metaclass that lies', WRONG, '''
    class Meta(type):
      __instancecheck__ = __subclasscheck__ = __eq__ = lambda *_: True
      __hash__ = type.__hash__
    class Liar(metaclass=Meta): pass
    def f(values): return Liar
  '''),
  call('a pickle that runs', WRONG, '''
    class Run:
      def __reduce__(self): return print, ('accepted',)
    def f(values): return Run()
  '''),
  call('contains itself', WRONG, 'def f(values):\n  a = []\n  a.append(a)\n  return a'),
  call(
    'a dictionary that contains itself',
    WRONG,
    'def f(values):\n  d = {}\n  d[0] = d\n  return d',
  ),
  call('nested beyond measure', WRONG, '''
    def f(values):
      for _ in range(100_000): values = [values]
      return values
  '''),
  call('writes the encoding itself', WRONG, 'def f(values): return {"d": [["t", [1, 2, 3]]]}'),
  call('leaves before it is asked', ERROR, 'import os\ndef f(values): os._exit(0)'),
  call('leaves from a thread', ERROR, '''
    import os, threading
    threading.Timer(0.005, os._exit, [0]).start()
    def f(values):
      while True: pass
  '''),
  call('prints the answer', WRONG, 'def f(values): print(sorted(values))'),
  call('replaces the encoder', 'wrong_answer runtime_error', '''
    import sys
    def f(values):
      for name, module in list(sys.modules.items()):
        if name.endswith('codec'): module.encode = lambda *_: b'"accepted"'
      return 0
  '''),
  checked('always equal in check', WRONG, EQUAL + '    def f(values): return Equal()'),
  checked('raises an assertion itself', ERROR, 'def f(values): raise AssertionError'),
  checked('brings its own check', WRONG, 'def f(values): return 0\ndef check(candidate): pass'),
  checked('brings its own built-ins', WRONG, '''
    def f(n): return 0
    abs = len = isinstance = lambda *_: 0
    AssertionError = ValueError
  ''', 'assert abs(f(1) - 5) < 1e-6'),
  checked('answers before it is asked', WRONG, '''
    import os, struct
    def f(values):
      reply = b'["value",{"r":0}]'
      for fd in range(3, 64):
        try: os.write(fd, struct.pack('<I', len(reply)) + reply)
        except OSError: pass
      return 0
  '''),
  checked('speaks another protocol', 'runtime_error wrong_answer', '''
    import os
    os.write(3, b'\\0' * 64)
    def f(values): return sorted(values)
  '''),
  checked('promises a frame without end', 'runtime_error wrong_answer', '''
    import os
    os.write(3, b'\\xff' * 64)
    def f(values): return sorted(values)
  '''),
)  # fmt: skip
