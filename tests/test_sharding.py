# SPDX-License-Identifier: Apache-2.0
"""Eight devices give the numbers of one, with the layouts and collectives that were asked for."""

import functools
import math
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from absolute_zero_jax import sampler, sharding
from absolute_zero_jax.models import decoder
from absolute_zero_jax.models.config import ModelConfig

CONFIG = ModelConfig('qwen2', vocab=64, embed=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn=48,
                     rope_theta=1e4, qkv_bias=True, tied=False)
_TOKENS = np.random.default_rng(0).integers(1, 64, (8, 20))


@functools.cache
def _params():
  r = np.random.default_rng(0)
  return jax.tree.map(
      lambda s: jnp.asarray(r.normal(1.0 if s.axes[-1] == 'norm' else 0.0, 0.2, s.shape),
                            jnp.float32),
      decoder.param_specs(CONFIG), is_leaf=lambda s: hasattr(s, 'axes'))


def _loss(params, tokens_BT, mesh=None):
  positions = jnp.broadcast_to(jnp.arange(20)[None], (8, 20))
  x_BTD = decoder.hidden(CONFIG, params, tokens_BT, positions, jnp.ones_like(tokens_BT), mesh=mesh,
                         remat='full')
  logp = jax.nn.log_softmax(jnp.einsum('BTD,VD->BTV', x_BTD, decoder.unembed(params)), -1)
  return -jnp.mean(jnp.take_along_axis(logp[:, :-1], tokens_BT[:, 1:, None], -1))


def _placed(mesh):
  targets = sharding.shardings(decoder.param_specs(CONFIG), mesh)
  return sharding.place(_params(), targets), sharding.place(_TOKENS, sharding.rows(mesh, 2))


def test_parameter_shardings_follow_the_metadata():
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  specs = jax.tree.map(lambda s: s.spec, sharding.shardings(decoder.param_specs(CONFIG), mesh))
  assert specs['embed'] == P('tensor', 'fsdp') and specs['final_norm'] == P(None)
  assert specs['layers']['q'] == P(None, 'fsdp', 'tensor', None)
  assert specs['layers']['o'] == P(None, 'tensor', None, 'fsdp')
  assert specs['layers']['down'] == P(None, 'tensor', 'fsdp')
  assert specs['layers']['k_bias'] == P(None, 'tensor', None)
  params, tokens_BT = _placed(mesh)
  assert params['layers']['gate'].addressable_shards[0].data.shape == (2, 16, 24)
  assert tokens_BT.addressable_shards[0].data.shape == (2, 20)


def test_an_axis_that_does_not_divide_is_left_whole():
  mesh = sharding.make_mesh(data=1, fsdp=2, tensor=4)
  assert sharding.partition(('embed', 'kv_heads', 'head_dim'), (32, 3, 8), mesh) == (
      P('fsdp', None, None))
  assert sharding.partition(('batch', None), (6, 20), mesh) == P(('data', 'fsdp'), None)
  assert sharding.partition(('batch', None), (3, 20), mesh) == P('data', None)
  with pytest.raises(ValueError, match="axis 'width'"):
    sharding.partition(('width',), (8,), mesh)


@pytest.mark.parametrize('sizes', [(8, 1, 1), (1, 8, 1), (2, 2, 2)], ids=str)
def test_eight_devices_give_the_loss_and_gradient_of_one(sizes):
  want, want_grad = jax.jit(jax.value_and_grad(_loss))(_params(), jnp.asarray(_TOKENS))
  mesh = sharding.make_mesh(*sizes)
  params, tokens_BT = _placed(mesh)
  step = jax.jit(jax.value_and_grad(functools.partial(_loss, mesh=mesh)),
                 out_shardings=(None, jax.tree.map(lambda x: x.sharding, params)))
  program = step.lower(params, tokens_BT).compile()
  got, grad = program(params, tokens_BT)
  np.testing.assert_allclose(got, want, rtol=1e-6)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), grad, want_grad)
  # A forgotten mesh or constraint leaves the numbers right and the program without these.
  found = set(re.findall(r'(all-gather|all-reduce|reduce-scatter|all-to-all)[-(\w]*\(',
                         program.as_text()))
  assert 'all-reduce' in found                        # gradients over rows, activations over heads
  assert ('all-gather' in found) == (sizes[1] > 1)    # weights over fsdp
  text = program.as_text()
  whole = re.findall(r'f32\[8,20,32\]', text)
  assert not whole, 'an activation of all rows lives on one device'


