# SPDX-License-Identifier: Apache-2.0
"""What an interpreter sees while it runs a program of the grammar: text to think with.

  program, argument list --trace--> each value that a variable takes, and before it its working
  program, pairs --check--> its statements with the values they make, and whether it fits the pairs

Runs programs in this very process, as `grammar` does and for the same reason: it wrote them.
"""

import ast
from collections.abc import Callable, Sequence
import copy
import functools
import sys
from typing import Any
import warnings

from absolute_zero_jax import grammar

Runs = Callable[[str, Sequence[str]], Sequence[str]]

# What is worked out by itself before the expression around it.
_INNER = (ast.Call, ast.BinOp, ast.Compare, ast.Subscript, ast.ListComp, ast.GeneratorExp,
          ast.DictComp, ast.IfExp)
_COMPREHENSIONS = (ast.ListComp, ast.GeneratorExp, ast.DictComp)


def trace(source: str, given: str) -> tuple[str, ...]:
  """'name = value' for the parameters and then each time a variable is set, in order of time.

  An expression stands before the value it gives, first with values for its variables and then with
  its inner parts worked out ('sum([i + 1 for i in [2, 3]])', 'sum([3, 4])'), and a condition stands
  with its outcome ('if 3 > 4: False').
  """
  function, arguments = grammar.compiled(source), grammar.values(given)
  working, (sets, loops) = _workings(source), _targets(source)
  lines: list[str] = []
  seen: dict[str, str] = {}
  at = 0

  def look(frame, event, _):
    nonlocal at
    if frame.f_code is not function.__code__:
      return None
    if event == 'line':
      # The same line again is a comprehension, whose variables are the function's from Python 3.12
      # on; of statements each has a line of its own.
      if frame.f_lineno == at:
        return look
      at = frame.f_lineno
      seen.pop(loops.get(frame.f_lineno), None)
    for name, value in frame.f_locals.items():
      text = repr(value)
      if len(name) == 1 and seen.get(name) != text:
        seen[name] = text
        lines.append(f'{name} = {text}')
    if event == 'line':
      if frame.f_lineno in working:
        lines.extend(working[frame.f_lineno](frame.f_locals))
      seen.pop(sets.get(frame.f_lineno), None)
    return look

  before = sys.gettrace()
  sys.settrace(look)
  try:
    function(*arguments)
  finally:
    sys.settrace(before)
  return tuple(lines)


def check(source: str, pairs: Sequence[tuple[str, str]], run: Runs | None = None) -> list[str]:
  """A program as a guess at (input, output) pairs: worked out on all of them, then compared.

  After each statement stands the value that it makes on each of the inputs, 'name = value' on a
  line of its own, except where it says nothing new (a constant, or a variable as it stands). What
  is returned stands beside what is wanted, 'if made == wanted: True', up to the first pair that
  differs.

  Args:
    run: (program, inputs) -> outputs as text. By default in this very process, so for programs of
      the grammar alone.

  Raises:
    ValueError: a program of another shape than the grammar's.
  """
  run = run or _run_here
  inputs = [given for given, _ in pairs]
  out = []
  for lines, name, program in pieces(source):
    out += lines
    if program:
      out += [f'{name} = {value}' for value in run(program, inputs)]
  for made, (_, wanted) in zip(run(source, inputs), pairs):
    same = grammar.agree(made, wanted)
    out.append(f'if {made} == {wanted}: {same}')
    if not same:
      break
  return out


def pieces(source: str) -> list[tuple[list[str], str, str]]:
  """(lines, variable, program) of each statement: what it sets, and the program that returns that.

  Of `return`, and of what only names a constant or a variable, the latter are ''.

  Raises:
    ValueError: as `check`.
  """
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')      # about what a model wrote
      body = ast.parse(source).body[0].body
    head, *lines = source.split('\n')
    out, done = [], [head]
    for node in body:
      text = lines[node.lineno - 2:node.end_lineno - 1]
      done += text
      silent = isinstance(node, ast.Return) or isinstance(node, ast.Assign) and (
          isinstance(node.value, ast.Name)
          or not any(isinstance(x, ast.Name) for x in ast.walk(node.value)))
      name = '' if silent else _changed(node)
      out.append((text, name, '\n'.join([*done, f'    return {name}']) if name else ''))
  except (SyntaxError, ValueError, AttributeError, IndexError, RecursionError, MemoryError) as e:
    raise ValueError(f'no program of the shape that the grammar writes: {source!r}') from e
  return out


def _run_here(source: str, inputs: Sequence[str]) -> list[str]:
  return [repr(grammar.compiled(source)(*grammar.values(given))) for given in inputs]


