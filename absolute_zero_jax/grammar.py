# SPDX-License-Identifier: Apache-2.0
"""Small typed Python programs with inputs, and what a real interpreter says about them.

  random.Random --example--> program, inputs, outputs --rival--> a wrong guess at it

No human wrote any of these programs: tables of statements and expressions over ints, lists,
strings, tuples and dicts are filled in at random. They are deterministic, and they end: loops run
over values that exist, and `while` loops only shrink a number.

The programs run in this very process, for speed. That is safe because this file wrote every one of
them; text that a model wrote never comes here, it goes to the executor.

One program in `HELD_OUT`, chosen by the hash of its normal form, belongs to the test side: every
test set of every seed is drawn from there, and nothing else ever is.
"""

import ast
from collections.abc import Sequence
import dataclasses
import functools
import random
import re
from typing import Any

from absolute_zero_jax.tasks import identity
from absolute_zero_jax.types import Task

# Statements before `return`, drawn uniformly: what pre-training sees, and what it never sees.
SHALLOW = (0, 0, 1, 1, 1, 1, 2, 2, 2, 3)
DEEP = (4, 5)
PARTS = {'same': SHALLOW, 'deeper': DEEP}

HELD_OUT = 32
MAX_VALUE_CHARS = 24
_PARAMETERS, _LOCALS, _LETTERS = 'ab', 'cdegh', 'abcde'

# `$x` is filled in: a variable of the type i(nt), l(ist), s(tr), t(uple), d(ict); k a small number,
# m a factor, n an index, c a letter, o a comparison, q a condition, e a term of the loop variable.
# A capital repeats the last choice of its letter; v makes a new variable.
EXPRESSIONS = {
    'i': ('$i + $k', '$i + $k', '$i - $k', '$i - $k', '$i * $m', '$i % $m', '$i // $m', '$i + $i',
          '$i - $i', 'max($i, $k)', 'min($i, $k)', 'abs($i - $k)', '$i + $k if $q else $I - $k',
          'len($l)', 'sum($l)', 'max($l)', 'min($l)', '$l[$n]', '$l[-1]', '$l.count($k)',
          'sum(i for i in $l if i $o $k)', 'sum($e for i in $l)',
          'len($s)', '$s.count($c)', '$s.find($c)', '$t[$n]', 'sum($t)', 'max($t)',
          '$d.get($c, $k)', 'len($d)', 'sum($d.values())', 'max($d.values())'),
    'l': ('[$i, $k]', '[$i, $i]', '[$i] * $m', 'list(range($i))', '$l[::-1]', 'sorted($l)',
          '[$e for i in $l]', '[$e for i in $l]', '[i for i in $l if i $o $k]',
          '[i for i in $l if i % 2 == $n]', '$l + [$i]', '$l + [$k]', '$l[1:]', '$l[:2]', '$l[:-1]',
          '[i + $i for i in $l]', '$l + $l', 'list($t)', 'sorted($t)', 'list($d.values())',
          '[i for i in range($i)]', '[$s.count(i) for i in $S]'),
    's': ('$s[::-1]', '$s.upper()', '$s + $c', '$c + $s', '$s * 2', '$s.replace($c, $c)', '$s[1:]',
          '$s[:2]', '$s[0]', '$s[-1]', "''.join(sorted($s))", '$s + $S[0]', '$s + $s', 'str($i)',
          '$c * $i', '$c if $q else $c', '$s if $q else $c', "''.join($d)",
          "''.join(i for i in $s if i != $c)"),
    't': ('($i, $k)', '($i, $i)', '(len($l), $l[$n])', '(min($l), max($l))', 'tuple($l)',
          '$t[::-1]', '$t + ($k,)', '($t[1], $t[0])', '(len($s), $s[0])', '($s, $i)'),
    'd': ('{$c: $i}', "{'a': $i, 'b': $k}", '{i: $s.count(i) for i in $S}',
          '{i: $e for i in $l}', '{$c: len($s)}', '{i: $d[i] + $k for i in $D}'),
    'b': ('$q', '$i $o $i', '$c in $s', '$k in $l', '$l == sorted($L)'),
}
# (text, type of the new variable, or the letter of the variable it changes).
STATEMENTS = (
    *(('$v = $x', kind) for kind in 'iiiilllssstd'),
    ('$v = 0\nfor i in $l:\n    $V += $e', 'i'),
    ('$v = $k\nfor i in $l:\n    if i $o $k:\n        $V += $e', 'i'),
    ('$v = 0\nfor i in $s:\n    if i $o $c:\n        $V += 1', 'i'),
    ('$v = []\nfor i in $l:\n    if i $o $k:\n        $V.append($e)', 'l'),
    ('$v = []\nfor i in $l:\n    $V = [i] + $V', 'l'),
    ("$v = ''\nfor i in $s:\n    $V = i + $V", 's'),
    ("$v = ''\nfor i in $s:\n    if i != $c:\n        $V += i", 's'),
    ('$v = {}\nfor i in $s:\n    $V[i] = $V.get(i, 0) + 1', 'd'),
    ('for j in range($m):\n    $i += $k', 'I'), ('while $i > $k:\n    $I -= $m', 'I'),
    ('if $q:\n    $i += $k', 'I'), ('if $q:\n    $i = $k\nelse:\n    $I -= $k', 'I'),
    ('if $q:\n    $l = $L[::-1]', 'L'), ('if $q:\n    $s = $S.upper()', 'S'),
    ('if $q:\n    $l.append($k)', 'L'), ('if $q:\n    $s += $c\nelse:\n    $S = $c + $S', 'S'),
    ('$i += $k', 'I'), ('$i *= $m', 'I'), ('$i -= $k', 'I'), ('$l.append($k)', 'L'),
    ('$l.append($i)', 'L'), ('$l.reverse()', 'L'), ('$l.sort()', 'L'), ('$l[0] = $k', 'L'),
    ('$s += $c', 'S'), ('$d[$c] = $k', 'D'), ('$d[$c] = $i', 'D'),
)
CONDITIONS = ('$i $o $k', '$i $o $k', '$i % 2 == $n', 'len($l) > $m', '$k in $l', '$l[0] $o $k',
              '$c in $s', 'len($s) > $m', '$t[0] $o $t[1]', '$c in $d')
