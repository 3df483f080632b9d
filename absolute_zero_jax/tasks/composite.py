# SPDX-License-Identifier: Apache-2.0
"""Composite proposals: a new f that must build on functions of earlier tasks (off by default).

Earlier programs are renamed `g_0`, `g_1`, ... and travel as references of kind 'composite'; the
prompt shows them, the answer must call each, and the stored program holds them before f.
"""

import ast
from collections.abc import Sequence
import dataclasses
import math
import re

from absolute_zero_jax.tasks import program, text
from absolute_zero_jax.types import Task

KIND = 'composite'
_FUTURE = re.compile(r'^from __future__ import [\w, ]+$', re.M)


@dataclasses.dataclass(frozen=True)
class Schedule:
  """How often and how many. All zeros: never.

  Attributes:
    start_step: no composites before it.
    every_steps: from then on the maximum and the chance grow every so many steps; 0 = they stay.
    count_min, count_max: functions asked for, both included, before any growth.
    count_limit: where the maximum stops growing.
    chance: probability that a prompt asks for any.
    chance_growth, chance_limit: added every `every_steps`, up to the limit.

  Source: the reference's scheduler, which starts at 101, grows every 50 steps by one
  function up to 3 and by 0.01 up to 0.8. Its upper bound is exclusive by mistake; ours is not.
  """
  start_step: int = 101
  every_steps: int = 0
  count_min: int = 1
  count_max: int = 1
  count_limit: int = 3
  chance: float = 0.0
  chance_growth: float = 0.01
  chance_limit: float = 0.8

  def __post_init__(self):
    for name, value in vars(self).items():
      most = 1 if name.startswith('chance') else math.inf
      if not 0 <= value <= most:
        raise ValueError(f'composites.{name}={value!r} must be 0 '
                         + (f'to {most}.' if most == 1 else 'or more.'))

  def at(self, step: int) -> tuple[int, float]:
    """(largest count, chance) at a step; a function of the step alone, so resuming is safe."""
    if step < self.start_step:
      return 0, 0.0
    grown = (step - self.start_step) // self.every_steps if self.every_steps else 0
    count = max(self.count_max, min(self.count_max + grown, self.count_limit))
    chance = max(self.chance, min(self.chance + grown * self.chance_growth, self.chance_limit))
    return count, chance


def draw(buffer, kind: str, rng, schedule: Schedule) -> list[Task]:
  """Functions the next f must call, as tasks of kind 'composite'; often none.

  Programs that are composites themselves, or whose other names collide, are passed over; one import
  may be in several. The step is that of the newest stored task.
  """
  pool = buffer.tasks(kind)
  count, chance = schedule.at(max((task.born_step for task in pool), default=0))
  if not count or rng.random() >= chance:
    return []
  wanted = int(rng.integers(schedule.count_min, max(count, schedule.count_min) + 1))
  parts: list[Task] = []
  taken = {'f': ''}
  for index in rng.permutation(len(pool)):
    if len(parts) == wanted:
      break
    task, name = pool[index], f'g_{len(parts)}'
    source = None if task.extra.get('composite_functions') else program.renamed(task.program, name)
    names = _names(source) if source else {}
    if source and all(names[n] and names[n] == taken[n] for n in names.keys() & taken):
      taken |= names
      parts.append(Task(KIND, source, task.cases, key=task.key))
  return parts


def split(references: Sequence[Task]) -> tuple[list[Task], list[Task]]:
  """(plain references, composite parts)."""
  return ([r for r in references if r.kind != KIND], [r for r in references if r.kind == KIND])


def refusal(source: str, parts: Sequence[Task]) -> str:
  """Why f does not build on the parts, or ''.

  f must call every g_k, with an argument that depends on a name bound in f (parameter, local, loop
  or comprehension variable); the program must not bind any name of the parts, but may import the
  same; and f must be more than `return g_k(parameters)`, also by way of a local name.
  """
  tree = text.parse(source)
  main = program.main_function(tree) if tree else None
  if main is None:
    return 'no_function'
  bound, imported = set(program.bound_names(tree)), program.imported_names(source)
  at_top = program.block_names(tree.body).union(
      *(node.names for node in ast.walk(tree) if isinstance(node, ast.Global)))
  for name, target in (pair for part in parts for pair in _names(part.program).items()):
    if name in (at_top if target else bound) or imported.get(name, target) != target:
      return 'composite_redefined'
  own = set(program.bound_names(main))
  calls = {}
  for node in ast.walk(main):
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
      values = [*node.args, *(k.value for k in node.keywords)]
      read = {n.id for v in values for n in ast.walk(v) if isinstance(n, ast.Name)}
      calls[node.func.id] = calls.get(node.func.id, False) or bool(read & own)
  for number in range(len(parts)):
    if not calls.get(f'g_{number}'):
      return 'composite_unused'
  return 'composite_wrapper' if _is_wrapper(main) else ''


def _is_wrapper(main: ast.FunctionDef) -> bool:
  body = [s for s in main.body if not isinstance(s, ast.Pass) and not (
      isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
  value = body.pop().value if body and isinstance(body[-1], ast.Return) else None
  if isinstance(value, ast.Name) and len(body) == 1 and isinstance(
      body[0], ast.Assign | ast.AnnAssign) and value.id in program.bound_names(body[0]):
    value = body.pop().value
  if body or not isinstance(value, ast.Call):
    return False
  given = [*value.args, *(k.value for k in value.keywords)]
  return (isinstance(value.func, ast.Name) and value.func.id.startswith('g_')
          and all(isinstance(a, ast.Name) for a in given))


def _names(source: str) -> dict[str, str]:
  """The names that a text binds at its top level, or imports, and what the latter stand for."""
  return program.imported_names(source) | dict.fromkeys(program.top_level_names(source), '')


def join(source: str, parts: Sequence[Task]) -> str:
  """The stored program: the parts, each with its imports, then f; from `__future__` before all."""
  whole = '\n\n'.join([*(part.program for part in parts), source])
  first = sorted(set(_FUTURE.findall(whole)))
  return '\n'.join([*first, _FUTURE.sub('', whole)]) if first else whole
