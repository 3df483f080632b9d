# SPDX-License-Identifier: Apache-2.0
"""The device half of sampling: decode-layout weights, ring caches, and the jitted steps on them.

    params --weights--> Weights            once per update: one array per layer, [outputs, inputs],
                                           q|k|v and gate|up side by side
    prompts --decoder.prefill--> keys, values --insert--> cache rows
    cache, Rows --decode--> cache, Chunk   up to C tokens of every row in one call

A cache row is a ring of S slots. All rows write their next key and value to the same slot, so the
update is one slice whatever the rows' lengths; RoPE is already in the keys, so a slot's place in
the ring means only its age, and a row of n tokens sees ages 0..n.

    slot  0  1  2  3  4  5  6  7      next write goes to slot 2; the row holds 4 tokens
    row   c  d  .  .  .  .  a  b      ages: d 1, c 2, b 3, a 4; older slots are masked

Rows that a mesh splits never meet: each shard of them runs its own loop, without a collective, and
what the host tells and asks a shard is one entry of an array [shards].

Letters: as models/decoder.py; C tokens per chunk, E stop ids, P prompt slots, A prefix slots.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from absolute_zero_jax import sampling, sharding
from absolute_zero_jax.models import decode_attention, decoder, rope
from absolute_zero_jax.models.config import ModelConfig

Cache = tuple[tuple[jax.Array, jax.Array], ...]      # per layer: keys [B,K,H,S], values [B,K,S,H]
_KEY_AXES = ('batch', 'kv_heads', None, None)


class Weights(NamedTuple):
  """Parameters in the layout of decoding; `layers` holds one `Block` tree per layer."""
  embed_VD: jax.Array
  unembed_VD: jax.Array | None       # None: tied, the embedding
  final_norm_D: jax.Array
  layers: tuple[dict[str, jax.Array], ...]


class Rows(NamedTuple):
  """What each row needs to draw its next token: its last one, how far it is, and its stream.

  `lengths_B` counts tokens in the cache, `drawn_B` the response tokens so far, `left_B` those
  still allowed (0: the row rests), `streams_B` and `samples_B` select its random numbers.
  """
  tokens_B: Any
  lengths_B: Any
  drawn_B: Any
  left_B: Any
  streams_B: Any
  samples_B: Any


class Chunk(NamedTuple):
  """Up to C new tokens per row; row b drew the first `counts_B[b]`.

  Each shard of the rows ran its entry of `steps` columns.
  """
  tokens_BC: jax.Array
  sampler_logprobs_BC: jax.Array
  model_logprobs_BC: jax.Array
  counts_B: jax.Array
  stopped_B: jax.Array
  steps: jax.Array


def is_fused(mesh: Mesh | None) -> bool:
  """Joined matrices cannot be split by heads, so they are for an unsplit tensor axis only."""
  return mesh is None or mesh.shape['tensor'] == 1


def weights(config: ModelConfig, params: decoder.Params, dtype: Any, mesh: Mesh | None) -> Weights:
  """Rearranges stored parameters for decoding; trace it inside jit.

  With a mesh, matrices are gathered over fsdp and split over tensor: a decode step reads every
  weight, and fetching shards each time would dominate it.
  """
  c = config
  fused = is_fused(mesh)
  specs = decoder.param_specs(config)

  def lay(x, axes):
    # Norms and biases count in float32, as in the decoder.
    x = x.astype(dtype if x.ndim > 1 else jnp.float32)
    if mesh is None:
      return x
    rules = sharding.RULES | {'embed': None}
    spec = sharding.partition(axes, x.shape, mesh, rules)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

  def layer(i):
    w = {name: x[i] for name, x in params['layers'].items()}
    if not fused:
      return {name: lay(x, specs['layers'][name].axes[1:]) for name, x in w.items()}
    joined = {'qkv': jnp.concatenate([w.pop(n).reshape(c.embed, -1) for n in 'qkv'], 1).T,
              'gate_up': jnp.concatenate([w.pop('gate'), w.pop('up')], 1).T,
              'o': w.pop('o').reshape(-1, c.embed).T, 'down': w.pop('down').T}
    if c.qkv_bias:
      joined['qkv_bias'] = jnp.concatenate([w.pop(f'{n}_bias').reshape(-1) for n in 'qkv'])
    return {name: lay(x, (None,) * x.ndim) for name, x in (w | joined).items()}

  unembed = None if c.tied else lay(params['unembed'], ('vocab', None))
  return Weights(lay(params['embed'], ('vocab', None)), unembed,
                 lay(params['final_norm'], ('norm',)), tuple(layer(i) for i in range(c.layers)))


def empty_cache(config: ModelConfig, width: int, size: int, dtype: Any,
                mesh: Mesh | None, platform: str) -> Cache:
  """`width` rings of `size` slots, one pair of arrays per layer; trace it inside jit.

  In `dtype`, but on a CPU in float32: XLA:CPU would write keys and values of 16 bits out in float32
  before it multiplies them.
  """
  c, dtype = config, jnp.float32 if platform == 'cpu' else dtype
  return tuple(
      (_lay(jnp.zeros((width, c.kv_heads, c.head_dim, size), dtype), mesh),
       _lay(jnp.zeros((width, c.kv_heads, size, c.head_dim), dtype), mesh))
      for _ in range(c.layers))


def insert(keys_BKHS: jax.Array, values_BKSH: jax.Array, new: tuple[jax.Array, jax.Array],
           prefix: tuple[jax.Array, jax.Array] | None, layer: jax.Array, counts: jax.Array,
           targets_B: jax.Array, sources_B: jax.Array, lengths_B: jax.Array, slot: jax.Array, *,
           mesh: Mesh | None, platform: str) -> tuple[jax.Array, jax.Array]:
  """Fills `counts` cache rows of one layer with prefilled prompts that end just before `slot`.

  Row `targets_B[i]` gets prompt `sources_B[i]` of `new` ([L, B, K, H, P] keys, [L, B, K, P, H]
  values), of which the first `lengths_B[i]` tokens count, behind `prefix` (one row, aligned to the
  end of its A slots). S must be at least A + P. Of a mesh, each shard has its own count and
  targets, numbered from its first row. Row by row, but on a GPU all rows at once: there the host is
  asked at every step of a loop whether it goes on.
  """
  one = functools.partial(_insert, platform=platform)
  by_row, whole = sharding.ROWS, sharding.WHOLE
  filled = sharding.by_rows(one, mesh, (
      by_row, by_row, whole, whole, whole, by_row, by_row, by_row, by_row, whole), by_row)(
          keys_BKHS, values_BKSH, new, prefix, layer, counts, targets_B, sources_B, lengths_B, slot)
  return _lay(filled[0], mesh), _lay(filled[1], mesh)


def _insert(keys_BKHS, values_BKSH, new, prefix, layer, counts, targets_B, sources_B, lengths_B,
            slot, *, platform):
  S, count = keys_BKHS.shape[3], counts[0]
  pick = functools.partial(jax.lax.dynamic_index_in_dim, keepdims=False)
  new = [pick(x, layer) for x in new]
  before = None if prefix is None else [pick(x, layer)[0] for x in prefix]

  def one(i, cache):
    filled = []
    for part, (old, x, axis) in enumerate(zip(cache, new, (3, 2))):
      row = pick(x, sources_B[i])
      end = lengths_B[i]
      if before is not None:
        row = jnp.concatenate([before[part], row], axis - 1)
        end = end + before[part].shape[axis - 1]
      pad = [(0, 0)] * 3
      pad[axis - 1] = (0, S - row.shape[axis - 1])
      row = _roll(jnp.pad(row, pad), slot - end, axis - 1).astype(old.dtype)
      filled.append(jax.lax.dynamic_update_slice_in_dim(old, row[None], targets_B[i], 0))
    return tuple(filled)

  def all_at_once(old, x, before, axis):
    B, A = old.shape[0], 0 if before is None else before.shape[axis - 1]
    to_B = jnp.where(jnp.arange(B) < count, targets_B, B)          # B: dropped
    source_B, end_B = (jnp.zeros((B,), jnp.int32).at[to_B].set(n, mode='drop')
                       for n in (sources_B, A + lengths_B))
    is_new_B = jnp.zeros((B,), bool).at[to_B].set(True, mode='drop')
    row = x[source_B]
    if A:
      row = jnp.concatenate([jnp.broadcast_to(before[None], (B, *before.shape)), row], axis)
    # What lies beyond a row's end is as old as no token of it, so any number may stand there.
    place_BS = jnp.minimum((jnp.arange(S)[None] - slot + end_B[:, None]) % S, row.shape[axis] - 1)
    place = place_BS[:, None, None] if axis == 3 else place_BS[:, None, :, None]
    row = jnp.take_along_axis(row, place, axis)
    return jnp.where(is_new_B[:, None, None, None], row.astype(old.dtype), old)

  if platform == 'gpu':
    return tuple(
        all_at_once(old, x, None if before is None else before[part], axis)
        for part, (old, x, axis) in enumerate(zip((keys_BKHS, values_BKSH), new, (3, 2))))
  return jax.lax.fori_loop(0, count, one, (keys_BKHS, values_BKSH))


def resize(keys_BKHS: jax.Array, values_BKSH: jax.Array, keep: jax.Array, slot: jax.Array, *,
           size: int, mesh: Mesh | None) -> tuple[jax.Array, jax.Array]:
  """Rows `keep` of one layer's cache in rings of `size` slots; a shard's, from its first row.

  The youngest min(S, size) entries survive; the next write goes to slot min(S, size) % size.
  """
  S = keys_BKHS.shape[3]
  kept = min(S, size)

  def one(x, keep, slot, axis):
    x = _roll(jnp.take(x, keep, axis=0), kept - slot, axis)
    x = jax.lax.slice_in_dim(x, 0, kept, axis=axis)
    pad = [(0, 0)] * 4
    pad[axis] = (0, size - kept)
    return jnp.pad(x, pad)

  def resized(x, axis):
    move = sharding.by_rows(functools.partial(one, axis=axis), mesh,
                            (sharding.ROWS, sharding.ROWS, sharding.WHOLE), sharding.ROWS)
    return _lay(move(x, keep, slot), mesh)

  return resized(keys_BKHS, 3), resized(values_BKSH, 2)


def decode(config: ModelConfig, w: Weights, cache: Cache, slot: jax.Array, rows: Rows,
           steps: jax.Array, key: jax.Array, opts: sampling.Options, allowed_V: jax.Array,
           stops_E: jax.Array, *, chunk: int, dtype: Any, mesh: Mesh | None,
           platform: str) -> tuple[Cache, Chunk]:
  """Draws up to `steps` (at most `chunk`) tokens of every row, or until every row of a shard rests.

  Each step appends a row's last token to its ring and draws the next; token t of a row uses the
  key fold_in(fold_in(fold_in(key, stream), sample), t), so it depends on no neighbour.
  """
  together = mesh if sharding.lone_shards(mesh) == 1 else None
  one = functools.partial(_decode, config, chunk=chunk, dtype=dtype, mesh=together,
                          fused=is_fused(mesh), platform=platform)
  by_row, whole = sharding.ROWS, sharding.WHOLE
  cache, out = sharding.by_rows(
      one, mesh, (whole, by_row, whole, by_row, whole, whole, whole, whole, whole), by_row)(
          w, cache, slot, rows, steps, key, opts, allowed_V, stops_E)
  if mesh is not None and mesh.is_multi_process:           # every process reads all tokens
    out = jax.tree.map(
        lambda x: jax.lax.with_sharding_constraint(x, sharding.replicated(mesh)), out)
  return tuple((_lay(k, mesh), _lay(v, mesh)) for k, v in cache), out


def _decode(config, w, cache, slot, rows, steps, key, opts, allowed_V, stops_E, *, chunk, dtype,
            mesh, fused, platform):
  B, S = cache[0][0].shape[0], cache[0][0].shape[3]
  weights_first = platform == 'cpu' and dtype == jnp.float32
  # Rows of unsplit layers are on one device here, alone or as one shard of several.
  kernel = fused and decode_attention.serves(platform, dtype, config.head_dim, S)
  block = decoder.Block(config, dtype, fused=fused, weights_first=weights_first, kernel=kernel)
  unembed_VD = w.embed_VD if w.unembed_VD is None else w.unembed_VD
  row_keys_B = jax.vmap(lambda stream, sample: jax.random.fold_in(
      jax.random.fold_in(key, stream), sample))(rows.streams_B, rows.samples_B)

  def logits(cache, slot, rows):
    angles = rope.angles(config, rows.lengths_B)
    x_BD = sharding.constrain(w.embed_VD[rows.tokens_B], ('batch', None), mesh)
    new = []
    for layer, (k, v) in zip(w.layers, cache):
      x_BD, k, v = block.apply({'params': layer}, x_BD, angles, rows.lengths_B, slot, k, v,
                               method='step')
      new.append((k, v))
    x_BD = decoder.rms_norm(x_BD, w.final_norm_D, config.norm_eps)
    return decoder.product(x_BD, unembed_VD, weights_first, jnp.float32), tuple(new)

  def step(state):
    i, cache, slot, rows, out = state
    logits_BV, cache = logits(cache, slot, rows)
    uniform_B2 = jax.vmap(lambda k, t: jax.random.uniform(jax.random.fold_in(k, t), (2,)))(
        row_keys_B, rows.drawn_B)
    drawn = sampling.draw(logits_BV, allowed_V, uniform_B2, opts, platform=platform)
    live_B = rows.left_B > 0
    stops_B = jnp.any(drawn.tokens_B[:, None] == stops_E[None], -1) & live_B
    tokens, sampler, model = (
        jax.lax.dynamic_update_slice_in_dim(x_BC, column_B[:, None], i, 1)
        for x_BC, column_B in zip(out[:3], drawn))
    out = Chunk(tokens, sampler, model, out.counts_B + live_B, out.stopped_B | stops_B, i + 1)
    rows = rows._replace(tokens_B=drawn.tokens_B, lengths_B=rows.lengths_B + live_B,
                         drawn_B=rows.drawn_B + live_B,
                         left_B=jnp.where(stops_B, 0, rows.left_B - live_B))
    return i + 1, cache, (slot + 1) % S, rows, out

  zeros_BC = jnp.zeros((B, chunk), jnp.float32)
  out = Chunk(jnp.zeros((B, chunk), jnp.int32), zeros_BC, zeros_BC, jnp.zeros((B,), jnp.int32),
              jnp.zeros((B,), bool), jnp.int32(0))
  _, cache, _, _, out = jax.lax.while_loop(
      lambda s: (s[0] < steps) & jnp.any(s[3].left_B > 0), step,
      (jnp.int32(0), cache, slot, rows, out))
  return cache, out._replace(steps=out.steps[None])


def _roll(x, shift, axis):
  """jnp.roll by a traced shift, as one contiguous slice of the doubled array."""
  S = x.shape[axis]
  return jax.lax.dynamic_slice_in_dim(jnp.concatenate([x, x], axis), -shift % S, S, axis)


def _lay(x, mesh):
  return sharding.constrain(x, _KEY_AXES, mesh)
