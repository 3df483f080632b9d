# SPDX-License-Identifier: Apache-2.0
"""The update, prefill and decoding compile for TPUs: libtpu's compiler needs no TPU."""

import importlib.util
import os
import subprocess
import sys

import pytest

_SCRIPT = '''
import functools
import jax, jax.numpy as jnp, numpy as np, optax
from jax.experimental import topologies
from absolute_zero_jax import decoding, batching, learner, reinforce, sampling, sharding
from absolute_zero_jax.models import config, decoder

model = config.ModelConfig('qwen2', vocab=512, embed=128, layers=2, heads=4, kv_heads=2,
                           head_dim=64, ffn=256, rope_theta=1e4, qkv_bias=True, tied=True)
devices = list(topologies.get_topology_desc(platform='tpu', topology_name='v5e:2x2').devices)


def compile(mesh, function, *args, kernels=0, **options):
  with jax.set_mesh(mesh):
    done = jax.jit(function, **options).lower(*args).compile(
        compiler_options={'exec_time_optimization_effort': -1.0})
  assert (done.as_text().count('custom_call_target="tpu_custom_call"') > 0) == (kernels > 0)
  return jax.tree.map(lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where),
                      done.out_info, done.output_shardings)


for shape in ((4, 1, 1), (1, 2, 2), (1, 1, 4)):
  mesh = sharding.make_mesh(*shape, devices=devices)
  where, whole = sharding.shardings(decoder.param_specs(model), mesh), sharding.replicated(mesh)
  params = jax.tree.map(lambda s, w: jax.ShapeDtypeStruct(s.shape, jnp.float32, sharding=w),
                        decoder.param_specs(model), where, is_leaf=lambda s: hasattr(s, 'axes'))
  ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=whole)

  trainer = learner.of_decoder(
      model, optax.sgd(1e-3), reinforce.get('reinforce_plus_plus', aggregation='token'), mesh=mesh,
      remat='dots', dtype='bfloat16', attention='splash', micro_batch_tokens=1024)
  rows = [learner.Row([1] * 10, [2] * 246, [0.] * 246, [0.] * 246, 1., 'deduction', 'solve', i)
          for i in range(4)]
  by_row = sharding.rows(mesh, ndim=2)
  batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=by_row),
                       trainer.prepare(rows, None).parts[0][0])
  compile(mesh, trainer._gradient, params, None, batch, 16, kernels=1, static_argnums=(3,),
          out_shardings=(where, None))

  prefill = functools.partial(batching._prefill, model, dtype=jnp.bfloat16, attention='splash',
                              mesh=mesh)
  prefix = compile(mesh, prefill, params, *[ints(1, 128)] * 3, None, None, kernels=1)
  compile(mesh, prefill, params, *[ints(8, 256)] * 3, prefix, ints(128), kernels=1)
  weights = compile(mesh, lambda p: decoding.weights(model, p, jnp.bfloat16, mesh), params)
  cache = compile(mesh, lambda: decoding.empty_cache(model, 16, 512, jnp.bfloat16, mesh, 'tpu'))
  number = jax.ShapeDtypeStruct((), jnp.float32)
  compile(mesh, functools.partial(decoding.decode, model, chunk=8, dtype=jnp.bfloat16, mesh=mesh,
                                  platform='tpu'),
          weights, cache, ints(), decoding.Rows(*[ints(16)] * 6), ints(),
          jax.ShapeDtypeStruct((), jax.random.key(0).dtype, sharding=whole),
          sampling.Options(number, ints(), number, number),
          jax.ShapeDtypeStruct((model.vocab,), bool), ints(4), donate_argnums=1)
  print('compiled for', shape)
'''


@pytest.mark.skipif(importlib.util.find_spec('libtpu') is None,
                    reason="no TPU compiler here: pip install 'jax[tpu]'")
def test_all_programs_compile_for_tpus():
  env = os.environ | {
      'JAX_PLATFORMS': 'cpu', 'TPU_SKIP_MDS_QUERY': '1', 'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
      'TPU_WORKER_HOSTNAMES': 'localhost', 'TPU_WORKER_ID': '0', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1'}
  done = subprocess.run([sys.executable, '-c', _SCRIPT], env=env, capture_output=True, text=True,
                        timeout=600, check=False)
  assert done.stdout.count('compiled for') == 3, done.stderr[-3000:]
