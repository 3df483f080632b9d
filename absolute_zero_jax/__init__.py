# SPDX-License-Identifier: Apache-2.0
"""Absolute Zero self-play in JAX.

`import absolute_zero_jax as azj` gives `azj.train`, `azj.models.loading`, ... on first use.
The import itself loads no JAX: the executor's processes import this package too.
"""

import importlib

__version__ = '0.1.0'


def _modules() -> list[str]:
  # Here, because it loads two megabytes, which the executor's processes must not hold.
  import pkgutil
  return sorted(m.name for m in pkgutil.iter_modules(__path__))


def module_of(package: str, name: str):
  """The module of that name in a package below this one, for the package's `__getattr__`."""
  try:
    return importlib.import_module(f'{package}.{name}')
  except ModuleNotFoundError as e:
    if e.name != f'{package}.{name}':      # another module, which this one needs
      raise
  raise AttributeError(f'module {package!r} has no attribute {name!r}')


def __getattr__(name: str):
  if name in _modules():
    return importlib.import_module(f'{__name__}.{name}')
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}; it has '
                       f'{", ".join(_modules())}.')


def __dir__():
  return [*_modules(), '__version__']
