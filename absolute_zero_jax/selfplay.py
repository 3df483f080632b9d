# SPDX-License-Identifier: Apache-2.0
"""One iteration of self-play on the host: prompts -> sampler -> executor -> rewards -> episodes.

  propose   draw references, sample proposals; each is validated while others still decode
  measure   n Monte-Carlo answers to every valid proposal -> solve rate p -> learnability reward
  solve     draw tasks, sample one answer each, check it -> correctness reward; or let the answers
            of `measure` serve

Everything arrives as arguments (`Tools`): the sampler as a function, the executor as `submit`, the
kinds, prompts and rewards as objects. Results are read in the order of the requests, never in the
order of completion, so buffers and batches do not depend on the executor's timing.

Source: Absolute Zero (arXiv:2505.03335) Algorithm 1; spec section 1.2.
"""

import collections
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
import dataclasses
import itertools
from typing import Any, NamedTuple

import numpy as np

from absolute_zero_jax import buffer as buffer_lib
from absolute_zero_jax import rewards as rewards_lib
from absolute_zero_jax.types import Episode, Job, Role, Status, Task, Turn, Verdict

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
  # A verdict later than this is a broken executor, not a slow program.
  deadline_s: float = 600.0


class Tools(NamedTuple):
  """What an iteration works with; every entry can be replaced by a function of the same shape."""
  kinds: Sequence[Any]                              # see tasks.Kind
  prompts: Any                                      # tasks.prompts.PromptSet
  tokenizer: Any
  # sample(role, prompts_ids, samples_per_prompt, stop_fn, on_finish) -> Sample lists, in order
  sample: Callable[..., list[list[Any]]]
  submit: Callable[[Job], futures.Future]
  rewards: Any                                      # rewards.Rewards
  # Tasks that must not be played, e.g. programs of a test set; status 'excluded'.
  excludes: Callable[[Task], bool] = lambda task: False


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


class Result(NamedTuple):
  """What one iteration leaves: all attempts by phase, and the rewarded episodes in order.

  With `mc_use='reuse'` the measured attempts are among the solved ones too.
  """
  proposals: list[Attempt]
  measured: list[Attempt]
  solved: list[Attempt]
  episodes: list[Episode]


def iterate(step: int, buffer: buffer_lib.TaskBuffer, tools: Tools, rules: Rules,
            rng: np.random.Generator, *, timer, on_proposal=lambda attempt: None,
            source: buffer_lib.TaskBuffer | None = None, name: str = '') -> Result:
  """Plays one iteration and adds the valid proposals to `buffer`.

  Args:
    timer: `timer(phase)` is a context manager.
    on_proposal: sees every attempt once its verdict is known.
    source: where references and lagged tasks are drawn from; None: `buffer`.
    name: of this play in the names of groups; '' takes the step.
  """
  name, source = name or str(step), buffer if source is None else source
  seen = buffer.counts()
  proposals = []
  if step > rules.solver_only_steps:
    with timer('propose'):
      proposals = propose(step, buffer, tools, rules, rng, timer=timer, source=source, name=name)
  for attempt in proposals:
    on_proposal(attempt)
  new = [a.task for a in proposals if a.status == 'ok']

  # Before the new tasks are added: lagged tasks are older, and reused answers are of the new ones.
  reuse, drawn = rules.mc_use == 'reuse', None
  if reuse or rules.solve_source == 'lagged':
    fresh_rows = collections.Counter(task.kind for task in new if reuse)
    drawn = draw_tasks(step, source, tools, rules, rng,
                       {kind: n * rules.mc_samples for kind, n in fresh_rows.items()})
  if rules.keep == 'all':
    for task in new:
      buffer.add(task)
    drawn = draw_tasks(step, buffer, tools, rules, rng) if drawn is None else drawn
  # Measuring and solving share one sampler call wherever the tasks to solve are known by now.
  asked = new + (drawn or [])
  with timer('solve'):
    counts = [rules.mc_samples] * len(new) + [rules.solve_samples] * (len(asked) - len(new))
    answers = answer(asked, counts, name, tools, rules, timer=timer)
  measured, solved = answers[:len(new)], answers[len(new):]
  _set_solve_rates(proposals, measured)
  if rules.keep != 'all':
    for a in proposals:
      if a.status == 'ok' and rewards_lib.keeps(a.solve_rate, rules.keep):
        buffer.add(a.task)
    if drawn is None:
      drawn = draw_tasks(step, buffer, tools, rules, rng)
      with timer('solve'):
        solved = answer(drawn, [rules.solve_samples] * len(drawn), name, tools, rules, timer=timer)

  with timer('reward'):
    episodes = [_episode(a, step, tools.rewards.propose(a, seen), train=rules.train_propose)
                for a in proposals]
    episodes += [_episode(a, step, tools.rewards.solve(a), train=True) for g in solved for a in g]
    episodes += [_episode(a, step, tools.rewards.solve(a), train=rules.mc_use != 'measure')
                 for g in measured for a in g]
  for a in proposals:    # after the rewards: diversity terms compare with what was there before
    if a.status == 'ok':
      buffer.count_types(a.task)
  return Result(proposals, [a for g in measured for a in g],
                [a for g in solved + (measured if reuse else []) for a in g], episodes)


