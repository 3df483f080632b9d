# SPDX-License-Identifier: Apache-2.0
"""Names of a config become objects, or are refused in words."""

import types

import example_kind
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scripted

from absolute_zero_jax import config, parts, reinforce, rewards, run, tasks
from absolute_zero_jax.models import decoder, hf
from absolute_zero_jax.models.config import ModelConfig

RANDOM = 'random:llama,layers=1'


def _config(**changes):
  c = config.get_config()
  c.model.name = RANDOM
  for field, value in changes.items():
    section, _, name = field.partition('__')
    c[section][name] = config.ConfigDict(value) if isinstance(value, dict) else value
  return c


def test_a_random_model_needs_a_tokenizer():
  c = _config()
  _, _, source = parts.model_without_parameters(c)
  with pytest.raises(config.ConfigError, match=f"model.tokenizer=''.*{RANDOM}.*'carried:tiny'"):
    parts.tokenizer(c, source)


class Mute:
  """Takes any fields and has nothing that is needed."""

  def __init__(self, **fields):
    del fields


def fieldless():
  return Mute()


@pytest.mark.parametrize(('section', 'lacks'), [
    ('reward', 'propose.*solve'), ('algorithm', 'advantages.*weights.*loss'),
    ('executor', 'submit.*stats.*close.*isolation')])
def test_an_object_of_ones_own_is_checked_when_it_is_made(section, lacks):
  make = getattr(parts, 'rewards' if section == 'reward' else section)
  with pytest.raises(config.ConfigError, match=f'{section}.name=.*Mute.* lacks .*{lacks}'):
    make(_config(**{f'{section}__name': f'{__name__}:Mute'}))
  with pytest.raises(config.ConfigError, match=f'{section}.name=.*fieldless.*unexpected keyword'):
    make(_config(**{f'{section}__name': f'{__name__}:fieldless'}))
  with pytest.raises(config.ConfigError, match=f'{section}.name=.*RANDOM.*not callable'):
    make(_config(**{f'{section}__name': f'{__name__}:RANDOM'}))


@pytest.mark.parametrize(('changes', 'words'), [
    ({'algorithm__name': 'grpo'}, "algorithm.name='grpo' .*to solve gets one.*mc_use='reuse'"),
    ({'algorithm__name': 'rloo', 'selfplay__mc_use': 'reuse', 'selfplay__mc_samples': 1},
     'to solve gets one'),
    ({'algorithm__name': 'grpo', 'selfplay__mc_use': 'reuse'},
     "algorithm.name='grpo' .*to propose gets one.*{'propose': 'trr_plus_plus'}"),
    ({'algorithm__role_estimators': {'propose': 'rloo'}}, 'algorithm.role_estimators.propose=')])
def test_comparing_one_answer_with_itself_is_refused(changes, words):
  with pytest.raises(config.ConfigError, match=words):
    parts.algorithm(_config(**changes))


@pytest.mark.parametrize('changes', [
    {'algorithm__name': 'grpo', 'selfplay__solve_samples': 4, 'selfplay__train_propose': False},
    {'algorithm__name': 'rloo', 'selfplay__mc_use': 'train',
     'algorithm__role_estimators': {'propose': 'reinforce_plus_plus'}}])
def test_comparing_several_answers_is_not(changes):
  assert parts.algorithm(_config(**changes)).estimator == changes['algorithm__name']


@pytest.mark.parametrize(('make', 'changes', 'words'), [
    (parts.kinds, {'selfplay__kinds': ('deductoin',)}, "selfplay.kinds.*mean 'deduction'"),
    (parts.kinds, {'selfplay__kind_options': {'rules': {'clean': ('xyz',)}}},
     'selfplay.kind_options.rules.clean'),
    (parts.kinds, {'selfplay__kind_options': {'composites': {'chance': 5.0}}},
     'selfplay.kind_options.composites.chance=5.0 must be 0 to 1'),
    (parts.optimizer, {'optimizer__schedule': 'cosine', 'optimizer__warmup_steps': 900},
     'optimizer: .*warmup_steps=900.*500 steps here: train.steps'),
    (parts.mesh, {'mesh__data': 77}, 'mesh data=77')])
def test_errors_name_the_field(make, changes, words):
  with pytest.raises(config.ConfigError, match=words):
    make(_config(**changes))


class Odd(rewards.Rewards):
  """Gives what `RESULT` holds."""

  def propose(self, attempt, counts=None):
    return RESULT[0]

  def solve(self, attempt):
    return RESULT[0]


