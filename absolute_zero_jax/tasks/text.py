# SPDX-License-Identifier: Apache-2.0
"""Reading model text: fenced blocks, think/answer tags, boxed answers, literals.

Everything here looks at text as data. Nothing is evaluated: values are recognised by `ast`, with
limits on length and depth that hold before any recursive walk, and no function raises on hostile
text. All scans are linear in the length of the text.
"""

import ast
from collections.abc import Sequence
import dataclasses
import functools
import re
import warnings

THINK_OPEN, THINK_CLOSE = '<think>', '</think>'
ANSWER_OPEN, ANSWER_CLOSE = '<answer>', '</answer>'
PYTHON_LABELS = ('python', 'py', 'python3')

MAX_LITERAL_CHARS = 8192
MAX_DEPTH = 100

_CONSTRUCTORS = ('bool', 'bytes', 'complex', 'dict', 'float', 'frozenset', 'int', 'list', 'range',
                 'set', 'str', 'tuple')
_CONSTANTS = ('nan', 'inf', 'Ellipsis')           # values whose text is a name
_DATA_NODES = (ast.Constant, ast.List, ast.Tuple, ast.Dict, ast.Set, ast.UnaryOp, ast.unaryop,
               ast.BinOp, ast.operator, ast.Call, ast.Name, ast.keyword, ast.expr_context)

# Possessive, because `[^`]*` takes blanks too: what they share would be tried in every division.
_OPEN = re.compile(r' {0,3}(`{3,})[ \t]*+([^`\s]*+)[^`]*+')
_INLINE = re.compile(r' {0,3}(`{3,})([A-Za-z]\w*)[ \t]+(\S.*?)[ \t]*(`{3,})[ \t]*')
_CLOSE = re.compile(r'[ \t]*(`{3,})[ \t]*')
_TAIL = re.compile(r'([^`]*[^`\s])[ \t]*(`{3,})[ \t]*')


@dataclasses.dataclass(frozen=True)
class Fence:
  """One fenced block: its label in lower case ('' when it has none) and the text between."""
  label: str
  body: str


def fences(text: str) -> list[Fence]:
  """The closed fenced blocks of `text`, in order.

  A block opens on a line of three or more backticks with an optional label and closes on a bare
  line of at least as many. A labelled fence inside a block nests, so a message may quote a program
  without its blocks being counted as the author's own. A block that never closes is no block.
  Two common slips are accepted: a block on one line, and (not for Python) a closing fence at the
  end of the last line.
  """
  return _scan(text)[0]


def outside_fences(text: str) -> str:
  """`text` without its fenced blocks; an unclosed block stays."""
  return _scan(text)[1]


def fenced(label: str, body: str) -> str:
  """`body` as a block, fenced by more backticks than any run inside it."""
  longest = max((len(run) for run in re.findall(r'`{3,}', body)), default=2)
  ticks = '`' * (longest + 1)
  return f'{ticks}{label}\n{body}\n{ticks}'


def first(blocks: Sequence[Fence], labels: Sequence[str]) -> str | None:
  """Body of the first block whose label is in `labels`, or None."""
  return next((b.body for b in blocks if b.label in labels), None)


def last(blocks: Sequence[Fence], labels: Sequence[str]) -> str | None:
  """Body of the last block whose label is in `labels`, or None."""
  return first(list(reversed(blocks)), labels)


def labelled_line(text: str, label: str) -> str | None:
  """The rest of the last line `# Label: ...`, the fallback where a block is missing, or None."""
  found = re.findall(rf'^[ \t]*(?:#[ \t]*)?{label}[ \t]*:[ \t]*(\S.*)$', text, re.I | re.M)
  return found[-1].strip() if found else None


def tagged(text: str, name: str) -> str | None:
  """Text after the last `<name>` up to the next `</name>`, or None when either is missing."""
  start = text.rfind(f'<{name}>')
  if start < 0:
    return None
  start += len(name) + 2
  end = text.find(f'</{name}>', start)
  return None if end < 0 else text[start:end]


def boxed(text: str) -> str | None:
  r"""Content of the last `\boxed{...}` with balanced braces, or None."""
  start = text.rfind('\\boxed{')
  if start < 0:
    return None
  depth = 0
  for i in range(start + 6, len(text)):
    depth += (text[i] == '{') - (text[i] == '}')
    if not depth:
      return text[start + 7:i]
  return None


