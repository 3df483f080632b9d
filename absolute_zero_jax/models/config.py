# SPDX-License-Identifier: Apache-2.0
"""ModelConfig: the numbers and flags that make one decoder into Llama, SmolLM2, Qwen2 or Qwen3.

    HF config.json (old and new spelling)  --from_hf-->  ModelConfig  --to_hf-->  config.json

The config is frozen and hashable, so that it can be a static argument of `jax.jit`. A feature that
the decoder does not implement is refused here, by name, and not met later as wrong logits.
"""

from collections.abc import Mapping
import dataclasses
import json
import math
import os
import pathlib
import sys
from typing import Any

ARCHITECTURES = {'llama': 'LlamaForCausalLM', 'qwen2': 'Qwen2ForCausalLM',
                 'qwen3': 'Qwen3ForCausalLM'}
_WINDOW = 4096                                    # where use_sliding_window names none
ROPE_KINDS = ('default', 'linear', 'llama3')     # 'default' is no scaling: RopeScaling is None


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """How the rotary frequencies of a model with a stretched context differ from plain RoPE.

  'linear' divides every frequency by `factor`. 'llama3' divides the low ones, keeps the high ones
  and interpolates between; the last three fields matter to it alone.

  Source: transformers modeling_rope_utils.py.
  """
  kind: str
  factor: float
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_max_positions: int = 8192

  def __post_init__(self):
    if self.kind not in ROPE_KINDS[1:]:
      raise _refusal('rope_scaling.kind', self.kind, ROPE_KINDS[1:])
    if not 1 <= self.factor < math.inf:
      raise _refusal('rope_scaling.factor', self.factor, 'a finite number of at least 1')
    if self.kind == 'llama3':
      if not 0 < self.low_freq_factor < self.high_freq_factor:
        raise _refusal('rope_scaling.low_freq_factor', self.low_freq_factor,
                       f'between 0 and high_freq_factor={self.high_freq_factor}')
      if self.original_max_positions < 1:
        raise _refusal('rope_scaling.original_max_positions', self.original_max_positions,
                       'a positive integer')


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Sizes and flags of one decoder; equal configs give equal programs.

  `embed` is the model width D, `ffn` the width F of the gated feed-forward layer, `heads` N,
  `kv_heads` K, `head_dim` H (not always embed / heads). `qkv_bias` is Qwen2's, `qk_norm` Qwen3's;
  `tied` models have no `unembed` table. `max_positions` is what the model was trained for; nothing
  is allocated by it, and a run that goes beyond says so.

  Raises ValueError if a size is not a positive integer, or heads and head_dim do not fit.
  """
  family: str
  vocab: int
  embed: int
  layers: int
  heads: int
  kv_heads: int
  head_dim: int
  ffn: int
  rope_theta: float = 10000.0
  rope_scaling: RopeScaling | None = None
  norm_eps: float = 1e-5
  qkv_bias: bool = False
  qk_norm: bool = False
  tied: bool = False
  max_positions: int = 2048

  def __post_init__(self):
    if self.family not in ARCHITECTURES:
      raise _refusal('family', self.family, ARCHITECTURES)
    for name in ('vocab', 'embed', 'layers', 'heads', 'kv_heads', 'head_dim', 'ffn',
                 'max_positions'):
      value = getattr(self, name)
      if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise _refusal(name, value, 'a positive integer')
    if self.heads % self.kv_heads:
      raise _refusal('kv_heads', self.kv_heads, f'a divisor of heads={self.heads}')
    if self.family == 'llama' and self.embed % self.heads:
      raise _refusal('heads', self.heads, f'a divisor of embed={self.embed}, which transformers '
                     'demands of this family (not of qwen2 and qwen3)')
    if self.head_dim % 2:
      raise _refusal('head_dim', self.head_dim, 'an even integer (RoPE rotates pairs)')
    for name in ('rope_theta', 'norm_eps'):
      if not 0 < getattr(self, name) < math.inf:
        raise _refusal(name, getattr(self, name), 'a positive finite number')

  @staticmethod
  def from_hf(source: Mapping[str, Any] | str | os.PathLike) -> 'ModelConfig':
    """Reads a Hugging Face config: a mapping, a config.json, or the directory that holds one.

    Both spellings of RoPE are read: `rope_theta` with `rope_scaling`, and `rope_parameters` of
    transformers 5. A sliding window that no layer uses is ignored.

    Raises:
      ValueError: the file is missing or no JSON, a field is missing, or the config asks for
        something not implemented; the text names field, value and what is allowed.
    """
    if isinstance(source, Mapping):
      return _from_hf(source)
    found = _read(pathlib.Path(source))
    try:
      return _from_hf(found)
    except ValueError as e:
      raise ValueError(f'{source}: {e}') from e

  def to_hf(self) -> dict[str, Any]:
    """Contents of a config.json that transformers (4 and 5) loads; `from_hf` gives `self` back.

    Token ids and the stored dtype are not part of a ModelConfig: `hf.save` adds them. Writes the
    older spelling of RoPE, which every version of transformers reads.
    """
    return _to_hf(self)


def _refusal(field: str, value: object, allowed: object, hint: str = '') -> ValueError:
  if not isinstance(allowed, str):
    allowed = ', '.join(repr(x) for x in allowed)
  return ValueError(f'model config: {field}={value!r} is not supported; allowed: {allowed}.{hint}')


def _read(path: pathlib.Path) -> dict[str, Any]:
  if path.is_dir():
    path = path / 'config.json'
  try:
    config = json.loads(path.read_text(encoding='utf-8'))
  except FileNotFoundError:
    raise ValueError(f'no model config at {path}; give a directory with a Hugging Face config.json '
                     'and *.safetensors files') from None
  except (UnicodeDecodeError, json.JSONDecodeError) as e:
    raise ValueError(f'{path} is not readable JSON ({e}); download the file again') from None
  if not isinstance(config, dict):
    raise ValueError(f'{path} holds a JSON {type(config).__name__}, not an object; '
                     'download the file again')
  return config


def _from_hf(hf: Mapping[str, Any]) -> ModelConfig:
  family = _family(hf)
  _refuse_unsupported(hf, family)
  embed, heads = _integer(hf, 'hidden_size'), _integer(hf, 'num_attention_heads')
  # Qwen3Config fills an absent head_dim with 128; the other families divide.
  absent = 128 if family == 'qwen3' and 'head_dim' not in hf else embed // heads
  theta, scaling = _rope(hf)
  return ModelConfig(
      family=family, vocab=_integer(hf, 'vocab_size'), embed=embed,
      layers=_integer(hf, 'num_hidden_layers'), heads=heads,
      kv_heads=_integer(hf, 'num_key_value_heads', heads),
      head_dim=_integer(hf, 'head_dim', absent), ffn=_integer(hf, 'intermediate_size'),
      rope_theta=theta, rope_scaling=scaling, norm_eps=_number(hf, 'rms_norm_eps', 1e-6),
      qkv_bias=family == 'qwen2', qk_norm=family == 'qwen3',
      tied=_flag(hf, 'tie_word_embeddings'),
      max_positions=_integer(hf, 'max_position_embeddings', 2048 if family == 'llama' else 32768))


def _flag(hf: Mapping[str, Any], name: str) -> bool:
  if not isinstance(hf.get(name) or False, bool):
    raise _refusal(name, hf[name], (True, False))
  return bool(hf.get(name))


def _family(hf: Mapping[str, Any]) -> str:
  architectures = _words(hf, 'architectures')
  family = hf.get('model_type')
  if family is None:
    known = {v: k for k, v in ARCHITECTURES.items()}
    family = next((known[a] for a in architectures if a in known), None)
  if not isinstance(family, str) or family not in ARCHITECTURES:
    what = 'model_type' if hf.get('model_type') else 'architectures'
    raise _refusal(what, hf.get(what), ARCHITECTURES if what == 'model_type' else
                   ARCHITECTURES.values())
  if architectures and ARCHITECTURES[family] not in architectures:
    raise _refusal('architectures', architectures, [ARCHITECTURES[family]])
  return family


def _refuse_unsupported(hf: Mapping[str, Any], family: str) -> None:
  if hf.get('quantization_config'):
    raise _refusal('quantization_config', hf['quantization_config'], 'none',
                   ' Use the full-precision checkpoint, or a GGUF file, which is dequantised.')
  allowed = {'hidden_act': ('silu',), 'mlp_bias': (False,), 'is_encoder_decoder': (False,),
             'is_causal': (True,), 'partial_rotary_factor': (1, 1.0)}
  if family != 'qwen2':                    # Qwen2 always has q/k/v biases and no switch for them
    allowed['attention_bias'] = (False,)
  for field, values in allowed.items():
    if hf.get(field) is not None and hf[field] not in values:
      raise _refusal(field, hf[field], values[:1])
  for field in ('num_experts', 'num_local_experts'):
    if hf.get(field):
      raise _refusal(field, hf[field], 'none (no mixture of experts)')
  kinds = _words(hf, 'layer_types')
  if any(kind != 'full_attention' for kind in kinds):
    raise _refusal('layer_types', sorted(set(kinds)), ['full_attention'])
  if not kinds and _slides(hf, family):
    raise _refusal('sliding_window', hf.get('sliding_window', _WINDOW),
                   'null, or use_sliding_window=false')


def _slides(hf: Mapping[str, Any], family: str) -> bool:
  """Whether any layer attends through a window. Source: transformers configuration_qwen2.py."""
  if family == 'llama' or not hf.get('use_sliding_window') or (
      hf.get('sliding_window', _WINDOW) is None):
    return False
  if hf.get('max_window_layers', 28) is None:
    return True
  return _number(hf, 'max_window_layers', 28) < _integer(hf, 'num_hidden_layers')


def _rope(hf: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
  field = 'rope_parameters' if hf.get('rope_parameters') else 'rope_scaling'
  rope = hf.get(field) or {}
  if field == 'rope_parameters' and hf.get('rope_scaling'):
    older = _rope({name: value for name, value in hf.items() if name != field})
    if older != _rope({name: value for name, value in hf.items() if name != 'rope_scaling'}):
      raise _refusal('rope_scaling', hf['rope_scaling'], 'null, or what rope_parameters says')
  if not isinstance(rope, Mapping) or any(isinstance(v, Mapping) for v in rope.values()):
    raise _refusal(field, rope, 'one flat object for all layers')
  theta = _number(rope, 'rope_theta', _number(hf, 'rope_theta', 10000.0))
  kind = rope.get('rope_type') or rope.get('type') or 'default'
  if kind not in ROPE_KINDS:
    raise _refusal(f'{field}.rope_type', kind, ROPE_KINDS)
  if rope.get('mrope_section') or rope.get('partial_rotary_factor', 1.0) != 1.0:
    raise _refusal(field, dict(rope), 'plain RoPE over the whole head, no sections')
  if kind == 'default':
    return theta, None
  if kind == 'linear':
    return theta, RopeScaling('linear', _number(rope, 'factor'))
  outer, inner = (d.get('original_max_position_embeddings') for d in (hf, rope))
  if outer and inner and outer != inner:     # transformers 4 takes the inner, 5 the outer
    raise _refusal('original_max_position_embeddings', outer, f'{inner}, as {field} says')
  original = _integer(rope, 'original_max_position_embeddings',
                      hf.get('original_max_position_embeddings') or
                      hf.get('max_position_embeddings'))
  return theta, RopeScaling('llama3', _number(rope, 'factor'), _number(rope, 'low_freq_factor'),
                            _number(rope, 'high_freq_factor'), original)


def _to_hf(config: ModelConfig) -> dict[str, Any]:
  scaling = config.rope_scaling
  rope = None
  if scaling is not None:
    rope = {'rope_type': scaling.kind, 'factor': scaling.factor}
    if scaling.kind == 'llama3':
      rope |= {'low_freq_factor': scaling.low_freq_factor,
               'high_freq_factor': scaling.high_freq_factor,
               'original_max_position_embeddings': scaling.original_max_positions}
  hf = {'architectures': [ARCHITECTURES[config.family]], 'model_type': config.family,
        'vocab_size': config.vocab, 'hidden_size': config.embed,
        'num_hidden_layers': config.layers, 'num_attention_heads': config.heads,
        'num_key_value_heads': config.kv_heads, 'head_dim': config.head_dim,
        'intermediate_size': config.ffn, 'hidden_act': 'silu',
        'max_position_embeddings': config.max_positions, 'rms_norm_eps': config.norm_eps,
        'rope_theta': config.rope_theta, 'rope_scaling': rope,
        'tie_word_embeddings': config.tied, 'attention_dropout': 0.0, 'initializer_range': 0.02,
        'use_cache': True}
  if config.family != 'qwen2':
    hf['attention_bias'] = False
  return hf | ({'mlp_bias': False} if config.family == 'llama' else {'use_sliding_window': False})


def _words(hf: Mapping[str, Any], field: str) -> list[str]:
  value = hf.get(field) or []
  if not isinstance(value, list | tuple) or not all(isinstance(word, str) for word in value):
    raise _refusal(field, value, 'a list of names')
  return list(value)


def _integer(hf: Mapping[str, Any], field: str, default: int | None = None) -> int:
  value = hf.get(field)
  value = default if value is None else value
  if not isinstance(value, int) or isinstance(value, bool) or value < 1:
    raise _refusal(field, value, 'a positive integer')
  return value


def _number(hf: Mapping[str, Any], field: str, default: float | None = None) -> float:
  value = hf.get(field)
  value = default if value is None else value
  if not isinstance(value, int | float) or isinstance(value, bool) or (
      not abs(value) <= sys.float_info.max):
    raise _refusal(field, value, 'a finite number')
  return float(value)
