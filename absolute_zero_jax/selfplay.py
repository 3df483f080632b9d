# SPDX-License-Identifier: Apache-2.0
"""One iteration of self-play on the host: prompts -> sampler -> executor -> rewards -> episodes.

  propose   draw references, sample proposals; each is validated while others still decode
  measure   n Monte-Carlo answers to every valid proposal -> solve rate p -> learnability reward
  solve     draw tasks, sample one answer each, check it -> correctness reward; or let the answers
            of `measure` serve

With `Rules.overlap` the three share one call of the sampler: answers to early proposals decode
beside late proposals.

Everything arrives as arguments (`Tools`): the sampler as a function, the executor as `submit`, the
kinds, prompts and rewards as objects. Results are read in an order that the requests and the
sampler decide, never the executor's timing, so buffers and batches do not depend on it either.

Source: Absolute Zero (arXiv:2505.03335) Algorithm 1.
"""

import collections
from collections.abc import Mapping, Sequence
import dataclasses
from typing import NamedTuple

import numpy as np

from absolute_zero_jax import buffer as buffer_lib
from absolute_zero_jax import phases
from absolute_zero_jax import rewards as rewards_lib
from absolute_zero_jax.types import Episode, Role, Task

Attempt, Rules, Tools = phases.Attempt, phases.Rules, phases.Tools


