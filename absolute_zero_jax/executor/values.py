# SPDX-License-Identifier: Apache-2.0
"""Plain values: how they cross the process boundary, how they are shown, when two are equal.

A *plain* value is None, bool, int, float, complex, str, bytes, range, Ellipsis, or a list, tuple,
dict, set or frozenset of plain values; exact builtin types only. Three forms exist:

  tagged   what a child writes: JSON of `[tag, payload]`, see `encode`. Hostile until decoded.
  value    the Python object, made by `decode` or by `literals`; only builtin types, so that no
           code of a program runs when it is compared or shown.
  text     `text(value)`: canonical Python source of the value, made by the trusted side.

Nothing here unpickles or evaluates. Every function is total on hostile data: it returns, or raises
`ValuesError`, in time and memory proportional to `MAX_FRAME_BYTES`.
"""

import json
import math
from typing import Any

MAX_FRAME_BYTES = 1 << 16   # of one tagged value on the wire
MAX_NODES = 20_000
MAX_DEPTH = 60
# CPython prints no int of more than 4,300 digits (sys.get_int_max_str_digits), so longer ones could
# not be shown; 14,280 bits are at most 4,299 digits.
_MAX_INT_BITS = 14_280
_SMALL_INT = 1 << 53


class ValuesError(ValueError):
  """A value, or its wire form, is not plain; the message is a short reason."""


def encode(value: Any) -> Any:
  """Tagged form of a plain value, ready for `json.dumps`.

  Runs inside the hostile child, so it only keeps honest programs honest; `decode` is what protects.
  Strings are charged before they are copied, so that a huge output fails early.

  Raises:
    ValuesError: 'type:<name>' for an object that is not plain, 'too big', 'too deep'.
  """
  budget = [MAX_NODES]
  return _encode(value, 0, budget)


def _encode(x: Any, depth: int, budget: list[int]) -> Any:
  budget[0] -= 1
  t = type(x)
  if t is str or t is bytes:
    budget[0] -= len(x) >> 2
  if budget[0] < 0:
    raise ValuesError('too big')
  if depth > MAX_DEPTH:
    raise ValuesError('too deep')
  if t is str:
    return ['s', x]
  if t is int:
    if -_SMALL_INT < x < _SMALL_INT:
      return ['i', x]
    budget[0] -= x.bit_length() >> 5
    if x.bit_length() > _MAX_INT_BITS or budget[0] < 0:
      raise ValuesError('too big')
    return ['I', hex(x)]
  if x is None:
    return ['n']
  if t is bool:
    return ['b', 1 if x else 0]
  if t is float:
    return ['f', repr(x)]
  if t is list or t is tuple or t is set or t is frozenset:
    return [_TAG[t], [_encode(e, depth + 1, budget) for e in x]]
  if t is dict:
    return ['d', [[_encode(k, depth + 1, budget), _encode(v, depth + 1, budget)]
                  for k, v in x.items()]]
  if t is complex:
    return ['c', repr(x.real), repr(x.imag)]
  if t is bytes:
    return ['y', x.hex()]
  if x is Ellipsis:
    return ['e']
  if t is range:
    return ['r', *[_encode(n, depth, budget) for n in (x.start, x.stop, x.step)]]
  raise ValuesError('type:' + type_name(t))


_TAG = {list: 'l', tuple: 't', set: 'S', frozenset: 'F'}
_SEQUENCE = {'l': list, 't': tuple, 'S': set, 'F': frozenset}


def type_name(t: Any, _get=type.__dict__['__name__'].__get__) -> str:
  """Name of a class as the interpreter holds it: a metaclass's own `__name__` is not asked."""
  try:
    return _get(t)[:60]
  except (TypeError, AttributeError):
    return '?'


def _refuse(text: str) -> Any:
  raise ValuesError('number in frame')


def load_frame(data: bytes) -> Any:
  """JSON of one frame; only small ints may occur as bare numbers.

  Raises:
    ValuesError: not UTF-8 JSON, too long, nested too deep, or a bare float.
  """
  if len(data) > MAX_FRAME_BYTES:
    raise ValuesError('frame too long')
  try:
    return json.loads(data.decode('utf-8', 'surrogatepass'), parse_float=_refuse,
                      parse_constant=_refuse)
  except (ValueError, RecursionError) as e:
    raise ValuesError('malformed frame') from e


def decode(tagged: Any) -> Any:
  """The value of a tagged form that a child sent.

  Raises:
    ValuesError: unknown tag, wrong payload type, unhashable member or key, equal keys, or a limit.
  """
  try:
    return _decode(tagged, 0, [MAX_NODES])
  except (TypeError, ValueError, IndexError, OverflowError, RecursionError) as e:
    raise e if isinstance(e, ValuesError) else ValuesError('malformed value') from e


