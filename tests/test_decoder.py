# SPDX-License-Identifier: Apache-2.0
"""The decoder against transformers, and against itself by another route."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_models

from absolute_zero_jax import sharding
from absolute_zero_jax.models import attention, decoder, hf, rope
from absolute_zero_jax.models.config import ModelConfig, RopeScaling

SMALL = ModelConfig('qwen3', vocab=61, embed=24, layers=3, heads=4, kv_heads=2, head_dim=8, ffn=40,
                    rope_theta=1e4, qk_norm=True, tied=True)


def _params(config, seed=0):
  """Weights large enough that a wrong mask or position moves the logits."""
  r = np.random.default_rng(seed)
  return jax.tree.map(
      lambda s: jnp.asarray(r.normal(1.0 if s.axes[-1] == 'norm' else 0.0, 0.12, s.shape),
                            jnp.float32),
      decoder.param_specs(config), is_leaf=lambda s: hasattr(s, 'axes'))


def _tokens(shape, vocab=61, seed=0):
  return np.random.default_rng(seed).integers(0, vocab, shape)


_jitted = jax.jit(decoder.logits, static_argnums=0, static_argnames=('dtype', 'remat'))


def _logits(config, params, *arrays, **options):
  return np.asarray(_jitted(config, params, *(jnp.asarray(x) for x in arrays), **options))


@pytest.mark.parametrize('name', ['llama3_scaled', 'qwen2', 'qwen3_tied'])
def test_logits_equal_those_of_transformers(name):
  model = reference_models.make(name)
  config = ModelConfig.from_hf(model.config.to_dict())
  weights = {k: v.numpy() for k, v in model.state_dict().items()}
  params = hf.assemble(config, weights.__getitem__)
  tokens_BT = _tokens((2, 140), model.config.vocab_size)       # more than one query chunk
  want = reference_models.logits(model, tokens_BT)
  got = _logits(config, params, tokens_BT)
  assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()


def test_llama3_scaling_of_frequencies_is_the_published_one():
  scaling = RopeScaling('llama3', 8.0, 1.0, 4.0, 8192)
  config = ModelConfig('llama', 10, 8, 1, 1, 1, 128, 8, rope_theta=5e5, rope_scaling=scaling)
  plain = 5e5 ** (-np.arange(0, 128, 2) / 128)
  wavelength = 2 * np.pi / plain
  smooth = (8192 / wavelength - 1) / 3
  want = np.where(wavelength < 8192 / 4, plain, np.where(
      wavelength > 8192, plain / 8, (1 - smooth) * plain / 8 + smooth * plain))
  np.testing.assert_allclose(rope.frequencies(config), want, rtol=1e-5)


def test_packed_segments_equal_separate_rows():
  params = _params(SMALL)
  a, b = _tokens((1, 150)), _tokens((1, 37), seed=1)
  packed = np.concatenate([a, b, np.zeros((1, 13), int)], 1)
  segments = np.array([[1] * 150 + [2] * 37 + [0] * 13])
  positions = np.array([[*range(150), *range(37), *[0] * 13]])
  got = _logits(SMALL, params, packed, positions, segments)
  for part, where in ((a, slice(0, 150)), (b, slice(150, 187))):
    want = _logits(SMALL, params, part)
    np.testing.assert_allclose(got[:, where], want, atol=2e-5)   # one shared segment: off by 3.2
  assert np.isfinite(got).all()


@pytest.mark.parametrize('side', ['left', 'right'])
def test_padding_changes_nothing(side):
  params, tokens_BT = _params(SMALL), _tokens((2, 20))
  pad = [(0, 0), (9, 0) if side == 'left' else (0, 9)]
  where = slice(9, 29) if side == 'left' else slice(0, 20)
  positions = np.pad(np.tile(np.arange(20), (2, 1)), pad)
  segments = np.pad(np.ones((2, 20), int), pad)
  for fill in (0, 60):
    padded = np.pad(tokens_BT, pad, constant_values=fill)
    got = _logits(SMALL, params, padded, positions, segments)
    want = _logits(SMALL, params, tokens_BT)
    np.testing.assert_allclose(got[:, where], want, atol=2e-5)


def test_later_tokens_do_not_reach_earlier_ones():
  params, tokens_BT = _params(SMALL), _tokens((1, 300))
  changed = tokens_BT.copy()
  changed[:, 200:] = _tokens((1, 100), seed=2)
  a, b = (_logits(SMALL, params, x) for x in (tokens_BT, changed))
  np.testing.assert_array_equal(a[:, :200], b[:, :200])
  assert np.abs(a[:, 200:] - b[:, 200:]).max() > 0.1


@pytest.mark.parametrize('remat', ['full', 'dots'])
def test_remat_gives_the_plain_gradient(remat):
  params, tokens_BT = _params(SMALL), jnp.asarray(_tokens((2, 24)))

  @functools.partial(jax.jit, static_argnums=1)
  def gradient(params, remat):
    return jax.grad(lambda p: jnp.mean(jax.nn.softmax(
        decoder.logits(SMALL, p, tokens_BT, remat=remat), -1)[..., 3]))(params)

  want, got = gradient(params, 'none'), gradient(params, remat)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), got, want)
  assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(want)) > 1e-4


def test_long_rows_give_the_gradient_of_unchunked_attention():
  """1100 tokens: nine query chunks, each recomputed in the backward pass."""
  r = np.random.default_rng(0)
  q, k, v = (jnp.asarray(r.standard_normal((1, 1100, n, 8)), jnp.float32) for n in (4, 2, 2))
  segments = jnp.asarray([[1] * 600 + [2] * 500])

  def ours(q, k, v):
    return attention.attend(q, k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3), segments, segments)

  def plain(q, k, v):
    mask = (segments[:, :, None] == segments[:, None])[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True)

  np.testing.assert_allclose(jax.jit(ours)(q, k, v), jax.jit(plain)(q, k, v), atol=1e-5)
  gradients = [jax.jit(jax.grad(lambda *a, f=f: jnp.sum(jnp.sin(f(*a))), (0, 1, 2)))(q, k, v)
               for f in (ours, plain)]
  for got, want in zip(*gradients):
    np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize('queries, segments', [
    (20, [[1] * 13 + [0] * 7, [257] * 8 + [513] * 12]),
    (130, [[1] * 200, [0] * 5 + [1] * 195])])                  # behind a prefix, in two tiles
@pytest.mark.parametrize('shape', [None, (2, 1, 2), (1, 2, 4)])
def test_splash_attention_is_the_attention_of_everywhere_else(queries, segments, shape):
  """Interpreted on the CPU: the kernel, its gradient, and how a mesh splits it (2 kv heads)."""
  r = np.random.default_rng(0)
  segments = jnp.asarray(segments)
  seen = segments.shape[1]
  q, k, v = (jnp.asarray(r.standard_normal(s), jnp.float32)
             for s in ((2, queries, 4, 8), (2, 2, 8, seen), (2, 2, seen, 8)))
  counts_BT = segments[:, seen - queries:] > 0
  mesh = None
  if shape:
    mesh = sharding.make_mesh(*shape, devices=jax.devices()[:math.prod(shape)])

  @functools.partial(jax.jit, static_argnums=3)
  def run(q, k, v, name):
    def loss(q, k, v):
      out = attention.attend(q, k, v, segments[:, seen - queries:], segments, implementation=name,
                             mesh=mesh)
      return jnp.sum(jnp.sin(out) * counts_BT[..., None, None]), out
    return jax.grad(loss, (0, 1, 2), has_aux=True)(q, k, v)

  (got, out), (want, plain) = run(q, k, v, 'splash'), run(q, k, v, 'xla')
  np.testing.assert_allclose(out[counts_BT], plain[counts_BT], atol=1e-5)
  assert np.isfinite(out).all()
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)


@pytest.mark.parametrize('queries, segments, packed', [
    (20, [[1] * 20, [1] * 13 + [0] * 7], False),               # whole rows, padding behind
    (20, [[1] * 8 + [2] * 12, [512] * 6 + [513] * 5 + [514] * 4 + [0] * 5], True),
    (12, [[1] * 20, [0] * 5 + [1] * 15], True)])               # behind a prefix
def test_what_cudnn_is_asked_for_is_the_attention_of_everywhere_else(monkeypatch, queries, segments,
                                                                     packed):
  """No cuDNN here: JAX's own attention answers the very question that cuDNN would be asked."""
  asked = []
  real = jax.nn.dot_product_attention

  def answer(*args, implementation, **options):
    asked.append((implementation, sorted(options)))
    return real(*args, **options)

  monkeypatch.setattr(jax.nn, 'dot_product_attention', answer)
  r = np.random.default_rng(0)
  q, k, v = (jnp.asarray(r.standard_normal(shape), jnp.float32)
             for shape in ((2, queries, 4, 8), (2, 2, 8, 20), (2, 2, 20, 8)))
  segments = jnp.asarray(segments)
  args = q, k, v, segments[:, 20 - queries:], segments
  got, want = (np.asarray(attention.attend(*args, packed=packed, implementation=name))
               for name in ('cudnn', 'xla'))
  real_BT = np.asarray(segments[:, 20 - queries:]) > 0
  np.testing.assert_allclose(got[real_BT], want[real_BT], atol=1e-5)
  assert np.isfinite(got).all()
  assert asked == [('cudnn', ['mask'] if packed else [
      'is_causal', 'key_value_seq_lengths', 'query_seq_lengths'])]


