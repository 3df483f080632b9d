# SPDX-License-Identifier: Apache-2.0
"""The two phases of an iteration, proposing and answering, from prompts to judged attempts.

    prompts -> sampler --land (a sample has ended)--> executor --judge (its verdicts)--> Attempt

Both are host objects that know nothing of the sampler's order: samples land as they end, and are
judged in whatever order the caller asks for. `selfplay` decides that order, so that it never
depends on the executor's timing.
"""

import collections
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
import dataclasses
import functools
import json
from typing import Any, NamedTuple

import numpy as np

from absolute_zero_jax.types import Job, Role, Status, Task, Turn, Verdict

# Draws of references before a prompt that does not fit is the config's fault.
_REDRAWS = 20


@dataclasses.dataclass(frozen=True)
class Rules:
  """The numbers of an iteration; meaning and units stand in `config.get_config`."""
  batch: int
  mc_samples: int
  references: int
  solve_source: str
  draw: str
  reference_draw: str
  recent_steps: int
  keep: str
  refuse_duplicates: bool
  show_references: bool
  train_propose: bool
  mc_use: str
  max_prompt_tokens: int
  solver_only_steps: int = 0
  solve_samples: int = 1
  refuse_independent: bool = False
  max_alike: int = 0
  kind_batch: Mapping[str, int] = dataclasses.field(default_factory=dict)
  overlap: int = 0
  # No verdict at all for so long is a broken executor, not a slow program.
  deadline_s: float = 600.0

  def batch_of(self, kind: str) -> int:
    """Proposals, and solved tasks, of one kind and iteration."""
    return self.kind_batch.get(kind, self.batch)


class Tools(NamedTuple):
  """What an iteration works with; every entry can be replaced by a function of the same shape."""
  kinds: Sequence[Any]                              # see tasks.Kind
  prompts: Any                                      # tasks.prompts.PromptSet
  tokenizer: Any
  # sample(role, prompts_ids, samples_per_prompt, stop_fn, on_finish) -> Sample lists, in order;
  # with one more argument, `more`, for `Rules.overlap` (see `selfplay`)
  sample: Callable[..., list[list[Any]]]
  submit: Callable[[Job], futures.Future]
  rewards: Any                                      # rewards.Rewards
  # Called when answers are drawn and the executor is waited for; in an iteration that solves twice,
  # twice.
  idle: Callable[[], None] = lambda: None
  # Tasks that must not be played, e.g. programs of a test set; status 'excluded'.
  excludes: Callable[[Task], bool] = lambda task: False
  # What `Rules.max_alike` counts: equal for tasks that are too much alike.
  shape: Callable[[Task], str] = lambda task: task.key


@dataclasses.dataclass
class Attempt:
  """One sampled response on its way to an episode: what was asked, read, run and found."""
  role: Role
  kind: Any
  turn: Turn
  group: str
  references: tuple[Task, ...] = ()
  task: Task | None = None
  place: int = 0                                    # among the responses of one sampler call
  status: str = 'format'
  parsed: Any = None
  answer: str = ''
  accuracy: float = 0.0
  well_formed: bool = False
  verdicts: tuple[Verdict, ...] = ()
  solve_rate: float | None = None


