# SPDX-License-Identifier: Apache-2.0
"""The kernel of decode steps against plain JAX; interpreted, so that no GPU is needed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from absolute_zero_jax import decoding, sampling, sharding
from absolute_zero_jax.models import decode_attention, decoder, rope
from absolute_zero_jax.models.config import ModelConfig

CONFIG = ModelConfig('qwen3', vocab=320, embed=48, layers=2, heads=6, kv_heads=2, head_dim=32,
                     ffn=64, rope_theta=1e4, qk_norm=True, tied=True)
B, N, K, H, S = 3, 6, 2, 32, 64


def _normal(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def _plain(heads_BXH, angles, lengths_B, slot, k_BKHS, v_BKSH):
  q, k, v = jnp.split(heads_BXH, [N, N + K], 1)
  q, k = rope.rotate(q, angles), rope.rotate(k, angles)
  k_BKHS, v_BKSH = k_BKHS.at[..., slot].set(k), v_BKSH.at[:, :, slot].set(v)
  out = np.zeros((B, N, H))
  for b in range(B):
    seen = [(slot - age) % S for age in range(int(lengths_B[b]) + 1)]
    for n in range(N):
      key, value = (np.asarray(x[b, n // (N // K)], np.float64) for x in (k_BKHS, v_BKSH))
      score = np.asarray(q[b, n], np.float64) @ key[:, seen] / H**0.5
      weight = np.exp(score - score.max())
      out[b, n] = weight @ value[seen] / weight.sum()
  return out, k_BKHS, v_BKSH


@pytest.mark.parametrize('slot', [0, 5, 40, 63])
@pytest.mark.parametrize('parts', [1, 3])
def test_it_sees_the_youngest_tokens_of_a_ring_and_joins_them(slot, parts, monkeypatch):
  monkeypatch.setattr(decode_attention, '_BLOCK', 16)
  monkeypatch.setattr(decode_attention, '_MIN_PART', S // parts)
  lengths_B = jnp.asarray([3, S - 1, 30], jnp.int32)           # few, all, some of the slots
  angles = rope.angles(CONFIG, lengths_B)
  args = (_normal(0, B, N + 2 * K, H), angles, lengths_B, jnp.int32(slot), _normal(1, B, K, H, S),
          _normal(2, B, K, S, H))
  want = _plain(*args)
  got = decode_attention.attend(*args, interpret=True)
  for x, y in zip(got, want):
    np.testing.assert_allclose(x, y, atol=2e-6)


@pytest.mark.parametrize('devices', [0, 1, 3])
def test_decoding_with_it_gives_the_log_probs_of_decoding_without(devices, monkeypatch):
  calls, attend = [], decode_attention.attend
  monkeypatch.setattr(decode_attention, 'attend',
                      lambda *args: calls.append(1) or attend(*args, interpret=True))
  mesh = sharding.make_mesh(data=devices, devices=jax.devices('cpu')[:devices]) if devices else None
  params = decoder.init(CONFIG, jax.random.key(0), dtype=jnp.bfloat16)
  stop = jnp.asarray([-1], jnp.int32)
  rows = decoding.Rows(jnp.asarray([5, 6, 7], jnp.int32), jnp.asarray([0, 9, 40], jnp.int32),
                       jnp.zeros(B, jnp.int32), jnp.full(B, 8, jnp.int32),
                       jnp.arange(B, dtype=jnp.int32), jnp.zeros(B, jnp.int32))
  cache = tuple((_normal(2 * i, B, K, H, S), _normal(2 * i + 1, B, K, S, H))
                for i in range(CONFIG.layers))

  def chunk(dtype, platform):
    weights = jax.jit(functools.partial(decoding.weights, CONFIG, dtype=dtype, mesh=mesh))(params)
    _, out = jax.jit(functools.partial(
        decoding.decode, CONFIG, chunk=8, dtype=dtype, mesh=mesh, platform=platform))(
            weights, jax.tree.map(lambda x: x.astype(dtype), cache), jnp.int32(60), rows,
            jnp.int32(8), jax.random.key(1), sampling.options(top_k=1), jnp.ones(320, bool), stop)
    return out

  exact, plain, kernel = (chunk(*x) for x in (
      (jnp.float32, 'cpu'), (jnp.bfloat16, 'cpu'), (jnp.bfloat16, 'gpu')))
  assert len(calls) == CONFIG.layers
  gap = lambda x: np.abs(np.asarray(x.model_logprobs_BC - exact.model_logprobs_BC))
  same = np.asarray(kernel.tokens_BC == exact.tokens_BC) & (plain.tokens_BC == exact.tokens_BC)
  # A token drawn otherwise changes all that follow it.
  same = np.cumprod(same, 1).astype(bool)
  assert same[:, 0].all() and same.mean() > 0.5
  assert gap(kernel)[same].max() <= 2 * gap(plain)[same].max() + 1e-3


@pytest.mark.parametrize('change', [
    {'platform': 'cpu'}, {'dtype': jnp.float32}, {'head_dim': 80}, {'size': 24}])
def test_what_it_is_not_for_is_left_to_xla(change):
  good = {'platform': 'gpu', 'dtype': jnp.bfloat16, 'head_dim': 64, 'size': 192}
  assert decode_attention.serves(**good)
  assert not decode_attention.serves(**good | change)
