# SPDX-License-Identifier: Apache-2.0
"""What an attempt is worth: the reward functions of `rewards`, put together by the config.

A scoring of your own is any object with `propose(attempt, counts)` and `solve(attempt)`; both
return (reward, its parts by name). Name it in a config as 'module:name' of a class or function that
takes the fields of `config.reward`.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

from absolute_zero_jax import buffer, rewards

INTRINSIC = ('complexity', 'halstead', 'edit_distance', 'answer_diversity')
_DIVERSE_FIELD = {'abduction': 'inputs', 'error': 'errors'}     # others: 'outputs'


@dataclasses.dataclass(frozen=True)
class Scoring:
  """The reference's rewards with every choice a field; `config.get_config` explains them.

  Raises:
    ValueError: an unknown intrinsic term or mode.
  """
  zero_learnability: float = 0.0
  invalid: float = rewards.FORMAT_PENALTY
  learnability: str = 'one_minus'
  format_mode: str = 'conditional'
  intrinsic: Mapping[str, float] = dataclasses.field(default_factory=dict)
  intrinsic_cap: float = 0.5
  hierarchical: bool = False
  combine: str = 'sum'

  def __post_init__(self):
    for name in self.intrinsic:
      if name not in INTRINSIC:
        raise ValueError(f'reward.intrinsic.{name} is unknown; allowed: {", ".join(INTRINSIC)}.')
    # The functions refuse unknown modes themselves; ask them now, not after the first batch.
    rewards.learnability(0.5, self.learnability)
    rewards.combine(0.5, (0.1,), self.combine)
    rewards.solve(True, 1.0, self.format_mode)

  def propose(self, attempt: Any, counts: Mapping[str, Any]) -> tuple[float, dict[str, float]]:
    """Reward of a proposal; `counts` are `TaskBuffer.counts` by field, before this iteration."""
    valid = attempt.status == 'ok'
    rate = attempt.solve_rate or 0.0
    terms = {name: rewards.term(self._value(name, attempt, counts), coefficient, self.intrinsic_cap)
             for name, coefficient in self.intrinsic.items()} if valid else {}
    reward = rewards.propose(attempt.well_formed, valid, rate, how=self.learnability,
                             zero=self.zero_learnability, invalid=self.invalid, terms=terms,
                             combine_how=self.combine)
    parts = {'well_formed': float(attempt.well_formed), 'valid': float(valid)}
    if valid:
      parts |= {'solve_rate': rate, 'learnability': rewards.learnability(rate, self.learnability)}
    return reward, parts | terms

  def solve(self, attempt: Any) -> tuple[float, dict[str, float]]:
    """Reward of an answer."""
    formed = attempt.well_formed and attempt.parsed is not None
    reward = rewards.solve(formed, attempt.accuracy, self.format_mode)
    return reward, {'well_formed': float(formed), 'accuracy': attempt.accuracy}

  def _value(self, name: str, attempt: Any, counts: Mapping[str, Any]) -> float:
    task, kind = attempt.task, attempt.kind.name
    if name == 'complexity':
      return rewards.complexity(task.program)
    if name == 'halstead':
      return rewards.halstead(task.program)
    if name == 'edit_distance':
      return rewards.mean_edit_distance(task.program, [r.program for r in attempt.references])
    field = _DIVERSE_FIELD.get(kind, 'outputs')
    texts = [given if field == 'inputs' else output for given, output in task.cases]
    return rewards.mean_diversity(counts[field], [(buffer.type_name(t), t) for t in texts],
                                  self.hierarchical)
