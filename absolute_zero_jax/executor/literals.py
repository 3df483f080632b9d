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
import re
from typing import Any

from absolute_zero_jax.executor import bounded, values
from absolute_zero_jax.executor.bounded import LiteralError

MAX_CHARS = 8192
MAX_NESTING = 100
_MAX_ARGUMENTS = 64


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
  refused; so are `*`, `**`, lambdas and names, but for `nan` and `inf` and those of comprehensions.
  Line breaks and comments inside the list do not matter. An empty text is a call without arguments.

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
      self._charge(bounded.total(made) >> 3)
    return made

  def _charge(self, cost: int) -> None:
    self._budget -= cost
    if self._budget < 0:
      raise LiteralError('too big')

  def _value(self, n: ast.expr) -> Any:
    t = type(n)
    if t is ast.Constant:
      return bounded.bounded(n.value)
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
    if self._expressions and t in bounded.COMPREHENSIONS:
      return self._comprehension(n)
    if self._expressions and t is ast.Compare:
      return self._compare(n)
    raise LiteralError(f'{t.__name__} is no literal')

  def _unary(self, n: ast.UnaryOp) -> Any:
    operand = self.value(n.operand)
    if not self._expressions and (type(n.op) not in (ast.USub, ast.UAdd)
                                  or type(operand) not in (int, float, complex)):
      raise LiteralError('expression')
    return bounded.UNARY[type(n.op)](operand)

  def _binary(self, n: ast.BinOp) -> Any:
    self._has_grown = True
    left, right = self.value(n.left), self.value(n.right)
    op = bounded.BINARY.get(type(n.op))
    is_complex = (type(n.op) in (ast.Add, ast.Sub) and type(right) is complex
                  and type(left) in (int, float))
    if op is None or not (self._expressions or is_complex):
      raise LiteralError('expression')
    return bounded.bounded(op(left, right))

  def _comprehension(self, n: ast.expr) -> Any:
    self._has_grown = True
    made = []
    self._loop(n, n.generators, made)
    if type(n) in (ast.DictComp, ast.SetComp):
      bounded.check_hashes([key for key, _ in made] if type(n) is ast.DictComp else made)
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
      if type(op) not in bounded.COMPARISONS:
        raise LiteralError('comparison')
      if not bounded.COMPARISONS[type(op)](left, right):
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
      return bounded.bounded(self._calls[inputs])
    if type(n.func) is ast.Name:
      allowed = bounded.CALLS if self._expressions else bounded.CONSTRUCTORS
      function = allowed.get(n.func.id)
      if function is None or (kwargs and n.func.id not in ('dict', 'sorted', 'max', 'min')):
        raise LiteralError(f'call of {n.func.id[:40]!r}')
      self._check_call(n.func.id, args)
      return bounded.bounded(function(*args, **kwargs))
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
      bounded.check_hashes([pair[0] for pair in first] if is_pairs else first)
    if self._expressions:
      return
    if not all(isinstance(a, bounded.TAKES.get(name, object)) for a in args):
      raise LiteralError('conversion')
    if name == 'float' and type(first) is str and not bounded.NOT_A_NUMBER.fullmatch(first):
      raise LiteralError('conversion')

  def _method(self, receiver: Any, name: str, args: list, kwargs: dict) -> Any:
    if type(receiver) is str and name == 'join' and len(args) == 1:
      parts = list(args[0])
      if sum(len(p) + len(receiver) for p in parts) > bounded.MAX_LENGTH:
        raise LiteralError('too big')
      return receiver.join(parts)
    if type(receiver) is str and name == 'replace' and len(args) == 2 and not kwargs:
      if (len(receiver) + 1) * (len(args[1]) + 1) > bounded.MAX_LENGTH:
        raise LiteralError('too big')
      return receiver.replace(*args)
    if type(receiver) is str and name == 'encode' and (args or ['utf-8']) == ['utf-8']:
      return receiver.encode()
    if kwargs or name not in bounded.METHODS.get(type(receiver), ()):
      raise LiteralError(f'method {name[:40]!r}')
    return bounded.bounded(getattr(receiver, name)(*args))
