# SPDX-License-Identifier: Apache-2.0
"""The algorithm of an update as one exchangeable object: advantages, weights and token losses.

    Rollout --advantages--> advantages_BT           numpy, the whole batch, once
    Rollout --weights-----> weights_BT              numpy, the whole batch, once
    Scored  --loss--------> loss_M, stats           jax, per token of a micro-batch, inside jit

The loss of an update is sum(weights * loss) over every response token of the batch. To bring your
own, name in the config the 'module:name' of a function that takes the config's fields and returns
an `Algorithm`: `Algorithm(estimator=mine, **fields)`, or a subclass with another loss.

Letters: B sequences, T response tokens; `M` is all scored tokens of a micro-batch, in any shape.
"""

from collections.abc import Callable
import dataclasses
import functools
import importlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from absolute_zero_jax import advantages as estimators
from absolute_zero_jax.advantages import ESTIMATORS, Rollout

# Log-ratios beyond this are cut before exp, so that one broken token cannot overflow the loss.
LOG_RATIO_BOUND = 20.0
# A penalty in the reward is cut per token, as in OpenRLHF.
PENALTY_BOUND = 10.0


class Scored(NamedTuple):
  """Per-token arrays of equal shape, float32. All but `logprob` and `entropy` are constants.

  `old` is the policy the ratio refers to, `sampler` the distribution the token was drawn from
  (after temperature and truncation), `reference` the KL anchor.
  """
  logprob_M: jax.Array
  entropy_M: jax.Array
  advantage_M: jax.Array
  old_M: jax.Array
  sampler_M: jax.Array
  reference_M: jax.Array


