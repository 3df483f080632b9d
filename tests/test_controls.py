# SPDX-License-Identifier: Apache-2.0
"""Every control of configs/tiny.py plays, and rewards what it says."""

import collections
import functools
import importlib.util
import pathlib

import numpy as np
import pytest
import scripted

from absolute_zero_jax import config, controls, grammar, parts, run
from absolute_zero_jax.types import Role

ROOT = pathlib.Path(__file__).resolve().parents[1]
MODEL = 'random:llama,vocab=259,embed=16,layers=1,heads=1,kv_heads=1,head_dim=16,ffn=16'


def _file():
  spec = importlib.util.spec_from_file_location('tiny', ROOT / 'configs' / 'tiny.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


CONTROLS = tuple(_file().CONTROLS)


@pytest.fixture(scope='module')
def play(tmp_path_factory):
  """play(control) -> two iterations of the config with a scripted sampler, without updates."""
  prompts = scripted.prompt_folder(tmp_path_factory.mktemp('prompts') / 'set')

  @functools.cache
  def of(control):
    c = _file().get_config(f'control={control}')
    config.validate(c)
    c.model.name, c.model.tokenizer, c.selfplay.prompts = MODEL, 'bytes', prompts
    c.selfplay.batch, c.selfplay.mc_samples = 4, 4
    c.selfplay.induction_cases = 4
    c.train.length_buckets = ()
    c.selfplay.max_alike = 0       # scripted programs differ by their constants alone
    # Scripted inductions give numbers to a seed program; these seeds hold some that take numbers.
    c.seed = 3
    c.sampler.max_prompt_tokens, c.seeding.tasks, c.executor.workers = 8192, 6, 2
    with run.Run(c) as current:
      current._update = lambda episodes: (episodes, {})
      return [current.iterate() for _ in range(2)], current

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(parts.sampler_lib, 'Sampler', scripted.Sampler)
    yield of


@pytest.mark.parametrize('control', CONTROLS)
def test_every_control_plays(control, play):
  iterations, current = play(control)
  kinds = {e.kind for it in iterations for e in it.episodes}
  only = control.removeprefix('only_')
  assert kinds == ({only} if only != control else {'abduction', 'deduction', 'induction'})
  trained = collections.Counter(e.role for it in iterations for e in it.episodes if e.train)
  assert (trained[Role.PROPOSE] == 0) == (control in ('proposer_frozen', 'solver_only'))
  # Two iterations of at least four valid proposals a kind are answered four or eight times each.
  assert trained[Role.SOLVE] > 2 * 4 * len(kinds)
  assert (current.base is not None) == (control == 'proposer_frozen')


def test_solver_only_answers_fixed_tasks_in_groups(play):
  iterations, current = play('solver_only')
  assert current.buffer.sizes() == dict.fromkeys(('abduction', 'deduction', 'induction'), 7)
  for it in iterations:
    assert not it.result.proposals
    groups = collections.Counter(e.group for e in it.episodes)
    assert len(groups) == 3 * 4 and set(groups.values()) == {8}
  for kind in current.buffer.sizes():
    assert not any(grammar.excludes(t) for t in current.buffer.tasks(kind)[1:])
  assert dict(current.learner.algorithm.role_estimators)['solve'] == 'trr_prompt'


def test_random_rewards_are_fair_coins_that_repeat(play):
  first, again = play('random_rewards')[0], play.__wrapped__('random_rewards')[0]
  rewards = [[e.reward for it in found for e in it.episodes] for found in (first, again)]
  assert rewards[0] == rewards[1] and set(rewards[0]) == {0.0, 1.0}
  assert abs(np.mean(rewards[0]) - 0.5) < 4 * 0.5 / len(rewards[0])**0.5
  right = [e.parts['random'] for it in first for e in it.episodes if e.status == 'ok']
  wrong = [e.parts['random'] for it in first for e in it.episodes if e.status != 'ok']
  assert abs(np.mean(right) - np.mean(wrong)) < 0.35
  # Answers to one task, equal or not, are tossed one by one; another seed tosses anew.
  groups = collections.defaultdict(set)
  for e in first[0].episodes:
    if e.role == Role.SOLVE:
      groups[e.group, e.answer].add(e.reward)
  assert any(len(values) == 2 for values in groups.values())
  attempt = first[0].result.solved[0]
  assert len({controls.REWARDS['random'](seed=s).solve(attempt)[0] for s in range(20)}) == 2


def test_format_rewards_see_neither_truth_nor_validity(play):
  iterations, _ = play('format_only')
  by_status = collections.defaultdict(set)
  for e in (e for it in iterations for e in it.episodes):
    by_status[e.role, e.status].add(e.reward)
  assert by_status[Role.SOLVE, 'ok'] == by_status[Role.SOLVE, 'wrong'] == {1.0}
  assert by_status[Role.PROPOSE, 'ok'] == by_status[Role.PROPOSE, 'error'] == {1.0}
  assert by_status[Role.SOLVE, 'format'] == by_status[Role.PROPOSE, 'format'] == {-1.0}


def test_validity_rewards_pay_every_task_alike(play):
  (iteration, _), _ = play('validity_only')
  proposals = [e for e in iteration.episodes if e.role == Role.PROPOSE]
  rates = {a.solve_rate for a in iteration.result.proposals if a.task}
  assert len(rates) > 1
  assert {e.reward for e in proposals if e.task} == {1.0}
  assert {e.reward for e in proposals if not e.task} == {-1.0}
  assert {e.reward for e in iteration.episodes if e.role == Role.SOLVE} == {1.0, -0.5, -1.0}


def test_a_frozen_proposer_plays_the_base(play):
  _, current = play('proposer_frozen')
  assert current.params(Role.PROPOSE) is current.base
  assert current.params('propose') is current.base
  assert current.params(Role.SOLVE) is not current.base


def test_an_unknown_control_is_refused():
  with pytest.raises(config.ConfigError, match='only_induction'):
    _file().get_config('control=nothing')
