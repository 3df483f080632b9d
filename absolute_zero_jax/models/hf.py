# SPDX-License-Identifier: Apache-2.0
"""Hugging Face checkpoints <-> the stacked parameter tree, without torch.

    model*.safetensors --read one tensor--> [L, ...] leaf on the host --place--> device, next leaf
    device leaf --> host --one layer at a time--> model*.safetensors, config.json, ... --> renamed

`slots` is the one table of names and shapes; import, export and the GGUF reader all walk it. The
host holds one leaf at a time. Checkpoints store linear layers as [out, in], the tree as [in, out]
with heads unfolded. Letters: D width, N heads, K kv heads, H head width, F ffn width.
"""

from collections.abc import Callable, Iterator, Mapping
import json
import math
import os
import pathlib
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from absolute_zero_jax.models import directory, tensor_files
from absolute_zero_jax.models.config import ModelConfig

SHARD_BYTES = 5_000_000_000
_INDEX = 'model.safetensors.index.json'
_SINGLE = 'model.safetensors'


class Slot(NamedTuple):
  """One leaf of the tree and the checkpoint tensors that fill it.

  `name` has '{}' for the layer number if `layers` is not 0. `shape` is the leaf's without the
  layer axis, `stored` the checkpoint's, transposed or not.
  """
  path: tuple[str, ...]
  name: str
  shape: tuple[int, ...]
  stored: tuple[int, ...]
  transposed: bool = False
  layers: int = 0

  def names(self) -> list[str]:
    """The checkpoint's tensors, one per layer, or the one."""
    return [self.name.format(layer) for layer in range(self.layers)] or [self.name]


class Tokenizer(Protocol):
  """What `save` needs of a tokenizer."""
  bos_id: int | None
  pad_id: int
  stop_ids: frozenset[int]

  def save(self, directory: str | os.PathLike) -> None: ...


def slots(config: ModelConfig) -> list[Slot]:
  """Every leaf of the parameter tree in file order, with its Hugging Face name and shapes."""
  D, N, K, H, F = (config.embed, config.heads, config.kv_heads, config.head_dim, config.ffn)

  def linear(leaf, name, ins, outs):
    return Slot(('layers', leaf), f'model.layers.{{}}.{name}', (*ins, *outs),
                (math.prod(outs), math.prod(ins)), True, config.layers)

  def vector(leaf, name, *shape):
    return Slot(('layers', leaf), f'model.layers.{{}}.{name}', shape, (math.prod(shape),), False,
                config.layers)

  table = (config.vocab, D)
  rows = [Slot(('embed',), 'model.embed_tokens.weight', table, table),
          vector('attn_norm', 'input_layernorm.weight', D),
          linear('q', 'self_attn.q_proj.weight', (D,), (N, H)),
          linear('k', 'self_attn.k_proj.weight', (D,), (K, H)),
          linear('v', 'self_attn.v_proj.weight', (D,), (K, H)),
          linear('o', 'self_attn.o_proj.weight', (N, H), (D,))]
  if config.qkv_bias:
    rows += [vector('q_bias', 'self_attn.q_proj.bias', N, H),
             vector('k_bias', 'self_attn.k_proj.bias', K, H),
             vector('v_bias', 'self_attn.v_proj.bias', K, H)]
  if config.qk_norm:
    rows += [vector('q_norm', 'self_attn.q_norm.weight', H),
             vector('k_norm', 'self_attn.k_norm.weight', H)]
  rows += [vector('ffn_norm', 'post_attention_layernorm.weight', D),
           linear('gate', 'mlp.gate_proj.weight', (D,), (F,)),
           linear('up', 'mlp.up_proj.weight', (D,), (F,)),
           linear('down', 'mlp.down_proj.weight', (F,), (D,)),
           Slot(('final_norm',), 'model.norm.weight', (D,), (D,))]
  return rows if config.tied else rows + [Slot(('unembed',), 'lm_head.weight', table, table)]


