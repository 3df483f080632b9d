# SPDX-License-Identifier: Apache-2.0
"""The decoder: LLaMA 2/3, SmolLM2, Qwen2/2.5 and Qwen3 as one Flax Linen module with flags.

    tokens_BT --embed--> x_BTD --L x Block (scanned)--> --final_norm--> hidden_BTD --unembed--> V

Parameters are stacked over layers for `nn.scan`; the module's partitioning metadata is the one
table of shapes and axes that initialisation, weight files and shardings read (`param_specs`).
Training and scoring call `hidden`; the sampler calls `prefill`, and `Block.step` layer by layer.

Letters: B sequences, T query tokens, S key slots, D width, N query heads, K kv heads, G = N/K,
H head width, F ffn width, V vocabulary, L layers, C query chunk.
"""

import functools
import math
from typing import Any, NamedTuple

from flax import linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jax.sharding import Mesh

from absolute_zero_jax import sharding
from absolute_zero_jax.models import attention as attention_lib
from absolute_zero_jax.models import decode_attention, rope
from absolute_zero_jax.models.config import ModelConfig

Params = dict[str, Any]
# Models of no more layers are unrolled where nothing is rematerialised: a loop copies what the
# backward pass keeps of each layer into arrays over all layers, which it first fills with zeros.
_UNROLLED = 8


class Spec(NamedTuple):
  """Shape of one parameter, and the logical name of each of its axes."""
  shape: tuple[int, ...]
  axes: tuple[str, ...]


