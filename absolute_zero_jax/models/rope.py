# SPDX-License-Identifier: Apache-2.0
"""Rotary positions: each head's pairs of numbers turn by an angle that grows with the position.

Letters: H head width.
"""

import math

import jax
import jax.numpy as jnp

from absolute_zero_jax.models.config import ModelConfig, RopeScaling


def angles(config: ModelConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Cosines and signed sines [..., H] in float32 of integer positions [...], for `rotate`.

  Both halves hold the H/2 angles; the sines of the first half are negative.
  """
  # Positions become float32: bfloat16 has 8 significant bits, so position 257 would be 256.
  per_position = frequencies(config).reshape((1,) * positions.ndim + (-1,))
  angle = positions[..., None].astype(jnp.float32) * per_position
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  # Made once: joined again wherever they are used, the halves keep XLA:CPU from using vectors.
  return jax.lax.optimization_barrier(
      (jnp.concatenate([cos, cos], -1), jnp.concatenate([-sin, sin], -1)))


def frequencies(config: ModelConfig) -> jax.Array:
  """Radians per position of each of the H/2 pairs. Source: transformers modeling_rope_utils.py."""
  exponents = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
  plain = 1.0 / config.rope_theta**exponents
  scaling: RopeScaling | None = config.rope_scaling
  if scaling is None:
    return plain
  if scaling.kind == 'linear':
    return plain / scaling.factor
  # llama3: long wavelengths are stretched, short ones kept, those between interpolated.
  wavelengths = 2 * math.pi / plain
  low, high = scaling.low_freq_factor, scaling.high_freq_factor
  smooth = (scaling.original_max_positions / wavelengths - low) / (high - low)
  smooth = jnp.clip(smooth, 0.0, 1.0)
  return (1 - smooth) * plain / scaling.factor + smooth * plain


def rotate(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
  """RoPE on [..., heads, H] by `angles`; pairs are (i, i + H/2), as HF 'rotate half'."""
  cos, sin = (a[..., None, :] for a in angles)
  y = x.astype(jnp.float32)
  return (y * cos + jnp.roll(y, y.shape[-1] // 2, -1) * sin).astype(x.dtype)
