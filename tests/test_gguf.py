# SPDX-License-Identifier: Apache-2.0
"""GGUF import against the same weights in safetensors, and against the gguf package's reader."""

import functools

import jax
import numpy as np
import pytest
import reference_models as reference

from absolute_zero_jax import sharding
from absolute_zero_jax.models import decoder, gguf, hf, loading, rope
from absolute_zero_jax.models.config import RopeScaling

ggml = pytest.importorskip('gguf')


def write(path, config, tensors, *, quantise=None, extra=None, architecture=None, skip=()):
  """A GGUF file as llama.cpp's converter writes it. `tensors`: Hugging Face name -> array."""
  family = architecture or config.family
  writer = ggml.GGUFWriter(path, family)
  numbers = {'block_count': config.layers, 'context_length': config.max_positions,
             'embedding_length': config.embed, 'feed_forward_length': config.ffn,
             'attention.head_count': config.heads, 'attention.head_count_kv': config.kv_heads,
             'attention.key_length': config.head_dim, 'attention.value_length': config.head_dim,
             'rope.dimension_count': config.head_dim}
  for key, value in numbers.items():
    if key not in skip:
      writer.add_uint32(f'{family}.{key}', value)
  writer.add_float32(f'{family}.rope.freq_base', config.rope_theta)
  writer.add_float32(f'{family}.attention.layer_norm_rms_epsilon', config.norm_eps)
  writer.add_array('tokenizer.ggml.tokens', [f't{i}' for i in range(config.vocab)])
  writer.add_uint32('tokenizer.ggml.eos_token_id', 2)
  writer.add_uint32('tokenizer.ggml.eot_token_id', 7)
  writer.add_uint32('tokenizer.ggml.padding_token_id', 0)
  for key, value in (extra or {}).items():
    (writer.add_string if isinstance(value, str) else
     writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)
  for name, array in tensors.items():
    if config.family == 'llama' and name.endswith(('q_proj.weight', 'k_proj.weight')):
      heads = config.heads if 'q_proj' in name else config.kv_heads
      # llama.cpp convert_hf_to_gguf.py, LlamaModel.permute
      array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
    ours = name if name == 'rope_freqs.weight' else gguf._ggml_name(name)
    array = np.ascontiguousarray(array)
    if quantise and array.ndim == 2:
      writer.add_tensor(ours, ggml.quants.quantize(array, quantise), raw_dtype=quantise)
    else:
      writer.add_tensor(ours, array)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def make(spec):
  """(config, {Hugging Face name: float32 array}) of a random model."""
  config, rng = loading.random_config(spec), np.random.default_rng(1)
  return config, {name: rng.standard_normal(slot.stored, np.float32)
                  for slot in hf.slots(config) for name in slot.names()}


def assert_equal_trees(have, want):
  assert jax.tree.structure(have) == jax.tree.structure(want)
  jax.tree.map(np.testing.assert_array_equal, have, want)


@pytest.mark.parametrize('spec', ['random:llama', 'random:llama,tied=false,kv_heads=4',
                                  'random:qwen2', 'random:qwen3,head_dim=32,tied=false'])
def test_float32_file_gives_the_same_tree(spec, tmp_path):
  config, tensors = make(spec)
  again, params = gguf.load(write(tmp_path / 'm.gguf', config, tensors))
  assert again == config
  assert_equal_trees(params, hf.assemble(config, tensors.__getitem__))


@pytest.mark.parametrize('kind, error', [('Q8_0', 0.02), ('Q4_1', 0.25), ('Q4_0', 0.35),
                                         ('F16', 1e-3), ('BF16', 1e-2)])
def test_block_formats_are_decoded(kind, error, tmp_path):
  config, tensors = make('random:qwen3')
  kind = ggml.GGMLQuantizationType[kind]
  path = write(tmp_path / 'm.gguf', config, tensors, quantise=kind)
  _, params = gguf.load(path)
  gate = tensors['model.layers.1.mlp.gate_proj.weight']
  have = np.asarray(params['layers']['gate'][1]).T
  np.testing.assert_array_equal(
      have, ggml.quants.dequantize(ggml.quants.quantize(gate, kind), kind).astype(np.float32))
  assert 0 < np.abs(have - gate).max() < error


def test_small_blocks_of_rows_change_nothing(tmp_path, monkeypatch):
  config, tensors = make('random:llama,vocab=70000')      # more than one block of 2**22 values
  path = write(tmp_path / 'm.gguf', config, tensors, quantise=ggml.GGMLQuantizationType.Q8_0)
  file = gguf.read(path)
  want = next(t for t in ggml.GGUFReader(path).tensors if t.name == 'token_embd.weight')
  np.testing.assert_array_equal(gguf.dequantize(file, 'token_embd.weight'),
                                ggml.quants.dequantize(want.data, want.tensor_type))


