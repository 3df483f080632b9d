# SPDX-License-Identifier: Apache-2.0
"""The trainer's side: the executor's options and what one does with it; `link` does the talking."""

import atexit
from collections.abc import Iterable, Sequence
import concurrent.futures
import dataclasses
import os
import sys
import weakref

from absolute_zero_jax.executor import fence, link, literals, policy, values
from absolute_zero_jax.types import Job, Verdict

OPS = ('validate', 'run', 'compare')
MAX_TIMEOUT_S = 60.0
_LAYERS = ('namespaces', 'user', 'landlock', 'seccomp')


def usable_cores() -> int:
  """Cores that this process may run on."""
  return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 2


def auto_workers() -> int:
  """Worker processes for this host: its usable cores, even, between 2 and 32."""
  return max(2, min(32, usable_cores() // 2 * 2))


class Executor:
  """Runs and verifies model-written programs in a process tree of its own.

  Safe to use from several threads. Use it as a context manager, or call `close`; a service that is
  dropped, or whose process dies in any way, ends by itself.

  Args:
    workers: warm worker processes, even and at least 2 (two hash seeds); 0 takes `auto_workers()`.
    validate_timeout_s, score_timeout_s: default limits of one process in 'validate' and 'run', of
      time that the program had a processor. A validation runs twice in half the time of a run, so
      that no accepted task is near the limit it is scored under.
    memory_mb: address space of one program.
    equality: 'strict' (types count at every depth) or 'loose' (Python's `==`).
    policy: False switches the static gate off; the fence stays.
    modules: importable modules of the standard library, default `policy.MODULES`; workers hold
      them in memory.
    min_isolation: refuse to start below this level: 'full', 'standard' or 'weak'. Weak means no
      system call filter (macOS, exotic kernels): programs can then do whatever this user can.
    allow_weak_isolation: the same as min_isolation='weak'.
    layers: fence layers to try; leave some out to measure or to test.
    cache_size: remembered outcomes of (program, input); 0 remembers nothing.
    max_pending: jobs that may wait for their verdict before `submit` blocks.
    max_pending_mb: the same for the text of the jobs.
    nice, cores: how much less urgent than the trainer the workers are, and the processors they
      may use, by number.
    per_worker: programs that one worker process may run at the same time.
    recycle_forks: a worker is replaced after this many programs.

  Raises:
    IsolationError: the fence is weaker than `min_isolation`; the text names the missing layers.
    ValueError: an option out of range.
    ExecutorError: the service does not start.
  """

  def __init__(self, *, workers: int = 0, validate_timeout_s: float = 2.0,
               score_timeout_s: float = 4.0, memory_mb: int = 512, equality: str = 'strict',
               policy: bool = True, modules: Iterable[str] | None = None,
               min_isolation: str = 'standard', allow_weak_isolation: bool = False,
               layers: Iterable[str] = _LAYERS,
               cache_size: int = 8192, max_pending: int = 16384, max_pending_mb: int = 256,
               nice: int = 10, cores: Sequence[int] = (), per_worker: int = 1,
               recycle_forks: int = 20000):
    check_options(locals())
    workers = workers or auto_workers()
    modules = sorted(_MODULES if modules is None else modules)
    rules = {'equality': equality, 'enforce_policy': policy, 'modules': modules,
             'validate_timeout_s': validate_timeout_s, 'score_timeout_s': score_timeout_s}
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    layers = [name for name in _LAYERS if name in set(layers)]
    options = {
        'root': root, 'workers': workers, 'rules': rules, 'cache_size': cache_size,
        'per_zygote': per_worker, 'recycle_forks': recycle_forks, 'compiles': True,
        'min_isolation': 'weak' if allow_weak_isolation else min_isolation,
        'zygote': {'memory_mb': memory_mb, 'layers': layers, 'namespaces': 'namespaces' in layers,
                   'modules': modules if policy else [*modules, *_WITHOUT_POLICY],
                   'nice': nice, 'cores': list(cores), 'cpu_s': int(MAX_TIMEOUT_S) + 1}}
    self._link = link.Link(options, max_pending, max_pending_mb << 20)
    self._finalizer = weakref.finalize(self, self._link.close)
    atexit.register(self._finalizer)
    self._link.open()

  def __enter__(self) -> 'Executor':
    return self

  def __exit__(self, *error) -> None:
    self.close()

  @property
  def isolation(self) -> link.Isolation:
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
    for start in range(0, len(jobs), link.BATCH):
      futures += self._link.submit(jobs[start:start + link.BATCH], priority, True)
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
# What programs can also import when nobody checks.
_WITHOUT_POLICY = ('_strptime', 'ast', 'calendar', 'datetime', 'io', 'locale', 'random', 'time')


def check_options(o: dict) -> None:
  """Raises ValueError for the first option that cannot work; an executor need not have all."""
  values.equal(None, None, o['equality'])
  if o['min_isolation'] not in fence.LEVELS:
    raise ValueError(f'min_isolation={o["min_isolation"]!r} must be one of {list(fence.LEVELS)}.')
  for name in ('modules', 'layers'):
    if isinstance(o.get(name), str):
      raise ValueError(f'{name}={o[name]!r} must be a tuple of names, such as {(o[name],)}.')
  unknown = set(o.get('layers', ())) - set(_LAYERS)
  if unknown:
    raise ValueError(f'layers={sorted(unknown)} are unknown; there are {list(_LAYERS)}.')
  unknown = set(o['modules'] or ()) - set(sys.stdlib_module_names)
  if unknown:
    raise ValueError(f'modules={sorted(unknown)} are none of the standard library, which is all '
                     'that programs may import.')
  cores = range(os.cpu_count() or 1)
  if not set(o.get('cores', ())) <= set(cores):
    raise ValueError(f'cores={list(o["cores"])} must be numbers of this machine\'s, 0 to '
                     f'{len(cores) - 1}.')
  bounds = {'workers': (0, 1024), 'memory_mb': (64, 1 << 20), 'cache_size': (0, 1 << 24),
            'max_pending': (1, 1 << 24), 'max_pending_mb': (1, 1 << 16), 'nice': (0, 19),
            'per_worker': (1, 8), 'recycle_forks': (1, 1 << 30),
            'validate_timeout_s': (0.01, MAX_TIMEOUT_S), 'score_timeout_s': (0.01, MAX_TIMEOUT_S)}
  for name, (low, high) in ((n, bound) for n, bound in bounds.items() if n in o):
    kind = (int, float) if name.endswith('_s') else int
    if not isinstance(o[name], kind) or not low <= o[name] <= high:
      raise ValueError(f'{name}={o[name]!r} must be {"a number" if "_s" in name else "an integer"} '
                       f'in [{low}, {high}].')
  if 'per_worker' in o and o['workers'] % 2:             # the local service
    raise ValueError(f'workers={o["workers"]} must be even: half of them has another hash seed; '
                     f'try {o["workers"] + 1}.')


def checked(job: Job) -> Job:
  """The job with texts cut just above their limits: the verdict is 'too long' either way.

  Raises:
    ValueError: unknown op, a limit out of range, more expected values than inputs.
  """
  if job.op not in OPS:
    raise ValueError(f'Job.op={job.op!r} must be one of {list(OPS)}.')
  if not isinstance(job.timeout_s, int | float) or not 0 <= job.timeout_s <= MAX_TIMEOUT_S:
    raise ValueError(f'Job.timeout_s={job.timeout_s!r} must be a number in '
                     f'[0, {MAX_TIMEOUT_S:g}]; 0 takes the default.')
  for name in ('inputs', 'expected'):
    texts = getattr(job, name)
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
      raise ValueError(f'Job.{name}={texts!r:.80} must be a tuple of texts, one per input, such as '
                       f'{("1, 2", "3, 4")}.')
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
