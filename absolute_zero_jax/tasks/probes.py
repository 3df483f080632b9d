# SPDX-License-Identifier: Apache-2.0
"""Inputs beside the proposed one, to find out whether a program's output depends on its input.

A proposer that collapses writes programs such as `y = 4 // 2; return y`, whatever the input is. So
validation runs a proposal on a few changed inputs too, in other processes, and the task is
marked (`Task.independent`) when all that gave a value gave the proposed input's. Of the programs of
`grammar` three changed inputs mark 1.5 %.
"""

from collections.abc import Sequence
from typing import Any

from absolute_zero_jax.executor import literals
from absolute_zero_jax.types import Run, Status


def inputs(arguments: str, count: int) -> tuple[str, ...]:
  """Up to `count` argument lists of the same types as `arguments`, unlike it and each other.

  None at all where nothing can be changed (say, `None`), parameters are named, the list is no data,
  or a changed integer is too long to print.
  """
  try:
    given = literals.parse_inputs(arguments)
    if given.kwargs:
      return ()
    values, arguments = given.args, given.text
    texts = [', '.join(repr(_changed(v, way)) for v in values) for way in range(count)]
  except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
    return ()
  return tuple(dict.fromkeys(t for t in texts if t != arguments))


def independent(runs: Sequence[Run]) -> bool:
  """Whether all inputs that gave a value gave the first one's; False when fewer than two did."""
  outputs = [run.output for run in runs if run.status is Status.OK]
  return len(outputs) > 1 and len(set(outputs)) == 1


def _changed(value: Any, way: int) -> Any:
  """Another value of that type. Even ways make it larger, odd ones smaller or turned around."""
  if isinstance(value, bool):
    return not value
  if isinstance(value, int | float):
    return value + 1 + way if way % 2 == 0 else 4 + way - value
  if isinstance(value, str):
    moved = ''.join(_next(c) for c in value)
    return moved + (value or 'a') if way % 2 == 0 else moved[::-1][:max(1, len(moved) - 1)]
  if isinstance(value, list | tuple):
    moved = [_changed(v, way) for v in value]
    longer = [*moved, *(value[:1] or [0])]
    return type(value)(longer if way % 2 == 0 else moved[::-1][:len(moved) - 1 or 1])
  if isinstance(value, dict):
    # Odd ways change the keys too; a program that then finds none has an error, which says nothing.
    return {_changed(k, way) if way % 2 else k: _changed(v, way) for k, v in value.items()}
  if isinstance(value, set):
    return {_changed(v, way) for v in value}
  return value


def _next(c: str) -> str:
  """The next letter or digit, round the alphabet; other characters stay."""
  for first, size in (('a', 26), ('A', 26), ('0', 10)):
    if 0 <= ord(c) - ord(first) < size:
      return chr(ord(first) + (ord(c) - ord(first) + 1) % size)
  return c
