"""Hostile programs: they must not be accepted, must not get out, and must leave nothing behind.

All are small on purpose: bombs are bounded, and nothing is sent anywhere but to loopback.
"""

from __future__ import annotations

from case import DOUBLE, LITTLE_MEMORY, checked, stdio

from o1jax.types import TestCase

WRONG, ERROR, FORBIDDEN = 'wrong_answer', 'runtime_error', 'forbidden'
TIME, MEMORY, OUTPUT = 'time_limit', 'memory_limit', 'output_limit'
SYSCALL = 'import ctypes\nsyscall = ctypes.CDLL(None, use_errno=True).syscall\n'
SECRET = (TestCase('1', 'SECRET-2718281828'),)
HUNT = """
    def show(text):
      if 'SECRET-' in text and 'hunter' not in text:  # hunter
        print(text[text.index('SECRET-'):][:17])
        raise SystemExit
"""

RESOURCES = (
  stdio('swallows every signal and exception', TIME, '''
    import signal
    for number in range(1, 65):
      try: signal.signal(number, signal.SIG_IGN)
      except (OSError, ValueError): pass
    signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
    while True:
      try:
        while True: pass
      except BaseException: pass
  '''),
  stdio('swallows memory errors', TIME, '''
    while True:
      try: x = bytes(1 << 40)
      except MemoryError: pass
  '''),
  stdio('a mapping too large', MEMORY, 'import mmap\nmmap.mmap(-1, 1 << 42)'),
  stdio('many mappings', MEMORY, '''
    import mmap
    maps = []
    while True:
      maps.append(mmap.mmap(-1, 1 << 26))
      maps[-1][::4096] = bytes(1 << 14)
  ''', DOUBLE[:1], LITTLE_MEMORY),
  stdio('a zlib bomb', MEMORY, '''
    import zlib
    packer = zlib.compressobj(9, wbits=-15)
    block = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    print(len(zlib.decompress(block * 900, wbits=-15)))
  ''', DOUBLE[:1], LITTLE_MEMORY),
  stdio('a flood of stdout that ignores errors', OUTPUT, '''
    import os
    for _ in range(500):
      try: os.write(1, b'x' * (1 << 20))
      except OSError: pass
  '''),
  stdio('a flood of stderr', OUTPUT, '''
    import os
    for _ in range(500):
      try: os.write(2, b'x' * (1 << 20))
      except OSError: pass
    print(2 * int(input()))
  '''),
  stdio('a file as long as it can be', OUTPUT, '''
    import os
    for size in range(40, 0, -1):
      try: os.ftruncate(1, 1 << size)
      except OSError: pass
      else: break
  '''),
  stdio('threads without end', ERROR, '''
    import threading
    wait = threading.Event().wait
    for _ in range(3000): threading.Thread(target=wait, daemon=True).start()
    print(2 * int(input()))
  '''),
  stdio('threads that burn every core', TIME, '''
    import threading
    def burn():
      while True: sum(range(10 ** 6))
    for _ in range(8): threading.Thread(target=burn).start()
  '''),
  stdio('stops itself', TIME, 'import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)'),
  stdio('reports nothing and idles', TIME, '''
    import os, time
    os.closerange(0, 256)
    time.sleep(999)
  '''),
  stdio('pipes and buffers', ERROR, '''
    import fcntl, os
    while True:
      _, end = os.pipe()
      try: fcntl.fcntl(end, 1031, 1 << 20)
      except OSError as e:
        if e.errno != 1: raise
      os.write(end, bytes(1 << 16))
  '''),
)  # fmt: skip

