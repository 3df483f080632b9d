# SPDX-License-Identifier: Apache-2.0
"""An existing SandboxFusion server in place of the local processes; the verdicts stay ours.

Each unit of work becomes one `POST /run_code` with a self-contained script: our `values` module,
the program, its inputs. The script prints tagged values behind a random mark; decoding, equality,
determinism and golds are decided here by the same `verify.Trial` as with local processes. The two
processes of a validation differ in their hash seeds: the script restarts its interpreter with the
seed it is given.

Isolation is what the server promises, so `isolation.level` is 'external'.

Source: SandboxFusion's API, sandbox/server/sandbox_api.py (RunCodeRequest, RunCodeResponse).
"""

from collections import Counter
from collections.abc import Iterable
import concurrent.futures
import http.client
import inspect
import itertools
import json
import secrets
import threading
import time
import urllib.error
import urllib.request
import warnings

from absolute_zero_jax.executor import client, link, policy, reports, values, verify
from absolute_zero_jax.types import Job, Status, Verdict

_RETRIES = 3                 # of a request that the server could not answer
_OVERHEAD_S = 2.0            # two interpreter starts on the server, on top of a unit's limit
_MAX_ANSWER_BYTES = 256 * values.MAX_FRAME_BYTES
_SEEDS = {'a': '1', 'b': '2'}
_SCRIPT = '''
import os, sys
if os.environ.get('PYTHONHASHSEED') != {seed!r}:
  os.environ['PYTHONHASHSEED'] = {seed!r}
  os.execv(sys.executable, [sys.executable, *getattr(sys, 'orig_argv', ['', *sys.argv])[1:]])
import io, json, types
out = sys.stdout
values = types.ModuleType('values')
exec({values!r}, values.__dict__)
sys.stdout = sys.stderr = io.StringIO()
names = {{'__builtins__': {{}}, 'Ellipsis': ..., 'float': float, 'complex': complex, 'set': set,
         'frozenset': frozenset, 'range': range}}
def report(outcomes):
  text = json.dumps(outcomes, ensure_ascii=False, separators=(',', ':'))
  if len(text.encode('utf-8', 'surrogatepass')) > values.MAX_FRAME_BYTES:
    outcomes = [['u', 'too big']] * len(outcomes)
  out.write({mark!r} + json.dumps(outcomes) + chr(10))
  out.flush()
def outcome(result):
  try:
    return ['v', values.encode(result)]
  except values.ValuesError as e:
    return ['u', str(e)]
def load(code):
  module = sys.modules['task'] = types.ModuleType('task')
  exec(code, module.__dict__)
  return module.__dict__['f']
def main():
  try:
    code = compile({program!r}, '<task>', 'exec', dont_inherit=True)
    f = load(code)
  except BaseException as e:
    return report([['m', type(e).__name__]])
  for i, text in enumerate({inputs!r}):
    found = []
    for _ in range({repeat}):
      try:
        if i and {repeat} == 1:
          f = load(code)
        result = eval('lambda f: f(' + text + ')', dict(names))(f)
        found.append(['r'] if {expect_error} else outcome(result))
      except BaseException as e:
        found.append(['x', type(e).__name__])
    report(found)
main()
out.flush()
os._exit(0)
'''