def test_scan_over_layers_equals_layers_one_by_one():
  params, tokens_BT = _params(SMALL), jnp.asarray(_tokens((2, 17)))
  positions = jnp.broadcast_to(jnp.arange(17)[None], (2, 17))
  segments = jnp.ones_like(tokens_BT)
  block = jax.jit(lambda w, x: decoder.Block(SMALL).apply(
      {'params': w}, x, None, rope.angles(SMALL, positions), segments, None)[0])
  x = params['embed'][tokens_BT]
  for i in range(SMALL.layers):
    x = block({name: w[i] for name, w in params['layers'].items()}, x)
  want = decoder.rms_norm(x, params['final_norm'], SMALL.norm_eps)
  got = jax.jit(decoder.hidden, static_argnums=0)(SMALL, params, tokens_BT, positions, segments)
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_specs_are_the_shapes_of_initialised_parameters():
  for config in (SMALL, ModelConfig('qwen2', 61, 24, 2, 4, 2, 8, 40, qkv_bias=True)):
    specs = decoder.param_specs(config)
    params = decoder.init(config, jax.random.key(0), jnp.bfloat16)
    assert jax.tree.map(lambda s: s.shape, specs, is_leaf=lambda s: hasattr(s, 'axes')) == (
        jax.tree.map(lambda x: x.shape, params))
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype('bfloat16')}
    assert ('unembed' in specs) is not config.tied


