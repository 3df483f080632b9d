# SPDX-License-Identifier: Apache-2.0
"""The numbers of an iteration, by kind and role, and the table a person reads at the end.

Names: `propose_deduction/valid_rate`, `solve_induction/accuracy`, ... A rate or share is one of
the attempts of that kind and role; `measure_` are the Monte-Carlo answers. Learnability is averaged
over valid proposals only (the reference logs it under "accuracy" with invalid ones as 0).
docs/metrics.md lists all names.
"""

import collections
from collections.abc import Mapping, Sequence
import functools
import re

import numpy as np

from absolute_zero_jax import metrics
from absolute_zero_jax import rewards as rewards_lib
from absolute_zero_jax.tasks import metrics as task_metrics
from absolute_zero_jax.types import Episode, Role


def scalars(result, *, flag_words: Sequence[str] = (),
            learnability: str = 'one_minus') -> dict[str, float]:
  """Scalars of one `selfplay.Result`.

  Args:
    learnability: what is paid, see `rewards.learnability`.
    flag_words: responses that hold one of these, in any case, are counted in 'flagged_share'.
  """
  out = {}
  flagged = _word_finder(flag_words)
  for kind in dict.fromkeys(a.kind.name for a in result.proposals + result.solved):
    proposals = functools.partial(_proposals, learnability=learnability)
    for phase, attempts, numbers in (('propose', result.proposals, proposals),
                                     ('solve', result.solved, _answers),
                                     ('measure', result.measured, _measured)):
      mine = [a for a in attempts if a.kind.name == kind]
      if mine:
        out |= _prefixed(f'{phase}_{kind}', _common(mine, flagged) | numbers(mine))
  for (role, kind), episodes in _by_role_kind(result.episodes).items():
    rewards = [e.reward for e in episodes]
    out |= _prefixed(f'{role}_{kind}', {
        'reward': np.mean(rewards), 'reward_min': min(rewards), 'reward_max': max(rewards),
        'reward_std': np.std(rewards)})
  out |= _gaps(out, result)
  if result.proposals:
    out['propose/independent_share'] = float(np.mean([_independent(a) for a in result.proposals]))
  rates = [a.solve_rate for a in result.proposals if a.solve_rate is not None]
  if rates:
    edges = np.linspace(0, 1, 9)
    counts = np.histogram(rates, bins=np.append(edges - 1 / 16, 1 + 1 / 16))[0]
    out |= {f'solve_rate_share/{e:.3f}': n / len(rates) for e, n in zip(edges, counts, strict=True)}
    out['propose/learnable_share'] = float(np.mean([0 < r < 1 for r in rates]))
  return out


def buffer_scalars(buffer) -> dict[str, float]:
  """Tasks kept per kind, and how many values of which Python types they hold."""
  out = {f'buffer/{kind}': float(size) for kind, size in buffer.sizes().items()}
  return out | _prefixed('types', task_metrics.type_metrics(buffer.counts()))


def _common(attempts: Sequence, flagged) -> dict[str, float]:
  """What is asked of every phase: outcomes, lengths, words."""
  out = {f'status/{status}': n / len(attempts)
         for status, n in collections.Counter(a.status for a in attempts).items()}
  return out | _lengths(attempts) | {
      'count': len(attempts), 'flagged_share': np.mean([flagged(a.turn.text) for a in attempts])}


def _proposals(attempts: Sequence, learnability: str) -> dict[str, float]:
  valid = [a for a in attempts if a.status == 'ok']
  out = {'valid_rate': len(valid) / len(attempts),
         'well_formed_rate': np.mean([a.well_formed for a in attempts]),
         'independent_share': np.mean([_independent(a) for a in attempts]),
         'reflection_share': np.mean([task_metrics.reflects(a.turn.text) for a in attempts])}
  rates = [a.solve_rate for a in valid if a.solve_rate is not None]
  if rates:
    out['solve_rate'] = np.mean(rates)
    out['learnability'] = np.mean([rewards_lib.learnability(r, learnability) for r in rates])
  return out | task_metrics.task_metrics([a.task for a in valid], [a.references for a in valid])


def _independent(attempt) -> bool:
  """Whether a proposal ran and its output was found not to depend on its input, refused or not."""
  return attempt.task.independent if attempt.task else attempt.status == 'independent'


def _answers(attempts: Sequence) -> dict[str, float]:
  reflects = np.array([task_metrics.reflects(a.turn.text) for a in attempts])
  right = np.array([a.well_formed and a.accuracy == 1 for a in attempts])
  lengths = np.array([len(a.turn.response_ids) for a in attempts])
  # As they are paid: an answer in the wrong form is wrong.
  out = _accuracy(attempts) | {
      'accuracy': np.mean([a.accuracy if a.well_formed else 0.0 for a in attempts]),
      'reflection_share': reflects.mean()}
  for name, mine in (('correct', right), ('incorrect', ~right)):
    if mine.any():
      out |= {f'response_tokens_{name}': lengths[mine].mean(),
              f'reflection_share_{name}': reflects[mine].mean()}
  return out


def _measured(attempts: Sequence) -> dict[str, float]:
  groups = collections.defaultdict(list)
  for a in attempts:
    groups[a.group].append(a.answer if a.parsed is not None else None)
  # Near 1 / samples: the answers are copies of one another, and solve rates are 0 or 1.
  distinct = [task_metrics.distinct_share(answers) for answers in groups.values()]
  return _accuracy(attempts) | {'distinct_answer_share': np.mean(distinct)}