def test_header_equals_the_gguf_packages_reader(tmp_path):
  config, tensors = make('random:llama')
  path = write(tmp_path / 'm.gguf', config, tensors,
               extra={'general.name': 'naïve', 'general.alignment': 64})
  ours, theirs = gguf.read(path), ggml.GGUFReader(path)
  fields = {k: f.contents() for k, f in theirs.fields.items() if not k.startswith('GGUF.')}
  assert ours.metadata == fields and len(fields) > 12
  assert {n: (t.shape, t.start, t.size) for n, t in ours.tensors.items()} == {
      t.name: (tuple(t.shape.tolist()[::-1]), t.data_offset, t.n_bytes) for t in theirs.tensors}


def test_float32_numbers_get_their_shortest_form(tmp_path):
  config, tensors = make('random:llama,norm_eps=1e-5,rope_theta=1e5')
  have = loading.read_config(write(tmp_path / 'm.gguf', config, tensors))
  assert have.norm_eps == 1e-5             # float32 widened: 9.999999747378752e-06


def test_llama3_divisors_are_recognised(tmp_path):
  """The file of a Llama 3.1 holds divisors; the reference computes them from the four numbers."""
  config, tensors = make('random:llama,rope_theta=5e5,head_dim=64')
  scaling = RopeScaling('llama3', 8.0, 1.0, 4.0, 8192)
  plain = rope.frequencies(config)
  scaled = rope.frequencies(type(config)(**vars(config) | {'rope_scaling': scaling}))
  factors = np.asarray(plain / scaled, np.float32)
  assert factors.min() == 1 and factors.max() == 8
  path = write(tmp_path / 'm.gguf', config, tensors | {'rope_freqs.weight': factors})
  assert gguf.load(path)[0].rope_scaling == scaling
  path = write(tmp_path / 'n.gguf', config, tensors | {'rope_freqs.weight': factors[::-1].copy()})
  with pytest.raises(ValueError, match='does not follow the Llama 3.1 rule'):
    gguf.load(path)


def test_linear_scaling_with_divisors_is_refused(tmp_path):
  config, tensors = make('random:llama')
  path = write(tmp_path / 'm.gguf', config, tensors | {'rope_freqs.weight': np.ones(8, np.float32)},
               extra={'llama.rope.scaling.type': 'linear', 'llama.rope.scaling.factor': 4.0})
  with pytest.raises(ValueError, match='linear scaling together with rope_freqs.weight'):
    gguf.load(path)


def test_linear_scaling(tmp_path):
  config, tensors = make('random:llama')
  path = write(tmp_path / 'm.gguf', config, tensors,
               extra={'llama.rope.scaling.type': 'linear', 'llama.rope.scaling.factor': 4.0})
  assert gguf.load(path)[0].rope_scaling == RopeScaling('linear', 4.0)


@pytest.mark.parametrize(('extra', 'factor'), [
    ({'llama.rope.scale_linear': 4.0}, 4.0), ({'llama.rope.scaling.factor': 4.0}, 4.0),
    ({'llama.rope.scaling.type': 'none', 'llama.rope.scaling.factor': 4.0}, None),
    ({'llama.rope.scaling.type': 'linear'}, None)])
def test_linear_scaling_is_read_as_by_llama_cpp(tmp_path, extra, factor):
  path = write(tmp_path / 'm.gguf', *make('random:llama'), extra=extra)
  assert gguf.load(path)[0].rope_scaling == (factor and RopeScaling('linear', factor))


def test_sharded_loading_and_stop_ids(tmp_path):
  config, tensors = make('random:llama,tied=false')
  path = write(tmp_path / 'm.gguf', config, tensors)
  mesh = sharding.make_mesh(fsdp=2, tensor=2, data=2)
  _, params, source = loading.load(
      tmp_path, shardings_fn=lambda c: sharding.shardings(decoder.param_specs(c), mesh))
  assert source == path                    # the only .gguf file of the directory
  assert not params['layers']['q'].sharding.is_fully_replicated
  assert_equal_trees(params, gguf.load(path)[1])
  assert loading.generation_config(path) == {'eos_token_id': [2, 7], 'pad_token_id': 0}


