# SPDX-License-Identifier: Apache-2.0
"""The static gate: what it lets through, what it refuses and why, and the normal form."""

import ast
import json

import hypothesis
from hypothesis import strategies as st
import pytest

from absolute_zero_jax.executor import policy

_F = 'def f(x):\n  return x\n'


@pytest.mark.parametrize(
  'source',
  [
    _F,
    'import math\n' + _F,
    'from collections import Counter, deque\n' + _F,
    'from typing import *\n' + _F,
    'import collections.abc as c\n' + _F,
    'import copy\ndef copy(a): return a\ndef f(x): return list(map(copy, x))',
    'import string\ndef f(x):\n  match x:\n    case [_, *string]: return string',
    'import copy\ndef f(x):\n  try: return 1 / x\n  except Exception as copy: return str(copy)',
    'import json, collections\ndef f(x: collections.abc.Sized):\n  return json.decoder.JSONDecoder',
    'def g(x): return x\n' + _F,
    'class P:\n  def __init__(self): self.a = 1\n' + _F,
    'def f(input):\n  return input',
    'N = 3\n' + _F,
    _F + 'print(f(1))',
    'def f(x):\n  return type(x).__name__',
    'def f(x):\n  import re\n  return re.sub("a", "b", x)',
    'def f(x):\n  # open eval os\n  return "import os"',
    'from __future__ import annotations\n' + _F,
    'if __name__ == "__main__":\n  pass\n' + _F,
    'def f(x):\n  yield x',
    'def f(x):\n  return super',
    'import dataclasses\n@dataclasses.dataclass\nclass P:\n  x: int\n' + _F,
    'def f(credits, grades):\n  help = quit = license = 1\n  return sum(credits)',
    'def f(s):\n  open, close = "(", ")"\n  return [s.count(c) for c in (open, close)]',
    'def f(vars):\n  def g(): return vars\n  return lambda compile: g()',
    'def f(x):\n  """As __dict__ has it."""\n  return x',
    'class P:\n  def __setattr__(self, k, v): super().__setattr__(k, v)\n' + _F,
    'class P:\n  def __rfloordiv__(self, o): return o.__rdivmod__(self).__cause__\n' + _F,
    'def f(x):\n  return f"{x.split(\'\u200b\')[0]}"',
  ],
)
def test_ordinary_programs_pass(source):
  assert policy.gate(source, digest=True).source.strip() == source.strip()


