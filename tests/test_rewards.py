# SPDX-License-Identifier: Apache-2.0
"""Rewards and intrinsic values against the reference's numbers and by hand."""

import json
import types

import numpy as np
import pytest

from absolute_zero_jax import intrinsic, rewards
from absolute_zero_jax.types import Task

IDENTITY = 'def f(a):\n    return a'
COUNTS = {'int': {'1': 3, '2': 1}, 'str': {'a': 4}}


@pytest.mark.parametrize(('rate', 'one_minus', 'inverse', 'variance'), [
    (0.0, 0.0, 1.0, 0.0), (0.125, 0.875, 0.875, 0.4375), (0.5, 0.5, 0.5, 1.0),
    (1.0, 0.0, 0.0, 0.0)])
def test_learnability(rate, one_minus, inverse, variance):
  assert rewards.learnability(rate) == one_minus
  assert rewards.learnability(rate, 'inverse') == inverse
  assert rewards.learnability(rate, 'variance') == variance


@pytest.mark.parametrize('rate', [-0.1, 1.5, float('nan')])
def test_learnability_refuses_what_is_no_rate(rate):
  with pytest.raises(ValueError, match='rate'):
    rewards.learnability(rate)


def _attempt(**fields):
  task = Task('deduction', IDENTITY, (('1', '1'),), key='k')
  return types.SimpleNamespace(**{'well_formed': True, 'task': task, 'solve_rate': 0.25,
                                  'references': (), 'parsed': '1', 'accuracy': 1.0, 'status': 'ok',
                                  **fields})


@pytest.mark.parametrize(('fields', 'options', 'reward'), [
    ({}, {}, 0.75),
    ({'task': None}, {}, -1.0),
    ({'well_formed': False}, {}, -1.0),
    ({'solve_rate': 0.0}, {}, 0.0),
    ({'solve_rate': 1.0}, {}, 0.0),
    ({'solve_rate': 0.0}, {'zero_learnability': -0.5}, -0.5),   # the reference's code
    # Valid, but no solver can be asked: a solve rate of 0 (azr_spec.md, 3.2 and 7.2).
    ({'task': None, 'status': 'too_long'}, {'zero_learnability': -0.5}, -0.5),
    ({'task': None, 'status': 'duplicate'}, {'zero_learnability': -0.5}, -1.0),
    ({'solve_rate': 1.0}, {'zero_learnability': -0.5}, -0.5),
    ({'solve_rate': 0.0}, {'learnability': 'inverse'}, 1.0),
])
def test_proposer_reward(fields, options, reward):
  assert rewards.get(**options).propose(_attempt(**fields))[0] == reward


@pytest.mark.parametrize(('fields', 'mode', 'reward'), [
    ({}, 'conditional', 1.0), ({'accuracy': 0.0}, 'conditional', -0.5),
    ({'accuracy': 0.4}, 'conditional', 0.4), ({'well_formed': False}, 'conditional', -1.0),
    ({'parsed': None}, 'conditional', -1.0), ({}, 'addition', 1.0),
    ({'accuracy': 0.0}, 'addition', 0.5), ({'well_formed': False}, 'addition', 0.5),
    ({'well_formed': False}, 'multiply', 0.0), ({'accuracy': 0.0}, 'multiply', 0.0),
])
def test_solver_reward(fields, mode, reward):
  assert rewards.get(format_mode=mode).solve(_attempt(**fields))[0] == reward


def test_what_is_paid_is_what_its_parts_say():
  right_in_the_wrong_form = _attempt(well_formed=False)
  for mode, paid, accuracy in (('addition', 0.5, 1.0), ('multiply', 0.0, 0.0)):
    assert rewards.Rewards(format_mode=mode).solve(right_in_the_wrong_form) == (
        paid, {'accuracy': accuracy, 'format': 0.0})


@pytest.mark.parametrize(('right', 'binary', 'share', 'one'), [
    ([True, True], 1, 1, 1), ([True, False], 0, 0.5, 1), ([False, False], 0, 0, 0), ([], 0, 0, 0)])
def test_induction_score(right, binary, share, one):
  assert rewards.induction_score(right) == binary
  assert rewards.induction_score(right, 'accuracy') == share
  assert rewards.induction_score(right, 'if_one_correct') == one


@pytest.mark.parametrize(('how', 'kept'), [
    ('all', [0.0, 0.5, 1.0]), ('non_one', [0.0, 0.5]), ('non_extremes', [0.5])])
def test_valid_program_filter(how, kept):
  assert [p for p in (0.0, 0.5, 1.0) if rewards.keeps(p, how)] == kept


@pytest.mark.parametrize(('how', 'value'), [
    ('sum', 0.5 + 0.2 + 0.3), ('multiply', 0.5 * 0.2 * 0.3), ('sum_multiply', 0.5 + 0.2 * 0.3),
    ('multiply_sum', 0.5 * (0.2 + 0.3))])
def test_combine(how, value):
  assert rewards.combine(0.5, [0.2, 0.3], how) == pytest.approx(value)
  assert rewards.combine(0.5, [], how) == 0.5


