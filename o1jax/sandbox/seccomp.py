"""The system calls a program may make, as filters that the kernel runs (seccomp BPF).

Two filters, because a zygote has to fork and a program must not. The large one is set once,
on the zygote, and every child inherits it: it allows by name, answers what is harmless but
not needed with an error, and kills what only an attack would call. The small one is set by
each child on itself: it takes away what the zygote needs. Installing it costs microseconds.
"""

from __future__ import annotations

import ctypes
import struct

from o1jax.sandbox import libc, syscalls

_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_LOAD, _JUMP_EQ, _JUMP_GE, _AND, _RETURN = 0x20, 0x15, 0x35, 0x54, 0x06
_NUMBER_AT, _ARCH_AT, _ARGS_AT = 0, 4, 16  # offsets in struct seccomp_data
_EPERM, _EACCES, _ENOTTY, _ENOSYS, _EROFS = 1, 13, 25, 38, 30
_X32 = 0x40000000  # system calls of the x32 interface, by which filters have been evaded

_CLONE_THREAD = 0x00010900  # CLONE_THREAD | CLONE_SIGHAND | CLONE_VM
# All of the above and any new namespace, vfork, ptrace or parent flag.
_CLONE_MASK = _CLONE_THREAD | 0x7E020000 | 0x4000 | 0x2000 | 0x8000 | 0x80
_AF_UNIX = 1
_AT_EMPTY_PATH = 0x1000
_IOCTLS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # sizes, FIONBIO, close-on-exec
# Duplicates, flags, locks and the size of a pipe. Not the owner of a descriptor, which would have
# the kernel send signals to another process.
_FCNTLS = (0, 1, 2, 3, 4, 5, 6, 7, 1030, 1031, 1032, 1034)
_PRCTLS = (15, 16, 0x53564D41)  # set and get a thread's name, name a mapping

# What every program and every interpreter needs; nothing here reaches another process.
_NEEDED = """
read write readv writev pread64 pwrite64 preadv pwritev preadv2 pwritev2 close close_range fstat
lseek dup dup2 dup3 fcntl ftruncate poll ppoll select pselect6 epoll_create1 epoll_create epoll_ctl
epoll_wait epoll_pwait eventfd2 pipe pipe2 mmap munmap mremap mprotect madvise brk msync futex
set_robust_list get_robust_list rseq set_tid_address exit exit_group rt_sigaction rt_sigprocmask
rt_sigreturn rt_sigtimedwait rt_sigsuspend rt_sigpending sigaltstack getpid gettid getppid getuid
geteuid getgid getegid getpgid getpgrp getsid getresuid getresgid getgroups uname sysinfo getcwd
times getrusage getrlimit setrlimit gettimeofday time clock_gettime clock_getres
clock_nanosleep nanosleep getitimer setitimer alarm timer_create timer_settime timer_gettime
timer_getoverrun timer_delete pause restart_syscall sched_yield sched_getaffinity sched_getparam
sched_getscheduler sched_get_priority_max sched_get_priority_min getcpu getrandom membarrier wait4
waitid umask recvfrom shutdown getsockname getpeername getsockopt setsockopt
"""
# Reading files: what can be read is for Landlock and the mount namespace to say.
_FILES = """
stat lstat newfstatat statx access faccessat faccessat2 readlink readlinkat getdents getdents64
open openat statfs fstatfs chdir fchdir
"""
# The file system is read-only; a program that tries to change it gets the error for that.
_WRITES = """
mkdir mkdirat rmdir unlink unlinkat rename renameat renameat2 link linkat symlink symlinkat mknod
mknodat truncate creat fallocate
"""
# Only the zygote makes these. Children lose them again by the small filter.
_ZYGOTE_ONLY = 'fork clone kill tgkill tkill memfd_create pidfd_open recvmsg prctl prlimit64'
# Calls that no solution to a programming problem makes: the process dies, verdict `forbidden`.
_ATTACKS = """
vfork execve execveat rt_sigqueueinfo rt_tgsigqueueinfo pidfd_send_signal pidfd_getfd memfd_secret
socket connect bind listen accept accept4 ptrace process_vm_readv process_vm_writev process_madvise
kcmp mount umount2 pivot_root chroot unshare setns move_mount open_tree fsopen fsconfig fsmount
fspick mount_setattr setuid setgid setreuid setregid setresuid setresgid setfsuid setfsgid setgroups
capset chmod fchmod fchmodat fchmodat2 chown fchown lchown fchownat utime utimes utimensat futimesat
setxattr lsetxattr fsetxattr removexattr lremovexattr fremovexattr bpf keyctl add_key request_key
perf_event_open userfaultfd io_uring_setup io_uring_enter io_uring_register init_module finit_module
delete_module kexec_load kexec_file_load reboot swapon swapoff acct settimeofday clock_settime
clock_adjtime adjtimex sethostname setdomainname ioperm iopl quotactl fanotify_init fanotify_mark
open_by_handle_at name_to_handle_at modify_ldt personality shmget shmat shmctl msgget msgsnd msgrcv
msgctl semget semop semctl mq_open mq_unlink landlock_create_ruleset landlock_add_rule
landlock_restrict_self seccomp sched_setscheduler sched_setattr
"""


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
  return struct.pack('<HBBI', code, if_true, if_false, value)


def _return(action: int) -> bytes:
  return _instruction(_RETURN, action)


def errno_action(number: int) -> int:
  """The filter's answer that makes a call fail with an error number."""
  return _ERRNO | number


