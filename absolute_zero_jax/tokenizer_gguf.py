# SPDX-License-Identifier: Apache-2.0
"""The tokenizer inside a .gguf file, read from its metadata without torch and without the weights.

Only the header is read: SmolLM2's 49,152 tokens take a tenth of a second.
"""

import mmap
import pathlib
import re
import struct
from typing import Any

from absolute_zero_jax import gguf_header, tokenizer_spec, tokenizer_spm

_BYTE_LEVEL = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True}
_GPT2 = _BYTE_LEVEL | {'use_regex': True}
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS = r'[^\r\n\p{L}\p{N}]?\p{L}+'
_REST = r' ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'


def _sequence(*steps: dict[str, Any]) -> dict[str, Any]:
  return {'type': 'Sequence', 'pretokenizers': list(steps)}


def _split(digits: str) -> dict[str, Any]:
  pattern = '|'.join((_CONTRACTIONS, _LETTERS, digits, _REST))
  return _sequence({'type': 'Split', 'pattern': {'Regex': pattern}, 'behavior': 'Isolated',
                    'invert': False}, _BYTE_LEVEL | {'use_regex': False})


_DIGITS = _sequence({'type': 'Digits', 'individual_digits': True}, _GPT2)
_LLAMA3 = _split(r'\p{N}{1,3}')
_QWEN2 = _split(r'\p{N}')

# tokenizer.ggml.pre -> how text is cut before merging, as the models' own tokenizer.json says it.
# transformers' GGUF reader cuts SmolLM2 by the GPT-2 rule alone: two spaces or line breaks before
# a digit become other tokens there. llama.cpp and the model's own file separate digits first.
_PRE_TOKENIZERS = {
    'smollm': _DIGITS, 'starcoder': _DIGITS, 'refact': _DIGITS, 'codeshell': _DIGITS,
    'gpt-2': _GPT2, 'olmo': _GPT2,
    'llama-bpe': _LLAMA3, 'llama3': _LLAMA3, 'llama-v3': _LLAMA3, 'smaug-bpe': _LLAMA3,
    'qwen2': _QWEN2, 'deepseek-r1-qwen': _QWEN2,
}
_WHOLE_WORDS = ('llama-bpe', 'llama3', 'llama-v3')  # a word of the vocabulary is not merged
_NFC = ('qwen2',)
_FILLER = re.compile(r'\[PAD\d+\]')


def read(path: pathlib.Path) -> tokenizer_spec.Source:
  """Builds the tokenizer of a GGUF file from its metadata.

  Supports the kinds 'gpt2' (byte-level BPE, for the pre-tokenizers of the LLaMA 3, SmolLM, Qwen2
  to Qwen3 and GPT-2 families) and 'llama' (sentencepiece BPE).

  Raises:
    ValueError: the file is truncated, no GGUF, holds no tokenizer, or one of another kind.

  Source: llama.cpp, gguf-py/gguf/constants.py (keys) and src/llama-vocab.cpp (pre-tokenizers,
  default of add_bos); SmolLM2's tokenizer.json (digits before the GPT-2 rule).
  """
  meta = metadata(path, 'tokenizer.')
  kind = meta.get('tokenizer.ggml.model')
  pre = meta.get('tokenizer.ggml.pre')
  if kind is None or 'tokenizer.ggml.tokens' not in meta:
    raise ValueError(f'{path} holds no tokenizer. Use the directory of the original model.')
  tokens = meta['tokenizer.ggml.tokens']
  for key in ('tokenizer.ggml.token_type', 'tokenizer.ggml.scores'):
    if len(meta.get(key, tokens)) != len(tokens):
      raise ValueError(f'{path}: {key} has {len(meta[key])} entries for {len(tokens)} tokens; the '
                       'file is damaged. Fetch it again.')
  if kind == 'llama':
    spec, adds_bos = _sentencepiece(meta, str(path)), True
  elif kind != 'gpt2':
    raise ValueError(f"{path} has a tokenizer of kind {kind!r}; supported are 'gpt2' and 'llama'. "
                     'Use the directory of the original model.')
  elif pre not in _PRE_TOKENIZERS:
    raise ValueError(f'{path} cuts text by {pre!r}; supported are {sorted(_PRE_TOKENIZERS)}. '
                     'Use the directory of the original model.')
  else:
    spec, adds_bos = _byte_level(meta, pre, str(path)), pre in _WHOLE_WORDS
  keys = {'bos_token': 'bos', 'eos_token': 'eos', 'unk_token': 'unknown', 'pad_token': 'padding'}
  ids = {name: meta.get(f'tokenizer.ggml.{key}_token_id', -1) for name, key in keys.items()}
  stops = (meta.get(f'tokenizer.ggml.{key}_token_id') for key in ('eot', 'eom'))
  names = {name: tokens[index] for name, index in ids.items() if 0 <= index < len(tokens)}
  added = {token['content']: token for token in spec['added_tokens']}
  for name, text in names.items():
    added[text] = added.get(text, tokenizer_spec.added_token(ids[name], text, special=True)
                            ) | {'special': True}
  spec['added_tokens'] = list(added.values())
  spec['added_tokens'].sort(key=lambda token: token['id'])
  return tokenizer_spec.Source(
      str(path), spec, names, meta.get('tokenizer.ggml.add_bos_token', adds_bos),
      meta.get('tokenizer.chat_template', ''),
      tuple(index for index in stops if index is not None))


