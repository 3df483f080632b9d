# SPDX-License-Identifier: Apache-2.0
"""Damaged, foreign and missing files of a model, and exports that fail, leave nothing behind."""

import builtins
import errno
import json
import os
import pathlib
import shutil
import subprocess
import sys

from hf_folders import assert_equal_trees, make, named, write_with_library
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from absolute_zero_jax.models import directory, hf, loading, tensor_files
from absolute_zero_jax.models.config import ModelConfig

safetensors = pytest.importorskip('safetensors.numpy')


# Hostile input.

def one_paragraph(error):
  text = str(error.value)
  assert '\n' not in text and 30 < len(text) < 700, text
  return text


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
  """(config, params, directory with one file, directory with shards); treat as read-only."""
  config, params = make()
  folder = tmp_path_factory.mktemp('exported')
  hf.save(config, params, folder / 'one')
  hf.save(config, params, folder / 'many', shard_bytes=100_000)
  return config, params, folder / 'one', folder / 'many'


@pytest.fixture
def one(exported, tmp_path):
  return shutil.copytree(exported[2], tmp_path / 'model')


@pytest.fixture
def many(exported, tmp_path):
  return shutil.copytree(exported[3], tmp_path / 'model')


@pytest.mark.parametrize('keep', [0, 5, 100, 3000, -1, -5000])
def test_a_truncated_file_is_refused_before_reading(one, keep, monkeypatch):
  monkeypatch.setattr(tensor_files, 'read', lambda entry: pytest.fail('read a tensor'))
  file = one / 'model.safetensors'
  file.write_bytes(file.read_bytes()[:keep])
  with pytest.raises(ValueError, match='truncated') as error:
    hf.load(one)
  assert str(file) in one_paragraph(error) and 'download' in str(error.value)


def test_a_truncated_shard_is_named(many):
  shard = sorted(many.glob('*.safetensors'))[2]
  shard.write_bytes(shard.read_bytes()[:-7])
  with pytest.raises(ValueError, match=shard.name):
    hf.load(many)


def test_a_missing_shard_is_named(many):
  shard = sorted(many.glob('*.safetensors'))[1]
  shard.unlink()
  with pytest.raises(ValueError, match=f'lacks the weight files .{shard.name}') as error:
    hf.load(many)
  one_paragraph(error)


def test_an_index_that_points_at_the_wrong_file(many):
  index = many / 'model.safetensors.index.json'
  value = json.loads(index.read_text())
  first, second = sorted(set(value['weight_map'].values()))[:2]
  moved = next(t for t, f in value['weight_map'].items() if f == first)
  value['weight_map'][moved] = second
  index.write_text(json.dumps(value))
  with pytest.raises(ValueError, match=moved):
    hf.load(many)


def test_an_index_may_name_a_tensor_that_is_nowhere_and_not_needed(many):
  index = many / 'model.safetensors.index.json'
  value = json.loads(index.read_text())
  value['weight_map']['model.layers.0.self_attn.rotary_emb.inv_freq'] = min(
      value['weight_map'].values())
  index.write_text(json.dumps(value))
  hf.load(many)


@pytest.mark.parametrize('text', ['', '{', '[]', '{}', '{"weight_map": 3}',
                                  '{"weight_map": {"t": 1}}'])
def test_a_damaged_index(many, text):
  (many / 'model.safetensors.index.json').write_text(text)
  with pytest.raises(ValueError, match='index.json is damaged'):
    hf.load(many)


def test_an_index_that_names_a_directory(many):
  (many / 'model.safetensors.index.json').write_text('{"weight_map": {"t": ""}}')
  with pytest.raises(ValueError, match="lacks the weight files ''"):
    hf.load(many)


@pytest.mark.parametrize('change, message', [
    ({'a': {'data_offsets': [-16, 0]}}, "'a' is damaged.*at least 0"),
    ({'a': {'shape': [-2, -2]}}, "'a' is damaged.*at least 0"),
    ({'a': {'shape': [4.0]}}, "'a' is damaged.*at least 0"),
    ({'b': {'data_offsets': [8, 24]}}, "'b' starts at byte 8, the one before it ends at 16"),
    ({'b': {'data_offsets': [17, 33]}}, "'b' starts at byte 17"),
    ({'a': {'data_offsets': [16, 32]}, 'b': {'data_offsets': [32, 48]}}, "'a' starts at byte 16")])