def _decode(x: Any, depth: int, budget: list[int]) -> Any:
  budget[0] -= 1
  if budget[0] < 0 or depth > MAX_DEPTH:
    raise ValuesError('too big' if budget[0] < 0 else 'too deep')
  if type(x) is not list or not x:
    raise ValuesError('malformed value')
  tag = x[0]
  if len(x) != _ARITY.get(tag if type(tag) is str else '', 0):
    raise ValuesError('malformed value')
  if tag == 's':
    return _exactly(str, x[1])
  if tag == 'i':
    return _exactly(int, x[1])
  if tag in ('l', 't', 'S', 'F'):
    members = [_decode(e, depth + 1, budget) for e in _exactly(list, x[1])]
    if tag == 'l':
      return members
    made = _SEQUENCE[tag](members)
    if len(made) != len(members):
      raise ValuesError('equal members')
    return made
  if tag == 'd':
    pairs = _exactly(list, x[1])
    made = {}
    for pair in pairs:
      key, value = _exactly(list, pair)
      made[_decode(key, depth + 1, budget)] = _decode(value, depth + 1, budget)
    if len(made) != len(pairs):
      raise ValuesError('equal keys')
    return made
  if tag == 'n':
    return None
  if tag == 'e':
    return Ellipsis
  if tag == 'b':
    return bool(_exactly(int, x[1]))
  if tag == 'f':
    return _float(x[1])
  if tag == 'c':
    return complex(_float(x[1]), _float(x[2]))
  if tag == 'y':
    return bytes.fromhex(_exactly(str, x[1]))
  if tag == 'r':
    return range(*[_exactly(int, _decode(n, depth, budget)) for n in x[1:]])
  digits = _exactly(str, x[1])     # 'I'
  if len(digits) > _MAX_INT_BITS // 4 + 8:
    raise ValuesError('too big')
  made = int(digits, 16)
  if made.bit_length() > _MAX_INT_BITS:
    raise ValuesError('too big')
  return made


_ARITY = {'n': 1, 'e': 1, 'r': 4, 'b': 2, 'i': 2, 'I': 2, 'f': 2, 'c': 3, 's': 2, 'y': 2, 'l': 2,
          't': 2, 'S': 2, 'F': 2, 'd': 2}


def _exactly(kind: type, x: Any) -> Any:
  if type(x) is not kind:
    raise ValuesError('malformed value')
  return x


def _float(x: Any) -> float:
  if len(_exactly(str, x)) > 32:
    raise ValuesError('malformed value')
  return float(x)


def text(value: Any) -> str:
  """Canonical Python source of a plain value; `literals.parse_value(text(v))` equals `v`.

  As `repr`, except that members of sets are sorted (their order is the hash seed's), and that
  floats without a literal are calls: `float('nan')`, `float('inf')`, `float('-inf')`. Dicts keep
  their insertion order, because that is what Python would show.
  """
  return _source(value, _show_float, sort_dicts=False)


def _source(v: Any, show_float, *, sort_dicts: bool) -> str:
  t = type(v)
  if t is float:
    return show_float(v)
  if t is list:
    return '[' + ', '.join([_source(e, show_float, sort_dicts=sort_dicts) for e in v]) + ']'
  if t is tuple:
    inner = ', '.join([_source(e, show_float, sort_dicts=sort_dicts) for e in v])
    return f'({inner},)' if len(v) == 1 else f'({inner})'
  if t is dict:
    items = [f'{_source(k, show_float, sort_dicts=sort_dicts)}: '
             f'{_source(x, show_float, sort_dicts=sort_dicts)}' for k, x in v.items()]
    return '{' + ', '.join(sorted(items) if sort_dicts else items) + '}'
  if t is set or t is frozenset:
    inner = ', '.join(sorted([_source(e, show_float, sort_dicts=sort_dicts) for e in v]))
    if t is set:
      return '{' + inner + '}' if inner else 'set()'
    return 'frozenset({' + inner + '})' if inner else 'frozenset()'
  if t is complex:
    if show_float is _show_float and _has_literal(v):
      return repr(v)
    return f'complex({show_float(v.real)}, {show_float(v.imag)})'
  if t is range and sort_dicts:        # equal ranges have the same numbers; len() may fail
    return f'range:{v[0]}:{v[-1]}:{v.step if v[1:] else 0}' if v else 'range:'
  return repr(v)


def _has_literal(v: complex) -> bool:
  """Whether Python reads `repr(v)` back with every sign: `-2j` is a negated `0.0+2j`."""
  negative_zero = any(x == 0 and math.copysign(1, x) < 0 for x in (v.real, v.imag))
  return (math.isfinite(v.real) and math.isfinite(v.imag) and not negative_zero
          and not (v.real == 0 and v.imag < 0))


def _show_float(v: float) -> str:
  return repr(v) if math.isfinite(v) else f"float('{v!r}')"


def equal(a: Any, b: Any, mode: str = 'strict') -> bool:
  """Whether two plain values count as the same answer.

  'strict' distinguishes types at every depth: `1`, `1.0` and `True` differ, so do list and tuple,
  set and frozenset, str and bytes. 'loose' is Python's `==`, so those numbers and those sets are
  equal. In both, nan equals nan, `0.0` equals `-0.0`, and the order of dicts and sets is ignored.
  Another mode raises ValueError.

  Source: the reference compares with `==` inside the program's own process, where nan never equals
  itself and an object's `__eq__` decides; plain values have no code of their own.
  """
  return key(a, mode) == key(b, mode)


def key(v: Any, mode: str) -> str:
  """Text that is the same for two plain values exactly when they are `equal`."""
  if mode == 'strict':
    return _strict(v)
  if mode == 'loose':
    return _strict(_loosen(v))
  raise ValueError(f"equality={mode!r} must be 'strict' or 'loose'.")


def _strict(v: Any) -> str:
  """Text that is the same for two values exactly when they are equal."""
  # x + 0.0 turns -0.0 into 0.0 and changes nothing else.
  return _source(v, lambda x: _show_float(x + 0.0), sort_dicts=True)


def _loosen(v: Any) -> Any:
  """The value with numbers and sets in one type each, so that strict text equality is `==`."""
  t = type(v)
  if t is complex and v.imag == 0:
    v, t = v.real, float
  if t is bool or (t is float and v.is_integer()):
    return int(v)
  if t is list or t is tuple:
    return t(_loosen(e) for e in v)
  if t is set or t is frozenset:
    return frozenset(_loosen(e) for e in v)
  if t is dict:
    return {_loosen(k): _loosen(e) for k, e in v.items()}
  return v