def test_bfloat16_is_near_float32():
  params, tokens_BT = _params(SMALL), jnp.asarray(_tokens((2, 30)))
  want = _logits(SMALL, params, tokens_BT)
  got = _logits(SMALL, params, tokens_BT, dtype=jnp.bfloat16)
  assert got.dtype == jnp.float32
  assert np.abs(got - want).max() < 0.1 * np.abs(want).max()


@pytest.mark.parametrize('platform, narrow', [('cpu', 'f32'), ('cuda', 'bf16'), ('tpu', 'bf16')])
def test_products_of_16_bits_give_what_the_chip_has_units_for(platform, narrow):
  """XLA:CPU writes both operands out in float32, step by step, for a product that is asked for 16
  bits; an NVIDIA GPU converts a product that is asked for 32 by a kernel of its own."""
  def products(x, w):
    return decoder.product(x, w, False), decoder.linear(x, w.T), decoder.product(
        x, w, False, jnp.float32)
  x, w = jnp.ones((4, 8), jnp.bfloat16), jnp.ones((16, 8), jnp.bfloat16)
  text = jax.jit(products).trace(x, w).lower(lowering_platforms=(platform,)).as_text()
  results = re.findall(r'dot_general .*-> tensor<4x16x(\w+)>', text)
  assert results == [narrow, narrow, 'f32']
  assert [y.dtype for y in products(x, w)] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]


def test_bfloat16_adds_up_gradients_over_tokens_in_float32():
  """4,096 equal tokens: a sum in bfloat16 stops at 256 times its terms."""
  config = ModelConfig('qwen2', vocab=61, embed=24, layers=1, heads=4, kv_heads=2, head_dim=8,
                       ffn=40, rope_theta=1e4, qkv_bias=True, tied=False)
  tokens = jnp.full((32, 128), 7)

  @functools.partial(jax.jit, static_argnums=0)
  def gradient(dtype):
    def loss(params):
      x = decoder.hidden(config, params, tokens, jnp.arange(128)[None] + 0 * tokens,
                         jnp.ones_like(tokens), dtype=dtype)
      return jnp.sum(x.astype(jnp.float32) @ direction)
    return jax.grad(loss)(_params(config))

  direction = jnp.asarray(np.random.default_rng(3).normal(size=24), jnp.float32)
  want, got = gradient(jnp.float32), gradient(jnp.bfloat16)
  of_bias = lambda g: g['layers']['v_bias']
  for name, pick in (('embed', lambda g: g['embed'][7]), ('v_bias', of_bias)):
    scale = np.abs(pick(want)).max()
    np.testing.assert_allclose(pick(got), pick(want), atol=0.02 * scale, err_msg=name)


def test_unknown_options_are_refused_by_name():
  params, tokens_BT = _params(SMALL), jnp.asarray(_tokens((1, 4)))
  with pytest.raises(ValueError, match="remat='some'.*'full'"):
    decoder.logits(SMALL, params, tokens_BT, remat='some')
  with pytest.raises(ValueError, match="attention='fast'.*xla"):
    decoder.logits(SMALL, params, tokens_BT, attention='fast')


def test_a_parameter_of_the_wrong_shape_is_named():
  params = _params(SMALL)
  params['layers']['gate'] = params['layers']['gate'][:, :-1]
  with pytest.raises(Exception, match='gate'):
    decoder.logits(SMALL, params, jnp.asarray(_tokens((1, 4))))