def load(path: str | os.PathLike, *, dtype=jnp.float32,
         shardings: Mapping | None = None) -> tuple[ModelConfig, dict]:
  """The config and parameters of a Hugging Face directory, single file or sharded with an index.

  All names, shapes and file sizes are checked before the first tensor is read. `shardings` is a
  tree like the parameters; each leaf goes to its devices before the next is read. Without it the
  leaves stay on the default device. Float16, bfloat16, float32 and float64 sources are cast to
  `dtype`. A tied model may hold a copy of its embedding as `lm_head.weight`.

  Raises ValueError for anything missing, left over, truncated or of another shape.
  """
  folder = pathlib.Path(path)
  if not folder.is_dir():
    raise ValueError(f'no model directory at {folder}; give a directory with config.json and '
                     f'{_SINGLE}')
  config = ModelConfig.from_hf(folder)
  entries = table(folder)
  check(config, {name: entry.shape for name, entry in entries.items()}, folder)
  if config.tied and 'lm_head.weight' in entries:
    head, table_VD = (tensor_files.read(entries[name])
                      for name in ('lm_head.weight', 'model.embed_tokens.weight'))
    if not np.array_equal(head, table_VD):
      raise ValueError(f'{folder}: config.json ties the output to the embedding, but '
                       'lm_head.weight is another matrix; set tie_word_embeddings to false there')
  return config, assemble(config, lambda name: tensor_files.read(entries[name]), dtype=dtype,
                          shardings=shardings)


def table(folder: pathlib.Path) -> dict[str, tensor_files.Entry]:
  """Where every tensor of a checkpoint lies, from its index or its single file.

  Raises ValueError for a missing, truncated or contradictory file.
  """
  index = folder / _INDEX
  if not index.exists():
    if not (folder / _SINGLE).exists():
      others = sorted(p.name for p in folder.iterdir() if p.suffix in ('.bin', '.pth', '.gguf'))
      hint = f'; {_listing(others)} there cannot be read as one' if others else ''
      if any(name.endswith('.gguf') for name in others):
        hint += ' (name the .gguf file itself instead of its directory)'
      raise ValueError(f'{folder} has neither {_SINGLE} nor {_INDEX}{hint}')
    return tensor_files.entries(folder / _SINGLE)
  try:
    where = json.loads(index.read_text(encoding='utf-8'))['weight_map']
    files = sorted(set(where.values()))
    absent = [name for name in files if not (folder / name).is_file()]
  except (ValueError, KeyError, TypeError, AttributeError) as e:
    raise ValueError(f'{index} is damaged ({e!r}); download it again') from None
  if (folder / _SINGLE).exists() and _SINGLE not in files:
    if len(absent) == len(files):          # transformers leaves the index of an earlier save
      return tensor_files.entries(folder / _SINGLE)
    raise ValueError(f'{folder} holds both {_SINGLE} and {_INDEX} with its files; remove those of '
                     'the older save')
  if absent:
    raise ValueError(f'{folder} lacks the weight files {_listing(absent)} named in {_INDEX}; '
                     'download them')
  entries = {}
  for name in files:
    entries |= tensor_files.entries(folder / name)
  # What is in no file at all may not be needed (a tied output table): `check` says if it is.
  astray = [t for t, name in where.items() if t in entries and entries[t].path != folder / name]
  if astray:
    raise ValueError(f'{folder}: {_listing(astray)} are not in the file that {_INDEX} names; '
                     'files of two checkpoints are mixed')
  return entries


