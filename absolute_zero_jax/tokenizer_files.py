# SPDX-License-Identifier: Apache-2.0
"""Reads the tokenizer of a Hugging Face directory, a tokenizer.json or a sentencepiece model."""

import json
import pathlib
from typing import Any

from absolute_zero_jax import tokenizer_spec, tokenizer_spm


def read(path: pathlib.Path) -> tokenizer_spec.Source:
  """Reads a directory, a tokenizer.json or a sentencepiece `.model` file.

  A directory is read for tokenizer.json, else tokenizer.model, and for the small files beside it:
  tokenizer_config.json, special_tokens_map.json, added_tokens.json, generation_config.json (its
  eos list; config.json's where absent) and chat_template.jinja. For a single file the directory
  it lies in is not read.

  Raises:
    ValueError: nothing readable is there, or a file is not what its name says.
  """
  folder = path if path.is_dir() else None
  if folder is not None:
    found = [folder / name for name in ('tokenizer.json', 'tokenizer.model')
             if (folder / name).is_file()]
    if not found:
      raise ValueError(f'No tokenizer in {folder}: it has neither tokenizer.json nor '
                       'tokenizer.model. Copy one from the model, or name its .gguf file.')
    path = found[0]
  config = _read_json(folder, 'tokenizer_config.json')
  if path.suffix == '.json':
    spec, names, adds_bos = _read_json(path.parent, path.name), {}, None
    if not isinstance(spec.get('model'), dict) or not spec['model'].get('vocab'):
      raise ValueError(f'{path} is no tokenizer.json: it has no model with a vocabulary. Use the '
                       'file that belongs to the model.')
  else:
    spaced = config.get('add_prefix_space')
    spec, names = tokenizer_spm.read(path, spaced if isinstance(spaced, bool) else None)
    adds_bos = True
  order = ['tokenizer_config.json', 'special_tokens_map.json']
  if 'added_tokens_decoder' in config:     # as transformers: in an older save the map overrules
    order.reverse()
  more = set()
  for file in order:
    content = _read_json(folder, file)
    for name, token in content.items():
      if name in tokenizer_spec.NAMES and isinstance(_text(token), str):
        names[name] = _text(token)
    # Of transformers 4; what 5 writes, `extra_special_tokens`, holds plain added tokens too.
    more.update(map(_text, content.get('additional_special_tokens') or ()))
  if first := _leading(spec):
    names.setdefault('bos_token', first)
  _add_tokens(spec, _declared_tokens(folder, config, spec), {*names.values(), *more} - {None})
  # Of a tokenizer.json, what it says itself counts, as in transformers 5.
  if path.suffix != '.json' and isinstance(config.get('add_bos_token'), bool):
    adds_bos = config['add_bos_token']
  return tokenizer_spec.Source(str(path), spec, names, adds_bos,
                               _chat_template(folder, config), _stops(folder))


def _read_json(folder: pathlib.Path | None, name: str) -> dict[str, Any]:
  """The object in a file; {} where the folder or the file is not there."""
  if folder is None or not (folder / name).is_file():
    return {}
  try:
    value = json.loads((folder / name).read_text(encoding='utf-8'))
  except ValueError as error:
    raise ValueError(f'{folder / name} is not valid JSON ({error}). Fetch it again.') from error
  if not isinstance(value, dict):
    raise ValueError(f'{folder / name} holds no JSON object. Fetch the file again.')
  return value


def _text(token: Any) -> str | None:
  return token.get('content') if isinstance(token, dict) else token


def _leading(spec: dict[str, Any]) -> str:
  """The special token that the post-processor puts before a text; '' for none."""
  whole = spec.get('post_processor') or {}
  for step in whole.get('processors', [whole]):
    if step.get('type') == 'TemplateProcessing' and step.get('single'):
      return step['single'][0].get('SpecialToken', {}).get('id', '')
  return ''


def _declared_tokens(folder: pathlib.Path | None, config: dict[str, Any],
                     spec: dict[str, Any]) -> list[dict[str, Any]]:
  """Tokens that the files beside the tokenizer add to it, as tokenizer.json entries."""
  tokens, own = {}, spec.get('added_tokens') or []
  taken = {token['content'] for token in own} | {token['id'] for token in own}
  for text, index in _read_json(folder, 'added_tokens.json').items():
    if type(index) is not int or index < 0:
      raise ValueError(f'{folder / "added_tokens.json"}: the id of {text!r} is {index!r}, not an '
                       'integer of at least 0. Fetch the file again.')
    if text not in taken and index not in taken:
      tokens[text] = tokenizer_spec.added_token(index, text, special=False)
  for index, token in (config.get('added_tokens_decoder') or {}).items():
    if not index.isdecimal():
      raise ValueError(f'{folder / "tokenizer_config.json"}: added_tokens_decoder has the id '
                       f'{index!r}, not an integer of at least 0. Fetch the file again.')
    entry = tokenizer_spec.added_token(int(index), token['content'], special=False)
    tokens[token['content']] = entry | {key: token[key] for key in entry if key in token}
  return sorted(tokens.values(), key=lambda token: token['id'])


def _add_tokens(spec: dict[str, Any], declared: list[dict[str, Any]],
                specials: set[str]) -> None:
  """Joins declared and special tokens with the spec's own, which come first."""
  vocab = spec['model'].get('vocab') or {}
  tokens = {token['content']: token for token in spec.get('added_tokens') or []}
  tokens |= {token['content']: token for token in declared}
  for text in specials:
    if text in tokens:
      tokens[text] = tokens[text] | {'special': True}
    elif text in vocab:
      tokens[text] = tokenizer_spec.added_token(vocab[text], text, special=True)
  spec['added_tokens'] = list(tokens.values())


def _chat_template(folder: pathlib.Path | None, config: dict[str, Any]) -> str:
  if folder is not None and (folder / 'chat_template.jinja').is_file():
    return (folder / 'chat_template.jinja').read_text(encoding='utf-8')
  template = config.get('chat_template') or ''
  if isinstance(template, list):  # several, by name
    template = {entry['name']: entry['template'] for entry in template}.get('default', '')
  return template


def _stops(folder: pathlib.Path | None) -> tuple[int, ...]:
  for name in ('generation_config.json', 'config.json'):
    ids = _read_json(folder, name).get('eos_token_id')
    if ids is not None:
      found = ids if isinstance(ids, list) else [ids]
      if not all(type(i) is int and i >= 0 for i in found):
        raise ValueError(f'{folder / name}: eos_token_id={ids!r} must be a token id or a list of '
                         'them. Fetch the file again.')
      return tuple(found)
  return ()