TERMS = ('i', 'i + $k', 'i - $k', 'i * $m', 'i % $m', '1', 'i * i')
_CONSTANTS = {'k': tuple('0112233456789'), 'm': tuple('2234'), 'n': tuple('01'),
              'c': tuple(repr(c) for c in _LETTERS), 'o': ('>', '>', '<', '<', '==', '!=')}
_TYPES = 'ilstd'
_SLOT = re.compile(r'\$([a-zA-Z])')
# The letter of a type in the tables above.
_LETTER_OF = {int: 'i', list: 'l', str: 's', tuple: 't', dict: 'd'}
# How many programs `rival` chooses among. With more it guesses better (at 300 programs, with 1, 10
# and 40: 6, 22 and 36 % of the guesses are right about a shown pair) and takes longer, which is
# already most of the time that documents take.
_RIVALS = 20


@dataclasses.dataclass(frozen=True)
class Example:
  """A program and what it does. Values are text, as `repr` writes them.

  Attributes:
    inputs: distinct argument lists.
    key: hash of the normalised program (see `key`).
  """
  program: str
  inputs: tuple[str, ...]
  outputs: tuple[str, ...]
  key: str


def example(rng: random.Random, depths: Sequence[int] = SHALLOW, *, cases: int = 6,
            held_out: bool = False) -> Example:
  """A program that runs on all its inputs, and whose output depends on them.

  At least half of the outputs differ from each other. Outputs are at most `MAX_VALUE_CHARS` long.
  `held_out` says from which side of the split it is drawn.
  """
  while True:
    kinds, source = _program(rng, rng.choice(depths))
    name = key(source)
    if is_held_out(name) != held_out:
      continue
    inputs = list(dict.fromkeys(_arguments(rng, kinds) for _ in range(2 * cases)))[:cases]
    if len(inputs) < cases:
      continue
    outputs = [run(source, given) for given in inputs]
    if None not in outputs and len(set(outputs)) >= (cases + 1) // 2:
      return Example(source, tuple(inputs), tuple(outputs), name)


