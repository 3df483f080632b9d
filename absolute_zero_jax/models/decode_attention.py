# SPDX-License-Identifier: Apache-2.0
"""Attention of one decode step over ring caches, as one kernel (Pallas, for NVIDIA GPUs).

    heads of the new token --rotate--> cache slot; scores of the live slots -> softmax -> values

XLA makes six kernels of it, each of two microseconds or more for hardly any work, and reads the
whole ring; this one reads the slots that a row has filled. For 16-bit models; `decoder.Block.step`
holds the same in plain JAX, for everything else.

Letters: as models/decoder.py; X = N + 2 K heads, P parts of a ring that several programs read,
R = G padded to what the matrix units take.
"""

import functools
import math

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from absolute_zero_jax.models import attention

try:
  from jax.experimental.pallas import triton as plgpu
except ImportError:              # JAX means to drop this backend some day
  plgpu = None

_MIN_ROWS = 16                   # of an operand of the matrix units
_BLOCK = 64                      # slots read at a time
_PROGRAMS = 264                  # fewer leave an H100 partly idle: two for each multiprocessor
_MIN_PART = 512                  # slots for which another program is worth its while


def serves(platform: str, dtype: jnp.dtype, head_dim: int, size: int) -> bool:
  """Whether `attend` works on such devices, numbers and rings of `size` slots."""
  return (plgpu is not None and platform == 'gpu' and jnp.dtype(dtype).itemsize == 2
          and head_dim >= 2 * _MIN_ROWS and head_dim & (head_dim - 1) == 0
          and math.gcd(size, _BLOCK) >= _MIN_ROWS)


