# SPDX-License-Identifier: Apache-2.0
"""Task kinds: what a kind has to provide, and where to find one by name.

A kind turns text into data and back; it never runs a program, never calls a model and never
imports JAX. It hands out prompts and jobs, and later reads verdicts:

  propose_prompt -> (model) -> parse_proposal -> validation_jobs -> (executor) -> to_task
  solve_prompt   -> (model) -> parse_answer   -> checking_jobs   -> (executor) -> accuracy
"""

from collections.abc import Callable, Sequence
import importlib
import inspect
from typing import Any, Protocol

import absolute_zero_jax
from absolute_zero_jax.tasks.abduction import Abduction
from absolute_zero_jax.tasks.deduction import Deduction
from absolute_zero_jax.tasks.error import Error
from absolute_zero_jax.tasks.induction import Induction
from absolute_zero_jax.tasks.program import Proposal, Rules
from absolute_zero_jax.types import Job, Task, Verdict

__all__ = ['KINDS', 'Kind', 'Proposal', 'Rules', 'get']


def __getattr__(name: str) -> Any:
  return absolute_zero_jax.module_of(__name__, name)


class Kind(Protocol):
  """What the loop asks of a task kind. Any object will do, a module too.

  `buffer` is a `buffer.TaskBuffer`, `rng` a `numpy.random.Generator`, `prompts` a
  `tasks.prompts.PromptSet`. A string where an object was possible is the reason of a refusal; it
  becomes the episode's status and is counted in the logs.
  """
  name: str
  min_references: int

  def seeds(self) -> list[Task]:
    """Tasks the buffer starts with; at least one, or the first references are empty."""

  def references(self, buffer: Any, rng: Any, count: int,
                 strategy: str = 'uniform') -> list[Task]:
    """What the proposer is shown."""

  def propose_prompt(self, references: Sequence[Task], prompts: Any, variant: int = 0) -> str:
    """The whole prompt, its opening of the response included; `variant` may rotate examples."""

  def parse_proposal(self, answer: str, references: Sequence[Task]) -> Proposal | str:
    """Reads the answer text (see `PromptSet.extract`)."""

  def validation_jobs(self, proposal: Proposal) -> list[Job]:
    """What must run before the proposal is a task; [] when data alone decides."""

  def to_task(self, proposal: Proposal, verdicts: Sequence[Verdict], step: int) -> Task | str:
    """Verdicts are in the order of the jobs. The task must carry `key`."""

  def solve_prompt(self, task: Task, prompts: Any) -> str:
    """The whole prompt, its opening of the response included; equal tasks get equal prompts."""

  def parse_answer(self, answer: str) -> str | None:
    """None is a failure of form."""

  def checking_jobs(self, task: Task, answer: str) -> list[Job]:
    """What must run to score the answer; [] when data alone decides."""

  def accuracy(self, task: Task, answer: str, verdicts: Sequence[Verdict]) -> float:
    """In [0, 1]."""


# Factories by name. Add to it, or name a kind of your own 'module:name' in the config.
KINDS: dict[str, Callable[..., Kind]] = {
    'deduction': Deduction,
    'abduction': Abduction,
    'induction': Induction,
    'error': Error,
}


def get(name: str, beside: Sequence[str] = (), /, **options: Any) -> Kind:
  """The kind of that name, or the object `module:name`, made with `options`.

  A class or function is called with those of the options that it names as parameters, since one
  config serves kinds that have little in common; a ready object is taken as it is.

  Args:
    beside: names of kinds that the options are meant for too.

  Raises:
    ValueError: unknown name, an option that no kind has, or an object that lacks part of `Kind`.
  """
  made = _load(name)
  if callable(made):
    own = _parameters(made)
    known = own.union(*map(_parameters, (*map(_load, beside), *KINDS.values()))) - {'name'}
    if set(options) - known:
      raise ValueError(f'no kind has an option {sorted(set(options) - known)}; known are '
                       f'{sorted(known)}.')
    try:
      made = made(**{key: value for key, value in options.items() if key in own})
    except TypeError as error:
      raise ValueError(f'kind {name!r} cannot be made: {error}.') from error
  wanted = [n for n in (*vars(Kind), *Kind.__annotations__) if not n.startswith('_')]
  missing = [n for n in dict.fromkeys(wanted) if not hasattr(made, n)]
  if missing:
    raise ValueError(f'kind {name!r} lacks {missing}; see tasks.Kind.')
  return made


def _load(name: str) -> Any:
  if ':' in name:
    module, _, attribute = name.partition(':')
    try:
      return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
      raise ValueError(f'kind {name!r} cannot be loaded: {error}.') from error
  if name not in KINDS:
    raise ValueError(f'kind {name!r} must be one of {sorted(KINDS)} or module:name.')
  return KINDS[name]


def _parameters(made: Any) -> set[str]:
  return set(inspect.signature(made).parameters) if callable(made) else set()
