# SPDX-License-Identifier: Apache-2.0
"""logprobs.score against float64 numpy, its gradients against autodiff, and its memory."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from absolute_zero_jax import logprobs, sharding

N, D, V = 37, 12, 101


def _inputs(seed=0, dtype=jnp.float32, scale=1.0):
  k1, k2, k3 = jax.random.split(jax.random.key(seed), 3)
  hidden_ND = jax.random.normal(k1, (N, D)).astype(dtype)
  table_VD = scale * jax.random.normal(k2, (V, D))
  return hidden_ND, table_VD, jax.random.randint(k3, (N,), 0, V)


def _plain(hidden_ND, table_VD, target_N, temperature=1.0):
  logit_NV = hidden_ND.astype(jnp.float32) @ table_VD.T / temperature
  logp_NV = jax.nn.log_softmax(logit_NV)
  entropy_N = -jnp.sum(jnp.exp(logp_NV) * logp_NV, axis=-1)
  return jnp.take_along_axis(logp_NV, target_N[:, None], 1)[:, 0], entropy_N


@pytest.mark.parametrize('temperature', [1.0, 0.7])
@pytest.mark.parametrize('chunk', [1, 8, 37, 64, 0])
def test_scores_equal_float64_for_any_chunk(chunk, temperature):
  hidden, table, target = _inputs()
  got = logprobs.score(hidden, table, target, temperature=temperature, chunk=chunk)
  logit = np.asarray(hidden, np.float64) @ np.asarray(table, np.float64).T / temperature
  logz = np.log(np.exp(logit - logit.max(1, keepdims=True)).sum(1)) + logit.max(1)
  logp = logit - logz[:, None]
  np.testing.assert_allclose(got[0], logp[np.arange(N), target], rtol=2e-6, atol=2e-6)
  np.testing.assert_allclose(got[1], -(np.exp(logp) * logp).sum(1), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize('temperature', [1.0, 1.7])
def test_gradients_of_both_results_equal_autodiff(temperature):
  hidden, table, target = _inputs(1)
  pull = jax.random.normal(jax.random.key(9), (2, N))

  def loss(fn, **kw):
    def of(hidden, table):
      logprob_N, entropy_N = fn(hidden, table, target, temperature=temperature, **kw)
      return jnp.sum(pull[0] * logprob_N + pull[1] * entropy_N)
    return jax.grad(of, (0, 1))(hidden, table)

  for got, want in zip(loss(logprobs.score, chunk=8), loss(_plain)):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * float(jnp.abs(want).max()))


def test_the_temperature_may_be_traced():
  hidden, table, target = _inputs()
  score = jax.jit(lambda t: logprobs.score(hidden, table, target, temperature=t)[0])
  for temperature in (0.5, 1.0, 2.0):
    want = _plain(hidden, table, target, temperature)[0]
    np.testing.assert_allclose(score(temperature), want, rtol=1e-5, atol=1e-5)
  assert score._cache_size() == 1


def test_a_sure_distribution_has_entropy_zero_and_no_nan():
  hidden, table, target = _inputs(scale=200.0)
  value, grads = jax.value_and_grad(
      lambda h, w: sum(map(jnp.sum, logprobs.score(h, w, target, chunk=8))), (0, 1))(hidden, table)
  assert np.isfinite(value) and all(np.isfinite(g).all() for g in grads)
  logprob_N, entropy_N = logprobs.score(hidden, table, jnp.argmax(hidden @ table.T, axis=-1))
  # Relative to logZ (hundreds here) the rounding alone would be about 1e-4, of either sign.
  assert float(jnp.min(jnp.abs(entropy_N))) < 1e-12 and float(jnp.min(entropy_N)) >= 0
  assert float(jnp.max(logprob_N)) <= 0


def test_bfloat16_activations_keep_a_float32_table_gradient():
  hidden, table, target = _inputs(2, jnp.bfloat16)
  rounded = table.astype(jnp.bfloat16).astype(jnp.float32)

  def grads(fn, table, **kw):
    return jax.grad(lambda h, w: jnp.sum(fn(h, w, target, **kw)[0]), (0, 1))(hidden, table)

  got, want = grads(logprobs.score, table, chunk=8), grads(_plain, rounded)
  assert got[0].dtype == jnp.bfloat16 and got[1].dtype == jnp.float32
  assert logprobs.score(hidden, table, target)[0].dtype == jnp.float32
  for g, w in zip(got, want):
    np.testing.assert_allclose(g.astype(jnp.float32), w.astype(jnp.float32),
                               atol=0.02 * float(jnp.abs(w).max()))


def test_no_program_holds_all_logits():
  hidden, table, target = (jnp.zeros((512, 8)), jnp.zeros((4096, 8)), jnp.zeros((512,), jnp.int32))

  def temp_bytes(fn):
    def loss(h, w):
      logprob_N, entropy_N = fn(h, w)
      return jnp.sum(logprob_N + entropy_N)
    program = jax.jit(jax.grad(loss, (0, 1))).lower(hidden, table).compile()
    return program.memory_analysis().temp_size_in_bytes

  whole = 512 * 4096 * 4
  assert temp_bytes(lambda h, w: _plain(h, w, target)) > whole
  assert temp_bytes(lambda h, w: logprobs.score(h, w, target, chunk=32)) < whole / 2


def test_a_chunk_is_as_large_as_the_vocabulary_allows(monkeypatch):
  monkeypatch.setattr(logprobs, '_CHUNK_LOGITS', 16 * 40)
  program = str(jax.make_jaxpr(logprobs.score)(
      jnp.zeros((64, 4)), jnp.zeros((40, 4)), jnp.zeros(64, jnp.int32)))
  assert '16,40]' in program and '64,40]' not in program


def test_blocks_equal_one_another_and_their_table_gradients_add():
  hidden, table, target = _inputs(3)
  blocks = hidden[:36].reshape(3, 12, D), target[:36].reshape(3, 12)

  def total(fn, h, t):
    return jax.value_and_grad(lambda w: jnp.sum(fn(h, w, t, chunk=5)[0]))(table)

  got = total(logprobs.score_blocks, *blocks)
  want = total(logprobs.score, hidden[:36], target[:36])
  np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
  np.testing.assert_allclose(got[1], want[1], atol=1e-5)


def test_a_table_split_over_the_vocabulary_gives_the_same_and_is_not_gathered():
  mesh = sharding.make_mesh(2, 1, 4)
  hidden, table, target = _inputs(4)
  hidden, target, table = hidden[:36].reshape(2, 18, D), target[:36].reshape(2, 18), table[:100]
  target = target % 100

  def loss(h, w):
    logprob_BT, entropy_BT = logprobs.score_blocks(h, w, target, chunk=6)
    return jnp.sum(logprob_BT) + 0.1 * jnp.sum(entropy_BT)

  want = jax.value_and_grad(loss, (0, 1))(hidden, table)
  put = (jax.device_put(hidden, NamedSharding(mesh, P('data'))),
         jax.device_put(table, NamedSharding(mesh, P('tensor'))))
  program = jax.jit(jax.value_and_grad(loss, (0, 1)),
                    out_shardings=(None, jax.tree.map(lambda x: x.sharding, put)))
  got = program(*put)
  for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
    np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5)
  text = program.lower(*put).compile().as_text()
  assert 'all-reduce' in text and 'all-gather' not in text


def test_hostile_shapes_are_refused():
  hidden, table, target = _inputs()
  with pytest.raises(ValueError, match='one target per hidden state'):
    logprobs.score(hidden, table, target[:-1])
  with pytest.raises(ValueError, match='chunk=-1'):
    logprobs.score(hidden, table, target, chunk=-1)


def test_no_token_has_no_log_probability():
  hidden, table, target = _inputs()
  logprob, entropy = logprobs.score(hidden[:0], table, target[:0])
  assert logprob.shape == entropy.shape == (0,)
