# SPDX-License-Identifier: Apache-2.0
"""ModelConfig: real config.json contents of every family, both spellings, and what is refused."""

import dataclasses
import json

import pytest

from absolute_zero_jax.models import config as configs
from absolute_zero_jax.models.config import ModelConfig, RopeScaling

LLAMA31_8B = {                           # meta-llama/Llama-3.1-8B-Instruct
    'architectures': ['LlamaForCausalLM'], 'attention_bias': False, 'attention_dropout': 0.0,
    'bos_token_id': 128000, 'eos_token_id': [128001, 128008, 128009], 'hidden_act': 'silu',
    'hidden_size': 4096, 'initializer_range': 0.02, 'intermediate_size': 14336,
    'max_position_embeddings': 131072, 'mlp_bias': False, 'model_type': 'llama',
    'num_attention_heads': 32, 'num_hidden_layers': 32, 'num_key_value_heads': 8,
    'pretraining_tp': 1, 'rms_norm_eps': 1e-05,
    'rope_scaling': {'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
                     'original_max_position_embeddings': 8192, 'rope_type': 'llama3'},
    'rope_theta': 500000.0, 'tie_word_embeddings': False, 'torch_dtype': 'bfloat16',
    'use_cache': True, 'vocab_size': 128256}
QWEN25_CODER_3B = {                      # Qwen/Qwen2.5-Coder-3B
    'architectures': ['Qwen2ForCausalLM'], 'attention_dropout': 0.0, 'hidden_act': 'silu',
    'hidden_size': 2048, 'intermediate_size': 11008, 'max_position_embeddings': 32768,
    'max_window_layers': 36, 'model_type': 'qwen2', 'num_attention_heads': 16,
    'num_hidden_layers': 36, 'num_key_value_heads': 2, 'rms_norm_eps': 1e-06,
    'rope_theta': 1000000.0, 'sliding_window': 32768, 'tie_word_embeddings': True,
    'use_sliding_window': False, 'vocab_size': 151936}
QWEN3_4B = {                             # Qwen/Qwen3-4B-Base
    'architectures': ['Qwen3ForCausalLM'], 'attention_bias': False, 'head_dim': 128,
    'hidden_act': 'silu', 'hidden_size': 2560, 'intermediate_size': 9728,
    'max_position_embeddings': 32768, 'max_window_layers': 36, 'model_type': 'qwen3',
    'num_attention_heads': 32, 'num_hidden_layers': 36, 'num_key_value_heads': 8,
    'rms_norm_eps': 1e-06, 'rope_scaling': None, 'rope_theta': 1000000, 'sliding_window': None,
    'tie_word_embeddings': True, 'use_sliding_window': False, 'vocab_size': 151936}
ALL = [LLAMA31_8B, QWEN25_CODER_3B, QWEN3_4B]


def test_llama31():
  assert ModelConfig.from_hf(LLAMA31_8B) == ModelConfig(
      family='llama', vocab=128256, embed=4096, layers=32, heads=32, kv_heads=8, head_dim=128,
      ffn=14336, rope_theta=5e5, rope_scaling=RopeScaling('llama3', 8.0, 1.0, 4.0, 8192),
      norm_eps=1e-5, qkv_bias=False, qk_norm=False, tied=False, max_positions=131072)


def test_qwen25_has_biases_and_an_unused_window():
  config = ModelConfig.from_hf(QWEN25_CODER_3B)
  assert (config.qkv_bias, config.qk_norm, config.tied, config.head_dim) == (True, False, True, 128)


def test_qwen3_has_head_norms_and_a_head_width_of_its_own():
  config = ModelConfig.from_hf(QWEN3_4B)
  assert (config.qkv_bias, config.qk_norm, config.head_dim) == (False, True, 128)
  assert config.heads * config.head_dim != config.embed


@pytest.mark.parametrize('hf', ALL, ids=lambda hf: hf['model_type'])
def test_round_trip_through_json(hf):
  config = ModelConfig.from_hf(hf)
  assert ModelConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config
  written = config.to_hf()
  assert {k: written[k] for k in written if k in hf} == {
      k: v for k, v in hf.items() if k in written}


@pytest.mark.parametrize('hf', ALL, ids=lambda hf: hf['model_type'])
def test_the_newer_spelling_of_rope_means_the_same(hf):
  old = dict(hf)
  rope = {'rope_theta': old.pop('rope_theta')} | (old.pop('rope_scaling', None) or
                                                 {'rope_type': 'default'})
  assert ModelConfig.from_hf(old | {'rope_parameters': rope}) == ModelConfig.from_hf(hf)


