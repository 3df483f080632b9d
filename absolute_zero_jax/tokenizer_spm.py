# SPDX-License-Identifier: Apache-2.0
"""Sentencepiece BPE vocabularies (LLaMA 2, Mistral) as tokenizer.json content.

The model file is a small protobuf and is read as such; the sentencepiece package is not needed.
"""

from collections.abc import Iterable, Sequence
import pathlib
import struct
from typing import Any

from absolute_zero_jax import tokenizer_spec

# Piece types of sentencepiece; GGUF's tokenizer.ggml.token_type uses the same numbers.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_BPE = 2  # TrainerSpec.ModelType


def read(path: pathlib.Path,
         dummy_prefix: bool | None = None) -> tuple[dict[str, Any], dict[str, str]]:
  """Reads a ModelProto: field 1 pieces, 2 trainer spec, 3 normalizer spec.

  `dummy_prefix` overrules whether it puts a space before a text.

  Source: sentencepiece_model.proto of google/sentencepiece (field numbers and defaults).
  """
  try:
    fields = list(_proto_fields(path.read_bytes()))
    pieces = []
    for piece in (dict(_proto_fields(message)) for n, message in fields if n == 1):
      score, = struct.unpack('<f', piece.get(2, bytes(4)))
      pieces.append((piece[1].decode(), score, piece.get(3, NORMAL)))
    trainer = {k: v for n, message in fields if n == 2 for k, v in _proto_fields(message)}
    normal = {k: v for n, message in fields if n == 3 for k, v in _proto_fields(message)}
  except (IndexError, KeyError, TypeError, AttributeError, ValueError, struct.error) as error:
    raise ValueError(f'{path} is no sentencepiece model. Fetch the file again.') from error
  if not pieces:
    raise ValueError(f'{path} is no sentencepiece model: it holds no pieces. Fetch it again.')
  if trainer.get(3, 1) != _BPE or normal.get(2) or normal.get(4, 1) or trainer.get(24, 0):
    raise ValueError(f'{path} is not of the LLaMA kind (BPE over unchanged text): its model type '
                     f'is {trainer.get(3, 1)}, its normalizer {normal.get(1, b"").decode()!r}. '
                     'Convert it to a tokenizer.json.')
  # Ids follow the proto's defaults; -1 (absent) is a varint of 64 bits.
  ids = {'unk_token': trainer.get(40, 0), 'bos_token': trainer.get(41, 1),
         'eos_token': trainer.get(42, 2), 'pad_token': trainer.get(43, -1)}
  names = {name: pieces[index][0] for name, index in ids.items() if 0 <= index < len(pieces)}
  spec = bpe_from_pieces(pieces, byte_fallback=bool(trainer.get(35, 0)), origin=str(path),
                         dummy_prefix=bool(normal.get(3, 1) if dummy_prefix is None
                                           else dummy_prefix), unk_id=ids['unk_token'])
  return spec, names


def bpe_from_pieces(pieces: Sequence[tuple[str, float, int]], *, byte_fallback: bool,
                    dummy_prefix: bool, unk_id: int, origin: str) -> dict[str, Any]:
  """The spec of a sentencepiece BPE vocabulary; `pieces` are (text, score, type) in id order.

  sentencepiece joins, again and again, the neighbours whose union has the best score. That is a
  merge list: every split of a piece into two pieces, best score first. Of equal scores it joins
  the leftmost, where a longer piece has grown already: hence longer left halves first.

  The space before a text is also put after an added token inside of it, as LLaMA 2's own
  tokenizer.json does and sentencepiece does not.
  """
  vocab = {text: index for index, (text, _, _) in enumerate(pieces)}
  if len(vocab) != len(pieces):
    raise ValueError(f'{origin} names a piece twice; the file is damaged.')
  normal = {text: score for text, score, kind in pieces if kind == NORMAL}
  merges = []
  for text, score in normal.items():
    for cut in range(1, len(text)):
      left, right = text[:cut], text[cut:]
      if left in normal and right in normal:
        merges.append((-score, -cut, vocab[text], left, right))
  merges.sort()
  normalizers = [{'type': 'Replace', 'pattern': {'String': ' '}, 'content': '\u2581'}]
  decoders = [{'type': 'Replace', 'pattern': {'String': '\u2581'}, 'content': ' '},
              {'type': 'ByteFallback'}, {'type': 'Fuse'}]
  if dummy_prefix:
    # Not Metaspace: it leaves a text alone that starts with a space, sentencepiece does not.
    normalizers.insert(0, {'type': 'Prepend', 'prepend': '\u2581'})
    decoders.append({'type': 'Strip', 'content': ' ', 'start': 1, 'stop': 0})
  return {
      'version': '1.0', 'truncation': None, 'padding': None,
      'added_tokens': [tokenizer_spec.added_token(index, text, special=kind != USER_DEFINED)
                       for index, (text, _, kind) in enumerate(pieces)
                       if kind in (UNKNOWN, CONTROL, USER_DEFINED)],
      'normalizer': {'type': 'Sequence', 'normalizers': normalizers},
      'pre_tokenizer': None, 'post_processor': None,
      'decoder': {'type': 'Sequence', 'decoders': decoders},
      'model': {'type': 'BPE', 'dropout': None, 'unk_token': pieces[unk_id][0],
                'continuing_subword_prefix': None, 'end_of_word_suffix': None, 'fuse_unk': True,
                'byte_fallback': byte_fallback, 'ignore_merges': False, 'vocab': vocab,
                'merges': [[left, right] for *_, left, right in merges]},
  }


def _proto_fields(data: bytes) -> Iterable[tuple[int, Any]]:
  """(field number, int or bytes) of one protobuf message, in file order."""
  position = 0
  while position < len(data):
    key, position = _varint(data, position)
    number, wire = key >> 3, key & 7
    if wire == 0:
      value, position = _varint(data, position)
    elif wire in (1, 2, 5):
      size = 8 if wire == 1 else 4
      if wire == 2:
        size, position = _varint(data, position)
      if position + size > len(data):
        raise IndexError('truncated')
      value, position = data[position:position + size], position + size
    else:
      raise IndexError(f'wire type {wire}')
    yield number, value


def _varint(data: bytes, position: int) -> tuple[int, int]:
  value, shift = 0, 0
  while True:
    byte = data[position]
    position += 1
    value |= (byte & 127) << shift
    if byte < 128:
      return value, position
    shift += 7
