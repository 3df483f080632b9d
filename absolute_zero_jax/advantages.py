# SPDX-License-Identifier: Apache-2.0
"""From rewards to advantages, and from response masks to loss weights: numpy, on the whole batch.

    Rollout --estimator--> advantages_BT        Rollout --aggregation--> weights_BT

Both see every sequence of an update at once, before it is cut into micro-batches, so neither
packing nor sharding can change them. float64 inside, float32 out. Letters: B sequences, T response
tokens (right-padded).

An estimator is any function `(Rollout, **options) -> advantages_BT`; an aggregation any function
`(Rollout, **options) -> weights_BT` that sums, with the token losses, to the loss.
"""

from collections.abc import Callable
import math
from typing import NamedTuple

import numpy as np


class Rollout(NamedTuple):
  """What estimators and aggregations see of a batch.

  Attributes:
    reward_BT: task reward per response token; a reward of the whole answer is on its last token.
    mask_BT: 1 on trained response tokens (the stop token included), else 0.
    role_B, kind_B, prompt_B: integers, equal for sequences that share the role, the kind of task,
      the prompt.
    penalty_BT: what KL in the reward adds to each token (usually <= 0); never part of a baseline.
  """
  reward_BT: np.ndarray
  mask_BT: np.ndarray
  role_B: np.ndarray
  kind_B: np.ndarray
  prompt_B: np.ndarray
  penalty_BT: np.ndarray | float = 0.0


# --- estimators


def trr_plus_plus(r: Rollout, *, whiten_by: str = 'role_kind', count: str = 'token') -> np.ndarray:
  """Task-relative REINFORCE++: returns whitened inside each (role, kind), unbiased variance.

  Proposing and solving, and the kinds of tasks, so never share a baseline. With equal rewards in a
  (role, kind) its advantages are exactly zero.

  Source: Absolute Zero (arXiv:2505.03335) sec. 3.3.5; verl masked_whiten, called per (role, kind):
  A = (G - mean) / sqrt(variance * N / (N - 1) + 1e-8) over all N response tokens.
  """
  return _whiten(_returns(r), r, whiten_by, count, _unbiased)


def trr_prompt(r: Rollout, *, whiten_by: str = 'role_kind', count: str = 'token') -> np.ndarray:
  """`trr_plus_plus` in which a prompt with several answers is its own baseline.

  An answer loses the mean of the *other* answers to its prompt; one that is alone with its prompt
  loses the mean of its like in the scope. All are then divided by the root mean square of the
  scope. A prompt of equal rewards, and a scope of equal lone rows, gets exactly zero. With lone
  rows only this is `trr_plus_plus`. For batches in which Monte-Carlo answers train.
  """
  centred_B, informative_B = _centre(r)
  group_B, size_G = _groups(r.prompt_B)
  lone_B = size_G[group_B] == 1
  others_B = centred_B * (size_G / np.maximum(size_G - 1, 1))[group_B]
  value_BT = _returns(r) - np.where(lone_B, 0, _scores(r) - others_B)[:, None]
  value_BT = np.where(_keeps(r, informative_B | lone_B), value_BT, 0)
  weight_BT, out_BT = _votes(r, count), np.zeros(value_BT.shape)
  scope_B, size_S = _groups(_scope(r, whiten_by))
  for scope in range(len(size_S)):
    member_BT = (scope_B == scope)[:, None] & (r.mask_BT > 0)
    alone_BT = member_BT & lone_B[:, None]
    if alone_BT.any():
      value = value_BT[alone_BT]
      mean = (weight_BT[alone_BT] * value).sum() / weight_BT[alone_BT].sum()
      value_BT[alone_BT] = 0 if value.min() == value.max() else value - mean
    weight, value = weight_BT[member_BT], value_BT[member_BT]
    n = max(weight.sum(), 1e-30)
    out_BT[member_BT] = value * _unbiased((weight * value**2).sum() / n, n)
  return out_BT.astype(np.float32)


def opo(r: Rollout) -> np.ndarray:
  """score - mean of the prompt's scores weighted by response length. Prompts sampled once get zero.

  The baseline of least variance if a gradient's square grows with the length of its response.

  Source: On-Policy RL with Optimal Reward Baseline (arXiv:2505.23585); verl `opo`.
  """
  _, informative_B = _centre(r)
  score_B, length_B, (group_B, _) = _scores(r), r.mask_BT.sum(axis=1), _groups(r.prompt_B)
  mean_G = (np.bincount(group_B, score_B * length_B)
            / np.maximum(np.bincount(group_B, length_B), 1))
  return _terminal(r, score_B - mean_G[group_B], informative_B)


