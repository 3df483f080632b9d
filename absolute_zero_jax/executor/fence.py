# SPDX-License-Identifier: Apache-2.0
"""The fence around model-written programs: what the kernel refuses to a zygote and its children.

Two levels, because what is inherited costs nothing per program:

  enclose()   once, in the zygote: namespaces (when allowed), unprivileged user, resource limits,
              no_new_privs, Landlock without any rule, and a system call filter that allows memory,
              clocks, read/write on open descriptors, and what a forker needs.
  tightener() in each child: CPU and process limits, and a second filter that takes the forker's
              calls away.

Only `prctl` and a few calls through ctypes are used: no library, no root. Each layer reports 'on'
or why it is not, and `level` sums them up. The system call filter is the layer that counts: with
the limits alone it has held every hostile program we have. The others are defence in depth.

Not covered: faults of the kernel itself, and micro-architectural side channels.
"""

from collections.abc import Callable
import ctypes
import errno
import os
import resource
import signal
import struct
import sys

from absolute_zero_jax.executor import syscalls

LEVELS = ('weak', 'standard', 'full')
NOBODY = 65534

_PR_SET_PDEATHSIG, _PR_GET_DUMPABLE, _PR_SET_DUMPABLE = 1, 3, 4
_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 22, 38
_CLONE_NEWUSER, _CLONE_NEWNET, _CLONE_NEWIPC, _CLONE_NEWPID = (
    0x10000000, 0x40000000, 0x08000000, 0x20000000)

_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x80000000
_DONE, _INTERRUPT = 0x00050000, 0x00050000 | errno.EINTR
_BASE = '''read write close fstat lseek munmap brk rt_sigaction rt_sigprocmask rt_sigreturn mremap
  madvise getpid getppid gettid getuid geteuid getgid getegid exit exit_group futex clock_gettime
  clock_getres gettimeofday time nanosleep clock_nanosleep sched_yield getrandom sigaltstack
  restart_syscall set_robust_list rseq getrusage times sched_getaffinity sysinfo uname
  getrlimit'''.split()
# What the zygote needs and a program must not have.
_FORKER = '''recvmsg sendmsg recvfrom sendto fork wait4 kill dup dup2 dup3 prlimit64 setrlimit
  prctl seccomp close_range clone sched_setscheduler'''.split()
# Nobody calls these by accident: SIGSYS ends the process, which counts as a security event.
_FATAL = '''ptrace process_vm_readv process_vm_writev mount umount2 pivot_root chroot kexec_load
  kexec_file_load init_module finit_module delete_module bpf perf_event_open keyctl add_key
  request_key userfaultfd io_uring_setup io_uring_enter io_uring_register unshare setns
  reboot swapon swapoff open_by_handle_at'''.split()
# CHILD_CLEARTID | CHILD_SETTID | exit signal: no thread, no namespace.
_PLAIN_FORK = 0x012000FF
_PROT_EXEC = 4
_FUTEX_WAITS = (0, 6, 9, 11, 13)     # WAIT, LOCK_PI, WAIT_BITSET, WAIT_REQUEUE_PI, LOCK_PI2
_F_GETFD, _F_GETFL = 1, 3


class _Fprog(ctypes.Structure):
  _fields_ = [('len', ctypes.c_ushort), ('filter', ctypes.c_char_p)]


def _libc() -> ctypes.CDLL:
  return ctypes.CDLL(None, use_errno=True)


def _check(result: int) -> int:
  if result < 0:
    code = ctypes.get_errno()
    raise OSError(code, os.strerror(code))
  return result


def prctl(option: int, *args) -> int:
  """`prctl(2)`; raises OSError."""
  words = [ctypes.c_ulong(a) if isinstance(a, int) else a for a in args]
  words += [ctypes.c_ulong(0)] * (4 - len(words))
  return _check(_LIBC.prctl(option, *words))


def syscall(name: str, *args) -> int:
  """A system call by name for this machine; raises OSError."""
  words = [ctypes.c_long(a) if isinstance(a, int) else a for a in args]
  return _check(_LIBC.syscall(ctypes.c_long(_NUMBERS[name]), *words))


def supported() -> str:
  """'' where the system call filter can be built, otherwise why not."""
  if not sys.platform.startswith('linux'):
    return f'no seccomp on {sys.platform}'
  if _MACHINE not in syscalls.NUMBERS:
    return f'no system call table for {_MACHINE}'
  return ''


_MACHINE = os.uname().machine
_NUMBERS = syscalls.NUMBERS.get(_MACHINE, {})
_LIBC = _libc() if sys.platform.startswith('linux') else None


