# SPDX-License-Identifier: Apache-2.0
"""Import and export of safetensors: bit-exact, streaming, sharded, and hostile input."""

import json
import pathlib
import shutil
import subprocess
import sys

from hf_folders import assert_equal_trees, make, named, write_with_library
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from absolute_zero_jax import sharding
from absolute_zero_jax.models import decoder, hf, loading, tensor_files

safetensors = pytest.importorskip('safetensors.numpy')
SPECS = ['random:llama,tied=true', 'random:llama,tied=false,kv_heads=4', 'random:qwen2,layers=3',
         'random:qwen2,tied=false', 'random:qwen3,head_dim=24']
TOKENS_BT = np.arange(12, dtype=np.int32).reshape(2, 6)


@pytest.mark.parametrize('spec', SPECS)
def test_slots_are_the_decoders_parameter_tree(spec):
  config = loading.random_config(spec)
  specs = decoder.param_specs(config)
  ours = {'layers': {}}
  for slot in hf.slots(config):
    shape = (config.layers, *slot.shape) if slot.layers else slot.shape
    (ours['layers'] if slot.path[0] == 'layers' else ours)[slot.path[-1]] = shape
  assert ours == jax.tree.map(lambda s: s.shape, specs,
                              is_leaf=lambda s: isinstance(s, decoder.Spec))


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize('spec', SPECS)
def test_round_trip_is_bit_exact(spec, dtype, tmp_path):
  config, params = make(spec, dtype)
  hf.save(config, params, tmp_path / 'out')
  again, back = hf.load(tmp_path / 'out', dtype=dtype)
  assert again == config
  assert_equal_trees(back, params)


def test_the_safetensors_library_reads_our_file(tmp_path):
  config, params = make(dtype=jnp.bfloat16)
  hf.save(config, params, tmp_path / 'out')
  theirs = safetensors.load_file(tmp_path / 'out' / 'model.safetensors')
  assert theirs['model.layers.1.self_attn.q_proj.weight'].dtype == ml_dtypes.bfloat16
  np.testing.assert_array_equal(
      theirs['model.layers.1.mlp.down_proj.weight'], np.asarray(params['layers']['down'][1]).T)
  q_DNH = np.asarray(params['layers']['q'][1])
  np.testing.assert_array_equal(theirs['model.layers.1.self_attn.q_proj.weight'],
                                q_DNH.reshape(config.embed, -1).T)


