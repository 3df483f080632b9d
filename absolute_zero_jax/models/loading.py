# SPDX-License-Identifier: Apache-2.0
"""One door to a model: name -> (config, parameters, where they came from).

    'random:llama,layers=2' --init--+
    directory with config.json -----+--> (ModelConfig, stacked parameter tree, path or None)
    *.gguf -------------------------+
    alias or hub id --hub.resolve--> one of the two above
"""

from collections.abc import Callable
import dataclasses
import json
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from absolute_zero_jax.models import decoder, gguf, hf, hub
from absolute_zero_jax.models.config import ARCHITECTURES, ModelConfig

_RANDOM = 'random:'
_SMALL = ModelConfig(family='llama', vocab=512, embed=64, layers=2, heads=4, kv_heads=2,
                     head_dim=16, ffn=128, tied=True)


def load(name: str | os.PathLike, *, dtype=jnp.float32,
         shardings_fn: Callable[[ModelConfig], Any] | None = None,
         key: jax.Array | None = None) -> tuple[ModelConfig, dict, pathlib.Path | None]:
  """Config, parameters and source path of a model by any name `hub.resolve` knows.

  `shardings_fn(config)` gives the tree of shardings; each parameter goes straight to its devices.
  A name 'random:FAMILY,field=value,...' makes an untrained model from `key` (default: key 0), with
  the fields of `_SMALL` where none are given; its source path is None.

  Raises ValueError as `hub.resolve`, `hf.load` and `gguf.load` do.
  """
  if str(name).startswith(_RANDOM):
    config = random_config(str(name))
    key = jax.random.key(0) if key is None else key
    if shardings_fn is None:
      return config, decoder.init(config, key, dtype), None
    make = jax.jit(lambda key: decoder.init(config, key, dtype),
                   out_shardings=shardings_fn(config))
    return config, make(key), None
  path = weights(hub.resolve(name))
  config = read_config(path)
  shardings = None if shardings_fn is None else shardings_fn(config)
  read = gguf.load if path.is_file() else hf.load
  config, params = read(path, dtype=dtype, shardings=shardings)
  return config, params, path


def weights(path: pathlib.Path) -> pathlib.Path:
  """`path`, or the one .gguf file in it if it is a directory without a config.json.

  Raises ValueError where there are several.
  """
  if path.is_dir() and not (path / 'config.json').exists():
    files = sorted(path.glob('*.gguf'))
    if len(files) > 1:
      raise ValueError(f'{path} holds {len(files)} .gguf files; give the path of one of them')
    return files[0] if files else path
  return path


def read_config(path: str | os.PathLike) -> ModelConfig:
  """The ModelConfig of a directory or .gguf file, without its weights."""
  path = weights(pathlib.Path(path))
  return gguf.config(gguf.read(path)) if path.is_file() else ModelConfig.from_hf(path)


def random_config(name: str) -> ModelConfig:
  """The ModelConfig that 'random:qwen3,layers=4,tied=false' spells.

  Raises ValueError for an unknown family or field, a value of another type than the field's, or
  biases and norms that the family does not have.
  """
  family, *fields = name.removeprefix(_RANDOM).split(',')
  if family not in ARCHITECTURES:
    raise ValueError(f'model {name!r}: unknown family {family!r}; allowed: '
                     f'{", ".join(ARCHITECTURES)}')
  config = dataclasses.replace(_SMALL, family=family, qkv_bias=family == 'qwen2',
                               qk_norm=family == 'qwen3')
  kinds = {f.name: type(getattr(config, f.name)) for f in dataclasses.fields(config)}
  kinds = {k: v for k, v in kinds.items() if v in (int, float, bool)}
  values = {}
  for field in fields:
    key, _, text = field.partition('=')
    if key not in kinds:
      raise ValueError(f'model {name!r}: unknown field {key!r}; allowed: {", ".join(kinds)}')
    try:
      values[key] = _BOOLS[text.lower()] if kinds[key] is bool else kinds[key](text)
    except (ValueError, KeyError):
      raise ValueError(f'model {name!r}: {key}={text!r} is no {kinds[key].__name__}') from None
  made = dataclasses.replace(config, **values)
  for key in ('qkv_bias', 'qk_norm'):       # no other model could be exported
    if getattr(made, key) != getattr(config, key):
      raise ValueError(f'model {name!r}: {key} of {family} is {getattr(config, key)}; leave it out')
  return made


_BOOLS = {'true': True, 'false': False, '1': True, '0': False}


def generation_config(path: str | os.PathLike | None) -> dict[str, Any]:
  """Special ids and sampling defaults that come with a model.

  Always has 'eos_token_id', a list (empty if the model names none): every id that ends a response.
  'bos_token_id' and 'pad_token_id' are there if the model names them. From a directory the rest of
  generation_config.json follows, which overrules config.json; a random model (None) has no ids.

  Raises ValueError where nothing is at `path`, or an end is no id.
  """
  if path is None:
    return {'eos_token_id': []}
  path = weights(pathlib.Path(path))
  if not path.exists():
    raise ValueError(f'no model at {path}; give the path of a directory or .gguf file, such as '
                     '`hub.resolve(name)`')
  if path.is_file():
    metadata = gguf.read(path).metadata
    ids = {ours: metadata.get(f'tokenizer.ggml.{theirs}_token_id')
           for ours, theirs in (('bos_token_id', 'bos'), ('pad_token_id', 'padding'))}
    ends = [metadata.get(f'tokenizer.ggml.{kind}_token_id') for kind in ('eos', 'eot', 'eom')]
    ends = [end for end in ends if end is not None]
  else:
    ids = {k: v for k, v in _json(path / 'config.json').items()
           if k in ('bos_token_id', 'eos_token_id', 'pad_token_id')}
    ids |= _json(path / 'generation_config.json')
    ends = ids.get('eos_token_id')
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
  if not all(type(end) is int and end >= 0 for end in ends):
    raise ValueError(f'{path}: eos_token_id={ends!r} must be token ids, integers of at least 0; '
                     'download the file again')
  ids['eos_token_id'] = list(dict.fromkeys(ends))
  return {k: v for k, v in ids.items() if v is not None}


def _json(path: pathlib.Path) -> dict[str, Any]:
  try:
    value = json.loads(path.read_text(encoding='utf-8'))
  except FileNotFoundError:
    return {}
  except ValueError as e:
    raise ValueError(f'{path} is not readable JSON ({e}); download the file again') from None
  if not isinstance(value, dict):
    raise ValueError(f'{path} holds no JSON object; download the file again')
  return value