def propose(step: int, buffer, tools: Tools, rules: Rules, rng: np.random.Generator, *, timer,
            source=None, name: str = '') -> list[Attempt]:
  """Samples `rules.batch` proposals per kind and validates them; kinds in order, then rows.

  `source` and `name` as in `iterate`.
  """
  name, source = name or str(step), buffer if source is None else source
  asked = [(kind, *_propose_prompt(kind, source, tools, rules, rng))
           for kind in tools.kinds for _ in range(rules.batch)]
  pending: dict[int, tuple] = {}

  def on_finish(sample):
    kind, references, _ = asked[sample.request]
    text, well_formed, body = _read(tools, Role.PROPOSE, kind.name, sample)
    parsed = kind.parse_proposal(body, references) if well_formed else 'format'
    jobs = [] if isinstance(parsed, str) else kind.validation_jobs(parsed)
    pending[sample.request] = (text, well_formed, parsed, [tools.submit(j) for j in jobs])

  with timer('decode'):
    samples = tools.sample(Role.PROPOSE, [ids for _, _, ids in asked], [1] * len(asked),
                           _stop_fn(tools, Role.PROPOSE, [k.name for k, _, _ in asked]), on_finish)
  attempts, seen = [], set()
  with timer('wait'):
    for i, (kind, references, ids) in enumerate(asked):
      text, well_formed, parsed, jobs = pending[i]
      attempt = Attempt(Role.PROPOSE, kind, _turn(ids, samples[i][0], text),
                        group=f'{name}/propose/{kind.name}/{i}', place=i,
                        references=tuple(references),
                        parsed=parsed, well_formed=well_formed)
      if isinstance(parsed, str):
        attempt.status = parsed
      else:
        attempt.verdicts = tuple(_result(f, rules) for f in jobs)
        task = kind.to_task(parsed, attempt.verdicts, step)
        attempt.status = task if isinstance(task, str) else 'ok'
        attempt.task = None if isinstance(task, str) else task
      if attempt.task is not None and attempt.task.independent and rules.refuse_independent:
        attempt.status, attempt.task = 'independent', None
      if attempt.task is not None and tools.excludes(attempt.task):
        attempt.status, attempt.task = 'excluded', None
      if attempt.task is not None and rules.refuse_duplicates:
        if attempt.task.key in seen or attempt.task.key in buffer:
          attempt.status, attempt.task = 'duplicate', None
        else:
          seen.add(attempt.task.key)
      if attempt.task is not None and not _fits(kind, attempt.task, tools, rules):
        attempt.status, attempt.task = 'too_long', None
      attempts.append(attempt)
  return attempts


def answer(tasks: Sequence[Task], counts: Sequence[int], name: str, tools: Tools, rules: Rules, *,
           timer) -> list[list[Attempt]]:
  """Samples `counts[i]` answers to `tasks[i]` and checks them; one list of attempts per task.

  All answers to equal tasks are one group, named after `name` and the task's key.
  """
  if not tasks:
    return []
  kinds = {k.name: k for k in tools.kinds}
  prompt_ids = [_solve_ids(kinds[t.kind], t, tools) for t in tasks]
  pending: dict[tuple[int, int], tuple] = {}
  repeated: dict[tuple[int, str], list[futures.Future]] = {}

  def on_finish(sample):
    task = tasks[sample.request]
    text, well_formed, body = _read(tools, Role.SOLVE, task.kind, sample)
    parsed = kinds[task.kind].parse_answer(body) if well_formed else None
    jobs = []
    if parsed is not None:
      if (sample.request, parsed) not in repeated:      # a weak policy repeats itself a lot
        repeated[sample.request, parsed] = [
            tools.submit(j) for j in kinds[task.kind].checking_jobs(task, parsed)]
      jobs = repeated[sample.request, parsed]
    pending[sample.request, sample.sample] = (text, well_formed, parsed, jobs)

  with timer('decode'):
    samples = tools.sample(Role.SOLVE, prompt_ids, list(counts),
                           _stop_fn(tools, Role.SOLVE, [t.kind for t in tasks]), on_finish)
  out, places = [], itertools.count()
  with timer('wait'):
    for i, task in enumerate(tasks):
      group = []
      for n, sample in enumerate(samples[i]):
        text, well_formed, parsed, jobs = pending[i, n]
        attempt = Attempt(Role.SOLVE, kinds[task.kind], _turn(prompt_ids[i], sample, text),
                          group=f'{name}/solve/{task.kind}/{task.key}', place=next(places),
                          task=task, parsed=parsed, well_formed=well_formed)
        if parsed is not None:
          attempt.verdicts = tuple(_result(f, rules) for f in jobs)
          attempt.answer = parsed
          attempt.accuracy = attempt.kind.accuracy(task, parsed, attempt.verdicts)
          attempt.status = 'ok' if attempt.accuracy == 1 else _why_wrong(attempt.verdicts)
        group.append(attempt)
      out.append(group)
  return out