class Result(NamedTuple):
  """What one iteration leaves: all attempts by phase, and the rewarded episodes in order.

  Where measured attempts train (`mc_use` 'reuse' and 'train') they are among the solved ones too.
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
  play = _Play(step, buffer, buffer if source is None else source, tools, rules, rng, timer,
               name or str(step))
  seen = buffer.counts()
  if step <= rules.solver_only_steps:
    proposals, measured, solved = play.solve([])
  elif rules.overlap:
    proposals, measured, solved = play.overlapped()
  else:
    proposals, measured, solved = play.solve(play.propose())
  for attempt in proposals:
    on_proposal(attempt)
  measured_flat = [a for group in measured for a in group]
  solved_flat = [a for group in solved for a in group]

  with timer('reward'):
    episodes = [_episode(a, step, tools.rewards.propose(a, seen), train=rules.train_propose)
                for a in proposals]
    episodes += [_episode(a, step, tools.rewards.solve(a), train=True) for a in solved_flat]
    episodes += [_episode(a, step, tools.rewards.solve(a), train=rules.mc_use != 'measure')
                 for a in measured_flat]
  for a in proposals:    # after the rewards: diversity terms compare with what was there before
    if a.status == 'ok':
      buffer.count_types(a.task)
  reused = measured_flat if rules.mc_use != 'measure' else []
  return Result(proposals, measured_flat, solved_flat + reused, episodes)


class _Play(NamedTuple):
  """One iteration on its way; see `iterate` for the arguments."""
  step: int
  buffer: buffer_lib.TaskBuffer
  source: buffer_lib.TaskBuffer
  tools: Tools
  rules: Rules
  rng: np.random.Generator
  timer: object
  name: str

  def propose(self) -> list[Attempt]:
    with self.timer('propose'):
      return propose(self.step, self.buffer, self.tools, self.rules, self.rng, timer=self.timer,
                     source=self.source, name=self.name)

  def solve(self, proposals: list[Attempt]):
    """(proposals, measured groups, solved groups) by one sampler call wherever possible."""
    new = [a.task for a in proposals if a.status == 'ok']
    # Measuring and solving share one sampler call where the tasks to solve are known by now.
    drawn = self._draw(new)
    asked = new + (drawn or [])
    counts = [self.rules.mc_samples] * len(new) + [self.rules.solve_samples] * (
        len(asked) - len(new))
    answers = self._answer(asked, counts)
    return proposals, *self._kept(proposals, answers[:len(new)], answers[len(new):], drawn)

  def overlapped(self):
    """As `solve(propose())`, in one sampler call.

    A proposal's verdicts are waited for `rules.overlap` looks of the sampler after its end, so
    what decodes together depends on the sampler alone.
    """
    asked = phases.Proposals(self.step, self.buffer, self.source, self.tools, self.rules, self.rng,
                             self.name)
    answers = phases.Answers(self.name, self.tools, self.rules)
    first = len(asked.prompt_ids)              # requests from here on are answers
    ended: collections.deque[tuple[int, int]] = collections.deque()
    proposals: list[Attempt] = []
    valid: list[Attempt] = []                  # in the order of their answers
    looks, drawn = 0, None

    def on_finish(sample):
      if sample.request >= first:
        answers.land(dataclasses.replace(sample, request=sample.request - first))
        return
      asked.land(sample)
      ended.append((looks + self.rules.overlap, sample.request))

    def more():
      """(prompt, samples) of the requests that follow; None once none will."""
      nonlocal looks, drawn
      if len(proposals) == first:
        return None
      looks += 1
      new = []
      with self.timer('wait', out_of='decode'):
        while ended and ended[0][0] <= looks:
          proposals.append(asked.judge(ended.popleft()[1]))
          if proposals[-1].status == 'ok':
            new.append(proposals[-1])
      valid.extend(new)
      out = [(ids, self.rules.mc_samples) for ids in answers.ask([a.task for a in new])]
      if len(proposals) == first:
        proposals.sort(key=lambda a: a.place)
        drawn = self._draw([a.task for a in proposals if a.status == 'ok'])
        out += [(ids, self.rules.solve_samples) for ids in answers.ask(drawn or [])]
      return out

    def stop_fn(request, ids):
      stop = asked.stop_fn if request < first else answers.stop_fn
      return None if stop is None else stop(request if request < first else request - first, ids)

    with self.timer('decode'):
      self.tools.sample(Role.PROPOSE, asked.prompt_ids, [1] * first,
                        stop_fn if asked.stop_fn or answers.stop_fn else None, on_finish, more)
    self.tools.idle()
    with self.timer('wait'):
      groups = answers.judge()
    measured = {a.place: group for a, group in zip(valid, groups)}
    return proposals, *self._kept(proposals, [measured[i] for i in sorted(measured)],
                                  groups[len(valid):], drawn)

  def _draw(self, new: list[Task]) -> list[Task] | None:
    """Adds new tasks and draws those to solve; None where both must wait for the solve rates."""
    rules = self.rules
    reuse, drawn = rules.mc_use == 'reuse', None
    # Before the new are added: lagged tasks are older, and reused answers are of the new ones.
    if reuse or rules.solve_source == 'lagged':
      fresh_rows = collections.Counter(task.kind for task in new if reuse)
      drawn = draw_tasks(self.step, self.source, self.tools, rules, self.rng,
                         {kind: n * rules.mc_samples for kind, n in fresh_rows.items()})
    if rules.keep == 'all':
      for task in new:
        self.buffer.add(task)
      if drawn is None:
        drawn = draw_tasks(self.step, self.buffer, self.tools, rules, self.rng)
    return drawn

  def _kept(self, proposals, measured, solved, drawn):
    """Solve rates are known: adds the tasks that had to wait for them, and solves what is left."""
    for attempt, group in zip([a for a in proposals if a.status == 'ok'], measured, strict=True):
      attempt.solve_rate = float(np.mean([a.accuracy for a in group]))
    if self.rules.keep != 'all':
      for a in proposals:
        if a.status == 'ok' and rewards_lib.keeps(a.solve_rate, self.rules.keep):
          self.buffer.add(a.task)
      if drawn is None:
        tasks = draw_tasks(self.step, self.buffer, self.tools, self.rules, self.rng)
        solved = self._answer(tasks, [self.rules.solve_samples] * len(tasks))
    return measured, solved

  def _answer(self, tasks, counts):
    with self.timer('solve'):
      return answer(tasks, counts, self.name, self.tools, self.rules, timer=self.timer)


def propose(step: int, buffer, tools: Tools, rules: Rules, rng: np.random.Generator, *, timer,
            source=None, name: str = '') -> list[Attempt]:
  """Samples `rules.batch_of(kind)` proposals and validates them; kinds in order, then rows.

  `source` and `name` as in `iterate`.
  """
  asked = phases.Proposals(step, buffer, buffer if source is None else source, tools, rules, rng,
                           name or str(step))
  with timer('decode'):
    tools.sample(Role.PROPOSE, asked.prompt_ids, [1] * len(asked.prompt_ids), asked.stop_fn,
                 asked.land)
  with timer('wait'):
    return [asked.judge(i) for i in range(len(asked.prompt_ids))]


def answer(tasks: Sequence[Task], counts: Sequence[int], name: str, tools: Tools, rules: Rules, *,
           timer) -> list[list[Attempt]]:
  """Samples `counts[i]` answers to `tasks[i]` and checks them; one list of attempts per task.

  `name` as in `iterate`.
  """
  if not tasks:
    return []
  answers = phases.Answers(name, tools, rules)
  prompt_ids = answers.ask(tasks)
  with timer('decode'):
    tools.sample(Role.SOLVE, prompt_ids, list(counts), answers.stop_fn, answers.land)
  tools.idle()
  with timer('wait'):
    return answers.judge()


def draw_tasks(step: int, buffer, tools: Tools, rules: Rules, rng,
               have: Mapping[str, int] | None = None) -> list[Task]:
  """Tasks to solve, `rules.batch_of(kind)` less those it has; none while its buffer is empty."""
  out = []
  for kind in tools.kinds:
    # Fresh tasks are already in the buffer, lagged ones of this step are not.
    window = rules.recent_steps - (rules.solve_source == 'fresh')
    tasks = buffer.draw(kind.name, rng, rules.batch_of(kind.name) - (have or {}).get(kind.name, 0),
                        step=step, strategy=rules.draw, recent_steps=window)
    fitting = [t for t in tasks if phases.fits(kind, t, tools, rules)]
    if fitting:      # the batch stays full: rows that do not fit are replaced by ones that do
      extra = rng.integers(len(fitting), size=len(tasks) - len(fitting))
      out += fitting + [fitting[i] for i in extra]
  return out


def _episode(a: Attempt, step: int, scored: tuple[float, dict[str, float]], *,
             train: bool) -> Episode:
  reward, parts = scored
  return Episode(role=a.role, kind=a.kind.name, step=step, group=a.group, turns=(a.turn,),
                 status=a.status, reward=float(reward), parts=parts, task=a.task, answer=a.answer,
                 train=train)
