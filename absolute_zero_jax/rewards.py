# SPDX-License-Identifier: Apache-2.0
"""Rewards as named functions of numbers and strings.

  proposal: no valid task -> format penalty; solve rate 0 or 1 -> zero_learnability; else
            `learnability` of the rate, joined by intrinsic terms
  answer:   unreadable -> format penalty; wrong -> wrong penalty; else the accuracy

Intrinsic terms are functions that return numbers of about [0, 1]; `term` scales and caps one,
`combine` adds them to learnability. All are off unless a coefficient is set.
"""

import ast
from collections.abc import Mapping, Sequence
import dataclasses
import difflib
import importlib
import json
import statistics

LEARNABILITY = ('one_minus', 'inverse')
COMBINE = ('sum', 'multiply', 'sum_multiply', 'multiply_sum')
FILTERS = ('all', 'non_one', 'non_extremes')
FORMAT_MODES = ('conditional', 'addition', 'multiply')
INDUCTION = ('binary', 'accuracy', 'if_one_correct')

Counts = Mapping[str, Mapping[str, int]]   # type name -> text of the value -> how often


@dataclasses.dataclass(frozen=True)
class Rewards:
  """The reward section of a config, applied to attempts. Make one with `get`.

  Attributes:
    format_penalty: unreadable response, or a proposal that is no valid task.
    wrong_penalty: well-formed answer that is wrong.
    zero_learnability: valid proposal of solve rate 0 or 1. Eq. 4 of the paper says 0, our default;
      its code gives -0.5.
    learnability: 'one_minus' or 'inverse'.
    induction: read by the induction kind (`score`); here so that the section is complete.
    format_mode: 'conditional', 'addition' or 'multiply'; see `solve`.
    intrinsic: {name in `INTRINSIC`: (coefficient, cap)}.
    hierarchical: how `answer_diversity` counts.
    combine: how intrinsic terms join learnability.
  """
  format_penalty: float = -1.0
  wrong_penalty: float = -0.5
  zero_learnability: float = 0.0
  learnability: str = 'one_minus'
  induction: str = 'binary'
  format_mode: str = 'conditional'
  intrinsic: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
  hierarchical: bool = False
  combine: str = 'sum'

  def __post_init__(self):
    for what, allowed in (('learnability', LEARNABILITY), ('induction', INDUCTION),
                          ('format_mode', FORMAT_MODES), ('combine', COMBINE)):
      _one_of(f'reward.{what}', getattr(self, what), allowed)
    for name in self.intrinsic:
      _one_of('reward.intrinsic', name, tuple(INTRINSIC))

  def propose(self, attempt, counts: Mapping[str, Counts] | None = None
              ) -> tuple[float, dict[str, float]]:
    """Reward of a proposal, and the parts it was made of.

    Args:
      attempt: has well_formed, task (None unless valid), solve_rate and references.
      counts: `TaskBuffer.counts()` before this task; needed by the diversity terms only.
    """
    task = attempt.task
    if task is None or not attempt.well_formed:
      return self.format_penalty, {'format': self.format_penalty}
    gain = learnability(attempt.solve_rate, self.learnability)
    if gain <= 0:
      return self.zero_learnability, {'learnability': self.zero_learnability}
    parts = {'learnability': gain}
    for name, (coefficient, cap) in self.intrinsic.items():
      value = INTRINSIC[name](task, attempt.references, counts or {}, self.hierarchical)
      if value is not None:
        parts[name] = term(value, coefficient, cap)
    terms = [value for name, value in parts.items() if name != 'learnability']
    return combine(gain, terms, self.combine), parts

  def solve(self, attempt) -> tuple[float, dict[str, float]]:
    """Reward of an answer, and its parts. An answer that could not be read is badly formed."""
    well_formed = attempt.well_formed and attempt.parsed is not None
    reward = solve(well_formed, attempt.accuracy, self.format_mode,
                   format_penalty=self.format_penalty, wrong_penalty=self.wrong_penalty)
    return reward, {'accuracy': attempt.accuracy if well_formed else 0.0,
                    'format': float(well_formed)}


