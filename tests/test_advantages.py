# SPDX-License-Identifier: Apache-2.0
"""Estimators and aggregations against published vectors and hand sums."""

import itertools
import math

import numpy as np
import pytest
from rollouts import random as _random
from rollouts import REWARDS
from rollouts import rollout as _rollout

from absolute_zero_jax import advantages, reinforce

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
  with pytest.raises(ValueError, match='k=0'):
    advantages.pass_at_k(r, k=0)


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


def test_lone_rows_of_equal_rewards_get_exactly_zero_beside_a_prompt_with_contrast():
  # Of rewards of 0.1 a mean over tokens is another number by rounding.
  r = _rollout([0.1, 0.1, 0.1, 1, 0], [1, 1, 1, 2, 2], prompt=[0, 1, 2, 3, 3])
  adv_BT = advantages.trr_prompt(r)
  assert not adv_BT[:3].any() and adv_BT[3:].any()


PROMPT_WHITENED = ('trr_prompt', 'reinforce_plus_plus_baseline')


@pytest.mark.parametrize('name', PROMPT_WHITENED)
def test_a_prompt_of_equal_scores_gets_zero_also_where_rewards_are_per_token(name):
  r = _rollout([0, 0, 1, 0], [2, 2, 2, 2], prompt=[0, 0, 1, 1])
  r.reward_BT[:2] = [[1, 0], [0, 1]]
  adv_BT = advantages.ESTIMATORS[name](r)
  assert not adv_BT[:2].any() and adv_BT[2:].any()


@pytest.mark.parametrize('name', PROMPT_WHITENED)
def test_a_penalty_counts_where_all_answers_earn_the_same(name):
  penalty_BT = np.zeros((4, 3))
  penalty_BT[0, 1] = -0.5
  r = _rollout([1, 1, 1, 1], [3, 3, 3, 3], prompt=[0, 0, 1, 1], penalty=penalty_BT)
  adv_BT = advantages.ESTIMATORS[name](r)
  assert adv_BT[0, 0] < adv_BT[1, 0] and adv_BT[0, 0] < adv_BT[0, 2]


@pytest.mark.parametrize('name', sorted(advantages.ESTIMATORS))
def test_a_penalty_outside_the_mask_counts_for_nothing(name):
  r, penalty_BT = _random(2), 0.1 * _random(5).reward_BT
  got_BT, want_BT = (
      advantages.ESTIMATORS[name](r._replace(penalty_BT=x))
      for x in (penalty_BT + 7 * (1 - r.mask_BT), penalty_BT * r.mask_BT))
  np.testing.assert_array_equal(got_BT, want_BT)


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


@pytest.mark.parametrize('weights', [
    advantages.sequence_mean, lambda r: advantages.constant(r, tokens=4)])
def test_rows_without_a_trained_token_have_no_share_of_the_mean(weights):
  r = _rollout([1, 2, 3], [2, 4, 4])
  r.mask_BT[2] = 0
  np.testing.assert_array_equal(weights(r)[:2], weights(reinforce.take(r, np.array([0, 1]))))


def test_role_microbatch_is_the_mean_of_24_micro_batch_means():
  """Source: the reference: six role-kinds of 64 sequences, slices of 16."""
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


@pytest.mark.parametrize('n, k, wrong', [(8, 4, 3), (6, 2, 1), (5, 5, 4), (9, 3, 0)])
def test_pass_at_k_is_exactly_zero_where_every_set_holds_a_right_answer(n, k, wrong):
  r = _rollout([1] * (n - wrong) + [0] * wrong, [2] * n, prompt=[0] * n)
  assert not advantages.pass_at_k(r, k=k).any()
