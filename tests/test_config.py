# SPDX-License-Identifier: Apache-2.0
"""Configs refuse what cannot work, by field name, before any work; every shipped file is valid."""

import importlib.util
import inspect
import pathlib

import ml_collections
import pytest

from absolute_zero_jax import config
from absolute_zero_jax.executor import client

ROOT = pathlib.Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / 'configs').glob('*.py'))


def _load(path):
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.mark.parametrize('path', FILES, ids=lambda p: p.stem)
def test_shipped_configs_are_valid_and_documented(path):
  module = _load(path)
  c = module.get_config()
  config.validate(c)
  assert f'--config configs/{path.name}' in module.__doc__
  for preset in config.PRESETS if 'preset=' in path.read_text() else ():
    c = module.get_config(f'preset={preset}')
    config.validate(c)
    assert c.preset == preset


@pytest.mark.parametrize('field, value, words', [
    ('train.steps', 0, '1 or more'),
    ('train.steps', 'ten', 'type int'),
    ('sampler.top_p', 0.0, 'more than 0'),
    ('sampler.temperature', 0.0, 'more than 0'),
    ('sampler.chunk', 10**12, '1 to 1048576'),
    ('optimizer.b2', 1.0, 'less than 1'),
    ('selfplay.kinds', (), 'one or more'),
    ('selfplay.kinds', ('deduction', 'deduction'), 'distinct'),
    ('selfplay.solve_source', 'new', "'fresh', 'lagged'"),
    ('mesh.tensor', 0, '-1'),
    ('executor.min_isolation', 'none', "'standard'"),
    ('algorithm.old_logprobs', 'new', "'current'"),
    ('reward.wrong_penalty', float('nan'), 'finite float'),
    ('optimizer.clip_norm', float('inf'), 'finite float'),
    ('train.length_buckets', ('a',), 'ascending'),
    ('train.length_buckets', (512, 600.5), 'ascending'),
    ('algorithm.role_weights', {'proposer': 0.1}, "mean 'propose'"),
    ('algorithm.role_weights', {'solve': None}, '0 or more'),
    ('algorithm.role_weights', {'solve': float('nan')}, '0 or more'),
    ('algorithm.role_estimators', {'zzz': 'rloo'}, 'propose, solve'),
    ('algorithm.role_estimators', {'solve': None}, 'name of an estimator'),
    ('selfplay.kind_batch', {1: 2}, 'no kind that is played'),
])
def test_an_impossible_value_is_named(field, value, words):
  c = config.get_config()
  section, _, name = field.rpartition('.')
  with c.unlocked(), c.ignore_type():
    c[section][name] = ml_collections.ConfigDict(value) if isinstance(value, dict) else value
  with pytest.raises(config.ConfigError) as e:
    config.validate(c)
  assert field in str(e.value) and words in str(e.value)


def test_an_unknown_field_is_named_with_what_is_allowed():
  c = config.get_config()
  with c.unlocked():
    c.train.stepz = 3
  with pytest.raises(config.ConfigError, match=r"train\.stepz .*Did you mean 'steps'"):
    config.validate(c)
  with pytest.raises(config.ConfigError, match=r"selfplay\.batsh .*'batch'"):
    config.check_field(config.get_config(), 'selfplay.batsh')
  with pytest.raises(config.ConfigError, match='is a section'):
    config.check_field(config.get_config(), 'train')
  with pytest.raises(config.ConfigError, match=r"--config\.algorithm\.role_weights=.\{'propose'"):
    config.check_field(config.get_config(), 'algorithm.role_weights.propose')