def reinforce_plus_plus(r: Rollout, *, whiten_by: str = 'global', count: str = 'token',
                        ) -> np.ndarray:
  """REINFORCE++: returns whitened over all response tokens of the batch, population variance.

  Source: REINFORCE++ (arXiv:2501.03262) as its authors implement it in OpenRLHF:
  A = (G - mean) / sqrt(max(variance, 1e-8)). verl's version is `trr_plus_plus` with
  whiten_by='global'.
  """
  return _whiten(_returns(r), r, whiten_by, count, _population)


def reinforce_plus_plus_baseline(r: Rollout, *, whiten_by: str = 'global', count: str = 'token',
                                 ) -> np.ndarray:
  """REINFORCE++ whose rewards first lose the mean of their prompt; not divided by its deviation.

  A prompt whose rewards are all equal (also one sampled only once) gets exactly zero and still
  counts in the moments. The authors' code leaves -mean / deviation there, a push with no
  information.

  Source: OpenRLHF `reinforce_baseline`; arXiv:2501.03262 sec. 3.2.
  """
  centred_B, informative_B = _centre(r)
  value_BT = _returns(r) - (_scores(r) - centred_B)[:, None]
  out_BT = _whiten(value_BT, r, whiten_by, count, _population)
  return np.where(_keeps(r, informative_B), out_BT, 0).astype(np.float32)


def grpo(r: Rollout) -> np.ndarray:
  """(score - mean of the prompt) / (unbiased deviation of the prompt + 1e-6) on every token.

  A prompt with equal scores gets exactly zero. So does a prompt sampled once: it has no baseline
  (verl would hand out the raw score). Sample such prompts more often, or whiten their role.

  Source: DeepSeekMath (arXiv:2402.03300) eq. 14; deviation and eps as in verl.
  """
  centred_B, informative_B = _centre(r)
  group_B, size_G = _groups(r.prompt_B)
  var_G = np.bincount(group_B, centred_B**2) / np.maximum(size_G - 1, 1)
  return _terminal(r, centred_B / (np.sqrt(var_G)[group_B] + 1e-6), informative_B)


def dr_grpo(r: Rollout) -> np.ndarray:
  """score - mean of the prompt, on every token. Prompts sampled once get zero.

  Source: Understanding R1-Zero-like training (arXiv:2503.20783); its loss is the 'constant'
  aggregation.
  """
  centred_B, informative_B = _centre(r)
  return _terminal(r, centred_B, informative_B)


def rloo(r: Rollout) -> np.ndarray:
  """score - mean of the prompt's *other* samples, on every token. Prompts sampled once get zero.

  Source: Back to Basics (arXiv:2402.14740).
  """
  centred_B, informative_B = _centre(r)
  group_B, size_G = _groups(r.prompt_B)
  return _terminal(r, centred_B * (size_G / np.maximum(size_G - 1, 1))[group_B], informative_B)


def pass_at_k(r: Rollout, *, k: int = 2) -> np.ndarray:
  """What an answer means for the best of k answers to its prompt, on every token.

  Of all sets of k of the prompt's answers: (mean best score of the sets that hold this answer -
  mean best score of all sets) / (deviation of the best score + 1e-6). A right answer counts the
  more the fewer there are beside it, and where fewer than k are wrong nothing is left to gain:
  zero. So does a prompt with k answers or fewer. With k = 1 it is `grpo` but for the deviation,
  which is the population's.

  Source: Pass@k Training (arXiv:2508.10751), its analytical form, where rewards are 0 or 1 and
  A+ = (1 - R) / sqrt(R(1 - R)), A- = (1 - R - C(wrong - 1, k - 1) / C(n - 1, k - 1)) / the same,
  R = 1 - C(wrong, k) / C(n, k). Here for any scores, by the best of each set.

  Raises ValueError for k below 1.
  """
  if k < 1:
    raise ValueError(f'k={k} answers make no set; allowed: 1 or more.')
  _, informative_B = _centre(r)
  score_B, (group_B, _) = _scores(r), _groups(r.prompt_B)
  value_B = np.zeros(len(score_B))
  for group in np.unique(group_B[informative_B]):
    member = np.flatnonzero(group_B == group)
    member = member[np.argsort(score_B[member])]
    score, n = score_B[member], len(member)
    m = min(k, n)
    if np.all(score[m - 1:] == score[-1]):          # every set has the same best: exactly zero
      continue
    # A set's best is its last one in this order, the other m - 1 stand below it.
    sets = np.array([math.comb(below, m - 1) for below in range(n)], np.float64)
    share = sets / sets.sum()
    mean = share @ score
    deviation = np.sqrt(max(share @ (score - mean)**2, 0))
    # Of those sets, (m - 1) / below hold a given one of the lower.
    higher = share * score * (m - 1) / np.maximum(np.arange(n), 1)
    above = np.cumsum(higher[::-1])[::-1] - higher
    best = (share * score + above) * n / m
    value_B[member] = (best - mean) / (deviation + 1e-6)
  return _terminal(r, value_B, informative_B)


