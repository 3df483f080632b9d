# SPDX-License-Identifier: Apache-2.0
"""What constant expressions of model text may do: every operation, call and method, and its bound.

`literals` walks the syntax; here is what it may do at each node. A result over a limit is refused,
where it would be dear before it is made.
"""

import ast
import operator
import re
from typing import Any

from absolute_zero_jax.executor import values

_MAX_BITS = 1 << 14
MAX_LENGTH = 1 << 14       # members of a folded container or characters of a folded string
_MAX_CLASHES = 256          # members of a set that have the hash of another one


class LiteralError(values.ValuesError):
  """The text is not the literal it should be; the message is a short reason."""


def _literal_size(x: Any) -> int:
  return len(x) if isinstance(x, (str, bytes, list, tuple, dict, set, frozenset, range)) else 1


def total(x: Any) -> int:
  """Members and characters at every depth, shared ones each time: what printing or comparing costs.

  Raises:
    LiteralError: more than `MAX_LENGTH`; `[[0] * 9999] * 9999` is quick to make and slow to use.
  """
  total, todo = 0, [x]
  while todo:
    x = todo.pop()
    t = type(x)
    if t is str or t is bytes:
      total += len(x)
    elif t is dict:
      total += 2 * len(x)
      todo += x.keys()
      todo += x.values()
    elif t is list or t is tuple or t is set or t is frozenset:
      total += len(x)
      todo += x
    elif t is int:
      total += x.bit_length() >> 4
    if total > MAX_LENGTH:
      raise LiteralError('too big')
  return total


def bounded(x: Any) -> Any:
  if type(x) is int and x.bit_length() > _MAX_BITS:
    raise LiteralError('too big')
  if _literal_size(x) > MAX_LENGTH:
    raise LiteralError('too big')
  return x


def check_hashes(members: Any) -> None:
  """Refuses members of a set or dict that meet in one place: numbers that differ by 2**61 - 1.

  Putting n of those in compares n**2 / 2 pairs.
  """
  first_of, clashes = {}, 0
  for x in members:
    if type(x) is list or type(x) is dict or type(x) is set:      # not hashable: the caller says so
      return
    first = first_of.setdefault(hash(x), x)
    clashes += first is not x and first != x
    if clashes > _MAX_CLASHES:
      raise LiteralError('too big')


def _mul(a, b):
  for x, y in ((a, b), (b, a)):
    if type(x) is int and not isinstance(y, (int, float, complex)):
      if x * _literal_size(y) > MAX_LENGTH:
        raise LiteralError('too big')
  return a * b


def _pow(a, b):
  if type(a) is int and type(b) is int and b > 0 and a.bit_length() * b > _MAX_BITS:
    raise LiteralError('too big')
  return a ** b


def _shift(a, b):
  if b > _MAX_BITS:
    raise LiteralError('too big')
  return a << b


def _mod(a, b):
  if isinstance(a, (str, bytes)):   # '%999999999d' % 1
    raise LiteralError('string formatting')
  return a % b


def _round(x, digits=None):
  if digits is not None and abs(digits) > 400:    # round(7, -10**9) computes 10**10**9
    raise LiteralError('too big')
  return round(x, digits)


BINARY = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: _mul, ast.Pow: _pow,
           ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv, ast.Mod: _mod,
           ast.LShift: _shift, ast.RShift: operator.rshift, ast.BitOr: operator.or_,
           ast.BitAnd: operator.and_, ast.BitXor: operator.xor}
UNARY = {ast.USub: operator.neg, ast.UAdd: operator.pos, ast.Invert: operator.invert,
          ast.Not: operator.not_}
COMPARISONS = {ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt,
                ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
                ast.In: lambda a, b: a in b, ast.NotIn: lambda a, b: a not in b}
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
# Constructors of values that have no literal of their own; allowed in answers too.
CONSTRUCTORS = {'set': set, 'frozenset': frozenset, 'dict': dict, 'list': list, 'tuple': tuple,
                 'float': float, 'complex': complex, 'bytes': bytes, 'range': range}
# What they take in an answer: `list(set(x))` would have the checker sort and drop repeats, and
# `float('007_0.50')` would have it read.
TAKES = dict.fromkeys(('list', 'tuple'), (list, tuple, range)) | dict.fromkeys(
    ('set', 'frozenset'), (list, tuple, range, set, frozenset)) | {
        'dict': (list, tuple, dict), 'bytes': (list, tuple, range), 'float': (str, float),
        'complex': (int, float)}
NOT_A_NUMBER = re.compile(r'[+-]?(nan|inf|infinity)', re.IGNORECASE)
CALLS = {**CONSTRUCTORS, 'int': int, 'str': str, 'bool': bool, 'len': len, 'sum': sum, 'min': min,
          'max': max, 'abs': abs, 'round': _round, 'sorted': sorted, 'ord': ord, 'chr': chr,
          'reversed': lambda x: list(x)[::-1], 'enumerate': lambda *a: list(
              enumerate(*a)), 'zip': lambda *a: list(zip(*a)), 'bin': bin, 'hex': hex, 'oct': oct}
# Methods whose result is no larger than receiver and arguments together.
METHODS = {
    str: frozenset('upper lower title capitalize swapcase casefold strip lstrip rstrip split '
                   'rsplit splitlines startswith endswith find rfind index count isdigit isalpha '
                   'isalnum isupper islower removeprefix removesuffix'.split()),
    bytes: frozenset('upper lower strip split hex'.split()),
    list: frozenset(('index', 'count', 'copy')),
    tuple: frozenset(('index', 'count')),
    dict: frozenset(('get', 'copy')),
}
