# SPDX-License-Identifier: Apache-2.0
"""Runs that meet valid tasks: presets, options of an iteration, what is logged.

The model is random and real, its update too; `scripted.Sampler` writes what it says.
"""

import collections
import dataclasses
import io
import json
import pathlib

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scripted_runs
from scripted_runs import play as _play
from scripted_runs import smoke as _smoke

from absolute_zero_jax import buffer as buffer_lib
from absolute_zero_jax import config, learner, parts, records, run, seeding, train
from absolute_zero_jax.models import decoder
from absolute_zero_jax.types import Role

prompts, one_device = scripted_runs.prompts, scripted_runs.one_device
make = scripted_runs.make


def _born(iteration):
  return {a.task.born_step for a in iteration.result.solved}


# Newest tasks solved at step 2, reward at solve rates 0 and 1, and what the update is made of.
PUBLISHED = {
    'azr': (2, 0.0, 'role_microbatch', 0.0, 0.2),
    'azr_paper': (1, -0.5, 'role_microbatch', 0.001, 0.2),
    'azr_paper_eq': (2, 0.0, 'sequence', 0.001, 0.2),
    'azr_main': (1, -0.5, 'role_microbatch', 0.0, 0.28)}


@pytest.mark.parametrize('preset', config.PRESETS)
def test_every_preset_plays_two_iterations(preset, make, tmp_path):
  source, extreme, aggregation, entropy_coef, clip_high = PUBLISHED[preset]
  c = make(preset)
  c.log.flag_words = ('wait',)
  whole = train.run(c, tmp_path / 'whole', stream=io.StringIO())
  sizes = whole.buffer.sizes()
  assert all(sizes[kind] > 3 for kind in c.selfplay.kinds)
  last = json.loads((tmp_path / 'whole' / 'metrics.jsonl').read_text().splitlines()[-1])
  assert last['train/grad_norm'] > 0 and last['train/entropy'] > 0
  assert last['train/mismatch_abs'] > 0 and last['train/updates_without_rows'] == 0
  assert 0 < last['solve_deduction/accuracy'] < 1 and last['propose_abduction/valid_rate'] > 0
  assert last['propose_deduction/flagged_share'] == last['solve_deduction/reflection_share'] > 0
  for name in ('propose_deduction/diversity', 'propose_deduction/branches',
               'propose_abduction/reference_distance', 'measure_deduction/distinct_answer_share',
               'gap_deduction/reward', 'gap_deduction/accuracy', 'types/outputs/list/total',
               'types/inputs/types', 'solve_rate_share/0.500', 'solve_deduction/truncated_share',
               'solve_abduction/response_tokens_correct', 'propose_deduction/reward_std',
               'train/solve_deduction/entropy', 'time/metrics'):
    assert np.isfinite(last[name]), name
  assert last['propose_deduction/comment_plan_share'] == 1
  first, second = (records.read(p) for p in sorted(epath.Path(tmp_path).glob('whole/episodes/*')))
  assert max(e.task.born_step for e in first if e.role == Role.SOLVE and e.train) == source - 1
  assert max(e.task.born_step for e in second if e.role == Role.SOLVE and e.train) == source
  found = {e.reward for e in first + second
           if e.role == Role.PROPOSE and e.task and e.parts.get('learnability', 1) <= 0}
  assert found == {extreme}
  made = parts.algorithm(c)
  assert (made.aggregation, made.entropy_coef, made.clip_high) == (
      aggregation, entropy_coef, clip_high)


# Presets do not differ in what the sampler does: one stands for all in the default run.
@pytest.mark.parametrize('preset', [
    'azr_paper', *(pytest.param(p, marks=pytest.mark.slow) for p in config.PRESETS
                   if p != 'azr_paper')])
def test_every_preset_runs_with_the_real_sampler(preset, tmp_path):
  c = _smoke(preset)
  c.checkpoint.export = False
  assert train.run(c, tmp_path, stream=io.StringIO()).step == 2
  lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  assert len(lines) == 2 and json.loads(lines[1])['sampler/tokens'] > 0


def test_what_an_iteration_remembers_survives_a_restart(make, tmp_path):
  c = make(selfplay__updates=2, selfplay__mc_use='reuse',
           selfplay__kinds=('deduction',), selfplay__buffer_size=6,
           selfplay__eviction='reservoir', selfplay__keep='non_extremes')
  whole = train.run(c, tmp_path / 'whole', stream=io.StringIO())
  c.train.steps = 1
  train.run(c, tmp_path / 'parts', stream=io.StringIO())
  c.train.steps = 2
  resumed = train.run(c, tmp_path / 'parts', stream=io.StringIO())
  assert resumed.host_state() == whole.host_state() and int(whole.state.step) == 4
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(resumed.state),
               jax.device_get(whole.state))