def test_two_spellings_of_rope_that_differ_are_refused():
  both = LLAMA31_8B | {'rope_parameters': {'rope_theta': 5e5} | LLAMA31_8B['rope_scaling']}
  assert ModelConfig.from_hf(both) == ModelConfig.from_hf(LLAMA31_8B)
  with pytest.raises(ValueError, match='rope_scaling.*rope_parameters'):
    ModelConfig.from_hf(both | {'rope_scaling': {'type': 'linear', 'factor': 2.0}})
  alone = {k: v for k, v in both.items() if k != 'rope_theta'}       # 10,000 by the older spelling
  with pytest.raises(ValueError, match='rope_scaling.*rope_parameters'):
    ModelConfig.from_hf(alone)
  with pytest.raises(ValueError, match='original_max_position_embeddings=16.*8192'):
    ModelConfig.from_hf(LLAMA31_8B | {'original_max_position_embeddings': 16})


@pytest.mark.parametrize('name', ['Llama', 'Qwen2', 'Qwen3'])
def test_transformers_reads_what_we_write(name):
  """Config objects of the installed transformers, through our form and back."""
  transformers = pytest.importorskip('transformers')
  kind = getattr(transformers, f'{name}Config')
  scaling = {'rope_type': 'llama3', 'factor': 4.0, 'low_freq_factor': 1.0,
             'high_freq_factor': 4.0, 'original_max_position_embeddings': 64}
  theirs = kind(hidden_size=96, num_attention_heads=6, num_key_value_heads=2, head_dim=16,
                num_hidden_layers=2, rope_theta=3e5, rope_scaling=scaling, rms_norm_eps=3e-6)
  config = ModelConfig.from_hf(theirs.to_dict())
  assert config.rope_theta == 3e5 and config.rope_scaling == RopeScaling('llama3', 4., 1., 4., 64)
  again = kind.from_dict(config.to_hf())
  keys = set(again.to_dict()) - {'architectures', 'dtype', 'layer_types', 'initializer_range',
                                 'bos_token_id', 'eos_token_id'}
  assert {k: again.to_dict()[k] for k in keys} == {k: theirs.to_dict()[k] for k in keys}
  assert ModelConfig.from_hf(again.to_dict()) == config


def test_absent_fields_take_the_familys_defaults():
  small = {'model_type': 'llama', 'vocab_size': 8, 'hidden_size': 32, 'num_hidden_layers': 1,
           'num_attention_heads': 4, 'intermediate_size': 16}
  config = ModelConfig.from_hf(small)
  assert (config.kv_heads, config.head_dim, config.rope_theta, config.tied) == (4, 8, 1e4, False)
  assert ModelConfig.from_hf(small | {'head_dim': None, 'num_key_value_heads': None}) == config
  assert ModelConfig.from_hf(small | {'model_type': 'qwen3'}).head_dim == 128
  linear = ModelConfig.from_hf(small | {'rope_scaling': {'type': 'linear', 'factor': 2.0}})
  assert linear.rope_scaling == RopeScaling('linear', 2.0)


REFUSED = [                              # change of a good config, field and value in the error
    ({'model_type': 'mistral', 'architectures': ['MistralForCausalLM']}, 'model_type', 'mistral'),
    ({'model_type': None, 'architectures': ['GPT2LMHeadModel']}, 'architectures', 'GPT2'),
    ({'architectures': ['LlamaForSequenceClassification']}, 'architectures', 'Classification'),
    ({'hidden_act': 'gelu'}, 'hidden_act', 'gelu'),
    ({'is_causal': False}, 'is_causal', 'False'),
    ({'attention_bias': True}, 'attention_bias', 'True'),
    ({'mlp_bias': True}, 'mlp_bias', 'True'),
    ({'num_local_experts': 8}, 'num_local_experts', '8'),
    ({'quantization_config': {'quant_method': 'gptq'}}, 'quantization_config', 'gptq'),
    ({'partial_rotary_factor': 0.5}, 'partial_rotary_factor', '0.5'),
    ({'rope_scaling': {'rope_type': 'yarn', 'factor': 4.0}}, 'rope_type', 'yarn'),
    ({'rope_scaling': {'type': 'dynamic', 'factor': 4.0}}, 'rope_type', 'dynamic'),
    ({'rope_scaling': {'type': 'linear', 'factor': 'x'}}, 'factor', "'x'"),
    ({'rope_scaling': {'rope_type': 'default', 'mrope_section': [1]}}, 'rope_scaling', 'mrope'),
    ({'rope_scaling': [8]}, 'rope_scaling', '8'),
    ({'hidden_size': None}, 'hidden_size', 'None'),
    ({'vocab_size': '9'}, 'vocab_size', "'9'"),
    ({'num_hidden_layers': 0}, 'num_hidden_layers', '0'),
    ({'num_key_value_heads': 5}, 'kv_heads', '5'),
    ({'head_dim': 7}, 'head_dim', '7'),
    ({'rms_norm_eps': 0.0}, 'norm_eps', '0.0'),
    ({'rms_norm_eps': float('inf')}, 'rms_norm_eps', 'inf'),
    ({'rope_theta': 10**400}, 'rope_theta', '1000'),
    ({'rope_scaling': {'type': 'linear', 'factor': float('inf')}}, 'factor', 'inf'),
    ({'model_type': ['llama']}, 'model_type', "['llama']"),
    ({'architectures': 5}, 'architectures', '5'),
    ({'model_type': None, 'architectures': [['x']]}, 'architectures', "[['x']]"),
    ({'layer_types': ['full_attention', 'sliding_attention']}, 'layer_types', 'sliding'),
]