@pytest.mark.parametrize('stored', [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_every_float_type_of_the_librarys_files_is_cast(stored, tmp_path):
  config, params = make()
  write_with_library(tmp_path, config, {n: a.astype(stored) for n, a in named(config, params)})
  _, back = hf.load(tmp_path)
  want = jax.tree.map(lambda x: np.asarray(x).astype(stored).astype(np.float32), params)
  assert_equal_trees(back, jax.tree.map(jnp.asarray, want))


def test_casts_on_export_round_to_nearest_even(tmp_path):
  config, params = make()
  hf.save(config, params, tmp_path / 'out', dtype=jnp.bfloat16)
  assert json.loads((tmp_path / 'out' / 'config.json').read_text())['torch_dtype'] == 'bfloat16'
  _, back = hf.load(tmp_path / 'out', dtype=jnp.bfloat16)
  assert_equal_trees(back, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))


def test_shards_with_an_index(tmp_path):
  config, params = make()
  hf.save(config, params, tmp_path / 'out', shard_bytes=100_000)
  files = sorted(p.name for p in (tmp_path / 'out').glob('*.safetensors'))
  assert len(files) > 3 and files[0] == f'model-00001-of-{len(files):05d}.safetensors'
  index = json.loads((tmp_path / 'out' / 'model.safetensors.index.json').read_text())
  assert set(index['weight_map'].values()) == set(files)
  assert index['metadata']['total_size'] == sum(x.nbytes for x in jax.tree.leaves(params))
  largest = max(x.nbytes for _, x in named(config, params))
  for file in files:
    assert (tmp_path / 'out' / file).stat().st_size <= max(100_000, largest) + 4096
  assert_equal_trees(hf.load(tmp_path / 'out')[1], params)


def test_shards_may_lie_in_a_folder_below(tmp_path):
  config, params = make()
  hf.save(config, params, tmp_path / 'out', shard_bytes=100_000)
  (tmp_path / 'out' / 'parts').mkdir()
  for file in (tmp_path / 'out').glob('*.safetensors'):
    file.rename(file.parent / 'parts' / file.name)
  index = tmp_path / 'out' / 'model.safetensors.index.json'
  where = json.loads(index.read_text())['weight_map']
  index.write_text(json.dumps({'weight_map': {name: f'parts/{f}' for name, f in where.items()}}))
  assert_equal_trees(hf.load(tmp_path / 'out')[1], params)


def test_a_single_file_counts_where_the_shards_of_an_index_are_gone(tmp_path):
  """As transformers leaves it that saves a small model over a large one."""
  config, params = make()
  hf.save(config, params, tmp_path / 'old', shard_bytes=100_000)
  hf.save(config, jax.tree.map(lambda x: x + 1, params), tmp_path / 'new')
  shutil.copy(tmp_path / 'old' / 'model.safetensors.index.json', tmp_path / 'new')
  assert_equal_trees(hf.load(tmp_path / 'new')[1], jax.tree.map(lambda x: x + 1, params))
  shutil.copytree(tmp_path / 'old', tmp_path / 'new', dirs_exist_ok=True)
  with pytest.raises(ValueError, match='holds both model.safetensors and .*older save'):
    hf.load(tmp_path / 'new')


def test_sharded_arrays_in_and_out(tmp_path):
  config, params = make('random:llama,tied=false')
  hf.save(config, params, tmp_path / 'one')
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  shardings = sharding.shardings(decoder.param_specs(config), mesh)
  _, spread = hf.load(tmp_path / 'one', shardings=shardings)
  assert_equal_trees(spread, params)
  for leaf, want in zip(jax.tree.leaves(spread), jax.tree.leaves(shardings)):
    assert leaf.sharding == want
  assert spread['layers']['gate'].addressable_shards[0].data.size * 4 == params['layers'][
      'gate'].size                         # fsdp x tensor really split it
  hf.save(config, spread, tmp_path / 'two')
  one, two = (tmp_path / n / 'model.safetensors' for n in ('one', 'two'))
  assert one.read_bytes() == two.read_bytes()


def test_only_one_leaf_is_on_the_host_at_a_time(tmp_path, monkeypatch):
  """Every tensor read is released, and every leaf placed, before the next leaf is begun."""
  config, params = make()
  hf.save(config, params, tmp_path / 'out')
  events = []
  read, put = tensor_files.read, hf._put
  monkeypatch.setattr(tensor_files, 'read', lambda e: events.append('read') or read(e))
  monkeypatch.setattr(hf, '_put', lambda x, s: events.append('put') or put(x, s))
  hf.load(tmp_path / 'out')
  want = [e for slot in hf.slots(config) for e in ['read'] * len(slot.names()) + ['put']]
  assert events == want


@pytest.mark.model
@pytest.mark.parametrize('kind', ['gguf', 'hf'])
def test_loading_smollm2_peaks_at_its_weights_and_one_leaf(smollm2, kind, tmp_path):
  """Peak memory of a fresh process, above that of one that has only started JAX."""
  path = smollm2
  if kind == 'hf':
    path = tmp_path / 'out'
    hf.save(*loading.load(smollm2)[:2], path)
  code = f"""if True:
    import resource, sys
    def peak():
      return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    import jax, jax.numpy as jnp
    from absolute_zero_jax.models import loading
    jax.block_until_ready(jnp.zeros(3))
    before = peak()
    params = loading.load({str(path)!r})[1]
    print(sum(x.nbytes for x in jax.tree.leaves(params)) / 2**20, peak() - before)"""
  out = subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True,
                       cwd=pathlib.Path(hf.__file__).parents[2]).stdout
  weights_mb, peak_mb = map(float, out.split())
  assert 500 < weights_mb < 530
  assert peak_mb < 1.3 * weights_mb        # measured: 618 and 638 of 513; two copies are 1026


def test_generation_config_and_tokenizer_files(tmp_path):
  class Letters:
    bos_id, pad_id, stop_ids = None, 3, frozenset({7, 2})

    def save(self, folder):
      (pathlib.Path(folder) / 'tokenizer.json').write_text('{}')

  config, params = make()
  hf.save(config, params, tmp_path / 'out', tokenizer=Letters())
  assert (tmp_path / 'out' / 'tokenizer.json').exists()
  assert loading.generation_config(tmp_path / 'out') == {'eos_token_id': [2, 7], 'pad_token_id': 3}
  assert json.loads((tmp_path / 'out' / 'config.json').read_text())['eos_token_id'] == [2, 7]
  Letters.pad_id = 7             # a stop: were it padding, torch would not train its embedding
  hf.save(config, params, tmp_path / 'out', tokenizer=Letters())
  assert loading.generation_config(tmp_path / 'out')['pad_token_id'] == 7
  assert 'pad_token_id' not in json.loads((tmp_path / 'out' / 'config.json').read_text())
  hf.save(config, params, tmp_path / 'out', generation={'eos_token_id': 5, 'temperature': 0.6})
  assert loading.generation_config(tmp_path / 'out') == {'eos_token_id': [5], 'temperature': 0.6}
  assert not (tmp_path / 'out' / 'tokenizer.json').exists()     # replaced, not merged


def test_config_json_gives_the_stop_id_where_no_generation_config_is(tmp_path):
  (tmp_path / 'config.json').write_text(json.dumps({'bos_token_id': 1, 'eos_token_id': 2}))
  assert loading.generation_config(tmp_path) == {'bos_token_id': 1, 'eos_token_id': [2]}


@pytest.mark.parametrize('ends', ['2', True, 2.0, [1, 'x'], {'a': 1}, -1])
def test_ends_that_are_no_ids_are_refused(tmp_path, ends):
  (tmp_path / 'config.json').write_text(json.dumps({'eos_token_id': ends}))
  with pytest.raises(ValueError, match=f'{tmp_path}: eos_token_id=.* integers of at least 0'):
    loading.generation_config(tmp_path)


def test_special_ids_of_nothing_are_refused(tmp_path):
  with pytest.raises(ValueError, match='no model at .*none'):
    loading.generation_config(tmp_path / 'none')
