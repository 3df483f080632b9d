# SPDX-License-Identifier: Apache-2.0
"""Numbers about texts, programs and tasks for the logs: cheap, and without further packages."""

import ast
import collections
from collections.abc import Sequence
import functools
import io
import re
import statistics
import tokenize
from typing import NamedTuple

from absolute_zero_jax import intrinsic
from absolute_zero_jax.tasks import identity, text
from absolute_zero_jax.types import Task

# Words of doubt and of checking again; our own list; the reference logs such a share too.
REFLECTION = re.compile(
    r"\b(wait|hmm+|hold on|actually|however|alternatively|on second thought|let me (re)?check|"
    r"let me (try|think|verify|see|reconsider)|double[- ]check|check again|re-?(check|examine|"
    r"evaluate|think|consider|visit|read|trace|calculate|verify)\w*|verify|make sure|"
    r"(that|this)('s| is| was)? (not right|wrong|incorrect)|i (made|was) (a mistake|wrong)|mistake|"
    r"uh[- ]?oh|oops|maybe i|not sure|going back|start over|another (way|approach))\b", re.I)

_BRANCHES = (ast.If, ast.For, ast.While, ast.IfExp, ast.ExceptHandler, ast.comprehension,
             ast.Assert, ast.With)


def reflects(response: str) -> bool:
  """Whether a response holds a word of doubt or of checking again."""
  return REFLECTION.search(response) is not None


def program_lines(source: str) -> int:
  """Lines of a program that are not blank."""
  return sum(bool(line.strip()) for line in source.split('\n'))


def comment_share(source: str) -> float:
  """Share of a program's lines that hold a comment; 0 for text that cannot be tokenised."""
  if '#' not in source:
    return 0.0
  lines = program_lines(source)
  try:
    tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
  except (tokenize.TokenError, SyntaxError):
    return 0.0
  commented = {token.start[0] for token in tokens if token.type == tokenize.COMMENT}
  return len(commented) / lines if lines else 0.0


def has_comment_plan(source: str) -> bool:
  """Whether comments lead the program step by step: two or more lines that are comment only.

  The behaviour the paper describes as planning in comments.
  """
  inside = [line.strip().startswith('#') for line in source.split('\n')]
  return sum(inside) >= 2


def branches(source: str) -> int:
  """Cyclomatic complexity of the whole text: 1 + branching constructs and boolean operators."""
  return _shape(source).branches


def nodes(source: str) -> int:
  """Nodes of the syntax tree; 0 for text that is no Python."""
  return _shape(source).nodes


def distance(source: str, other: str) -> float:
  """1 - overlap of two programs' syntax, in [0, 1]: multisets of parent-child pairs of node types.

  Linear in the size of the programs, unlike the edit distance of `intrinsic.mean_edit_distance`,
  which it follows closely enough for a log. 0 when either is no Python.
  """
  one, two = _shape(source).pairs, _shape(other).pairs
  if not one or not two:
    return 0.0
  return 1 - 2 * (one & two).total() / (one.total() + two.total())


def diversity(sources: Sequence[str]) -> float:
  """Mean `distance` of each program to the next in the list; 0 for fewer than two."""
  if len(sources) < 2:
    return 0.0
  return statistics.fmean(distance(a, b) for a, b in zip(sources, [*sources[1:], sources[0]]))


def distinct_share(texts: Sequence[str]) -> float:
  """Distinct texts over all; 0 for none. For Monte-Carlo answers: near 1/n means greedy copies."""
  return len(set(texts)) / len(texts) if texts else 0.0


def task_metrics(tasks: Sequence[Task], references: Sequence[Sequence[Task]] = ()
                 ) -> dict[str, float]:
  """Means over a batch of tasks, by name; {} for none.

  Args:
    references: what each task's proposer was shown, for 'reference_distance'.
  """
  if not tasks:
    return {}
  sources = [task.program for task in tasks]
  types = collections.Counter(
      intrinsic.type_name(output) for task in tasks for _, output in task.cases)
  out = {
      'program_lines': statistics.fmean(map(program_lines, sources)),
      'program_nodes': statistics.fmean(map(nodes, sources)),
      'branches': statistics.fmean(map(branches, sources)),
      'unreachable_share': statistics.fmean(map(identity.has_unreachable, sources)),
      'comment_share': statistics.fmean(map(comment_share, sources)),
      'comment_plan_share': statistics.fmean(map(has_comment_plan, sources)),
      'diversity': diversity(sources),
      'distinct_programs': distinct_share(sources),
      'output_types': float(len(types)),
      'distinct_outputs': distinct_share([o for task in tasks for _, o in task.cases]),
  }
  pairs = [(task, r) for task, shown in zip(tasks, references) for r in shown
           if r.kind != 'composite']
  if pairs:
    out['reference_distance'] = statistics.fmean(
        distance(t.own_program, r.program) for t, r in pairs)
  return out


def type_metrics(counts: dict[str, dict[str, dict[str, int]]]) -> dict[str, float]:
  """Scalars from `TaskBuffer.counts`: '<field>/types', '/values', '/total', and per type."""
  out: dict[str, float] = {}
  for field, by_type in counts.items():
    out[f'{field}/types'] = float(len(by_type))
    out[f'{field}/values'] = float(sum(map(len, by_type.values())))
    out[f'{field}/total'] = float(sum(sum(texts.values()) for texts in by_type.values()))
    for name, texts in by_type.items():
      out[f'{field}/{name}/values'] = float(len(texts))
      out[f'{field}/{name}/total'] = float(sum(texts.values()))
  return out


class _Shape(NamedTuple):
  branches: int
  nodes: int
  pairs: collections.Counter


@functools.lru_cache(maxsize=4096)
def _shape(source: str) -> _Shape:
  """All numbers about a tree from one walk; references are asked for again and again."""
  tree = text.parse(source)
  if tree is None:
    return _Shape(0, 0, collections.Counter())
  found, pairs = list(ast.walk(tree)), collections.Counter()
  total = 1
  for node in found:
    name = type(node).__name__
    pairs.update((name, type(child).__name__) for child in ast.iter_child_nodes(node))
    total += isinstance(node, _BRANCHES)
    total += len(node.values) - 1 if isinstance(node, ast.BoolOp) else 0
  return _Shape(total, len(found), pairs)
