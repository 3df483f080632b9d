# SPDX-License-Identifier: Apache-2.0
"""Seed tasks: read from files into a run, or made by the policy from the zero triplet and written.

    files --load--> tasks that passed validation        buffer --generate--> buffer --write--> files

A folder of seeds holds pairs.jsonl (deduction and abduction share their tasks) and induction.jsonl,
in the reference's schema; see `tasks.seed_files`.
"""

from collections.abc import Callable, Sequence
from concurrent import futures
import dataclasses
import random
from typing import Any

from etils import epath
import numpy as np

from absolute_zero_jax import buffer as buffer_lib
from absolute_zero_jax import grammar, selfplay
from absolute_zero_jax import tasks as tasks_lib
from absolute_zero_jax.tasks import identity, program, seed_files
from absolute_zero_jax.types import Job, Task

# What a generated file can hold; a file's pairs serve every kind of `seed_files.PAIR_KINDS`.
PAIRS = ('abduction', 'deduction')
KINDS = (*PAIRS, 'induction')


def load(path: epath.PathLike, kinds: Sequence[Any], submit: Callable[[Job], futures.Future],
         ) -> tuple[list[Task], int]:
  """Validates the tasks of a jsonl file, or of a folder's, for every kind they fit.

  Returns:
    The tasks that passed, in the order of the files; and how many were tried.

  Raises:
    ValueError: no such file, an empty folder, or a row that is no seed.
  """
  path = epath.Path(path).expanduser()
  # No `glob`, for which a bracket in the folder's own name is a pattern.
  files = (sorted(p for p in path.iterdir() if p.suffix == '.jsonl') if path.is_dir() else [path])
  if not files or not path.exists():
    raise ValueError(f'selfplay.seeds={str(path)!r} is no .jsonl file and no folder of them.')
  by_name = {kind.name: kind for kind in kinds}
  return _validated([(by_name[name], proposal) for file in files
                     for proposal in seed_files.read(file)
                     for name in seed_files.kinds_of(proposal) if name in by_name], submit)


def of_grammar(seed: int, count: int, kinds: Sequence[Any],
               submit: Callable[[Job], futures.Future], *, cases: int = 6,
               ) -> tuple[list[Task], int]:
  """`load` for `count` generated programs per kind, none of them on the test side of `grammar`.

  Kinds of a user's own get none: their tasks need not be programs.
  """
  rng = random.Random(f'seed tasks {seed}')
  todo = []
  for kind in kinds:
    if type(kind) is not tasks_lib.KINDS.get(kind.name):
      continue
    many = kind.name == 'induction'
    for made in (grammar.example(rng, cases=cases) for _ in range(count)):
      todo.append((kind, program.Proposal(made.program, made.inputs[:cases if many else 1],
                                          'none' if many else '')))
  return _validated(todo, submit)


def _validated(todo: Sequence[tuple[Any, program.Proposal]],
               submit: Callable[[Job], futures.Future]) -> tuple[list[Task], int]:
  jobs = [[submit(job) for job in kind.validation_jobs(proposal)] for kind, proposal in todo]
  found = [kind.to_task(proposal, [future.result() for future in pending], 0)
           for (kind, proposal), pending in zip(todo, jobs)]
  return [task for task in found if not isinstance(task, str)], len(todo)


def generate(buffer: buffer_lib.TaskBuffer, tools: selfplay.Tools, rules: selfplay.Rules,
             rng: np.random.Generator, *, count: int, patience: int, timer,
             on_round: Callable[[str, int], None] = lambda name, size: None) -> None:
  """Lets the policy propose until the pairs, then the induction tasks, are `count` each.

  The first references are what the buffer holds: the zero triplet, or loaded seeds. A valid pair
  enters the stores of deduction and abduction alike, duplicates enter none. `patience` rounds
  without a new task end a file early; `on_round` sees its name and size after every round.
  """
  rules = dataclasses.replace(rules, refuse_duplicates=True)
  for name, members in (('pairs', PAIRS), ('induction', ('induction',))):
    kinds = [kind for kind in tools.kinds if kind.name in members]
    idle = 0
    while kinds and (size := len(buffer.tasks(kinds[0].name))) < count and idle < patience:
      attempts = selfplay.propose(0, buffer, tools._replace(kinds=kinds), rules, rng, timer=timer)
      for attempt in attempts:
        if attempt.task is not None:
          buffer.extend(_as(kind.name, attempt.task) for kind in kinds)
      grown = len(buffer.tasks(kinds[0].name))
      idle = 0 if grown > size else idle + 1
      on_round(name, grown)


def write(buffer: buffer_lib.TaskBuffer, folder: epath.PathLike, count: int) -> dict[str, int]:
  """Writes the first `count` tasks of each schema that the buffer holds; tasks by file name."""
  folder = epath.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  written = {}
  for name, members in (('pairs', PAIRS), ('induction', ('induction',))):
    tasks = next(filter(None, map(buffer.tasks, members)), ())[:count]
    if tasks:
      seed_files.write(folder / f'{name}.jsonl', tasks)
      written[f'{name}.jsonl'] = len(tasks)
  return written


def _as(kind: str, task: Task) -> Task:
  """The same problem as a task of another kind of pairs."""
  key = identity.key(kind, task.program, [given for given, _ in task.cases])
  return dataclasses.replace(task, kind=kind, key=key)
