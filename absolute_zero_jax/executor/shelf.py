# SPDX-License-Identifier: Apache-2.0
"""Modules that are kept as code until a program imports them.

A fork copies page tables for all that its process holds, whatever the child makes of it, and few
programs import more than a handful of modules. So a zygote loads those, and keeps the others, the
tables of a hundred codecs among them, as compressed code: a fenced child opens no file, but it can
run what is in memory.
"""

from importlib.machinery import ModuleSpec
import marshal
import os
import sys

try:
  import zlib
except ImportError:        # a Python built without it
  zlib = None


class Shelf:
  """An entry of `sys.meta_path`: finds and loads the modules whose code it was given.

  `code` maps a module's name to (whether it is a package, what `_pack` made of its code).
  """

  def __init__(self, code: dict[str, tuple[bool, bytes]]):
    self._code = code

  def find_spec(self, name, path=None, target=None):
    kept = self._code.get(name)
    return None if kept is None else ModuleSpec(name, self, is_package=kept[0])

  def create_module(self, spec):
    return None            # the usual kind

  def exec_module(self, module):
    exec(_unpack(self._code[module.__name__][1]), module.__dict__)


def stock(names: list[str]) -> None:
  """Makes `names`, and all that they import, importable without a file.

  What is written in C is loaded at once, since only the system's loader can. A fork of this process
  finds out which modules these are, so that here nothing is loaded and dropped again; the process
  must have one thread.
  """
  receiving, sending = os.pipe()
  pid = os.fork()
  if pid == 0:
    try:
      with open(sending, 'wb') as f:
        f.write(marshal.dumps(_survey(names)))
    finally:
      os._exit(0)
  os.close(sending)
  with open(receiving, 'rb') as f:
    data = f.read()
  os.waitpid(pid, 0)
  found = marshal.loads(data)
  sys.meta_path.insert(0, Shelf({name: kept for name, kept in found.items() if kept}))
  for name, kept in found.items():
    if kept is None:
      __import__(name)


def _survey(names):
  """What importing `names` adds to `sys.modules`: (is a package, code), None where written in C."""
  before = set(sys.modules)
  for name in names:
    try:
      __import__(name)
    except ImportError:
      pass                 # of another version or system
  found = {}
  for name, module in list(sys.modules.items()):
    spec = getattr(module, '__spec__', None)
    if name in before or spec is None or spec.name != name:      # an alias, made by its owner
      continue
    code = spec.loader.get_code(name) if hasattr(spec.loader, 'get_code') else None
    found[name] = code and (spec.submodule_search_locations is not None, _pack(code))
  return found


def _pack(code) -> bytes:
  data = marshal.dumps(code)
  return zlib.compress(data) if zlib else data


def _unpack(data: bytes):
  return marshal.loads(zlib.decompress(data) if zlib else data)
