# SPDX-License-Identifier: Apache-2.0
"""The supervisor's view of one zygote and its children: sockets, frames, deadlines, no verdicts."""

import _socket
import json
import os
import signal
import socket
import struct
import sys
import time
import traceback

from absolute_zero_jax.executor import child, poller, reports, values, verify, zygote
from absolute_zero_jax.types import Status

_BOOT = ('import sys, json; sys.path.insert(0, sys.argv[1]); '
         'from absolute_zero_jax.executor import zygote; zygote.main(json.loads(sys.argv[2]))')
# Past its deadline, a child that used less than this share of the processor over a while is stuck.
_STALLED = 0.001
_STALL_WINDOW_S = 0.5
# Wall time over CPU time at which even a starved child is given up. Where no filter makes waiting
# cost CPU time, a child that waits in small pieces looks like a starved one.
_MAX_STRETCH, _UNFILTERED_STRETCH = 100, 10
_SILENT = 'ended without a report'
KILLED = 'killed from outside'       # by the kernel when memory is short, or by a person
_SIGNALS = {signal.SIGXCPU: (Status.TIMEOUT, 'CPU limit'),
            signal.SIGSYS: (Status.UNSAFE, 'forbidden system call')}


class Lost(Exception):
  """The zygote is dead, stopped, or does not answer."""


class Request:
  """A job of the client, from its arrival to its verdict."""

  def __init__(self, number: int, priority: int, trial: verify.Trial):
    self.number, self.priority, self.trial = number, priority, trial
    self.arrived = time.monotonic()


class Work:
  """A unit in the queue or in a child, with every request that waits for it."""

  def __init__(self, unit: reports.Unit, priority: int, order: int):
    self.unit, self.priority, self.order = unit, priority, order
    self.waiting: list[Request] = []
    self.attempts = 0

  def __lt__(self, other: 'Work') -> bool:
    return (-self.priority, self.order) < (-other.priority, other.order)