def attend(heads_BXH: jax.Array, angles: tuple[jax.Array, jax.Array], lengths_B: jax.Array,
           slot: jax.Array, k_BKHS: jax.Array, v_BKSH: jax.Array, *,
           interpret: bool = False) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns (out_BNH, k_BKHS, v_BKSH); the caches are changed in place.

  Args:
    heads_BXH: queries, keys and values of the new tokens, not yet rotated.
    angles: see `rope.angles`.
    lengths_B: tokens of each row before this one. Only they are seen.
    slot: where the new keys and values go.
    interpret: run it as plain JAX, on any device.
  """
  B, X, H = heads_BXH.shape
  K, S = k_BKHS.shape[1], k_BKHS.shape[3]
  N = X - 2 * K
  G = N // K
  R = max(_MIN_ROWS, pl.next_power_of_2(G))
  P = max(1, min(_PROGRAMS // (B * K), S // _MIN_PART))
  whole = pl.BlockSpec(memory_space=pl.ANY)
  per_head = pl.BlockSpec((None, None, None, R), lambda b, k, p: (p, b, k, 0))
  out_PBKGH, top_PBKG, total_PBKG, k_BKHS, v_BKSH = pl.pallas_call(
      functools.partial(_kernel, block=math.gcd(S, _BLOCK), rows=R),
      grid=(B, K, P),
      in_specs=[whole] * 7,
      out_shape=[
          jax.ShapeDtypeStruct((P, B, K, G, H), jnp.float32 if P > 1 else heads_BXH.dtype),
          jax.ShapeDtypeStruct((P, B, K, G), jnp.float32),
          jax.ShapeDtypeStruct((P, B, K, G), jnp.float32),
          jax.ShapeDtypeStruct(k_BKHS.shape, k_BKHS.dtype),
          jax.ShapeDtypeStruct(v_BKSH.shape, v_BKSH.dtype)],
      out_specs=[pl.BlockSpec((None, None, None, R, H), lambda b, k, p: (p, b, k, 0, 0)),
                 per_head, per_head, whole, whole],
      input_output_aliases={5: 3, 6: 4},
      compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
      interpret=interpret, name='attend_step')(
          heads_BXH, *angles, lengths_B, slot.reshape(1), k_BKHS, v_BKSH)
  if P > 1:
    share = jnp.exp(top_PBKG - jnp.max(top_PBKG, 0, keepdims=True)) * total_PBKG
    share = share / jnp.sum(share, 0, keepdims=True)
    out = jnp.sum(out_PBKGH * share[..., None], 0).astype(heads_BXH.dtype)
  else:
    out = out_PBKGH
  return out.reshape(B, N, H), k_BKHS, v_BKSH


def _kernel(heads_ref, cos_ref, sin_ref, length_ref, slot_ref, old_k_ref, old_v_ref, out_ref,
            top_ref, total_ref, k_ref, v_ref, *, block, rows):
  """One row, one kv head with its queries, one part of the ring."""
  b, n, part = (pl.program_id(axis) for axis in range(3))
  X = heads_ref.shape[1]
  K, H, S = old_k_ref.shape[1:]
  N, G, half = X - 2 * K, (X - 2 * K) // K, H // 2
  dtype = old_k_ref.dtype
  length, slot = length_ref[b], slot_ref[0]
  # Everything along the head is two halves, since rotation pairs them.
  halves = pl.ds(0, half), pl.ds(half, half)
  cos, sin = cos_ref[b, halves[1]], sin_ref[b, halves[1]]
  head_R, column_H = jnp.minimum(n * G + jnp.arange(rows), X - 1), jnp.arange(half)

  def rotated(x1, x2, cos, sin):
    x1, x2 = x1.astype(jnp.float32), x2.astype(jnp.float32)
    return (x1 * cos - x2 * sin).astype(dtype), (x2 * cos + x1 * sin).astype(dtype)

  q1, q2 = rotated(*(plgpu.load(heads_ref.at[b, head_R[:, None], (column_H + begin)[None]])
                     for begin in (0, half)), cos[None], sin[None])
  k1, k2 = rotated(*(heads_ref[b, N + n, h] for h in halves), cos, sin)
  v = heads_ref[b, N + K + n, :].astype(dtype)
  # All parts write the same. What they read from this slot may be old or new, so it is replaced.
  k_ref[b, n, halves[0], slot], k_ref[b, n, halves[1], slot] = k1, k2
  v_ref[b, n, slot, :] = v
  wide = lambda x: x.astype(jnp.float32)
  own_R = jnp.sum(wide(q1) * wide(k1)[None] + wide(q2) * wide(k2)[None], 1)

  # The blocks of the ring from the row's oldest slot to the newest, shared among the parts.
  blocks = S // block
  first = (slot - length + S) // block
  count = jnp.minimum((slot + S) // block - first + 1, blocks)
  each = (count + pl.num_programs(2) - 1) // pl.num_programs(2)

  def step(i, carry):
    top_R, total_R, out_RH = carry
    begin = (first + i) % blocks * block
    slots, place_S = pl.ds(begin, block), begin + jnp.arange(block)
    score_RS = (plgpu.dot(q1, plgpu.load(old_k_ref.at[b, n, halves[0], slots]))
                + plgpu.dot(q2, plgpu.load(old_k_ref.at[b, n, halves[1], slots])))
    score_RS = jnp.where((place_S == slot)[None], own_R[:, None], score_RS) * H**-0.5
    age_S = slot - place_S + jnp.where(place_S > slot, S, 0)
    score_RS = jnp.where((age_S <= length)[None], score_RS, attention.MASKED)
    v_SH = plgpu.load(old_v_ref.at[b, n, slots, :])
    v_SH = jnp.where((place_S == slot)[:, None], v[None], v_SH)
    new_top_R = jnp.maximum(top_R, jnp.max(score_RS, 1))
    weight_RS = jnp.exp(score_RS - new_top_R[:, None])
    keep_R = jnp.exp(top_R - new_top_R)
    out_RH = out_RH * keep_R[:, None] + plgpu.dot(weight_RS.astype(dtype), v_SH)
    return new_top_R, total_R * keep_R + jnp.sum(weight_RS, 1), out_RH

  top_R, total_R, out_RH = jax.lax.fori_loop(
      part * each, jnp.minimum((part + 1) * each, count), step,
      (jnp.full((rows,), attention.MASKED, jnp.float32), jnp.zeros((rows,), jnp.float32),
       jnp.zeros((rows, H), jnp.float32)))
  out_RH = out_RH / jnp.maximum(total_R, 1e-30)[:, None]
  is_head_R = jnp.arange(rows) < G
  plgpu.store(out_ref, out_RH.astype(out_ref.dtype), mask=is_head_R[:, None])
  plgpu.store(top_ref, top_R, mask=is_head_R)
  plgpu.store(total_ref, total_R, mask=is_head_R)