@pytest.mark.parametrize('change, words', [
    ({'roles.propose': 'base'}, 'train_propose'),
    ({'roles.propose': 'base', 'selfplay.train_propose': False, 'selfplay.overlap': 1},
     'roles.propose='),
    ({'train.off_policy_steps': 1}, 'algorithm.importance='),
    ({'train.off_policy_steps': 1, 'algorithm.importance': 'mask', 'selfplay.updates': 2},
     'selfplay.updates=2'),
    ({'roles.solve': 'base'}, 'nothing to train'),
    ({'algorithm.kl_coef': 0.1}, 'roles.reference'),
    ({'mesh.fsdp': -1}, 'only one axis'),
    ({'train.length_buckets': (64,)}, 'length_buckets.* must reach'),
    ({'train.length_buckets': (512, 256)}, 'ascending'),
    ({'heldout.parts': ('same', 'same')}, 'heldout.parts.*each once'),
    ({'heldout.parts': ('a/test.jsonl', 'b/test.jsonl')}, 'heldout.parts.*without their folders'),
    ({'heldout.parts': ('same', 'a/same.jsonl')}, 'heldout.parts.*without their folders'),
    ({'model.attention': 'cudnn'}, "model.dtype='float32'.*'bfloat16'"),
    ({'model.attention': 'splash', 'train.share_prompts': True}, 'train.share_prompts=False'),
    ({'selfplay.kind_batch': {'induktion': 4}}, "no kind that is played.*mean 'induction'"),
    ({'selfplay.kind_batch': {'induction': 0}}, 'kind_batch.induction=0 must be'),
    ({'pretrain.guess_steps': (5, 3)}, 'pretrain.guess_steps.*ascending'),
    ({'executor.workers': 3}, 'executor.workers=3 must be even'),
    ({'optimizer.name': 'muon', 'lora.rank': 4}, "lora.rank=4 .*optimizer.name='adamw'"),
    ({'command': 'pretrain', 'mesh.fsdp': 4}, "command='pretrain' trains on one device"),
    ({'algorithm.skip_zero_rows': True, 'algorithm.entropy_coef': 0.01},
     'skip_zero_rows=True .*entropy_coef=0.01'),
    ({'algorithm.kl_coef': -0.1}, 'algorithm.kl_coef=-0.1'),
    ({'heldout.kinds': ('deduction', 'deduction')}, 'heldout.kinds='),
    ({'executor.workers': 2000}, 'executor.workers=2000 .*at most 1024'),
    ({'executor.score_timeout_s': 100.0}, 'executor.score_timeout_s=100.0 must be 0.01 to 60'),
    ({'selfplay.mc_use': 'reuse', 'selfplay.solve_source': 'lagged'}, "mc_use='reuse'"),
    ({'train.length_buckets': (64, 149), 'sampler.max_prompt_tokens': 100,
      'sampler.max_propose_tokens': 50, 'sampler.max_solve_tokens': 20}, 'must reach 150'),
    ({'train.length_buckets': (64, 149), 'sampler.max_prompt_tokens': 100,
      'sampler.max_propose_tokens': 20, 'sampler.max_solve_tokens': 50}, 'must reach 150'),
    ({'command': 'pretrain', 'pretrain.questions': 5, 'selfplay.induction_cases': 4},
     'pretrain.questions=5'),
])
def test_fields_that_contradict_each_other_are_refused(change, words):
  c = config.get_config()
  c.update_from_flattened_dict(change)
  with pytest.raises(config.ConfigError, match=words):
    config.validate(c)


def test_buckets_that_just_reach_are_taken():
  c = config.get_config()
  c.train.length_buckets, c.sampler.max_prompt_tokens = (64, 150), 100
  c.sampler.max_propose_tokens, c.sampler.max_solve_tokens = 50, 20
  config.validate(c)


def _refuses(check, options):
  try:
    check(options)
  except ValueError:
    return True
  return False


@pytest.mark.parametrize('field, value, refused', [
    ('workers', 0, False), ('workers', 2, False), ('workers', 3, True), ('workers', 1024, False),
    ('workers', 1026, True), ('validate_timeout_s', 0.009, True),
    ('validate_timeout_s', 0.01, False), ('score_timeout_s', 60.0, False),
    ('score_timeout_s', 60.1, True)])
def test_the_config_refuses_what_the_executor_would(field, value, refused):
  usual = {name: p.default for name, p in inspect.signature(client.Executor).parameters.items()}
  assert _refuses(client.check_options, usual | {field: value}) == refused
  c = config.get_config()
  c.executor[field] = value
  assert _refuses(config.validate, c) == refused


