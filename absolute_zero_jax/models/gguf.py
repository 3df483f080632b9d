# SPDX-License-Identifier: Apache-2.0
"""GGUF files (llama.cpp) -> config and stacked parameter tree, dequantised tensor by tensor.

    header (`gguf_header`) --> config, tensor table --> tensors, decoded by `gguf.quants`

Source: ggml docs/gguf.md; the row order of q and k in llama files: llama.cpp
convert_hf_to_gguf.py, LlamaModel.permute.
"""

from collections.abc import Mapping
import mmap
import os
import pathlib
import struct
from typing import Any, NamedTuple

import gguf as ggml
import jax.numpy as jnp
import numpy as np

from absolute_zero_jax import gguf_header
from absolute_zero_jax.models import hf
from absolute_zero_jax.models.config import ModelConfig, RopeScaling

FAMILIES = ('llama', 'qwen2', 'qwen3')
_TOP = {'model.embed_tokens.weight': 'token_embd.weight', 'model.norm.weight': 'output_norm.weight',
        'lm_head.weight': 'output.weight'}
_LAYER = {'input_layernorm': 'attn_norm', 'post_attention_layernorm': 'ffn_norm',
          'self_attn.q_proj': 'attn_q', 'self_attn.k_proj': 'attn_k', 'self_attn.v_proj': 'attn_v',
          'self_attn.o_proj': 'attn_output', 'self_attn.q_norm': 'attn_q_norm',
          'self_attn.k_norm': 'attn_k_norm', 'mlp.gate_proj': 'ffn_gate', 'mlp.up_proj': 'ffn_up',
          'mlp.down_proj': 'ffn_down'}
_LLAMA3_FACTORS = 'rope_freqs.weight'


class Tensor(NamedTuple):
  """One row of a file's tensor table; `shape` is NumPy's order, [out, in]."""
  shape: tuple[int, ...]
  kind: ggml.GGMLQuantizationType
  start: int
  size: int


class File(NamedTuple):
  """Header of a GGUF file: metadata values (lists for arrays) and the tensor table."""
  path: pathlib.Path
  metadata: dict[str, Any]
  tensors: dict[str, Tensor]


def read(path: str | os.PathLike) -> File:
  """The header of a GGUF file, after checking that every tensor's bytes are there.

  Raises ValueError if the file is missing, truncated, no GGUF file of version 2 or 3, or one part
  of a split model.
  """
  path = pathlib.Path(path)
  try:
    with path.open('rb') as f:
      if f.read(4) != b'GGUF':
        raise ValueError(f'{path} is no GGUF file (wrong first bytes); download it again')
      with mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
        file = _header(path, data)
        size = len(data)
  except FileNotFoundError:
    raise ValueError(f'no GGUF file at {path}') from None
  except (struct.error, UnicodeDecodeError, OverflowError, MemoryError) as e:
    raise ValueError(f'{path} is truncated or damaged in its header ({e}); '
                     'download the file again') from None
  end = max((t.start + t.size for t in file.tensors.values()), default=0)
  if end > size:
    raise ValueError(f'{path} is truncated: it has {size:,} bytes, its header announces {end:,}; '
                     'download the file again')
  if file.metadata.get('split.count', 1) not in (0, 1):
    raise ValueError(f'{path} is one of {file.metadata["split.count"]} parts; merge them first '
                     '(llama-gguf-split --merge)')
  return file


