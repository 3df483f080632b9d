# SPDX-License-Identifier: Apache-2.0
"""Absolute Zero self-play in JAX.

`import absolute_zero_jax as azj` gives `azj.train`, `azj.config`, `azj.executor`, ... on first use.
The import itself loads no JAX: the executor's processes import this package too.
"""

import importlib

__version__ = '0.1.0'


def _modules() -> list[str]:
  # Here, because it loads two megabytes, which the executor's processes must not hold.
  import pkgutil
  return sorted(m.name for m in pkgutil.iter_modules(__path__))


def __getattr__(name: str):
  if name in _modules():
    return importlib.import_module(f'{__name__}.{name}')
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}; it has '
                       f'{", ".join(_modules())}.')


def __dir__():
  return [*_modules(), '__version__']
