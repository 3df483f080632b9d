# SPDX-License-Identifier: Apache-2.0
"""Model-written text to plain values, without evaluating it.

  parse_value(text)  -> value          an answer or a gold: a literal, or a constructor of literals
  parse_inputs(text) -> Inputs         an argument list: literals, keywords, constant expressions

Text is capped in length and nesting before Python's parser sees it. Constant expressions
(`dict(a=1)`, `'x'.upper()`, `[0 for _ in range(9)]`, `2**31 - 1`) are folded by a small interpreter
of syntax nodes with a bound on every result, never by `eval`; they are accepted in inputs, where
the text only chooses a value. Answers must be values already: `len('abc')` would let a solver hand
its work to the checker.
"""

import ast
import dataclasses
import math
import operator
import re
from typing import Any

from absolute_zero_jax.executor import values

MAX_CHARS = 8192
MAX_NESTING = 100
_MAX_BITS = 1 << 14
_MAX_LENGTH = 1 << 14       # members of a folded container or characters of a folded string
_MAX_ARGUMENTS = 64
_MAX_CLASHES = 256          # members of a set that have the hash of another one


class LiteralError(values.ValuesError):
  """The text is not the literal it should be; the message is a short reason."""


class NeedsCall(LiteralError):
  """The text calls `f` itself; `inputs` are the canonical arguments whose result is missing."""

  def __init__(self, inputs: str):
    super().__init__("call of 'f'")
    self.inputs = inputs


@dataclasses.dataclass(frozen=True)
class Inputs:
  """An argument list as values. `text` is canonical: positional arguments, then keywords."""
  args: tuple[Any, ...]
  kwargs: dict[str, Any]
  text: str


def parse_value(text: str, *, fold: bool = False) -> Any:
  """The plain value that an answer's text spells.

  Accepted: literals, signs and `a+bj`; `nan`, `inf`; `set()`, `frozenset(..)`, `dict(..)`,
  `list(..)`, `tuple(..)`, `range(..)`, `float('..')`, `complex(..)`, `bytes(..)` of such values.
  With `fold`, constant expressions as in `parse_inputs`.

  Raises:
    LiteralError: anything else, text over `MAX_CHARS` or nested over `MAX_NESTING`.
  """
  node = _parse(text.strip(), '{}').body
  return _checked(lambda: _Folder(expressions=fold).value(node))


def parse_inputs(text: str, calls: dict[str, Any] | None = None) -> Inputs:
  """The argument list that `f(<text>)` would receive.

  The text must be exactly the arguments of one call, so `1) or (True` and a second line of code are
  refused; so are `*`, `**`, lambdas, names and comprehensions. Line breaks and comments inside the
  list do not matter. An empty text is a call without arguments.

  Args:
    calls: results of `f` by canonical arguments. Proposers often write `f([1, 2])` for the input;
      it means what it says, the value that `f` returns. None refuses such calls.

  Raises:
    NeedsCall: a call of `f` whose result is not in `calls`.
    LiteralError: anything else, or a result over the size limits.
  """
  call = _parse(text.strip(), 'f({}\n)').body
  if type(call) is not ast.Call or type(call.func) is not ast.Name:
    raise LiteralError('not an argument list')
  if len(call.args) + len(call.keywords) > _MAX_ARGUMENTS:
    raise LiteralError('too many arguments')
  if any(k.arg is None for k in call.keywords):
    raise LiteralError('starred argument')
  folder = _Folder(expressions=True, calls=calls)
  args = _checked(lambda: tuple(folder.value(a) for a in call.args))
  kwargs = _checked(lambda: {k.arg: folder.value(k.value) for k in call.keywords})
  canonical = _arguments(args, kwargs)
  if len(canonical) > MAX_CHARS:
    raise LiteralError('too long')
  return Inputs(args, kwargs, canonical)


def _arguments(args: tuple, kwargs: dict[str, Any]) -> str:
  """Canonical text of an argument list."""
  return ', '.join([values.text(a) for a in args]
                   + [f'{k}={values.text(v)}' for k, v in kwargs.items()])


