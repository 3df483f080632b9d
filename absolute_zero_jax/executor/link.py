# SPDX-License-Identifier: Apache-2.0
"""The connection to one supervisor after another: starts it, sends jobs, resolves futures.

A supervisor that dies is replaced and gets every open job again; a number per job makes sure that
each future is resolved once. Jobs that were open at two deaths go to the next one alone, one after
the other: the job that it then dies of is `crashed`, and costs no other.
"""

from collections import deque
import concurrent.futures
import dataclasses
import itertools
import json
import os
import select
import socket
import subprocess
import sys
import threading
import time

from absolute_zero_jax.executor import fence, wire
from absolute_zero_jax.types import Job, Run, Status, Verdict

_BOOT = ('import sys; sys.path.insert(0, sys.argv[1]); '
         'from absolute_zero_jax.executor import supervisor; supervisor.main(sys.argv[2:])')
_START_TIMEOUT_S = 60.0
_MAX_RESTARTS = 20          # in a row, without one verdict in between
_MAX_STARTS = 5             # attempts at each of them
_SUSPECT_DEATHS, _MAX_DEATHS = 2, 3      # of supervisors that had the job
BATCH = 64                  # jobs per message


class IsolationError(ValueError):
  """The fence that this system allows is weaker than what was asked for."""


class ExecutorError(RuntimeError):
  """The service itself is gone: it was closed, or its supervisor keeps dying."""


class QueueFull(ExecutorError):
  """`submit(block=False)` found the queue at its limit."""


@dataclasses.dataclass(frozen=True)
class Isolation:
  """What stands between programs and this host, as the service found at its start.

  Attributes:
    level: 'full', 'standard' or 'weak', see `fence.level`.
    layers: layer -> 'on' or the reason why it is not.
    attempts: what a real fenced child tried -> 'denied (..)' or 'OPEN'.
    python: version of the interpreter that runs programs.
  """
  level: str
  layers: dict[str, str]
  attempts: dict[str, str]
  python: str = ''

  def __str__(self) -> str:
    lines = [f'isolation: {self.level} (Python {self.python})']
    lines += [f'  {name:<12} {state}' for name, state in sorted(self.layers.items())]
    opened = [name for name, result in self.attempts.items() if result == 'OPEN']
    refused = len(self.attempts) - len(opened)
    lines.append(f'  self-test    {refused} of {len(self.attempts)} attempts refused'
                 + (f'; OPEN: {", ".join(opened)}' if opened else ''))
    return '\n'.join(lines)


class _Pending:
  def __init__(self, job: Job, priority: int):
    self.future: concurrent.futures.Future = concurrent.futures.Future()
    self.priority, self.fields = priority, wire.from_job(job)
    self.deaths = 0
    self.size = 200 + len(job.program) + sum(map(len, job.inputs)) + sum(map(len, job.expected))


def _packed(numbered: list[tuple[int, _Pending]]) -> bytes:
  return wire.pack({'jobs': [[n, e.priority, e.fields] for n, e in numbered]})