@pytest.mark.parametrize('sizes', [(8, 1, 1), (1, 2, 1), (2, 2, 2)], ids=str)
def test_the_sampler_gives_the_same_tokens_on_several_devices(sizes):
  # Rows that wait, rows that end early in one shard only, a batch that narrows.
  requests = [sampler.Request(tuple(_TOKENS[i, :n].tolist()), samples=k, max_new_tokens=m)
              for i, (n, m, k) in enumerate(((3, 12, 3), (20, 5, 2), (1, 12, 1), (9, 2, 4)))]
  options = dict(pad_id=0, stop_ids=[7], slots=4, chunk=4, cache_block=16, max_prompt_tokens=32,
                 max_new_tokens=12)
  want = sampler.Sampler(CONFIG, **options).generate(_params(), requests, jax.random.key(0))
  mesh = sharding.make_mesh(*sizes, devices=jax.devices()[:math.prod(sizes)])
  ours = sampler.Sampler(CONFIG, mesh, **options)
  for params in (_placed(mesh)[0], _params()):         # placed by us, and not placed at all
    got = ours.generate(params, requests, jax.random.key(0), top_p=1.0)
    assert [[s.ids for s in x] for x in got] == [[s.ids for s in x] for x in want]
    for a, b in zip(got, want):
      for x, y in zip(a, b):
        np.testing.assert_allclose(x.model_logprobs, y.model_logprobs, atol=1e-5)
  weights = ours._prepared[2]
  shard = weights.layers[0]['down'].addressable_shards[0].data.shape
  # Whole over fsdp, split over tensor; whole ones are stored [outputs, inputs].
  assert shard == ((32, 48) if sizes[2] == 1 else (48 // sizes[2], 32))


def test_rows_decode_without_waiting_for_another_device():
  mesh = sharding.make_mesh(devices=jax.devices()[:2])
  ours = sampler.Sampler(CONFIG, mesh, pad_id=0, stop_ids=[7], slots=4, chunk=4, cache_block=16,
                         max_prompt_tokens=32, max_new_tokens=12)
  requests = [sampler.Request((1, 2, 3), samples=6), sampler.Request((1, 2, 4), max_new_tokens=2)]
  ours.generate(_params(), requests, jax.random.key(0))
  programs = ours._programs.compiled
  assert {key[0] for key in programs} == {'weights', 'cache', 'prefill', 'insert', 'decode',
                                          'resize'}
  for key, program in programs.items():
    found = re.findall('all-reduce|all-gather|all-to-all|collective|reduce-scatter',
                       program.as_text())
    assert not found, (key, found)


_SHOWN = """
from absolute_zero_jax import config, parts
c = config.get_config()
c.update_from_flattened_dict(CHANGES)
mesh = parts.mesh(c)
tokenizer = type('Tokenizer', (), {'pad_id': 0, 'stop_ids': (1,), 'vocab_size': 64})
model = parts.loading.random_config(config.shrink(config.get_config()).model.name)
rows = parts.sampler(c, model, mesh, tokenizer).mesh
import jax
print(jax.device_count(), mesh.size, rows.size, rows.shape['data'])
"""


@pytest.mark.parametrize('changes, flags, shown', [
    ({}, '', '1 1 1 1'),
    ({'sampler.cpu_devices': 3}, '', '3 1 3 3'),
    ({'sampler.cpu_devices': -1, 'sampler.slots': 31}, '', '1 1 1 1'),    # 16 slots each
    ({'sampler.cpu_devices': 2, 'mesh.data': 1}, '', '2 1 2 2'),
    # Who chose the devices, or a mesh over all of them, keeps them.
    ({'sampler.cpu_devices': 3}, '--xla_force_host_platform_device_count=2', '2 1 2 2'),
    ({}, '--xla_force_host_platform_device_count=4', '4 4 4 4'),
    ({'sampler.cpu_devices': 1}, '--xla_force_host_platform_device_count=4', '4 1 1 1'),
    ({'sampler.cpu_devices': 2, 'mesh.data': 4}, '--xla_force_host_platform_device_count=4',
     '4 4 4 4'),
], ids=str)
def test_a_cpu_shows_the_devices_that_the_config_asks_for(changes, flags, shown):
  env = os.environ | {'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu'}
  done = subprocess.run([sys.executable, '-c', _SHOWN.replace('CHANGES', repr(changes))], env=env,
                        capture_output=True, text=True, check=False)
  assert done.stdout.split() == shown.split(), done.stderr
  fewer = changes.get('sampler.cpu_devices', 0) > int(shown[0])
  assert ('JAX_NUM_CPU_DEVICES=3' in done.stderr) == fewer


@pytest.mark.parametrize('command', ['train', 'evaluate'])
def test_a_command_shows_them_before_anything_looks(command, tmp_path):
  code = f"""
import jax
from absolute_zero_jax import config, {command}, parts
def stop(*_):
  raise SystemExit(jax.device_count())
parts.model = stop
c = config.shrink(config.get_config())
c.sampler.cpu_devices = 3
{command}.run(c, {str(tmp_path)!r})
"""
  env = os.environ | {'XLA_FLAGS': '', 'JAX_PLATFORMS': 'cpu'}
  done = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True,
                        check=False)
  assert done.returncode == 3, done.stderr


def test_meshes_that_do_not_fit_are_refused():
  assert dict(sharding.make_mesh().shape) == {'data': 8, 'fsdp': 1, 'tensor': 1}
  assert dict(sharding.make_mesh(data=2, fsdp=-1).shape) == {'data': 2, 'fsdp': 4, 'tensor': 1}
  one = sharding.make_mesh(devices=jax.devices()[:1])
  assert one.size == 1 and sharding.row_shards(one) == 1
  for sizes in ((3, 1, 1), (-1, -1, 1), (-1, 3, 1), (0, 1, 1)):
    with pytest.raises(ValueError, match='mesh data='):
      sharding.make_mesh(*sizes)