def _checked(make) -> Any:
  """`make()`, with its failures as `LiteralError`, and only plain values let through."""
  try:
    made = make()
    for v in made.values() if type(made) is dict else (made,):
      values.encode(v)
    return made
  except LiteralError:
    raise
  except (ValueError, TypeError, ArithmeticError, LookupError, AttributeError, RecursionError,
          MemoryError) as e:
    reason = str(e) if isinstance(e, values.ValuesError) else type(e).__name__
    raise LiteralError(f'not a constant: {reason}') from e


def check_text(text: str, max_chars: int = MAX_CHARS) -> None:
  """Refuses text that could cost Python's parser much time, memory or stack.

  Raises:
    LiteralError: too long, NUL, over `MAX_NESTING` open brackets, or a long run of unary operators.
  """
  if len(text) > max_chars:
    raise LiteralError('too long')
  if '\0' in text:
    raise LiteralError('NUL character')
  if _could_nest(text) and (_depth(text) > MAX_NESTING or _UNARY_RUN.search(text)):
    raise LiteralError('nested too deep')


def _could_nest(text: str) -> bool:
  """False where counting alone shows that nothing is too deep: nearly always, and quickly."""
  count = text.count
  return (count('(') + count('[') + count('{') > MAX_NESTING or count('lambda') >= 50
          or count('-') + count('+') + count('~') >= 100 or count('not') >= 100)


def _depth(text: str) -> int:
  depth = deepest = 0
  for bracket in _BRACKETS.findall(text):
    depth += 1 if bracket in '([{' else -1
    deepest = max(deepest, depth)
  return deepest


_BRACKETS = re.compile(r'[(\[{)\]}]')
_UNARY_RUN = re.compile(r'(?:[-+~][ \t]*){100}|(?:\bnot[ \t]+){100}|(?:\blambda\s*:\s*){50}')


def _parse(text: str, frame: str) -> ast.Expression:
  check_text(text)
  try:
    return ast.parse(frame.format(text), mode='eval')
  except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
    raise LiteralError('syntax') from e


def _literal_size(x: Any) -> int:
  return len(x) if isinstance(x, (str, bytes, list, tuple, dict, set, frozenset, range)) else 1


