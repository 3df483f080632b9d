# SPDX-License-Identifier: Apache-2.0
"""Losses against torch formulas and hand sums, and the algorithm as one object."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rollouts import random as _random

from absolute_zero_jax import advantages, reinforce

# --- losses


def _scored(**given):
  zero = jnp.zeros(np.shape(given.get('logprob', [[0] * 5])))
  names = [f[:-2] for f in reinforce.Scored._fields]
  return reinforce.Scored(*(jnp.asarray(given.get(n, zero), jnp.float32) for n in names))


def _torch_ppo(torch, logp, old, adv, low, high, dual):
  ratio = torch.exp(torch.clamp(logp - old, -20, 20))
  loss = torch.maximum(-adv * ratio, -adv * torch.clamp(ratio, 1 - low, 1 + high))
  return torch.where(adv < 0, torch.minimum(loss, -adv * dual), loss) if dual else loss


@pytest.mark.parametrize('low, high, dual', [(0.2, 0.2, 0.0), (0.2, 0.28, 3.0), (0.1, 0.5, 1.5)])
def test_the_clipped_loss_and_its_gradient_equal_torch(low, high, dual):
  torch = pytest.importorskip('torch')
  rng = np.random.default_rng(0)
  logp, old, adv = rng.normal(0, 1.2, (3, 4, 50))
  a = reinforce.get('reinforce_plus_plus', clip_low=low, clip_high=high, dual_clip=dual)
  fn = lambda x: a.loss(_scored(logprob=x, old=old, advantage=adv))[0].sum()
  loss, grad = jax.value_and_grad(fn)(jnp.asarray(logp, jnp.float32))
  x = torch.tensor(logp, requires_grad=True)
  want = _torch_ppo(torch, x, torch.tensor(old), torch.tensor(adv), low, high, dual).sum()
  want.backward()
  np.testing.assert_allclose(loss, want.item(), rtol=1e-5)
  np.testing.assert_allclose(grad, x.grad.numpy(), atol=1e-5)


def test_clip_cases_by_hand():
  ratio = jnp.array([1.5, 1.5, 0.5, 0.5, 9.0])
  adv = jnp.array([1.0, -1.0, 1.0, -1.0, -1.0])
  loss, clipped = reinforce.clipped_loss(ratio, adv, clip_low=0.2, clip_high=0.3, dual_clip=3.0)
  np.testing.assert_allclose(loss, [-1.3, 1.5, -0.5, 0.8, 3.0], rtol=1e-6)
  np.testing.assert_array_equal(clipped, [1, 0, 0, 1, 1])


@pytest.mark.parametrize('kind', ['k1', 'k2', 'k3'])
def test_kl_estimates_agree_with_the_exact_divergence(kind):
  p, q = np.array([0.5, 0.3, 0.2]), np.array([0.45, 0.35, 0.2])
  gap = np.log(p) - np.log(q)
  mean = (p * np.asarray(reinforce.kl(jnp.asarray(gap), kind))).sum()
  # k1 and k3 are unbiased; k2 to third order.
  np.testing.assert_allclose(mean, (p * gap).sum(), rtol=1e-4 if kind != 'k2' else 0.05)


def test_expected_gradients_of_the_kl_losses():
  """On-policy, k2's expected gradient is the KL's; k1's is zero, as the docstring warns."""
  theta, q = jnp.array([0.3, -0.2, 0.5]), jax.nn.log_softmax(jnp.array([0.0, 0.4, -0.1]))
  p = jax.nn.softmax(theta)

  def exact(theta):
    logp = jax.nn.log_softmax(theta)
    return jnp.sum(jnp.exp(logp) * (logp - q))

  def expected(kind):
    return jax.grad(lambda t: jnp.sum(p * reinforce.kl(jax.nn.log_softmax(t) - q, kind)))(theta)

  np.testing.assert_allclose(expected('k2'), jax.grad(exact)(theta), atol=1e-6)
  np.testing.assert_allclose(expected('k1'), 0, atol=1e-6)


def test_kl_in_the_loss_and_entropy_bonus_by_hand():
  logp = [[-1.0, -2.0, -0.5, -3.0, -1.0]]
  reference, entropy = [[-1.5, -1.0, -0.5, -2.0, -4.0]], [[1.0, 2.0, 0.0, 0.5, 3.0]]
  a = reinforce.get('grpo', kl_coef=0.1, kl_kind='k3', entropy_coef=0.01)
  loss, stats = a.loss(_scored(logprob=logp, old=logp, reference=reference, entropy=entropy))
  gap = np.array(logp) - reference
  kl = np.exp(-gap) - 1 + gap
  np.testing.assert_allclose(loss, 0.1 * kl - 0.01 * np.array(entropy), rtol=1e-5, atol=1e-7)
  np.testing.assert_allclose(stats['kl_reference'], kl, rtol=1e-5, atol=1e-7)


