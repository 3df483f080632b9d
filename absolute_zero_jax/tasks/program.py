# SPDX-License-Identifier: Apache-2.0
"""Programs as proposed: read, find and name `f`, clean up. Source text is kept, comments too.

Removing comments costs a lot of what self-play gains (paper, App. D), so edits work on positions in
the source; only the optional clean-up 'comments' goes through the syntax tree.
"""

import ast
import builtins
from collections.abc import Sequence
import dataclasses
import re
import textwrap

from absolute_zero_jax.tasks import text

RENAME_MODES = ('any_last', 'any_first', 'not_first', 'not_last', 'never')
FUNCTION_LIMITS = ('any', 'one_top_level', 'one')
CLEAN_UPS = ('comments', 'globals', 'prints')

# The reference's list; it bans words of imports, which is no protection. What a
# program may do is decided by the executor; this list only reproduces the reference's filter.
AZR_BANNED_WORDS = (
    'logging', 'random', 'multiprocessing', 'pebble', 'subprocess', 'threading', 'datetime',
    'time', 'hashlib', 'hmac', 'bcrypt', 'os.sys', 'os.path', 'sys.exit', 'os.environ', 'calendar')


@dataclasses.dataclass(frozen=True)
class Proposal:
  """What a proposer's answer was read as, before anything ran.

  Attributes:
    program: source that defines `f`.
    inputs: argument lists, each on one line.
    message: induction only.
    extra: goes to `Task.extra`; must be JSON-serialisable.
  """
  program: str
  inputs: tuple[str, ...]
  message: str = ''
  extra: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Rules:
  """What a proposed program must look like, and what is done to it.

  Attributes:
    max_chars: longer programs are refused.
    functions: how many functions may be defined: 'any'; 'one_top_level'; 'one', which counts
      methods and nested functions too (the reference's rule for Qwen2.5).
    rename: which top-level function becomes `f`: 'any_last' keeps an existing f, else takes the
      last one; 'any_first' likewise the first; 'not_first' and 'not_last' take the first or last
      even if another is named f; 'never' demands an f.
    fence: which Python block is the program: 'first' or 'last'.
    clean: clean-ups in this order: 'comments' (and docstrings), 'globals' (every top-level
      statement but imports, functions and classes), 'prints' (calls of print).
    banned_words: refuse imports that name one of these (`AZR_BANNED_WORDS`).
    reject_constant: refuse programs in which `f` never reads a parameter.
    reject_inner_tests: refuse programs that call `f` with literals outside functions, or assert;
      a call or an assertion that ends the program is its input instead, and taken off.
  """
  max_chars: int = 8192
  functions: str = 'any'
  rename: str = 'any_last'
  fence: str = 'first'
  clean: tuple[str, ...] = ()
  banned_words: tuple[str, ...] = ()
  reject_constant: bool = True
  reject_inner_tests: bool = False

  def __post_init__(self):
    for name in ('clean', 'banned_words'):
      value = getattr(self, name)
      if isinstance(value, str):
        raise ValueError(f'rules.{name}={value!r} must be a tuple of texts, such as {(value,)}.')
      object.__setattr__(self, name, tuple(value))
    for name, allowed in (('functions', FUNCTION_LIMITS), ('rename', RENAME_MODES),
                          ('fence', ('first', 'last'))):
      if getattr(self, name) not in allowed:
        raise ValueError(f'rules.{name}={getattr(self, name)!r} must be one of {allowed}.')
    for step in self.clean:
      if step not in CLEAN_UPS:
        raise ValueError(f'rules.clean has {step!r}; allowed are {CLEAN_UPS}.')


@dataclasses.dataclass(frozen=True)
class Program:
  """A program that passed the rules, and the argument list of a trailing call of f, if any."""
  source: str
  call: str = ''