def test_answers_of_the_measurement_serve_as_solver_rows(make):
  (measure,), _ = _play(make())
  (reuse,), current = _play(make(selfplay__mc_use='reuse'), learns=True)
  # The proposals are the same, no solve is generated where they give enough rows.
  assert [a.status for a in reuse.result.proposals] == [a.status for a in measure.result.proposals]
  assert reuse.metrics['sampler/tokens'] < measure.metrics['sampler/tokens']
  valid = collections.Counter(a.kind.name for a in reuse.result.proposals if a.task)
  solved = collections.Counter(a.kind.name for a in reuse.result.solved)
  assert all(solved[k] == max(4, 4 * n) for k, n in valid.items())
  rows = [e for e in reuse.episodes if e.role == Role.SOLVE]
  assert all(e.train for e in rows) and len(rows) == len(reuse.result.solved)
  # Each prompt is its own baseline: signs follow the mean of the group, equal rewards give zero.
  groups = collections.defaultdict(list)
  for e in rows:
    groups[e.group].append(e)
  assert {len(g) for g in groups.values()} == {4}
  for group in groups.values():
    rewards = np.array([e.reward for e in group])
    signs = [np.sign(e.advantage[0]) for e in group]
    np.testing.assert_array_equal(signs, np.sign(rewards - rewards.mean()).round(9))
  assert current.learner.algorithm.role_estimators == (('solve', 'trr_prompt'),)
  # Nothing drawn, so nothing to compare; where tasks were, they are compared.
  enough = [k for k, n in valid.items() if n]
  assert not any(f'gap_{k}/accuracy' in reuse.metrics for k in enough)
  assert all(f'gap_{k}/accuracy' in measure.metrics for k in enough)


def test_measured_answers_that_train_count_as_solved(make):
  (iteration,), _ = _play(make(selfplay__mc_use='train'))
  rows = [e for e in iteration.episodes if e.role == Role.SOLVE]
  assert all(e.train for e in rows) and len(rows) == len(iteration.result.solved)


def test_reuse_generates_only_what_is_short(make):
  c = make(selfplay__mc_use='reuse', selfplay__kinds=('deduction',), selfplay__mc_samples=1)
  c.selfplay.batch = 12
  (iteration,), _ = _play(c)
  valid = sum(a.task is not None for a in iteration.result.proposals)
  assert 0 < valid < 12
  assert len(iteration.result.solved) == 12 and len(iteration.result.measured) == valid
  assert collections.Counter(a.task.born_step for a in iteration.result.solved) == {
      1: valid, 0: 12 - valid}
  c.selfplay.solve_source = 'lagged'
  with pytest.raises(config.ConfigError, match="mc_use='reuse'"):
    config.validate(c)


def test_the_update_trains_the_distribution_that_was_drawn_from(make):
  ids = [5, 9, 7, 11, 13]
  with run.Run(make(sampler__temperature=0.5)) as current:
    row = learner.Row(ids[:2], ids[2:], [0.0] * 3, [0.0] * 3, 1.0, 'deduction', 'solve', 0)
    params = current.state.params
    got, = current.learner.logprobs(params, current.learner.prepare([row], params).parts[0])
    logits_TV = decoder.logits(current.model, params, jnp.asarray([ids]))[0]
  want_TV = jax.nn.log_softmax(logits_TV / 0.5, -1)
  np.testing.assert_allclose(got[0, :3], [want_TV[t - 1, ids[t]] for t in (2, 3, 4)], atol=1e-5)


def test_trained_monte_carlo_answers_share_the_group_of_their_task(make):
  (iteration,), _ = _play(make(selfplay__mc_use='train'))
  by_group = collections.defaultdict(set)
  for e in iteration.episodes:
    if e.role == Role.SOLVE:
      by_group[e.group].add(e.task.key)
  assert all(len(keys) == 1 for keys in by_group.values())
  keys = [next(iter(k)) for k in by_group.values()]
  assert len(set(keys)) == len(keys)


def test_several_updates_draw_from_the_buffer_of_the_start(make):
  c = make(selfplay__updates=3, selfplay__solve_source='lagged')
  iterations, current = _play(c, 2, learns=True)
  first, second = iterations
  assert len(first.result.proposals) == 3 * 3 * 4
  assert all(t.born_step == 0 for a in first.result.proposals for t in a.references)
  assert _born(first) == {0}                    # with fresh draws: {0, 1}
  assert max(t.born_step for a in second.result.proposals for t in a.references) == 1
  assert int(current.state.step) == 6
  groups = [e.group for e in first.episodes if e.role == Role.PROPOSE]
  assert len(set(groups)) == len(groups)
  (once,), _ = _play(make(selfplay__solve_source='lagged'))
  assert [e.turns for e in once.episodes if e.role == Role.PROPOSE] == [
      e.turns for e in first.episodes if e.role == Role.PROPOSE][:12]


