# SPDX-License-Identifier: Apache-2.0
"""The header of a GGUF file (llama.cpp), which `models.gguf` and `tokenizer_gguf` read.

    'GGUF', version, counts | metadata key/value pairs | tensor table | padding | tensor data

It is read here and not with `gguf.GGUFReader`, which makes several NumPy arrays for every word of
the vocabulary: 2 s and 160 MB for a 49k vocabulary, against 0.1 s.

Every function raises `struct.error` where the bytes end too early or mean nothing, and
UnicodeDecodeError for text that is no UTF-8. Source: ggml docs/gguf.md.
"""

import mmap
import struct
from typing import Any

VERSIONS = (2, 3)
_SCALARS = {0: 'B', 1: 'b', 2: 'H', 3: 'h', 4: 'I', 5: 'i', 6: 'f', 7: '?', 10: 'Q', 11: 'q',
            12: 'd'}
_STRING, _ARRAY = 8, 9
_LENGTH = struct.Struct('<Q')


def counts(data: mmap.mmap) -> tuple[int, int, int]:
  """(version, tensors, metadata pairs); the version is one of `VERSIONS`, or nothing else holds."""
  return struct.unpack_from('<IQQ', data, 4)


def metadata(data: mmap.mmap, pairs: int) -> tuple[dict[str, Any], int]:
  """The key/value pairs, arrays as lists, and the position behind them."""
  at, found = 24, {}
  for _ in range(pairs):
    key, at = string(data, at)
    (kind,) = struct.unpack_from('<I', data, at)
    found[key], at = _value(data, at + 4, kind)
  return found, at


def string(data: mmap.mmap, at: int) -> tuple[str, int]:
  """The text at a position, and the position behind it."""
  (length,) = _LENGTH.unpack_from(data, at)
  end = at + 8 + length
  if end > len(data):
    raise struct.error('a string reaches beyond the end')
  return data[at + 8:end].decode('utf-8'), end


def _value(data: mmap.mmap, at: int, kind: int) -> tuple[Any, int]:
  if kind == _STRING:
    return string(data, at)
  if kind == _ARRAY:
    kind, count = struct.unpack_from('<IQ', data, at)
    at += 12
    if kind in _SCALARS:
      layout = struct.Struct(f'<{count}{_SCALARS[kind]}')
      return list(layout.unpack_from(data, at)), at + layout.size
    values, item = [], string if kind == _STRING else lambda data, at: _value(data, at, kind)
    for _ in range(count):
      value, at = item(data, at)
      values.append(value)
    return values, at
  if kind not in _SCALARS:
    raise struct.error(f'unknown value type {kind}')
  layout = struct.Struct('<' + _SCALARS[kind])
  return layout.unpack_from(data, at)[0], at + layout.size
