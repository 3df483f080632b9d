# SPDX-License-Identifier: Apache-2.0
"""Log-probs of older policies in the update: the ratio, its recomputation, and KL."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import random_rows as rows_lib
import tiny_learner
from tiny_learner import ALL, CONFIG, RECORD
from tiny_learner import plain_logprobs as _plain_logprobs
from tiny_learner import update as _update

from absolute_zero_jax import learner, packing, reinforce

params = tiny_learner.params


def test_old_logprobs_of_the_sampler_enter_the_ratio(params):
  rows = rows_lib.rows()
  _, metrics, trainer = _update(params, rows, old_logprobs='sampler', fields={})
  layout = packing.plan(rows, micro_batch_tokens=ALL)
  batches = packing.fill(layout, rows)
  own = packing.take_rows(layout, rows, batches, trainer.logprobs(params, batches))
  gap = np.concatenate([o - r.model_logprobs for o, r in zip(own, rows)])
  np.testing.assert_allclose(metrics['ratio_mean'], np.exp(gap).mean(), rtol=1e-4)
  # 'mismatch' says the same in any mode, at no extra forward.
  np.testing.assert_allclose(metrics['mismatch_abs'], np.abs(gap).mean(), rtol=1e-5)
  np.testing.assert_allclose(metrics['mismatch_max'], np.abs(gap).max(), rtol=1e-5)
  np.testing.assert_allclose(metrics['mismatch_kl'], (np.exp(gap) - 1 - gap).mean(), rtol=1e-4)


def test_logprobs_are_those_of_the_model_for_every_row(params):
  rows = rows_lib.rows(5)
  want = _plain_logprobs(params, rows)
  trainer = learner.of_decoder(CONFIG, RECORD, reinforce.get('trr_plus_plus'))
  for pack in (False, True):
    layout = packing.plan(rows, micro_batch_tokens=512, pack=pack)
    batches = packing.fill(layout, rows)
    own = packing.take_rows(layout, rows, batches, trainer.logprobs(params, batches))
    for row, got, logp_TV in zip(rows, own, want):
      np.testing.assert_allclose(got, logp_TV[np.arange(len(got)), np.array(row.response_ids)],
                                 rtol=1e-4, atol=1e-5)


def test_kl_to_a_reference_is_zero_at_the_reference_and_pulls_back_elsewhere(params):
  rows = rows_lib.rows(6)
  fields = dict(kl_coef=0.1, kl_kind='k2')
  _, metrics, _ = _update(params, rows, fields=fields, reference=params)
  np.testing.assert_allclose(metrics['kl_reference'], 0, atol=1e-9)
  moved = jax.tree.map(lambda x: x * 1.02, params)
  flat = [learner.Row(**vars(r) | {'reward': 0.0}) for r in rows]
  state, metrics, trainer = _update(moved, flat, fields=fields, reference=params,
                                    tx=optax.sgd(1e-4))
  work = trainer.prepare(flat, state.params, reference=params)
  _, later = trainer.update(state, work)
  assert later['kl_reference'] < metrics['kl_reference']
  with pytest.raises(ValueError, match='reference'):
    trainer.prepare(rows, moved)


def test_kl_in_the_reward_moves_advantages_only(params):
  rows = [learner.Row(**vars(r) | {'reward': 1.0}) for r in rows_lib.rows(6)]
  moved = jax.tree.map(lambda x: x * 1.1, params)
  trainer = learner.of_decoder(CONFIG, RECORD, reinforce.get(
      'reinforce_plus_plus', kl_coef=0.1, kl_kind='k1', kl_in='reward'))
  assert not any(a.any() for a in trainer.prepare(rows, params, reference=params).advantages)
  work = trainer.prepare(rows, moved, reference=params)
  layout = packing.plan(rows, micro_batch_tokens=4096)
  batches = packing.fill(layout, rows)
  old, ref = (packing.take_rows(layout, rows, batches, trainer.logprobs(p, batches))
              for p in (moved, params))
  value = [np.cumsum((1.0 * (np.arange(len(o)) == len(o) - 1) - 0.1 * (o - r))[::-1])[::-1]
           for o, r in zip(old, ref)]
  flat = np.concatenate(value)
  np.testing.assert_allclose(np.concatenate(work.advantages), (flat - flat.mean()) / flat.std(),
                             atol=1e-4)


def test_several_steps_per_batch_move_the_ratio(params):
  rows = rows_lib.rows(8)
  options = dict(old_logprobs='recompute', tx=optax.sgd(1e-2), fields={}, micro_batch_tokens=512)
  state, metrics, _ = _update(params, rows, epochs=2, mini_batches=2, **options)
  assert metrics['optimizer_steps'] == 4 and int(state.step) == 4
  assert metrics['kl_old'] > 1e-8
  with pytest.raises(ValueError, match="old_logprobs='recompute'"):
    _update(params, rows, epochs=2)


def test_old_logprobs_are_recomputed_only_beyond_the_bound(params):
  rows = rows_lib.rows(9)
  def trainer(**options):
    return learner.of_decoder(CONFIG, RECORD, reinforce.get('grpo'), micro_batch_tokens=512,
                              old_logprobs='auto', **options)
  def old(work):
    return np.concatenate([b.old_logprobs_BT[b.mask_BT > 0] for part in work.parts for b in part])
  several = trainer(mini_batches=2, mismatch_bound=0.02)
  far = several.prepare(rows, params)
  assert far.metrics['old_recomputed'] == 1 and far.metrics['old_mismatch'] > 0.5
  layout = packing.plan(rows, micro_batch_tokens=512)
  batches = packing.fill(layout, rows)
  assert len(batches) > 1
  own = packing.take_rows(layout, rows, batches, several.logprobs(params, batches))
  for gap, recomputed in ((0.01, 0), (0.03, 1), (np.nan, 1)):
    near = [learner.Row(**vars(r) | {'model_logprobs': (o + gap).tolist()})
            for r, o in zip(rows, own)]
    work = several.prepare(near, params)
    assert work.metrics['old_recomputed'] == recomputed
    assert work.metrics['old_mismatch'] == pytest.approx(gap, rel=1e-3, nan_ok=True)
    np.testing.assert_allclose(old(work) - old(far), 0 if recomputed else gap, atol=1e-6)
  # One step per batch needs neither: the ratio is 1, and nothing is scored.
  once = trainer()
  assert 'old_mismatch' not in once.prepare(rows, params).metrics and once.compilations() == 0


def test_kl_old_is_the_divergence_of_the_new_policy_from_the_one_that_drew():
  old, new = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5])
  drawn = np.repeat(np.arange(3), (500, 300, 200))
  scored = reinforce.Scored(**{name: jnp.zeros(1000) for name in reinforce.Scored._fields} | {
      'logprob_M': jnp.log(new[drawn]), 'old_M': jnp.log(old[drawn]),
      'sampler_M': jnp.log(old[drawn])})
  _, stats = reinforce.get('trr_plus_plus').loss(scored)
  np.testing.assert_allclose(np.mean(stats['kl_old']), np.sum(old * np.log(old / new)), rtol=1e-5)
