# SPDX-License-Identifier: Apache-2.0
"""When two programs are the same one: decides what is a duplicate, and what is on the test side."""

import ast
import builtins
from collections.abc import Sequence
import hashlib

from absolute_zero_jax.tasks import program, text


def key(kind: str, source: str, inputs: Sequence[str] = ()) -> str:
  """Hash of a task; equal keys are duplicates.

  Formatting, comments, docstrings, annotations, statements that are never reached or do nothing,
  and names that the program binds do not count: those are replaced by their order of appearance in
  the whole program, so that it counts which scopes share one. Names that a program may show, those
  of classes and of what is in them, are left alone. What a program may read of its functions
  (`__name__`, `__doc__`, `__annotations__`) counts where it does. Text that is no Python is hashed
  as it stands.
  """
  tree = text.parse(source)
  said = source if tree is None else _canonical(tree)
  data = '\0'.join((kind, said, *inputs)).encode('utf-8', 'surrogatepass')
  return hashlib.sha256(data).hexdigest()[:32]


def shape(source: str) -> str:
  """A program without what `key` leaves out and without its constants' values: 1 is like 2.

  Text that is no Python is left as it stands.
  """
  tree = text.parse(source)
  return source if tree is None else _canonical(_NoConstants().visit(tree))


def has_unreachable(source: str) -> bool:
  """Whether statements stand behind a return or the like: how a proposer varies an old program."""
  tree = text.parse(source)
  return tree is not None and _drop_idle(tree)


