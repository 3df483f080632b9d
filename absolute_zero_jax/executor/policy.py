# SPDX-License-Identifier: Apache-2.0
"""What a program must look like to be run at all: a gate on its syntax tree.

The gate keeps tasks learnable and reproducible (no clock, no randomness, no files), and turns
obvious escapes into a readable refusal. It is not what protects the host: that is `fence`, which
must hold with the gate switched off.

Rules: at most `MAX_SOURCE_CHARS` of text; parses and compiles; a plain `def f` at top level; only
modules of the allow-list, by whatever spelling (`import`, `from`, alias, `__import__`, importlib,
the private attribute of another module), and none as a value, which may be an alias; no name or
attribute that leads out of the program (`eval`, `open`, `__subclasses__`, `__globals__`, ...).
Classes may define special methods.
"""

import ast
from collections.abc import Iterable
import dataclasses
import functools
import hashlib
import importlib
import symtable
import sys
import types

from absolute_zero_jax.executor import literals

MAX_SOURCE_CHARS = 32_768

# Deterministic modules without access to anything outside the process. The reference's list of
# forbidden ones (clocks, randomness, hashing, threads, processes) is the complement.
MODULES = frozenset('''abc array base64 binascii bisect cmath collections colorsys copy dataclasses
  decimal difflib enum fractions functools graphlib heapq html itertools json keyword math numbers
  operator pprint queue re reprlib statistics string struct textwrap typing
  unicodedata zlib __future__'''.split())

_NAMES = frozenset('''eval exec compile open breakpoint globals locals vars __import__ __builtins__
  __loader__ __spec__ memoryview'''.split())
_SAFE_DUNDERS = frozenset('''__init__ __name__ __class__ __doc__ __len__ __str__ __repr__ __eq__
  __ne__ __lt__ __le__ __gt__ __ge__ __hash__ __iter__ __next__ __contains__ __getitem__ __setitem__
  __delitem__ __call__ __add__ __sub__ __mul__ __truediv__ __floordiv__ __mod__ __pow__ __neg__
  __abs__ __bool__ __int__ __float__ __index__ __enter__ __exit__ __post_init__ __missing__ __new__
  __radd__ __rsub__ __rmul__ __iadd__ __isub__ __and__ __or__ __xor__ __invert__ __reversed__
  __slots__ __main__ __annotations__ __qualname__ __format__ __all__ __setattr__ __delattr__
  __init_subclass__ __cause__ __pos__ __complex__ __round__ __trunc__ __floor__ __ceil__ __divmod__
  __rdivmod__ __matmul__ __rmatmul__ __imatmul__ __rtruediv__ __rfloordiv__ __rmod__ __rpow__
  __itruediv__ __ifloordiv__ __imod__ __ipow__ __lshift__ __rshift__ __rlshift__ __rrshift__
  __ilshift__ __irshift__ __rand__ __ror__ __rxor__ __iand__ __ior__ __ixor__'''.split())
# Frames, code objects and generators reach other frames' variables.
_ATTRIBUTES = frozenset('''gi_frame gi_code cr_frame cr_code ag_frame ag_code tb_frame tb_next
  f_back f_globals f_locals f_builtins f_code co_code co_consts func_globals func_code
  mro'''.split())
# What a program may take from modules and still leave nothing in them; None is all that is public.
_STATELESS = dict.fromkeys('bisect cmath heapq itertools math'.split()) | {
    name: frozenset(words.split()) for name, words in {
        'collections': 'ChainMap Counter OrderedDict defaultdict deque namedtuple',
        'copy': 'copy deepcopy', 'functools': 'cache cmp_to_key lru_cache partial reduce',
        'operator': 'add and_ eq floordiv ge gt itemgetter le lt mod mul ne neg or_ pow sub '
                    'truediv xor',
        're': 'DOTALL I IGNORECASE M MULTILINE S compile escape findall finditer fullmatch match '
              'search split sub subn',
        'string': 'ascii_letters ascii_lowercase ascii_uppercase digits hexdigits printable '
                  'punctuation whitespace',
        'typing': 'Any Callable Counter DefaultDict Deque Dict FrozenSet Generator Iterable '
                  'Iterator List Literal Mapping NamedTuple Optional Sequence Set Tuple Union'
    }.items()}
