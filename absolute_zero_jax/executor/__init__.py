# SPDX-License-Identifier: Apache-2.0
"""Runs model-written programs in a process tree of its own, and decides what they are worth.

  with Executor() as executor:
    verdict = executor.submit(Job('validate', program, inputs)).result()

  client      the trainer's side: options, `submit`, `run`; `link` talks to the supervisor: futures,
              backpressure, restarts
  supervisor  a program of its own: queue, deadlines, cache; drives `workers`
  verify      the rules: job -> units of work -> verdict; golds, equality, determinism; `reports`
              reads what children write
  zygote      warm process that forks one child per program; `child` runs it behind the `fence`;
              `memory` and `shelf` make forks cheap
  values      plain values, their wire form and their equality; `literals` parses model-written text
  policy      the static gate on programs

Nothing here imports jax or numpy; importing this module imports no other of them (the processes of
the service import only what they need).
"""

import importlib
from typing import Any

import absolute_zero_jax

_LAZY = {'Executor': 'client', 'ExecutorError': 'link', 'Isolation': 'link',
         'IsolationError': 'link', 'QueueFull': 'link', 'SandboxFusion': 'sandboxfusion'}
# An entry is a class, or any callable, that takes the config's options; add your own here or name
# it as 'module:name'. What it returns has `submit`, `stats`, `close` and `isolation`.
EXECUTORS: dict[str, str] = {
    'local': 'absolute_zero_jax.executor.client:Executor',
    'sandboxfusion': 'absolute_zero_jax.executor.sandboxfusion:SandboxFusion'}


def start(name: str = 'local', /, **options: Any) -> Any:
  """The executor of that name, started with `options`.

  `name` is a key of `EXECUTORS` or 'module:name'.

  Raises:
    ValueError: no such executor, or an option out of range.
  """
  target = EXECUTORS.get(name, name)
  module, _, attribute = target.partition(':')
  if not attribute:
    raise ValueError(f"executor.name={name!r} must be one of {sorted(EXECUTORS)} or 'module:name'.")
  try:
    factory = getattr(importlib.import_module(module), attribute)
  except (ImportError, AttributeError) as e:
    raise ValueError(f'executor.name={name!r} cannot be imported: {e}.') from e
  return factory(**options)


def __getattr__(name: str) -> Any:
  if name in _LAZY:
    return getattr(importlib.import_module(f'{__name__}.{_LAZY[name]}'), name)
  return absolute_zero_jax.module_of(__name__, name)
