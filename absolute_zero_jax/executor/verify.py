# SPDX-License-Identifier: Apache-2.0
"""From a job to runs to a verdict: everything the trusted side decides, and no process handling.

A `Trial` turns one `Job` into `Unit`s (one child process each) and reads their `Report`s. Whoever
has processes drives it:

  trial = Trial(job, rules, cache)
  while trial.verdict is None:
    for unit in trial.take(): trial.feed(unit, run_somewhere(unit))

'validate' runs each input twice in one process of group 'a', then once in a process of group 'b',
which has another hash seed and another address layout, in reverse order, so that what one input
leaves behind for the next shows. 'run' runs each input once, anywhere, or always
under one hash seed where that may decide the result; where modules of the program may keep what one
input leaves, each in a process of its own. An input that kills its
process costs that input only: the rest run in a fresh one. One that met a limit after others had
used some of it runs once more, in front of the rest.
"""

from collections import OrderedDict
import dataclasses
import functools
import hashlib
import re
import traceback
from typing import Any
import zlib

from absolute_zero_jax.executor import compare, literals, policy, reports, values
from absolute_zero_jax.types import Job, Run, Status, Verdict

MAX_CALLS = 64              # inputs in one process
_MAX_NESTED = 4             # calls of f in one input
_MAX_DEATHS = 3             # processes of one job that may die before the rest is given up
_FORGOTTEN = object()
# Of texts whose result the hash seed may decide: sets, written as `{1}` or `d.keys() & e` too.
_HASHED = re.compile(r'\{|\b(?:set|frozenset|hash|id|keys|items)\b')


@dataclasses.dataclass(frozen=True)
class Rules:
  """What a trusted side is configured with; the same rules must validate and score."""
  equality: str = 'strict'
  enforce_policy: bool = True
  modules: frozenset[str] = policy.MODULES
  validate_timeout_s: float = 2.0
  score_timeout_s: float = 4.0


class Cache:
  """Least recently used outcomes of (program, input) and gate results of programs."""

  def __init__(self, size: int):
    self._size = size
    self._kept: OrderedDict[Any, Any] = OrderedDict()
    self.hits = 0

  def get(self, key: Any) -> Any:
    """What is kept under the key, or None."""
    found = self._kept.get(key)
    if found is not None:
      self._kept.move_to_end(key)
    return found

  def put(self, key: Any, value: Any) -> None:
    """Keeps the value; the one that was not asked for the longest may leave."""
    self._kept[key] = value
    self._kept.move_to_end(key)
    if len(self._kept) > self._size:
      self._kept.popitem(last=False)