class SandboxFusion:
  """Same face as `Executor`, with a SandboxFusion server doing the running.

  Args:
    url: the server's root, e.g. 'http://localhost:8080'.
    workers: requests in flight; 0 takes 8.
    memory_mb, validate_timeout_s, score_timeout_s, equality, policy, modules, cache_size: as for
      `Executor`.
    min_isolation: accepted for the config's sake; the server cannot be measured from here.

  Raises:
    ValueError: an option out of range, or no http(s) address.
  """

  def __init__(self, url: str, *, workers: int = 0, validate_timeout_s: float = 2.0,
               score_timeout_s: float = 4.0, memory_mb: int = 512, equality: str = 'strict',
               policy: bool = True, modules: Iterable[str] | None = None, cache_size: int = 8192,
               min_isolation: str = 'standard'):
    if not url.startswith(('http://', 'https://')):
      raise ValueError(f"url={url!r} must be an http(s) address, e.g. 'http://localhost:8080'.")
    client.check_options(locals())
    # About the programs that are parsed here, for which the user can do nothing.
    warnings.filterwarnings('ignore', category=SyntaxWarning, module='<unknown>')
    self._url, self._memory_mb = url.rstrip('/') + '/run_code', memory_mb
    modules = frozenset(_MODULES if modules is None else modules)
    self._rules = verify.Rules(equality, policy, modules, validate_timeout_s, score_timeout_s)
    self._cache = verify.Cache(cache_size)
    self._pool = concurrent.futures.ThreadPoolExecutor(workers or 8, 'sandboxfusion')
    self._lock = threading.Lock()
    self._queue: list[tuple[int, int, concurrent.futures.Future, Job]] = []
    self._order = itertools.count()
    self._count: Counter = Counter()
    self.isolation = link.Isolation('external', {'server': url}, {})

  def __enter__(self) -> 'SandboxFusion':
    return self

  def __exit__(self, *error) -> None:
    self.close()

  def submit(self, job: Job, priority: int = 0) -> 'concurrent.futures.Future[Verdict]':
    """A future of the verdict; waiting jobs of higher priority go first."""
    job = client.checked(job)
    future: concurrent.futures.Future = concurrent.futures.Future()
    with self._lock:
      self._queue.append((-priority, next(self._order), future, job))
      self._queue.sort(key=lambda entry: entry[:2])
    self._pool.submit(self._work)
    return future

  def run(self, jobs: Iterable[Job], priority: int = 0) -> list[Verdict]:
    """The verdicts of `jobs`, in their order."""
    futures = [self.submit(job, priority) for job in jobs]
    return [future.result() for future in futures]

  def stats(self) -> dict[str, float]:
    with self._lock:
      counts = {name: float(n) for name, n in self._count.items()}
      return counts | {'pending': float(len(self._queue)), 'cache_hits': float(self._cache.hits)}

  def close(self) -> None:
    """Waits for requests in flight; jobs that have not started become `ExecutorError`."""
    with self._lock:
      dropped, self._queue = self._queue, []
    for _, _, future, _ in dropped:
      if future.set_running_or_notify_cancel():
        future.set_exception(link.ExecutorError('The executor is closed.'))
    self._pool.shutdown(wait=True)

  def _work(self) -> None:
    with self._lock:
      if not self._queue:
        return
      _, _, future, job = self._queue.pop(0)
    if not future.set_running_or_notify_cancel():
      return
    try:
      future.set_result(self._verdict(job))
    except link.ExecutorError as e:
      future.set_exception(e)

  def _verdict(self, job: Job) -> Verdict:
    with self._lock:          # trials share the cache
      trial = verify.Trial(job, self._rules, self._cache)
    while trial.verdict is None:
      for unit in trial.take():
        report = self._run_unit(unit)
        with self._lock:
          trial.feed(unit, report)
    with self._lock:
      self._count['jobs'] += 1
      self._count[f'verdict_{trial.verdict.status.value}'] += 1
    return trial.verdict

  def _run_unit(self, unit: reports.Unit) -> reports.Report:
    mark = f'@{secrets.token_hex(16)} '
    script = _SCRIPT.format(seed=_SEEDS.get(unit.group, '1'), mark=mark, program=unit.program,
                            inputs=list(unit.inputs), repeat=unit.repeat,
                            expect_error=unit.expect_error, values=_VALUES_SOURCE)
    started = time.monotonic()
    answer = self._post({'code': script, 'language': 'python', 'memory_limit_MB': self._memory_mb,
                         'run_timeout': unit.timeout_s + _OVERHEAD_S, 'compile_timeout': 10})
    return _read_answer(answer, unit, mark, time.monotonic() - started)

  def _post(self, body: dict) -> dict:
    request = urllib.request.Request(self._url, json.dumps(body).encode(),
                                     {'Content-Type': 'application/json'})
    for attempt in range(_RETRIES):
      with self._lock:
        self._count['requests'] += 1
      try:
        with urllib.request.urlopen(request, timeout=body['run_timeout'] + 30) as response:
          text = response.read(_MAX_ANSWER_BYTES + 1)
        if len(text) > _MAX_ANSWER_BYTES:      # the program's doing: read as a run that crashed
          return {}
        answer = json.loads(text)
        if isinstance(answer, dict) and answer.get('status') != 'SandboxError':
          return answer
        error = str(answer.get('message') if isinstance(answer, dict) else answer)[:200]
      except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as e:
        error = str(e)
      time.sleep(0.2 * 2 ** attempt)
    raise link.ExecutorError(f'SandboxFusion at {self._url} failed {_RETRIES} times: {error}')


def _read_answer(answer: dict, unit: reports.Unit, mark: str, wall_s: float) -> reports.Report:
  """The report that a server's answer amounts to; its text is as hostile as the program."""
  result = answer.get('run_result')
  result = result if isinstance(result, dict) else {}
  frames, malformed = [], False
  for line in str(result.get('stdout') or '').split('\n'):
    if line.startswith(mark) and len(frames) < len(unit.inputs):
      try:
        frames.append(reports.understand(line[len(mark):].encode('utf-8', 'surrogatepass'), unit))
      except values.ValuesError:
        malformed = True
        break
  seconds = result.get('execution_time')
  wall_s = float(seconds) if isinstance(seconds, (int, float)) else wall_s
  if malformed:
    return reports.Report(tuple(frames), Status.CRASHED, 'malformed report', wall_s)
  if len(frames) == len(unit.inputs) or (frames and frames[0].load_failed):
    return reports.Report(tuple(frames), Status.OK, wall_s=wall_s)
  if result.get('status') == 'TimeLimitExceeded':
    return reports.Report(tuple(frames), Status.TIMEOUT, 'time limit', wall_s)
  code = result.get('return_code')
  return reports.Report(tuple(frames), Status.CRASHED, f'ended with code {code}', wall_s)


_MODULES = policy.MODULES
_VALUES_SOURCE = inspect.getsource(values)
