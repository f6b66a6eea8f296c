"""Takes system calls away from this process and its children, as a container engine does.

Docker's default profile fails what needs CAP_SYS_ADMIN with EPERM, and clone3 with ENOSYS
(moby, profiles/seccomp/default.json).
"""

from __future__ import annotations

from o1jax.sandbox import libc, seccomp, syscalls

_NEW_NAMESPACES = 0x7E020000
_DOCKER = (
  'unshare setns mount umount2 pivot_root move_mount open_tree fsopen fsconfig fsmount fspick '
  'mount_setattr bpf perf_event_open keyctl add_key request_key userfaultfd kexec_load '
  'init_module finit_module delete_module reboot swapon swapoff acct settimeofday quotactl '
  'open_by_handle_at io_uring_setup io_uring_enter io_uring_register'
)
_LANDLOCK = 'landlock_create_ruleset landlock_add_rule landlock_restrict_self'


def deny(what: list[str]) -> None:
  """Sets the filter, for good. `what` holds `docker`, `landlock` and `seccomp`."""
  machine = syscalls.machine()
  allow, eperm, enosys = 0x7FFF0000, seccomp.errno_action(1), seccomp.errno_action(38)
  rules: dict[str, int | bytes] = {}
  if 'docker' in what:
    rules |= dict.fromkeys(_DOCKER.split(), eperm)
    rules['clone3'] = enosys
    rules['clone'] = seccomp.when_arg(0, (0,), allow, eperm, mask=_NEW_NAMESPACES)
  if 'landlock' in what:
    rules |= dict.fromkeys(_LANDLOCK.split(), enosys)
  if 'seccomp' in what:
    rules['seccomp'] = eperm
    rules['prctl'] = seccomp.when_arg(0, (libc.PR_SET_SECCOMP,), eperm, allow)
  libc.prctl(libc.PR_SET_NO_NEW_PRIVS, 1)
  seccomp.install(seccomp.assemble(rules, allow, machine))