def test_kl_in_the_reward_is_a_clamped_constant():
  a = reinforce.get('reinforce_plus_plus', kl_coef=0.5, kl_kind='k1', kl_in='reward')
  got = a.penalty(np.array([[-1.0, -2.0, 0.0]]), np.array([[-2.0, -1.0, -50.0]]))
  np.testing.assert_allclose(got, [[-0.5, 0.5, -5.0]])
  loss, _ = a.loss(_scored(reference=[[-9.0] * 5]))
  assert not loss.any()
  assert reinforce.get('grpo', kl_coef=0.5).penalty(1, 2) == 0.0


def test_importance_weights_truncate_or_mask_the_policy_gradient():
  gap = jnp.log(jnp.array([0.1, 0.5, 1.0, 1.9, 5.0]))
  truncated = reinforce.importance_weights(gap, 'truncate', 2.0)
  masked = reinforce.importance_weights(gap, 'mask', 2.1)
  np.testing.assert_allclose(truncated, [0.1, 0.5, 1, 1.9, 2], rtol=1e-6)
  np.testing.assert_allclose(masked, [0, 0.5, 1, 1.9, 0], rtol=1e-6)
  np.testing.assert_array_equal(reinforce.importance_weights(gap, 'none', 2.0), 1)
  a = reinforce.get('reinforce_plus_plus', importance='truncate', importance_cap=2.0)
  one = jnp.ones((1, 5))
  grad = jax.grad(lambda x: a.loss(_scored(
      logprob=x, old=jnp.zeros((1, 5)), sampler=-gap[None], advantage=one))[0].sum())(one * 0)
  np.testing.assert_allclose(grad[0], -truncated, rtol=1e-6)


def test_a_broken_token_cannot_overflow():
  a = reinforce.get('trr_plus_plus', importance='truncate', kl_coef=0.1)
  scored = _scored(logprob=[[-1e4, 0, -1e4, 0, -1]], old=[[0, -1e4, 0, -1e4, -1]],
                   advantage=[[1, 1, -1, -1, 1]], reference=[[0, -1e4, -1e4, 0, -1]])
  loss, stats = a.loss(scored)
  assert np.isfinite(loss).all() and all(np.isfinite(x).all() for x in stats.values())


# --- the algorithm as one object


def test_roles_may_have_their_own_estimator_and_weight():
  r = _random(3)
  roles = ('propose', 'solve')
  plain = reinforce.get('trr_plus_plus')
  mixed = reinforce.get('trr_plus_plus', role_estimators=(('solve', 'rloo'),),
                        role_weights=(('propose', 0.3),))
  propose, solve = r.role_B == 0, r.role_B == 1
  got, base = mixed.advantages(r, roles), plain.advantages(r, roles)
  np.testing.assert_allclose(got[propose], 0.3 * base[propose], rtol=1e-6)
  np.testing.assert_array_equal(got[solve], advantages.rloo(reinforce.take(r, solve)))
  # A role that is not in the batch changes nothing.
  absent = reinforce.get('trr_plus_plus', role_estimators=(('judge', 'rloo'),),
                         role_weights=(('judge', 9.0),))
  np.testing.assert_array_equal(absent.advantages(r, roles), base)


def test_every_named_algorithm_works_and_estimators_have_one_each():
  assert set(reinforce.ALGORITHMS) == set(advantages.ESTIMATORS)
  r = _random(1)
  for name in reinforce.ALGORITHMS:
    a = reinforce.get(name, aggregation_tokens=100, whiten_by='')
    np.testing.assert_array_equal(a.advantages(r, ('p', 's')), advantages.ESTIMATORS[name](r))
    assert a.weights(r).shape == r.mask_BT.shape
    hash(a)


@pytest.mark.parametrize('name, aggregation', [
    ('trr_plus_plus', 'role_microbatch'), ('trr_prompt', 'role_microbatch'),
    ('grpo', 'sequence'), ('rloo', 'sequence'), ('pass_at_k', 'sequence'),
    ('dr_grpo', 'constant'), ('opo', ''), ('reinforce_plus_plus', ''),
    ('reinforce_plus_plus_baseline', '')])
def test_every_algorithm_has_the_aggregation_of_its_paper(name, aggregation):
  assert reinforce.get(name, aggregation_tokens=50).aggregation == aggregation


