# SPDX-License-Identifier: Apache-2.0
"""Canaries outside the fence, the corpus of hostile programs, and what each outcome may be called.

As a program (`python hostile.py CORPUS.jsonl [options as JSON]`) it runs the corpus and prints one
JSON line, so that tests can run it as another user.
"""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading

HOME = pathlib.Path('/tmp/azr_canary')  # the programs of the corpus name this place and these ports
SECRET = 'CANARY-SECRET-7f3a'
# Corpus word -> our statuses. 'contained': any verdict, as long as nothing happens outside. A
# program that the gate refuses never runs, so 'rejected' also answers the words for a run.
OUTCOMES = {
  'rejected': {'rejected'},
  'error': {'error', 'unsafe', 'crashed'},
  'timeout': {'timeout'},
  'memory': {'memory', 'timeout'},  # a slow machine may meet the time limit first
  'nondeterministic': {'nondeterministic'},
  'contained': {
    'ok',
    'error',
    'unsafe',
    'crashed',
    'timeout',
    'memory',
    'nondeterministic',
    'rejected',
  },
}


class Canary:
  """A secret file, a writable folder, listeners and a process that no program may touch."""

  def __init__(self):
    old = os.umask(0)
    (HOME / 'w').mkdir(parents=True, exist_ok=True)
    (HOME / 'secret.txt').write_text(SECRET)
    (HOME / 'w' / 'keep.txt').write_text('keep')
    os.umask(old)
    self.hits = []
    tcp, udp, unix = (
      socket.socket(),
      socket.socket(type=socket.SOCK_DGRAM),
      socket.socket(socket.AF_UNIX),
    )
    tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    tcp.bind(('127.0.0.1', 47131))
    udp.bind(('127.0.0.1', 47132))
    unix.bind('\0azr_canary')
    tcp.listen()
    unix.listen()
    self._sockets = {'tcp': tcp, 'udp': udp, 'unix': unix}
    self._closing = False
    self._threads = [
      threading.Thread(target=self._watch, args=pair, daemon=True) for pair in self._sockets.items()
    ]
    for thread in self._threads:
      thread.start()
    self.process = subprocess.Popen(['sleep', '10000'])
    os.environ['AZ_CANARY_TOKEN'] = SECRET

  def _watch(self, name: str, listener: socket.socket) -> None:
    while True:
      try:
        if name == 'udp':
          listener.recvfrom(100)
        else:
          listener.accept()[0].close()
      except OSError:
        return
      if self._closing:
        return
      self.hits.append(name)

  def effects(self) -> list[str]:
    """What happened outside since the start."""
    found = [f'reached {name}' for name in self.hits]
    for folder in (HOME / 'w', pathlib.Path('/dev/shm'), pathlib.Path.cwd()):
      found += [f'file {name}' for name in os.listdir(folder) if 'pwned' in name]
    if not (HOME / 'w' / 'keep.txt').exists():
      found.append('deleted a file')
    if self.process.poll() is not None:
      found.append('killed a process')
    elif (
      pathlib.Path(f'/proc/{self.process.pid}/stat').read_text().rpartition(')')[2].split()[0]
      == 'T'
    ):
      found.append('stopped a process')
    return found

  def close(self) -> None:
    self._closing = True
    for listener in self._sockets.values():
      try:
        listener.shutdown(socket.SHUT_RDWR)  # wakes the thread, which would keep the port
      except OSError:
        pass
    for thread in self._threads:
      thread.join(5)
    for listener in self._sockets.values():
      listener.close()
    if self.process.poll() is None:
      self.process.send_signal(signal.SIGCONT)
      self.process.kill()
    self.process.wait()
    os.environ.pop('AZ_CANARY_TOKEN', None)


def run_corpus(rows: list[dict], **options) -> dict:
  """Validates every program among neighbours; what came out, and what happened outside."""
  from absolute_zero_jax.executor import Executor
  from absolute_zero_jax.types import Job

  canary = Canary()

  def neighbour(i):
    program = 'def f(x):\n  s = "CROSS_JOB_MARKER' + 'x' * 40 + '"\n  return len(s) + x'
    return Job('run', program, (str(i),), (str(i + 56),))

  try:
    with Executor(**options) as executor:
      jobs = []
      for i, row in enumerate(rows):
        jobs += [Job('validate', row['code'], (row['input'],)), neighbour(i)]
      verdicts = executor.run(jobs)
      after = executor.run([neighbour(-1)])[0]
      stats, level = executor.stats(), executor.isolation.level
    effects = canary.effects()
  finally:
    canary.close()
  wrong, leaks = [], []
  for row, verdict in zip(rows, verdicts[::2]):
    allowed = set(OUTCOMES[row['expected']])
    if options.get('policy', True):
      allowed.add('rejected')
    elif row['expected'] == 'rejected' and row['category'] not in ('input_injection',):
      allowed = OUTCOMES['contained']  # what the gate would have refused must still be contained
    if verdict.status.value not in allowed:
      wrong.append([row['name'], row['expected'], verdict.status.value, verdict.error])
    shown = ' '.join(run.output for run in verdict.runs)
    if (
      SECRET in shown
      or 'CROSS_JOB' in shown
      or (row['name'] == 'cross_job_memory_scan' and shown not in ('', 'False', '[]'))
    ):
      leaks.append([row['name'], shown[:200]])
  return {
    'level': level,
    'effects': effects,
    'wrong': wrong,
    'leaks': leaks,
    'stats': stats,
    'neighbours': sum(v.runs[0].matches for v in verdicts[1::2]),
    'after': after.runs[0].matches,
    'statuses': {
      row['name']: v.status.value + ' ' + v.error for row, v in zip(rows, verdicts[::2])
    },
  }


if __name__ == '__main__':
  corpus = [json.loads(line) for line in open(sys.argv[1])]
  chosen = json.loads(sys.argv[2]) if len(sys.argv) > 2 else {}
  names = chosen.pop('names', None)
  print(json.dumps(run_corpus([r for r in corpus if not names or r['name'] in names], **chosen)))