def _op(code: int, k: int, jump_true: int = 0, jump_false: int = 0) -> bytes:
  return struct.pack('<HBBI', code, jump_true, jump_false, k)


def _load(offset: int) -> bytes:
  return _op(0x20, offset)


def _return(action: int) -> bytes:
  return _op(0x06, action)


def _on_call(number: int, body: list[bytes]) -> list[bytes]:
  """`body` runs if the loaded call number is `number`; it must return, or reload the number."""
  return [_op(0x15, number, 0, len(body)), *body]


def _if_argument(index: int, test: bytes, action: int) -> list[bytes]:
  """Within `_on_call`: returns `action` if `test` on the argument's low word fails, else allows."""
  return [_load(16 + 8 * index), test, _return(_ALLOW), _return(action)]


def _prologue() -> list[bytes]:
  """Kills calls of a foreign architecture (and the x32 interface); leaves the number loaded."""
  ops = [_load(4), _op(0x15, syscalls.AUDIT_ARCH[_MACHINE], 1, 0), _return(_KILL), _load(0)]
  if _MACHINE == 'x86_64':
    ops += [_op(0x35, 0x40000000, 0, 1), _return(_KILL)]
  return ops


def _zygote_filter() -> bytes:
  n = _NUMBERS
  ops = _prologue()
  for name in ('mmap', 'mprotect'):     # jset: no executable memory
    ops += _on_call(n[name], _if_argument(2, _op(0x45, _PROT_EXEC, 1, 0), _ERRNO))
  ops += _on_call(n['clone'], [_load(16), _op(0x54, ~_PLAIN_FORK & 0xFFFFFFFF), _op(0x15, 0, 0, 1),
                               _return(_ALLOW), _return(_ERRNO)])
  # F_SETOWN with F_SETSIG would send any signal to any process of this user.
  ops += _on_call(n['fcntl'], [_load(24), _op(0x15, _F_GETFD, 1, 0), _op(0x15, _F_GETFL, 0, 1),
                               _return(_ALLOW), _return(_ERRNO)])
  for name in _BASE + [c for c in _FORKER if c != 'clone']:
    if name in n:
      ops += _on_call(n[name], [_return(_ALLOW)])
  for name in _FATAL:
    ops += _on_call(n[name], [_return(_KILL)])
  return b''.join([*ops, _return(_ERRNO)])


def _child_filter() -> bytes:
  """No forker's calls; and nothing waits, or a program could hold its slot long at no CPU time.

  Only a process of one thread comes here, so nobody would ever wake it. A sleep is over at once. A
  wait for a lock is interrupted, as by a signal: Python then looks at the clock and waits again,
  which costs the time that is limited. (It does not look at the clock after a sleep.)
  """
  ops = _prologue()
  for name in ('nanosleep', 'clock_nanosleep'):
    ops += _on_call(_NUMBERS[name], [_return(_DONE)])
  left = len(_FUTEX_WAITS)
  ops += _on_call(_NUMBERS['futex'], [
      _load(24), _op(0x54, 0x7F), *(_op(0x15, w, left - i, 0) for i, w in enumerate(_FUTEX_WAITS)),
      _return(_ALLOW), _return(_INTERRUPT)])
  for name in _FORKER:
    if name in _NUMBERS:
      ops += _on_call(_NUMBERS[name], [_return(_ERRNO)])
  return b''.join([*ops, _return(_ALLOW)])