@pytest.mark.parametrize('change, field, value', REFUSED, ids=lambda x: str(x)[:30])
def test_what_is_not_implemented_is_refused_by_name(change, field, value):
  with pytest.raises(ValueError, match='allowed: ') as error:
    ModelConfig.from_hf(LLAMA31_8B | change)
  assert field in str(error.value) and value in str(error.value)
  assert '\n' not in str(error.value)


def test_a_sliding_window_in_use_is_refused():
  used = QWEN25_CODER_3B | {'use_sliding_window': True}
  with pytest.raises(ValueError, match="max_window_layers='x'"):
    ModelConfig.from_hf(used | {'max_window_layers': 'x'})
  assert ModelConfig.from_hf(used) == ModelConfig.from_hf(QWEN25_CODER_3B)   # from layer 36 of 36
  with pytest.raises(ValueError, match='sliding_window=32768'):
    ModelConfig.from_hf(used | {'max_window_layers': 28})


def test_qwen2_output_bias_switch_does_not_exist():
  """Qwen2 always has q, k, v biases; a stray attention_bias field is not about them."""
  assert ModelConfig.from_hf(QWEN25_CODER_3B | {'attention_bias': True}).qkv_bias


@pytest.mark.parametrize('text, why', [('{', 'not readable JSON'), ('[1]', 'JSON list'),
                                       ('', 'not readable JSON')])
def test_a_damaged_file_is_named(tmp_path, text, why):
  (tmp_path / 'config.json').write_text(text)
  with pytest.raises(ValueError, match=why) as error:
    ModelConfig.from_hf(tmp_path)
  assert str(tmp_path / 'config.json') in str(error.value)


def test_a_missing_file_is_named(tmp_path):
  with pytest.raises(ValueError, match='config.json'):
    ModelConfig.from_hf(tmp_path)


def test_configs_are_hashable_and_equal_by_value():
  one, two = ModelConfig.from_hf(LLAMA31_8B), ModelConfig.from_hf(dict(LLAMA31_8B))
  assert hash(one) == hash(two) and one == two
  assert dataclasses.replace(one, layers=2) != one
  with pytest.raises(dataclasses.FrozenInstanceError):
    one.layers = 3


@pytest.mark.parametrize('kind', ['dynamic', 'default', 'yarn'])
def test_rope_scaling_kinds(kind):
  with pytest.raises(ValueError, match='linear'):
    configs.RopeScaling(kind, 2.0)


def test_a_refused_config_is_named_by_its_folder(tmp_path):
  (tmp_path / 'config.json').write_text(json.dumps(QWEN3_4B | {'hidden_act': 'relu'}))
  with pytest.raises(ValueError, match=f'{tmp_path}: model config: hidden_act='):
    ModelConfig.from_hf(tmp_path)


def test_a_window_that_the_config_does_not_name_is_refused_too():
  hf = {'model_type': 'qwen2', 'vocab_size': 64, 'hidden_size': 32, 'num_hidden_layers': 30,
        'num_attention_heads': 4, 'num_key_value_heads': 4, 'intermediate_size': 16}
  assert ModelConfig.from_hf(hf | {'use_sliding_window': False}).family == 'qwen2'
  with pytest.raises(ValueError, match='sliding_window=4096'):
    ModelConfig.from_hf(hf | {'use_sliding_window': True})
  for field, value in (('layer_types', 5), ('layer_types', [1]), ('tie_word_embeddings', 'false')):
    with pytest.raises(ValueError, match=field):
      ModelConfig.from_hf(hf | {field: value})


def test_sizes_that_transformers_refuses_are_refused():
  sizes = dict(vocab=8, embed=64, layers=1, heads=6, kv_heads=2, head_dim=16, ffn=8)
  assert ModelConfig('qwen3', **sizes, qk_norm=True).heads == 6
  with pytest.raises(ValueError, match='heads=6.*embed=64'):
    ModelConfig('llama', **sizes)