@pytest.mark.parametrize('name', ['llama3_scaled', 'qwen2_tied', 'qwen3'])
def test_logits_agree_with_the_model_the_file_was_made_from(name, tmp_path):
  model = reference.make(name)
  model.save_pretrained(tmp_path)
  config = loading.read_config(tmp_path)
  scaling, config = config.rope_scaling, type(config)(**vars(config) | {'rope_scaling': None})
  tensors = {n: a.numpy() for n, a in model.state_dict().items()}
  if config.tied:
    del tensors['lm_head.weight']
  path = write(tmp_path / 'm.gguf', config, tensors)
  config, params = gguf.load(path)
  config = type(config)(**vars(config) | {'rope_scaling': scaling})
  tokens_BT = np.random.default_rng(0).integers(0, config.vocab, (1, 40))
  want_BTV = reference.logits(model, tokens_BT)
  got_BTV = jax.jit(functools.partial(decoder.logits, config))(params, tokens_BT)
  assert np.abs(got_BTV - want_BTV).max() <= 1e-4 * np.abs(want_BTV).max()


# Hostile input.

@pytest.fixture(scope='module')
def good(tmp_path_factory):
  return write(tmp_path_factory.mktemp('gguf') / 'm.gguf', *make('random:llama'))


def test_truncation_is_refused_at_every_length(good, tmp_path):
  data = good.read_bytes()
  copy = tmp_path / 'm.gguf'
  lengths = [0, 3, 4, 10, 24, 40, 100, 333, 2000, 9000, len(data) // 2, len(data) - 1]
  for length in lengths:
    copy.write_bytes(data[:length])
    with pytest.raises(ValueError, match='truncated|no GGUF') as error:
      gguf.load(copy)
    assert str(copy) in str(error.value) and '\n' not in str(error.value), length


def test_a_damaged_header_gives_an_error_or_the_same_weights(good, tmp_path):
  """Bytes all over the header, inverted one at a time. (RoPE base and names may change unseen.)"""
  data, want = good.read_bytes(), gguf.load(good)[1]
  copy, refused = tmp_path / 'm.gguf', 0
  for at in range(0, 1200, 7):
    copy.write_bytes(data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1:])
    try:
      params = gguf.load(copy)[1]
    except ValueError as e:
      assert '\n' not in str(e)
      refused += 1
    else:
      assert_equal_trees(params, want)
  assert refused > 50


REFUSED = [
    (dict(extra={'llama.rope.scaling.type': 'yarn'}), 'rope.scaling.type=.yarn'),
    (dict(extra={'llama.expert_count': 8}), 'expert_count=8'),
    (dict(extra={'split.count': 3}), 'one of 3 parts'),
    (dict(architecture='gemma2'), "architecture='gemma2'.*allowed: llama, qwen2, qwen3"),
    (dict(skip=['block_count']), 'llama.block_count=None'),
    (dict(extra={'split.count': 'none'}), 'one of none parts'),
    (dict(extra={'general.alignment': 0.0}), 'general.alignment=0.0; allowed: a positive integer'),
    (dict(extra={'general.alignment': 0}), 'general.alignment=0; allowed: a positive integer'),
    (dict(skip=['block_count'], extra={'llama.block_count': 'x'}), "llama.block_count='x'"),
    (dict(skip=['embedding_length'], extra={'llama.embedding_length': 'x'}), 'embedding_length='),
    (dict(extra={'llama.rope.scaling.factor': float('inf')}), 'factor=inf'),
    (dict(skip=['rope.dimension_count'], extra={'llama.rope.dimension_count': 8}),
     'rope.dimension_count=8'),
]


@pytest.mark.parametrize('options, text', REFUSED, ids=lambda x: str(x)[:40])
def test_what_is_not_implemented_is_refused_by_name(options, text, tmp_path):
  config, tensors = make('random:llama')
  path = write(tmp_path / 'm.gguf', config, tensors, **options)
  with pytest.raises(ValueError, match=text):
    gguf.load(path)


def test_missing_left_over_and_misshapen_tensors_are_named(tmp_path):
  config, tensors = make('random:llama')
  norm = 'model.layers.1.input_layernorm.weight'
  for i, (change, text) in enumerate([
      ({norm: None}, norm), ({norm: np.zeros(3, np.float32)}, rf'{norm} is \[3\]'),
      ({'model.layers.0.self_attn.q_proj.bias': np.zeros(64, np.float32)}, 'attn_q.bias')]):
    parts = {n: a for n, a in (tensors | change).items() if a is not None}
    with pytest.raises(ValueError, match=text):
      gguf.load(write(tmp_path / f'{i}.gguf', config, parts))


def test_paths_without_a_model(tmp_path):
  with pytest.raises(ValueError, match='no GGUF file at'):
    gguf.load(tmp_path / 'none.gguf')
  for name in 'ab':
    (tmp_path / f'{name}.gguf').write_bytes(b'GGUF')
  with pytest.raises(ValueError, match='2 .gguf files'):
    loading.load(tmp_path)