def check(config: ModelConfig, found: Mapping[str, tuple[int, ...]], source: object) -> None:
  """Raises ValueError unless `found` (name -> stored shape) is exactly what `config` needs."""
  if config.layers > len(found):
    raise ValueError(f'{source} has {len(found)} tensors, too few for the {config.layers} layers '
                     'of its config; the download is incomplete or config.json belongs to another '
                     'model')
  wanted = {name: slot.stored for slot in slots(config) for name in slot.names()}
  missing = [name for name in wanted if name not in found]
  if missing:
    raise ValueError(f'{source} lacks {_listing(missing)} that its config asks for; the download '
                     'is incomplete or config.json belongs to another model')
  wrong = [f'{name} is {list(found[name])}, config says {list(shape)}'
           for name, shape in wanted.items() if tuple(found[name]) != shape]
  if wrong:
    raise ValueError(f'{source}: wrong shapes: {_listing(wrong, quote=False)}; config.json belongs '
                     'to another model')
  # Old Llama checkpoints store the RoPE table; tied ones may repeat the embedding.
  left = [name for name in found if name not in wanted and not name.endswith('rotary_emb.inv_freq')
          and not (config.tied and name == 'lm_head.weight')]
  if left:
    raise ValueError(f'{source} holds {_listing(left)} with no place in a {config.family} '
                     'model of this config; it is another architecture')


def assemble(config: ModelConfig, read: Callable[[str], np.ndarray], *, dtype=jnp.float32,
             shardings: Mapping | None = None) -> dict:
  """The parameter tree from `read(Hugging Face name) -> array of the stored shape`.

  Holds one stacked leaf and one tensor on the host at a time.
  """
  dtype = np.dtype(dtype)
  params = {'layers': {}}
  for slot in slots(config):
    leaf = np.empty((slot.layers, *slot.shape) if slot.layers else slot.shape, dtype)
    for i, name in enumerate(slot.names()):
      stored = read(name)
      place = leaf[i] if slot.layers else leaf
      place[...] = (stored.T if slot.transposed else stored).reshape(slot.shape)
      del stored
    sharding = None if shardings is None else _at(shardings, slot.path)
    _set(params, slot.path, _put(leaf, sharding))
    del leaf, place
  return params


def save(config: ModelConfig, params: Mapping, path: str | os.PathLike, *, dtype=None,
         tokenizer: Tokenizer | None = None, generation: Mapping[str, Any] | None = None,
         shard_bytes: int = SHARD_BYTES) -> None:
  """Writes a directory that `transformers.AutoModelForCausalLM.from_pretrained` loads.

  The directory appears whole or not at all: it is written beside its final name and renamed. An
  earlier export there is replaced; a directory with anything else in it is refused. `dtype` None
  stores the parameters as they are, so that `load` with the same dtype is bit-exact. With a
  tokenizer its files are added; `generation` (contents of generation_config.json) defaults to the
  tokenizer's bos, pad and stop ids.

  Raises:
    ValueError: params do not fit config, or `path` is a directory of something else.
    OSError: no space left or no permission; nothing of the attempt stays on the disk.
  """
  if config.qkv_bias != (config.family == 'qwen2') or config.qk_norm != (config.family == 'qwen3'):
    raise ValueError(f'a {config.family!r} config with qkv_bias={config.qkv_bias}, '
                     f'qk_norm={config.qk_norm} has no Hugging Face form; biases are '
                     "family='qwen2', q/k norms family='qwen3'")
  leaves = _leaves(config, params)
  dtype = np.dtype(leaves[0][1].dtype if dtype is None else dtype)
  shards = _shards(config, dtype, shard_bytes)
  ids = dict(_generation(tokenizer) if generation is None else generation)
  size = sum(math.prod(shape) for shard in shards for shape in shard.values()) * dtype.itemsize
  with directory.replacing(os.path.expanduser(path), needed_bytes=size) as folder:
    _write_shards(folder, shards, dtype, tensors(config, params))
    special = {k: v for k, v in ids.items() if k.endswith('_token_id')}
    # To transformers the embedding of a padding token is no parameter; that of a stop is one.
    if tokenizer is not None and special.get('pad_token_id') in tokenizer.stop_ids:
      del special['pad_token_id']
    kind = 'torch_dtype'                   # the spelling that transformers 4 and 5 both read
    directory.write_json(folder / 'config.json', config.to_hf() | special | {kind: str(dtype)})
    directory.write_json(folder / 'generation_config.json', ids)
    if tokenizer is not None:
      tokenizer.save(folder)