PROCESSES = (
  stdio('forks', FORBIDDEN, 'import os\nfor _ in range(3): os.fork()\nprint(2 * int(input()))'),
  stdio('forks and hides the failure', FORBIDDEN, '''
    import os
    try: os.fork()
    except BaseException: pass
    print(2 * int(input()))
  '''),
  stdio('a daemon by two forks', FORBIDDEN, '''
    import os, time
    if os.fork() == 0:
      os.setsid()
      if os.fork() == 0: time.sleep(3)
      os._exit(0)
  '''),
  stdio('subprocess', FORBIDDEN, 'import subprocess\nsubprocess.run(["true"])'),
  stdio('os.system', FORBIDDEN, 'import os\nos.system("true")'),
  stdio('posix_spawn', FORBIDDEN, 'import os\nos.posix_spawn("/bin/true", ["true"], {})'),
  stdio('execve', FORBIDDEN, 'import os\nos.execv("/bin/true", ["true"])'),
  stdio('multiprocessing', FORBIDDEN, '''
    import multiprocessing
    multiprocessing.get_context('fork').Process(target=print).start()
  '''),
  stdio('kills its parent', FORBIDDEN, 'import os\nos.kill(os.getppid(), 9)'),
  stdio('kills its group', FORBIDDEN, 'import os\nos.killpg(0, 9)'),
  stdio('kills everybody', FORBIDDEN, 'import os\nos.kill(-1, 9)'),
  stdio('queues a signal', FORBIDDEN,
        SYSCALL + 'import os\nsyscall(129, os.getppid(), 9, bytes(128))'),
  stdio('has the kernel signal its parent', ERROR, '''
    import fcntl, os
    end, other = os.pipe()
    fcntl.fcntl(end, fcntl.F_SETOWN, os.getppid())
  '''),
  stdio('traces its parent', FORBIDDEN,
        SYSCALL + 'import os\nsyscall(101, 16, os.getppid(), 0, 0)'),
  stdio('lets its parent trace', FORBIDDEN, SYSCALL + 'syscall(101, 0, 0, 0, 0)'),
  stdio('a raw fork', FORBIDDEN, SYSCALL + 'syscall(57)'),
  stdio('a raw vfork', FORBIDDEN, SYSCALL + 'syscall(58)'),
  stdio('a raw clone', FORBIDDEN, SYSCALL + 'syscall(56, 17, 0, 0, 0, 0)'),
  stdio('clone into a namespace', FORBIDDEN, SYSCALL + 'syscall(56, 0x10000000 | 17, 0, 0, 0, 0)'),
  stdio('clone3', WRONG, SYSCALL + 'print(syscall(435, bytes(88), 88))'),
  stdio('fork by the x32 interface', FORBIDDEN, SYSCALL + 'syscall(0x40000000 | 57)'),
  stdio('fork by the 32-bit interface', 'forbidden runtime_error', '''
    import ctypes, mmap
    page = mmap.mmap(-1, 4096, prot=7)
    page.write(bytes.fromhex('b802000000cd80c3'))  # mov eax, 2; int 0x80; ret
    ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
  '''),
)  # fmt: skip

KERNEL = (
  stdio('a socket', FORBIDDEN, 'import socket\nsocket.create_connection(("127.0.0.1", 9), 1)'),
  stdio('a unix socket', FORBIDDEN, 'import socket\nsocket.socket(socket.AF_UNIX)'),
  stdio('a netlink socket', FORBIDDEN, SYSCALL + 'syscall(41, 16, 3, 0)'),
  stdio('sends without being connected', FORBIDDEN, '''
    import socket
    a, _ = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    a.sendto(b'x', '\\0somebody')
  '''),
  stdio('io_uring', FORBIDDEN, SYSCALL + 'syscall(425, 8, bytes(120))'),
  stdio('bpf', FORBIDDEN, SYSCALL + 'syscall(321, 0, 0, 0)'),
  stdio('keyctl', FORBIDDEN, SYSCALL + 'syscall(250, 0, 0, 0, 0, 0)'),
  stdio('perf_event_open', FORBIDDEN, SYSCALL + 'syscall(298, bytes(120), 0, -1, -1, 0)'),
  stdio('userfaultfd', FORBIDDEN, SYSCALL + 'syscall(323, 0)'),
  stdio('unshare', FORBIDDEN, SYSCALL + 'syscall(272, 0x10000000)'),
  stdio('mount', FORBIDDEN, SYSCALL + 'syscall(165, b"x", b"/", b"tmpfs", 0, 0)'),
  stdio('chroot', FORBIDDEN, 'import os\nos.chroot("/")'),
  stdio('setuid', FORBIDDEN, 'import os\nos.setuid(0)'),
  stdio('a file in memory', ERROR, 'import os\nos.memfd_create("x")'),
  stdio('shared memory', FORBIDDEN, SYSCALL + 'syscall(29, 1, 4096, 0o1600)'),
  stdio('another filter', WRONG, SYSCALL + 'print(syscall(157, 22, 1))'),
  stdio('becomes dumpable', WRONG, SYSCALL + 'print(syscall(157, 4, 1), syscall(157, 3))'),
  stdio('raises its limits', WRONG, '''
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 40, 1 << 40))
    print(resource.getrlimit(resource.RLIMIT_FSIZE)[0] == 1 << 40)
  '''),
  stdio('limits of its parent', 'runtime_error wrong_answer', '''
    import os, resource
    print(resource.prlimit(os.getppid(), resource.RLIMIT_CPU))
  '''),
)  # fmt: skip

