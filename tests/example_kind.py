# SPDX-License-Identifier: Apache-2.0
"""A kind outside of code: equation puzzles. Given integers and a target, find an expression.

The proposer writes an expression such as `(3 + 5) * 7 - 2`. Its numbers and its value become the
task; the solver must reach the value with each number once. No program runs: `parse` and `value`
decide, so both lists of jobs are empty. Named in a config as 'example_kind:Equations'.
"""

import ast
import collections
import dataclasses
import operator

from absolute_zero_jax import tasks
from absolute_zero_jax.types import Task

_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


@dataclasses.dataclass(frozen=True)
class Equations:
  """Integers + target -> expression with +, - and *, each integer used once."""
  name: str = 'equations'
  min_references: int = 0
  max_numbers: int = 6

  def seeds(self):
    return [self._task('1 + 2', step=0)]

  def references(self, buffer, rng, count, strategy='uniform'):
    return buffer.references((self.name,), rng, count, strategy)

  def propose_prompt(self, references, prompts, variant=0):
    shown = '\n'.join(task.extra['expression'] for task in references)
    return prompts.wrap(f'Write one new expression of 3 to {self.max_numbers} integers with + - * '
                        f'and brackets, hard to find from its numbers and its value.\n{shown}\n')

  def parse_proposal(self, answer, references):
    expression = answer.strip().split('\n')[0]
    if evaluate(expression) is None:
      return 'no_expression'
    if not 2 <= len(numbers(expression)) <= self.max_numbers:
      return 'wrong_length'
    return tasks.Proposal('', (), extra={'expression': expression})

  def validation_jobs(self, proposal):
    return []

  def to_task(self, proposal, verdicts, step):
    return self._task(proposal.extra['expression'], step)

  def solve_prompt(self, task, prompts):
    return prompts.wrap(f'Numbers: {task.input}\nTarget: {task.output}\nReach the target with '
                        '+ - * and brackets; use each number once. Write the expression only.\n')

  def parse_answer(self, answer):
    return answer.strip().split('\n')[0] or None

  def checking_jobs(self, task, answer):
    return []

  def accuracy(self, task, answer, verdicts):
    value = evaluate(answer)
    right = value is not None and str(value) == task.output
    return float(right and str(numbers(answer))[1:-1] == task.input)

  def _task(self, expression, step):
    given = str(numbers(expression))[1:-1]
    target = str(evaluate(expression))
    return Task(self.name, '', ((given, target),), born_step=step,
                key=f'{self.name} {given} {target}', extra={'expression': expression})


def evaluate(expression: str) -> int | None:
  """Value of an expression of small integers, +, - and *; None for anything else."""
  tree = tasks.text.parse(expression, 200)
  if tree is None or len(tree.body) != 1 or not isinstance(tree.body[0], ast.Expr):
    return None
  return _value(tree.body[0].value)


def numbers(expression: str) -> list[int]:
  """The integers in it, sorted."""
  counted = collections.Counter(node.value for node in ast.walk(ast.parse(expression))
                                if isinstance(node, ast.Constant))
  return sorted(counted.elements())


def _value(node):
  if isinstance(node, ast.Constant) and type(node.value) is int and node.value < 1000:
    return node.value
  if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
    left, right = _value(node.left), _value(node.right)
    return None if left is None or right is None else _OPERATORS[type(node.op)](left, right)
  return None