ESTIMATORS: dict[str, Callable[..., np.ndarray]] = {
    'trr_plus_plus': trr_plus_plus,
    'trr_prompt': trr_prompt,
    'reinforce_plus_plus': reinforce_plus_plus,
    'reinforce_plus_plus_baseline': reinforce_plus_plus_baseline,
    'grpo': grpo,
    'dr_grpo': dr_grpo,
    'rloo': rloo,
    'opo': opo,
    'pass_at_k': pass_at_k,
}


# These compare the answers to one prompt: one that is alone learns nothing.
AMONG_ANSWERS = frozenset(ESTIMATORS) - {'trr_plus_plus', 'trr_prompt', 'reinforce_plus_plus'}


# --- aggregations


def token_mean(r: Rollout) -> np.ndarray:
  """Every response token weighs the same: long answers count more."""
  return (r.mask_BT / max(r.mask_BT.sum(), 1)).astype(np.float32)


def sequence_mean(r: Rollout) -> np.ndarray:
  """Every sequence weighs the same, its tokens share that (Absolute Zero eq. 9 as printed)."""
  length_B = r.mask_BT.sum(axis=1)
  rows = max((length_B > 0).sum(), 1)
  return (r.mask_BT / np.maximum(length_B, 1)[:, None] / rows).astype(np.float32)


def constant(r: Rollout, *, tokens: int) -> np.ndarray:
  """Sum over tokens / (sequences * `tokens`): no length in the denominator (Dr. GRPO).

  `tokens` is a constant of the run, usually the longest response allowed. Raises ValueError for one
  below 1.
  """
  if tokens < 1:
    raise ValueError(f"aggregation_tokens={tokens} must be positive for aggregation='constant'; "
                     'set it to the longest response allowed.')
  rows = max((r.mask_BT.sum(axis=1) > 0).sum(), 1)
  return (r.mask_BT / (rows * tokens)).astype(np.float32)


def role_microbatch(r: Rollout, *, rows: int = 16) -> np.ndarray:
  """Mean over (role, kind) of the mean over slices of `rows` sequences of the token mean.

  What the reference's gradient accumulation amounts to: the roles and kinds weigh the same whatever
  their token counts. Slices are consecutive sequences of one (role, kind) in the order given,
  however the learner lays the batch out; a last slice with fewer sequences weighs proportionally
  less. Raises ValueError for `rows` below 1.

  Source: azr `update_actor` with ppo_micro_batch_size_per_gpu=16: (1/6) sum over roles of
  (1/4) sum over quarters of the token mean.
  """
  if rows < 1:
    raise ValueError(f'aggregation_rows={rows} must be positive; the reference uses 16.')
  group_B, size_G = _groups(_scope(r, 'role_kind'))
  weights_BT = np.zeros(r.mask_BT.shape)
  for group, size in enumerate(size_G):
    member = np.flatnonzero(group_B == group)
    for start in range(0, len(member), rows):
      part = member[start:start + rows]
      mean_BT = r.mask_BT[part] / max(r.mask_BT[part].sum(), 1)
      weights_BT[part] = mean_BT * len(part) / size / len(size_G)
  return weights_BT.astype(np.float32)


# --- shared arithmetic