class Proposals:
  """`rules.batch_of(kind)` proposals per kind: kinds in order, then rows.

  Args:
    buffer: knows the tasks that a proposal may repeat.
    source: where references are drawn from.
    name: of this play, in the names of groups.
  """

  def __init__(self, step: int, buffer: Any, source: Any, tools: Tools, rules: Rules,
               rng: np.random.Generator, name: str):
    self._step, self._buffer, self._tools, self._rules = step, buffer, tools, rules
    self._name = name
    self._asked = [(kind, *_propose_prompt(kind, source, tools, rules, rng))
                   for kind in tools.kinds for _ in range(rules.batch_of(kind.name))]
    self._landed: dict[int, tuple] = {}
    self._seen: set[str] = set()
    self._shapes: collections.Counter = collections.Counter()
    self.prompt_ids = [ids for _, _, ids in self._asked]
    self.stop_fn = _stop_fn(tools, Role.PROPOSE, [kind.name for kind in tools.kinds],
                            [kind.name for kind, _, _ in self._asked])

  def land(self, sample: Any) -> None:
    """Reads a finished sample and sends it to the executor."""
    kind, references, _ = self._asked[sample.request]
    text, well_formed, body = _read(self._tools, Role.PROPOSE, kind.name, sample)
    parsed = kind.parse_proposal(body, references) if well_formed else 'format'
    jobs = [] if isinstance(parsed, str) else kind.validation_jobs(parsed)
    self._landed[sample.request] = (
        sample, text, well_formed, parsed, [self._tools.submit(j) for j in jobs])

  def judge(self, i: int) -> Attempt:
    """Waits for the verdicts of proposal i; of equal tasks the one judged first is valid."""
    rules = self._rules
    kind, references, ids = self._asked[i]
    sample, text, well_formed, parsed, jobs = self._landed.pop(i)
    attempt = Attempt(Role.PROPOSE, kind, _turn(ids, sample, text),
                      group=f'{self._name}/propose/{kind.name}/{i}', place=i,
                      references=tuple(references), parsed=parsed, well_formed=well_formed)
    if isinstance(parsed, str):
      attempt.status = parsed
      return attempt
    pending = [f for landed in self._landed.values() for f in landed[-1]]
    attempt.verdicts = tuple(_result(f, rules, pending) for f in jobs)
    task = kind.to_task(parsed, attempt.verdicts, self._step)
    if not isinstance(task, str):
      _check_task(kind, task)
    attempt.status = task if isinstance(task, str) else self._refused(kind, task)
    attempt.task = task if attempt.status == 'ok' else None
    if attempt.task is not None:
      self._seen.add(task.key)
      self._shapes[kind.name, self._tools.shape(task)] += 1
    return attempt

  def _refused(self, kind: Any, task: Task) -> str:
    """Why a task that ran is none to play, or 'ok'."""
    if task.independent and self._rules.refuse_independent:
      return 'independent'
    if self._tools.excludes(task):
      return 'excluded'
    if self._rules.refuse_duplicates and (task.key in self._seen or task.key in self._buffer):
      return 'duplicate'
    # A kind that needs references takes its programs from them.
    if self._rules.max_alike and not kind.min_references and (
        self._shapes[kind.name, self._tools.shape(task)] >= self._rules.max_alike):
      return 'alike'
    return 'ok' if fits(kind, task, self._tools, self._rules) else 'too_long'


class Answers:
  """Answers to tasks, which may be asked for in parts; all answers to equal tasks are a group."""

  def __init__(self, name: str, tools: Tools, rules: Rules):
    self._name, self._tools, self._rules = name, tools, rules
    self._kinds = {k.name: k for k in tools.kinds}
    self._tasks: list[Task] = []
    self._prompt_ids: list[tuple[int, ...]] = []
    self._landed: dict[tuple[int, int], tuple] = {}
    self._repeated: dict[tuple[int, str], list[futures.Future]] = {}
    self._task_kinds: list[str] = []
    self.stop_fn = _stop_fn(tools, Role.SOLVE, list(self._kinds), self._task_kinds)

  def ask(self, tasks: Sequence[Task]) -> list[tuple[int, ...]]:
    """Token ids of the tasks' prompts; requests are numbered on from those before."""
    prompt_ids = [_solve_ids(self._kinds[t.kind], t, self._tools) for t in tasks]
    self._tasks += tasks
    self._task_kinds += [t.kind for t in tasks]
    self._prompt_ids += prompt_ids
    return prompt_ids

  def land(self, sample: Any) -> None:
    """Reads a finished sample and sends it to the executor."""
    task, tools = self._tasks[sample.request], self._tools
    kind = self._kinds[task.kind]
    text, well_formed, body = _read(tools, Role.SOLVE, task.kind, sample)
    parsed = kind.parse_answer(body) if well_formed or body else None
    if parsed is not None and not isinstance(parsed, str):
      raise _wrong(kind, 'parse_answer', parsed, 'text, or None')
    jobs = []
    if parsed is not None:
      if (sample.request, parsed) not in self._repeated:      # a weak policy repeats itself a lot
        self._repeated[sample.request, parsed] = [
            tools.submit(j) for j in kind.checking_jobs(task, parsed)]
      jobs = self._repeated[sample.request, parsed]
    self._landed[sample.request, sample.sample] = sample, text, well_formed, parsed, jobs

  def judge(self) -> list[list[Attempt]]:
    """Waits for all verdicts; one list of attempts per task, in the order they were asked."""
    out: list[list[Attempt]] = [[] for _ in self._tasks]
    pending = [f for jobs in self._repeated.values() for f in jobs]
    for place, (i, n) in enumerate(sorted(self._landed)):
      task = self._tasks[i]
      sample, text, well_formed, parsed, jobs = self._landed[i, n]
      attempt = Attempt(Role.SOLVE, self._kinds[task.kind],
                        _turn(self._prompt_ids[i], sample, text),
                        group=f'{self._name}/solve/{task.kind}/{task.key}', place=place,
                        task=task, parsed=parsed, well_formed=well_formed)
      if parsed is not None:
        attempt.verdicts = tuple(_result(f, self._rules, pending) for f in jobs)
        attempt.answer = parsed
        attempt.accuracy = _accuracy(attempt)
        if well_formed:
          attempt.status = 'ok' if attempt.accuracy == 1 else _why_wrong(attempt.verdicts)
      out[i].append(attempt)
    return out