class Block(nn.Module):
  """One transformer layer: attention and gated feed-forward, each behind an RMS norm.

  Attributes:
    fused: for `step` alone: q, k, v (and gate, up) are one flat matrix each, and all matrices are
      stored [outputs, inputs], as `decoding.weights` lays them out.
    weights_first: `fused` matrices are the left operand, which is for float32 on a CPU (see
      `product`).
    kernel: attention of `step` is `decode_attention`, where that serves.
    collect: also return this layer's rotated keys and values.
    packed: see `attention.attend`.
  """
  config: ModelConfig
  dtype: Any = jnp.float32
  attention: str = 'xla'
  fused: bool = False
  weights_first: bool = False
  kernel: bool = False
  collect: bool = False
  packed: bool = True
  mesh: Mesh | None = None

  def setup(self):
    c = self.config
    D, N, K, H, F = c.embed, c.heads, c.kv_heads, c.head_dim, c.ffn
    weight, one, zero = nn.initializers.normal(0.02), nn.initializers.ones, nn.initializers.zeros
    qkv = (('q', N, 'heads'), ('k', K, 'kv_heads'), ('v', K, 'kv_heads'))
    table = {'attn_norm': (one, (D,), ('norm',)), 'ffn_norm': (one, (D,), ('norm',))}
    if self.fused:
      table |= {'qkv': (weight, ((N + 2 * K) * H, D), ('heads', 'embed')),
                'o': (weight, (D, N * H), ('embed', 'heads')),
                'gate_up': (weight, (2 * F, D), ('ffn', 'embed')),
                'down': (weight, (D, F), ('embed', 'ffn'))}
      if c.qkv_bias:
        table['qkv_bias'] = (zero, ((N + 2 * K) * H,), ('heads',))
    else:
      table |= {name: (weight, (D, n, H), ('embed', axis, 'head_dim')) for name, n, axis in qkv}
      table |= {'o': (weight, (N, H, D), ('heads', 'head_dim', 'embed')),
                'gate': (weight, (D, F), ('embed', 'ffn')),
                'up': (weight, (D, F), ('embed', 'ffn')),
                'down': (weight, (F, D), ('ffn', 'embed'))}
      if c.qkv_bias:
        table |= {f'{name}_bias': (zero, (n, H), (axis, 'head_dim')) for name, n, axis in qkv}
    if c.qk_norm:
      table |= {'q_norm': (one, (H,), ('norm',)), 'k_norm': (one, (H,), ('norm',))}
    w = {name: self.param(name, nn.with_logical_partitioning(init, axes), shape)
         for name, (init, shape, axes) in table.items()}
    # Adapters (see `lora`) are merged here, inside the scan: the merged matrix and its gradient
    # exist for one layer at a time.
    if self.has_variable('params', 'lora'):
      for name, pair in self.get_variable('params', 'lora').items():
        w[name] = (w[name] + jnp.tensordot(pair['a'], pair['b'], 1)).astype(w[name].dtype)
    self.w = w

  def __call__(self, x_BTD, prefix, angles, segments_BT, prefix_segments_BP):
    """The layer on whole sequences. Returns (x_BTD, (k_BKHT, v_BKTH) or None).

    `prefix` is None, or keys and values (k_BKHP, v_BKPH) that every query may see.
    """
    q_BTNH, k_BTKH, v_BTKH = self._qkv(x_BTD, angles)
    k_BKHS, v_BKSH = own = k_BTKH.transpose(0, 2, 3, 1), v_BTKH.transpose(0, 2, 1, 3)
    key_segments_BS = segments_BT
    if prefix is not None:
      k_BKHS = jnp.concatenate([prefix[0], k_BKHS], 3)
      v_BKSH = jnp.concatenate([prefix[1], v_BKSH], 2)
      key_segments_BS = jnp.concatenate([prefix_segments_BP, segments_BT], 1)
    out_BTNH = attention_lib.attend(q_BTNH, k_BKHS, v_BKSH, segments_BT, key_segments_BS,
                                    packed=self.packed, implementation=self.attention,
                                    mesh=self.mesh)
    x_BTD = x_BTD + self._out(out_BTNH)
    x_BTD = sharding.constrain(x_BTD + self._ffn(x_BTD), ('batch', None, None), self.mesh)
    return x_BTD, own if self.collect else None

  def step(self, x_BD, angles, lengths_B, slot, k_BKHS, v_BKSH):
    """The layer on one new token per sequence, whose key and value go to cache slot `slot`.

    It sees the `lengths_B` tokens before it. Returns (x_BD, k_BKHS, v_BKSH).
    """
    if self.kernel:
      heads_BXH = jnp.concatenate(self._heads(x_BD), 1)
      out_BNH, k_BKHS, v_BKSH = decode_attention.attend(heads_BXH, angles, lengths_B, slot, k_BKHS,
                                                        v_BKSH)
    else:
      out_BNH, k_BKHS, v_BKSH = self._attend_step(x_BD, angles, lengths_B, slot, k_BKHS, v_BKSH)
    x_BD = x_BD + self._out(out_BNH)
    return x_BD + self._ffn(x_BD), k_BKHS, v_BKSH

  def _attend_step(self, x_BD, angles, lengths_B, slot, k_BKHS, v_BKSH):
    q_BNH, k_BKH, v_BKH = self._qkv(x_BD, angles)
    B, N, H = q_BNH.shape
    S = k_BKHS.shape[3]
    age_S = (slot - jnp.arange(S)) % S
    bias_BS = jnp.where(age_S[None] <= lengths_B[:, None], 0.0, attention_lib.MASKED)
    K = k_BKH.shape[1]
    put = jax.lax.dynamic_update_slice_in_dim
    k_BKHS = put(k_BKHS, k_BKH.astype(k_BKHS.dtype)[..., None], slot, 3)
    v_BKSH = put(v_BKSH, v_BKH.astype(v_BKSH.dtype)[:, :, None], slot, 2)
    q_BKGH = (q_BNH * H**-0.5).reshape(B, K, N // K, H).astype(k_BKHS.dtype)
    score_BKGS = jnp.matmul(q_BKGH, k_BKHS, preferred_element_type=jnp.float32)
    prob_BKGS = jax.nn.softmax(score_BKGS + bias_BS[:, None, None], -1).astype(v_BKSH.dtype)
    out_BKGH = jnp.matmul(prob_BKGS, v_BKSH, preferred_element_type=jnp.float32)
    return out_BKGH.reshape(B, N, H).astype(self.dtype), k_BKHS, v_BKSH

  def _qkv(self, x, angles):
    """Rotated queries and keys, and values, [..., heads, H], of the input [..., D]."""
    q, k, v = self._heads(x)
    return rope.rotate(q, angles), rope.rotate(k, angles), v

  def _heads(self, x):
    """As `_qkv`, not yet rotated."""
    c = self.config
    h = rms_norm(x, self.w['attn_norm'], c.norm_eps)
    if self.fused:
      flat = self._dot(h, self.w['qkv'])
      if c.qkv_bias:
        flat = self._add(flat, self.w['qkv_bias'])
      flat = flat.reshape(*h.shape[:-1], -1, c.head_dim)
      q, k, v = jnp.split(flat, [c.heads, c.heads + c.kv_heads], -2)
    else:
      q, k, v = (self._dot(h, self.w[name]) for name in 'qkv')
      if c.qkv_bias:
        q, k, v = (self._add(y, self.w[f'{name}_bias']) for y, name in zip((q, k, v), 'qkv'))
    if c.qk_norm:
      q = rms_norm(q, self.w['q_norm'], c.norm_eps)
      k = rms_norm(k, self.w['k_norm'], c.norm_eps)
    return q, k, v

  def _out(self, out):
    if self.fused:
      out = out.reshape(*out.shape[:-2], -1)
      return self._dot(out, self.w['o'])
    return self._dot(out, self.w['o'], axes=2)

  def _ffn(self, x):
    h = rms_norm(x, self.w['ffn_norm'], self.config.norm_eps)
    if self.fused:
      gate, up = jnp.split(self._dot(h, self.w['gate_up']), 2, -1)
    else:
      gate, up = self._dot(h, self.w['gate']), self._dot(h, self.w['up'])
    return self._dot(jax.nn.silu(gate) * up, self.w['down'])

  def _dot(self, x, w, axes=1):
    if self.fused:
      return product(x.astype(self.dtype), w, self.weights_first)
    return checkpoint_name(linear(x.astype(self.dtype), w, axes), 'dot')

  def _add(self, x, bias):
    # In float32, so that the gradient of the bias is added up over the tokens in float32.
    bias = bias.astype(jnp.float32).reshape((1,) * (x.ndim - bias.ndim) + bias.shape)
    return (x.astype(jnp.float32) + bias).astype(self.dtype)


class Decoder(nn.Module):
  """Token ids to final hidden states; the parameter tree is the stored one.

  Attributes:
    dtype: of activations and matmul inputs; norms, softmax and accumulation stay float32.
    remat: 'none' keeps all activations for the backward pass, 'full' only each layer's input,
      'dots' also the results of weight matmuls and of attention.
    attention: key of `attention.IMPLEMENTATIONS`.
    packed: see `attention.attend`.
    mesh: constrains activations to rows over data and fsdp; None leaves layout to the compiler.
  """
  config: ModelConfig
  dtype: Any = jnp.float32
  remat: str = 'none'
  attention: str = 'xla'
  collect: bool = False
  packed: bool = True
  mesh: Mesh | None = None

  @nn.compact
  def __call__(self, tokens_BT, positions_BT, segments_BT, prefix=None, prefix_segments_BP=None):
    """Returns hidden_BTD after the final norm, and the stacked (k_LBKHT, v_LBKTH) or None."""
    c = self.config
    init = nn.initializers.normal(0.02)
    table = nn.with_logical_partitioning(init, ('vocab', 'embed'))
    embed_VD = self.param('embed', table, (c.vocab, c.embed))
    if not c.tied:
      self.param('unembed', table, (c.vocab, c.embed))
    # Gathering the rows of a table that is split both ways makes the partitioner replicate the
    # result; gathering its width first is the cheap way round.
    embed_VD = sharding.constrain(embed_VD, ('vocab', None), self.mesh)
    # Cast after the gather, so that the gradients of equal tokens are added up in float32.
    x_BTD = embed_VD[tokens_BT].astype(self.dtype)
    x_BTD = sharding.constrain(x_BTD, ('batch', None, None), self.mesh)
    stack = nn.scan(_remat(self.remat), length=c.layers, variable_axes={'params': 0},
                    split_rngs={'params': True}, in_axes=(0, *(nn.broadcast,) * 3), out_axes=0,
                    unroll=c.layers if self.remat == 'none' and c.layers <= _UNROLLED else 1,
                    metadata_params={nn.PARTITION_NAME: 'layers'})
    block = stack(c, self.dtype, self.attention, collect=self.collect, packed=self.packed,
                  mesh=self.mesh, name='layers')
    x_BTD, cache = block(x_BTD, prefix, rope.angles(c, positions_BT), segments_BT,
                         prefix_segments_BP)
    norm = nn.with_logical_partitioning(nn.initializers.ones, ('norm',))
    gain_D = self.param('final_norm', norm, (c.embed,))
    return rms_norm(x_BTD, gain_D, c.norm_eps), cache


def param_specs(config: ModelConfig) -> Params:
  """The parameter tree as `Spec`s, without making an array."""
  one = jnp.zeros((1, 1), jnp.int32)
  boxes = jax.eval_shape(Decoder(config).init, jax.random.key(0), one, one, one)['params']
  return jax.tree.map(lambda b: Spec(tuple(b.value.shape), tuple(b.names)), boxes,
                      is_leaf=lambda b: isinstance(b, nn.LogicallyPartitioned))


@functools.partial(jax.jit, static_argnames=('config', 'dtype'))
def init(config: ModelConfig, key: jax.Array, dtype: Any = jnp.float32) -> Params:
  """Random parameters: normal(0, 0.02) for matrices, ones for norms, zeros for biases (as HF)."""
  one = jnp.zeros((1, 1), jnp.int32)
  params = nn.unbox(Decoder(config).init(key, one, one, one)['params'])
  return jax.tree.map(lambda x: x.astype(dtype), params)


def hidden(config: ModelConfig, params: Params, tokens_BT: jax.Array,
           positions_BT: jax.Array, segments_BT: jax.Array, *, dtype: Any = jnp.float32,
           remat: str = 'none', attention: str = 'xla', packed: bool = True,
           mesh: Mesh | None = None) -> jax.Array:
  """Final hidden states [B, T, D], after the last norm, in `dtype`.

  A token sees the tokens before it in its row that have its segment number; 0 is padding, whose
  outputs are finite and mean nothing; from `attention.GROUP` on, numbers say more (see
  `attention.attend`). Positions count from 0 in each segment, so padding and
  packing change no number.
  """
  module = Decoder(config, dtype, remat, attention, packed=packed, mesh=mesh)
  return module.apply({'params': params}, tokens_BT, positions_BT, segments_BT)[0]


def unembed(params: Params) -> jax.Array:
  """The output table [V, D]: its own, or the embedding of a tied model."""
  return params['unembed'] if 'unembed' in params else params['embed']


def logits(config: ModelConfig, params: Params, tokens_BT: jax.Array,
           positions_BT: jax.Array | None = None, segments_BT: jax.Array | None = None,
           **options: Any) -> jax.Array:
  """Logits [B, T, V] in float32, for small inputs; default: one unpadded segment per row."""
  if positions_BT is None:
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None], tokens_BT.shape)
  if segments_BT is None:
    segments_BT = jnp.ones_like(tokens_BT)
  x_BTD = hidden(config, params, tokens_BT, positions_BT, segments_BT, **options)
  return jnp.einsum('BTD,VD->BTV', x_BTD, unembed(params).astype(x_BTD.dtype),
                    preferred_element_type=jnp.float32)