@pytest.mark.parametrize(
  'source, reason',
  [
    ('import os\n' + _F, 'import os'),
    ('import os.path\n' + _F, 'import os.path'),
    ('import os as math\n' + _F, 'import os'),
    ('from os import path\n' + _F, 'import os'),
    ('def f(x):\n  import sys\n  return 1', 'import sys'),
    ('import random, math\n' + _F, 'import random'),
    ('import datetime\n' + _F, 'import datetime'),
    ('import importlib\n' + _F, 'import importlib'),
    ('from . import x\n' + _F, 'relative import'),
    ('import numpy as np\n' + _F, 'import numpy'),
    ('import collections\ndef f(x):\n  return collections._sys', 'import collections._sys'),
    ('import statistics as s\ndef f(x):\n  return s.random.random()', 'import s.random'),
    ('from statistics import random\n' + _F, 'import statistics.random'),
    ('from collections import _sys\n' + _F, 'import collections._sys'),
    ('import re\ndef f(x):\n  return re.enum.sys.maxsize', 'import re.enum'),
    ('from json import decoder\ndef f(x):\n  return decoder.scanner.re.A', 'decoder.scanner.re'),
    ('from re import enum as e\n' + _F, 'import re.enum'),
    ('import typing\ng = typing.stdlib_re\n' + _F, 'import typing.stdlib_re'),
    ('import json\ng = json.decoder\n' + _F, 'module json.decoder as a value'),
    ('import json\ng = json.decoder\ndef f(x):\n  try: return 1 / x\n  except ValueError: return g',
     'module json.decoder as a value'),
    ('import re as _\ng = _\ndef f(x):\n  match x:\n    case _: return g', 'module _ as a value'),
    ('import html.parser\ndef f(x):\n  return html.parser.re.enum.sys', 'html.parser.re.enum.sys'),
    ('import math as m\ndef f(x): return m.pi\ndef g():\n  import json as m', 'two modules as m'),
    ('def f(x):\n  return __import__("os")', 'name __import__'),
    ('def f(x):\n  return eval("1")', 'name eval'),
    ('def f(x):\n  return open("x")', 'name open'),
    ('g = exec\n' + _F, 'name exec'),
    ('def f(x):\n  return __builtins__', 'name __builtins__'),
    ('def f(x):\n  return ().__class__.__base__', 'attribute __base__'),
    ('def f(x):\n  return f.__globals__', 'attribute __globals__'),
    ('def f(x):\n  return getattr(x, "__subclasses__")', 'text __subclasses__'),
    ('def f(x):\n  return x.gi_frame', 'attribute gi_frame'),
    ('def f(x):\n  return "{0.__globals__}".format(f)', 'text __globals__'),
    ('from enum import bltns\n' + _F, 'import enum.bltns'),
    ('import enum\ndef f(x):\n  return enum.bltns', 'import enum.bltns'),
    ('def f(x):\n  match f:\n    case object(__globals__=g): return g', 'attribute __globals__'),
    ('def f(x):\n  return eval\neval = 1', 'name eval'),
    ('def f(x):\n  class A:\n    y = eval\n    eval = 1', 'name eval'),
    ('def f(x, eval=1):\n  class A:\n    y = eval', 'name eval'),
    ('def f(x, eval=eval):\n  return eval', 'name eval'),
    ('def f(x):\n  global eval\n  eval = 1\n  return eval', 'name eval'),
    ('def f(x):\n  return [eval for y in x] + [eval for eval in x]', 'name eval'),
    ('def f(x):\n  return 0x' + 'f' * 4000, 'integer too long'),
    ('async def f(x):\n  return 1', 'f is async'),
    ('class f:\n  pass', 'f is a class'),
    ('f = eval', 'no f'),
    ('def g(x): return x', 'no f'),
    ('def g():\n  def f(x): return x', 'no f'),
    ('def f(x)\n  return 1', 'syntax'),
    ('def f(x):\n  return 1\0', 'NUL'),
    ('def f(x):\n  return ' + '(' * 500 + ')' * 500, 'nested'),
    (_F + '#' * 40_000, 'too long'),
    ('def f(x):\n  return "\ud800"', 'syntax'),
    (_F + 'def f(x', 'syntax'),
    ('', 'no f'),
  ],
  ids=lambda text: text[:30],
)
def test_the_reason_of_a_refusal_is_named(source, reason):
  with pytest.raises(policy.PolicyError, match=reason.replace('.', r'\.')):
    policy.gate(source, digest=True)


def test_without_enforcement_only_what_cannot_run_is_refused():
  policy.gate('import os\ndef f(x):\n  return eval("1")', enforce=False)
  with pytest.raises(policy.PolicyError, match='no f'):
    policy.gate('import os', enforce=False)


def test_a_user_may_offer_more_modules():
  policy.gate('import datetime\n' + _F, modules=policy.MODULES | {'datetime'})


def test_comments_and_layout_stay_in_the_text_and_leave_the_digest():
  noisy = '\r\n\ndef f(x):  # adds\r\n\r\n    "doc"\r\n    return (x\r\n            + 1)\r\n\n'
  plain = 'def f(x):\n  return x+1'
  a, b = policy.gate(noisy, digest=True), policy.gate(plain, digest=True)
  assert '# adds' in a.source and '\r' not in a.source
  assert a.digest == b.digest != policy.gate('def f(x):\n  return x+2', digest=True).digest


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(
  st.text(max_size=200)
  | st.lists(
    st.sampled_from(
      [
        'def f(x):',
        '\n',
        '  ',
        'return ',
        'x',
        '(',
        ')',
        '[',
        'lambda: ',
        'not ',
        '-',
        '**',
        'f"{',
        '}"',
        'import ',
        'os',
        'class ',
        ':',
        'match x:',
        'case ',
        '*',
        ',',
        '=',
        ' if ',
        ' else ',
        'async ',
        'await ',
        '@',
        'yield ',
        '\\',
        '\t',
        "'''",
        '0x',
        '1e',
        'try:',
      ]
    ),
    max_size=40,
  ).map(''.join)
)
def test_any_text_passes_or_is_refused_and_tidying_changes_no_token(text):
  try:
    gated = policy.gate('def f(x):\n  return 1\n' + text, digest=True)
  except policy.PolicyError:
    return
  assert policy.tidy(gated.source) == gated.source
  assert ast.dump(ast.parse(gated.source)) == ast.dump(ast.parse('def f(x):\n  return 1\n' + text))