def test_set(seed: int, count: int, part: str = 'same', *, cases: int = 6) -> list[Example]:
  """`count` held-out programs with distinct keys: a pure function of the arguments.

  Short programs are few, so they come early: the first of a set are easier than the rest.

  Raises:
    ValueError: `part` is none of `PARTS`.
  """
  if part not in PARTS:
    raise ValueError(f'part={part!r} of the test set must be one of {sorted(PARTS)}.')
  rng = random.Random(f'held out {part} {seed}')
  found: dict[str, Example] = {}
  while len(found) < count:
    made = example(rng, PARTS[part], cases=cases, held_out=True)
    found.setdefault(made.key, made)
  return list(found.values())


def is_held_out(name: str) -> bool:
  """Whether a key belongs to the test side."""
  return int(name[:8], 16) % HELD_OUT == 0


def excludes(task: Task) -> bool:
  """Whether self-play must leave a task alone, because its program is on the test side."""
  return is_held_out(key(task.program))


def key(source: str) -> str:
  """Hash of a program; layout, comments and local names do not count."""
  return identity.key('program', source)


def run(source: str, given: str) -> str | None:
  """`repr` of f's result on an argument list; None for an error, or a value that is too long."""
  try:
    text = repr(compiled(source)(*values(given)))
  except (ValueError, TypeError, LookupError, ArithmeticError):
    return None
  return text if len(text) <= MAX_VALUE_CHARS else None


def rival(rng: random.Random, made: Example, shown: Sequence[int]) -> str | None:
  """A wrong guess at the program that one may well make: short, and right about some shown cases.

  Of `_RIVALS` programs with the same parameters, at most one statement, and results of the type
  that is wanted, the one that agrees with the example most, though not in all of `shown`. None
  where there is none; nor is a program of the test side ever given.
  """
  wanted = type(ast.literal_eval(made.outputs[shown[0]]))
  kinds = ''.join(_LETTER_OF[type(value)] for value in values(made.inputs[0]))
  best, most = None, -1
  for _ in range(_RIVALS):
    _, source = _program(rng, rng.choice((0, 1)), kinds)
    results = [run(source, made.inputs[i]) for i in shown]
    if None in results or type(ast.literal_eval(results[0])) is not wanted:
      continue
    right = sum(agree(made.outputs[i], result) for i, result in zip(shown, results))
    if most < right < len(shown) and not is_held_out(key(source)):
      best, most = source, right
  return best


def agree(made: str, wanted: str) -> bool:
  """Whether two values, as text, are equal as an answer must be: in type too, at every depth.

  Text that is no literal ('range(0, 3)', which a model may return) agrees with itself alone.
  """
  if made == wanted:
    return True
  try:
    left, right = ast.literal_eval(made), ast.literal_eval(wanted)
  except (ValueError, SyntaxError):
    return False
  return _typed(left) == _typed(right)


def _typed(value: Any) -> tuple:
  if isinstance(value, list | tuple):
    return type(value), tuple(map(_typed, value))
  if isinstance(value, dict):
    return dict, frozenset((_typed(k), _typed(v)) for k, v in value.items())
  return type(value), frozenset(map(_typed, value)) if isinstance(value, set) else value