FILES = (
  stdio('reads a file of the host', ERROR, 'print(open("/etc/passwd").read())'),
  stdio('lists the root', 'runtime_error wrong_answer', 'import os\nprint(os.listdir("/home"))'),
  stdio('writes where it can', WRONG, '''
    import os
    for folder in ('/tmp', '/dev/shm', '/var/tmp', '.', '/', os.path.dirname(os.__file__)):
      try: open(folder + '/o1jax-left-behind', 'w').write('x')
      except OSError: pass
      else: print('left', folder)
  '''),
  stdio('finds what was left', WRONG, '''
    import os
    for folder in ('/tmp', '/dev/shm', '/var/tmp', '.', '/', os.path.dirname(os.__file__)):
      if os.path.exists(folder + '/o1jax-left-behind'): print('found', folder)
  '''),
  stdio('makes a link', ERROR, 'import os\nos.symlink("/etc/passwd", "/tmp/o1jax-link")'),
  stdio('removes a file', ERROR, 'import os\nos.remove(os.__file__)'),
  stdio('a folder to stay in', ERROR, 'import os\nos.mkdir("/tmp/o1jax-folder")'),
  stdio('changes a mode', FORBIDDEN, 'import os\nos.chmod(os.__file__, 0o777)'),
  stdio('changes a time', FORBIDDEN, 'import os\nos.utime(os.__file__, (0, 0))'),
  stdio('changes an owner', FORBIDDEN, 'import os\nos.chown("/", 0, 0)'),
  stdio('/proc/self/mem', ERROR, 'open("/proc/self/mem", "r+b").write(b"x")'),
  stdio('memory of its parent', ERROR,
        'import os\nopen(f"/proc/{os.getppid()}/mem", "rb").read(1)'),
  stdio('reads its parent by a system call', FORBIDDEN, SYSCALL + '''
import os
syscall(310, os.getppid(), bytes(16), 1, bytes(16), 1, 0)
  '''),
  stdio('descriptors of its parent', 'runtime_error wrong_answer', '''
    import os
    folder = f'/proc/{os.getppid()}/fd'
    for name in os.listdir(folder): print(os.readlink(f'{folder}/{name}'))
  '''),
  stdio('a descriptor stolen by pidfd', FORBIDDEN, SYSCALL + '''
import os
syscall(438, syscall(434, os.getppid(), 0), 3, 0)
  '''),
  stdio('opens by handle', FORBIDDEN, SYSCALL + 'syscall(304, 0, bytes(64), 0)'),
)  # fmt: skip

HUNTS = (
  stdio('looks through frames', WRONG, HUNT + '''
    import sys
    frame = sys._getframe()
    while frame:
      for value in (*frame.f_locals.values(), *frame.f_globals.values()): show(repr(value)[:10**6])
      frame = frame.f_back
  ''', SECRET),
  stdio('looks through the collector', WRONG, HUNT + '''
    import gc
    for thing in gc.get_objects():
      for part in gc.get_referents(thing):
        if type(part) in (str, bytes): show(str(part))
  ''', SECRET),
  stdio('looks through memory', 'wrong_answer runtime_error', HUNT + '''
    import ctypes
    for start in range(id(show) & ~4095, (id(show) & ~4095) - (1 << 18), -4096):
      show(ctypes.string_at(start, 4096).decode('latin1'))
  ''', SECRET),
  stdio('looks through files', WRONG, HUNT + '''
    import glob, os
    for path in glob.glob('/*') + glob.glob('/tmp/*') + glob.glob('/proc/*/environ'):
      try: show(open(path, errors='replace').read(1 << 20))
      except OSError: pass
  ''', SECRET),
  checked('looks for the test code', WRONG, '''
    import gc, sys
    def f(n):
      frame = sys._getframe()
      found = []
      while frame:
        found += [str(v) for v in frame.f_locals.values()]
        frame = frame.f_back
      for thing in gc.get_objects():
        found += [str(p) for p in gc.get_referents(thing) if type(p) in (str, bytes)]
      return next((t[t.index('SECRET-'):][:17] for t in found if 'SECRET-2' in t), 0)
  ''',
          "assert f(1) == 'SECRET-2718281828'"),
)  # fmt: skip
