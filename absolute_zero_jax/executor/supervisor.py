# SPDX-License-Identifier: Apache-2.0
"""The trusted process between trainer and programs: queue, deadlines, verdicts, restarts.

  client socket --jobs--> Trial --units--> queues by hash-seed group --> children of zygotes
                <-verdicts-- Trial <--reports-- frames, exit status

One thread, one event loop; started as a program of its own, so it holds none of the trainer's
memory, environment or descriptors. It ends when its client does, and its zygotes end with it.
"""

from collections import Counter, deque
import gc
import heapq
import json
import os
import signal
import socket
import time
import warnings

from absolute_zero_jax.executor import fence, poller, reports, verify, wire, workers
from absolute_zero_jax.types import Status

_TICK_S = 0.2               # how often zygotes are looked at while there is work
_PATIENCE_S = 20.0          # for an answer of a zygote that is alive
_MAX_ATTEMPTS = 3           # times that a unit is started while its processes get lost
_MAX_FAILED_STARTS = 4
_QUIET_S = 0.01             # how long frames of a running child wake nobody, see `_start`
_GATHER_S = 0.002           # how long verdicts wait for others while there is work
_COLLECT_AFTER = 50_000     # new objects between two looks for cycles
# A fence that lets one of these through does not deserve its level.
_MUST_FAIL = ('read a file', 'list a folder', 'write a file', 'make a TCP socket',
              'start a process', 'start a thread', 'execute a program', 'signal the parent',
              'signal everybody')