def read(blocks: Sequence[text.Fence], rules: Rules) -> Program | str:
  """The program among the blocks, made to define `f`, or the reason it is refused.

  A trailing statement `f(...)` with literal arguments (alone, printed or asserted) is taken off
  and handed back: continuation-style prompts give the input that way.
  """
  pick = text.first if rules.fence == 'first' else text.last
  source = pick(blocks, text.PYTHON_LABELS)
  if source is None:
    source = pick(blocks, ('',))
  if source is None:
    return 'no_program'
  return prepare(source, rules)


def prepare(source: str, rules: Rules) -> Program | str:
  """`read` for bare source."""
  if len(source) > rules.max_chars:
    return 'program_too_long'
  source = source.replace('\r\n', '\n').replace('\r', '\n')
  source = dedented(source).strip('\n').rstrip()
  tree = text.parse(source, rules.max_chars)
  if tree is None:
    return 'syntax'
  source, tree, call = _take_call(source, tree)
  reason = _refusal(tree, rules)
  if reason:
    return reason
  renamed = _rename(source, tree, rules.rename)
  if renamed in ('no_function', 'name_clash'):
    return renamed
  if renamed != source:
    source, tree = renamed, text.parse(renamed, len(renamed))
    if not call:                     # it may have been one of the old name
      source, tree, call = _take_call(source, tree)
  if rules.reject_inner_tests and _has_inner_test(tree):
    return 'inner_test'
  try:
    source = clean(source, rules.clean)
  except ValueError:       # an f-string or an integer that Python reads and does not print
    return 'syntax'
  tree = text.parse(source, len(source))
  if tree is None:         # or prints in a form that it does not read
    return 'syntax'
  main = main_function(tree)
  if main is None:
    return 'no_function'
  if not _parameters(main):
    return 'no_parameters'
  if rules.reject_constant and not reads_parameter(main):
    return 'constant'
  return Program(source, call)


def clean(source: str, steps: Sequence[str]) -> str:
  """Source after the clean-ups in `steps` (see `Rules.clean`); none leaves it untouched."""
  if not steps:
    return source
  tree = ast.parse(source)
  if 'globals' in steps:
    keep = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    tree.body = [n for n in tree.body if isinstance(n, keep)]
  if 'comments' in steps:
    _strip_docstrings(list(ast.walk(tree)))
  if 'prints' in steps:
    tree = ast.fix_missing_locations(_NoPrints().visit(tree))
  return ast.unparse(tree)


def without_docstrings(source: str) -> str:
  """The text with blanks for docstrings; the text itself where it is no Python."""
  tree, lines = text.parse(source), source.encode('utf-8', 'surrogatepass').split(b'\n')
  for found in filter(None, map(_docstring, ast.walk(tree) if tree else ())):
    first, last = found.lineno - 1, found.end_lineno - 1
    rest = lines[last][found.end_col_offset:]
    lines[first:last + 1] = [lines[first][:found.col_offset]] + [b''] * (last - first)
    lines[last] += b' ' * (found.end_col_offset - len(lines[last])) + rest
  return b'\n'.join(lines).decode('utf-8', 'surrogatepass')


def main_function(tree: ast.Module) -> ast.FunctionDef | None:
  """The top-level function f (the last one, if it is defined twice), or None."""
  found = [n for n in _defs(tree.body) if n.name == 'f']
  return found[-1] if found else None


def reads_parameter(main: ast.FunctionDef) -> bool:
  """Whether the body mentions a positional parameter."""
  names = {n.id for n in ast.walk(main) if isinstance(n, ast.Name)}
  return bool(_parameters(main) & names)


def imports(source: str) -> list[str]:
  """The top-level import statements, one per line, in order."""
  tree = text.parse(source)
  found = tree.body if tree else []
  return [ast.unparse(n) for n in found if isinstance(n, ast.Import | ast.ImportFrom)]