def _total(x: Any) -> int:
  """Members and characters at every depth, shared ones each time: what printing or comparing costs.

  Raises:
    LiteralError: more than `_MAX_LENGTH`; `[[0] * 9999] * 9999` is quick to make and slow to use.
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
    if total > _MAX_LENGTH:
      raise LiteralError('too big')
  return total


def _bounded(x: Any) -> Any:
  if type(x) is int and x.bit_length() > _MAX_BITS:
    raise LiteralError('too big')
  if _literal_size(x) > _MAX_LENGTH:
    raise LiteralError('too big')
  return x


def _check_hashes(members: Any) -> None:
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
      if x * _literal_size(y) > _MAX_LENGTH:
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


_BINARY = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: _mul, ast.Pow: _pow,
           ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv, ast.Mod: _mod,
           ast.LShift: _shift, ast.RShift: operator.rshift, ast.BitOr: operator.or_,
           ast.BitAnd: operator.and_, ast.BitXor: operator.xor}
_UNARY = {ast.USub: operator.neg, ast.UAdd: operator.pos, ast.Invert: operator.invert,
          ast.Not: operator.not_}
_COMPARISONS = {ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt,
                ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
                ast.In: lambda a, b: a in b, ast.NotIn: lambda a, b: a not in b}
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
# Constructors of values that have no literal of their own; allowed in answers too.
_CONSTRUCTORS = {'set': set, 'frozenset': frozenset, 'dict': dict, 'list': list, 'tuple': tuple,
                 'float': float, 'complex': complex, 'bytes': bytes, 'range': range}
# What they take in an answer: `list(set(x))` would have the checker sort and drop repeats, and
# `float('007_0.50')` would have it read.
_TAKES = dict.fromkeys(('list', 'tuple'), (list, tuple, range)) | dict.fromkeys(
    ('set', 'frozenset'), (list, tuple, range, set, frozenset)) | {
        'dict': (list, tuple, dict), 'bytes': (list, tuple, range), 'float': (str, float),
        'complex': (int, float)}
_NOT_A_NUMBER = re.compile(r'[+-]?(nan|inf|infinity)', re.IGNORECASE)
_CALLS = {**_CONSTRUCTORS, 'int': int, 'str': str, 'bool': bool, 'len': len, 'sum': sum, 'min': min,
          'max': max, 'abs': abs, 'round': _round, 'sorted': sorted, 'ord': ord, 'chr': chr,
          'reversed': lambda x: list(x)[::-1], 'enumerate': lambda *a: list(
              enumerate(*a)), 'zip': lambda *a: list(zip(*a)), 'bin': bin, 'hex': hex, 'oct': oct}
# Methods whose result is no larger than receiver and arguments together.
_METHODS = {
    str: frozenset('upper lower title capitalize swapcase casefold strip lstrip rstrip split '
                   'rsplit splitlines startswith endswith find rfind index count isdigit isalpha '
                   'isalnum isupper islower removeprefix removesuffix'.split()),
    bytes: frozenset('upper lower strip split hex'.split()),
    list: frozenset(('index', 'count', 'copy')),
    tuple: frozenset(('index', 'count')),
    dict: frozenset(('get', 'copy')),
}


class _Folder:
  """Values of constant syntax nodes. Every intermediate result is bounded."""

  def __init__(self, *, expressions: bool, calls: dict[str, Any] | None = None):
    self._expressions, self._calls = expressions, calls
    self._budget = values.MAX_NODES
    self._names: dict[str, Any] = {}       # variables of the comprehensions being folded
    self._has_grown = False                # values may be larger than the text that spells them

  def value(self, n: ast.expr) -> Any:
    self._charge(1)
    made = self._value(n)
    if self._has_grown:
      self._charge(_total(made) >> 3)
    return made

  def _charge(self, cost: int) -> None:
    self._budget -= cost
    if self._budget < 0:
      raise LiteralError('too big')

  def _value(self, n: ast.expr) -> Any:
    t = type(n)
    if t is ast.Constant:
      return _bounded(n.value)
    if t is ast.List:
      return [self.value(e) for e in n.elts]
    if t is ast.Tuple:
      return tuple([self.value(e) for e in n.elts])
    if t is ast.Set:
      return {self.value(e) for e in n.elts}
    if t is ast.Dict:
      if None in n.keys:
        raise LiteralError('starred argument')
      return {self.value(k): self.value(v) for k, v in zip(n.keys, n.values)}
    if t is ast.Name:
      if n.id in self._names:
        return self._names[n.id]
      if n.id == 'Ellipsis':
        return ...
      if n.id in ('nan', 'inf', 'infinity', 'NaN'):
        return math.nan if n.id.lower() == 'nan' else math.inf
      raise LiteralError(f'name {n.id[:40]!r}')
    if t is ast.UnaryOp:
      return self._unary(n)
    if t is ast.BinOp:
      return self._binary(n)
    if t is ast.Call:
      return self._call(n)
    if self._expressions and t in _COMPREHENSIONS:
      return self._comprehension(n)
    if self._expressions and t is ast.Compare:
      return self._compare(n)
    raise LiteralError(f'{t.__name__} is no literal')

  def _unary(self, n: ast.UnaryOp) -> Any:
    operand = self.value(n.operand)
    if not self._expressions and (type(n.op) not in (ast.USub, ast.UAdd)
                                  or type(operand) not in (int, float, complex)):
      raise LiteralError('expression')
    return _UNARY[type(n.op)](operand)

  def _binary(self, n: ast.BinOp) -> Any:
    self._has_grown = True
    left, right = self.value(n.left), self.value(n.right)
    op = _BINARY.get(type(n.op))
    is_complex = (type(n.op) in (ast.Add, ast.Sub) and type(right) is complex
                  and type(left) in (int, float))
    if op is None or not (self._expressions or is_complex):
      raise LiteralError('expression')
    return _bounded(op(left, right))

  def _comprehension(self, n: ast.expr) -> Any:
    self._has_grown = True
    made = []
    self._loop(n, n.generators, made)
    if type(n) in (ast.DictComp, ast.SetComp):
      _check_hashes([key for key, _ in made] if type(n) is ast.DictComp else made)
    if type(n) is ast.DictComp:
      return dict(made)
    return set(made) if type(n) is ast.SetComp else made

  def _loop(self, n: ast.expr, generators: list[ast.comprehension], made: list) -> None:
    if not generators:
      made.append((self.value(n.key), self.value(n.value)) if type(n) is ast.DictComp
                  else self.value(n.elt))
      return
    first, *rest = generators
    if type(first.target) is not ast.Name:
      raise LiteralError('comprehension')
    outer = dict(self._names)
    for member in self.value(first.iter):
      self._charge(1)
      self._names[first.target.id] = member
      if all(self.value(test) for test in first.ifs):
        self._loop(n, rest, made)
    self._names = outer

  def _compare(self, n: ast.Compare) -> bool:
    left = self.value(n.left)
    for op, right in zip(n.ops, map(self.value, n.comparators)):
      if type(op) not in _COMPARISONS:
        raise LiteralError('comparison')
      if not _COMPARISONS[type(op)](left, right):
        return False
      left = right
    return True

  def _call(self, n: ast.Call) -> Any:
    self._has_grown = True
    if any(k.arg is None for k in n.keywords):
      raise LiteralError('starred argument')
    args = [self.value(a) for a in n.args]
    kwargs = {k.arg: self.value(k.value) for k in n.keywords}
    if type(n.func) is ast.Name and n.func.id == 'f' and self._calls is not None:
      inputs = _arguments(tuple(args), kwargs)
      if inputs not in self._calls:
        raise NeedsCall(inputs)
      return _bounded(self._calls[inputs])
    if type(n.func) is ast.Name:
      allowed = _CALLS if self._expressions else _CONSTRUCTORS
      function = allowed.get(n.func.id)
      if function is None or (kwargs and n.func.id not in ('dict', 'sorted', 'max', 'min')):
        raise LiteralError(f'call of {n.func.id[:40]!r}')
      self._check_call(n.func.id, args)
      return _bounded(function(*args, **kwargs))
    if type(n.func) is not ast.Attribute or not self._expressions:
      raise LiteralError('call')
    return self._method(self.value(n.func.value), n.func.attr, args, kwargs)

  def _check_call(self, name: str, args: list) -> None:
    """Refuses what costs much before its size shows, and in answers, what is work."""
    first = args[0] if args else ()
    if name == 'bytes':
      if type(first) is int:
        raise LiteralError('too big')
      # Codecs are work, and some take quadratic time.
      if type(first) is str and not (self._expressions and args[1:] in (['utf-8'], ['ascii'])):
        raise LiteralError('conversion')
    if name in ('set', 'frozenset', 'dict'):
      is_pairs = name == 'dict' and type(first) in (list, tuple)
      _check_hashes([pair[0] for pair in first] if is_pairs else first)
    if self._expressions:
      return
    if not all(isinstance(a, _TAKES.get(name, object)) for a in args):
      raise LiteralError('conversion')
    if name == 'float' and type(first) is str and not _NOT_A_NUMBER.fullmatch(first):
      raise LiteralError('conversion')

  def _method(self, receiver: Any, name: str, args: list, kwargs: dict) -> Any:
    if type(receiver) is str and name == 'join' and len(args) == 1:
      parts = list(args[0])
      if sum(len(p) + len(receiver) for p in parts) > _MAX_LENGTH:
        raise LiteralError('too big')
      return receiver.join(parts)
    if type(receiver) is str and name == 'replace' and len(args) == 2 and not kwargs:
      if (len(receiver) + 1) * (len(args[1]) + 1) > _MAX_LENGTH:
        raise LiteralError('too big')
      return receiver.replace(*args)
    if type(receiver) is str and name == 'encode' and (args or ['utf-8']) == ['utf-8']:
      return receiver.encode()
    if kwargs or name not in _METHODS.get(type(receiver), ()):
      raise LiteralError(f'method {name[:40]!r}')
    return _bounded(getattr(receiver, name)(*args))