def test_the_presets_are_the_published_numbers():
  paper = config.apply_preset(config.get_config(), 'azr_paper')
  printed = config.apply_preset(config.get_config(), 'azr_paper_eq')
  assert (paper.selfplay.solve_source, printed.selfplay.solve_source) == ('lagged', 'fresh')
  assert (paper.reward.zero_learnability, printed.reward.zero_learnability) == (-0.5, 0.0)
  assert (paper.algorithm.aggregation, printed.algorithm.aggregation) == (
      'role_microbatch', 'sequence')
  assert (paper.algorithm.entropy_coef, paper.optimizer.weight_decay) == (0.001, 0.01)
  assert (paper.selfplay.batch, paper.selfplay.mc_samples, paper.selfplay.references) == (64, 8, 6)
  assert (paper.sampler.max_prompt_tokens, paper.sampler.max_solve_tokens) == (6144, 8096)
  assert (paper.optimizer.learning_rate, paper.optimizer.clip_norm) == (1e-6, 1.0)
  with pytest.raises(config.ConfigError, match="preset='azr2'"):
    config.apply_preset(config.get_config(), 'azr2')


@pytest.mark.parametrize('name, model, helpers', [
    ('coder3b', 'Qwen/Qwen2.5-Coder-3B', 'one'), ('base7b', 'Qwen/Qwen2.5-7B', 'one'),
    ('coder7b', 'Qwen/Qwen2.5-Coder-7B', 'one'), ('base14b', 'Qwen/Qwen2.5-14B', 'one'),
    ('coder14b', 'Qwen/Qwen2.5-Coder-14B', 'one'), ('llama8b', 'meta-llama/Llama-3.1-8B', 'any'),
    ('qwen3_4b', 'Qwen/Qwen3-4B-Base', 'any')])
def test_model_configs_have_the_published_sizes_and_a_mesh_each(name, model, helpers):
  module = _load(ROOT / 'configs' / f'{name}.py')
  tpu, gpu = module.get_config('preset=azr_paper'), module.get_config('preset=azr_paper,gpu')
  for c in (tpu, gpu):
    config.validate(c)
    assert c.model.name == model and c.model.dtype == 'bfloat16' and c.mesh.fsdp == -1
    assert (c.selfplay.batch, c.selfplay.mc_samples, c.selfplay.references) == (64, 8, 6)
    assert (c.sampler.max_prompt_tokens, c.sampler.max_propose_tokens) == (6144, 8096)
    assert (c.optimizer.learning_rate, c.optimizer.schedule, c.train.steps) == (
        1e-6, 'constant', 500)
    assert c.selfplay.kind_options.rules.functions == helpers
  assert (tpu.model.attention, gpu.model.attention) == ('splash', 'cudnn')
  assert 'rules' not in module.get_config().selfplay.kind_options


def test_file_arguments():
  assert config.parse_arg('a,b=3', a=False, b=1).to_dict() == {'a': True, 'b': 3}
  assert config.parse_arg(None, a=False).a is False
  for arg, words in [('c', 'unknown'), ('b=x', 'type int'), ('a=maybe', 'true or false')]:
    with pytest.raises(config.ConfigError, match=words):
      config.parse_arg(arg, a=False, b=1)


def test_objects_are_named_by_key_or_by_module():
  known = {'one': 1}
  assert config.load_object('one', known, 'x') == 1
  assert config.load_object('os.path:join', known, 'x') is __import__('os').path.join
  for name, words in [('on', "Did you mean 'one'"), ('nope_nope:f', 'PYTHONPATH'),
                      ('os:nope', 'has no')]:
    with pytest.raises(config.ConfigError, match=words):
      config.load_object(name, known, 'x')


def test_differences_name_the_fields():
  a = config.to_json(config.get_config())
  c = config.get_config()
  c.train.steps, c.selfplay.kinds = 9, ('deduction',)
  assert config.differences(a, config.to_json(c)) == ['selfplay.kinds', 'train.steps']


def test_a_field_that_an_older_version_lacks_counts_with_its_default():
  old, c = config.to_json(config.get_config()), config.get_config()
  del old['algorithm']['pass_k'], old['heldout']
  assert not config.differences(old, config.to_json(c))
  c.algorithm.pass_k, c.algorithm.role_weights.propose = 3, 0.5
  assert config.differences(old, config.to_json(c)) == [
      'algorithm.pass_k', 'algorithm.role_weights.propose']