class _Scope:
  """Variables with their types, newest last, while a program is written."""

  def __init__(self, rng: random.Random, kinds: str):
    self.rng = rng
    self.variables = list(zip(_PARAMETERS, kinds, strict=False))
    self.free = list(_LOCALS)

  def types(self) -> set[str]:
    return {kind for _, kind in self.variables}

  def newest(self) -> str:
    return self.variables[-1][1]

  def pick(self, table: Sequence[str]) -> str | None:
    """A row of the table that this scope can fill in, mostly one that uses the newest variable."""
    rows = [row for row in table if _needs(row) <= self.types()]
    recent = [row for row in rows if self.newest() in _needs(row)]
    rows = recent if recent and self.rng.random() < 0.8 else rows
    return self.rng.choice(rows) if rows else None

  def fill(self, row: str, kind: str = '') -> str:
    """The row with all its slots chosen; `kind` is the type of what `$x` makes."""
    chosen: dict[str, str] = {}

    def slot(match):
      letter = match[1]
      if letter.isupper():
        return chosen[letter.lower()]
      chosen[letter] = self._slot(letter, kind)
      return chosen[letter]
    # The new variable enters the scope after the row, so that it is not read before it is set.
    self._new, self.chosen = '', chosen
    return _SLOT.sub(slot, row)

  def _slot(self, letter: str, kind: str) -> str:
    rng = self.rng
    if letter in _CONSTANTS:
      return rng.choice(_CONSTANTS[letter])
    if letter in _TYPES:
      names = [name for name, kind in self.variables if kind == letter]
      return names[-1] if rng.random() < 0.7 else rng.choice(names)
    if letter == 'v':
      return self.free[0]
    table = {'q': CONDITIONS, 'e': TERMS, 'x': EXPRESSIONS.get(kind, ())}[letter]
    outer = self.chosen
    text = self.fill(self.pick(table) or '0', kind)
    self.chosen = outer
    return text


def _program(rng: random.Random, depth: int, kinds: str = '') -> tuple[str, str]:
  """(types of the parameters, source)."""
  kinds = kinds or rng.choice(
      ('i', 'i', 'l', 'l', 'l', 's', 's', 't', 'd', 'ii', 'il', 'li', 'is', 'si'))
  scope = _Scope(rng, kinds)
  lines = [f'def f({", ".join(_PARAMETERS[:len(kinds)])}):']
  for _ in range(depth):
    lines += _statement(scope)
  if depth and rng.random() < 0.5:
    result = scope.variables[-1][0]
  else:
    result = None
    while result is None:
      table = rng.choice('iiilllssstdb')
      row = scope.pick(EXPRESSIONS[table])
      if row is not None and (scope.newest() in _needs(row) or rng.random() < 0.1):
        result = scope.fill(row)
  return kinds, '\n'.join([*lines[:1], *(f'    {x}' for x in lines[1:]), f'    return {result}'])


def _statement(scope: _Scope) -> list[str]:
  """The lines of one statement; the variable it makes or changes becomes the newest."""
  while True:
    row, kind = scope.rng.choice(STATEMENTS)
    if '$x' in row and scope.pick(EXPRESSIONS[kind]) is None or not _needs(row) <= scope.types():
      continue
    if '$q' in row and scope.pick(CONDITIONS) is None:
      continue
    changed = kind.lower() if kind.isupper() else ''
    text = scope.fill(row, kind)
    if changed:
      name = scope.chosen[changed]
      scope.variables.remove((name, changed))
      scope.variables.append((name, changed))
    else:
      scope.variables.append((scope.free.pop(0), kind))
    return text.split('\n')


@functools.cache
def _needs(row: str) -> frozenset[str]:
  """Types of the variables a row reads."""
  return frozenset(x for x in _SLOT.findall(row) if x in _TYPES)


def _arguments(rng: random.Random, kinds: str) -> str:
  return ', '.join(repr(_value(rng, kind)) for kind in kinds)


def _value(rng: random.Random, kind: str) -> Any:
  def number():
    return rng.randint(0, 9)
  if kind == 'i':
    return number() if rng.random() < 0.85 else rng.randint(-5, 20)
  if kind == 'l':
    return [number() for _ in range(rng.choice((2, 3, 3, 4)))]
  if kind == 's':
    return ''.join(rng.choice(_LETTERS) for _ in range(rng.choice((2, 3, 3, 4))))
  if kind == 't':
    return tuple(number() for _ in range(rng.choice((2, 2, 3))))
  return {name: number() for name in rng.sample(_LETTERS[:4], 2)}


@functools.lru_cache(maxsize=64)
def compiled(source: str) -> Any:
  """The function `f` of a program that this file wrote; of no other."""
  scope: dict[str, Any] = {}
  exec(compile(source, '<grammar>', 'exec'), scope)
  return scope['f']


def values(given: str) -> tuple:
  """An argument list as values."""
  return ast.literal_eval(f'({given},)')
