# SPDX-License-Identifier: Apache-2.0
"""Causal attention over packed sequences; which kernel does it is named by the caller.

Letters: B sequences, T query tokens, S keys, N query heads, K kv heads, G = N/K, H head width,
C query chunk.
"""

import math

import jax
import jax.numpy as jnp

MASKED = -1e30                  # finite, so that a row without any visible key stays free of NaN
_QUERY_CHUNK = 128
_MAX_CHUNKS = 16


def attend(q_BTNH: jax.Array, k_BKHS: jax.Array, v_BKSH: jax.Array, segments_BT: jax.Array,
           key_segments_BS: jax.Array, *, implementation: str = 'xla') -> jax.Array:
  """Causal attention inside equal non-zero segments; the one call site of every kernel.

  The T queries are the last T of the S keys' tokens.

  Raises ValueError for an unknown implementation.
  """
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(f'attention={implementation!r} is unknown; allowed: {sorted(IMPLEMENTATIONS)}')
  return IMPLEMENTATIONS[implementation](q_BTNH, k_BKHS, v_BKSH, segments_BT, key_segments_BS)


def _attend_xla(q_BTNH, k_BKHS, v_BKSH, segments_BT, key_segments_BS):
  """Masked matmuls in chunks of queries; each chunk reads only the keys up to its end."""
  B, T, N, H = q_BTNH.shape
  K, S = k_BKHS.shape[1], k_BKHS.shape[3]
  q_BKGTH = (q_BTNH * H**-0.5).reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
  chunk = max(_QUERY_CHUNK, math.ceil(T / _MAX_CHUNKS))

  def one(q_BKGCH, k_BKHS, v_BKSH, allowed_BCS):
    C = q_BKGCH.shape[3]
    flat = q_BKGCH.reshape(B, K, -1, H)
    score_BKGCS = jnp.matmul(flat, k_BKHS, preferred_element_type=jnp.float32).reshape(
        B, K, N // K, C, -1)
    prob_BKGCS = jax.nn.softmax(jnp.where(allowed_BCS[:, None, None], score_BKGCS, MASKED), -1)
    flat = prob_BKGCS.astype(v_BKSH.dtype).reshape(B, K, (N // K) * C, -1)
    out = jnp.matmul(flat, v_BKSH, preferred_element_type=jnp.float32)
    return out.reshape(B, K, N // K, C, H).astype(q_BKGCH.dtype)

  # Without it the backward pass of a long layer would hold the probabilities of all its chunks.
  one = jax.checkpoint(one) if T > 8 * _QUERY_CHUNK else one
  outs = []
  for begin in range(0, T, chunk):
    end = min(begin + chunk, T)
    seen = S - T + end
    allowed_BCS = _allowed(segments_BT[:, begin:end], key_segments_BS[:, :seen], S - T + begin)
    outs.append(one(q_BKGTH[:, :, :, begin:end], k_BKHS[..., :seen], v_BKSH[:, :, :seen],
                    allowed_BCS))
  out_BKGTH = jnp.concatenate(outs, 3)
  return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def _attend_cudnn(q_BTNH, k_BKHS, v_BKSH, segments_BT, key_segments_BS):
  """Flash attention of cuDNN; needs an NVIDIA GPU and a 16-bit dtype."""
  allowed_BTS = _allowed(segments_BT, key_segments_BS, k_BKHS.shape[3] - q_BTNH.shape[1])
  return jax.nn.dot_product_attention(
      q_BTNH, k_BKHS.transpose(0, 3, 1, 2), v_BKSH.transpose(0, 2, 1, 3),
      mask=allowed_BTS[:, None], implementation='cudnn')


IMPLEMENTATIONS = {'xla': _attend_xla, 'cudnn': _attend_cudnn}


def _allowed(segments_BT, key_segments_BS, offset):
  """Mask [B, T, S] of a query block whose first query is key number `offset`."""
  T, S = segments_BT.shape[1], key_segments_BS.shape[1]
  causal_TS = jnp.arange(S)[None] <= jnp.arange(T)[:, None] + offset
  same_BTS = segments_BT[:, :, None] == key_segments_BS[:, None]
  return causal_TS[None] & same_BTS & (key_segments_BS > 0)[:, None]