def think_answer(text: str) -> str | None:
  """The answer of a well-formed response, or None: our own format rule.

  Well-formed is: optional blank, one think block that ends at its first closing tag, blank, one
  answer block, blank. Tags inside fenced blocks of the answer are the program's own text. So
  against the reference (see `is_well_formed_azr`) a leading blank is allowed; text after the
  answer, a second answer and a second closing think tag are not.
  """
  body = text.strip()
  if not body.startswith(THINK_OPEN):
    return None
  close = body.find(THINK_CLOSE)
  rest = body[close + len(THINK_CLOSE):].lstrip() if close >= 0 else ''
  if not (rest.startswith(ANSWER_OPEN) and rest.endswith(ANSWER_CLOSE)):
    return None
  answer = rest[len(ANSWER_OPEN):-len(ANSWER_CLOSE)]
  bare = outside_fences(answer)
  return None if ANSWER_OPEN in bare or ANSWER_CLOSE in bare else answer.strip()


def answer_ends(text: str) -> bool:
  """Whether a response holds the closing tag that is the end of its answer, and maybe more.

  Not inside the thinking, where tags may be talked about, and not inside a fenced program.
  """
  _, closed, rest = text.partition(THINK_CLOSE)
  if not closed:
    return False
  # A tag behind the end of a fence does not keep it open.
  answer = rest.lstrip().removeprefix(ANSWER_OPEN).replace(ANSWER_CLOSE, f'\n{ANSWER_CLOSE}\n')
  longest = max((len(run) for run in re.findall(r'`{3,}', answer)), default=3)
  # A fence that is still open ends here, with the tags inside.
  return ANSWER_CLOSE in outside_fences(f'{answer}\n{"`" * longest}')


def is_well_formed_azr(text: str) -> bool:
  """The reference's format test: think block, blank, answer block, from the very first character.

  Source: measured on the reference: text after the answer, two answers and two closing think tags
  pass; a leading blank fails.
  """
  if not text.startswith(THINK_OPEN):
    return False
  joint = re.compile(re.escape(THINK_CLOSE) + r'\s*' + re.escape(ANSWER_OPEN))
  found = joint.search(text, len(THINK_OPEN))
  return found is not None and text.find(ANSWER_CLOSE, found.end()) >= 0


def parse(source: str, max_chars: int = 32768) -> ast.Module | None:
  """The syntax tree, or None for text that is no Python, too long, too deep, or holds a NUL."""
  if len(source) > max_chars or '\0' in source:
    return None
  with warnings.catch_warnings():
    warnings.simplefilter('ignore', SyntaxWarning)
    warnings.simplefilter('ignore', DeprecationWarning)
    try:
      tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
      return None
  return None if _depth_exceeds(tree, MAX_DEPTH) else tree


def is_literal(node: ast.AST) -> bool:
  """Whether a tree is data: constants, containers, `set()`, signed numbers and complex sums."""
  try:
    ast.literal_eval(node)
  except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
    return False
  return True


def literal(source: str) -> str | None:
  """The value text on one line, or None when it is not a literal."""
  tree = parse(source.strip(), MAX_LITERAL_CHARS)
  if tree is None or len(tree.body) != 1 or not isinstance(tree.body[0], ast.Expr):
    return None
  return _unparse([tree.body[0].value], is_literal)


def arguments(source: str) -> str | None:
  """The argument list on one line, or None when it is not a list of data.

  Data are literals and constant expressions (`2**31`, `'x' * 9`, `dict(a=1)`, `list(range(5))`),
  which the executor folds; keyword arguments are allowed. A call of f around the list is taken off
  (`f(1, 2)` gives `1, 2`) and comments are dropped. Starred arguments, names, and an empty list
  give None.
  """
  source = source.strip()
  for text in (source, f'f({source}\n)'):
    tree = parse(text, MAX_LITERAL_CHARS)
    found = call_arguments(tree.body[0]) if tree and len(tree.body) == 1 else None
    if found is not None:
      return found
  return None


def positional(source: str, arguments: str) -> str | None:
  """An argument list of `f` (see `arguments`) without names; None where it needs them.

  One input would otherwise be written in as many ways as its parameter has names.
  """
  call = ast.parse(f'f({arguments})', mode='eval').body
  named = {k.arg: k.value for k in call.keywords}
  if not named:
    return arguments
  names = _parameters(source)[len(call.args):][:len(named)]
  if set(names) != set(named):
    return None
  return _unparse([*call.args, *(named[name] for name in names)], is_data)