class Child:
  """One child process, from its fork (ready, without a job) to its reaping."""

  def __init__(self, slot: int, sock: _socket.socket, owner: 'Zygote'):
    self.slot, self.sock, self.zygote = slot, sock, owner
    self.work: Work | None = None
    self.unit: reports.Unit | None = None
    self.frames: list = []
    self.end: Status | None = None
    self.error = ''
    self.deadline = self.quiet_until = float('inf')
    self.started = self.finished = 0.0
    self._buffer = bytearray()
    self._unsent = memoryview(b'')
    self._window_at, self._window_cpu = 0.0, 0.0

  def start(self, work: Work, unit: reports.Unit, compiles: bool) -> bool:
    """Hands the job over; the child's clock starts. False if `send_more` has more to send.

    `compiles` says whether the program is compiled here, where that can be done at little cost.
    """
    self.work, self.unit = work, unit
    return self._hand_over({
        'program': child.pack_program(unit.program) if compiles else unit.program,
        'inputs': [child.pack_call(text) for text in unit.inputs],
        'repeat': unit.repeat, 'expect_error': unit.expect_error}, unit.timeout_s)

  def start_probe(self) -> None:
    """Lets the child try forbidden things instead of a program; `frames` gets what it found."""
    self._hand_over({'probe': True}, float('inf'))

  def _hand_over(self, job: dict, timeout_s: float) -> bool:
    self._unsent = memoryview(child.pack(job))
    self.started = self._window_at = time.monotonic()
    self.deadline = self.started + timeout_s
    return self.send_more()

  def waits_for(self) -> int:
    """What to watch its socket for once it is no longer quiet."""
    return poller.READ | (poller.WRITE if self._unsent else 0)

  def send_more(self) -> bool:
    """Sends what the socket takes; True when nothing is left."""
    try:
      while self._unsent:
        self._unsent = self._unsent[self.sock.send(self._unsent):]
    except BlockingIOError:
      return False
    except OSError:
      self._unsent = memoryview(b'')       # it died; the end of its stream tells how
    return True

  def receive(self) -> None:
    """Reads what came; sets `end` once everything arrived or cannot arrive any more."""
    try:
      data = self.sock.recv(1 << 16)
    except BlockingIOError:
      return
    except OSError:
      data = b''
    if not data:
      self.end, self.error = Status.CRASHED, _SILENT
      return
    self._buffer += data
    while self.end is None and len(self._buffer) >= 4:
      length = struct.unpack_from('<I', self._buffer)[0]
      if length > values.MAX_FRAME_BYTES:
        self.end, self.error = Status.CRASHED, 'malformed report'
      elif len(self._buffer) < 4 + length:
        return
      else:
        self._take_frame(bytes(self._buffer[4:4 + length]))
        del self._buffer[:4 + length]

  def _take_frame(self, data: bytes) -> None:
    try:
      if self.unit is None:
        self.frames, self.end = [values.load_frame(data)], Status.OK
        return
      self.frames.append(reports.understand(data, self.unit))
    except Exception as e:
      if not isinstance(e, values.ValuesError):
        traceback.print_exc()        # ours; but one hostile frame must not end the service
      self.end, self.error = Status.CRASHED, 'malformed report'
      return
    if len(self.frames) == len(self.unit.inputs) or self.frames[0].load_failed:
      self.end = Status.OK

  def extend(self, cpu_s: float, now: float) -> None:
    """At the deadline: stops a child that had its time, extends for one that did not get it."""
    limit = self.unit.timeout_s
    window_s, is_stalled = now - self._window_at, False
    if window_s >= _STALL_WINDOW_S:
      is_stalled = cpu_s - self._window_cpu < _STALLED * window_s
      self._window_at, self._window_cpu = now, cpu_s
    is_filtered = self.zygote.report['seccomp'] == 'on'
    stretch = _MAX_STRETCH if is_filtered else _UNFILTERED_STRETCH
    is_late = now - self.started > stretch * limit
    if cpu_s < 0 or cpu_s >= 0.97 * limit or is_stalled or is_late:
      self.end, self.error = Status.TIMEOUT, 'time limit'
    else:
      self.deadline = now + max(limit - cpu_s, 0.005)

  def report(self, status: int, cpu_s: float, max_rss_kb: int, memory_mb: int) -> reports.Report:
    """The report of the reaped process."""
    end, error = self.end, self.error
    if end is Status.CRASHED and os.WIFSIGNALED(status):
      number = os.WTERMSIG(status)
      end, error = _SIGNALS.get(number, (end, f'signal {number}'))
      if number == signal.SIGKILL:
        end = Status.MEMORY if max_rss_kb > memory_mb * 512 else end
        error = KILLED if self.error == _SILENT else self.error
    return reports.Report(tuple(self.frames), end, error, self.finished - self.started, cpu_s)


