# SPDX-License-Identifier: Apache-2.0
"""Causal attention over packed sequences; which kernel does it is named by the caller.

Letters: B sequences, T query tokens, S keys, N query heads, K kv heads, G = N/K, H head width,
C query chunk.
"""

import functools
import math

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jax.sharding import Mesh

from absolute_zero_jax import sharding

# A segment number is GROUP * group + member. Member 0 is the part that all members of a group see.
GROUP = 256
MASKED = -1e30                  # finite, so that a row without any visible key stays free of NaN
_QUERY_CHUNK = 128
_MAX_CHUNKS = 16
_SPLASH_TILE = 128              # of queries and of keys; a block is a few
_SPLASH_BLOCK = 512


def attend(q_BTNH: jax.Array, k_BKHS: jax.Array, v_BKSH: jax.Array, segments_BT: jax.Array,
           key_segments_BS: jax.Array, *, packed: bool = True, implementation: str = 'xla',
           mesh: Mesh | None = None) -> jax.Array:
  """Causal attention inside equal non-zero segments; the one call site of every kernel.

  A token of segment `GROUP * g + m` also sees the tokens of segment `GROUP * g` (g > 0) that stand
  before it: so the answers of a group share one copy of their prompt. Numbers below `GROUP` have no
  such part.

  The T queries are the last T of the S keys' tokens. `packed` False promises that every row is one
  segment with its padding behind it, of which a kernel may make use. `mesh` is what the arrays are
  split over, for kernels that the partitioner cannot split.

  Raises ValueError for an unknown implementation.
  """
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(f'attention={implementation!r} is unknown; allowed: {sorted(IMPLEMENTATIONS)}')
  return IMPLEMENTATIONS[implementation](q_BTNH, k_BKHS, v_BKSH, segments_BT, key_segments_BS,
                                         packed, mesh)


def _attend_xla(q_BTNH, k_BKHS, v_BKSH, segments_BT, key_segments_BS, packed, mesh):
  """Masked matmuls in chunks of queries; each chunk reads only the keys up to its end."""
  B, T, N, H = q_BTNH.shape
  K = k_BKHS.shape[1]
  q_BKGTH = (q_BTNH * H**-0.5).reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
  out_BKGTH = _chunked(q_BKGTH, k_BKHS, v_BKSH, segments_BT, key_segments_BS)
  return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


@jax.custom_vjp
def _chunked(q_BKGTH, k_BKHS, v_BKSH, segments_BT, key_segments_BS):
  return _chunked_forward(q_BKGTH, k_BKHS, v_BKSH, segments_BT, key_segments_BS)[0]


def _chunked_forward(q_BKGTH, k_BKHS, v_BKSH, segments_BT, key_segments_BS):
  """The backward pass makes the probabilities again from the logZ of each query."""
  outs, logzs = [], []
  for begin, end, seen in _chunks(q_BKGTH, k_BKHS):
    score = _scores(q_BKGTH[:, :, :, begin:end], k_BKHS[..., :seen],
                    segments_BT[:, begin:end], key_segments_BS[:, :seen])
    top = jnp.max(score, axis=-1, keepdims=True)
    weight = jnp.exp(score - top)
    total = jnp.sum(weight, axis=-1, keepdims=True)
    out = _matmul(weight.astype(v_BKSH.dtype), v_BKSH[:, :, :seen]) / total
    outs.append(_unfold(out, end - begin).astype(q_BKGTH.dtype))
    logzs.append(_unfold(top + jnp.log(total), end - begin))
  # Named, so that a remat policy may keep them: all that the backward pass needs of this one.
  out_BKGTH = checkpoint_name(jnp.concatenate(outs, 3), 'attention')
  logz_BKGT1 = checkpoint_name(jnp.concatenate(logzs, 3), 'attention')
  kept = (q_BKGTH, k_BKHS, v_BKSH, segments_BT, key_segments_BS, out_BKGTH, logz_BKGT1)
  return out_BKGTH, kept