RESULT = []


@pytest.mark.parametrize('result', [
    1.0, (1.0,), None, ('high', {}), (float('nan'), {}), (float('inf'), {}), (1.0, ('form', 1.0)),
    (1.0, {'form': 'good'}), (1.0, {'form': float('nan')})])
def test_a_reward_that_is_no_number_names_its_kind(result, monkeypatch):
  made = parts.rewards(_config(reward__name=f'{__name__}:Odd'))
  attempt = types.SimpleNamespace(kind=types.SimpleNamespace(name='deduction'))
  monkeypatch.setattr(f'{__name__}.RESULT', [result])
  for method in ('propose', 'solve'):
    with pytest.raises(ValueError, match=f'reward.name=.*Odd.*{method} gave .* of deduction'):
      getattr(made, method)(attempt)
  monkeypatch.setattr(f'{__name__}.RESULT', [(1, {'form': np.float32(1)})])
  assert made.solve(attempt) == made.propose(attempt, {}) == (1, {'form': 1.0})


def test_what_excludes_tasks_must_be_a_function():
  c = _config(selfplay__exclude=f'{__name__}:RANDOM', model__tokenizer='bytes')
  with pytest.raises(config.ConfigError, match='selfplay.exclude=.*must be a function of a task'):
    run.Run(c)


def test_prompts_of_the_kinds_that_are_played_are_checked_before_the_model_is_loaded(tmp_path):
  folder = scripted.prompt_folder(tmp_path)
  (tmp_path / 'solve_error.txt').write_text('$zzz')
  c = _config(selfplay__prompts=folder, selfplay__kinds=('deduction', 'error'),
              model__name='nowhere')
  with pytest.raises(ValueError, match=r'solve_error.txt mentions \$zzz'):
    run.Run(c)


@pytest.mark.parametrize(('options', 'words'), [
    ({'rules': 5}, 'rules=5 must be a section .*max_chars'),
    ({'rules': {'max_chars': 'x'}}, "rules.max_chars='x' must be int"),
    ({'rules': {'clean': 5}}, 'rules.clean=5 must be a tuple of texts'),
    ({'rules': {'banned_words': 'os'}}, "rules.banned_words='os' must be a tuple"),
    ({'composites': {'chance': 'zzz'}}, "composites.chance='zzz' must be float"),
    ({'composites': {'start_step': True}}, 'composites.start_step=True must be int'),
    ({'timeout_s': 'x'}, "kind_options.timeout_s='x' must be float"),
    ({'banned_statements': 5}, 'banned_statements=5 must be a tuple of texts'),
    ({'banned_statements': (1,)}, 'banned_statements=.1,. must be a tuple of texts'),
    ({'distinct_inputs': 1}, 'distinct_inputs=1 must be bool'),
    ({'cases': 4}, 'cases=4: set selfplay.induction_cases'),
    ({'beauty': 4}, 'no kind has an option .*beauty'), ({1: 2}, 'kind_options.*1')])
def test_options_of_kinds_have_the_types_of_their_defaults(options, words):
  with pytest.raises(ValueError, match=words):
    parts.kinds(_config(selfplay__kinds=tuple(tasks.KINDS), selfplay__kind_options=options))


def test_options_of_kinds_are_passed_on():
  deduction, induction = parts.kinds(_config(
      selfplay__kinds=('deduction', 'induction'), selfplay__kind_options={
          'timeout_s': 3, 'rules': {'banned_words': 'azr', 'clean': ['prints']},
          'composites': {'chance': 1}, 'source_kinds': ['deduction']}))
  assert deduction.timeout_s == induction.timeout_s == 3 and deduction.composites.chance == 1
  assert 'bcrypt' in deduction.rules.banned_words and deduction.rules.clean == ('prints',)
  assert induction.source_kinds == ('deduction',)


EQUATIONS = 'example_kind:Equations'


def test_options_of_an_own_kind_serve_beside_built_in_ones():
  c = _config(selfplay__kinds=('deduction', EQUATIONS),
              selfplay__kind_options={'max_numbers': 4, 'timeout_s': 3})
  deduction, equations = parts.kinds(c)
  assert (deduction.timeout_s, equations.max_numbers) == (3, 4)
  c.selfplay.kinds = (EQUATIONS,)
  assert parts.kinds(c) == [equations]
  assert parts.kinds(c, ('deduction',)) == [deduction]         # as held-out scoring has it
  c.selfplay.kind_options.max_number = 4
  with pytest.raises(config.ConfigError, match=r"no kind has an option \['max_number'\]"):
    parts.kinds(c)
  c.selfplay.kinds = (EQUATIONS, 'induktion')
  with pytest.raises(config.ConfigError, match="'induktion' must be .*mean 'induction'"):
    parts.kinds(c)