def config(file: File) -> ModelConfig:
  """The ModelConfig that a file's metadata describes.

  Numbers stored as float32 get their shortest decimal form (0.00001, not 0.0000099999997). The
  model is tied if there is no output table.

  Raises ValueError for an architecture or feature that is not implemented, or a missing key.
  """
  data = file.metadata
  family = data.get('general.architecture')
  if family not in FAMILIES:
    raise ValueError(f'{file.path}: general.architecture={family!r} is not supported; allowed: '
                     f'{", ".join(FAMILIES)}')

  def get(key, default=None):
    value = data.get(f'{family}.{key}', default)
    if not isinstance(value, int | float):
      raise ValueError(f'{file.path}: metadata {family}.{key}={value!r}, one number is needed; '
                       'the file is damaged or of another architecture')
    return float(str(np.float32(value))) if isinstance(value, float) else value

  if get('expert_count', 0):
    raise ValueError(f'{file.path}: {family}.expert_count={get("expert_count")}: mixtures of '
                     'experts are not supported; allowed: 0')
  if not 0 < get('block_count') <= len(file.tensors):
    raise ValueError(f'{file.path}: metadata {family}.block_count={get("block_count")} does not '
                     f'fit a file of {len(file.tensors)} tensors; download the file again')
  embed, heads = get('embedding_length'), get('attention.head_count')
  head_dim = get('attention.key_length', embed // max(1, heads))
  for key in ('rope.dimension_count', 'attention.value_length'):
    if get(key, head_dim) != head_dim:
      raise ValueError(f'{file.path}: {family}.{key}={get(key)} is not supported; allowed: the '
                       f'head width, {head_dim}')
  theta, positions = get('rope.freq_base', 10000.0), get('context_length')
  if 'token_embd.weight' not in file.tensors:
    raise ValueError(f'{file.path} lacks the tensor token_embd.weight; it holds no whole model')
  return ModelConfig(
      family=family, vocab=file.tensors['token_embd.weight'].shape[0], embed=embed,
      layers=get('block_count'), heads=heads, kv_heads=get('attention.head_count_kv', heads),
      head_dim=head_dim, ffn=get('feed_forward_length'), rope_theta=float(theta),
      rope_scaling=_rope_scaling(file, family, get, head_dim, theta),
      norm_eps=get('attention.layer_norm_rms_epsilon', 1e-6), qkv_bias=family == 'qwen2',
      qk_norm=family == 'qwen3', tied='output.weight' not in file.tensors,
      max_positions=positions)


def load(path: str | os.PathLike, *, dtype=jnp.float32,
         shardings: Mapping | None = None) -> tuple[ModelConfig, dict]:
  """The config and dequantised parameters of a GGUF file; layout and sharding as in `hf.load`.

  Raises ValueError as `read` and `config` do, and for missing, left-over or misshapen tensors.
  """
  file = read(path)
  model = config(file)
  names = {name: _ggml_name(name) for slot in hf.slots(model) for name in slot.names()}
  found = {name: file.tensors[ours].shape for name, ours in names.items() if ours in file.tensors}
  left = set(file.tensors) - set(names.values()) - {_LLAMA3_FACTORS}
  hf.check(model, found | {name: file.tensors[name].shape for name in sorted(left)}, file.path)

  def one(name):
    return _hf_rows(model, name, dequantize(file, names[name]))

  return model, hf.assemble(model, one, dtype=dtype, shardings=shardings)


def dequantize(file: File, name: str) -> np.ndarray:
  """One tensor as float32 (or its own float dtype), [out, in], rows as they lie in the file."""
  tensor = file.tensors[name]
  with file.path.open('rb') as f:
    f.seek(tensor.start)
    raw = np.fromfile(f, np.uint8, tensor.size)
  rows = raw.reshape(int(np.prod(tensor.shape[:-1])), -1)
  try:
    # In blocks of rows: some formats need several times a tensor's size while they are decoded.
    step = max(1, 2**22 // tensor.shape[-1])
    blocks = [ggml.quants.dequantize(rows[i:i + step], tensor.kind)
              for i in range(0, len(rows), step)]
  except NotImplementedError:
    raise ValueError(f'{file.path}: tensor {name} has block format {tensor.kind.name}, which the '
                     'gguf package cannot decode; take another quantisation, e.g. Q8_0') from None
  return np.concatenate(blocks).reshape(tensor.shape)


def _ggml_name(name: str) -> str:
  if name in _TOP:
    return _TOP[name]
  _, _, layer, *middle, kind = name.split('.')
  return f'blk.{layer}.{_LAYER[".".join(middle)]}.{kind}'


def _hf_rows(model: ModelConfig, name: str, array: np.ndarray) -> np.ndarray:
  """Undoes llama.cpp's row order: within a head it stores pairs (j, j + H/2) side by side."""
  if model.family != 'llama' or not name.endswith(('q_proj.weight', 'k_proj.weight')):
    return array
  heads = model.heads if 'q_proj' in name else model.kv_heads
  pairs = array.reshape(heads, model.head_dim // 2, 2, array.shape[-1])
  return pairs.swapaxes(1, 2).reshape(array.shape)


def _rope_scaling(file: File, family: str, get, head_dim: int, theta: float):
  # The older key, and 'linear' where no type is named: as llama.cpp reads them.
  factor = get('rope.scaling.factor', get('rope.scale_linear', 0)) or 1
  kind = file.metadata.get(f'{family}.rope.scaling.type', 'linear')
  if kind not in ('none', 'linear'):
    raise ValueError(f'{file.path}: {family}.rope.scaling.type={kind!r} is not supported; '
                     'allowed: none, linear')
  if kind == 'linear' and factor != 1:
    if _LLAMA3_FACTORS in file.tensors:
      raise ValueError(f'{file.path}: linear scaling together with {_LLAMA3_FACTORS} is not '
                       "supported; use the model's safetensors files")
    return RopeScaling('linear', float(factor))
  if _LLAMA3_FACTORS not in file.tensors:
    return None
  # Llama 3.1 and later: the file holds the divisors and not the four numbers they came from. The
  # largest divisor is the factor, the other three are the same in all of Meta's models: verified.
  have = dequantize(file, _LLAMA3_FACTORS).astype(np.float64)
  scaling = RopeScaling('llama3', float(np.round(have.max(), 3)))
  wavelength = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
  turns = scaling.original_max_positions / wavelength
  low, high = scaling.low_freq_factor, scaling.high_freq_factor
  smooth = np.clip((turns - low) / (high - low), 0, 1)
  want = 1 / (smooth + (1 - smooth) / scaling.factor)
  if have.shape != want.shape or not np.allclose(have, want, rtol=1e-4):
    raise ValueError(f'{file.path}: {_LLAMA3_FACTORS} does not follow the Llama 3.1 rule with '
                     f'{scaling}; use the model\'s safetensors files')
  return scaling


def _header(path: pathlib.Path, data: mmap.mmap) -> File:
  version, count, pairs = gguf_header.counts(data)
  if version not in gguf_header.VERSIONS:
    raise ValueError(f'{path} is a GGUF file of version {version}; allowed: 2, 3 (little-endian)')
  (metadata, at), tensors = gguf_header.metadata(data, pairs), {}
  for _ in range(count):
    name, at = gguf_header.string(data, at)
    (ndim,) = struct.unpack_from('<I', data, at)
    *dims, kind, offset = struct.unpack_from(f'<{ndim}QIQ', data, at + 4)
    at += 16 + 8 * ndim
    tensors[name] = (tuple(dims[::-1]), kind, offset)
  align = metadata.get('general.alignment', 32)
  if type(align) is not int or align < 1:
    raise ValueError(f'{path}: metadata general.alignment={align!r}; allowed: a positive integer')
  base = -(-at // align) * align
  return File(path, metadata, {name: _tensor(path, name, *row, base)
                               for name, row in tensors.items()})


def _tensor(path, name: str, shape: tuple[int, ...], kind: int, offset: int, base: int) -> Tensor:
  try:
    kind = ggml.GGMLQuantizationType(kind)
  except ValueError:
    raise ValueError(f'{path}: tensor {name} has the unknown block format {kind}; the file is '
                     'damaged or newer than the installed gguf package') from None
  per_block, block_bytes = ggml.GGML_QUANT_SIZES[kind]
  return Tensor(shape, kind, base + offset, int(np.prod(shape)) // per_block * block_bytes)