def missing_imports(source: str, other: str) -> list[str]:
  """What `source` takes from the top-level imports of `other`: names it reads and does not bind.

  No name of a builtin, which an answer means when it says `pow`.
  """
  tree, theirs = text.parse(source), text.parse(other)
  if tree is None or theirs is None:
    return []
  read = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
  missing = read.difference(bound_names(tree), dir(builtins))
  found = []
  for node in theirs.body:
    if not isinstance(node, ast.Import | ast.ImportFrom):
      continue
    names = [a for a in node.names if getattr(node, 'module', '') == '__future__'
             or (a.name == '*' and missing) or (a.asname or a.name).split('.')[0] in missing]
    if names:
      node.names = names
      found.append(ast.unparse(node))
  return found


def dedented(source: str) -> str:
  """Without the indentation that all lines share, where the text is no Python with it."""
  return source if text.parse(source, len(source)) else textwrap.dedent(source)


def with_imports(source: str, lines: Sequence[str]) -> str:
  """`source` with the import lines it does not have put on top, those from `__future__` first."""
  present = set(imports(source))
  missing = sorted((line for line in lines if line not in present), key=_is_plain)
  tree = text.parse(source)
  last = max((n.end_lineno for n in tree.body if isinstance(n, ast.ImportFrom)
              and n.module == '__future__'), default=0) if tree else 0
  rows = source.split('\n')
  return '\n'.join([*rows[:last], *missing, *rows[last:]])


def _is_plain(line: str) -> bool:
  return not line.startswith('from __future__ ')


def _parameters(main: ast.FunctionDef) -> set[str]:
  positional = [*main.args.posonlyargs, *main.args.args]
  return {a.arg for a in (*positional, *([main.args.vararg] if main.args.vararg else []))}


def _take_call(source: str, tree: ast.Module) -> tuple[str, ast.Module, str]:
  if not tree.body:
    return source, tree, ''
  statement = tree.body[-1]
  call = text.call_arguments(statement)
  if call is None or isinstance(statement, ast.Assign):
    return source, tree, ''
  lines = source.split('\n')[:statement.lineno - 1]
  shorter = '\n'.join(lines).rstrip()
  remaining = text.parse(shorter, len(shorter))
  if remaining is None or len(remaining.body) != len(tree.body) - 1:
    return source, tree, ''  # `x = 1; f(2)` on one line: leave it alone
  return shorter, remaining, call


def _refusal(tree: ast.Module, rules: Rules) -> str:
  nodes = list(ast.walk(tree))
  if rules.functions == 'one_top_level' and len(_defs(tree.body)) > 1:
    return 'several_functions'
  if rules.functions == 'one' and len(_defs(nodes)) > 1:
    return 'several_functions'
  words = set(rules.banned_words)
  for node in nodes if words else ():
    if isinstance(node, ast.Import | ast.ImportFrom):
      names = [a.name for a in node.names] + [getattr(node, 'module', None) or '']
      if words & {part for name in names for part in name.split('.')}:
        return 'banned_word'
  return ''


def _has_inner_test(tree: ast.Module) -> bool:
  outside = [n for n in tree.body
             if not isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)]
  return (any(isinstance(n, ast.Assert) for n in ast.walk(tree))
          or any(isinstance(n, ast.Call) and text.call_arguments(ast.Expr(n))
                 for statement in outside for n in ast.walk(statement)))


def _defs(nodes: Sequence[ast.AST]) -> list[ast.FunctionDef]:
  return [n for n in nodes if isinstance(n, ast.FunctionDef)]


def _rename(source: str, tree: ast.Module, mode: str) -> str:
  """Source whose main function is `f`, or 'no_function' or 'name_clash'."""
  functions = _defs(tree.body)
  names = [n.name for n in functions]
  if not names or (mode == 'never' and 'f' not in names):
    return 'no_function'
  if mode == 'never' or (mode in ('any_last', 'any_first') and 'f' in names):
    return source
  main = functions[0] if mode in ('any_first', 'not_first') else functions[-1]
  if main.name == 'f':
    return source
  return _renamed(source, tree, main, 'f') or 'name_clash'


