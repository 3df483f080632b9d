# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities and entropies of given tokens, without ever holding all their logits.

    hidden_ND, unembed_VD, target_N  --score-->  logprob_N, entropy_N

float32 logits of 8 x 512 tokens take 0.8 GB with 49,152 words and 2.5 GB with 151,936, and plain
differentiation keeps several copies. Here a scan makes the logits of one chunk of tokens at a time,
and the backward pass makes them again from what the forward pass kept: the hidden states and two
numbers per token.
"""

import functools

import jax
import jax.numpy as jnp

# Logits alive at once where `chunk` is 0: 192 MiB of float32, whatever the size of the vocabulary.
_CHUNK_LOGITS = 1024 * 49152


def score(hidden_ND: jax.Array, unembed_VD: jax.Array, target_N: jax.Array, *,
          temperature: float | jax.Array = 1.0, chunk: int = 0) -> tuple[jax.Array, jax.Array]:
  """Log-probability of each target and entropy of its distribution, both float32 [N].

  The distribution is softmax(hidden . unembed / temperature). Both results can be differentiated
  with respect to `hidden_ND` and `unembed_VD`; the temperature gets no gradient and may be traced.

  Products take the dtype of `hidden_ND` (the table is cast to it) and accumulate in float32, so
  that a float32 table keeps a float32 gradient below bfloat16 activations. The table may be sharded
  over the vocabulary: each device keeps its own columns of the logits.

  Args:
    chunk: tokens whose logits exist at the same time; N need not be a multiple. 0 takes as many as
      give 192 MiB of logits.
  """
  logprob_BT, entropy_BT = score_blocks(
      hidden_ND[None], unembed_VD, target_N[None], temperature=temperature, chunk=chunk)
  return logprob_BT[0], entropy_BT[0]


def score_blocks(hidden_BTD: jax.Array, unembed_VD: jax.Array, target_BT: jax.Array, *,
                 temperature: float | jax.Array = 1.0, chunk: int = 0,
                 ) -> tuple[jax.Array, jax.Array]:
  """`score` for B blocks of T tokens, where each device of a mesh holds whole blocks.

  The scan runs over T, and every block collects the gradient of the table on its own; their sum is
  one reduction at the end instead of one in every chunk. That costs B times the size of the table,
  so B is the number of data shards, not the number of sequences.

  Raises ValueError for targets of another shape than [B, T], or a negative chunk.
  """
  B, T, _ = hidden_BTD.shape
  if target_BT.shape != (B, T):
    raise ValueError(f'target has shape {target_BT.shape}, but hidden {hidden_BTD.shape} asks for '
                     f'{(B, T)}: one target per hidden state.')
  if chunk < 0:
    raise ValueError(f'chunk={chunk} must be 0 (by the size of the vocabulary) or more.')
  size = min(T or 1, chunk or max(8, _CHUNK_LOGITS // unembed_VD.shape[0] // 8 * 8))
  pad = -T % size
  hidden_BTD = jnp.pad(hidden_BTD, ((0, 0), (0, pad), (0, 0)))
  target_BT = jnp.pad(target_BT, ((0, 0), (0, pad)))
  scale = 1 / jnp.asarray(temperature, jnp.float32)
  logprob_BT, entropy_BT = _score(hidden_BTD, unembed_VD, target_BT, scale, size)
  return logprob_BT[:, :T], entropy_BT[:, :T]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _score(hidden_BTD, unembed_VD, target_BT, scale, size):
  return _forward(hidden_BTD, unembed_VD, target_BT, scale, size)[0]


def _forward(hidden_BTD, unembed_VD, target_BT, scale, size):
  table_VD = unembed_VD.astype(hidden_BTD.dtype)

  def one_chunk(_, x):
    hidden_BTD, target_BT = x
    logit_BTV = _logits(hidden_BTD, table_VD, scale)
    top_BT = jnp.max(logit_BTV, axis=-1)
    low_BTV = logit_BTV - top_BT[..., None]
    weight_BTV = jnp.exp(low_BTV)
    total_BT = jnp.sum(weight_BTV, axis=-1)
    # Relative to the largest logit, so that a sure distribution gets an entropy of 0 and not the
    # rounding of logZ.
    entropy_BT = jnp.log(total_BT) - jnp.sum(weight_BTV * low_BTV, axis=-1) / total_BT
    # A masked sum, not a gather: with a sharded vocabulary it stays on the device.
    found_BT = jnp.sum(jnp.where(_is_target(low_BTV, target_BT), low_BTV, 0), axis=-1)
    return None, (found_BT - jnp.log(total_BT), entropy_BT, top_BT + jnp.log(total_BT))

  _, out = jax.lax.scan(one_chunk, None, (_split(hidden_BTD, size), _split(target_BT, size)))
  logprob_BT, entropy_BT, logz_BT = (_join(x) for x in out)
  kept = (hidden_BTD, unembed_VD, target_BT, scale, logz_BT, entropy_BT)
  return (logprob_BT, entropy_BT), kept


def _backward(size, kept, cotangents):
  hidden_BTD, unembed_VD, target_BT, scale, logz_BT, entropy_BT = kept
  table_VD = unembed_VD.astype(hidden_BTD.dtype)

  def one_chunk(grad_BVD, x):
    hidden_BTD, target_BT, logz_BT, entropy_BT, d_logprob_BT, d_entropy_BT = x
    low_BTV = _logits(hidden_BTD, table_VD, scale) - logz_BT[..., None]
    # d logprob / d logit = [v is target] - p_v;  d entropy / d logit = -p_v (log p_v + entropy)
    pull_BT = d_logprob_BT + d_entropy_BT * entropy_BT
    d_BTV = -jnp.exp(low_BTV) * (pull_BT[..., None] + d_entropy_BT[..., None] * low_BTV)
    d_BTV += jnp.where(_is_target(low_BTV, target_BT), d_logprob_BT[..., None], 0)
    d_BTV = (d_BTV * scale).astype(hidden_BTD.dtype)
    grad_BVD += jnp.einsum('BTV,BTD->BVD', d_BTV, hidden_BTD, preferred_element_type=jnp.float32)
    d_hidden_BTD = jnp.einsum('BTV,VD->BTD', d_BTV, table_VD, preferred_element_type=jnp.float32)
    return grad_BVD, d_hidden_BTD.astype(hidden_BTD.dtype)

  grad_BVD = jnp.zeros((hidden_BTD.shape[0], *unembed_VD.shape), jnp.float32)
  per_token = (hidden_BTD, target_BT, logz_BT, entropy_BT, *cotangents)
  grad_BVD, d_hidden = jax.lax.scan(one_chunk, grad_BVD, [_split(x, size) for x in per_token])
  return _join(d_hidden), jnp.sum(grad_BVD, axis=0).astype(unembed_VD.dtype), None, None


_score.defvjp(_forward, _backward)


def _logits(hidden_BTD, table_VD, scale):
  return scale * jnp.einsum('BTD,VD->BTV', hidden_BTD, table_VD,
                            preferred_element_type=jnp.float32)


def _is_target(logit_BTV, target_BT):
  return jax.lax.broadcasted_iota(jnp.int32, logit_BTV.shape, 2) == target_BT[..., None]


def _split(x, size):
  """[B, T, ...] -> [chunks, B, size, ...], what a scan runs over."""
  return jnp.swapaxes(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 0, 1)


def _join(x):
  x = jnp.swapaxes(x, 0, 1)
  return x.reshape(x.shape[0], -1, *x.shape[3:])