class Zygote:
  """One zygote process: started, asked to fork and reap, watched.

  Attributes:
    report: layers of its fence, None until it is ready.
    spare: a child that waits for a job, so that forking is not part of a job's latency.
    running: children that have a job, by slot.
    reaping: children that are being killed and waited for, by slot.
  """

  def __init__(self, index: int, root: str, options: dict):
    self.index, self.group = index, 'ab'[index % 2]
    self.report: dict | None = None
    self.python = ''
    self.spare: Child | None = None
    self.running: dict[int, Child] = {}
    self.reaping: dict[int, Child] = {}
    self.forks = 0
    self.asked_at: float | None = None
    self._next_slot = self._owed = 0
    self._buffer = b''
    self.control, theirs = socket.socketpair()
    # Bound before the fork, symbols are looked up once, not in each child; and a heap with room at
    # its end takes what a child allocates without a system call.
    # Two hash seeds and no more: a task that passed validation meets none that it has not seen.
    env = {'PYTHONHASHSEED': str(index % 2 + 1), 'LC_ALL': 'C.UTF-8', 'LD_BIND_NOW': '1',
           'MALLOC_TOP_PAD_': str(1 << 20)}
    env |= {k: os.environ[k] for k in ('LD_LIBRARY_PATH', 'PYTHONHOME') if k in os.environ}
    with theirs:
      self._pids = [os.posix_spawn(
          sys.executable, [sys.executable, '-S', '-s', '-P', '-X', 'utf8', '-c', _BOOT, root,
                           json.dumps(options)], env,
          file_actions=[(os.POSIX_SPAWN_DUP2, theirs.fileno(), 0)])]
    self.control.setblocking(False)
    self._started = time.monotonic()

  def fork(self, retire: Child | None = None) -> Child:
    """Asks for a new child, and for reaping `retire` in the same record; returns the child."""
    ours, theirs = _socket.socketpair()      # plain ones: half the work per program
    ours.setblocking(False)
    slot = self._next_slot = (self._next_slot + 1) & 0xFFFFFFFF
    if retire is None:
      record = zygote.RECORD.pack(b'F', slot, 0)
    else:
      record = zygote.RECORD.pack(b'X', retire.slot, slot)
      self._expect_reply()
    try:
      rights = theirs.fileno().to_bytes(4, sys.byteorder)
      self._send(record, [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, rights)])
    finally:
      theirs.close()
    self.forks += 1
    self.spare = Child(slot, ours, self)
    return self.spare

  def reap(self, child: Child) -> None:
    """Asks that the child be killed and waited for; `receive` gives the answer."""
    self._expect_reply()
    self._send(zygote.RECORD.pack(b'R', child.slot, 0))

  def ask_cpu(self, child: Child) -> None:
    """Asks for the CPU time that the child has used; `receive` gives the answer."""
    self._expect_reply()
    self._send(zygote.RECORD.pack(b'Q', child.slot, 0))

  def _expect_reply(self) -> None:
    self._owed += 1
    if self.asked_at is None:
      self.asked_at = time.monotonic()

  def _send(self, record: bytes, ancillary=()) -> None:
    try:
      self.control.sendmsg([record], ancillary)
    except OSError as e:
      raise Lost(str(e)) from e

  def receive(self) -> list[tuple]:
    """Replies as (op, slot, status, user s, system s, max RSS KiB, faults); lines set attributes.

    Raises:
      Lost: the control socket closed.
    """
    try:
      data = self.control.recv(1 << 16)
    except BlockingIOError:
      return []
    except OSError as e:
      raise Lost(str(e)) from e
    if not data:
      raise Lost('closed')
    self._buffer += data
    while self.report is None and b'\n' in self._buffer:
      line, self._buffer = self._buffer.split(b'\n', 1)
      message = json.loads(line)
      if 'pid' in message:
        self._pids.append(message['pid'])
      else:
        self.report, self.python = message['report'], message['python']
    if self.report is None:
      return []
    whole = len(self._buffer) // zygote.REPLY.size * zygote.REPLY.size
    replies = list(zygote.REPLY.iter_unpack(self._buffer[:whole]))
    self._buffer = self._buffer[whole:]
    self._owed -= len(replies)
    if replies:
      self.asked_at = time.monotonic() if self._owed else None
    return replies

  def check(self, now: float, patience_s: float) -> None:
    """Raises `Lost` if the process is stopped, a zombie, or owes an answer for too long."""
    if self.asked_at is not None and now - self.asked_at > patience_s:
      raise Lost('no answer')
    if self.report is None and now - self._started > patience_s:
      raise Lost('did not start')
    for pid in self._pids:
      try:
        with open(f'/proc/{pid}/stat', 'rb') as f:
          if f.read(512).rpartition(b')')[2].split()[0] in b'TtZX':
            raise Lost('stopped')
      except OSError:        # gone, or /proc is missing, or hides what may not be traced (hidepid)
        if not _exists(pid):
          raise Lost('gone') from None

  def kill(self) -> None:
    """Ends the process and everything it forked; its children's sockets are closed."""
    for owned in [*self.running.values(), *self.reaping.values(), self.spare]:
      if owned is not None:
        owned.sock.close()
    self.control.close()
    # A second process, first of its PID namespace, dies with its parent, and its children with it.
    os.kill(self._pids[0], signal.SIGKILL)
    os.waitpid(self._pids[0], 0)


def _exists(pid: int) -> bool:
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  except PermissionError:
    pass
  return True