def tensors(config: ModelConfig, params: Mapping) -> Iterator[np.ndarray]:
  """Checkpoint tensors of `params` in the order of `slots`, in stored shape; one leaf is held.

  Raises ValueError if `params` are not exactly what `config` describes.
  """
  for slot, leaf in _leaves(config, params):
    host = np.asarray(jax.device_get(leaf))
    for layer in host if slot.layers else [host]:
      yield layer.reshape(slot.stored[::-1]).T if slot.transposed else layer.reshape(slot.stored)


def _put(leaf: np.ndarray, sharding) -> jax.Array:
  if sharding is None:
    array = jax.device_put(leaf)
  else:
    array = jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])
  return jax.block_until_ready(array)      # otherwise host copies pile up behind the transfer


def _leaves(config: ModelConfig, params: Mapping) -> list[tuple[Slot, jax.Array]]:
  result = []
  for slot in slots(config):
    try:
      leaf = _at(params, slot.path)
    except KeyError:
      raise ValueError(f'params lack {"/".join(slot.path)}; they belong to another config than '
                       f'{config}') from None
    shape = (slot.layers, *slot.shape) if slot.layers else slot.shape
    if leaf.shape != shape:
      raise ValueError(f'params {"/".join(slot.path)} has shape {leaf.shape}, config says {shape}')
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
      raise ValueError(f'params {"/".join(slot.path)} is spread over several processes; restore '
                       'the checkpoint in one process and export there')
    result.append((slot, leaf))
  have = len(jax.tree.leaves(params))
  if have != len(result):
    raise ValueError(f'params have {have} leaves, the config asks for {len(result)}: '
                     'an adapter or a stray entry would be lost; merge it first')
  return result


def _shards(config: ModelConfig, dtype: np.dtype, limit: int) -> list[dict[str, tuple[int, ...]]]:
  shards, size = [{}], 0
  for slot in slots(config):
    bytes_each = math.prod(slot.stored) * dtype.itemsize
    for name in slot.names():
      if shards[-1] and size + bytes_each > limit:
        shards.append({})
        size = 0
      shards[-1][name] = slot.stored
      size += bytes_each
  return shards


def _write_shards(folder: pathlib.Path, shards: list[dict], dtype: np.dtype, tensors) -> None:
  files = [_SINGLE] if len(shards) == 1 else [
      f'model-{i:05d}-of-{len(shards):05d}.safetensors' for i in range(1, len(shards) + 1)]
  for file, shapes in zip(files, shards):
    tensor_files.write(folder / file, shapes, dtype, (next(tensors) for _ in shapes))
  if len(shards) > 1:
    total = sum(math.prod(shape) for shard in shards for shape in shard.values())
    directory.write_json(folder / _INDEX, {
        'metadata': {'total_size': total * dtype.itemsize},
        'weight_map': {name: file for file, shard in zip(files, shards) for name in shard}})


def _generation(tokenizer: Tokenizer | None) -> dict[str, Any]:
  if tokenizer is None:
    return {}
  ids = {'bos_token_id': tokenizer.bos_id, 'eos_token_id': sorted(tokenizer.stop_ids),
         'pad_token_id': tokenizer.pad_id}
  return {name: value for name, value in ids.items() if value is not None}


def _at(tree: Mapping, path: tuple[str, ...]):
  for part in path:
    tree = tree[part]
  return tree


def _set(tree: dict, path: tuple[str, ...], value) -> None:
  _at(tree, path[:-1])[path[-1]] = value


def _listing(names: list[str], quote: bool = True) -> str:
  shown = ', '.join(repr(n) if quote else n for n in names[:4])
  return shown + (f' and {len(names) - 4} more' if len(names) > 4 else '')
