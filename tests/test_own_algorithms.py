# SPDX-License-Identifier: Apache-2.0
"""Algorithms of a user's own: what the learner hands them, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import random_rows
import rollouts

from absolute_zero_jax import learner, learner_metrics, reinforce
from absolute_zero_jax.models import decoder
from absolute_zero_jax.models.config import ModelConfig

CONFIG = ModelConfig('llama', vocab=96, embed=16, layers=1, heads=1, kv_heads=1, head_dim=16,
                     ffn=16, tied=True)


class Counting(reinforce.Algorithm):
  """Its loss has the one statistic that `NAMES` holds."""

  def loss(self, s):
    return -s.advantage_M * s.logprob_M, {NAMES[0]: jnp.full_like(s.logprob_M, 3.0)}


NAMES = []


def _update(algorithm):
  trainer = learner.of_decoder(CONFIG, optax.sgd(0.1), algorithm, micro_batch_tokens=128)
  state = trainer.init(decoder.init(CONFIG, jax.random.key(0)))
  work = trainer.prepare(random_rows.rows(6, longest=30), state.params)
  assert work.metrics['micro_batches'] > 1
  return trainer.update(state, work)[1]


@pytest.mark.parametrize('name', ['ratio_max', 'kl_R', 'loss', 'tokens', 'entropy', 'rows'])
def test_a_statistic_that_would_be_taken_for_another_is_refused(name, monkeypatch):
  monkeypatch.setattr(f'{__name__}.NAMES', [name])
  with pytest.raises(ValueError, match=rf"algorithm.name: .*statistics called \['{name}'\]"):
    _update(Counting())


def test_any_other_statistic_is_a_mean_over_tokens(monkeypatch):
  monkeypatch.setattr(f'{__name__}.NAMES', ['max_ratio'])
  assert _update(Counting())['max_ratio'] == pytest.approx(3)


class Silent(reinforce.Algorithm):
  def loss(self, s):
    return -s.advantage_M * s.logprob_M, {}


def test_every_name_of_the_learners_own_is_refused():
  own = {name for name in _update(Silent()) if '/' not in name and not name.endswith('_max')}
  assert {'loss', 'entropy', 'advantage_abs'} <= own <= set(learner_metrics._TAKEN)


class Old(reinforce.Algorithm):
  """Its advantages depend on old log-probs; no reference is asked for."""
  needs_old = True

  def penalty(self, old_BT, reference_BT):
    assert reference_BT is None
    return super().penalty(old_BT, reference_BT) - 0.1 * old_BT


def test_a_penalty_of_old_logprobs_needs_no_reference():
  trainer = learner.of_decoder(CONFIG, optax.sgd(0.1), Old(), old_logprobs='sampler')
  plain = learner.of_decoder(CONFIG, optax.sgd(0.1), reinforce.Algorithm())
  params, rows = decoder.init(CONFIG, jax.random.key(0)), random_rows.rows(6, longest=30)
  moved, still = (made.prepare(rows, params).advantages for made in (trainer, plain))
  assert any(np.abs(a - b).max() > 1e-3 for a, b in zip(moved, still))


def test_a_reference_that_is_missing_is_named():
  class Anchored(reinforce.Algorithm):
    needs_reference = True
  with pytest.raises(ValueError, match='one of your own.* needs the parameters of a reference'):
    _update(Anchored())


@pytest.mark.parametrize('keepdims', [False, True])
def test_one_advantage_per_sequence_is_none_per_token(keepdims):
  square = rollouts.rollout([1, -1, 5], [3, 2, 1])       # NumPy would take sequences for tokens
  a = reinforce.Algorithm(estimator=lambda r: r.reward_BT.sum(axis=1, keepdims=keepdims))
  with pytest.raises(ValueError, match=r'advantages of shape .* tokens of shape \(3, 3\)'):
    a.advantages(square, ('p', 's'))