def _install(program: bytes) -> None:
  fprog = _Fprog(len(program) // 8, program)
  prctl(_PR_SET_SECCOMP, 2, ctypes.byref(fprog))


_CHILD_FILTER = b'' if supported() else _child_filter()


def _attempt(call, *args) -> str:
  """'on', or the reason why `call` failed."""
  try:
    call(*args)
    return 'on'
  except OSError as e:
    return errno.errorcode.get(e.errno) or e.strerror or str(e)


def enter_namespaces() -> str:
  """Moves this process into new network and IPC namespaces, its children into a new PID namespace.

  As root directly, otherwise inside a new user namespace; 'on', or why the kernel refuses. Call it
  in a process that then forks once.
  """
  if supported():
    return supported()
  flags = _CLONE_NEWNET | _CLONE_NEWIPC | _CLONE_NEWPID
  status = _attempt(syscall, 'unshare', flags)
  if status != 'on' and os.geteuid() != 0:
    status = _attempt(syscall, 'unshare', flags | _CLONE_NEWUSER)
  return status


def enclose(*, memory_mb: int, layers: frozenset[str]) -> dict[str, str]:
  """Fences the calling single-threaded process for good, with the layers that work here.

  Layer -> 'on' or the reason why not. After this the process opens no file, makes no socket and
  starts no program, so everything must be imported before.
  """
  report = {'limits': _attempt(_set_limits, memory_mb)}
  if not sys.platform.startswith('linux'):
    return report | dict.fromkeys(('user', 'privileges', 'landlock', 'seccomp'), supported())
  report['user'] = _attempt(_drop_user) if 'user' in layers else 'switched off'
  report['privileges'] = _attempt(_drop_privileges)
  report['landlock'] = _attempt(_landlock) if 'landlock' in layers else 'switched off'
  if supported():
    report['seccomp'] = supported()
  elif 'seccomp' not in layers:
    report['seccomp'] = 'switched off'
  else:
    report['seccomp'] = _attempt(_install, _zygote_filter())
  return report


def tightener(*, cpu_s: int, seccomp: bool) -> Callable[[], None]:
  """A function that sets the child's own level: CPU and process limits; no more forks, signals or
  limit changes.

  Everything it needs is made and used once here, in the zygote: in a child, each page that is
  written for the first time costs as much as ten system calls.

  Raises (the function does):
    OSError: the kernel refused; the child must then not run anything.
  """
  set_limit, cpu = resource.setrlimit, (cpu_s, cpu_s + 1)
  if _LIBC is None:
    return lambda: set_limit(resource.RLIMIT_CPU, cpu)
  call = ctypes.CDLL(None).prctl
  call.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
  call.restype = ctypes.c_int
  call(_PR_GET_DUMPABLE, 0, 0, 0, 0)
  program = _Fprog(len(_CHILD_FILTER) // 8, _CHILD_FILTER)
  address = ctypes.addressof(program) if seccomp else 0

  def tighten(_kept=program) -> None:
    set_limit(resource.RLIMIT_CPU, cpu)
    set_limit(resource.RLIMIT_NPROC, (0, 0))
    if call(_PR_SET_PDEATHSIG, 9, 0, 0, 0) or (address and call(_PR_SET_SECCOMP, 2, address, 0, 0)):
      raise OSError(errno.EPERM, 'prctl')
  return tighten


def level(report: dict[str, str]) -> str:
  """'full', 'standard' or 'weak' for a report of layers.

  standard: system call filter and limits. full: also Landlock, and another user or namespaces.
  """
  def on(layer):
    return report.get(layer) == 'on'
  if not (on('seccomp') and on('limits') and on('privileges')):
    return 'weak'
  return 'full' if on('landlock') and (on('user') or on('namespaces')) else 'standard'


def _set_limits(memory_mb: int) -> None:
  size = memory_mb << 20
  for name, limit in (('CORE', 0), ('FSIZE', 0), ('NOFILE', 16), ('MEMLOCK', 0), ('MSGQUEUE', 0),
                      ('STACK', 8 << 20), ('AS', size), ('DATA', size)):
    number = getattr(resource, f'RLIMIT_{name}', None)
    if number is None:
      continue
    hard = resource.getrlimit(number)[1]
    bound = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    try:
      resource.setrlimit(number, (bound, bound))
    except (ValueError, OSError) as e:
      if name not in ('MEMLOCK', 'MSGQUEUE', 'STACK'):
        raise OSError(errno.EPERM, f'RLIMIT_{name}') from e


def _drop_user() -> None:
  if os.geteuid() != 0:
    raise OSError(0, 'not root')
  os.setgroups([])
  os.setresgid(NOBODY, NOBODY, NOBODY)
  os.setresuid(NOBODY, NOBODY, NOBODY)


def _drop_privileges() -> None:
  prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))    # setresuid has cleared it
  prctl(_PR_SET_NO_NEW_PRIVS, 1)
  prctl(_PR_SET_DUMPABLE, 0)
  if _NUMBERS:
    header = struct.pack('<Ii', 0x20080522, 0)
    syscall('capset', ctypes.c_char_p(header), ctypes.c_char_p(bytes(24)))


def _landlock() -> None:
  if supported():
    raise OSError(0, supported())
  abi = syscall('landlock_create_ruleset', 0, 0, 1)
  files = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(abi, 16)) - 1
  attributes = struct.pack('<QQQ', files, 3 if abi >= 4 else 0, 3 if abi >= 6 else 0)
  size = 8 if abi < 4 else 16 if abi < 6 else 24
  ruleset = syscall('landlock_create_ruleset', ctypes.c_char_p(attributes), size, 0)
  try:
    syscall('landlock_restrict_self', ruleset, 0)
  finally:
    os.close(ruleset)