def test_tensors_lie_one_behind_the_other(tmp_path, change, message):
  file = tmp_path / 'model.safetensors'
  tensor_files.write(file, {'a': (4,), 'b': (4,)}, np.dtype(np.float32), [np.ones(4)] * 2)
  length = int.from_bytes(file.read_bytes()[:8], 'little')
  header = json.loads(file.read_bytes()[8:8 + length])
  head = json.dumps({name: entry | change.get(name, {}) for name, entry in header.items()}).encode()
  file.write_bytes(len(head).to_bytes(8, 'little') + head + bytes(64))
  with pytest.raises(ValueError, match=message) as error:
    tensor_files.entries(file)
  assert str(file) in one_paragraph(error)


def test_noise_and_lfs_pointers_are_no_safetensors(one):
  file = one / 'model.safetensors'
  file.write_bytes(b'version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 9\n')
  with pytest.raises(ValueError, match='LFS pointer'):
    hf.load(one)
  file.write_bytes((8).to_bytes(8, 'little') + b'nojson!!')
  with pytest.raises(ValueError, match='header is damaged'):
    hf.load(one)
  file.write_bytes((2).to_bytes(8, 'little') + b'[]')
  with pytest.raises(ValueError, match='no safetensors file'):
    hf.load(one)
  head = json.dumps({'x': {'dtype': 'F32', 'shape': [4], 'data_offsets': [0, 12]}}).encode()
  file.write_bytes(len(head).to_bytes(8, 'little') + head + b'\0' * 16)
  with pytest.raises(ValueError, match="tensor 'x' is damaged"):
    hf.load(one)


def test_missing_left_over_and_misshapen_tensors_are_named(exported, tmp_path):
  config, params, *_ = exported
  tensors = dict(named(config, params))
  norm = 'model.layers.1.input_layernorm.weight'
  write_with_library(tmp_path, config, {n: a for n, a in tensors.items() if n != norm})
  with pytest.raises(ValueError, match=f'lacks .{norm}'):
    hf.load(tmp_path)
  write_with_library(tmp_path, config, tensors | {norm: np.zeros(5, np.float32)})
  with pytest.raises(ValueError, match=rf'{norm} is \[5\], config says \[64\]'):
    hf.load(tmp_path)
  write_with_library(tmp_path, config, tensors | {'model.layers.0.self_attn.q_norm.weight':
                                                  np.zeros(16, np.float32)})
  with pytest.raises(ValueError, match='q_norm.weight.* no place in a qwen2'):
    hf.load(tmp_path)
  write_with_library(tmp_path, config, {n: np.zeros(a.shape, np.int8) if 'gate' in n else a
                                        for n, a in tensors.items()})
  with pytest.raises(ValueError, match='I8 .*allowed: F32, F16'):
    hf.load(tmp_path)


def test_what_old_and_tied_checkpoints_repeat_is_ignored(tmp_path):
  config, params = make('random:llama')
  tensors = dict(named(config, params))
  write_with_library(tmp_path, config, tensors | {
      'lm_head.weight': tensors['model.embed_tokens.weight'],
      'model.layers.0.self_attn.rotary_emb.inv_freq': np.ones(8, np.float32)})
  assert_equal_trees(hf.load(tmp_path)[1], params)
  write_with_library(tmp_path, config, tensors | {
      'lm_head.weight': tensors['model.embed_tokens.weight'] + 1})
  with pytest.raises(ValueError, match='tie_word_embeddings to false'):
    hf.load(tmp_path)


def test_a_config_of_another_size_is_refused_before_reading(one, monkeypatch):
  value = json.loads((one / 'config.json').read_text())
  (one / 'config.json').write_text(json.dumps(value | {'intermediate_size': 99}))
  monkeypatch.setattr(tensor_files, 'read', lambda entry: pytest.fail('read a tensor'))
  with pytest.raises(ValueError, match='wrong shapes.*and 2 more'):
    hf.load(one)


def test_paths_without_a_model(tmp_path):
  for path in (tmp_path / 'none', pathlib.Path(__file__)):
    with pytest.raises(ValueError, match='no model directory'):
      hf.load(path)
  (tmp_path / 'config.json').write_text(json.dumps(loading.random_config('random:llama').to_hf()))
  (tmp_path / 'pytorch_model.bin').write_bytes(b'')
  with pytest.raises(ValueError, match='neither model.safetensors.*pytorch_model.bin') as error:
    hf.load(tmp_path)
  one_paragraph(error)


# Export that fails leaves nothing behind.

def test_parameters_of_another_config_are_refused(exported, tmp_path):
  config, params, *_ = exported
  with pytest.raises(ValueError, match='embed has shape'):
    hf.save(ModelConfig(**vars(config) | {'vocab': 9}), params, tmp_path / 'out')
  with pytest.raises(ValueError, match='lack layers/q_norm'):
    hf.save(ModelConfig(**vars(config) | {'family': 'qwen3', 'qkv_bias': False, 'qk_norm': True}),
            params, tmp_path / 'out')
  with pytest.raises(ValueError, match='stray entry'):
    hf.save(config, params | {'lora': jnp.zeros(3)}, tmp_path / 'out')
  with pytest.raises(ValueError, match='no Hugging Face form'):
    hf.save(ModelConfig(**vars(config) | {'family': 'llama'}), params, tmp_path / 'out')
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('field', ['llama,qkv_bias=true', 'llama,qk_norm=true', 'qwen2,qk_norm=1',
                                   'qwen2,qkv_bias=false', 'qwen3,qk_norm=false'])