def test_a_term_is_scaled_and_capped():
  assert rewards.term(0.8, 0.5) == 0.4
  assert rewards.term(3.0, 1.0, 0.5) == 0.5


# Vectors measured on the reference.
@pytest.mark.parametrize(('kind', 'value', 'flat', 'hierarchical'), [
    ('int', '1', 0.625, 0.375), ('int', '7', 1.0, 0.75), ('list', '[]', 1.0, 1.0)])
def test_answer_diversity(kind, value, flat, hierarchical):
  assert intrinsic.answer_diversity(COUNTS, kind, value) == flat
  assert intrinsic.answer_diversity(COUNTS, kind, value, hierarchical=True) == hierarchical


@pytest.mark.parametrize('hierarchical, want', [(False, 0.625), (True, 0.375)])
def test_diversity_counts_by_type_first_where_the_config_says_so(hierarchical, want):
  made = rewards.get(intrinsic={'answer_diversity': (1.0, 1.0)}, hierarchical=hierarchical)
  assert made.propose(_attempt(), {'outputs': COUNTS})[1]['answer_diversity'] == want


def test_answer_diversity_of_an_empty_store_is_full():
  assert intrinsic.answer_diversity({}, 'int', '1') == 1
  assert intrinsic.answer_diversity({}, 'int', '1', hierarchical=True) == 1


def test_identity_is_simple():
  pytest.importorskip('complexipy')
  pytest.importorskip('radon')
  assert intrinsic.complexity(IDENTITY) == 0.0
  assert intrinsic.halstead(IDENTITY) == 0.03


def test_a_nested_branch_is_more_complex():
  pytest.importorskip('complexipy')
  nested = 'def f(a):\n  for x in a:\n    if x:\n      return x\n  return a'
  assert intrinsic.complexity(nested) == 3 / 15   # for 1, nested if 2


def test_edit_distance():
  assert intrinsic.mean_edit_distance(IDENTITY, [IDENTITY]) == 0
  assert intrinsic.mean_edit_distance(IDENTITY, []) == 0
  assert intrinsic.mean_edit_distance(IDENTITY, ['no python (']) == 0
  far = intrinsic.mean_edit_distance(IDENTITY, ['def f(a):\n  return [x + 1 for x in a if x > 2]'])
  near = intrinsic.mean_edit_distance(IDENTITY, ['def f(b):\n  return b'])
  assert 0 < near < far < 1


def test_intrinsic_terms_join_the_reward_and_are_named():
  made = rewards.get(intrinsic={'answer_diversity': (0.5, 0.5), 'f_input_diversity': (1.0, 0.5)})
  reward, parts = made.propose(_attempt(), {'outputs': COUNTS})
  assert parts == {'learnability': 0.75, 'answer_diversity': 0.3125}  # 0.5 * 0.625
  assert reward == 0.75 + 0.3125
  counts = {'inputs': {'int': {'1': 1, '2': 1}}, 'outputs': {}}
  task = Task('induction', IDENTITY, (('1', '5'), ('3', '5')), key='k')
  reward, parts = made.propose(_attempt(task=task), counts)
  assert parts == {'learnability': 0.75, 'f_input_diversity': 0.5}    # cap; mean of 0.5 and 1


def test_abduction_is_judged_by_its_input():
  made = rewards.get(intrinsic={'answer_diversity': (1.0, 1.0)})
  task = Task('abduction', IDENTITY, (('1', '9'),), key='k')
  assert made.propose(_attempt(task=task), {'inputs': COUNTS})[1]['answer_diversity'] == 0.625


@pytest.mark.parametrize('options', [
    {'combine': 'max'}, {'learnability': 'minus'}, {'intrinsic': {'beauty': (1, 1)}},
    {'zero': 1}, {'format_mode': 'none'}, {'induction': 'some'}])
def test_unknown_options_are_refused(options):
  with pytest.raises(ValueError, match='must be one of|has no'):
    rewards.get(**options)


@pytest.mark.parametrize('pair', [
    0.5, (0.5,), (0.5, 0.5, 0.5), ('a', 0.5), (0.5, None), (float('nan'), 0.5),
    (0.5, float('inf')), (True, 0.5), '12'])
def test_an_intrinsic_term_has_a_coefficient_and_a_cap(pair):
  with pytest.raises(ValueError, match='reward.intrinsic.halstead=.*two finite numbers'):
    rewards.get(intrinsic={'halstead': pair})


def test_a_missing_package_is_named(monkeypatch):
  monkeypatch.setitem(__import__('sys').modules, 'radon.complexity', None)
  with pytest.raises(ValueError, match='pip install radon'):
    intrinsic.halstead(IDENTITY)


def test_rewards_of_numpy_become_numbers_that_can_be_written():
  class Own:
    def solve(self, attempt):
      return np.float32(0.5), {'right': np.bool_(True), 'tokens': np.int64(3)}
  reward = rewards.Checked(Own(), 'own').solve(_attempt())
  assert json.loads(json.dumps(reward)) == [0.5, {'right': 1.0, 'tokens': 3.0}]


def test_pairs_may_be_scored_from_an_array():
  assert rewards.induction_score(np.array([True, False]), 'accuracy') == 0.5
  assert rewards.induction_score(np.array([])) == 0
