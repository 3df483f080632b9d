# SPDX-License-Identifier: Apache-2.0
"""The trainer's side: starts the supervisor, hands jobs over, resolves futures, restarts what died."""

import atexit
from collections.abc import Iterable, Sequence
import concurrent.futures
import dataclasses
import itertools
import json
import os
import socket
import subprocess
import sys
import threading
import time
import weakref

from absolute_zero_jax.executor import fence, literals, policy, values, verify, wire
from absolute_zero_jax.types import Job, Verdict

OPS = ('validate', 'run', 'compare')
MAX_TIMEOUT_S = 60.0
_BOOT = ('import sys; sys.path.insert(0, sys.argv[1]); '
         'from absolute_zero_jax.executor import supervisor; supervisor.main(sys.argv[2:])')
_START_TIMEOUT_S = 60.0
_MAX_RESTARTS = 5           # in a row, without one verdict in between
_BATCH = 64                 # jobs per message in `run`
_LAYERS = ('namespaces', 'user', 'landlock', 'seccomp')


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
    lines.append(f'  self-test    {len(self.attempts) - len(opened)} of {len(self.attempts)} attempts '
                 f'refused' + (f'; OPEN: {", ".join(opened)}' if opened else ''))
    return '\n'.join(lines)


def auto_workers() -> int:
  """Worker processes for this host: its usable cores, even, between 2 and 32."""
  cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 2
  return max(2, min(32, cores // 2 * 2))


class Executor:
  """Runs and verifies model-written programs in a process tree of its own.

  Safe to use from several threads. Use it as a context manager, or call `close`; a service that is
  dropped, or whose process dies in any way, ends by itself.

  Args:
    workers: warm worker processes, even and at least 2 (two hash seeds); 0 takes `auto_workers()`.
    validate_timeout_s, score_timeout_s: default CPU-aware limits of one process per op. A validation runs
      twice in half the time of a run, so that no accepted task is near the limit it is scored under.
    memory_mb: address space of one program.
    equality: 'strict' (types count at every depth) or 'loose' (Python's `==`).
    policy: False switches the static gate off; the fence stays.
    modules: importable modules, default `policy.MODULES`; only what the workers preload can be imported.
    min_isolation: refuse to start below this level: 'full', 'standard' or 'weak'. Weak means no
      system call filter (macOS, exotic kernels): programs can then do whatever this user can.
    allow_weak_isolation: the same as min_isolation='weak'.
    layers: fence layers to try; leave some out to measure or to test.
    cache_size: remembered outcomes of (program, input); 0 remembers nothing.
    max_pending: jobs that may wait for their verdict before `submit` blocks.
    max_pending_mb: the same for the text of the jobs.
    nice, cores: priority and processor numbers of the workers, to keep them off the trainer's back.
    per_worker: programs that one worker process may run at the same time.
    recycle_forks: a worker is replaced after this many programs.

  Raises:
    IsolationError: the fence here is weaker than `min_isolation`; the text names the missing layers.
    ValueError: an option out of range.
    ExecutorError: the service does not start.
  """

  def __init__(self, *, workers: int = 0, validate_timeout_s: float = 2.0, score_timeout_s: float = 4.0,
               memory_mb: int = 512, equality: str = 'strict', policy: bool = True,
               modules: Iterable[str] | None = None, min_isolation: str = 'standard',
               allow_weak_isolation: bool = False, layers: Iterable[str] = _LAYERS,
               cache_size: int = 8192, max_pending: int = 16384, max_pending_mb: int = 256,
               nice: int = 10, cores: Sequence[int] = (), per_worker: int = 1,
               recycle_forks: int = 20000):
    _check_options(locals())
    workers = workers or auto_workers()
    rules = {'equality': equality, 'enforce_policy': policy,
             'modules': sorted(_MODULES if modules is None else modules),
             'validate_timeout_s': validate_timeout_s, 'score_timeout_s': score_timeout_s}
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    layers = [name for name in _LAYERS if name in set(layers)]
    options = {
        'root': root, 'workers': workers, 'rules': rules, 'cache_size': cache_size,
        'per_zygote': per_worker, 'recycle_forks': recycle_forks,
        'min_isolation': 'weak' if allow_weak_isolation else min_isolation,
        'zygote': {'memory_mb': memory_mb, 'layers': layers, 'namespaces': 'namespaces' in layers,
                   'nice': nice, 'cores': list(cores), 'cpu_s': int(MAX_TIMEOUT_S) + 1}}
    self._link = _Link(options, max_pending, max_pending_mb << 20)
    self._finalizer = weakref.finalize(self, self._link.close)
    atexit.register(self._finalizer)
    self._link.open()

  def __enter__(self) -> 'Executor':
    return self

  def __exit__(self, *error) -> None:
    self.close()

  @property
  def isolation(self) -> Isolation:
    """The fence as found at the last start of the service."""
    return self._link.isolation

  def submit(self, job: Job, priority: int = 0, *, block: bool = True,
             ) -> 'concurrent.futures.Future[Verdict]':
    """A future of the job's verdict; higher priorities run first, equal ones in order.

    Blocks while the queue is at its limit, except in a future's callback. Cancelling the future
    forgets the verdict; it does not stop the run.

    Raises:
      ValueError: not a job: unknown op, a limit out of range, more expected values than inputs.
      QueueFull: with `block=False`, the queue is at its limit.
      ExecutorError: the service was closed or cannot be restarted.
    """
    return self._link.submit([checked(job)], priority, block)[0]

  def run(self, jobs: Iterable[Job], priority: int = 0) -> list[Verdict]:
    """The verdicts of `jobs`, in their order."""
    jobs = [checked(job) for job in jobs]
    futures = []
    for start in range(0, len(jobs), _BATCH):
      futures += self._link.submit(jobs[start:start + _BATCH], priority, True)
    return [future.result() for future in futures]

  def stats(self) -> dict[str, float]:
    """Counters since the service started and latency percentiles of its last 4,096 jobs.

    Must not be called in a future's callback.
    """
    return self._link.stats()

  def close(self) -> None:
    """Ends every process of the service; verdicts that are still open become `ExecutorError`."""
    atexit.unregister(self._finalizer)
    self._finalizer()


_MODULES = policy.MODULES


def _check_options(o: dict) -> None:
  values.equal(None, None, o['equality'])
  if o['min_isolation'] not in fence.LEVELS:
    raise ValueError(f'min_isolation={o["min_isolation"]!r} must be one of {list(fence.LEVELS)}.')
  unknown = set(o['layers']) - set(_LAYERS)
  if unknown:
    raise ValueError(f'layers={sorted(unknown)} are unknown; there are {list(_LAYERS)}.')
  bounds = {'workers': (0, 1024), 'memory_mb': (64, 1 << 20), 'cache_size': (0, 1 << 24),
            'max_pending': (1, 1 << 24), 'max_pending_mb': (1, 1 << 16), 'nice': (0, 19),
            'per_worker': (1, 8), 'recycle_forks': (1, 1 << 30),
            'validate_timeout_s': (0.01, MAX_TIMEOUT_S), 'score_timeout_s': (0.01, MAX_TIMEOUT_S)}
  for name, (low, high) in bounds.items():
    if not low <= o[name] <= high:
      raise ValueError(f'{name}={o[name]!r} must be in [{low}, {high}].')
  if o['workers'] % 2:
    raise ValueError(f'workers={o["workers"]} must be even: half of them has another hash seed; '
                     f'try {o["workers"] + 1}.')


def checked(job: Job) -> Job:
  """The job with texts cut just above their limits: the verdict is 'too long' either way."""
  if job.op not in OPS:
    raise ValueError(f'Job.op={job.op!r} must be one of {list(OPS)}.')
  if not 0 <= job.timeout_s <= MAX_TIMEOUT_S:
    raise ValueError(f'Job.timeout_s={job.timeout_s!r} must be in [0, {MAX_TIMEOUT_S:g}]; 0 is the default.')
  if len(job.expected) > len(job.inputs) or (job.op == 'compare' and
                                             len(job.expected) != len(job.inputs)):
    raise ValueError(f'Job.expected has {len(job.expected)} values for {len(job.inputs)} inputs.')
  texts = (*job.inputs, *job.expected)
  if len(job.program) <= policy.MAX_SOURCE_CHARS and all(
      len(text) <= literals.MAX_CHARS for text in texts):
    return job
  def cut(texts):
    return tuple(text[:literals.MAX_CHARS + 1] for text in texts)
  return dataclasses.replace(job, program=job.program[:policy.MAX_SOURCE_CHARS + 1],
                             inputs=cut(job.inputs), expected=cut(job.expected))


class _Pending:
  def __init__(self, job: Job, priority: int):
    self.future: concurrent.futures.Future = concurrent.futures.Future()
    self.priority, self.fields = priority, wire.from_job(job)
    self.size = 200 + len(job.program) + sum(map(len, job.inputs)) + sum(map(len, job.expected))


class _Link:
  """The connection to one supervisor after another. Its thread holds no reference to `Executor`."""

  def __init__(self, options: dict, max_pending: int, max_bytes: int):
    self.isolation: Isolation | None = None
    self._options, self._max_pending, self._max_bytes = options, max_pending, max_bytes
    self._numbers = itertools.count()
    self._pending: dict[int, _Pending] = {}
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
    empty, so that no credential of the trainer can reach it.
    """
    ours, theirs = socket.socketpair()
    env = {'LC_ALL': 'C.UTF-8'}
    env |= {k: os.environ[k] for k in ('LD_LIBRARY_PATH', 'PYTHONHOME') if k in os.environ}
    with theirs:
      self._process = subprocess.Popen(
          [sys.executable, '-S', '-s', '-P', '-X', 'utf8', '-c', _BOOT, self._options['root'],
           json.dumps(self._options)],
          stdin=theirs, stdout=subprocess.DEVNULL, env=env, cwd='/', start_new_session=True)
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
                        f'Check that {sys.executable} runs and that {self._options["root"]} is readable.')

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
    entries = [_Pending(job, priority) for job in jobs]
    with self._room:
      self._make_room(sum(e.size for e in entries), len(entries), block)
      numbered = [(next(self._numbers), entry) for entry in entries]
      self._pending.update(numbered)
      self._bytes += sum(e.size for e in entries)
    self._send_jobs(numbered)
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

  def _send_jobs(self, numbered: list[tuple[int, _Pending]]) -> None:
    if not numbered:
      return
    message = wire.pack({'jobs': [[n, e.priority, e.fields] for n, e in numbered]})
    with self._send_lock:
      self._send(message)

  def _send(self, message: bytes) -> None:
    try:
      self._socket.sendall(message)
    except OSError:
      pass        # the reading thread sees the same end, and sends what is pending to the next one

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
    import select
    if select.select([self._socket], [], [], 1.0)[0]:
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
      with self._room:
        entry = self._pending.pop(number, None)
        if entry is None:
          continue
        self._bytes -= entry.size
        self._room.notify_all()
      if entry.future.set_running_or_notify_cancel():
        entry.future.set_result(wire.to_verdict(fields))

  def _restart(self) -> wire.Inbox | None:
    """Another supervisor in place of one that died, with every open job sent again."""
    self._process.kill()
    self._process.wait()
    self._total_restarts += 1
    for attempt in itertools.count():
      self._restarts += 1
      if self._restarts > _MAX_RESTARTS:
        self._fail(ExecutorError(f'The executor\'s supervisor died {_MAX_RESTARTS} times without a verdict.'))
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
        for start in range(0, len(again), _BATCH):
          part = again[start:start + _BATCH]
          self._send(wire.pack({'jobs': [[n, e.priority, e.fields] for n, e in part]}))
        return inbox
    return None

  def stats(self) -> dict[str, float]:
    event, slot = threading.Event(), []
    number = next(self._numbers)
    self._answers[number] = event, slot
    with self._send_lock:
      self._send(wire.pack({'stats': number}))
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

  def close(self) -> None:
    if os.getpid() != self._owner:       # a fork of the trainer is not the trainer
      return
    self._closing = True
    if self._socket is not None:
      try:
        self._socket.shutdown(socket.SHUT_RDWR)
      except OSError:
        pass
    if self._process is not None:
      try:
        self._process.wait(3.0)
      except subprocess.TimeoutExpired:
        self._process.kill()
        self._process.wait()
    if self._thread is not None and self._thread is not threading.current_thread():
      self._thread.join(5.0)
    if self._socket is not None:
      self._socket.close()
    self._fail(ExecutorError('The executor is closed.'))


__all__ = ['Executor', 'ExecutorError', 'Isolation', 'IsolationError', 'QueueFull', 'auto_workers',
           'verify']