@pytest.mark.parametrize('fields, weights', [
    ({'aggregation': 'token'}, advantages.token_mean),
    ({'aggregation': 'sequence'}, advantages.sequence_mean),
    ({'aggregation': 'constant', 'aggregation_tokens': 50},
     lambda r: advantages.constant(r, tokens=50)),
    ({'aggregation': 'role_microbatch', 'aggregation_rows': 3},
     lambda r: advantages.role_microbatch(r, rows=3)),
    ({'aggregation': 'role_microbatch'}, advantages.role_microbatch)])
def test_the_aggregation_named_is_the_one_computed(fields, weights):
  r = _random(4)
  np.testing.assert_array_equal(reinforce.get('trr_plus_plus', **fields).weights(r), weights(r))


@pytest.mark.parametrize('whiten_by', ['global', 'role', 'role_kind'])
@pytest.mark.parametrize('name', ['trr_plus_plus', 'trr_prompt', 'reinforce_plus_plus',
                                  'reinforce_plus_plus_baseline'])
def test_whitening_is_done_as_the_fields_say(name, whiten_by):
  r = _random(4)
  made = reinforce.get(name, whiten_by=whiten_by, whiten_count='sequence')
  np.testing.assert_array_equal(
      made.advantages(r, ('propose', 'solve')),
      advantages.ESTIMATORS[name](r, whiten_by=whiten_by, count='sequence'))


def half_reward(r):
  return (0.5 * r.reward_BT).astype(np.float32)


def halved(**fields):
  return reinforce.Algorithm(estimator=half_reward, **fields)


def test_an_algorithm_of_the_users_own_is_named_in_the_config():
  a = reinforce.get(f'{__name__}:halved', clip_low=0.1)
  r = _random(0)
  np.testing.assert_array_equal(a.advantages(r, ('p', 's')), half_reward(r))
  assert a.clip_low == 0.1


def needs_all(whiten_by, aggregation, clip_low):
  return reinforce.Algorithm(whiten_by=whiten_by, aggregation=aggregation, clip_low=clip_low)


def broken(**fields):
  return np.no_such_thing


def test_a_function_of_the_users_own_gets_every_field_and_keeps_its_errors():
  a = reinforce.get(f'{__name__}:needs_all', whiten_by='', aggregation='', clip_low=0.1)
  assert (a.whiten_by, a.clip_low) == ('', 0.1)
  with pytest.raises(AttributeError, match='no_such_thing'):
    reinforce.get(f'{__name__}:broken')


@pytest.mark.parametrize('fields, match', [
    ({'name': 'gprpo'}, 'algorithm.name=.*allowed: dr_grpo'),
    ({'name': 'no_such_module:x'}, 'PYTHONPATH'),
    ({'name': 'grpo', 'clip_low': 1.5}, 'clip_low=1.5 .* 0 to 1'),
    ({'name': 'grpo', 'dual_clip': 0.5}, 'dual_clip'),
    ({'name': 'grpo', 'aggregation': 'sum'}, 'aggregation=.*token, sequence'),
    ({'name': 'dr_grpo'}, 'aggregation_tokens=0'),
    ({'name': 'grpo', 'kl_kind': 'k4'}, 'kl_kind'),
    ({'name': 'grpo', 'importance': 'clip'}, 'importance'),
    ({'name': 'grpo', 'importance_cap': 0.5}, 'importance_cap'),
    ({'name': 'grpo', 'pass_k': 0}, 'pass_k=0'),
    ({'name': 'trr_plus_plus', 'whiten_by': 'kind'}, 'whiten_by'),
    ({'name': 'trr_plus_plus', 'role_estimators': (('solve', 'gae'),)},
     "algorithm.role_estimators.solve='gae' is unknown"),
])
def test_impossible_values_are_refused_by_name(fields, match):
  with pytest.raises(ValueError, match=match):
    reinforce.get(**fields)


def test_options_of_roles_may_be_dicts():
  given = dict(role_estimators={'solve': 'rloo'}, role_weights={'propose': 0.3})
  assert reinforce.get('grpo', **given) == reinforce.get(
      'grpo', **{name: tuple(value.items()) for name, value in given.items()})


@pytest.mark.parametrize('made', [
    lambda: reinforce.kl(0.1, 'low_var_kl'),
    lambda: reinforce.importance_weights(jnp.zeros(2), 'truncated', 2.0)])
def test_an_unknown_estimate_is_not_taken_for_another(made):
  with pytest.raises(ValueError, match='is unknown; allowed: '):
    made()


def test_a_part_of_a_rollout_has_its_part_of_any_penalty():
  r = _random(0)._replace(penalty_BT=jnp.ones(_random(0).mask_BT.shape))
  assert reinforce.take(r, np.array([0])).penalty_BT.shape == r.mask_BT[:1].shape