@dataclasses.dataclass(frozen=True)
class Algorithm:
  """REINFORCE-style policy gradient with a clipped ratio; every field is a number or a name.

  Attributes:
    estimator: key of `ESTIMATORS`, or a function `Rollout -> advantages_BT`.
    role_estimators: ((role, estimator), ...): estimators for single roles, computed on that role's
      sequences alone, e.g. (('solve', 'rloo'),) to use prompt baselines only where there are
      several answers per prompt.
    pass_k: answers in a set of 'pass_at_k'.
    whiten_by: scope of the moments of whitening estimators: 'global', 'role', 'role_kind'; ''
      takes the estimator's own.
    whiten_count: 'token' or 'sequence': what has one vote in those moments.
    role_weights: ((role, factor), ...) on finished advantages, e.g. (('propose', 0.3),).
    aggregation: 'token', 'sequence', 'constant', 'role_microbatch'; '' takes 'token'.
    aggregation_rows: sequences per slice of 'role_microbatch'.
    aggregation_tokens: the constant of 'constant'.
    clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
    dual_clip: bound (> 1) on the ratio where the advantage is negative; 0 is off.
    entropy_coef: the bonus, entropy_coef * entropy, is subtracted from the token loss.
    kl_coef, kl_kind, kl_in: penalty towards the reference; see `kl`. In the 'loss' it is
      differentiated; there 'k1' only adds noise, since its gradient is zero on average on-policy.
      In the 'reward' it is a constant of old and reference log-probs.
    importance: weights on the policy-gradient term for the gap between `old` and the sampler, per
      token: 'none'; 'truncate': min(w, cap); 'mask': w where 1/cap <= w <= cap, else 0.
  """
  estimator: str | Callable[..., np.ndarray] = 'trr_plus_plus'
  role_estimators: tuple[tuple[str, str | Callable[..., np.ndarray]], ...] = ()
  pass_k: int = 2
  whiten_by: str = ''
  whiten_count: str = 'token'
  role_weights: tuple[tuple[str, float], ...] = ()
  aggregation: str = ''
  aggregation_rows: int = 16
  aggregation_tokens: int = 0
  clip_low: float = 0.2
  clip_high: float = 0.2
  dual_clip: float = 0.0
  entropy_coef: float = 0.0
  kl_coef: float = 0.0
  kl_kind: str = 'k3'
  kl_in: str = 'loss'
  importance: str = 'none'
  importance_cap: float = 2.0

  def __post_init__(self):
    for name in ('role_estimators', 'role_weights'):      # dicts will do
      object.__setattr__(self, name, tuple(dict(getattr(self, name)).items()))
    _check(self)

  @property
  def needs_reference(self) -> bool:
    return self.kl_coef > 0

  @property
  def needs_old(self) -> bool:
    """Whether advantages depend on old log-probs, which then must be known before the update."""
    return self.kl_coef > 0 and self.kl_in == 'reward'

  def penalty(self, old_BT: np.ndarray, reference_BT: np.ndarray) -> np.ndarray | float:
    """What KL in the reward adds to each token: -kl_coef * kl, or 0.0 when it is not used."""
    if not self.kl_coef or self.kl_in != 'reward':
      return 0.0
    gap_BT = np.clip(np.asarray(old_BT, np.float64) - reference_BT, -PENALTY_BOUND, PENALTY_BOUND)
    return -self.kl_coef * kl(gap_BT, self.kl_kind, np)

  def advantages(self, r: Rollout, roles: tuple[str, ...]) -> np.ndarray:
    """Advantages of every response token, 0 outside the mask; `roles[i]` names role number i."""
    own = dict(self.role_estimators)
    index = {role: i for i, role in enumerate(roles)}
    rest_B = ~np.isin(r.role_B, [index[role] for role in own if role in index])
    out_BT = np.zeros(r.reward_BT.shape, np.float32)
    out_BT[rest_B] = self._estimate(self.estimator, take(r, rest_B))
    for role, estimator in own.items():
      member_B = r.role_B == index.get(role, -1)
      out_BT[member_B] = self._estimate(estimator, take(r, member_B))
    for role, factor in self.role_weights:
      out_BT[r.role_B == index.get(role, -1)] *= np.float32(factor)
    return out_BT

  def weights(self, r: Rollout) -> np.ndarray:
    """Weight of every response token in the loss, 0 outside the mask."""
    return AGGREGATIONS[self.aggregation or 'token'](r, self)

  def loss(self, s: Scored) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Token losses, and token statistics whose means over the batch are metrics."""
    gap_M = jnp.clip(s.logprob_M - s.old_M, -LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    ratio_M = jnp.exp(gap_M)
    weight_M = importance_weights(s.old_M - s.sampler_M, self.importance, self.importance_cap)
    policy_M, clipped_M = clipped_loss(
        ratio_M, s.advantage_M, clip_low=self.clip_low, clip_high=self.clip_high,
        dual_clip=self.dual_clip)
    loss_M = weight_M * policy_M
    stats = {'policy_loss': loss_M, 'ratio_mean': ratio_M, 'clip_fraction': clipped_M,
             'kl_old': kl(-gap_M, 'k3'), 'importance_weight': weight_M}
    if self.entropy_coef:
      loss_M -= self.entropy_coef * s.entropy_M
    if self.needs_reference:
      anchor_M = jnp.clip(s.logprob_M - s.reference_M, -LOG_RATIO_BOUND, LOG_RATIO_BOUND)
      kl_M = kl(anchor_M, self.kl_kind)
      stats['kl_reference'] = kl_M
      if self.kl_in == 'loss':
        loss_M += self.kl_coef * kl_M
    return loss_M, stats

  def _estimate(self, estimator, r: Rollout) -> np.ndarray:
    if not len(r.role_B):
      return np.zeros(r.reward_BT.shape, np.float32)
    if not isinstance(estimator, str):
      made_BT = np.asarray(estimator(r))
      if made_BT.shape != r.reward_BT.shape:           # NumPy might broadcast it
        raise ValueError(f'algorithm.name makes advantages of shape {made_BT.shape} for tokens of '
                         f'shape {r.reward_BT.shape}.')
      return made_BT
    options = {}
    if estimator in _WHITENING:
      options = {'count': self.whiten_count}
      if self.whiten_by:
        options['whiten_by'] = self.whiten_by
    if estimator == 'pass_at_k':
      options = {'k': self.pass_k}
    return ESTIMATORS[estimator](r, **options)


def clipped_loss(ratio_M: jax.Array, advantage_M: jax.Array, *, clip_low: float, clip_high: float,
                 dual_clip: float = 0.0) -> tuple[jax.Array, jax.Array]:
  """PPO's pessimistic surrogate, max(-A r, -A clip(r)), and 1.0 where clipping decided it.

  With `dual_clip` c > 1, tokens with a negative advantage lose at most -A c.

  Source: PPO (arXiv:1707.06347) eq. 7; dual clip (arXiv:1912.09729) eq. 5.
  """
  plain_M = -advantage_M * ratio_M
  loss_M = jnp.maximum(plain_M, -advantage_M * jnp.clip(ratio_M, 1 - clip_low, 1 + clip_high))
  if dual_clip:
    loss_M = jnp.where(advantage_M < 0, jnp.minimum(loss_M, -advantage_M * dual_clip), loss_M)
  return loss_M, (loss_M != plain_M).astype(jnp.float32)


def kl(gap, kind: str, xp=jnp):
  """Estimate of KL(policy || other) from gap = log policy - log other, per token.

  'k1': the gap; unbiased, may be negative. 'k2': gap^2 / 2; its gradient is that of the KL.
  'k3': exp(-gap) - 1 + gap; unbiased and never negative.

  Source: Schulman, "Approximating KL divergence" (2020).
  """
  if kind == 'k1':
    return gap
  if kind == 'k2':
    return gap**2 / 2
  if kind == 'k3':
    return xp.expm1(-gap) + gap
  raise ValueError(f"kl kind={kind!r} is unknown; allowed: 'k1', 'k2', 'k3'.")


def importance_weights(gap_M: jax.Array, kind: str, cap: float) -> jax.Array:
  """exp(gap) of trainer against sampler: cut to `cap`, or 0 outside [1 / cap, cap]."""
  if kind == 'none':
    return jnp.ones_like(gap_M)
  weight_M = jnp.exp(jnp.clip(gap_M, -LOG_RATIO_BOUND, LOG_RATIO_BOUND))
  if kind == 'truncate':
    return jnp.minimum(weight_M, cap)
  if kind != 'mask':
    raise ValueError(f"importance={kind!r} is unknown; allowed: 'none', 'truncate', 'mask'.")
  return jnp.where((weight_M >= 1 / cap) & (weight_M <= cap), weight_M, 0)


# Open: a function of the rollout and the algorithm, which holds the numbers.
AGGREGATIONS: dict[str, Callable[[Rollout, Algorithm], np.ndarray]] = {
    'token': lambda r, a: estimators.token_mean(r),
    'sequence': lambda r, a: estimators.sequence_mean(r),
    'constant': lambda r, a: estimators.constant(r, tokens=a.aggregation_tokens),
    'role_microbatch': lambda r, a: estimators.role_microbatch(r, rows=a.aggregation_rows),
}

ALGORITHMS: dict[str, Callable[..., Any]] = {
    'trr_plus_plus': functools.partial(
        Algorithm, estimator='trr_plus_plus', aggregation='role_microbatch'),
    'reinforce_plus_plus': functools.partial(Algorithm, estimator='reinforce_plus_plus'),
    'reinforce_plus_plus_baseline': functools.partial(
        Algorithm, estimator='reinforce_plus_plus_baseline'),
    'grpo': functools.partial(Algorithm, estimator='grpo', aggregation='sequence'),
    'dr_grpo': functools.partial(Algorithm, estimator='dr_grpo', aggregation='constant'),
    'rloo': functools.partial(Algorithm, estimator='rloo', aggregation='sequence'),
    'opo': functools.partial(Algorithm, estimator='opo'),
    'pass_at_k': functools.partial(Algorithm, estimator='pass_at_k', aggregation='sequence'),
    'trr_prompt': functools.partial(
        Algorithm, estimator='trr_prompt', aggregation='role_microbatch'),
}

_WHITENING = ('trr_plus_plus', 'trr_prompt', 'reinforce_plus_plus',
              'reinforce_plus_plus_baseline')


def get(name: str, **fields: Any) -> Any:
  """The algorithm called `name`: a key of `ALGORITHMS`, or 'module:function' of your own.

  `fields` override what a name of `ALGORITHMS` stands for; '' and None keep it. A function of your
  own is called with all of them. Raises ValueError for a name that is neither, or a value that
  cannot work.
  """
  if name in ALGORITHMS:
    return ALGORITHMS[name](**{k: v for k, v in fields.items() if v is not None and v != ''})
  module, colon, attribute = name.partition(':')
  if not colon:
    raise ValueError(f'algorithm.name={name!r} is unknown; allowed: '
                     f"{', '.join(sorted(ALGORITHMS))}, or your own as 'module:name'.")
  try:
    make = getattr(importlib.import_module(module), attribute)
  except (ImportError, AttributeError) as e:
    raise ValueError(f'algorithm.name={name!r} cannot be loaded ({e}); is its folder on '
                     'PYTHONPATH, and the name after the colon defined there?') from e
  return make(**fields)


def take(r: Rollout, member_B: np.ndarray) -> Rollout:
  """The rollout of some of its sequences, by number or truth value."""
  penalty = r.penalty_BT[member_B] if np.ndim(r.penalty_BT) else r.penalty_BT
  return Rollout(*(x[member_B] for x in r[:5]), penalty)


def _check(a: Algorithm) -> None:
  def refuse(field, allowed):
    raise ValueError(f'algorithm.{field}={getattr(a, field)!r} cannot work; allowed: {allowed}.')
  named = {'estimator': a.estimator} | {f'role_estimators.{r}': e for r, e in a.role_estimators}
  for field, name in named.items():
    if isinstance(name, str) and name not in ESTIMATORS:
      raise ValueError(f'algorithm.{field}={name!r} is unknown; allowed: '
                       f'{", ".join(sorted(ESTIMATORS))}, or a function of a Rollout.')
  if a.aggregation and a.aggregation not in AGGREGATIONS:
    refuse('aggregation', ', '.join(AGGREGATIONS))
  if a.aggregation == 'constant' and a.aggregation_tokens < 1:
    refuse('aggregation_tokens', "the longest response allowed, with aggregation='constant'")
  if a.aggregation_rows < 1:
    refuse('aggregation_rows', '1 or more')
  if a.pass_k < 1:
    refuse('pass_k', '1 or more')
  if a.whiten_by not in ('', 'global', 'role', 'role_kind'):
    refuse('whiten_by', "'' (the estimator's own), 'global', 'role', 'role_kind'")
  if a.whiten_count not in ('token', 'sequence'):
    refuse('whiten_count', "'token', 'sequence'")
  if not 0 <= a.clip_low <= 1:
    refuse('clip_low', '0 to 1')
  if a.clip_high < 0:
    refuse('clip_high', '0 or more')
  if a.dual_clip and a.dual_clip <= 1:
    refuse('dual_clip', '0 (off) or more than 1')
  if a.kl_coef < 0:
    refuse('kl_coef', '0 or more')
  if a.kl_kind not in ('k1', 'k2', 'k3'):
    refuse('kl_kind', "'k1', 'k2', 'k3'")
  if a.kl_in not in ('loss', 'reward'):
    refuse('kl_in', "'loss', 'reward'")
  if a.importance not in ('none', 'truncate', 'mask'):
    refuse('importance', "'none', 'truncate', 'mask'")
  if a.importance_cap < 1:
    refuse('importance_cap', '1 or more')