def prefill(config: ModelConfig, params: Params, tokens_BT: jax.Array, positions_BT: jax.Array,
            segments_BT: jax.Array, prefix: tuple[jax.Array, jax.Array] | None = None,
            prefix_segments_BP: jax.Array | None = None, *, dtype: Any = jnp.float32,
            attention: str = 'xla', mesh: Mesh | None = None) -> tuple[jax.Array, jax.Array]:
  """Rotated keys [L, B, K, H, T] and values [L, B, K, T, H] of the tokens, for a cache.

  `prefix` holds keys and values of tokens that stand before every row; it is seen where
  `prefix_segments_BP` equals the query's segment.
  """
  module = Decoder(config, dtype, attention=attention, collect=True, mesh=mesh)
  return module.apply({'params': params}, tokens_BT, positions_BT, segments_BT, prefix,
                      prefix_segments_BP)[1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def linear(x: jax.Array, w: jax.Array, axes: int = 1) -> jax.Array:
  """Contracts the last `axes` of x with the first of w, in x's dtype, accumulating in float32.

  The gradient is written out because the one autodiff makes for `w` is a transposed product, for
  which XLA:CPU first copies its operands: the backward pass of a layer takes 1.4 times as long. Of
  two axes it does so for the same reason: a product of matrices alone reads them as they lie.
  """
  y = _contract(_flat(x, axes), _flat(w, w.ndim - axes).astype(x.dtype), (1,), (0,))
  return y.reshape(*x.shape[:x.ndim - axes], *w.shape[axes:])


def _linear_forward(x, w, axes):
  return linear(x, w, axes), (x, w)


def _linear_backward(axes, kept, d_y):
  x, w = kept
  x_RI, w_IO, d_RO = _flat(x, axes), _flat(w, w.ndim - axes), _flat(d_y, w.ndim - axes)
  d_x = _contract(d_RO, w_IO.astype(x.dtype), (1,), (1,))
  return d_x.reshape(x.shape), _contract(x_RI, d_RO, (0,), (0,), dtype=w.dtype).reshape(w.shape)


linear.defvjp(_linear_forward, _linear_backward)


def _flat(x, axes):
  """The last `axes` axes as one, and all before them as one."""
  return x.reshape(math.prod(x.shape[:x.ndim - axes]), -1)


def product(x_BI: jax.Array, w_OI: jax.Array, weights_first: bool,
            dtype: Any = None) -> jax.Array:
  """x @ w.T, accumulated in float32, in x's dtype or `dtype`; computed as (w @ x.T).T if asked.

  For a few rows on two cores XLA:CPU is 1.15 to 1.3 times as fast with the weights on the left, in
  float32; in bfloat16 5 times as slow.
  """
  w_OI = w_OI.astype(x_BI.dtype)
  if not weights_first:
    return _contract(x_BI, w_OI, (1,), (1,), dtype)
  # Without barriers the compiler folds the transposes into the product, which is slower than both.
  y_OB = _contract(w_OI, jax.lax.optimization_barrier(x_BI.T), (1,), (0,), dtype)
  return jax.lax.optimization_barrier(y_OB).T


def _contract(x, y, x_axes, y_axes, dtype=None):
  out = jnp.dtype(dtype or x.dtype)

  def dot(x, y, dtype=out):
    return jax.lax.dot_general(x, y, ((tuple(x_axes), tuple(y_axes)), ((), ())),
                               preferred_element_type=dtype)

  # Matrix units add up in float32 whatever they return (only the parts of a sum that XLA:GPU splits
  # may be rounded); asked for float32, a GPU writes it to memory and converts it by another kernel.
  # A CPU's unit for 16 bits is used by XLA only when asked for float32: otherwise both operands are
  # written out as float32 first, at every step.
  if out == jnp.float32 or jax.default_backend() != 'cpu':
    return dot(x, y)
  return jax.lax.platform_dependent(
      x, y, cpu=lambda x, y: dot(x, y, jnp.float32).astype(out), default=dot)


def rms_norm(x: jax.Array, gain: jax.Array, eps: float) -> jax.Array:
  """x / rms(x) * gain over the last axis, in float32, returned in x's dtype."""
  y = x.astype(jnp.float32)
  y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + eps)
  return (y * gain.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


def _remat(remat):
  named = jax.checkpoint_policies.save_only_these_names('dot', 'attention')

  def saved(primitive, *args, **params):
    # cuDNN's forward pass has no names inside; its results are what its backward pass needs.
    return primitive.name.startswith('dot_product_attention_fwd') or named(
        primitive, *args, **params)

  policies = {'full': None, 'dots': saved}
  if remat == 'none':
    return Block
  if remat not in policies:
    raise ValueError(f"remat={remat!r} is unknown; allowed: 'none', 'full', 'dots'.")
  return nn.remat(Block, policy=policies[remat], prevent_cse=False)