_BINDING = (ast.FunctionDef, ast.ClassDef, ast.ExceptHandler, ast.MatchAs, ast.MatchStar,
            ast.MatchMapping)
_FORBIDDEN_MODULES = (frozenset(sys.stdlib_module_names)
                      | {'numpy', 'torch', 'jax', 'bltns'}) - MODULES     # as `enum` calls builtins


class PolicyError(ValueError):
  """The program may not run; the message is the reason."""


@dataclasses.dataclass(frozen=True)
class Gated:
  """A program that passed.

  Attributes:
    source: the text that runs and is shown: as written, comments kept, with `\\n` line ends and
      without blank lines around it.
    digest: SHA-256 of the normal form: the syntax tree without docstrings, printed by
      `ast.unparse`, so that layout and comments do not make a new task. '' if not asked for.
  """
  source: str
  digest: str = ''


def tidy(source: str) -> str:
  """The text as it is run and shown; idempotent, and changes no token of the program."""
  lines = source.replace('\r\n', '\n').replace('\r', '\n').split('\n')
  while lines and not lines[0].strip():
    lines.pop(0)
  return '\n'.join(lines).rstrip() + '\n' if lines else ''


def gate(source: str, *, modules: Iterable[str] = MODULES, enforce: bool = True,
         digest: bool = False) -> Gated:
  """The tidied program, if it may run.

  Args:
    modules: importable modules; a dotted name allows that submodule, a root allows all below it.
    enforce: False keeps only the checks without which a program cannot be run (text size, syntax,
      a plain `f`): for testing the fence, and for trusted programs.

  Raises:
    PolicyError: with the reason: 'syntax', 'too long', 'no f', 'import os', 'name eval', ...
  """
  tree = parse(source)
  _find_f(tree)
  if enforce:
    _Walk(frozenset(modules), source).check(tree)
  tidied = tidy(source)
  return Gated(tidied, normal_digest(tree) if digest else '')