def when_arg(index: int, values: tuple[int, ...], then: int, otherwise: int, mask=None) -> bytes:
  """`then` if the low word of an argument, masked, is one of `values`; else `otherwise`."""
  body = _instruction(_LOAD, _ARGS_AT + 8 * index)
  if mask is not None:
    body += _instruction(_AND, mask)
  for value in values:
    body += _instruction(_JUMP_EQ, value, 0, 1) + _return(then)
  return body + _return(otherwise)


def _when_null(index: int, then: bytes, otherwise: int) -> bytes:
  """The code `then` if an argument is a null pointer, both words of it; else `otherwise`."""
  body = b''
  for word in (0, 4):
    body += _instruction(_LOAD, _ARGS_AT + 8 * index + word)
    body += _instruction(_JUMP_EQ, 0, 1, 0) + _return(otherwise)
  return body + then


def assemble(rules: dict[str, int | bytes], default: int, machine: str) -> bytes:
  """A filter: for each call its action, or the code that decides; `default` for all others."""
  numbers = syscalls.numbers(machine)
  code = [
    _instruction(_LOAD, _ARCH_AT),
    _instruction(_JUMP_EQ, syscalls.AUDIT_ARCH[machine], 1, 0),
    _return(_KILL),
    _instruction(_LOAD, _NUMBER_AT),
    _instruction(_JUMP_GE, _X32, 0, 1),
    _return(_KILL),
  ]
  for name, action in rules.items():
    if name in numbers:
      body = _return(action) if isinstance(action, int) else action
      code += [_instruction(_JUMP_EQ, numbers[name], 0, len(body) // 8), body]
  return b''.join((*code, _return(default)))


def zygote_filter(machine: str, files: bool) -> bytes:
  """The large filter. Without `files` no file can be opened or even looked up (tier C)."""
  rules: dict[str, int | bytes] = dict.fromkeys(_NEEDED.split(), _ALLOW)
  rules |= dict.fromkeys(_FILES.split(), _ALLOW if files else errno_action(_EACCES))
  rules |= dict.fromkeys(_WRITES.split(), errno_action(_EROFS))
  rules |= dict.fromkeys(_ZYGOTE_ONLY.split(), _ALLOW)
  rules |= dict.fromkeys(_ATTACKS.split(), _KILL)
  if not files:
    # fstat of newer C libraries. A raw call can pass a path with the flag and learn its size.
    flagged = when_arg(3, (_AT_EMPTY_PATH,), _ALLOW, errno_action(_EACCES), mask=_AT_EMPTY_PATH)
    rules['newfstatat'] = flagged
  rules['socketpair'] = when_arg(0, (_AF_UNIX,), _ALLOW, _KILL)
  rules['sendto'] = _when_null(4, _return(_ALLOW), _KILL)  # no address: a connected socket
  rules['ioctl'] = when_arg(1, _IOCTLS, _ALLOW, errno_action(_ENOTTY))
  # ENOSYS for the rest: the C library then falls back on the older call.
  return assemble(rules, errno_action(_ENOSYS), machine)


def child_filter(machine: str, pid: int) -> bytes:
  """The small filter of process `pid`: threads but no processes, signals only to itself."""
  denied, ignored = errno_action(_EPERM), errno_action(0)
  itself = when_arg(0, (pid,), _ALLOW, _KILL)
  rules: dict[str, int | bytes] = {
    'clone': when_arg(0, (_CLONE_THREAD,), _ALLOW, _KILL, mask=_CLONE_MASK),
    'fork': _KILL,
    'kill': itself,
    'tgkill': itself,
    'tkill': itself,
    'memfd_create': denied,
    'pidfd_open': _KILL,
    'recvmsg': denied,
    'fcntl': when_arg(1, _FCNTLS, _ALLOW, denied),
    'prctl': when_arg(0, _PRCTLS, _ALLOW, denied),
    # Programs set limits (of the stack, mostly) and expect it to work; they may read their own.
    'setrlimit': ignored,
    'prlimit64': _when_null(2, when_arg(0, (0, pid), _ALLOW, denied), ignored),
  }
  return assemble(rules, _ALLOW, machine)


class ChildFilter:
  """The small filter, ready to be set: a child only writes its process id into it."""

  _MARK = 0x7EADBEE1  # stands for the process id

  def __init__(self, machine: str):
    template = child_filter(machine, self._MARK)
    mark = self._MARK.to_bytes(4, 'little')
    self._places = [i for i in range(len(template) // 4) if template[4 * i :][:4] == mark]
    self._code, self._header = _prepare(template)
    self._words = memoryview(self._code).cast('B').cast('I')

  def install(self, pid: int) -> None:
    """Sets the filter on this process, whose id is `pid`; raises OSError."""
    for place in self._places:
      self._words[place] = pid
    libc.set_filter(self._header)


def _prepare(program: bytes) -> tuple[ctypes.Array, ctypes.Array]:
  """A filter's code and the header that points to it, where the kernel can read them."""
  code = ctypes.create_string_buffer(program, len(program))
  # struct sock_fprog: a 16-bit count of instructions, padding, a pointer to them.
  header = struct.pack('@HP', len(program) // 8, ctypes.addressof(code))
  return code, ctypes.create_string_buffer(header, len(header))


def install(program: bytes) -> None:
  """Sets a filter on this process and its children, for good. Needs no_new_privs."""
  code, header = _prepare(program)
  libc.set_filter(header)
  del code  # lived until here: the header points to it