class Supervisor:
  """Serves one client until its socket closes."""

  def __init__(self, client: socket.socket, options: dict):
    self._client, self._options = client, options
    rules = options['rules']
    self._rules = verify.Rules(**rules | {'modules': frozenset(rules['modules'])})
    self._cache = verify.Cache(options['cache_size'])
    self._inbox, self._outbox = wire.Inbox(), bytearray()
    self._queues: dict[str, list[workers.Work]] = {'a': [], 'b': [], '': []}     # '': any group
    self._in_flight: dict[reports.Unit, workers.Work] = {}
    self._poller = poller.Poller()
    self._zygotes: list[workers.Zygote] = []
    self._failed_starts = 0
    self._announced = self._closed = False
    self._verdicts: list = []
    self._count, self._latency_s = Counter(), deque(maxlen=4096)
    self._busy_s = self._next_tick = self._next_flush = 0.0
    self._began, self._parent = time.monotonic(), os.getppid()

  def run(self) -> None:
    """The event loop; ends every zygote when it ends."""
    self._poller.watch(self._client, poller.READ, None)
    for index in range(self._options['workers']):
      self._start_zygote(index)
    while not self._closed:
      for owner, events in self._poller.wait(self._wait_s()):
        self._handle(owner, events)
      self._pass_time()
      self._dispatch_all()
      self._flush()
    for zygote in self._zygotes:
      zygote.kill()

  def _handle(self, owner, events: int) -> None:
    if owner is None:
      if events & poller.READ:
        self._read_client()
    elif isinstance(owner, workers.Zygote):
      if owner in self._zygotes:
        self._guard(owner, lambda: self._read_zygote(owner))
    elif owner.zygote in self._zygotes and owner.sock.fileno() >= 0:
      self._guard(owner.zygote, lambda: self._serve_child(owner, events))

  def _guard(self, zygote: workers.Zygote, action) -> None:
    try:
      action()
    except workers.Lost:
      self._replace(zygote)

  def _wait_s(self) -> float:
    times = [min(c.deadline, c.quiet_until) for z in self._zygotes for c in z.running.values()]
    times.append(max(self._next_tick, time.monotonic() + 0.001))
    if self._verdicts:
      times.append(self._next_flush)
    return max(0.0, min(times) - time.monotonic())

  # Client.

  def _read_client(self) -> None:
    try:
      data = self._client.recv(1 << 20)
    except BlockingIOError:
      return
    except OSError:
      data = b''
    if not data:
      self._closed = True
      return
    for message in self._inbox.feed(data):
      if 'jobs' in message:
        for number, priority, fields in message['jobs']:
          self._accept(number, priority, fields)
      elif 'stats' in message:
        self._outbox += wire.pack({'stats': self._stats(), 'id': message['stats']})

  def _accept(self, number: int, priority: int, fields: list) -> None:
    self._count['jobs'] += 1
    trial = verify.Trial(wire.to_job(fields), self._rules, self._cache)
    self._advance(workers.Request(number, priority, trial))

  def _advance(self, request: workers.Request) -> None:
    """Queues what a trial wants to run next, or reports its verdict."""
    for unit in request.trial.take():
      work = self._in_flight.get(unit)
      if work is None:
        work = self._in_flight[unit] = workers.Work(unit, request.priority, request.number)
        heapq.heappush(self._queue(unit), work)
      else:
        self._count['shared'] += 1
      work.waiting.append(request)
    verdict = request.trial.verdict
    if verdict is not None:
      self._count[f'verdict_{verdict.status.value}'] += 1
      self._latency_s.append(time.monotonic() - request.arrived)
      self._verdicts.append([request.number, wire.from_verdict(verdict)])

  def _flush(self) -> None:
    """Sends what the client takes; verdicts go in groups, because each message wakes a thread."""
    now = time.monotonic()
    if self._verdicts and (now >= self._next_flush or not self._in_flight):
      self._outbox += wire.pack({'verdicts': self._verdicts})
      self._verdicts, self._next_flush = [], now + _GATHER_S
    if not self._outbox or self._closed:
      return
    try:
      del self._outbox[:self._client.send(self._outbox)]
    except BlockingIOError:
      pass
    except OSError:
      self._closed = True
      return
    self._poller.watch(self._client, poller.READ | (poller.WRITE if self._outbox else 0), None)

  # Zygotes.

  def _start_zygote(self, index: int) -> None:
    zygote = workers.Zygote(index, self._options['root'], self._options['zygote'])
    self._zygotes.append(zygote)
    self._poller.watch(zygote.control, poller.READ, zygote)

  def _replace(self, zygote: workers.Zygote) -> None:
    """Ends a zygote; what it was running is tried once more elsewhere."""
    self._zygotes.remove(zygote)
    lost = list(zygote.running.values()) + list(zygote.reaping.values())
    for child in [*lost, zygote.spare]:
      if child is not None and child.sock.fileno() >= 0:
        self._poller.forget(child.sock)
    self._poller.forget(zygote.control)
    zygote.kill()
    self._count['zygote_restarts'] += 1
    if zygote.report is None:
      self._failed_starts += 1
      if self._failed_starts >= _MAX_FAILED_STARTS:
        self._refuse('worker processes do not start')
        return
    for child in lost:
      if child.work is not None:
        self._retry(child.work)
    self._start_zygote(zygote.index)

  def _retry(self, work: workers.Work) -> None:
    work.attempts += 1
    if work.attempts < _MAX_ATTEMPTS:
      self._count['retries'] += 1
      heapq.heappush(self._queue(work.unit), work)
    else:
      self._answer(work, reports.Report((), Status.CRASHED, f'lost {_MAX_ATTEMPTS} workers'))

  def _read_zygote(self, zygote: workers.Zygote) -> None:
    was_ready = zygote.report is not None
    for op, slot, status, user_s, system_s, max_rss_kb, faults in zygote.receive():
      if op == b'R':
        child = zygote.reaping.pop(slot, None)
        if child is not None:
          self._count['faults'] += faults
          self._reaped(child, status, user_s + system_s, max_rss_kb)
      elif op == b'Q' and slot in zygote.running:
        child = zygote.running[slot]
        child.receive()
        if child.end is None:
          child.extend(user_s, time.monotonic())
        if child.end is not None:
          self._finish(child)
    if zygote.report is not None and not was_ready:
      self._failed_starts = 0
      self._fork(zygote)
      if self._announced:
        self._check_level(zygote, fence.level(zygote.report))
      else:
        self._probe(zygote)

  def _fork(self, zygote: workers.Zygote, retire: workers.Child | None = None) -> None:
    child = zygote.fork(retire)
    self._poller.watch(child.sock, poller.END, child)

  def _probe(self, zygote: workers.Zygote) -> None:
    """The first ready zygote shows what its fence really does before any program runs."""
    child, zygote.spare = zygote.spare, None
    zygote.running[child.slot] = child
    child.start_probe()
    self._fork(zygote)

  def _announce(self, zygote: workers.Zygote, attempts: dict) -> None:
    level = fence.level(zygote.report)
    leaks = [name for name in _MUST_FAIL if attempts.get(name, 'OPEN') == 'OPEN']
    if leaks:
      level = 'weak'
    isolation = {'level': level, 'layers': zygote.report, 'attempts': attempts,
                 'python': zygote.python, 'leaks': leaks}
    if self._check_level(zygote, level, isolation):
      self._announced = True
      self._outbox += wire.pack({'ready': isolation})

  def _check_level(self, zygote: workers.Zygote, level: str, isolation: dict | None = None) -> bool:
    minimum = self._options['min_isolation']
    if fence.LEVELS.index(level) >= fence.LEVELS.index(minimum):
      return True
    self._refuse(f'isolation is {level}', isolation or {'level': level, 'layers': zygote.report})
    return False

  def _refuse(self, reason: str, isolation: dict | None = None) -> None:
    self._outbox += wire.pack({'refused': reason, 'isolation': isolation or {}})
    self._client.setblocking(True)
    self._flush()
    self._closed = True

  # Children.

  def _dispatch_all(self) -> None:
    if self._announced:
      for zygote in list(self._zygotes):
        self._guard(zygote, lambda z=zygote: self._dispatch(z))

  def _dispatch(self, zygote: workers.Zygote) -> None:
    """Gives the zygote's waiting child the best unit, while it may run one more."""
    if self._is_worn(zygote):
      if not zygote.running and not zygote.reaping:
        self._count['zygote_restarts'] -= 1      # planned
        self._replace(zygote)
      return
    while zygote.spare is not None and len(zygote.running) < self._options['per_zygote']:
      work = self._next(zygote.group)
      if work is None:
        return
      self._start(zygote, work)
      self._fork(zygote)

  def _is_worn(self, zygote: workers.Zygote) -> bool:
    return zygote.forks > self._options['recycle_forks']

  def _start(self, zygote: workers.Zygote, work: workers.Work) -> None:
    """Hands a unit to the spare child.

    Most children have reported on all their inputs within milliseconds, and close; so only that is
    waited for at first. Whoever takes longer is read as it writes.
    """
    child, zygote.spare = zygote.spare, None
    zygote.running[child.slot] = child
    if not child.start(work, work.unit, self._options['compiles']):
      self._poller.watch(child.sock, poller.WRITE, child)
    child.quiet_until = child.started + _QUIET_S
    self._count['runs'] += len(work.unit.inputs) * work.unit.repeat
    self._count['forks'] += 1

  def _queue(self, unit: reports.Unit) -> list[workers.Work]:
    return self._queues[unit.group if unit.group in ('a', 'b') else '']

  def _next(self, group: str) -> workers.Work | None:
    own, common = self._queues[group], self._queues['']
    if not own and not common:
      return None
    return heapq.heappop(own if own and (not common or own[0] < common[0]) else common)

  def _serve_child(self, child: workers.Child, events: int) -> None:
    if events & poller.WRITE and child.send_more():
      self._poller.watch(child.sock, poller.READ, child)
    if events & poller.READ:
      child.receive()
      if child.end is None:
        return
      if child is child.zygote.spare:      # it died before it had a job
        raise workers.Lost('spare child died')
      self._finish(child)

  def _finish(self, child: workers.Child) -> None:
    """No more to come: the next unit starts, then the child is killed and reaped."""
    child.finished = time.monotonic()
    self._busy_s += child.finished - child.started
    self._poller.forget(child.sock)
    child.sock.close()
    zygote = child.zygote
    del zygote.running[child.slot]
    zygote.reaping[child.slot] = child
    work = None
    if zygote.spare is not None and self._announced and not self._is_worn(zygote):
      work = self._next(zygote.group)
    if work is None:
      zygote.reap(child)
    else:
      self._start(zygote, work)
      self._fork(zygote, retire=child)

  def _reaped(self, child: workers.Child, status: int, cpu_s: float, max_rss_kb: int) -> None:
    if child.work is None:
      self._announce(child.zygote, child.frames[0] if child.frames else {})
      return
    report = child.report(status, cpu_s, max_rss_kb, self._options['zygote']['memory_mb'])
    if report.end is Status.UNSAFE or report.error == 'malformed report':
      self._count['security_events'] += 1
    self._count['cpu_ms'] += round(cpu_s * 1e3, 3)
    if report.error == workers.KILLED and child.work.attempts + 1 < _MAX_ATTEMPTS:
      self._retry(child.work)        # somebody outside did it
    else:
      self._answer(child.work, report)

  def _answer(self, work: workers.Work, report: reports.Report) -> None:
    self._in_flight.pop(work.unit, None)
    waiting, work.waiting = work.waiting, []
    for request in waiting:
      if request.trial.verdict is None:        # or a fault has ended it meanwhile
        request.trial.feed(work.unit, report)
        self._advance(request)

  # Time.

  def _pass_time(self) -> None:
    now = time.monotonic()
    for zygote in list(self._zygotes):
      for child in list(zygote.running.values()):
        if now >= child.quiet_until:
          child.quiet_until = float('inf')
          self._poller.watch(child.sock, child.waits_for(), child)
        if now >= child.deadline:
          child.deadline = float('inf')
          self._guard(zygote, lambda z=zygote, c=child: z.ask_cpu(c))
    if now < self._next_tick:
      return
    self._next_tick = now + (_TICK_S if self._in_flight or not self._announced else 5 * _TICK_S)
    if os.getppid() != self._parent:
      self._closed = True
    for zygote in list(self._zygotes):
      self._guard(zygote, lambda z=zygote: z.check(now, _PATIENCE_S))

  def _stats(self) -> dict[str, float]:
    latencies = sorted(self._latency_s) or [0.0]
    elapsed = time.monotonic() - self._began
    slots = max(1, len(self._zygotes) * self._options['per_zygote'])
    stats = {name: float(self._count[name]) for name in (
        'jobs', 'forks', 'runs', 'shared', 'retries', 'zygote_restarts', 'security_events',
        'faults')}
    stats |= {f'verdict_{s.value}': float(self._count[f'verdict_{s.value}']) for s in Status}
    for name, part in (('p50', 0.5), ('p95', 0.95), ('p99', 0.99), ('max', 1.0)):
      index = min(len(latencies) - 1, int(part * len(latencies)))
      stats[f'latency_{name}_s'] = latencies[index]
    return stats | {
        'cache_hits': float(self._cache.hits), 'cpu_s': self._count['cpu_ms'] / 1e3,
        'supervisor_cpu_s': time.process_time(), 'busy_fraction': self._busy_s / elapsed / slots,
        'queued': float(sum(map(len, self._queues.values()))),
        'running': float(sum(len(z.running) for z in self._zygotes)),
        'workers': float(len(self._zygotes))}


def main(argv: list[str]) -> None:
  """Entry of the supervisor process: `argv` is [options as JSON]; descriptor 0 is the client."""
  options = json.loads(argv[0])
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  warnings.simplefilter('ignore')       # about the programs it parses
  client = socket.socket(fileno=os.dup(0))
  client.setblocking(False)
  os.dup2(os.open(os.devnull, os.O_RDWR), 0)
  os.chdir('/')
  # Syntax trees are many objects and no cycles: looking for these after every 700 of them, and
  # among all that was imported, takes a tenth of this process's time.
  gc.freeze()
  gc.set_threshold(_COLLECT_AFTER)
  Supervisor(client, options).run()