def _canonical(tree: ast.Module) -> str:
  read = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
  _drop_idle(tree, docstrings='__doc__' not in read)
  if not read & {'__annotations__', 'register'}:       # of functools.singledispatch
    tree = _Plain().visit(tree)
  nodes = list(ast.walk(tree))
  # Left alone: f, and names that are also reached by their text: as attribute or keyword.
  classes = [node for node in nodes if isinstance(node, ast.ClassDef)]
  fixed, has_class = {'f'}, bool(classes)
  for node in classes:
    fixed |= {node.name} | program.block_names(node.body)
  if read & {'__name__', '__qualname__', 'register'}:
    fixed |= {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
  imported = {(node.asname or node.name).split('.')[0] for node in nodes
              if isinstance(node, ast.alias)}
  for node in nodes:
    if isinstance(node, ast.alias) and not node.asname:
      fixed.add(node.name.split('.')[0])
    elif isinstance(node, ast.Attribute) and has_class:
      fixed.add(node.attr)
    elif isinstance(node, ast.Call) and not _is_of_builtin(node.func, has_class, imported):
      fixed.update(keyword.arg for keyword in node.keywords if keyword.arg)
    elif isinstance(node, ast.MatchClass | ast.ClassDef):
      fixed.update(getattr(node, 'kwd_attrs', ()))
      fixed.update(keyword.arg for keyword in getattr(node, 'keywords', ()) if keyword.arg)
  names = dict.fromkeys(name for name in program.bound_names(tree) if name not in fixed)
  order = {name: f'<{i}>' for i, name in enumerate(names)}
  for node in nodes:
    for field in ('id', 'arg', 'name', 'asname', 'rest'):
      value = getattr(node, field, None)
      if (isinstance(value, str) and not isinstance(node, ast.keyword)
          and not (isinstance(node, ast.alias) and field == 'name')):
        setattr(node, field, order.get(value, value))
    if isinstance(node, ast.Global | ast.Nonlocal):
      node.names = sorted(order.get(name, name) for name in node.names)
  return _dump(tree)


def _is_of_builtin(function: ast.expr, has_class: bool, imported: set[str]) -> bool:
  """Whether keywords of the call name nothing of the program's: `sorted(x, reverse=True)`.

  Those of a module's functions may: `functools.partial(g, b=5)`.
  """
  if isinstance(function, ast.Attribute):
    return not has_class and getattr(function.value, 'id', None) not in imported
  return isinstance(function, ast.Name) and hasattr(builtins, function.id)


class _Plain(ast.NodeTransformer):
  """Without annotations, idle `global`s and prefixes of texts; one import a statement."""

  def __init__(self):
    self._bound: list[set[str]] = []     # by the functions around
    self._fields: set[int] = set()       # what classes annotate

  def visit_ClassDef(self, node):
    self._fields.update(id(x) for x in node.body if isinstance(x, ast.AnnAssign))
    return self.generic_visit(node)

  def visit_FunctionDef(self, node):
    node.returns = None
    self._bound.append(set(program.bound_names(ast.Module(node.body, []))))
    node = self.generic_visit(node)
    self._bound.pop()
    node.body = node.body or [ast.Pass()]
    return node

  def visit_arg(self, node):
    node.annotation = None
    return node

  def visit_AnnAssign(self, node):
    if id(node) in self._fields:
      return node
    if node.value is None and node.simple:
      return None
    target = self.visit(node.target)
    return ast.Assign([target], self.visit(node.value)) if node.value else ast.Expr(target)

  def visit_Global(self, node):
    bound = self._bound[-1] if self._bound else ()
    node.names = [name for name in dict.fromkeys(node.names) if name in bound]
    return node if node.names else None

  def visit_Import(self, node):
    return [type(node)(*(([alias],) if isinstance(node, ast.Import) else
                         (node.module, [alias], node.level))) for alias in node.names]

  visit_ImportFrom = visit_Import

  def visit_Constant(self, node):
    node.kind = None
    return node


def _dump(value: object) -> str:
  """What `ast.dump` says on Python 3.11, on any Python.

  Later ones name fields of their own, leave out empty ones, or put empty strings into f-strings; a
  key must not depend on that, since it decides which programs are on the test side.
  """
  if isinstance(value, ast.JoinedStr):
    value = ast.JoinedStr([part for part in value.values if getattr(part, 'value', None) != ''])
  if isinstance(value, list):
    return f'[{", ".join(map(_dump, value))}]'
  if not isinstance(value, ast.AST):
    # Python prints no integer of more than 4,300 digits.
    return hex(value) if type(value) is int and value.bit_length() > 14_000 else repr(value)
  fields = [f'{name}={_dump(field)}' for name, field in ast.iter_fields(value)
            if not (field is None and getattr(type(value), name, ...) is None)
            and not (name == 'type_params' and not field)]
  return f'{type(value).__name__}({", ".join(fields)})'


def _drop_idle(tree: ast.AST, docstrings: bool = True) -> bool:
  """Takes out statements that are never reached or do nothing; whether there were any of those."""
  unreachable = False
  for node in ast.walk(tree):
    for field in ('body', 'orelse', 'finalbody'):
      block = getattr(node, field, None)
      if not block or not isinstance(block, list):
        continue
      end = next((i for i, statement in enumerate(block, 1) if _leaves(statement)), len(block))
      unreachable |= end < len(block)
      kept = [statement for n, statement in enumerate(block[:end])
              if not _is_idle(statement) or (n == 0 and not docstrings)]
      kept += filter(_makes_generator, block[end:])
      setattr(node, field, kept if kept or field != 'body' else [ast.Pass()])
  return unreachable


def _is_idle(statement: ast.stmt) -> bool:
  return isinstance(statement, ast.Pass) or (
      isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant))


def _makes_generator(statement: ast.stmt) -> bool:
  return any(isinstance(node, ast.Yield | ast.YieldFrom) for node in ast.walk(statement))


def _leaves(statement: ast.stmt) -> bool:
  if isinstance(statement, ast.If):
    return any(map(_leaves, statement.body)) and any(map(_leaves, statement.orelse))
  return isinstance(statement, ast.Return | ast.Raise | ast.Break | ast.Continue)


class _NoConstants(ast.NodeTransformer):

  def visit_Constant(self, node):
    return ast.Constant(type(node.value))      # not '', which `_dump` leaves out of f-strings
