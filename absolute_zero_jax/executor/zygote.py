# SPDX-License-Identifier: Apache-2.0
"""The warm process that forks one fenced child per program, and knows nothing else.

It loads or shelves what programs may import, fences itself, and serves records on its socket:

  b'F' slot          fork a child for `slot`; its end of the job socket comes along (SCM_RIGHTS)
  b'R' slot          kill and reap the child of `slot`            -> (b'R', slot, status, usage)
  b'X' slot, other   R slot, then F other, in one record
  b'Q' slot          -> (b'Q', slot, 0, CPU seconds used so far)

Job text goes from supervisor to child directly, so that no program can find another's text, gold or
result in the memory it was forked from. The zygote never waits for a child that it has not killed.
"""

import _socket
import array
import gc
import os
import signal
import struct
import sys
import time

RECORD = struct.Struct('<cxxxII')
# op, slot, status, user s, system s, max RSS KiB, minor faults
REPLY = struct.Struct('<cxxxIiddII')
# Loaded at once: what the interpreter itself imports late, and what programs import most. The rest
# of what they may import waits on the shelf, since each megabyte held here adds a tenth of a
# millisecond to every program.
_LOADED = '''collections collections.abc contextlib copyreg functools heapq itertools math re string
  types typing warnings weakref'''.split()


def main(options: dict) -> None:
  """Serves on descriptor 0 until it closes; `options` are the supervisor's, under 'zygote'."""
  control = _socket.socket(fileno=os.dup(0))
  if options['namespaces']:
    _enter_namespaces(control)
  _be_modest(options)
  _preload(options['modules'])
  from absolute_zero_jax.executor import child, fence, memory
  memory.share_text()
  report = _enclose(fence, options)
  tighten = fence.tightener(cpu_s=options['cpu_s'], seccomp=report['seccomp'] == 'on')
  child.prepare()
  _warm_up(child)
  gc.collect()
  gc.disable()
  memory.trim()
  _warm_up(child)        # again, because a collection empties the interpreter's caches
  gc.freeze()
  _announce(control, report)
  try:
    _serve(control, child, tighten)
  finally:
    os._exit(0)


def _enter_namespaces(control: _socket.socket) -> None:
  """Continues in the first process of a new PID namespace, if the kernel allows."""
  from absolute_zero_jax.executor import fence
  status = fence.enter_namespaces()
  os.environ['AZ_NAMESPACES'] = status
  if status != 'on':
    return
  fence.prctl(1, int(signal.SIGKILL))      # PR_SET_PDEATHSIG: dies with its parent
  pid = os.fork()
  if pid == 0:
    return
  _send_line(control, {'pid': pid})      # as seen from outside
  control.close()
  os.close(0)
  os.waitpid(pid, 0)
  os._exit(0)


def _be_modest(options: dict) -> None:
  """Low priority, chosen cores, first to go when memory is short: the trainer comes first."""
  os.nice(options['nice'])
  if options['cores'] and hasattr(os, 'sched_setaffinity'):
    os.sched_setaffinity(0, options['cores'])
  try:
    with open('/proc/self/oom_score_adj', 'w') as f:
      f.write('1000')
  except OSError:
    pass      # no such file outside Linux, or /proc is not mounted


def _preload(modules: list[str]) -> None:
  """Makes `modules` and all codecs importable: a fenced process opens no file."""
  from absolute_zero_jax.executor import shelf
  # Modules register at-fork hooks (threading: 130 page faults in every child) that only matter to
  # processes with threads; this one never has any.
  register, os.register_at_fork = os.register_at_fork, lambda **hooks: None
  try:
    for name in _LOADED:
      __import__(name)
    shelf.stock([*modules, *_codecs()])
  finally:
    os.register_at_fork = register


def _codecs() -> list[str]:
  """Modules of the codecs, which are found by name at run time: 'abc'.encode('shift_jis')."""
  from encodings import aliases
  names = {*aliases.aliases.values(), 'idna', 'punycode', 'unicode_escape', 'raw_unicode_escape',
           'undefined', 'utf_8_sig', 'rot_13'} - {'bz2_codec'}
  return [f'encodings.{name}' for name in sorted(names)]


def _enclose(fence, options: dict) -> dict:
  sink = os.open(os.devnull, os.O_RDWR)
  for fd in (0, 1, 2):
    os.dup2(sink, fd)
  os.close(sink)
  report = fence.enclose(memory_mb=options['memory_mb'], layers=frozenset(options['layers']))
  report['namespaces'] = os.environ.pop('AZ_NAMESPACES', 'switched off')
  os.environ.clear()
  return report


def _warm_up(child) -> None:
  """Takes every code path, so that children find the pages written and the code specialised."""
  for program in 10 * ('def f(x):\n  return [x, {1: "a"}, (2.5, None)]',
                       'def f(x):\n  raise ValueError(x)'):
    inputs = [child.pack_call('"a"'), child.pack_call('[1]')]
    for form in (program, child.pack_program(program)):
      job = child.unpack(child.pack({'program': form, 'inputs': inputs})[4:])
      child.run(job['program'], job['inputs'], 2, False, child.frame)
  del sys.modules['task']        # of the last program
  import re
  re.compile('a+b').sub('x', 'aab')


def _announce(control: _socket.socket, report: dict) -> None:
  _send_line(control, {'report': report, 'python': sys.version.split()[0]})


def _send_line(control: _socket.socket, record: dict) -> None:
  import json
  control.sendall(json.dumps(record).encode() + b'\n')


def _serve(control, child, tighten) -> None:
  pids: dict[int, int] = {}
  fd_space = _socket.CMSG_SPACE(4)
  while True:
    record, ancillary, _, _ = control.recvmsg(RECORD.size, fd_space)
    if len(record) < RECORD.size:
      return                 # the supervisor is gone; children die with this process
    op, slot, other = RECORD.unpack(record)
    if op in (b'R', b'X'):
      control.sendall(_reap(slot, pids))
    elif op == b'Q':
      control.sendall(REPLY.pack(b'Q', slot, 0, _cpu(pids[slot]), 0.0, 0, 0))
    if op in (b'F', b'X'):
      fd = array.array('i', ancillary[0][2][:4])[0]
      pid = os.fork()
      if pid == 0:
        _become_child(fd, child, tighten)
      os.close(fd)
      pids[other if op == b'X' else slot] = pid


# Programs yield to whoever wakes up, first of all to the zygote that is to stop them; it is not
# batch work itself, or it would wait for their time slice to end.
_BATCH = (0, os.SCHED_BATCH, os.sched_param(0)) if hasattr(os, 'SCHED_BATCH') else None


def _become_child(fd: int, child, tighten) -> None:
  try:
    if fd != child.JOB_FD:
      os.dup2(fd, child.JOB_FD)
    os.closerange(child.JOB_FD + 1, 16)
    if _BATCH:
      os.sched_setscheduler(*_BATCH)
    tighten()
    child.serve()
  finally:
    os._exit(0)


def _reap(slot: int, pids: dict[int, int]) -> bytes:
  pid = pids.pop(slot)
  os.kill(pid, signal.SIGKILL)     # it is our zombie at worst, so the id cannot be another's
  _, status, usage = os.wait4(pid, 0)
  return REPLY.pack(b'R', slot, status, usage.ru_utime, usage.ru_stime, int(usage.ru_maxrss),
                    usage.ru_minflt)


def _cpu(pid: int) -> float:
  """CPU seconds of a living process: the kernel's clock of it, see clock_getcpuclockid(3)."""
  try:
    return time.clock_gettime(~pid << 3 | 2)
  except OSError:
    return -1.0