def test_one_step_off_policy_is_the_same_updates_one_play_later(make, tmp_path):
  """What the scripted model writes does not depend on its weights, so the updates must agree."""
  def c(steps, off):
    return make(algorithm__importance='truncate', train__off_policy_steps=off, train__steps=steps,
                selfplay__kinds=('deduction',), checkpoint__every_steps=1)
  on = train.run(c(2, 0), tmp_path / 'on', stream=io.StringIO())
  off = train.run(c(3, 1), tmp_path / 'off', stream=io.StringIO())
  assert int(off.state.step) == int(on.state.step) == 2
  for name in ('params', 'opt_state'):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(getattr(off.state, name)),
                 jax.device_get(getattr(on.state, name)))
  # The advantages of a play are known at its end, and its update is logged with the next.
  logged = [[json.loads(x) for x in (tmp_path / w / 'metrics.jsonl').read_text().splitlines()]
            for w in ('on', 'off')]
  assert logged[1][0]['train/updates_without_rows'] == 1
  assert logged[1][2]['train/loss'] == logged[0][1]['train/loss']
  episodes = [records.read(next((tmp_path / w / 'episodes').glob('*1.jsonl*')))
              for w in ('on', 'off')]
  assert [e.advantage for e in episodes[0]] == [e.advantage for e in episodes[1]]
  # The rows that wait are in the checkpoint.
  train.run(c(1, 1), tmp_path / 'parts', stream=io.StringIO())
  resumed = train.run(c(3, 1), tmp_path / 'parts', stream=io.StringIO())
  assert resumed.host_state() == off.host_state() and resumed.host_state()['ahead']
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(resumed.state),
               jax.device_get(off.state))


def test_first_iterations_may_train_the_solver_alone(make):
  (first, second), _ = _play(make(selfplay__solver_only_steps=1), 2, learns=True)
  assert not first.result.proposals and len(first.result.solved) == 12
  assert {e.role for e in first.episodes} == {Role.SOLVE}
  assert first.metrics['train/grad_norm'] > 0 and len(second.result.proposals) == 12


def test_references_may_be_left_out(make):
  (iteration,), _ = _play(make(selfplay__show_references=False))
  shown = {a.kind.name: len(a.references) for a in iteration.result.proposals}
  assert shown == {'abduction': 0, 'deduction': 0, 'induction': 1}   # induction is about a program


def test_a_play_without_rows_leaves_the_policy_alone(make, tmp_path):
  c = make(selfplay__train_propose=False, selfplay__kinds=('deduction',))
  with run.Run(c) as current:
    current.buffer = buffer_lib.TaskBuffer(['deduction'])
    current.tools = current.tools._replace(sample=lambda *args: [])
    current.rules = dataclasses.replace(current.rules, batch=0)
    before = jax.device_get(current.state)
    iteration = current.iterate()
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(current.state), before)
  assert iteration.metrics['train/updates_without_rows'] == 1 and not iteration.episodes
  assert 'no update' in run.summary.step_line(1, 1, iteration.metrics, ['deduction'])


def test_every_kind_and_a_users_own_play_side_by_side(make, monkeypatch):
  monkeypatch.syspath_prepend(str(pathlib.Path(__file__).parent))
  c = make(selfplay__kinds=('deduction', 'error', 'example_kind:Equations'))
  iterations, current = _play(c, 2)
  sizes = current.buffer.sizes()
  assert all(sizes[k] > 2 for k in ('deduction', 'error', 'equations'))
  errors = {t.output for t in current.buffer.tasks('error')}
  assert errors == {'NoError', 'ZeroDivisionError'}
  assert iterations[1].metrics['solve_equations/accuracy'] < 1
  assert iterations[1].metrics['types/errors/types'] == 1
  # Tasks without a program are alike (`selfplay.max_alike`) when they are equal.
  equations = current.buffer.tasks('equations')
  assert len({current.tools.shape(task) for task in equations}) == len(equations)
  kinds = [kind for kind in current.kinds if kind.name == 'equations']
  assert seeding.of_grammar(0, 2, kinds, current.executor.submit) == ([], 0)


def test_composites_and_intrinsic_rewards_are_a_matter_of_config(make):
  c = make(selfplay__kinds=('deduction',), selfplay__batch=8)
  c.selfplay.kind_options = config.ConfigDict({'composites': {'start_step': 0, 'chance': 1.0}})
  c.reward.intrinsic = config.ConfigDict({'mean_edit_distance': (0.5, 0.5)})
  (iteration,), _ = _play(c)
  # The script never calls g_0, which every prompt now asks for.
  found = {a.status for a in iteration.result.proposals}
  assert 'composite_unused' in found and 'ok' not in found
  del c.selfplay.kind_options['composites']
  (iteration,), _ = _play(c)
  with_term = [e for e in iteration.episodes if 'mean_edit_distance' in e.parts]
  assert with_term and all(e.reward == pytest.approx(sum(e.parts.values())) for e in with_term)
  c.selfplay.kind_options = config.ConfigDict({'composites': {'odds': 1.0}})
  with pytest.raises(config.ConfigError, match='kind_options.*odds'):
    run.Run(c)


def test_the_wrapper_and_the_format_test_are_a_matter_of_config(make):
  with run.Run(make('azr_paper')) as current:
    assert current.prompts.rule == 'azr'
  with run.Run(make(selfplay__wrapper='none')) as current:
    assert current.prompts.wrapper == 'none'


