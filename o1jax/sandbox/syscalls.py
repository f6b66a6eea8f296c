"""Numbers of the system calls that the filter names, for the machines it knows.

Generated from the kernel's headers (`asm/unistd_64.h`, `asm-generic/unistd.h`): name, number
on x86_64, number on aarch64; `-` where a machine has no such call.
"""

from __future__ import annotations

import platform

AUDIT_ARCH = {'x86_64': 0xC000003E, 'aarch64': 0xC00000B7}

_TABLE = """
read:0:63 write:1:64 readv:19:65 writev:20:66 pread64:17:67 pwrite64:18:68 preadv:295:69
pwritev:296:70 preadv2:327:286 pwritev2:328:287 close:3:57 close_range:436:436 fstat:5:80
lseek:8:62 dup:32:23 dup2:33:- dup3:292:24 fcntl:72:25 ftruncate:77:46 poll:7:- ppoll:271:73
select:23:- pselect6:270:72 epoll_create1:291:20 epoll_create:213:- epoll_ctl:233:21
epoll_wait:232:- epoll_pwait:281:22 eventfd2:290:19 pipe:22:- pipe2:293:59 mmap:9:222
munmap:11:215 mremap:25:216 mprotect:10:226 madvise:28:233 brk:12:214 msync:26:227 futex:202:98
set_robust_list:273:99 get_robust_list:274:100 rseq:334:293 set_tid_address:218:96 exit:60:93
exit_group:231:94 rt_sigaction:13:134 rt_sigprocmask:14:135 rt_sigreturn:15:139
rt_sigtimedwait:128:137 rt_sigsuspend:130:133 rt_sigpending:127:136 sigaltstack:131:132
getpid:39:172 gettid:186:178 getppid:110:173 getuid:102:174 geteuid:107:175 getgid:104:176
getegid:108:177 getpgid:121:155 getpgrp:111:- getsid:124:156 getresuid:118:148 getresgid:120:150
getgroups:115:158 uname:63:160 sysinfo:99:179 getcwd:79:17 times:100:153 getrusage:98:165
getrlimit:97:163 setrlimit:160:164 prlimit64:302:261 gettimeofday:96:169 time:201:-
clock_gettime:228:113 clock_getres:229:114 clock_nanosleep:230:115 nanosleep:35:101
getitimer:36:102 setitimer:38:103 alarm:37:- timer_create:222:107 timer_settime:223:110
timer_gettime:224:108 timer_getoverrun:225:109 timer_delete:226:111 pause:34:-
restart_syscall:219:128 sched_yield:24:124 sched_getaffinity:204:123 sched_getparam:143:121
sched_getscheduler:145:120 sched_get_priority_max:146:125 sched_get_priority_min:147:126
getcpu:309:168 getrandom:318:278 membarrier:324:283 wait4:61:260 waitid:247:95 umask:95:166
stat:4:- lstat:6:- newfstatat:262:79 statx:332:291 access:21:- faccessat:269:48 faccessat2:439:439
readlink:89:- readlinkat:267:78 getdents:78:- getdents64:217:61 open:2:- openat:257:56
openat2:437:437 statfs:137:43 fstatfs:138:44 chdir:80:49 fchdir:81:50 clone:56:220 clone3:435:435
fork:57:- vfork:58:- execve:59:221 execveat:322:281 kill:62:129 tkill:200:130 tgkill:234:131
rt_sigqueueinfo:129:138 rt_tgsigqueueinfo:297:240 pidfd_open:434:434 pidfd_send_signal:424:424
pidfd_getfd:438:438 prctl:157:167 ioctl:16:29 memfd_create:319:279 memfd_secret:447:447
socket:41:198 socketpair:53:199 connect:42:203 bind:49:200 listen:50:201 accept:43:202
accept4:288:242 sendto:44:206 recvfrom:45:207 sendmsg:46:211 recvmsg:47:212 sendmmsg:307:269
recvmmsg:299:243 shutdown:48:210 getsockname:51:204 getpeername:52:205 getsockopt:55:209
setsockopt:54:208 ptrace:101:117 process_vm_readv:310:270 process_vm_writev:311:271
process_madvise:440:440 kcmp:312:272 mount:165:40 umount2:166:39 pivot_root:155:41 chroot:161:51
unshare:272:97 setns:308:268 move_mount:429:429 open_tree:428:428 fsopen:430:430 fsconfig:431:431
fsmount:432:432 fspick:433:433 mount_setattr:442:442 setuid:105:146 setgid:106:144
setreuid:113:145 setregid:114:143 setresuid:117:147 setresgid:119:149 setfsuid:122:151
setfsgid:123:152 setgroups:116:159 capset:126:91 capget:125:90 chmod:90:- fchmod:91:52
fchmodat:268:53 chown:92:- fchown:93:55 lchown:94:- fchownat:260:54 utime:132:- utimes:235:-
utimensat:280:88 futimesat:261:- setxattr:188:5 lsetxattr:189:6 fsetxattr:190:7 removexattr:197:14
lremovexattr:198:15 fremovexattr:199:16 bpf:321:280 keyctl:250:219 add_key:248:217
request_key:249:218 perf_event_open:298:241 userfaultfd:323:282 io_uring_setup:425:425
io_uring_enter:426:426 io_uring_register:427:427 init_module:175:105 finit_module:313:273
delete_module:176:106 kexec_load:246:104 kexec_file_load:320:294 reboot:169:142 swapon:167:224
swapoff:168:225 acct:163:89 settimeofday:164:170 clock_settime:227:112 clock_adjtime:305:266
adjtimex:159:171 sethostname:170:161 setdomainname:171:162 ioperm:173:- iopl:172:- quotactl:179:60
fanotify_init:300:262 fanotify_mark:301:263 open_by_handle_at:304:265 name_to_handle_at:303:264
modify_ldt:154:- personality:135:92 shmget:29:194 shmat:30:196 shmctl:31:195 msgget:68:186
msgsnd:69:189 msgrcv:70:188 msgctl:71:187 semget:64:190 semop:65:193 semctl:66:191 mq_open:240:180
mq_unlink:241:181 mkdir:83:- mkdirat:258:34 rmdir:84:- unlink:87:- unlinkat:263:35 rename:82:-
renameat:264:38 renameat2:316:276 link:86:- linkat:265:37 symlink:88:- symlinkat:266:36
mknod:133:- mknodat:259:33 truncate:76:45 creat:85:- fallocate:285:47 setsid:112:157
setpgid:109:154 setpriority:141:140 sched_setaffinity:203:122 sched_setscheduler:144:119
sched_setparam:142:118 sched_setattr:314:274 ioprio_set:251:30 landlock_create_ruleset:444:444
landlock_add_rule:445:445 landlock_restrict_self:446:446 seccomp:317:277 fchmodat2:452:452
"""


def machine() -> str:
  """The machine this runs on, as the kernel names it."""
  return platform.machine()


def numbers(of_machine: str) -> dict[str, int]:
  """Name to number of the system calls a machine has; raises ValueError if it is not known."""
  if of_machine not in AUDIT_ARCH:
    raise ValueError(f'no system call table for {of_machine!r}; known: {", ".join(AUDIT_ARCH)}')
  column = 1 + list(AUDIT_ARCH).index(of_machine)
  rows = (entry.split(':') for entry in _TABLE.split())
  return {row[0]: int(row[column]) for row in rows if row[column] != '-'}