def get(**options) -> Rewards:
  """`Rewards` from the fields of a config section; an unknown field raises ValueError."""
  known = [field.name for field in dataclasses.fields(Rewards)]
  unknown = sorted(set(options) - set(known))
  if unknown:
    raise ValueError(f'reward has no {unknown}; it has {known}.')
  return Rewards(**options)


def learnability(rate: float, how: str = 'one_minus') -> float:
  """How much a solver of success rate `rate` can learn from a task.

  'one_minus' gives 1 - rate, and 0 where the solver never succeeds; 'inverse' gives 1 - rate there
  too. Both give 0 at rate 1.

  Source: Absolute Zero Eq. 4; azr_spec 7.2.
  """
  _one_of('learnability', how, LEARNABILITY)
  if not 0 <= rate <= 1:
    raise ValueError(f'rate={rate} must be in [0, 1].')
  return 0.0 if rate == 0 and how == 'one_minus' else 1.0 - rate


def solve(well_formed: bool, accuracy: float, mode: str = 'conditional', *,
          format_penalty: float = -1.0, wrong_penalty: float = -0.5) -> float:
  """Reward of an answer.

  'conditional': `format_penalty` for bad form, else the accuracy, or `wrong_penalty` where it is 0.
  'addition': half for the form, half for the accuracy. 'multiply': accuracy, 0 for bad form. The
  last two are our reading of options that the reference names and never runs.

  Source: azr_spec 7.1.
  """
  _one_of('format mode', mode, FORMAT_MODES)
  if mode == 'addition':
    return 0.5 * well_formed + 0.5 * accuracy
  if mode == 'multiply':
    return well_formed * accuracy
  if not well_formed:
    return format_penalty
  return accuracy if accuracy > 0 else wrong_penalty


def induction_score(right: Sequence[bool], how: str = 'binary') -> float:
  """Score of hidden pairs: 'binary' all right, 'accuracy' the share, 'if_one_correct' any; 0 if none.

  A pair on which the program gave nothing is False here (the reference drops it from the mean).
  """
  _one_of('induction score', how, INDUCTION)
  if not right:
    return 0.0
  if how == 'accuracy':
    return sum(right) / len(right)
  return float(any(right) if how == 'if_one_correct' else all(right))


def keeps(rate: float, how: str = 'all') -> bool:
  """Whether a valid task of that solve rate enters the buffer (`valid_program_filter`)."""
  _one_of('filter', how, FILTERS)
  return not ((how != 'all' and rate == 1) or (how == 'non_extremes' and rate == 0))


def term(value: float, coefficient: float, maximum: float = 0.5) -> float:
  """An intrinsic value, scaled and capped from above."""
  return min(coefficient * value, maximum)


def combine(value: float, terms: Sequence[float], how: str = 'sum') -> float:
  """Learnability L with intrinsic terms; without terms always L.

  'sum': L + sum; 'multiply': L * product; 'sum_multiply': L + product; 'multiply_sum': L * sum.
  """
  _one_of('combine', how, COMBINE)
  if not terms:
    return value
  joined = sum(terms)
  if how in ('multiply', 'sum_multiply'):
    joined = 1.0
    for one in terms:
      joined *= one
  return value + joined if how in ('sum', 'sum_multiply') else value * joined


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
  by character, so a pair costs time quadratic in its size; programs are short.
  """
  trees = [_tree_json(p) for p in (program, *references)]
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
    return None if task.kind == 'induction' else function(task.program)
  return value


def _answer_diversity(task, references, counts, hierarchical):
  which = {'abduction': 'inputs', 'error': 'errors'}.get(task.kind, 'outputs')
  return _flat(which, ('abduction', 'deduction', 'error'))(task, references, counts, hierarchical)


def _edit_distance(task, references, counts, hierarchical):
  del counts, hierarchical
  if task.kind == 'induction':
    return None
  return mean_edit_distance(task.program, [r.program for r in references])


# name -> function of (task, references, counts, hierarchical); None where it does not apply.
INTRINSIC = {
    'complexity': _of_program(lambda source: complexity(source)),
    'halstead': _of_program(lambda source: halstead(source)),
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


def _one_of(what: str, value: str, allowed: Sequence[str]) -> None:
  if value not in allowed:
    raise ValueError(f'{what}={value!r} must be one of {tuple(allowed)}.')