def _accuracy(attempts: Sequence) -> dict[str, float]:
  return {'accuracy': np.mean([a.accuracy for a in attempts]),
          'well_formed_rate': np.mean([a.well_formed and a.parsed is not None for a in attempts])}


def _gaps(scalars: Mapping[str, float], result) -> dict[str, float]:
  """How far the solver is ahead of the proposer, per kind.

  'gap_KIND/reward': solve reward minus propose reward. 'gap_KIND/accuracy': accuracy on the tasks
  drawn for training minus that on this iteration's proposals; above 0 the proposals are harder.
  """
  out, measured = {}, set(map(id, result.measured))
  for name in [n for n in scalars if n.startswith('solve_') and n.endswith('/reward')]:
    kind = name.removeprefix('solve_').removesuffix('/reward')
    if f'propose_{kind}/reward' in scalars:
      out[f'gap_{kind}/reward'] = scalars[name] - scalars[f'propose_{kind}/reward']
    # Answers that measured may train too; those are no drawn tasks.
    drawn = [a.accuracy for a in result.solved if a.kind.name == kind and id(a) not in measured]
    if drawn and f'measure_{kind}/accuracy' in scalars:
      out[f'gap_{kind}/accuracy'] = np.mean(drawn) - scalars[f'measure_{kind}/accuracy']
  return out


def _word_finder(words: Sequence[str]):
  """A test of a text for any of the words."""
  if not words:
    return lambda text: False
  found = re.compile('|'.join(rf'(?<!\w){re.escape(word)}(?!\w)' for word in words), re.I)
  return lambda text: found.search(text) is not None


def _lengths(attempts: Sequence) -> dict[str, float]:
  lengths = [len(a.turn.response_ids) for a in attempts]
  return {'prompt_tokens': np.mean([len(a.turn.prompt_ids) for a in attempts]),
          'response_tokens': np.mean(lengths), 'response_tokens_max': max(lengths),
          'truncated_share': np.mean([a.turn.finish == 'length' for a in attempts])}


def final_table(history: Sequence[Mapping[str, float]], kinds: Sequence[str]) -> str:
  """Means over the iterations of `history`, one row per kind."""
  def mean(name: str) -> float:
    values = [h[name] for h in history if name in h]
    return float(np.mean(values)) if values else float('nan')

  rows = [[kind, _percent(mean(f'propose_{kind}/valid_rate')),
           mean(f'propose_{kind}/learnability'), _percent(mean(f'measure_{kind}/accuracy')),
           _percent(mean(f'solve_{kind}/accuracy')), mean(f'propose_{kind}/reward'),
           mean(f'solve_{kind}/reward')] for kind in kinds]
  return metrics.table(['kind', 'valid proposals', 'learnability', 'MC solve rate', 'solved',
                        'propose reward', 'solve reward'], rows)


def step_line(step: int, steps: int, scalars: Mapping[str, float], kinds: Sequence[str]) -> str:
  """One line about one iteration."""
  def rates(name: str) -> str:
    return ' '.join(f'{k[:3]} {_percent(scalars.get(name.format(k), float("nan")))}' for k in kinds)
  update = 'no update: nothing to learn from'
  # What is not finite is not among them, see `metrics.Mean`.
  loss, grad, entropy = (scalars.get(f'train/{name}', float('nan'))
                         for name in ('loss', 'grad_norm', 'entropy'))
  if 'train/loss' in scalars:
    update = f'loss {loss:+.4f}, grad {grad:.2f}, entropy {entropy:.2f}'
  if scalars.get('train/skipped_updates'):
    update = 'update skipped: its gradient is not finite'
  return (f'iteration {step}/{steps}: valid {rates("propose_{}/valid_rate")} | '
          f'solved {rates("solve_{}/accuracy")} | {update} | '
          f'{scalars["sampler/tokens_per_s"]:.0f} tok/s, {scalars["time/iteration"]:.1f} s')


def time_line(history: Sequence[Mapping[str, float]]) -> str:
  """Where the time went, as shares of all iterations, largest first."""
  total = sum(h['time/iteration'] + h.get('time/heldout', 0) for h in history)
  phases = collections.Counter()
  for h in history:
    for name, seconds in h.items():
      if name.startswith('time/') and name != 'time/iteration':
        phases[name.removeprefix('time/')] += seconds
  parts = [f'{name} {seconds / total:.0%}' for name, seconds in phases.most_common() if seconds]
  return ', '.join(parts)


def sample_texts(episodes: Sequence[Episode], count: int) -> dict[str, str]:
  """Markdown of up to `count` episodes per kind and role, the best-rewarded first."""
  out = {}
  for (role, kind), mine in _by_role_kind(episodes).items():
    best = sorted(mine, key=lambda e: -e.reward)[:count]
    if best:
      out[f'{role}_{kind}'] = '\n\n---\n\n'.join(
          f'**{e.status}, reward {e.reward:.3g}**\n\n{_code(e.turns[-1].text)}' for e in best)
  return out


def _code(text: str) -> str:
  return ''.join(f'    {line}\n' for line in text.splitlines())


def _by_role_kind(episodes: Sequence[Episode]) -> dict[tuple[str, str], list[Episode]]:
  out = collections.defaultdict(list)
  for e in episodes:
    if e.role == Role.PROPOSE or e.train:
      out[e.role.value, e.kind].append(e)
  return out


def _prefixed(prefix: str, values: Mapping[str, float]) -> dict[str, float]:
  return {f'{prefix}/{k}': float(v) for k, v in values.items()}


def _percent(x: float) -> str:
  return '-' if np.isnan(x) else f'{x:.0%}'