def _chunked_backward(kept, d_BKGTH):
  q_BKGTH, k_BKHS, v_BKSH, segments_BT, key_segments_BS, out_BKGTH, logz_BKGT1 = kept
  dtype = q_BKGTH.dtype
  pull_BKGT1 = jnp.sum(d_BKGTH.astype(jnp.float32) * out_BKGTH, axis=-1, keepdims=True)
  d_qs, d_k, d_v = [], jnp.zeros(k_BKHS.shape, jnp.float32), jnp.zeros(v_BKSH.shape, jnp.float32)
  for begin, end, seen in _chunks(q_BKGTH, k_BKHS):
    part = (slice(None),) * 3 + (slice(begin, end),)
    score = _scores(q_BKGTH[part], k_BKHS[..., :seen],
                    segments_BT[:, begin:end], key_segments_BS[:, :seen])
    q, d, pull, logz = (_fold(x[part]) for x in (q_BKGTH, d_BKGTH, pull_BKGT1, logz_BKGT1))
    prob = jnp.where(score > MASKED, jnp.exp(score - logz), 0)
    d_prob = _matmul(d, v_BKSH[:, :, :seen].swapaxes(2, 3))
    d_score = (prob * (d_prob - pull)).astype(dtype)
    d_qs.append(_unfold(_matmul(d_score, k_BKHS[..., :seen].swapaxes(2, 3)), end - begin))
    rest = (0, k_BKHS.shape[3] - seen)
    d_k += jnp.pad(_matmul(q.swapaxes(2, 3), d_score), ((0, 0),) * 3 + (rest,))
    d_v += jnp.pad(_matmul(prob.astype(dtype).swapaxes(2, 3), d), ((0, 0),) * 2 + (rest, (0, 0)))
  return (jnp.concatenate(d_qs, 3).astype(dtype), d_k.astype(k_BKHS.dtype),
          d_v.astype(v_BKSH.dtype), None, None)


_chunked.defvjp(_chunked_forward, _chunked_backward)


def _chunks(q_BKGTH, k_BKHS):
  """(first query, end, keys seen) of each chunk."""
  T, S = q_BKGTH.shape[3], k_BKHS.shape[3]
  size = max(_QUERY_CHUNK, math.ceil(T / _MAX_CHUNKS))
  for begin in range(0, T, size):
    end = min(begin + size, T)
    yield begin, end, S - T + end


def _scores(q_BKGCH, k_BKHS, segments_BC, key_segments_BS):
  """Scores [B, K, G * C, S] in float32, `MASKED` where the key is not for the query."""
  B, _, G, C, _ = q_BKGCH.shape
  S = k_BKHS.shape[3]
  allowed_BCS = _allowed(segments_BC, key_segments_BS, S - C)
  allowed = jnp.broadcast_to(allowed_BCS[:, None], (B, G, C, S)).reshape(B, 1, G * C, S)
  return jnp.where(allowed, _matmul(_fold(q_BKGCH), k_BKHS), MASKED)


def _matmul(x, y):
  return jnp.matmul(x, y, preferred_element_type=jnp.float32)


def _fold(x_BKGCH):
  """The G query heads of a kv head as more rows: [B, K, G * C, H]."""
  B, K, G, C, H = x_BKGCH.shape
  return x_BKGCH.reshape(B, K, G * C, H)


def _unfold(x, C):
  B, K, _, H = x.shape
  return x.reshape(B, K, -1, C, H)


def _attend_cudnn(q_BTNH, k_BKHS, v_BKSH, segments_BT, key_segments_BS, packed, mesh):
  """Flash attention of cuDNN; needs an NVIDIA GPU and a 16-bit dtype."""
  T, S = q_BTNH.shape[1], k_BKHS.shape[3]
  if packed or T < S:
    # A mask is read as an array of T * S numbers, and what it hides is computed all the same.
    which = {'mask': _allowed(segments_BT, key_segments_BS, S - T)[:, None]}
  else:
    lengths_B = jnp.maximum(jnp.sum(segments_BT > 0, -1, dtype=jnp.int32), 1)
    which = {'is_causal': True, 'query_seq_lengths': lengths_B, 'key_value_seq_lengths': lengths_B}
  return jax.nn.dot_product_attention(
      q_BTNH, k_BKHS.transpose(0, 3, 1, 2), v_BKSH.transpose(0, 2, 1, 3), **which,
      implementation='cudnn')


