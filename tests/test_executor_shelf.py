# SPDX-License-Identifier: Apache-2.0
"""Modules that a zygote holds as code: complete behind the fence, and not loaded before."""

from encodings import aliases
import inspect
import os
import subprocess
import sys
import textwrap

import absolute_zero_jax
from absolute_zero_jax.executor import Executor, policy
from absolute_zero_jax.types import Job

_ROOT = os.path.dirname(os.path.dirname(absolute_zero_jax.__file__))


def test_every_allowed_module_can_be_imported_behind_the_fence():
  names = sorted(policy.MODULES - {'__future__'})
  listed = ', '.join(names)
  program = f'import {listed}\ndef f(x):\n  return {names}'
  with Executor(workers=2) as executor:
    [verdict] = executor.run([Job('validate', program, ('0',))])
  assert verdict.runs[0].output == repr(names), verdict


def test_modules_from_the_shelf_work():
  program = textwrap.dedent('''\
      import dataclasses, decimal, difflib, html, statistics
      @dataclasses.dataclass
      class Point:
        x: int
      def f(x):
        return [repr(Point(x)), str(decimal.Decimal(x) / 8), html.unescape("&eacute;"),
                statistics.median([x, 1, 7]), difflib.get_close_matches("ape", ["apple", "x"])]
      ''')
  with Executor(workers=2) as executor:
    [verdict] = executor.run([Job('validate', program, ('3',))])
  assert verdict.runs[0].output == "['Point(x=3)', '0.375', 'é', 3, ['apple']]", verdict


def f(names):
  out = []
  for name in names:
    try:
      out.append('abc é'.encode(name, 'replace'))
    except (LookupError, UnicodeError) as e:
      out.append(type(e).__name__)
  return out


def test_codecs_give_behind_the_fence_what_they_give_outside():
  names = sorted({*aliases.aliases.values(), 'idna', 'punycode', 'utf_8_sig'})
  with Executor(workers=2) as executor:
    [verdict] = executor.run([Job('run', inspect.getsource(f), (repr(names),), (repr(f(names)),))])
  assert verdict.runs[0].matches, verdict


def test_the_shelf_needs_no_file_and_loads_nothing_but_what_is_written_in_c():
  code = textwrap.dedent('''\
      import sys
      from absolute_zero_jax.executor import shelf
      shelf.stock(['html', 'encodings.cp500', 'decimal', 'no_such_module'])
      assert '_decimal' in sys.modules
      assert not {'html', 'html.entities', 'encodings.cp500', 'decimal'} & set(sys.modules)
      def refuse(event, args):
        if event in ('open', 'os.listdir', 'os.scandir'):
          raise PermissionError(event)
      sys.addaudithook(refuse)
      import html, html.entities, decimal
      assert type(html.__loader__) is shelf.Shelf and html.__path__ == []
      assert html.unescape('&lt;') == '<' and html.entities.html5['lt;'] == '<'
      assert 'a'.encode('cp500') == b'\\x81' and decimal.Decimal(1) / 4 == decimal.Decimal('0.25')
      ''')
  subprocess.run([sys.executable, '-c', code], check=True)


def test_a_zygote_leaves_large_modules_on_the_shelf():
  code = textwrap.dedent(f'''\
      import sys
      sys.path.insert(0, {_ROOT!r})
      from absolute_zero_jax.executor import zygote
      zygote._preload(['dataclasses', 'html'])
      assert not {{'inspect', 'html', 'pkgutil', 'encodings.cp500'}} & set(sys.modules)
      assert {{'typing', 'collections', 're'}} <= set(sys.modules)
      ''')
  subprocess.run([sys.executable, '-S', '-c', code], check=True)