class Trial:
  """One job on its way to a verdict.

  Attributes:
    verdict: None until everything has been fed.
  """

  def __init__(self, job: Job, rules: Rules, cache: Cache):
    self.verdict: Verdict | None = None
    self._job, self._rules, self._cache = job, rules, cache
    self._outcomes: list[reports.Outcome | None] = [None] * len(job.inputs)
    self._inputs = [''] * len(job.inputs)
    self._calls: list[dict[str, Any]] = [{} for _ in job.inputs]
    self._program, self._key = '', ''
    self._units: list[reports.Unit] = []
    self._places: dict[reports.Unit, list[int]] = {}
    self._deaths = self._again = 0
    self._wall_s = self._cpu_s = 0.0
    self._second_look = False
    self._safely(self._start)

  def take(self) -> list[reports.Unit]:
    """Units to run now; each must be fed back once."""
    units, self._units = self._units, []
    return units

  def _start(self) -> None:
    job = self._job
    if job.op == 'compare':
      self.verdict = compare.answers(job, self._rules.equality)
      return
    if job.op not in ('validate', 'run'):
      self.verdict = Verdict(Status.REJECTED, error=f'unknown op {job.op[:20]!r}')
      return
    try:
      self._gate()
    except policy.PolicyError as e:
      runs = tuple(Run(Status.REJECTED, error=str(e)) for _ in job.inputs)
      self.verdict = Verdict(Status.REJECTED, runs, error=str(e))
      return
    self._read_inputs(self._open_places())

  def _read_inputs(self, places: list[int]) -> None:
    """Parses inputs and schedules their runs; where a proposal's input calls `f`, that first."""
    nested = [i for i in places if self._needs_call(i)]
    if nested:
      self._schedule('nested', nested)
      return
    if self._job.op == 'run':
      self._look_up()
    self._schedule('a' if self._job.op == 'validate' else self._group(), self._open_places())

  def _group(self) -> str:
    """The processes that score: any, or those of one hash seed where it may decide the result.

    By the program, so that one answer always earns the same.
    """
    if not any(_HASHED.search(text) for text in (self._program, *self._inputs)):
      return ''
    return 'ab'[zlib.crc32(self._program.encode('utf-8', 'surrogatepass')) % 2]

  def _needs_call(self, i: int) -> bool:
    try:
      calls = self._calls[i] if self._job.op == 'validate' else None
      text = self._job.inputs[i]
      # A call of f needs its letter (or one of another script, which Python reads as f); texts
      # without are remembered for both kinds of job at once.
      may_call = calls is not None and not (text.isascii() and 'f' not in text)
      self._inputs[i] = (literals.parse_inputs(text, calls).text if calls
                         else _inputs_of(text, may_call))
      return False
    except literals.NeedsCall as e:
      if len(self._calls[i]) < _MAX_NESTED:
        self._inputs[i] = e.inputs
        return True
      error = str(e)
    except literals.LiteralError as e:
      error = str(e)
    self._inputs[i] = ''
    self._outcomes[i] = reports.Outcome(Status.REJECTED, error=f'input: {error}')
    return False

  def _gate(self) -> None:
    digest = self._job.op == 'validate'
    key = 'gate', self._job.program, digest
    found = self._cache.get(key) or self._cache.get(('gate', self._job.program, True))
    if found is None:
      try:
        found = policy.gate(self._job.program, modules=self._rules.modules, digest=digest,
                            enforce=self._rules.enforce_policy)
      except policy.PolicyError as e:
        found = str(e)       # the exception itself would keep the whole syntax tree
      self._cache.put(key, found)
    if isinstance(found, str):
      raise policy.PolicyError(found)
    self._program, self._key = found.source, found.digest

  def _limit_s(self) -> float:
    default = (self._rules.validate_timeout_s if self._job.op == 'validate'
               else self._rules.score_timeout_s)
    return self._job.timeout_s or default

  def _cache_key(self, i: int) -> Any:
    return self._program, self._inputs[i], self._job.expect_error

  def _remember(self, i: int, outcome: reports.Outcome) -> None:
    if len(outcome.text) > compare.MAX_KEPT_CHARS:
      outcome = dataclasses.replace(outcome, value=_FORGOTTEN)
    self._cache.put(self._cache_key(i), outcome)

  def _look_up(self) -> None:
    for i in self._open_places():
      found = self._cache.get(self._cache_key(i))
      if found and not (found.status is Status.TIMEOUT and found.limit_s < self._limit_s()):
        self._outcomes[i] = found
        self._cache.hits += 1

  def _open_places(self) -> list[int]:
    return [i for i, outcome in enumerate(self._outcomes) if outcome is None]

  def _schedule(self, group: str, places: list[int]) -> None:
    repeat = 2 if group == 'a' and self._job.op == 'validate' else 1
    for start in range(0, len(places), MAX_CALLS // repeat):
      part = places[start:start + MAX_CALLS // repeat]
      given = part[:1] if self._is_alone() else part
      unit = reports.Unit(self._program, tuple(self._inputs[i] for i in given), repeat,
                  self._job.expect_error and group != 'nested', group, self._limit_s())
      self._units.append(unit)
      # Equal units of one job give equal reports; each place is answered by its own.
      self._places.setdefault(unit, []).append(part)
    self._finish_if_done()

  def _is_alone(self) -> bool:
    """Whether each input gets a process; one after another, so that a job keeps to few."""
    return self._job.op == 'run' and policy.may_keep_state(self._program)

  def feed(self, unit: reports.Unit, report: reports.Report) -> None:
    """Takes the report of a unit that `take` returned."""
    if self.verdict is None:
      self._safely(self._feed, unit, report)

  def _safely(self, step, *args) -> None:
    """Takes a step; whatever goes wrong in it costs this job, and not those beside it."""
    try:
      step(*args)
    except Exception as e:
      traceback.print_exc()
      error = f'fault of the verifier: {type(e).__name__}'
      runs = tuple(Run(Status.CRASHED, error=error) for _ in self._job.inputs)
      self._units, self.verdict = [], Verdict(Status.CRASHED, runs, error=error)

  def _feed(self, unit: reports.Unit, report: reports.Report) -> None:
    part = self._places[unit].pop()
    if not self._places[unit]:
      del self._places[unit]
    self._wall_s += report.wall_s
    self._cpu_s += report.cpu_s
    frames = report.frames[:len(part)]
    if frames and frames[0].load_failed:
      frames = frames[:1] * len(part)       # no input was reached
    for i, frame in zip(part, frames):
      self._settle(i, unit, frame.outcomes)
    rest = part[len(frames):]
    if rest and frames and self._is_alone():
      self._schedule(unit.group, rest)
    elif rest:
      self._go_on(unit, rest, report, len(frames))
    self._finish_if_done()

  def _go_on(self, unit: reports.Unit, rest: list[int], report: reports.Report, ran: int) -> None:
    """After a process that died at `rest[0]`, with `ran` inputs behind it."""
    end = report.end if report.end is not Status.OK else Status.CRASHED
    # The inputs of a process share its time and memory: where others used some, once more in front.
    is_shared = ran > 0 and end in (Status.TIMEOUT, Status.MEMORY)
    if is_shared and self._again < _MAX_DEATHS:
      self._again += 1
      self._schedule(unit.group, rest)
      return
    self._deaths += 1
    if not is_shared:
      died = reports.Outcome(end, error=report.error, limit_s=unit.timeout_s)
      self._settle(rest[0], unit, (died,))
      rest = rest[1:]
    if rest and self._deaths < _MAX_DEATHS and not is_shared:
      self._schedule(unit.group, rest)
      return
    for i in rest:
      self._outcomes[i] = reports.Outcome(end, error='not run')

  def _settle(self, i: int, unit: reports.Unit, outcomes: tuple[reports.Outcome, ...]) -> None:
    """Combines the outcomes of one input's repetitions, and with those of the first process."""
    first = outcomes[0]
    if unit.group == 'nested':
      self._calls[i][self._inputs[i]] = first.value
      self._inputs[i] = ''
      if first.status is not Status.OK:
        self._outcomes[i] = reports.Outcome(Status.REJECTED,
                                            error=f'input: f(..) gave {first.error}')
      return
    if self._second_look:
      earlier = self._outcomes[i]
      if not _same(earlier, first) and first.status not in (Status.TIMEOUT, Status.MEMORY):
        first = reports.Outcome(Status.NONDETERMINISTIC, error='two processes differ')
      elif first.status is Status.OK:
        first = earlier
    elif first.status is Status.OK or len(outcomes) > 1:
      worst = max(outcomes, key=lambda o: compare.SEVERITY.index(o.status))
      if not all(_same(first, o) for o in outcomes):
        first = (worst if worst.status in (Status.TIMEOUT, Status.MEMORY, Status.CRASHED)
                 else reports.Outcome(Status.NONDETERMINISTIC, error='two calls differ'))
    if self._job.op == 'run' and first.status is not Status.CRASHED and first.error != 'not run':
      if first.status is Status.TIMEOUT:
        first = dataclasses.replace(first, limit_s=unit.timeout_s)
      self._remember(i, first)
    self._outcomes[i] = first

  def _finish_if_done(self) -> None:
    if self._units or self._places or self.verdict is not None:
      return
    if self._open_places():        # results of nested calls have arrived
      self._read_inputs(self._open_places())
      return
    good = [i for i, o in enumerate(self._outcomes) if o.status is Status.OK]
    if self._job.op == 'validate' and good and not self._second_look:
      self._second_look, self._deaths, self._again = True, 0, 0
      self._schedule('b', good[::-1])
      return
    if self._job.op == 'validate':
      self._check_golds()
    runs = tuple(self._run(i) for i in range(len(self._outcomes)))
    status, error = compare.worst_of(runs)
    validated = self._job.op == 'validate' and status is not Status.REJECTED
    self.verdict = Verdict(status, runs, error=error, program=self._program if validated else '',
                           key=self._task_key() if validated else '',
                           wall_s=self._wall_s, cpu_s=self._cpu_s)

  def _check_golds(self) -> None:
    """A value that its own text would not score as an answer makes a task nobody can solve."""
    for i, o in enumerate(self._outcomes):
      if o.status is not Status.OK:
        continue
      if not self._job.expect_error:
        try:
          accepted = values.equal(compare.value_of(o.text), o.value, 'strict')
          reread = _inputs_of(self._inputs[i], False) == self._inputs[i]
        except literals.LiteralError:
          accepted = reread = False
        if not (accepted and reread):
          self._outcomes[i] = reports.Outcome(Status.ERROR, error='gold does not verify itself')
          continue
      self._remember(i, o)

  def _task_key(self) -> str:
    text = '\0'.join([self._key, *self._inputs])
    return hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()

  def _run(self, i: int) -> Run:
    o = self._outcomes[i]
    if o.status is not Status.OK:
      return Run(o.status, self._inputs[i], error=o.error)
    matches = self._job.op == 'validate'
    if i < len(self._job.expected):
      matches = _matches(o, self._job.expected[i], self._job.expect_error, self._rules)
    return Run(Status.OK, self._inputs[i], o.text, matches)


def _same(a: reports.Outcome, b: reports.Outcome) -> bool:
  if a.status is not b.status:
    return False
  if a.status is not Status.OK:
    return a.error == b.error
  return a.text == b.text or values.equal(a.value, b.value, 'strict') and a.value is not None


@functools.lru_cache(2048)
def _inputs_of(text: str, may_call: bool) -> str:
  return literals.parse_inputs(text, {} if may_call else None).text


def _matches(o: reports.Outcome, expected: str, expect_error: bool, rules: Rules) -> bool:
  if expected == o.text:
    return True
  if expect_error:
    return compare.error_name(expected) == compare.error_name(o.text)
  try:
    value = compare.value_of(o.text) if o.value is _FORGOTTEN else o.value
    return values.equal(value, compare.value_of(expected), rules.equality)
  except literals.LiteralError:
    return False