@functools.lru_cache(2048)
def may_keep_state(source: str) -> bool:
  """Whether modules that a gated program imports may keep what one input leaves.

  True for whatever is not surely harmless: an attribute that is set, a module with objects of its
  own that can change (`keyword.kwlist`, decimal's context).
  """
  if 'import' not in source:
    return False
  nodes, modules = list(ast.walk(ast.parse(source))), {}

  def is_harmless(module, name):
    if module not in _STATELESS or name.startswith('_') or name == '*':
      return module == '__future__'
    return _STATELESS[module] is None or name in _STATELESS[module]
  for node in nodes:
    if isinstance(node, ast.Import):
      modules |= {alias.asname or alias.name: alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      if not all(is_harmless(node.module, alias.name) for alias in node.names):
        return True
  if not set(modules.values()) <= _STATELESS.keys():
    return True
  for node in nodes:
    if isinstance(node, ast.Attribute):
      module = modules.get(getattr(node.value, 'id', None))
      if (not isinstance(node.ctx, ast.Load) or node.attr in ('__setattr__', '__delattr__')
          or module and not is_harmless(module, node.attr)):
        return True
    elif isinstance(node, ast.Name) and node.id in ('setattr', 'delattr', 'getattr'):
      return True
  return False


def parse(source: str) -> ast.Module:
  """Syntax tree of a program's text.

  Raises:
    PolicyError: over `MAX_SOURCE_CHARS`, nested too deep, not encodable, or no Python.
  """
  try:
    literals.check_text(source, MAX_SOURCE_CHARS)
    source.encode('utf-8')
    return ast.parse(source)
  except literals.LiteralError as e:
    raise PolicyError(str(e)) from e
  except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
    raise PolicyError('syntax') from e


def normal_digest(tree: ast.Module) -> str:
  """SHA-256 of the normal form; comments, layout and docstrings do not enter. Changes `tree`."""
  blocks = [tree]
  for node in blocks:      # grows; only these hold statements
    blocks += [s for name in ('body', 'orelse', 'finalbody', 'handlers', 'cases')
               for s in getattr(node, name, ()) if hasattr(s, 'body')]
    if isinstance(node, (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
      body = node.body
      if body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        node.body = body[1:] or [ast.Pass()]
  for show in (ast.unparse, ast.dump):       # before Python 3.12, some f-strings have no text
    try:
      return hashlib.sha256(show(tree).encode('utf-8', 'backslashreplace')).hexdigest()
    except ValueError:
      continue
    except RecursionError as e:
      raise PolicyError('nested too deep') from e
  raise PolicyError('integer too long')


def _find_f(tree: ast.Module) -> None:
  """Checks that the last thing bound to `f` by a definition at top level is a plain function."""
  found = None
  for node in tree.body:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and node.name == 'f':
      found = node
  if found is None:
    raise PolicyError('no f')
  if not isinstance(found, ast.FunctionDef):
    raise PolicyError('f is async' if isinstance(found, ast.AsyncFunctionDef) else 'f is a class')


class _Walk:
  """One pass over the tree; remembers which names are modules, to see through `m._private`."""

  def __init__(self, modules: frozenset[str], source: str):
    self._modules, self._source = modules, source
    self._aliases: dict[str, str] = {}           # names that are modules: their dotted paths
    self._paths: dict[int, str] = {}             # the same of nodes, by their id

  def check(self, tree: ast.Module) -> None:
    attributes, names, bound = [], [], set()     # judged last, when every alias is known
    todo: list[ast.AST] = [tree]
    for node in todo:        # grows; breadth first, so that the first offence is named
      t = type(node)
      if t is ast.Name:
        self._name(node.id)
        if type(node.ctx) is ast.Load:
          names.append(node)
        else:
          bound.add(node.id)
        continue
      if t is ast.Expr and type(node.value) is ast.Constant:
        continue               # a docstring
      if t is ast.Constant:
        if type(node.value) is str:
          self._text(node.value)
        continue
      if t is ast.Attribute:
        attributes.append(node)
      elif t is ast.arg:
        bound.add(node.arg)
      elif t in _BINDING:
        name = getattr(node, 'name', None) or getattr(node, 'rest', None)
        bound |= {name} if name else set()         # `except E:` and `case _:` bind none
      elif t is ast.MatchClass:
        for name in node.kwd_attrs:
          self._attribute_name(name)
      elif t is ast.Import:
        for alias in node.names:
          self._allow(alias.name)
          root = alias.name.partition('.')[0]
          self._alias(alias.asname or root, alias.name if alias.asname else root)
      elif t is ast.ImportFrom:
        self._import_from(node)
      elif t is ast.AsyncFunctionDef or t is ast.Await:
        raise PolicyError('async')
      for field in _children(t):
        child = getattr(node, field, None)
        if type(child) is list:
          todo += [c for c in child if isinstance(c, ast.AST)]
        elif isinstance(child, ast.AST):
          todo.append(child)
    for node in attributes:
      self._attribute(node)
    # A module that is passed on as a value would hide what is taken from it.
    receivers = {id(node.value) for node in attributes}
    for node in [*names, *attributes]:
      if id(node) not in receivers and self._path(node) and getattr(node, 'id', '') not in bound:
        raise PolicyError(f'module {ast.unparse(node)[:40]} as a value')

  def _allow(self, name: str) -> None:
    root = name.partition('.')[0]
    if root not in self._modules and name not in self._modules:
      raise PolicyError(f'import {name[:40]}')

  def _import_from(self, node: ast.ImportFrom) -> None:
    if node.level:
      raise PolicyError('relative import')
    self._allow(node.module)
    for alias in node.names:
      name = alias.name
      path = _module_path(node.module, name)
      if (name in _FORBIDDEN_MODULES or (name.startswith('_') and node.module != '__future__')
          or not _is_below(path, node.module)):
        raise PolicyError(f'import {node.module[:40]}.{name[:40]}')
      if path:
        self._alias(alias.asname or name, path)

  def _alias(self, name: str, path: str) -> None:
    if self._aliases.setdefault(name, path) != path:
      raise PolicyError(f'two modules as {name[:40]}')

  def _name(self, name: str) -> None:
    if (_is_dunder(name) and name not in _SAFE_DUNDERS
        or name in _NAMES and name not in _variables(self._source)):
      raise PolicyError(f'name {name[:40]}')

  def _attribute_name(self, name: str) -> None:
    if name in _ATTRIBUTES or (_is_dunder(name) and name not in _SAFE_DUNDERS):
      raise PolicyError(f'attribute {name[:40]}')

  def _attribute(self, node: ast.Attribute) -> None:
    name = node.attr
    self._attribute_name(name)
    parent = self._path(node.value)
    if parent and (name in _FORBIDDEN_MODULES or name.startswith('_')
                   or not _is_below(_module_path(parent, name), parent)):
      raise PolicyError(f'import {ast.unparse(node.value)[:40]}.{name[:40]}')

  def _path(self, node: ast.expr) -> str:
    """The dotted path of the module that a name, or an attribute of a module, is; or ''."""
    chain = []
    while isinstance(node, ast.Attribute) and id(node) not in self._paths:
      chain.append(node)
      node = node.value
    path = self._paths.get(id(node), '')
    if isinstance(node, ast.Name):
      path = self._aliases.get(node.id, '')
    for attribute in reversed(chain):
      path = self._paths[id(attribute)] = path and _module_path(path, attribute.attr)
    return path

  def _text(self, text: str) -> None:
    # getattr(x, '__subclasses__'), '{0.__globals__}'.format(f)
    if '__' in text:
      for word in _words(text):
        if _is_dunder(word) and word not in _SAFE_DUNDERS:
          raise PolicyError(f'text {word[:40]}')


@functools.lru_cache(4096)
def _module_path(module: str, name: str) -> str:
  """The path of a module that another one of the allow-list holds under a name (`re.enum`)."""
  if module.partition('.')[0] not in MODULES:
    return ''
  try:
    value = getattr(importlib.import_module(module), name, None)
    if value is None:                  # a module below that nobody has imported yet
      value = importlib.import_module(f'{module}.{name}')
  except (ImportError, ValueError):
    return ''
  return value.__name__ if isinstance(value, types.ModuleType) else ''


def _is_below(path: str, module: str) -> bool:
  """Whether what a module holds is no other module's: `json.decoder`, but not `statistics.math`."""
  return not path or path.partition('.')[0] == module.partition('.')[0]


@functools.lru_cache(1)
def _variables(source: str) -> set[str]:
  """Names that are variables of functions wherever they occur, so that no builtin is meant.

  A function that reads its variable too early fails; modules and classes then find the builtin.
  """
  try:
    tables = [symtable.symtable(source, '<task>', 'exec')]
  except (SyntaxError, ValueError, RecursionError, MemoryError):
    return set()
  inside, elsewhere = set(), set()
  for table in tables:       # grows
    tables += table.get_children()
    for symbol in table.get_symbols():
      is_own = table.get_type() == 'function' and not symbol.is_global()
      (inside if is_own else elsewhere).add(symbol.get_name())
  return inside - elsewhere


@functools.cache
def _children(t: type) -> tuple[str, ...]:
  """Fields of a node class that can hold names; contexts and operators (a third of all) cannot."""
  return tuple(f for f in t._fields if f not in ('ctx', 'op', 'ops', 'kind', 'id', 'attr'))


def _is_dunder(name: str) -> bool:
  return len(name) > 4 and name.startswith('__') and name.endswith('__') and name.strip('_') != ''


def _words(text: str) -> list[str]:
  return ''.join(c if c == '_' or c.isalnum() else ' ' for c in text).split()