def renamed(source: str, name: str) -> str | None:
  """Source whose `f` is called `name`, or None where that could change its meaning."""
  tree = text.parse(source)
  main = main_function(tree) if tree else None
  return None if main is None else _renamed(source, tree, main, name)


def _renamed(source: str, tree: ast.Module, main: ast.FunctionDef, name: str) -> str | None:
  # Renaming is done where it cannot change meaning: nobody else has the new name, and the old one
  # is bound once. Anything cleverer would need scope analysis for what the prompts never ask for.
  bound = bound_names(tree)
  if name in {*bound, *(n.id for n in ast.walk(tree) if isinstance(n, ast.Name))}:
    return None
  if bound.count(main.name) > 1:
    return None
  lines = [line.encode('utf-8') for line in source.split('\n')]
  old, new = main.name.encode('utf-8'), name.encode('utf-8')
  sites = [(n.lineno - 1, n.col_offset) for n in ast.walk(tree)
           if isinstance(n, ast.Name) and n.id == main.name]
  head = re.compile(rb'def[ \t]+').match(lines[main.lineno - 1], main.col_offset)
  if head is None:  # a line continuation between def and the name
    return None
  for row, column in sorted([*sites, (main.lineno - 1, head.end())], reverse=True):
    if lines[row][column:column + len(old)] != old:
      return None  # the parser normalised a non-ASCII identifier
    lines[row] = lines[row][:column] + new + lines[row][column + len(old):]
  return b'\n'.join(lines).decode('utf-8')


def top_level_names(source: str) -> set[str]:
  """Names that the text binds at its top level, imports aside; empty for no Python."""
  tree = text.parse(source)
  return block_names(tree.body) if tree else set()


def block_names(statements: Sequence[ast.stmt]) -> set[str]:
  """Names that the statements of a module or class bind there, imports aside."""
  found: set[str] = set()
  for node in statements:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
      found.add(node.name)
    elif not isinstance(node, ast.Import | ast.ImportFrom):
      found.update(bound_names(node))
  return found


def imported_names(source: str) -> dict[str, str]:
  """What each name that an import at top level binds stands for: {'log': 'math.log'}."""
  tree, found = text.parse(source), {}
  for node in tree.body if tree else ():
    if isinstance(node, ast.Import):
      found |= {a.asname or a.name.split('.')[0]: a.name if a.asname else a.name.split('.')[0]
                for a in node.names}
    elif isinstance(node, ast.ImportFrom):
      found |= {a.asname or a.name: f'{node.module}.{a.name}' for a in node.names}
  return found


def bound_names(tree: ast.AST) -> list[str]:
  """Every name the program binds, in order of appearance, with repetitions."""
  found = []
  for node in _in_order(tree):
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
      found.append(node.name)
    elif isinstance(node, ast.arg):
      found.append(node.arg)
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
      found.append(node.id)
    elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
      found.append(node.name)
    elif isinstance(node, ast.MatchMapping) and node.rest:
      found.append(node.rest)
    elif isinstance(node, ast.alias):
      found.append((node.asname or node.name).split('.')[0])
  return found


def _in_order(node: ast.AST):
  yield node
  for child in ast.iter_child_nodes(node):
    yield from _in_order(child)


def _strip_docstrings(nodes: Sequence[ast.AST]) -> None:
  for node in nodes:
    if _docstring(node):
      node.body = node.body[1:] or [ast.Pass()]


def _docstring(node: ast.AST) -> ast.Expr | None:
  scopes = (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
  first = node.body[0] if isinstance(node, scopes) and node.body else None
  if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
    return first if isinstance(first.value.value, str) else None
  return None


class _NoPrints(ast.NodeTransformer):
  """Replaces statements that call print by pass."""

  def visit_Expr(self, node):
    called = node.value.func if isinstance(node.value, ast.Call) else None
    return ast.Pass() if isinstance(called, ast.Name) and called.id == 'print' else node