@pytest.mark.parametrize(
  'text',
  [
    'x+' * 15_000 + 'x',
    'x if x else ' * 2000 + 'x',
    'lambda: ' * 4000 + 'x',
    'not ' * 8000 + 'x',
    '-' * 30_000 + 'x',
    'x.a' + '.a' * 15_000,
    'x' + '[0]' * 10_000,
    'x' + '()' * 15_000,
    'x**' * 10_000 + 'x',
    'x<' * 15_000 + 'x',
    "f'{" * 3000,
    '{' * 99 + '}' * 99,
    '"' + '\\N{BULLET}' * 3000 + '"',
    '0x' + 'f' * 32_000,
    '9' * 32_000,
    'await ' * 5000 + 'x',
  ],
  ids=lambda text: text[:12],
)
def test_expensive_syntax_is_answered_and_does_not_crash_the_parser(text):
  try:
    policy.gate('def f(x):\n  return ' + text, digest=True)
  except policy.PolicyError:
    pass


def test_real_programs_pass_but_for_named_reasons(shared_data):
  programs = {
    json.loads(line)['snippet']
    for path in (shared_data / 'azr_seeds').glob('*.jsonl')
    for line in path.open()
  }
  programs |= {
    json.loads(line)['code'] for line in (shared_data / 'cruxeval' / 'cruxeval_even.jsonl').open()
  }
  refused = {}
  for program in programs:
    try:
      policy.gate(program, digest=True)
    except policy.PolicyError as e:
      refused.setdefault(str(e), []).append(program)
  counts = {reason: len(found) for reason, found in refused.items()}
  assert counts == {
    'import numpy': 4,
    'import os': 3,
    'import sympy': 2,
    'import secrets': 1,
    'import timeit': 1,
    'import cv2': 1,
    'name open': 1,
  }


@pytest.mark.parametrize('source', [
  'import statistics\ns = statistics\ndef f(x):\n  return s.random.random()',
  'import statistics\ndef f(x, s=statistics):\n  return s.random.random()',
  'import statistics\ndef f(x):\n  return [statistics][0].random.random()',
  'import typing as t\ndef f(x):\n  u = t\n  return u.sys.modules',
  'import statistics\ndef f(x):\n  return getattr(statistics, "ran" + "dom")',
])
def test_a_module_is_no_value(source):
  with pytest.raises(policy.PolicyError, match='as a value'):
    policy.gate(source)


def test_a_variable_may_have_the_name_of_a_module():
  policy.gate('import string\ndef f(string):\n  return string')


@pytest.mark.parametrize('source, keeps', [
    ('def f(x): return x', False),
    ('import math\nfrom collections import Counter\nfrom typing import List\n'
     'def f(x: List[int]): return math.sqrt(Counter(x)[1])', False),
    ('import re\nimport itertools as it\ndef f(x): return re.sub("a", "b", next(it.chain(x)))',
     False),
    ('from __future__ import annotations\nfrom functools import reduce\ndef f(x): return x', False),
    ('import math\ndef f(x):\n  math.n = x', True),
    ('import math\ndef f(x):\n  del math.pi', True),
    ('from collections import Counter\ndef f(x):\n  Counter.n += x', True),
    ('from collections import Counter\ndef f(x): setattr(Counter, "n", x)', True),
    ('from collections import Counter\ndef f(x): type(Counter).__setattr__(Counter, "n", x)', True),
    ('import keyword\ndef f(x): return keyword.kwlist.append(x)', True),
    ('from keyword import kwlist\ndef f(x): return kwlist.append(x)', True),
    ('import collections.abc\ndef f(x): return collections.abc.Sized.register(x)', True),
    ('import collections\ndef f(x): return collections.abc.Sized.register(x)', True),
    ('import functools\ndef f(x): return functools.wraps(x)', True),
    ('from functools import *\ndef f(x): return wraps(x)', True),
    ('import re\ndef f(x): return re.__all__.append(x)', True),
    ('from decimal import getcontext\ndef f(x):\n  return getcontext()', True),
    ('import operator\ndef f(x): return operator.methodcaller(x)', True),
])
def test_what_may_leave_something_in_a_module_is_known(source, keeps):
  assert policy.may_keep_state(source) == keeps