def test_batches_of_own_kinds_go_by_their_names():
  c = _config(selfplay__kinds=('deduction', EQUATIONS), selfplay__kind_batch={'equations': 2})
  config.validate(c)
  assert len(parts.kinds(c)) == 2 and len(parts.kinds(c, ('deduction',))) == 1
  c.selfplay.kind_batch = config.ConfigDict({EQUATIONS: 2})
  with pytest.raises(config.ConfigError, match='kind_batch: .*Equations.*deduction.*equations'):
    parts.kinds(c)


class Nameless(example_kind.Equations):
  """Has the name of what it extends."""


def test_two_kinds_of_one_name_are_refused():
  with pytest.raises(config.ConfigError, match="names .'equations', 'equations'.; each"):
    parts.kinds(_config(selfplay__kinds=(EQUATIONS, f'{__name__}:Nameless')))


class Anchored(reinforce.Algorithm):
  needs_reference = True


def test_an_algorithm_that_needs_a_reference_is_told_where_to_set_one():
  c = _config(algorithm__name=f'{__name__}:Anchored')
  with pytest.raises(config.ConfigError, match="Anchored' needs .*roles.reference='base'"):
    parts.algorithm(c)
  c.roles.reference = 'base'
  assert parts.algorithm(c).needs_reference


def labelled(**given):
  return types.SimpleNamespace(submit=None, stats=None, close=None, isolation='none', **given)


def test_options_of_an_executor_are_no_limits():
  c = _config(executor__name=f'{__name__}:labelled', executor__options={'name': 'x'})
  made = parts.executor(c)
  assert (made.name, made.memory_mb) == ('x', c.executor.memory_mb)
  c.executor.options = config.ConfigDict({'memory_mb': 256})
  with pytest.raises(config.ConfigError, match='options.memory_mb=256: set executor.memory_mb'):
    parts.executor(c)


def test_lora_targets_are_checked_without_adapters_too():
  with pytest.raises(ValueError, match=r"lora.targets=\('query',\) cannot work"):
    run.Run(_config(lora__targets=('query',), model__name='nowhere'))


def test_a_tokenizer_that_is_much_smaller_than_the_model_is_noted(tmp_path):
  model = ModelConfig('llama', vocab=600, embed=16, layers=1, heads=1, kv_heads=1, head_dim=16,
                      ffn=16, tied=True)
  hf.save(model, decoder.init(model, jax.random.key(0)), tmp_path)
  notes = []
  c = _config(model__name=str(tmp_path), model__tokenizer='bytes', executor__workers=2)
  run.Run(c, progress=notes.append).close()
  assert any("model.tokenizer='bytes' has 259 tokens, the model 600" in note for note in notes)


def test_cosine_reaches_zero_at_the_last_optimizer_step():
  c = config.get_config()
  c.optimizer.schedule, c.train.steps, c.selfplay.updates = 'cosine', 3, 2
  c.algorithm.mini_batches = c.algorithm.epochs = 2
  tx, moved = parts.optimizer(c), []
  state, x = tx.init(jnp.zeros(3)), jnp.zeros(3)
  for _ in range(24 + 1):
    change, state = tx.update(jnp.ones(3), state, x)
    moved.append(float(jnp.abs(change).max()))
  assert all(a > b > 0 for a, b in zip(moved[:23], moved[1:24])) and moved[24] == 0


def test_estimators_that_can_learn_nothing_are_refused_and_no_others():
  c = config.get_config()
  c.algorithm.name = 'trr_prompt'              # of lone prompts it is trr_plus_plus
  assert parts.algorithm(c).estimator == 'trr_prompt'
  c = config.get_config()
  c.algorithm.role_estimators = {'solve': 'pass_at_k'}
  c.selfplay.solve_samples, c.algorithm.pass_k = 2, 2
  with pytest.raises(config.ConfigError, match='algorithm.pass_k=2 must be below the 2 answers'):
    parts.algorithm(c)
  c.selfplay.solve_samples = 3
  parts.algorithm(c)
