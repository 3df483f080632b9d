# SPDX-License-Identifier: Apache-2.0
"""Rollouts as estimators and losses see them, for their tests."""

import numpy as np

from absolute_zero_jax.advantages import Rollout

REWARDS = [1, -0.5, -1, 1]


def rollout(rewards, lengths, role=None, kind=None, prompt=None, penalty=0.0):
  """Terminal rewards on the last of `lengths` tokens, right-padded."""
  B, T = len(rewards), max(lengths)
  mask_BT = (np.arange(T)[None] < np.array(lengths)[:, None]).astype(float)
  reward_BT = np.zeros((B, T))
  reward_BT[np.arange(B), np.array(lengths) - 1] = rewards
  ids = [np.zeros(B, int) if x is None else np.array(x) for x in (role, kind, prompt)]
  return Rollout(reward_BT, mask_BT, *ids, penalty)


def random(seed, B=24, T=9, prompts=6):
  """Terminal rewards and lengths at random; every role meets every kind."""
  rng = np.random.default_rng(seed)
  rows = [rng.permutation(np.arange(B) % n) for n in (2, 3, prompts)]
  return rollout(rng.standard_normal(B), rng.integers(1, T + 1, B), *rows)
