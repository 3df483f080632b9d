# SPDX-License-Identifier: Apache-2.0
"""Intrinsic values of a proposed task, of about [0, 1]: how complex, how unlike what was there.

All are off by default; the paper found no significant gain from them (App. D).
"""

import ast
from collections.abc import Mapping, Sequence
import difflib
import importlib
import json
import statistics

Counts = Mapping[str, Mapping[str, int]]   # type name -> text of the value -> how often
_MAX_TREE_CHARS = 1 << 14        # two of so many take about a second to compare


def complexity(program: str) -> float:
  """Cognitive complexity / 15. Needs the extra package complexipy; 0 for text it cannot read."""
  complexipy = _extra('complexipy')
  try:
    return complexipy.code_complexity(ast.unparse(ast.parse(program))).complexity / 15
  except (SyntaxError, ValueError, RecursionError):
    return 0.0


def halstead(program: str) -> float:
  """Weighted Halstead effort and volume and cyclomatic complexity, rounded to 3 places.

  0.5 min(effort / 10000, 1) + 0.3 min(cyclomatic / 10, 1) + 0.2 min(volume / 500, 1). Needs the
  extra package radon; 0 for text it cannot read.
  """
  radon_complexity, radon_metrics = _extra('radon.complexity'), _extra('radon.metrics')
  try:
    total = radon_metrics.h_visit(program).total
    blocks = radon_complexity.cc_visit(program)
  except (SyntaxError, ValueError, RecursionError):
    return 0.0
  cyclomatic = max((block.complexity for block in blocks), default=0)
  return round(0.5 * min(total.effort / 10000, 1) + 0.3 * min(cyclomatic / 10, 1)
               + 0.2 * min(total.volume / 500, 1), 3)


def mean_edit_distance(program: str, references: Sequence[str]) -> float:
  """Mean over the references of 1 - difflib ratio between the programs' trees; 0 without any.

  A pair of which one is no Python counts as 0. The trees are written as indented JSON and compared
  by character, which takes time quadratic in their size: of each, the first `_MAX_TREE_CHARS`.
  """
  trees = [tree and tree[:_MAX_TREE_CHARS]
           for tree in map(_tree_json, (program, *references))]
  own, others = trees[0], trees[1:]
  return statistics.fmean(
      0.0 if own is None or other is None
      else 1 - difflib.SequenceMatcher(None, own, other).ratio()
      for other in others) if others else 0.0


def answer_diversity(counts: Counts, kind: str, value: str, hierarchical: bool = False) -> float:
  """How unusual a value is among those seen: 1 when it is new.

  Args:
    counts: how often each value text was seen, by type name.
    kind: type name of the value.
    hierarchical: mean of (1 - share of its type) and (1 - its share inside the type), instead of
      1 - its share among all.
  """
  total = sum(sum(texts.values()) for texts in counts.values())
  inside = counts.get(kind, {})
  of_kind, seen = sum(inside.values()), inside.get(value, 0)
  if hierarchical:
    by_type = 1 - of_kind / total if total else 1.0
    in_type = 1 - seen / of_kind if of_kind else 1.0
    return (by_type + in_type) / 2
  flat = sum(texts.get(value, 0) for texts in counts.values())
  return 1 - flat / total if total else 1.0


def mean_diversity(counts: Counts, values: Sequence[tuple[str, str]],
                   hierarchical: bool = False) -> float:
  """Mean `answer_diversity` of (type name, text) pairs; 0 without any. For induction."""
  return statistics.fmean(answer_diversity(counts, kind, value, hierarchical)
                          for kind, value in values) if values else 0.0


def _flat(which: str, kinds: Sequence[str]):
  """A diversity term of the first case, for tasks of `kinds`."""
  def value(task, references, counts, hierarchical):
    del references
    if task.kind not in kinds:
      return None
    text = task.input if which == 'inputs' else task.output
    return answer_diversity(counts.get(which, {}), type_name(text), text, hierarchical)
  return value


def _mean(which: str):
  """A diversity term over all cases of an induction task."""
  def value(task, references, counts, hierarchical):
    del references
    if task.kind != 'induction':
      return None
    texts = [case[which == 'outputs'] for case in task.cases]
    return mean_diversity(counts.get(which, {}), [(type_name(t), t) for t in texts], hierarchical)
  return value


def _of_program(function):
  """A term of the program, for kinds that propose one."""
  def value(task, references, counts, hierarchical):
    del references, counts, hierarchical
    return None if task.kind == 'induction' else function(task.own_program)
  return value


def _answer_diversity(task, references, counts, hierarchical):
  which = {'abduction': 'inputs', 'error': 'errors'}.get(task.kind, 'outputs')
  return _flat(which, ('abduction', 'deduction', 'error'))(task, references, counts, hierarchical)


def _edit_distance(task, references, counts, hierarchical):
  del counts, hierarchical
  if task.kind == 'induction':
    return None
  plain = (r for r in references if r.kind != 'composite')       # those are given, not shown
  return mean_edit_distance(task.own_program, [r.program for r in plain])


# name -> function of (task, references, counts, hierarchical); None where it does not apply.
TERMS = {
    'complexity': _of_program(complexity),
    'halstead': _of_program(halstead),
    'mean_edit_distance': _edit_distance,
    'answer_diversity': _answer_diversity,
    'f_input_diversity': _mean('inputs'),
    'f_output_diversity': _mean('outputs'),
}


def type_name(value: str) -> str:
  """Python type of a literal; 'tuple' for several arguments, 'str' for what is no literal."""
  try:
    return type(ast.literal_eval(value)).__name__
  except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
    return 'str'


def _tree_json(program: str) -> str | None:
  try:
    return json.dumps(_plain(ast.parse(program)), indent=2)
  except (SyntaxError, ValueError, RecursionError, MemoryError):
    return None


def _plain(node: object) -> object:
  if isinstance(node, ast.AST):
    fields = {name: _plain(value) for name, value in ast.iter_fields(node)}
    return {'_type': type(node).__name__, **fields}
  if isinstance(node, list):
    return [_plain(item) for item in node]
  return node if isinstance(node, str | int | float | bool | None) else repr(node)


def _extra(module: str):
  try:
    return importlib.import_module(module)
  except ImportError as error:
    package = module.split('.')[0]
    raise ValueError(f'this reward needs {package}: pip install {package}, or set its coefficient '
                     'to 0.') from error
