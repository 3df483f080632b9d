# SPDX-License-Identifier: Apache-2.0
"""Rewards as named functions of numbers and strings.

  proposal: no valid task -> format penalty; else `learnability` of the solve rate, joined by
            intrinsic terms, but `zero_learnability` where it is 0
  answer:   unreadable -> format penalty; wrong -> wrong penalty; else the accuracy

Intrinsic terms come from `intrinsic.py`; `term` scales and caps one, `combine` joins them to
learnability. All are off unless a coefficient is set.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math
from typing import Any

from absolute_zero_jax import intrinsic as intrinsic_lib

LEARNABILITY = ('one_minus', 'inverse', 'variance')
COMBINE = ('sum', 'multiply', 'sum_multiply', 'multiply_sum')
FILTERS = ('all', 'non_one', 'non_extremes')
FORMAT_MODES = ('conditional', 'addition', 'multiply')
INDUCTION = ('binary', 'accuracy', 'if_one_correct')


@dataclasses.dataclass(frozen=True)
class Rewards:
  """The reward section of a config, applied to attempts. Make one with `get`.

  Attributes:
    format_penalty: unreadable response, or a proposal that is no valid task.
    wrong_penalty: well-formed answer that is wrong.
    zero_learnability: valid proposal whose learnability is 0: solve rate 0 or 1 (with 'inverse'
      1 alone). Eq. 4 of the paper says 0, our default; its code gives -0.5.
    learnability: 'one_minus', 'inverse' or 'variance'; see the function of that name.
    induction: read by the induction kind (`score`); here so that the section is complete.
    format_mode: 'conditional', 'addition' or 'multiply'; see `solve`.
    intrinsic: {name in `intrinsic.TERMS`: (coefficient, cap)}.
    hierarchical: how `answer_diversity` counts.
    combine: how intrinsic terms join learnability.
    seed: read by `controls.Random` only.
  """
  format_penalty: float = -1.0
  wrong_penalty: float = -0.5
  zero_learnability: float = 0.0
  learnability: str = 'one_minus'
  induction: str = 'binary'
  format_mode: str = 'conditional'
  intrinsic: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
  hierarchical: bool = False
  combine: str = 'sum'
  seed: int = 0

  def __post_init__(self):
    for what, allowed in (('learnability', LEARNABILITY), ('induction', INDUCTION),
                          ('format_mode', FORMAT_MODES), ('combine', COMBINE)):
      _one_of(f'reward.{what}', getattr(self, what), allowed)
    for name, pair in self.intrinsic.items():
      _one_of('reward.intrinsic', name, tuple(intrinsic_lib.TERMS))
      if not (isinstance(pair, tuple | list) and len(pair) == 2 and all(map(_is_finite, pair))):
        raise ValueError(f'reward.intrinsic.{name}={pair!r} must be two finite numbers, '
                         '(coefficient, cap).')

  def propose(self, attempt, counts: Mapping[str, intrinsic_lib.Counts] | None = None
              ) -> tuple[float, dict[str, float]]:
    """Reward of a proposal, and the parts it was made of.

    Args:
      attempt: has well_formed, status, task (None unless it can be played), solve_rate and
        references.
      counts: `TaskBuffer.counts()` before this task; needed by the diversity terms only.
    """
    task = attempt.task
    if attempt.status == 'too_long' and attempt.well_formed:      # valid; nobody can be asked it
      return self.zero_learnability, {'learnability': self.zero_learnability}
    if task is None or not attempt.well_formed:
      return self.format_penalty, {'format': self.format_penalty}
    gain = learnability(attempt.solve_rate, self.learnability)
    if gain <= 0:
      return self.zero_learnability, {'learnability': self.zero_learnability}
    parts = {'learnability': gain}
    for name, (coefficient, cap) in self.intrinsic.items():
      value = intrinsic_lib.TERMS[name](task, attempt.references, counts or {}, self.hierarchical)
      if value is not None:
        parts[name] = term(value, coefficient, cap)
    terms = [value for name, value in parts.items() if name != 'learnability']
    return combine(gain, terms, self.combine), parts

  def solve(self, attempt) -> tuple[float, dict[str, float]]:
    """Reward of an answer, and its parts. An answer that could not be read is badly formed."""
    well_formed = attempt.well_formed and attempt.parsed is not None
    reward = solve(well_formed, attempt.accuracy, self.format_mode,
                   format_penalty=self.format_penalty, wrong_penalty=self.wrong_penalty)
    counts = well_formed or self.format_mode == 'addition'
    return reward, {'accuracy': attempt.accuracy if counts else 0.0, 'format': float(well_formed)}


@dataclasses.dataclass(frozen=True)
class Checked:
  """Rewards, own ones too, whose every result is looked at: a finite number, and named parts.

  Raises ValueError where it is not; a NaN would spread from here to all weights.
  """
  rewards: Any
  name: str

  def propose(self, attempt, counts=None) -> tuple[float, dict[str, float]]:
    return self._checked('propose', attempt, self.rewards.propose(attempt, counts))

  def solve(self, attempt) -> tuple[float, dict[str, float]]:
    return self._checked('solve', attempt, self.rewards.solve(attempt))

  def _checked(self, method, attempt, result):
    try:
      reward, parts = result
      right = all(math.isfinite(x) for x in (reward, *parts.values()))
    except (AttributeError, OverflowError, TypeError, ValueError):
      right = False
    if not right:
      raise ValueError(f'reward.name={self.name!r}: {method} gave {result!r:.200} for an attempt '
                       f'of {attempt.kind.name}; it must give a finite number and a dict of finite '
                       'numbers, the parts it was made of.')
    # Records and checkpoints know Python's numbers only.
    return float(reward), {name: float(x) for name, x in parts.items()}


def get(made: type = Rewards, /, **options) -> Rewards:
  """`Rewards`, or a class of its kind, from the fields of a config section.

  An unknown field raises ValueError.
  """
  known = [field.name for field in dataclasses.fields(Rewards)]
  unknown = sorted(set(options) - set(known))
  if unknown:
    raise ValueError(f'reward has no {unknown}; it has {known}.')
  return made(**options)


def learnability(rate: float, how: str = 'one_minus') -> float:
  """How much a solver of success rate `rate` can learn from a task.

  'one_minus' gives 1 - rate, and 0 where the solver never succeeds; 'inverse' gives 1 - rate there
  too. 'variance', 4 rate (1 - rate), pays most for what is solved every other time: with a task's
  own mean as baseline that is how much its answers teach. All give 0 at rate 1. A rate outside
  [0, 1] raises ValueError.

  Source: Absolute Zero Eq. 4; 'inverse' is the reference's. 'variance': Rutherford et al. 2024,
  arXiv:2408.15099.
  """
  _one_of('learnability', how, LEARNABILITY)
  if not 0 <= rate <= 1:
    raise ValueError(f'rate={rate} must be in [0, 1].')
  if how == 'variance':
    return 4 * rate * (1 - rate)
  return 0.0 if rate == 0 and how == 'one_minus' else 1.0 - rate


def solve(well_formed: bool, accuracy: float, mode: str = 'conditional', *,
          format_penalty: float = -1.0, wrong_penalty: float = -0.5) -> float:
  """Reward of an answer.

  'conditional': `format_penalty` for bad form, else the accuracy, or `wrong_penalty` where it is 0.
  'addition': half for the form, half for the accuracy. 'multiply': accuracy, 0 for bad form. The
  last two are our reading of options that the reference names and never runs.

  Source: the reference's reward of an answer.
  """
  _one_of('format mode', mode, FORMAT_MODES)
  if mode == 'addition':
    return 0.5 * well_formed + 0.5 * accuracy
  if mode == 'multiply':
    return well_formed * accuracy
  if not well_formed:
    return format_penalty
  return accuracy if accuracy > 0 else wrong_penalty


def induction_score(right: Sequence[bool], how: str = 'binary') -> float:
  """Score of hidden pairs: 'binary' all right, 'accuracy' the share, 'if_one_correct' any.

  0 when there are none. A pair on which the program gave nothing is False here (the reference
  drops it from the mean).
  """
  _one_of('induction score', how, INDUCTION)
  if not len(right):
    return 0.0
  if how == 'accuracy':
    return sum(right) / len(right)
  return float(any(right) if how == 'if_one_correct' else all(right))


def keeps(rate: float, how: str = 'all') -> bool:
  """Whether a valid task of that solve rate enters the buffer (`valid_program_filter`)."""
  _one_of('filter', how, FILTERS)
  return not ((how != 'all' and rate == 1) or (how == 'non_extremes' and rate == 0))


def term(value: float, coefficient: float, maximum: float = 0.5) -> float:
  """An intrinsic value, scaled and capped from above."""
  return min(coefficient * value, maximum)


def combine(value: float, terms: Sequence[float], how: str = 'sum') -> float:
  """Learnability L with intrinsic terms; without terms always L.

  'sum': L + sum; 'multiply': L * product; 'sum_multiply': L + product; 'multiply_sum': L * sum.
  """
  _one_of('combine', how, COMBINE)
  if not terms:
    return value
  joined = sum(terms)
  if how in ('multiply', 'sum_multiply'):
    joined = 1.0
    for one in terms:
      joined *= one
  return value + joined if how in ('sum', 'sum_multiply') else value * joined


def _is_finite(x: Any) -> bool:
  return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


def _one_of(what: str, value: str, allowed: Sequence[str]) -> None:
  if value not in allowed:
    raise ValueError(f'{what}={value!r} must be one of {tuple(allowed)}.')