@functools.lru_cache(8)                 # the inputs of a proposal come one by one
def _parameters(source: str) -> list[str]:
  tree = parse(source)
  functions = [node for node in (tree.body if tree else ())
               if isinstance(node, ast.FunctionDef) and node.name == 'f']
  return [p.arg for p in (*functions[-1].args.posonlyargs, *functions[-1].args.args)
          ] if functions else []


def calls(line: str) -> list[str | None]:
  """Argument lists of a line `f(1)` or `[f(1), f(2)]`; None for each that is no list of data."""
  if not line.lstrip().startswith(('f(', '[f(')):
    return []
  tree = parse(line.strip(), MAX_LITERAL_CHARS)
  if tree is None or not tree.body or not isinstance(tree.body[0], ast.Expr):
    return [None]
  node = tree.body[0].value
  nodes = node.elts if isinstance(node, ast.List) else [node]
  return [call_arguments(ast.Expr(one)) for one in nodes]


def call_arguments(statement: ast.stmt) -> str | None:
  """Arguments of a statement `f(...)`, alone or inside print, assert, `x = ` or `... == y`."""
  node = statement
  if isinstance(node, ast.Assert):
    node = node.test
  elif isinstance(node, ast.Expr | ast.Assign):
    node = node.value
  if isinstance(node, ast.Compare):
    node = node.left
  if _is_call(node, 'print') and len(node.args) == 1 and not node.keywords:
    node = node.args[0]
  if not _is_call(node, 'f') or not (node.args or node.keywords):
    return None
  if any(k.arg is None for k in node.keywords):
    return None
  return _unparse([*node.args, *node.keywords], is_data)


def is_data(node: ast.AST) -> bool:
  """Whether a tree is a literal or a constant expression of operators and plain constructors."""
  for child in ast.walk(node):
    called = isinstance(child, ast.Call)
    if called and not (isinstance(child.func, ast.Name) and child.func.id in _CONSTRUCTORS):
      return False
    if isinstance(child, ast.Name) and child.id not in (*_CONSTRUCTORS, *_CONSTANTS):
      return False
    if not isinstance(child, _DATA_NODES):
      return False
  return True


def _unparse(nodes: Sequence[ast.AST], test) -> str | None:
  if not all(test(n) for n in nodes):
    return None
  try:
    return ', '.join(ast.unparse(n) for n in nodes)
  except ValueError:  # a hexadecimal integer beyond the limit on decimal digits
    return None


def _is_call(node: ast.AST, name: str) -> bool:
  return (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
          and node.func.id == name)


def _depth_exceeds(tree: ast.AST, limit: int) -> bool:
  level = [tree]
  for _ in range(limit):
    level = [child for node in level for child in ast.iter_child_nodes(node)]
    if not level:
      return False
  return True


def _scan(text: str) -> tuple[list[Fence], str]:
  """Closed blocks, and the lines outside them."""
  blocks, outside, body = [], [], []
  ticks, label, depth = 0, '', 0
  for line in text.split('\n'):
    line = line.rstrip('\r')
    if not depth:
      opened = _OPEN.fullmatch(line)
      # The length bound keeps the lazy match linear over the whole text.
      inline = _INLINE.fullmatch(line) if line.count('`') >= 6 and len(line) < 2000 else None
      if inline:
        blocks.append(Fence(inline[2].lower(), inline[3]))
      elif opened:
        ticks, label, depth, body = len(opened[1]), opened[2].lower(), 1, []
        start = line
      else:
        outside.append(line)
      continue
    close, nested = _CLOSE.fullmatch(line), _OPEN.fullmatch(line)
    if close and len(close[1]) >= ticks:
      depth -= 1
    elif nested and nested[2] and len(nested[1]) >= ticks:
      depth += 1
    elif depth == 1 and label not in PYTHON_LABELS and '```' in line:
      tail = _TAIL.fullmatch(line)
      if tail and len(tail[2]) >= ticks:
        body.append(tail[1])
        depth = 0
        blocks.append(Fence(label, '\n'.join(body)))
        continue
    if depth:
      body.append(line)
    else:
      blocks.append(Fence(label, '\n'.join(body)))
  if depth:
    outside += [start, *body]
  return blocks, '\n'.join(outside)