def draw_tasks(step: int, buffer, tools: Tools, rules: Rules, rng,
               have: Mapping[str, int] | None = None) -> list[Task]:
  """Tasks to solve, `rules.batch` per kind less those it has; none while its buffer is empty."""
  out = []
  for kind in tools.kinds:
    # Fresh tasks are already in the buffer, lagged ones of this step are not.
    window = rules.recent_steps - (rules.solve_source == 'fresh')
    tasks = buffer.draw(kind.name, rng, rules.batch - (have or {}).get(kind.name, 0),
                        step=step, strategy=rules.draw, recent_steps=window)
    fitting = [t for t in tasks if _fits(kind, t, tools, rules)]
    if fitting:      # the batch stays full: rows that do not fit are replaced by ones that do
      extra = rng.integers(len(fitting), size=len(tasks) - len(fitting))
      out += fitting + [fitting[i] for i in extra]
  return out


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
      references.remove(max(references, key=lambda t: len(t.program)))
  raise ValueError(f'sampler.max_prompt_tokens={rules.max_prompt_tokens} is too small: a '
                   f'{kind.name} proposal prompt has {len(ids)} tokens; allow at least that many.')


def _solve_ids(kind, task: Task, tools: Tools) -> tuple[int, ...]:
  return tuple(tools.tokenizer.encode(kind.solve_prompt(task, tools.prompts)))


def _fits(kind, task: Task, tools: Tools, rules: Rules) -> bool:
  return len(_solve_ids(kind, task, tools)) <= rules.max_prompt_tokens


def _read(tools: Tools, role: Role, kind: str, sample: Any) -> tuple[str, bool, str]:
  """(text of a response, whether it has the demanded form, what `parse_*` reads)."""
  text = tools.tokenizer.decode(sample.ids, skip_special=True, continues=True)
  well_formed, body = tools.prompts.extract(role, kind, text, finished=sample.finish == 'stop')
  return text, well_formed, body


def _stop_fn(tools: Tools, role: Role, kinds: Sequence[str]):
  """The sampler's text stop: how many tokens of a response to keep, or None to go on."""
  stops = {name: tools.prompts.stops(role, name) for name in set(kinds)}
  if not any(stops.values()):
    return None
  return lambda request, ids: tools.tokenizer.stop_position(ids, stops[kinds[request]])


def _turn(prompt_ids: tuple[int, ...], sample: Any, text: str) -> Turn:
  return Turn(prompt_ids=prompt_ids, response_ids=tuple(sample.ids),
              sampler_logprobs=tuple(sample.sampler_logprobs),
              model_logprobs=tuple(sample.model_logprobs), text=text, finish=sample.finish)


def _result(future: futures.Future, rules: Rules) -> Verdict:
  try:
    return future.result(timeout=rules.deadline_s)
  except futures.TimeoutError:
    raise RuntimeError(f'the executor gave no verdict within {rules.deadline_s:.0f} s; its own '
                       'limits should have ended the program. Check its log and restart.') from None


def _why_wrong(verdicts: Sequence[Verdict]) -> str:
  for verdict in verdicts:
    if verdict.status != Status.OK:
      return verdict.status.value
  return 'wrong'


def _set_solve_rates(proposals: list[Attempt], measured: list[list[Attempt]]) -> None:
  valid = [a for a in proposals if a.status == 'ok']
  for attempt, group in zip(valid, measured, strict=True):
    attempt.solve_rate = float(np.mean([a.accuracy for a in group]))


def _episode(a: Attempt, step: int, scored: tuple[float, dict[str, float]], *,
             train: bool) -> Episode:
  reward, parts = scored
  return Episode(role=a.role, kind=a.kind.name, step=step, group=a.group, turns=(a.turn,),
                 status=a.status, reward=float(reward), parts=parts, task=a.task, answer=a.answer,
                 train=train)
