# SPDX-License-Identifier: Apache-2.0
"""The task buffer: validated tasks per kind, and every way of drawing from them.

A store keeps tasks in the order they came, each once (`Task.key`). Randomness comes only from the
generator that is handed in, and results do not depend on hash seeds or on the executor's timing, so
a run that resumes from `state` draws what the uninterrupted run would have drawn.
"""

import collections
from collections.abc import Iterable, Sequence
import copy
import dataclasses
from typing import Any

import numpy as np

from absolute_zero_jax import intrinsic
from absolute_zero_jax.types import Task

VERSION = 1
EVICTION = ('ring', 'reservoir')
REFERENCE_STRATEGIES = ('uniform', 'step')
SOLVER_STRATEGIES = ('max_new', 'half_new', 'uniform_total', 'step')
FIELDS = ('inputs', 'outputs', 'errors')


class TaskBuffer:
  """Tasks by kind.

  Args:
    kinds: names of the kinds that will be stored; others may come later.
    capacity: tasks a kind may hold.
    eviction: 'ring' drops the oldest task for a new one; 'reservoir' keeps a uniform sample of all
      that were ever added, so a new task may itself be dropped.
    seed: of the reservoir's own choices.
  """

  def __init__(self, kinds: Sequence[str] = (), *, capacity: int = 16384, eviction: str = 'ring',
               seed: int = 0):
    if capacity < 1:
      raise ValueError(f'buffer capacity={capacity} must be at least 1.')
    _one_of('buffer eviction', eviction, EVICTION)
    self.capacity = capacity
    self.eviction = eviction
    self._seed = seed
    self._stores: dict[str, list[Task]] = {kind: [] for kind in kinds}
    self._keys: dict[str, dict[str, Task]] = {kind: {} for kind in kinds}
    self._added: dict[str, int] = {}
    self._counted: set[tuple[str, str]] = set()
    self._counts = {field: collections.defaultdict(collections.Counter) for field in FIELDS}

  def add(self, task: Task) -> bool:
    """Stores a task; False when its kind already holds its key or the reservoir passes it by.

    Raises:
      ValueError: the task has no key or no case.
    """
    if not task.key or not task.cases:
      raise ValueError(f'a task needs a key and a case: {task}.')
    keys = self._keys.setdefault(task.kind, {})
    if task.key in keys:
      return False
    store = self._stores.setdefault(task.kind, [])
    number = self._added.get(task.kind, 0)
    self._added[task.kind] = number + 1
    if len(store) >= self.capacity:
      victim = 0
      if self.eviction == 'reservoir':
        # One generator per task, so that state needs no generator and a resumed run agrees.
        stream = [self._seed, number, *task.kind.encode()]
        victim = int(np.random.default_rng(stream).integers(number + 1))
        if victim >= self.capacity:
          return False
      self._drop(task.kind, victim)
    store.append(task)
    keys[task.key] = task
    return True

  def extend(self, more: Iterable[Task]) -> int:
    """Adds all and counts their types; how many were stored."""
    stored = 0
    for task in more:
      stored += self.add(task)
      self.count_types(task)
    return stored

  def __len__(self) -> int:
    return sum(map(len, self._stores.values()))

  def __contains__(self, key: str) -> bool:
    """Whether a task of that key is stored. Keys of different kinds differ."""
    return any(key in keys for keys in self._keys.values())

  def sizes(self) -> dict[str, int]:
    """How many tasks of each kind are stored."""
    return {kind: len(store) for kind, store in self._stores.items()}

  def tasks(self, kind: str) -> tuple[Task, ...]:
    """The tasks of a kind, oldest first."""
    return tuple(self._stores.get(kind, ()))

  def references(self, kinds: Sequence[str] | str, rng: np.random.Generator, count: int,
                 strategy: str = 'uniform') -> list[Task]:
    """Up to `count` tasks of the kinds together, without replacement, in random order.

    Args:
      kinds: names; one may be given as text.
      strategy: 'uniform', or 'step': probability proportional to born_step + 1.
    """
    _one_of('reference strategy', strategy, REFERENCE_STRATEGIES)
    kinds = (kinds,) if isinstance(kinds, str) else kinds
    pool = [task for kind in kinds for task in self._stores.get(kind, ())]
    steps = np.array([task.born_step + 1.0 for task in pool])
    return _draw(pool, rng, count, steps if strategy == 'step' else None)

  def draw(self, kind: str, rng: np.random.Generator, count: int, *, step: int,
           strategy: str = 'max_new', recent_steps: int = 1) -> list[Task]:
    """`count` tasks for the solver.

    A task is new at `step` when it was born in steps `step - recent_steps` to `step`; seeds never
    are. Whether tasks of `step` itself are there already (fresh) or not (lagged) is up to the
    caller's order of calls.

    'max_new': as many new ones as there are, the rest from the others. 'half_new': at most half
    new ones, the rest from all others. 'uniform_total': any. 'step': with replacement, weight
    born_step, uniform while all are seeds. No task comes twice while others are left (the
    reference can fill up with tasks it has already taken); a store smaller than `count` is
    repeated, so a batch is never short. An empty store gives [].

    Raises:
      ValueError: unknown strategy.
    """
    _one_of('solver strategy', strategy, SOLVER_STRATEGIES)
    pool = self._stores.get(kind, [])
    if not pool or count <= 0:
      return []
    if strategy == 'step':
      weights = np.array([float(task.born_step) for task in pool])
      weights = weights / weights.sum() if weights.sum() else None
      return [pool[i] for i in rng.choice(len(pool), count, p=weights)]
    taken: list[Task] = []
    if strategy != 'uniform_total':
      new = [task for task in pool if task.born_step >= max(1, step - recent_steps)]
      taken = _draw(new, rng, count if strategy == 'max_new' else count // 2)
    keys = {task.key for task in taken}
    while len(taken) < count:
      rest = [task for task in pool if task.key not in keys]
      taken += _draw(rest, rng, count - len(taken))
      keys = set()   # the whole store is taken: from here on, repeat it
    return [taken[i] for i in rng.permutation(len(taken))]

  def snapshot(self) -> 'TaskBuffer':
    """A buffer that stays as this one is now; it shares the tasks."""
    made = copy.copy(self)
    made._stores = {kind: list(store) for kind, store in self._stores.items()}
    made._keys = {kind: dict(keys) for kind, keys in self._keys.items()}
    made._added, made._counted = dict(self._added), set(self._counted)
    made._counts = copy.deepcopy(self._counts)
    return made

  def count_types(self, task: Task) -> None:
    """Enters the values of the stored task of this key into `counts`; once; nothing if none is.

    Separate from `add`, so that rewards can compare a task with what was there before it.
    """
    stored = self._keys.get(task.kind, {}).get(task.key)
    name = (task.kind, task.key)
    if stored is not None and name not in self._counted:
      self._counted.add(name)
      self._count(stored, 1)

  def counts(self) -> dict[str, dict[str, dict[str, int]]]:
    """How often each value is stored: {'inputs' | 'outputs' | 'errors': {type: {text: count}}}.

    This is what `intrinsic.answer_diversity` reads. Removed tasks are taken out again.
    """
    return {field: {name: dict(texts) for name, texts in by_type.items()}
            for field, by_type in self._counts.items()}

  def state(self) -> dict[str, Any]:
    """Everything, as data that JSON can hold. Equal buffers give equal states."""
    uncounted = [[kind, task.key] for kind, store in self._stores.items() for task in store
                 if (kind, task.key) not in self._counted]
    return {
        'version': VERSION, 'capacity': self.capacity, 'eviction': self.eviction,
        'seed': self._seed, 'added': dict(self._added), 'uncounted': uncounted,
        'stores': {kind: [dataclasses.asdict(task) for task in store]
                   for kind, store in self._stores.items()}}

  @classmethod
  def from_state(cls, state: dict[str, Any]) -> 'TaskBuffer':
    """The buffer `state` came from; order, counters and later choices included.

    Raises:
      ValueError: another version, or not a state.
    """
    if state.get('version') != VERSION:
      raise ValueError(f'buffer state has version {state.get("version")!r}; this program reads '
                       f'{VERSION}.')
    made = cls(list(state['stores']), capacity=state['capacity'], eviction=state['eviction'],
               seed=state['seed'])
    uncounted = {tuple(name) for name in state['uncounted']}
    for kind, rows in state['stores'].items():
      made._stores[kind] = [Task.from_row(row) for row in rows]
      made._keys[kind] = {task.key: task for task in made._stores[kind]}
      for task in made._stores[kind]:
        if (kind, task.key) not in uncounted:
          made.count_types(task)
    made._added = dict(state['added'])
    return made

  def _drop(self, kind: str, index: int) -> None:
    task = self._stores[kind].pop(index)
    del self._keys[kind][task.key]
    if (kind, task.key) in self._counted:
      self._counted.discard((kind, task.key))
      self._count(task, -1)

  def _count(self, task: Task, sign: int) -> None:
    for given, output in task.cases:
      result = 'errors' if task.kind == 'error' else 'outputs'
      for field, value in (('inputs', given), (result, output)):
        name = intrinsic.type_name(value)
        texts = self._counts[field][name]
        texts[value] += sign
        if not texts[value]:
          del texts[value]
        if not texts:
          del self._counts[field][name]


def _draw(pool: Sequence[Task], rng: np.random.Generator, count: int,
          weights: np.ndarray | None = None) -> list[Task]:
  count = min(count, len(pool))
  if count <= 0:
    return []
  p = None if weights is None else weights / weights.sum()
  return [pool[i] for i in rng.choice(len(pool), count, replace=False, p=p)]


def _one_of(what: str, value: str, allowed: Sequence[str]) -> None:
  if value not in allowed:
    raise ValueError(f'{what}={value!r} must be one of {tuple(allowed)}.')
