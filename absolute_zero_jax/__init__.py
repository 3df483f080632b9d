# SPDX-License-Identifier: Apache-2.0
"""Absolute Zero self-play in JAX.

`import absolute_zero_jax as azj` gives `azj.train`, `azj.config`, `azj.executor`, ... on first use.
The import itself loads no JAX: the executor's processes import this package too.
"""

import importlib
import pkgutil

__version__ = '0.1.0'

_MODULES = tuple(sorted(m.name for m in pkgutil.iter_modules(__path__)))


def __getattr__(name: str):
  if name in _MODULES:
    return importlib.import_module(f'{__name__}.{name}')
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}; it has '
                       f'{", ".join(_MODULES)}.')


def __dir__():
  return [*_MODULES, '__version__']