def _check_task(kind, task: Any) -> None:
  """Raises ValueError for what cannot be played, kept or recorded."""
  right = isinstance(task, Task) and task.kind == kind.name and task.key and task.cases
  try:
    json.dumps(task.extra if right else None)
  except (TypeError, ValueError):
    right = False
  if not right:
    raise _wrong(kind, 'to_task', task, f'a Task of kind {kind.name!r} with a key, at least one '
                 'case and an `extra` that JSON can hold, or text')


def _accuracy(a: Attempt) -> float:
  given = a.kind.accuracy(a.task, a.answer, a.verdicts)
  try:
    accuracy = float(given)
  except (TypeError, ValueError):
    accuracy = -1.0
  if not 0 <= accuracy <= 1:               # a NaN neither
    raise _wrong(a.kind, 'accuracy', given, 'a number in [0, 1]')
  return accuracy


def _wrong(kind, method: str, given: Any, wanted: str) -> ValueError:
  return ValueError(f'the kind {kind.name!r}: {method} gave {given!r:.200}; it must give {wanted}.')


def _propose_prompt(kind, buffer, tools: Tools, rules: Rules, rng) -> tuple[list[Task], tuple]:
  """References and token ids; too long a prompt loses its longest references, then draws others."""
  variant = int(rng.integers(2**31))
  count = max(rules.references if rules.show_references else 0, kind.min_references)
  for _ in range(_REDRAWS):
    references = kind.references(buffer, rng, count, strategy=rules.reference_draw)
    while True:
      ids = tools.tokenizer.encode(kind.propose_prompt(references, tools.prompts, variant))
      if len(ids) <= rules.max_prompt_tokens:
        return references, tuple(ids)
      if len(references) <= kind.min_references:
        break
      longest = max(references, key=lambda t: len(t.program))
      references.remove(longest)
      if longest.kind == 'composite':      # the numbers of the others would be wrong
        references = [t for t in references if t.kind != 'composite']
  raise ValueError(f'sampler.max_prompt_tokens={rules.max_prompt_tokens} is too small: a '
                   f'{kind.name} proposal prompt has {len(ids)} tokens; allow at least that many.')


def _solve_ids(kind, task: Task, tools: Tools) -> tuple[int, ...]:
  return tuple(tools.tokenizer.encode(kind.solve_prompt(task, tools.prompts)))


def fits(kind, task: Task, tools: Tools, rules: Rules) -> bool:
  """Whether the solver's prompt is short enough for the sampler."""
  return len(_solve_ids(kind, task, tools)) <= rules.max_prompt_tokens


def _read(tools: Tools, role: Role, kind: str, sample: Any) -> tuple[str, bool, str]:
  """(text of a response, whether it has the demanded form, what `parse_*` reads)."""
  text = tools.tokenizer.decode(sample.ids, skip_special=True, continues=True)
  well_formed, body = tools.prompts.extract(role, kind, text, finished=sample.finish == 'stop')
  return text, well_formed, body


def _stop_fn(tools: Tools, role: Role, names: Sequence[str], kinds: Sequence[str]):
  """The sampler's text stop: how many tokens of a response to keep, or None to go on.

  `kinds` of the requests may grow afterwards, by kinds among `names`.
  """
  stops = {name: tools.prompts.stops(role, name) for name in names}
  if not any(stops.values()):
    return None
  return lambda request, ids: tools.tokenizer.stop_position(
      ids, stops[kinds[request]], functools.partial(tools.prompts.ends, role, kinds[request]))


def _turn(prompt_ids: tuple[int, ...], sample: Any, text: str) -> Turn:
  return Turn(prompt_ids=prompt_ids, response_ids=tuple(sample.ids),
              sampler_logprobs=tuple(sample.sampler_logprobs),
              model_logprobs=tuple(sample.model_logprobs), text=text, finish=sample.finish)


def _result(future: futures.Future, rules: Rules, pending: Sequence[futures.Future]) -> Verdict:
  """The verdict; RuntimeError once the executor has given none of those pending for too long."""
  while True:
    done = 0 if future.done() else sum(other.done() for other in pending)
    try:
      return future.result(timeout=rules.deadline_s)
    except futures.TimeoutError:
      if future.done():                    # an error of the executor's own, by that name
        return future.result()
      if sum(other.done() for other in pending) == done:
        raise RuntimeError(
            f'the executor gave no verdict within {rules.deadline_s:.0f} s; its own limits should '
            'have ended the program. Check its log and restart.') from None


def _why_wrong(verdicts: Sequence[Verdict]) -> str:
  for verdict in verdicts:
    if verdict.status != Status.OK:
      return verdict.status.value
  return 'wrong'