class Link:
  """The connection to one supervisor after another. Its thread holds no reference to `Executor`."""

  def __init__(self, options: dict, max_pending: int, max_bytes: int):
    self.isolation: Isolation | None = None
    self._options, self._max_pending, self._max_bytes = options, max_pending, max_bytes
    self._numbers = itertools.count()
    self._pending: dict[int, _Pending] = {}
    self._suspects: deque[int] = deque()         # of the pending, those not sent yet
    self._bytes = 0
    self._room = threading.Condition()           # guards _pending, _bytes
    self._send_lock = threading.Lock()
    self._closing = False
    self._failure: Exception | None = None
    self._restarts = self._total_restarts = 0
    self._answers: dict[int, tuple[threading.Event, list]] = {}
    self._process: subprocess.Popen | None = None
    self._socket: socket.socket | None = None
    self._thread: threading.Thread | None = None
    self._owner = os.getpid()

  def open(self) -> None:
    """Starts the service; returns when it is ready."""
    try:
      inbox = self._start()
    except BaseException:
      self.close()
      raise
    self._thread = threading.Thread(target=self._read, args=(inbox,), daemon=True,
                                    name='executor-verdicts')
    self._thread.start()

  def _start(self) -> wire.Inbox:
    """Starts a supervisor and waits until it is ready.

    The supervisor is executed, never forked from this process: Popen without a preexec_fn calls no
    Python in the child, so this is safe where JAX or a notebook runs threads. Its environment is
    empty, so that no credential of the trainer can reach it. It gets a process group of its own, so
    that Ctrl-C is the trainer's alone, but stays in the session: where the kernel schedules by
    session (autogroup), priorities only count inside one.
    """
    ours, theirs = socket.socketpair()
    env = {'LC_ALL': 'C.UTF-8'}
    env |= {k: os.environ[k] for k in ('LD_LIBRARY_PATH', 'PYTHONHOME') if k in os.environ}
    with theirs:
      self._process = subprocess.Popen(
          [sys.executable, '-S', '-s', '-P', '-X', 'utf8', '-c', _BOOT, self._options['root'],
           json.dumps(self._options)],
          stdin=theirs, stdout=subprocess.DEVNULL, env=env, cwd='/', process_group=0)
    self._socket = ours
    inbox = wire.Inbox()
    for message in self._messages(inbox, _START_TIMEOUT_S):
      if 'refused' in message:
        raise self._refusal(message)
      if 'ready' in message:
        fields = message['ready']
        self.isolation = Isolation(fields['level'], fields['layers'], fields['attempts'],
                                   fields['python'])
        return inbox
    raise ExecutorError('The executor\'s supervisor did not start; its error is on standard error. '
                        f'Check that {sys.executable} runs and can read {self._options["root"]}.')

  def _messages(self, inbox: wire.Inbox, timeout_s: float):
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
      self._socket.settimeout(max(0.01, deadline - time.monotonic()))
      try:
        data = self._socket.recv(1 << 16)
      except TimeoutError:
        break
      finally:
        self._socket.settimeout(None)
      if not data:
        break
      yield from inbox.feed(data)

  def _refusal(self, message: dict) -> Exception:
    isolation = message['isolation']
    if 'layers' not in isolation:
      return ExecutorError(f'The executor did not start: {message["refused"]}.')
    missing = [f'{name}: {why}' for name, why in isolation['layers'].items() if why != 'on']
    leaks = isolation.get('leaks') or []
    return IsolationError(
        f'{message["refused"]}, but min_isolation={self._options["min_isolation"]!r}. '
        f'Missing layers: {"; ".join(missing) or "none"}.'
        + (f' The self-test could: {", ".join(leaks)}.' if leaks else '')
        + f' Accept this with min_isolation={isolation["level"]!r}.'
        + (' Programs can then do whatever this user can.' if isolation['level'] == 'weak' else ''))

  def submit(self, jobs: list[Job], priority: int, block: bool) -> list:
    """Futures of the jobs' verdicts, in order; see `client.Executor.submit`."""
    entries = [_Pending(job, priority) for job in jobs]
    numbered = [(next(self._numbers), entry) for entry in entries]
    message = _packed(numbered)      # first: what cannot be packed must not wait for a verdict
    with self._room:
      self._make_room(sum(e.size for e in entries), len(entries), block)
      self._pending.update(numbered)
      self._bytes += sum(e.size for e in entries)
    self._send_jobs(message)
    return [entry.future for entry in entries]

  def _make_room(self, size: int, count: int, block: bool) -> None:
    """Waits until the queue takes `count` more jobs, or is empty; the caller holds `_room`."""
    def is_full():
      return self._pending and (len(self._pending) + count > self._max_pending
                                or self._bytes + size > self._max_bytes)
    while is_full() and not self._failure and threading.current_thread() is not self._thread:
      if not block:
        raise QueueFull(f'{len(self._pending)} jobs are waiting (max_pending={self._max_pending}); '
                        'collect some verdicts first, or submit with block=True.')
      self._room.wait()
    if self._failure:
      raise self._failure

  def _send_jobs(self, message: bytes) -> None:
    with self._send_lock:
      self._send(message)

  def _send(self, message: bytes) -> None:
    try:
      self._socket.sendall(message)
    except OSError:
      pass        # the reading thread sees the same end, and sends what is pending to the next one
    except BaseException:
      self._hang_up()      # half a message may be out, and the next would be read as its other half
      raise

  def _read(self, inbox: wire.Inbox) -> None:
    while not self._closing:
      if not self._wait_readable():
        continue
      try:
        data = self._socket.recv(1 << 20)
      except OSError:
        data = b''
      if data:
        for message in inbox.feed(data):
          self._take(message)
      elif not self._closing:
        inbox = self._restart()
        if inbox is None:
          return

  def _wait_readable(self) -> bool:
    """False after a second without data; by then a stopped supervisor has been killed."""
    readable = select.poll()       # select.select fails above 1,024 descriptors
    readable.register(self._socket, select.POLLIN)
    if readable.poll(1000):
      return True
    try:
      with open(f'/proc/{self._process.pid}/stat', 'rb') as f:
        if f.read(512).rpartition(b')')[2].split()[0] in b'Tt':
          self._process.kill()
    except OSError:
      pass      # no /proc, or gone: then the socket ends
    return False

  def _take(self, message: dict) -> None:
    if 'stats' in message:
      event, slot = self._answers.pop(message['id'], (None, None))
      if event:
        slot.append(message['stats'])
        event.set()
    for number, fields in message.get('verdicts', ()):
      self._restarts = 0
      entry = self._resolve(number, wire.to_verdict(fields))
      if entry and entry.deaths >= _SUSPECT_DEATHS:
        self._send_suspect()

  def _resolve(self, number: int, verdict: Verdict) -> _Pending | None:
    with self._room:
      entry = self._pending.pop(number, None)
      if entry is None:
        return None
      self._bytes -= entry.size
      self._room.notify_all()
    if entry.future.set_running_or_notify_cancel():
      entry.future.set_result(verdict)
    return entry

  def _send_suspect(self) -> None:
    while self._suspects:
      number = self._suspects.popleft()
      with self._room:
        entry = self._pending.get(number)        # None: the service was closed meanwhile
      if entry:
        self._send_jobs(_packed([(number, entry)]))
        return

  def _restart(self) -> wire.Inbox | None:
    """Another supervisor in place of one that died, with every open job sent again."""
    self._process.kill()
    self._process.wait()
    self._total_restarts += 1
    # Should the text of a program have crashed the compiler, it will crash its own process next.
    self._options['compiles'] = False
    self._count_deaths()
    self._restarts += 1
    for attempt in range(_MAX_STARTS if self._restarts <= _MAX_RESTARTS else 0):
      if self._closing:
        return None
      time.sleep(min(2.0, 0.1 * attempt))
      with self._send_lock:
        try:
          self._socket.close()
          inbox = self._start()
        except (OSError, ValueError, ExecutorError):
          continue
        with self._room:
          again = sorted(self._pending.items())
        self._suspects = deque(n for n, e in again if e.deaths >= _SUSPECT_DEATHS)
        again = [(n, e) for n, e in again if e.deaths < _SUSPECT_DEATHS]
        for start in range(0, len(again), BATCH):
          self._send(_packed(again[start:start + BATCH]))
      self._send_suspect()
      return inbox
    self._fail(ExecutorError('The executor\'s supervisor keeps dying without a verdict, or does '
                             'not start any more; its error is on standard error.'))
    return None

  def _count_deaths(self) -> None:
    unsent = set(self._suspects)
    with self._room:
      sent = [(n, e) for n, e in self._pending.items() if n not in unsent]
    for number, entry in sent:
      entry.deaths += 1
      if entry.deaths >= _MAX_DEATHS:
        error = f'lost {_MAX_DEATHS} supervisors'
        runs = tuple(Run(Status.CRASHED, error=error) for _ in entry.fields[2])
        self._resolve(number, Verdict(Status.CRASHED, runs, error=error))

  def stats(self) -> dict[str, float]:
    """The supervisor's counters, if it answers within ten seconds, and this side's."""
    event, slot = threading.Event(), []
    number = next(self._numbers)
    self._answers[number] = event, slot
    with self._send_lock:
      self._send(wire.pack({'stats': number}))
    if self._failure is None:
      event.wait(10.0)
    self._answers.pop(number, None)
    found = slot[0] if slot else {}
    level = fence.LEVELS.index(self.isolation.level) if self.isolation else 0
    return found | {'pending': float(len(self._pending)), 'isolation_level': float(level),
                    'supervisor_restarts': float(self._total_restarts)}

  def _fail(self, failure: Exception) -> None:
    with self._room:
      self._failure = failure
      entries, self._pending = list(self._pending.values()), {}
      self._room.notify_all()
    for entry in entries:
      if entry.future.set_running_or_notify_cancel():
        entry.future.set_exception(failure)

  def _hang_up(self) -> None:
    """Ends the stream in both directions; the supervisor then ends everything below it."""
    if self._socket is not None:
      try:
        self._socket.shutdown(socket.SHUT_RDWR)
      except OSError:
        pass

  def close(self) -> None:
    """Ends the service; open jobs become `ExecutorError`. Does nothing in a fork of the trainer."""
    if os.getpid() != self._owner:       # a fork of the trainer is not the trainer
      return
    self._closing = True
    self._hang_up()
    if self._thread is not None and self._thread is not threading.current_thread():
      self._thread.join(_START_TIMEOUT_S)        # it may be starting another supervisor
      self._hang_up()
    if self._process is not None:
      try:
        self._process.wait(3.0)
      except subprocess.TimeoutExpired:
        self._process.kill()
        self._process.wait()
    if self._socket is not None:
      self._socket.close()
    self._fail(ExecutorError('The executor is closed.'))