def metadata(path: pathlib.Path, prefix: str = '') -> dict[str, Any]:
  """Key-value pairs of a GGUF header whose key starts with `prefix`; arrays come as lists.

  Raises ValueError for a file of another kind or version, and for a damaged one.
  """
  with open(path, 'rb') as file:
    if file.read(4) != b'GGUF':
      raise ValueError(f'{path} is no GGUF file. Fetch it again.')
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
      try:
        version, _, pairs = gguf_header.counts(data)
        if version not in gguf_header.VERSIONS:
          raise ValueError(f'GGUF version {version} is not supported, only 2 and 3 (little '
                           'endian). Convert the model again with a current llama.cpp.')
        found, _ = gguf_header.metadata(data, pairs)
      except (struct.error, OverflowError, UnicodeDecodeError) as error:
        raise ValueError(f'The header of {path} is damaged or cut off. Fetch it again.') from error
  return {key: value for key, value in found.items() if key.startswith(prefix)}


def _byte_level(meta: dict[str, Any], pre: str, origin: str) -> dict[str, Any]:
  tokens = meta['tokenizer.ggml.tokens']
  kinds = meta.get('tokenizer.ggml.token_type', [tokenizer_spm.NORMAL] * len(tokens))
  # Converters fill a padded vocabulary with these.
  count = len(tokens)
  while count and kinds[count - 1] == tokenizer_spm.UNUSED and _FILLER.fullmatch(tokens[count - 1]):
    count -= 1
  tokens, kinds = tokens[:count], kinds[:count]
  vocab = {token: index for index, token in enumerate(tokens)}
  if len(vocab) != len(tokens):
    raise ValueError(f'{origin} names a token twice; the file is damaged. Fetch it again.')
  return {
      'version': '1.0', 'truncation': None, 'padding': None,
      'added_tokens': [
          tokenizer_spec.added_token(index, tokens[index], special=kind == tokenizer_spm.CONTROL)
          for index, kind in enumerate(kinds)
          if kind in (tokenizer_spm.CONTROL, tokenizer_spm.USER_DEFINED)],
      'normalizer': {'type': 'NFC'} if pre in _NFC else None,
      'pre_tokenizer': _PRE_TOKENIZERS[pre], 'post_processor': None,
      'decoder': _GPT2,
      'model': {'type': 'BPE', 'dropout': None, 'unk_token': None,
                'continuing_subword_prefix': '', 'end_of_word_suffix': '', 'fuse_unk': False,
                'byte_fallback': False, 'ignore_merges': pre in _WHOLE_WORDS,
                'vocab': vocab,
                # A piece never holds a space: it is spelled with the letter G with a dot.
                'merges': [pair.split(' ', 1) for pair in meta.get('tokenizer.ggml.merges', [])]},
  }


def _sentencepiece(meta: dict[str, Any], origin: str) -> dict[str, Any]:
  tokens = meta['tokenizer.ggml.tokens']
  kinds = meta.get('tokenizer.ggml.token_type', [tokenizer_spm.NORMAL] * len(tokens))
  scores = meta.get('tokenizer.ggml.scores', [0.0] * len(tokens))
  return tokenizer_spm.bpe_from_pieces(
      list(zip(tokens, scores, kinds)), byte_fallback=tokenizer_spm.BYTE in kinds, origin=origin,
      dummy_prefix=meta.get('tokenizer.ggml.add_space_prefix', True),
      unk_id=meta.get('tokenizer.ggml.unknown_token_id', 0))
