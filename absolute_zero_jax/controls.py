# SPDX-License-Identifier: Apache-2.0
"""Rewards of control runs: what is left of learning when the reward says less, or nothing.

Each replaces `rewards.Rewards` by name (`reward.name`) and changes nothing else of a run; what it
does not replace stays as in `rewards`. `configs/tiny.py` lists these and the controls that are a
matter of other fields.
"""

import dataclasses
import functools
import hashlib

from absolute_zero_jax import rewards


@dataclasses.dataclass(frozen=True)
class Random(rewards.Rewards):
  """1 or 0 by the toss of a coin, whatever was said.

  The coin depends on `seed`, on the attempt's group, which names the iteration, and on its place
  there, so that a run that resumes repeats it and equal answers get different rewards.
  """

  def propose(self, attempt, counts=None):
    return self._coin(attempt)

  def solve(self, attempt):
    return self._coin(attempt)

  def _coin(self, attempt) -> tuple[float, dict[str, float]]:
    text = f'{self.seed}/{attempt.group}/{attempt.place}'
    value = float(hashlib.sha256(text.encode()).digest()[0] % 2)
    return value, {'random': value}


@dataclasses.dataclass(frozen=True)
class Format(rewards.Rewards):
  """1 for what can be read, right or wrong, valid or not; else the format penalty."""

  def propose(self, attempt, counts=None):
    return self._form(attempt.well_formed and not isinstance(attempt.parsed, str))

  def solve(self, attempt):
    return self._form(attempt.well_formed and attempt.parsed is not None)

  def _form(self, readable: bool) -> tuple[float, dict[str, float]]:
    return (1.0 if readable else self.format_penalty), {'format': float(readable)}


@dataclasses.dataclass(frozen=True)
class Validity(rewards.Rewards):
  """1 for every valid proposal, however easy or hard; answers are rewarded as ever."""

  def propose(self, attempt, counts=None):
    valid = attempt.well_formed and attempt.task is not None
    return (1.0 if valid else self.format_penalty), {'validity': float(valid)}


# Factories by name, each called with the fields of the config's reward section. Add to it, or name
# one of your own 'module:name' in the config.
REWARDS = {
    'azr': rewards.get,
    'random': functools.partial(rewards.get, Random),
    'format': functools.partial(rewards.get, Format),
    'validity': functools.partial(rewards.get, Validity),
}