def _attend_splash(q_BTNH, k_BKHS, v_BKSH, segments_BT, key_segments_BS, packed, mesh):
  """Splash attention, JAX's Pallas kernel for TPUs; equal segments only, so no shared prompts."""
  N, H, K = *q_BTNH.shape[2:], k_BKHS.shape[1]
  q_BNTH = (q_BTNH * H**-0.5).transpose(0, 2, 1, 3)
  k_BKSH = k_BKHS.swapaxes(2, 3)
  args = q_BNTH, k_BKSH, v_BKSH, segments_BT, key_segments_BS
  one = functools.partial(_splash, interpret=sharding.platform(mesh) == 'cpu')
  if mesh is None:
    return one(*args).transpose(0, 2, 1, 3)
  if K % mesh.shape['tensor']:           # a shard of the queries needs its own keys
    args = q_BNTH, *(jnp.repeat(x, N // K, 1) for x in (k_BKSH, v_BKSH)), *args[3:]
  heads, rows = ('batch', 'heads', None, None), ('batch', None)
  specs = tuple(sharding.partition(heads if x.ndim == 4 else rows, x.shape, mesh) for x in args)
  out_BNTH = jax.shard_map(one, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False)(
      *args)
  return out_BNTH.transpose(0, 2, 1, 3)


def _splash(q_BNTH, k_BKSH, v_BKSH, segments_BT, key_segments_BS, *, interpret):
  from jax.experimental.pallas.ops.tpu import splash_attention
  T, S = q_BNTH.shape[2], k_BKSH.shape[2]
  # What is added stands behind everything, where nothing looks at it.
  q_BNTH, k_BKSH, v_BKSH = (_to_tiles(x, 2) for x in (q_BNTH, k_BKSH, v_BKSH))
  segments = splash_attention.SegmentIds(
      _to_tiles(segments_BT, 1), _to_tiles(key_segments_BS, 1))
  N, long_T, long_S = q_BNTH.shape[1], q_BNTH.shape[2], k_BKSH.shape[2]
  mask = splash_attention.CausalMask((long_T, long_S), offset=S - T)
  size_T, size_S = (math.gcd(n, _SPLASH_BLOCK) for n in (long_T, long_S))
  kernel = splash_attention.make_splash_mha(
      splash_attention.MultiHeadMask([mask] * N), head_shards=1, q_seq_shards=1,
      block_sizes=splash_attention.BlockSizes(
          block_q=size_T, block_kv=size_S, block_q_dkv=size_T, block_kv_dkv=size_S,
          block_q_dq=size_T, block_kv_dq=size_S),
      residual_checkpoint_name='attention', interpret=interpret)
  return jax.vmap(kernel)(q_BNTH, k_BKSH, v_BKSH, segments)[:, :, :T]


def _to_tiles(x, axis):
  pad = [(0, 0)] * x.ndim
  pad[axis] = (0, -x.shape[axis] % _SPLASH_TILE)
  return jnp.pad(x, pad)


IMPLEMENTATIONS = {'xla': _attend_xla, 'cudnn': _attend_cudnn, 'splash': _attend_splash}


def _allowed(segments_BT, key_segments_BS, offset):
  """Mask [B, T, S] of a query block whose first query is key number `offset`."""
  T, S = segments_BT.shape[1], key_segments_BS.shape[1]
  causal_TS = jnp.arange(S)[None] <= jnp.arange(T)[:, None] + offset
  query_BT1, key_B1S = segments_BT[:, :, None], key_segments_BS[:, None]
  shared_BTS = query_BT1 // GROUP * GROUP == key_B1S
  return causal_TS[None] & ((query_BT1 == key_B1S) | shared_BTS) & (key_B1S > 0)