def _changed(node: ast.stmt) -> str:
  """The variable that a statement sets, in its last line if it has several."""
  match node:
    case ast.Assign(targets=[ast.Name(id=name)]) | ast.AugAssign(target=ast.Name(id=name)):
      return name
    case (ast.Assign(targets=[ast.Subscript(value=ast.Name(id=name))]) |
          ast.AugAssign(target=ast.Subscript(value=ast.Name(id=name)))):
      return name
    case ast.Expr(value=ast.Call(func=ast.Attribute(value=ast.Name(id=name)))):
      return name
  return _changed(node.body[-1])


@functools.lru_cache(maxsize=64)
def _workings(source: str) -> dict[int, Callable[[dict[str, Any]], list[str]]]:
  """By line number: what is written before the line runs, given the variables' values."""
  out = {}
  for node in ast.walk(ast.parse(source)):
    match node:
      case ast.If() | ast.While():
        out[node.lineno] = functools.partial(_outcome, node.test)
      case ast.AugAssign(target=ast.Name(id=name)):
        whole = ast.BinOp(ast.Name(name, ast.Load()), node.op, node.value)
        out[node.lineno] = functools.partial(_working, whole)
      case ast.Assign() | ast.Return():
        out[node.lineno] = functools.partial(_working, node.value)
      case ast.Expr(value=ast.Call(args=[argument])):
        out[node.lineno] = functools.partial(_working, argument)
  return out


@functools.lru_cache(maxsize=64)
def _targets(source: str) -> tuple[dict[int, str], dict[int, str]]:
  """Variables by line number: those that a line sets; loop variables, by their bodies' first lines.

  Their values are written again even where they are the same as before.
  """
  sets, loops = {}, {}
  for node in ast.walk(ast.parse(source)):
    match node:
      case ast.For(target=ast.Name(id=name)):
        loops[node.body[0].lineno] = name
      case (ast.AugAssign(target=ast.Name(id=name)) | ast.Assign(targets=[ast.Name(id=name)]) |
            ast.Assign(targets=[ast.Subscript(value=ast.Name(id=name))])):
        sets[node.lineno] = name
  return sets, loops


def _outcome(test: ast.expr, variables: dict[str, Any]) -> list[str]:
  filled = _Fill(variables).visit(copy.deepcopy(test))
  return [f'if {ast.unparse(filled)}: {bool(_value(filled))}']


def _working(expression: ast.expr, variables: dict[str, Any]) -> list[str]:
  if not any(isinstance(x, _INNER) for x in ast.walk(expression)):
    return []                # a name, a constant, or a display of these: its value says it all
  filled = _Fill(variables).visit(copy.deepcopy(expression))
  lines = [ast.unparse(filled)]
  inner = ast.unparse(_inner(copy.deepcopy(filled)))
  if inner not in (lines[0], repr(_value(filled))):
    lines.append(inner)
  return lines


def _inner(expression: ast.expr) -> ast.expr:
  """The expression with its parts worked out, but not itself; of a choice, what is chosen."""
  match expression:
    case ast.IfExp():
      return expression.body if _value(expression.test) else expression.orelse
    case ast.ListComp() | ast.DictComp() | ast.GeneratorExp():
      return expression
  return _WorkOut().generic_visit(expression)


class _Fill(ast.NodeTransformer):
  """Variables become their values, but not those that a comprehension makes."""

  def __init__(self, variables: dict[str, Any], bound: Sequence[str] = ()):
    self._variables, self._bound = variables, bound

  def visit_Name(self, node):
    if node.id in self._bound or node.id not in self._variables:
      return node
    return _literal(self._variables[node.id])

  def visit(self, node):
    if not isinstance(node, _COMPREHENSIONS):
      return super().visit(node)
    names = [g.target.id for g in node.generators]
    inside = _Fill(self._variables, names)
    for generator in node.generators:
      generator.iter = self.visit(generator.iter)
      generator.ifs = [inside.visit(x) for x in generator.ifs]
    for field in ('elt', 'key', 'value'):
      if hasattr(node, field):
        setattr(node, field, inside.visit(getattr(node, field)))
    return node


class _WorkOut(ast.NodeTransformer):
  """The outermost parts that are no plain values become their values; a generator, a list."""

  def visit(self, node):
    if not isinstance(node, _INNER):
      return super().visit(node)
    if isinstance(node, ast.GeneratorExp):
      node = ast.ListComp(node.elt, node.generators)
    value = _value(node)
    return _literal(list(value) if type(value).__name__ == 'dict_values' else value)


def _value(expression: ast.expr) -> Any:
  return eval(compile(ast.unparse(expression), '<grammar>', 'eval'))


def _literal(value: Any) -> ast.expr:
  return ast.parse(repr(value), mode='eval').body