def _returns(r: Rollout) -> np.ndarray:
  """Sum of the rewards from each token on (discount 1)."""
  token_BT = (np.asarray(r.reward_BT, np.float64) + r.penalty_BT) * r.mask_BT
  return np.cumsum(token_BT[:, ::-1], axis=1)[:, ::-1]


def _scores(r: Rollout) -> np.ndarray:
  return (np.asarray(r.reward_BT, np.float64) * r.mask_BT).sum(axis=1)


def _groups(id_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Ids renumbered from 0, and the number of sequences of each."""
  _, group_B, size_G = np.unique(id_B, return_inverse=True, return_counts=True)
  return group_B.reshape(-1), size_G


def _scope(r: Rollout, name: str) -> np.ndarray:
  if name == 'global':
    return np.zeros(len(r.role_B), np.int64)
  if name == 'role':
    return np.asarray(r.role_B, np.int64)
  if name == 'role_kind':
    return np.asarray(r.role_B, np.int64) * (1 + np.max(r.kind_B, initial=0)) + r.kind_B
  raise ValueError(f"whiten_by={name!r} is unknown; allowed: 'global', 'role', 'role_kind'.")


def _unbiased(var: float, n: float) -> float:
  return 1 / np.sqrt(var * n / max(n - 1, 1) + 1e-8)


def _population(var: float, n: float) -> float:
  del n
  return 1 / np.sqrt(max(var, 1e-8))


def _whiten(value_BT, r: Rollout, whiten_by: str, count: str,
            scale: Callable[[float, float], float]) -> np.ndarray:
  """(value - mean) * scale(variance, n) inside each scope; constant values give exact zeros.

  `count` says what has one vote in the moments: each 'token' or each 'sequence'.
  """
  weight_BT, out_BT = _votes(r, count), np.zeros(value_BT.shape)
  scope_B, size_G = _groups(_scope(r, whiten_by))
  for scope in range(len(size_G)):
    member_BT = (scope_B == scope)[:, None] & (r.mask_BT > 0)
    value, weight = value_BT[member_BT], weight_BT[member_BT]
    if not value.size or value.min() == value.max():
      continue
    n = weight.sum()
    centred = value - (weight * value).sum() / n
    out_BT[member_BT] = centred * scale((weight * centred**2).sum() / n, n)
  return out_BT.astype(np.float32)


def _votes(r: Rollout, count: str) -> np.ndarray:
  """Weight of each token in moments where each 'token', or each 'sequence', has one vote."""
  if count not in ('token', 'sequence'):
    raise ValueError(f"whiten_count={count!r} is unknown; allowed: 'token', 'sequence'.")
  weight_BT = np.asarray(r.mask_BT, np.float64)
  if count == 'sequence':
    weight_BT = weight_BT / np.maximum(weight_BT.sum(axis=1, keepdims=True), 1)
  return weight_BT


def _centre(r: Rollout) -> tuple[np.ndarray, np.ndarray]:
  """Scores minus the mean of their prompt, and whether the prompt's scores differ at all.

  Equal scores are centred to exact zeros, which a subtracted mean does not promise.
  """
  score_B, (group_B, size_G) = _scores(r), _groups(r.prompt_B)
  low_G, high_G = np.full(len(size_G), np.inf), np.full(len(size_G), -np.inf)
  np.minimum.at(low_G, group_B, score_B)
  np.maximum.at(high_G, group_B, score_B)
  informative_B = (low_G < high_G)[group_B]
  mean_B = (np.bincount(group_B, score_B) / size_G)[group_B]
  return np.where(informative_B, score_B - mean_B, 0), informative_B


def _keeps(r: Rollout, informative_B: np.ndarray) -> np.ndarray:
  """Tokens with an advantage: of prompts whose rewards differ, or any token under KL in reward."""
  return (r.mask_BT > 0) & (informative_B[:, None] | bool(np.any(r.penalty_BT)))


def _terminal(r: Rollout, value_B: np.ndarray, informative_B: np.ndarray) -> np.ndarray:
  """One value on all tokens of a sequence, plus what KL in the reward still has to come."""
  penalty_BT = np.cumsum((r.penalty_BT * r.mask_BT)[:, ::-1], axis=1)[:, ::-1]
  out_BT = (np.where(informative_B, value_B, 0)[:, None] + penalty_BT) * r.mask_BT
  return out_BT.astype(np.float32)
