# SPDX-License-Identifier: Apache-2.0
"""Random models with no two values alike, and the exact comparison of parameter trees."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from absolute_zero_jax.models import hf, loading

safetensors = pytest.importorskip('safetensors.numpy')


def make(spec='random:qwen2,tied=false', dtype=jnp.float32):
  """A random model; no two values agree, norms and biases included."""
  config, rng = loading.random_config(spec), np.random.default_rng(0)
  params = {'layers': {}}
  for slot in hf.slots(config):
    shape = (config.layers, *slot.shape) if slot.layers else slot.shape
    leaf = jnp.asarray(rng.standard_normal(shape, np.float32).astype(dtype))
    (params['layers'] if slot.path[0] == 'layers' else params)[slot.path[-1]] = leaf
  return config, params


def assert_equal_trees(have, want):
  assert jax.tree.structure(have) == jax.tree.structure(want)
  for a, b in zip(jax.tree.leaves(have), jax.tree.leaves(want)):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


def named(config, params):
  names = [name for slot in hf.slots(config) for name in slot.names()]
  return list(zip(names, hf.tensors(config, params)))


def write_with_library(folder, config, tensors):
  safetensors.save_file({n: np.ascontiguousarray(a) for n, a in dict(tensors).items()},
                        folder / 'model.safetensors', metadata={'format': 'pt'})
  (folder / 'config.json').write_text(json.dumps(config.to_hf()))
