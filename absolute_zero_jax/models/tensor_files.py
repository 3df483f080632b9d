# SPDX-License-Identifier: Apache-2.0
"""Reads and writes the safetensors format one tensor at a time.

    8 bytes: header length n | n bytes: JSON {name: {dtype, shape, data_offsets}} | raw tensors

The safetensors library writes a file from a dictionary of all its arrays; a trainer that exports
while it holds parameters and optimizer state cannot afford that second copy. The format is small
enough to stream: a header that is known beforehand, then tensor after tensor.

Source: safetensors format specification, version 0.3 and later.
"""

from collections.abc import Iterable, Mapping
import json
import math
import os
import pathlib
import struct
from typing import NamedTuple

import ml_dtypes
import numpy as np

DTYPES = {'F32': np.dtype(np.float32), 'F16': np.dtype(np.float16),
          'BF16': np.dtype(ml_dtypes.bfloat16), 'F64': np.dtype(np.float64)}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000                  # the library's own bound


class Entry(NamedTuple):
  """Where one tensor lies: its file, shape, dtype code of the header and first byte."""
  path: pathlib.Path
  shape: tuple[int, ...]
  dtype: str
  start: int


def entries(path: str | os.PathLike) -> dict[str, Entry]:
  """Name -> Entry of every tensor in one file, after checking that all their bytes are there.

  Raises ValueError if the file is missing, truncated or no safetensors file, holds a tensor whose
  size contradicts its shape, or tensors that do not lie one behind the other.
  """
  path = pathlib.Path(path)
  try:
    size = path.stat().st_size
    with path.open('rb') as f:
      header, base = _header(f, path, size)
  except FileNotFoundError:
    raise ValueError(f'{path} does not exist; download the checkpoint again') from None
  table, spans = {}, []
  for name, field in header.items():
    if name == '__metadata__':
      continue
    try:
      shape, dtype = tuple(field['shape']), field['dtype']
      first, last = field['data_offsets']
      if not all(type(n) is int and n >= 0 for n in (*shape, first, last)):
        raise ValueError('shape and data_offsets must be integers of at least 0')
      if dtype in DTYPES and last - first != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError('size and shape disagree')
    except (KeyError, TypeError, ValueError) as e:
      raise ValueError(f'{path}: the header entry of tensor {name!r} is damaged ({e}); '
                       'download the file again') from None
    table[name] = Entry(path, shape, dtype, base + first)
    spans.append((first, last, name))
  end = 0
  for first, last, name in sorted(spans):
    if first != end:
      raise ValueError(f'{path}: tensor {name!r} starts at byte {first}, the one before it ends at '
                       f'{end}; download the file again')
    end = last
  if base + end > size:
    raise _truncated(path, size, base + end)
  return table


def read(entry: Entry) -> np.ndarray:
  """One tensor, read into memory of its own (no map of the file stays behind).

  Raises ValueError for a dtype other than F64, F32, F16, BF16, or if the file has shrunk.
  """
  if entry.dtype not in DTYPES:
    raise ValueError(f'{entry.path} stores {entry.dtype} tensors; allowed: {", ".join(DTYPES)}. '
                     'Use a checkpoint that is not quantised')
  dtype = DTYPES[entry.dtype]
  count = math.prod(entry.shape)
  with entry.path.open('rb') as f:
    f.seek(entry.start)
    flat = np.fromfile(f, dtype, count)
  if flat.size != count:
    raise _truncated(entry.path, entry.path.stat().st_size,
                     entry.start + count * dtype.itemsize)
  return flat.reshape(entry.shape)


def write(path: str | os.PathLike, shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype,
          arrays: Iterable[np.ndarray]) -> None:
  """Writes `arrays` in the order of `shapes`, all as `dtype`, and flushes them to the disk.

  `arrays` may be a generator: only one array is held at a time. An array of another dtype is cast
  (rounded to nearest even), one of another shape raises ValueError.
  """
  header, offset = {'__metadata__': {'format': 'pt'}}, 0
  for name, shape in shapes.items():
    end = offset + math.prod(shape) * dtype.itemsize
    header[name] = {'dtype': code(dtype), 'shape': list(shape), 'data_offsets': [offset, end]}
    offset = end
  text = json.dumps(header, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % 8)          # tensors start aligned
  with open(path, 'wb') as f:
    f.write(struct.pack('<Q', len(text)) + text)
    for (name, shape), array in zip(shapes.items(), arrays, strict=True):
      if array.shape != shape:
        raise ValueError(f'tensor {name!r} has shape {array.shape}, announced was {shape}')
      f.write(np.ascontiguousarray(array, dtype).reshape(-1).view(np.uint8))
    f.flush()
    os.fsync(f.fileno())


def code(dtype: np.dtype) -> str:
  """The header's name of a dtype, e.g. 'BF16'. Raises ValueError for one not in DTYPES."""
  if np.dtype(dtype) not in _CODES:
    raise ValueError(f'weights of dtype {np.dtype(dtype)} cannot be stored; allowed: '
                     f'{", ".join(str(d) for d in _CODES)}')
  return _CODES[np.dtype(dtype)]


def _header(f, path: pathlib.Path, size: int) -> tuple[dict, int]:
  start = f.read(8)
  if len(start) < 8:
    raise _truncated(path, size, 8)
  length = struct.unpack('<Q', start)[0]
  if length > _MAX_HEADER:
    hint = ' (it looks like a Git LFS pointer)' if start.startswith(b'version') else ''
    raise ValueError(f'{path} is no safetensors file{hint}; download it again')
  text = f.read(length)
  if len(text) < length:
    raise _truncated(path, size, 8 + length)
  try:
    header = json.loads(text)
  except (UnicodeDecodeError, json.JSONDecodeError) as e:
    raise ValueError(f'{path}: the safetensors header is damaged ({e}); '
                     'download the file again') from None
  if not isinstance(header, dict):
    raise ValueError(f'{path} is no safetensors file; download it again')
  return header, 8 + length


def _truncated(path: pathlib.Path, size: int, needed: int) -> ValueError:
  return ValueError(f'{path} is truncated: it has {size:,} bytes, its header announces '
                    f'{needed:,}; download the file again')