def test_what_could_never_be_exported_is_refused_at_once(field):
  with pytest.raises(ValueError, match='q.*_.* of (llama|qwen2|qwen3) is .*; leave it out'):
    loading.random_config(f'random:{field}')
  assert loading.random_config('random:qwen2,qkv_bias=true').qkv_bias


def test_a_full_disk_keeps_the_earlier_export(exported, tmp_path, monkeypatch):
  config, params, *_ = exported
  hf.save(config, params, tmp_path / 'out')
  before = (tmp_path / 'out' / 'model.safetensors').read_bytes()

  def full(handle):
    raise OSError(errno.ENOSPC, 'No space left on device')

  monkeypatch.setattr(os, 'fsync', full)
  with pytest.raises(OSError, match='no space left to write') as error:
    hf.save(config, jax.tree.map(lambda x: x + 1, params), tmp_path / 'out')
  assert error.value.errno == errno.ENOSPC
  assert [p.name for p in tmp_path.iterdir()] == ['out']
  assert (tmp_path / 'out' / 'model.safetensors').read_bytes() == before


def test_too_small_a_disk_is_refused_before_writing(exported, tmp_path, monkeypatch):
  config, params, *_ = exported
  monkeypatch.setattr(shutil, 'disk_usage', lambda p: shutil._ntuple_diskusage(10, 9, 1))
  monkeypatch.setattr(builtins, 'open', lambda *a, **k: pytest.fail('wrote'))
  with pytest.raises(OSError, match='GB needed'):
    hf.save(config, params, tmp_path / 'out')
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('error', [KeyboardInterrupt, ValueError])
def test_an_interrupted_export_leaves_the_earlier_one(tmp_path, error):
  final = tmp_path / 'out'
  with directory.replacing(final, needed_bytes=0) as folder:
    directory.write_json(folder / 'config.json', {'good': True})
  with pytest.raises(error), directory.replacing(final, needed_bytes=0) as folder:
    directory.write_json(folder / 'config.json', {'good': False})
    raise error
  assert [p.name for p in tmp_path.iterdir()] == ['out']
  assert json.loads((final / 'config.json').read_text()) == {'good': True}


def test_the_next_export_removes_what_a_killed_one_left(tmp_path):
  ended = subprocess.Popen([sys.executable, '-c', ''])
  ended.wait()
  left, going_on, other = (tmp_path / name for name in (
      f'.out.part-{ended.pid}', f'.out.part-{os.getppid()}', f'.out2.part-{ended.pid}'))
  for folder in (left, going_on, other):
    folder.mkdir()
    (folder / 'model.safetensors').write_bytes(b'half')
  with directory.replacing(tmp_path / 'out', needed_bytes=1) as part:
    directory.write_json(part / 'config.json', {})
  assert sorted(tmp_path.iterdir()) == sorted([going_on, other, tmp_path / 'out'])


def test_an_interrupt_between_the_renames_puts_the_earlier_export_back(tmp_path, monkeypatch):
  final = tmp_path / 'out'
  with directory.replacing(final, needed_bytes=0) as folder:
    directory.write_json(folder / 'config.json', {})
  rename = pathlib.Path.rename

  def interrupted(self, target):
    if '.part-' in self.name:
      raise KeyboardInterrupt
    return rename(self, target)

  monkeypatch.setattr(pathlib.Path, 'rename', interrupted)
  with pytest.raises(KeyboardInterrupt), directory.replacing(final, needed_bytes=0):
    pass
  assert [p.name for p in tmp_path.iterdir()] == ['out']


def test_a_directory_of_something_else_is_never_replaced(exported, tmp_path):
  config, params, *_ = exported
  (tmp_path / 'home' / 'papers').mkdir(parents=True)
  (tmp_path / 'notes').mkdir()
  (tmp_path / 'notes' / 'a.txt').write_text('mine')
  (tmp_path / 'file').write_text('mine')
  for name in ('home', 'notes', 'file'):
    with pytest.raises(ValueError, match='export to'):
      hf.save(config, params, tmp_path / name)
  assert (tmp_path / 'notes' / 'a.txt').read_text() == 'mine'
  assert sorted(p.name for p in tmp_path.iterdir()) == ['file', 'home', 'notes']
