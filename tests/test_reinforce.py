# SPDX-License-Identifier: Apache-2.0
"""Estimators, aggregations and losses against published vectors, torch formulas and hand sums."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from absolute_zero_jax import advantages, reinforce
from absolute_zero_jax.advantages import Rollout

REWARDS = [1, -0.5, -1, 1]


def _rollout(rewards, lengths, role=None, kind=None, prompt=None, penalty=0.0):
  """Terminal rewards on the last of `lengths` tokens, right-padded."""
  B, T = len(rewards), max(lengths)
  mask_BT = (np.arange(T)[None] < np.array(lengths)[:, None]).astype(float)
  reward_BT = np.zeros((B, T))
  reward_BT[np.arange(B), np.array(lengths) - 1] = rewards
  ids = [np.zeros(B, int) if x is None else np.array(x) for x in (role, kind, prompt)]
  return Rollout(reward_BT, mask_BT, *ids, penalty)


def _random(seed, B=24, T=9, prompts=6):
  rng = np.random.default_rng(seed)
  rows = [rng.permutation(np.arange(B) % n) for n in (2, 3, prompts)]
  return _rollout(rng.standard_normal(B), rng.integers(1, T + 1, B), *rows)


# --- estimators


@pytest.mark.parametrize('lengths, want', [
    ([10, 10, 10, 10], [0.967866, -0.691333, -1.244399, 0.967866]),
    ([100, 10, 10, 1], [0.437831, -1.832638, -2.589461, 0.437831])])
def test_trr_gives_the_vectors_measured_on_the_reference(lengths, want):
  r = _rollout(REWARDS, lengths)
  adv_BT = advantages.trr_plus_plus(r)
  for adv_T, length, value in zip(adv_BT, lengths, want):
    np.testing.assert_allclose(adv_T[:length], value, atol=1e-6)
    assert not adv_T[length:].any()


def test_trr_whitens_each_role_and_kind_alone():
  lengths = [100, 10, 10, 1] * 2
  r = _rollout([*REWARDS, *(7 * x + 3 for x in REWARDS)], lengths, role=[0] * 4 + [1] * 4)
  adv_B = advantages.trr_plus_plus(r)[:, 0]
  np.testing.assert_allclose(adv_B[:4], [0.437831, -1.832638, -2.589461, 0.437831], atol=1e-6)
  np.testing.assert_allclose(adv_B[4:], adv_B[:4], atol=1e-6)     # a shared baseline: 1.02, -0.78
  other = r._replace(role_B=r.role_B * 0, kind_B=r.role_B)
  np.testing.assert_array_equal(advantages.trr_plus_plus(other), advantages.trr_plus_plus(r))


def test_a_shared_scope_is_one_baseline_for_all():
  r = _random(0)
  shared = advantages.trr_plus_plus(r, whiten_by='global')
  scored = r.mask_BT > 0
  value = np.repeat((r.reward_BT * r.mask_BT).sum(1)[:, None], r.mask_BT.shape[1], 1)[scored]
  want = (value - value.mean()) / np.sqrt(value.var(ddof=1) + 1e-8)
  np.testing.assert_allclose(shared[scored], want, atol=1e-6)
  by_role = advantages.trr_plus_plus(r, whiten_by='role')
  for role in (0, 1):
    part = advantages.trr_plus_plus(reinforce.take(r, r.role_B == role), whiten_by='global')
    np.testing.assert_array_equal(by_role[r.role_B == role], part)


def test_sequences_may_have_one_vote_each():
  r = _rollout(REWARDS, [100, 10, 10, 1])
  adv_B = advantages.trr_plus_plus(r, count='sequence')[:, 0]
  want = (np.array(REWARDS) - 0.125) / np.sqrt(np.var(REWARDS, ddof=1) + 1e-8)
  np.testing.assert_allclose(adv_B, want, atol=1e-6)


@pytest.mark.parametrize('seed', range(5))
def test_reinforce_plus_plus_is_the_authors_formula(seed):
  torch = pytest.importorskip('torch')
  r = _random(seed)
  reward, mask = torch.tensor(r.reward_BT), torch.tensor(r.mask_BT)
  returns = torch.flip(torch.cumsum(torch.flip(reward * mask, [1]), 1), [1])
  mean = (returns * mask).sum() / mask.sum()
  var = ((returns - mean)**2 * mask).sum() / mask.sum()
  want = (returns - mean) * var.clamp(min=1e-8).rsqrt() * mask
  np.testing.assert_allclose(advantages.reinforce_plus_plus(r), want.numpy(), atol=1e-6)


@pytest.mark.parametrize('seed', range(5))
def test_the_baseline_variant_is_the_authors_formula_where_prompts_differ(seed):
  r = _random(seed, prompts=4)
  score = (r.reward_BT * r.mask_BT).sum(1)
  centred = score - np.array([score[r.prompt_B == p].mean() for p in r.prompt_B])
  value = centred[:, None] * np.ones_like(r.mask_BT)
  mean = (value * r.mask_BT).sum() / r.mask_BT.sum()
  var = ((value - mean)**2 * r.mask_BT).sum() / r.mask_BT.sum()
  want = (value - mean) / np.sqrt(var) * r.mask_BT
  np.testing.assert_allclose(advantages.reinforce_plus_plus_baseline(r), want, atol=1e-6)


def test_trr_with_prompt_baselines_by_hand_and_as_trr_for_lone_prompts():
  r = _rollout([1, 0, 1, 0], [1] * 4, prompt=[0, 0, 1, 2])
  # Against the other answer: 1, -1; against the mean of the lone rows: 0.5, -0.5; rms^2 = 2.5 / 3.
  np.testing.assert_allclose(advantages.trr_prompt(r)[:, 0],
                             np.array([1, -1, 0.5, -0.5]) / np.sqrt(2.5 / 3), rtol=1e-6)
  for seed in range(5):
    lone = _random(seed)._replace(prompt_B=np.arange(24))
    for count in ('token', 'sequence'):
      np.testing.assert_allclose(advantages.trr_prompt(lone, count=count),
                                 advantages.trr_plus_plus(lone, count=count), atol=1e-6)
  # Answers to one prompt are centred whatever the other prompts earn; a shared mean gives +-0.5.
  hard = _rollout([0, 0, 1, 1, 1, 0], [3] * 6, prompt=[0, 0, 1, 1, 2, 2])
  adv_B = advantages.trr_prompt(hard)[:, 0]
  assert not adv_B[:4].any() and adv_B[4] > 0 > adv_B[5]


def test_the_optimal_baseline_is_weighted_by_length():
  adv_BT = advantages.opo(_rollout([1, 0, 5], [3, 1, 2], prompt=[0, 0, 1]))
  np.testing.assert_allclose(adv_BT[:, 0], [0.25, -0.75, 0])       # mean (3 * 1 + 1 * 0) / 4


@pytest.mark.parametrize('name', ['grpo', 'dr_grpo', 'rloo'])
@pytest.mark.parametrize('seed', range(3))
def test_prompt_estimators_are_their_papers_formulas(name, seed):
  r = _random(seed, prompts=4)
  score = (r.reward_BT * r.mask_BT).sum(1)
  want = np.zeros(len(score))
  for i, prompt in enumerate(r.prompt_B):
    group = score[r.prompt_B == prompt]
    others = np.delete(score, i)[np.delete(r.prompt_B, i) == prompt]
    want[i] = {'grpo': (score[i] - group.mean()) / (group.std(ddof=1) + 1e-6),
               'dr_grpo': score[i] - group.mean(), 'rloo': score[i] - others.mean()}[name]
  got = advantages.ESTIMATORS[name](r)
  np.testing.assert_allclose(got, want[:, None] * r.mask_BT, atol=1e-6)


@pytest.mark.parametrize('k', [1, 2, 3, 4])
@pytest.mark.parametrize('scores', [(1, 0, 0, 0), (1, 0, 1, 1), (-0.5, 1, -1, 0.25), (3, 3, -1, 0)])
def test_pass_at_k_compares_the_best_of_all_sets_of_k(scores, k):
  got = advantages.pass_at_k(_rollout(scores, [2] * 4, prompt=[7] * 4), k=k)
  sets = list(itertools.combinations(range(4), k))
  best = {held: max(scores[i] for i in held) for held in sets}
  values = np.array(list(best.values()), float)
  for i in range(4):
    holding = np.mean([best[held] for held in sets if i in held])
    want = (holding - values.mean()) / (values.std() + 1e-6)
    np.testing.assert_allclose(got[i], want, atol=1e-5)


def test_pass_at_k_of_right_and_wrong_is_the_papers_formula():
  n, k, wrong = 8, 4, 6
  r = _rollout([1] * 2 + [0] * wrong, [3] * n, prompt=[0] * n)
  best = 1 - math.comb(wrong, k) / math.comb(n, k)
  right_and_wrong = [1 - best, 1 - best - math.comb(wrong - 1, k - 1) / math.comb(n - 1, k - 1)]
  got = reinforce.get('trr_plus_plus', role_estimators=(('solve', 'pass_at_k'),), pass_k=k)
  np.testing.assert_allclose(got.advantages(r, ('solve',))[[0, -1], 0],
                             np.array(right_and_wrong) / math.sqrt(best * (1 - best)), rtol=1e-5)


@pytest.mark.parametrize('name', sorted(advantages.ESTIMATORS))
@pytest.mark.parametrize('reward', [0.1, -1.0, 1 / 3, 1e6])
def test_equal_rewards_give_exactly_zero(name, reward):
  # Three of 0.1 have a float64 mean of 0.10000000000000002: subtracting it leaves noise, which
  # division by a tiny deviation blows up.
  r = _rollout([reward] * 7, [3, 1, 4, 1, 5, 9, 2], role=[0, 0, 0, 1, 1, 1, 1],
               prompt=[0, 0, 0, 1, 1, 1, 2])
  assert not advantages.ESTIMATORS[name](r).any()


@pytest.mark.parametrize('name', ['grpo', 'dr_grpo', 'rloo', 'reinforce_plus_plus_baseline'])
def test_a_prompt_without_contrast_stays_at_zero_beside_others(name):
  rewards, prompt = [0.1, 0.1, 0.1, 1, 0, 0.7], [0, 0, 0, 1, 1, 2]
  adv_BT = advantages.ESTIMATORS[name](_rollout(rewards, [2] * 6, prompt=prompt))
  assert not adv_BT[[0, 1, 2, 5]].any()         # equal rewards; sampled once
  assert adv_BT[3, 0] > 0 > adv_BT[4, 0]


def test_rewards_per_token_return_to_the_tokens_before_them():
  r = _rollout([0, 0], [3, 2])
  r.reward_BT[:] = [[1, 0, 2], [0, -1, 0]]
  value = np.array([3, 2, 2, -1, -1])
  want = (value - value.mean()) / np.sqrt(value.var(ddof=1) + 1e-8)
  got = advantages.trr_plus_plus(r)
  np.testing.assert_allclose(got[r.mask_BT > 0], want, atol=1e-6)
  assert got[1, 2] == 0
  # Prompt baselines compare whole answers: 3 against -1.
  np.testing.assert_allclose(advantages.dr_grpo(r), [[2, 2, 2], [-2, -2, 0]])


def test_a_penalty_reaches_the_tokens_before_it_but_no_baseline():
  penalty = np.array([[0, -1, 0], [0, 0, 0]])
  r = _rollout([1, 0], [3, 3], penalty=penalty)
  np.testing.assert_allclose(advantages.dr_grpo(r), [[-0.5, -0.5, 0.5], [-0.5, -0.5, -0.5]])
  equal = _rollout([1, 1], [3, 3], penalty=penalty)
  np.testing.assert_allclose(advantages.dr_grpo(equal), [[-1, -1, 0], [0, 0, 0]])


# --- aggregation


def test_aggregations_by_hand():
  r = _rollout(REWARDS, [3, 1, 2, 2])
  token, sequence = advantages.token_mean(r), advantages.sequence_mean(r)
  np.testing.assert_allclose(token[:, 0], 1 / 8)
  np.testing.assert_allclose(sequence[:, 0], [1 / 12, 1 / 4, 1 / 8, 1 / 8])
  np.testing.assert_allclose(advantages.constant(r, tokens=100)[:, 0], 1 / 400)
  for weights_BT in (token, sequence):
    assert weights_BT[r.mask_BT == 0].sum() == 0
    np.testing.assert_allclose(weights_BT.sum(), 1, rtol=1e-6)


def test_role_microbatch_is_the_mean_of_24_micro_batch_means():
  """Source: spec section 8: six role-kinds of 64 sequences, slices of 16."""
  rng = np.random.default_rng(0)
  B = 6 * 64
  group = np.repeat(np.arange(6), 64)
  r = _rollout(rng.standard_normal(B), rng.integers(1, 40, B), role=group % 2, kind=group // 2)
  loss_BT = rng.standard_normal(r.mask_BT.shape)
  micro = [(loss_BT[i:i + 16] * r.mask_BT[i:i + 16]).sum() / r.mask_BT[i:i + 16].sum()
           for i in range(0, B, 16)]
  got = (advantages.role_microbatch(r, rows=16) * loss_BT).sum()
  np.testing.assert_allclose(got, np.mean(micro), rtol=1e-5)
  assert abs(got - (advantages.token_mean(r) * loss_BT).sum()) > 1e-3
  # Interleaving the roles moves no weight: slices follow role and kind, not the layout.
  order = np.argsort(np.tile(np.arange(64), 6), kind='stable')
  mixed = advantages.role_microbatch(reinforce.take(r, order), rows=16)
  np.testing.assert_array_equal(mixed, advantages.role_microbatch(r, rows=16)[order])


def test_a_short_last_slice_weighs_by_its_rows():
  r = _rollout([0] * 5, [1, 3, 2, 2, 7], role=[0, 0, 0, 1, 1])
  w = advantages.role_microbatch(r, rows=2)
  np.testing.assert_allclose(w[:2].sum(), 0.5 * 2 / 3, rtol=1e-6)
  np.testing.assert_allclose(w[2].sum(), 0.5 * 1 / 3, rtol=1e-6)
  np.testing.assert_allclose(w[3:].sum(), 0.5, rtol=1e-6)
  np.testing.assert_allclose(w[0, 0], 0.5 * 2 / 3 / 4, rtol=1e-6)


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


def half_reward(r):
  return (0.5 * r.reward_BT).astype(np.float32)


def halved(**fields):
  return reinforce.Algorithm(estimator=half_reward, **fields)


def test_an_algorithm_of_the_users_own_is_named_in_the_config():
  a = reinforce.get(f'{__name__}:halved', clip_low=0.1)
  r = _random(0)
  np.testing.assert_array_equal(a.advantages(r, ('p', 's')), half_reward(r))
  assert a.clip_low == 0.1


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
    ({'name': 'trr_plus_plus', 'role_estimators': (('solve', 'gae'),)}, "'gae' is unknown"),
])
def test_impossible_values_are_refused_by_name(fields, match):
  with pytest.raises(ValueError, match=match):
    reinforce.get(**fields)
