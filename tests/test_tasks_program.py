# SPDX-License-Identifier: Apache-2.0
"""Programs as proposed: naming f, clean-ups, refusals, hashing."""

from hypothesis import given, settings
from hypothesis import strategies as st
import pytest

from absolute_zero_jax.tasks import identity, program, text

A_THEN_B = 'def a(x):\n  return b(x)\ndef b(x):\n  return x\n'
F_LAST = 'def g(x):\n  return x\ndef f(x):\n  return g(x)'
F_FIRST = 'def f(x):\n  return g(x)\ndef g(x):\n  return x'


def _prepare(source, **rules):
  return program.prepare(source, program.Rules(**rules))


@pytest.mark.parametrize(('source', 'mode', 'result'), [
    (A_THEN_B, 'any_last', 'def a(x):\n  return f(x)\ndef f(x):\n  return x'),
    (A_THEN_B, 'any_first', 'def f(x):\n  return b(x)\ndef b(x):\n  return x'),
    (A_THEN_B, 'not_first', 'def f(x):\n  return b(x)\ndef b(x):\n  return x'),
    (A_THEN_B, 'not_last', 'def a(x):\n  return f(x)\ndef f(x):\n  return x'),
    (A_THEN_B, 'never', 'no_function'),
    (F_LAST, 'any_first', F_LAST), (F_LAST, 'not_last', F_LAST),
    (F_LAST, 'not_first', 'name_clash'), (F_FIRST, 'not_last', 'name_clash'),
    (F_FIRST, 'any_last', F_FIRST),
    ('def go(n):\n  return go(n - 1) if n else "go"  # go', 'any_last',
     'def f(n):\n  return f(n - 1) if n else "go"  # go'),
    ('def main(x):\n  é = "é"; return main(x), é', 'any_last',
     'def f(x):\n  é = "é"; return f(x), é'),
    ('def g(x):\n  g = 1\n  return g + x', 'any_last', 'name_clash'),
    ('async def f(x):\n  return x', 'any_last', 'no_function'),
    ('class A:\n  def f(self):\n    return 1', 'any_last', 'no_function'),
    ('x = 1', 'any_last', 'no_function'),
])
def test_the_main_function_becomes_f(source, mode, result):
  found = _prepare(source, rename=mode)
  assert (found if isinstance(found, str) else found.source) == result


@pytest.mark.parametrize(('source', 'rules', 'reason'), [
    ('def f(x:', {}, 'syntax'), ('def f():\n  return 1', {}, 'no_parameters'),
    ('def f(x):\n  return 1', {}, 'constant'), ('x' * 9000, {}, 'program_too_long'),
    ('def f(x):\n  return x\0', {}, 'syntax'),
    (F_LAST, {'functions': 'one_top_level'}, 'several_functions'),
    ('def f(x):\n  def g(y):\n    return y\n  return g(x)', {'functions': 'one'},
     'several_functions'),
    ('import random\ndef f(x):\n  return x', {'banned_words': program.AZR_BANNED_WORDS},
     'banned_word'),
    ('from a.time import b\ndef f(x):\n  return x', {'banned_words': ('time',)}, 'banned_word'),
    ('def f(x):\n  assert x\n  return x', {'reject_inner_tests': True}, 'inner_test'),
    ('def g(x):\n  return x\nr = g(3)\ny = 2', {'reject_inner_tests': True}, 'inner_test'),
    ('def f(x):\n  return x\nif f(3) != 4:\n  raise E', {'reject_inner_tests': True}, 'inner_test'),
])
def test_refusals(source, rules, reason):
  assert _prepare(source, **rules) == reason


@pytest.mark.parametrize('source', [
    'def f(x):\n  def g(y):\n    return y\n  return g(x)',
    'class A:\n  def m(self):\n    return 1\ndef f(x):\n  return A().m() + x',
])
def test_nested_functions_and_methods_are_one_top_level_function(source):
  assert _prepare(source, functions='one_top_level').source == source


def test_comments_stay_unless_cleaned():
  source = '# plan\nimport re\ndef f(x):\n  "doc"\n  print(x)  # why\n  return x\ny = 2'
  assert _prepare(source).source == source
  cleaned = _prepare(source, clean=('comments', 'globals', 'prints')).source
  assert cleaned == 'import re\n\ndef f(x):\n    pass\n    return x'


@pytest.mark.parametrize('call', ["f('a')", "print(f('a'))", "assert f('a') == 'a'"])
def test_a_trailing_call_is_the_input(call):
  found = _prepare(f'def f(x):\n  return x\n\n{call}')
  assert found == program.Program('def f(x):\n  return x', "'a'")


@pytest.mark.parametrize('option', [
    {'rename': 'best'}, {'functions': 'two'}, {'clean': ('all',)}, {'fence': 'middle'}])
def test_unknown_rules_are_refused(option):
  with pytest.raises(ValueError, match='allowed|must be one of'):
    program.Rules(**option)


SAME = 'def f(a, b):\n  c = a + b\n  return c * 2'


@pytest.mark.parametrize('other', [
    'def f(x, y):\n  "doc"\n  # sum\n  z = (x + y)\n  return z*2', SAME + '\n\n'])
def test_renamed_or_reformatted_copies_have_one_key(other):
  assert identity.key('k', SAME) == identity.key('k', other)


def test_annotations_of_functions_make_no_new_program():
  assert identity.key('k', SAME) == identity.key(
      'k', SAME.replace('a, b', 'a: int, b: "any" = 1').replace(' = 1', '').replace(
          '):', ') -> list[int]:'))
  field = 'from dataclasses import dataclass\n@dataclass\nclass A:\n  x: int\n'
  assert identity.key('k', field + SAME) != identity.key('k', field.replace('int', 'str') + SAME)


@pytest.mark.parametrize('other', [
    'def f(a, b):\n  c = b + a\n  return c * 2',       # crossed names
    'def f(a, b):\n  c = a + b\n  return c * 3',
    'def f(a, b):\n  c = a + b\n  return d * 2',       # d is not bound here
    'def g(a, b):\n  c = a + b\n  return c * 2',
])
def test_different_programs_have_different_keys(other):
  assert identity.key('k', SAME) != identity.key('k', other)


@pytest.mark.parametrize('dead', [
    'def f(x):\n  return x\n  return -x', 'def f(x):\n  return x\n  y = 1\n  while y: pass',
    'def f(x):\n  if x:\n    return x\n    print(x)\n  else:\n    return 0\n  return 1'])
def test_what_is_never_reached_makes_no_new_program(dead):
  plain = {'def f(x):\n  return x', 'def f(x):\n  if x:\n    return x\n  else:\n    return 0'}
  assert identity.has_unreachable(dead) and not any(map(identity.has_unreachable, plain))
  assert identity.key('k', dead) in {identity.key('k', source) for source in plain}
  assert identity.shape(dead) in map(identity.shape, plain)


def test_what_does_nothing_makes_no_new_program():
  plain = 'def f(x):\n  if x:\n    x = 1\n  return x'
  assert identity.key('k', plain) == identity.key(
      'k', 'def f(x):\n  "a"\n  if x:\n    pass\n    x = 1\n  else:\n    pass\n  "b"\n  return x')
  assert identity.key('k', 'def f(x): pass') == identity.key('k', 'def f(x):\n  pass\n  3')


@pytest.mark.parametrize('source', [
    'def f(x):\n  if x:\n    return x\n  return 1', 'def f(x):\n  while x:\n    break\n  return x',
    'def f(x):\n  try:\n    raise ValueError\n  except ValueError:\n    x = 2\n  return x'])
def test_what_may_be_reached_counts(source):
  assert not identity.has_unreachable(source)
  assert identity.key('k', source) != identity.key('k', source.rpartition('\n')[0])


@pytest.mark.parametrize('source, this, other', [
    ('from enum import Enum\nclass C(Enum):\n  RED = 1\n  BLUE = 2\ndef f(x):\n  return C[x].value',
     'RED', 'CAT'),
    ('class C:\n  def a(self): return 1\ndef f(x):\n  return getattr(C(), x)()', 'def a', 'def b'),
    ('from typing import *\nclass P(NamedTuple):\n  a: int\ndef f(x):\n  return P(x)._asdict()',
     'a: int', 'q: int'),
    ('class Dog: pass\ndef f(x):\n  return type(Dog()).__name__ * x', 'Dog', 'Cat'),
    ('def f(x):\n  "hi"\n  return f.__doc__ * x', 'hi', 'ho'),
    ('def g(x):\n  return\n  yield x\ndef f(x):\n  return [*(g(x) or "ab")]', '  yield x\n', '')])
def test_what_a_program_may_show_is_part_of_its_key(source, this, other):
  assert identity.key('k', source) != identity.key('k', source.replace(this, other))


@pytest.mark.parametrize('change', [
    ('x', 'y'), ('def f(x)', 'def f(x: int)'), ('    try', '    pass\n    try'),
    ('    try', '    "says"\n    try')])
def test_of_a_program_that_reads_a_name_only_that_counts(change):
  source = ('def f(x):\n    try:\n        return 1 / x\n    except TypeError as e:\n'
            '        return type(e).__name__')
  assert identity.key('k', source) == identity.key('k', source.replace(*change, 1).replace(
      '1 / x', '1 / y' if change == ('x', 'y') else '1 / x'))


def test_a_key_is_the_same_on_every_python():
  """Pinned on Python 3.11, whose `ast.dump` it then was."""
  source = '''
import math as m
from os import path
class A(object, metaclass=type):
  x: int = None
  y: 'str'
@m.cache
def g(a, /, b=None, *c, d, e=1, **k) -> dict:
  global z
  z = {**k, 'a': [i async for i in a if i]} if b else ...
  return lambda: (yield)
async def h():
  async with g(1) as t, g(2): await t
def f(x, n=-1.5):
  match x:
    case None | True: return f'{x!r:>{n}} {n}'
    case {'k': [1, *rest], **others} if others: del rest
    case A(x=0) as q: raise ValueError from None
  try:
    while (y := x[1:, ::2]) not in (b'a', 1j): x @= y
    else: assert y, 'no'
  except (KeyError, OSError) as e: pass
  finally: nonlocal_ = not x < y <= 3
  return [*x], {v for v in x}, x if y else (yield from y)
'''
  assert identity.key('program', source) == 'aec2ff94ddd04ec39646072c23401c35'


def test_key_covers_kind_and_inputs_and_odd_text():
  assert len({identity.key('k', SAME), identity.key('l', SAME), identity.key('k', SAME, ['1']),
              identity.key('k', SAME, ['2']), identity.key('k', 'no python ('),
              identity.key('k', '"\ud800"')}) == 6


@pytest.mark.parametrize('body', [
    'return x & 0x' + 'f' * 4000,          # too many digits to print
    "return f\"{x.split('\u200b')[0]}\"",          # no way to quote it, before 3.12
    'return f"""{f\'\'\'\n{x[1]}\'\'\'=}"""',          # printed as no Python, likewise
])
def test_what_python_reads_and_does_not_print_is_data(body):
  source = 'def f(x):\n  ' + body
  assert identity.key('k', source) and _prepare(source).source == source
  found = _prepare(source, clean=('comments',))
  assert found == 'syntax' or text.parse(found.source)


def test_a_renamed_method_is_another_program():
  one = 'class A:\n  def go(self): return 1\ndef f(x): return A().go() + x'
  assert identity.key('k', one) != identity.key('k', one.replace('def go', 'def no'))


def test_imports_of_the_task_are_put_on_top_once():
  lines = program.imports('import re\nfrom a import b as c\ndef f(x): return x')
  assert lines == ['import re', 'from a import b as c']
  assert program.with_imports('import re\nx', lines) == 'from a import b as c\nimport re\nx'


def test_imports_from_the_future_stay_first():
  own = '"""Doc."""\nfrom __future__ import division\nx = 1'
  lines = program.imports('from __future__ import annotations\nimport re')
  for source in (own, 'x = 1', 'import a\nx = 1'):
    compile(program.with_imports(source, lines[::-1]), 'x', 'exec')
  assert program.with_imports(own, ['import re']).split('\n')[2:] == ['import re', 'x = 1']


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=120))
def test_any_text_gives_a_program_or_a_reason(source):
  found = _prepare(source)
  assert isinstance(found, str | program.Program)
  identity.key('k', source)


def test_a_shape_leaves_out_constants_and_names_and_nothing_else():
  shape = identity.shape
  source = "def f(a):\n  c = a + 1\n  return [c, 'x']"
  assert shape(source) == shape("def f(b):\n  # other\n  z = b + 20\n  return [z, '']")
  for other in (source.replace('+', '-'), source.replace("'x'", '7'), source.replace("'x'", 'c'),
                source.replace("[c, 'x']", "(c, 'x')")):
    assert shape(other) != shape(source)
  assert shape('no python (') == 'no python ('


def test_the_shape_of_an_f_string_keeps_its_parts():
  plain, before, other = ("def f(x):\n  return f'{x}'", "def f(x):\n  return f'a{x}'",
                          "def f(x):\n  return f'b{x}'")
  assert identity.shape(before) == identity.shape(other) != identity.shape(plain)


@pytest.mark.parametrize('option', [{'banned_words': 'os'}, {'clean': 'prints'}])
def test_one_word_is_not_taken_for_its_letters(option):
  with pytest.raises(ValueError, match=r"rules\..* must be a tuple of texts, such as \('"):
    program.Rules(**option)


@pytest.mark.parametrize('plain, others', [
  ('def f(x):\n  y = x + 1\n  return y', [
    'def f(x):\n  y: int = x + 1\n  return y', 'def f(x):\n  z: "a"\n  y = x + 1\n  return y',
    'def f(x):\n  global q\n  y = x + 1\n  return y',
    'def f(x: int) -> int:\n  w = x + 1\n  return w',
    'global u\ndef f(x):\n  y = x + 1\n  return y']),
  ('n = 0\ndef f(x):\n  global n\n  n += x\n  return n', [
    'm = 0\ndef f(x):\n  global m\n  m += x\n  return m',
    'm = 0\ndef f(x):\n  global m, m, k\n  m += x\n  return m']),
  ('import math, re\ndef f(x):\n  return math.floor(x)', [
    'import math\nimport re\ndef f(x):\n  return math.floor(x)']),
  ('import math as m\ndef f(x):\n  return m.floor(x)', [
    'import math as q\ndef f(y):\n  return q.floor(y)']),
  ('class A:\n  import math as m\n  y = m.pi\ndef f(x):\n  return A.y', [
    'class A:\n  global q\n  import math as n\n  y = n.pi\ndef f(x):\n  return A.y']),
  ('def f(x):\n  match x:\n    case {"a": 1, **r}: return r', [
    'def f(x):\n  match x:\n    case {"a": 1, **s}: return s']),
  ('def f(x):\n  return x.count(1)', ['def f(count):\n  return count.count(1)']),
  ('def f(x):\n  return sorted(x, reverse=True)', [
    'def f(reverse):\n  return sorted(reverse, reverse=True)']),
  ('def f(x):\n  return x + "a"', ['def f(x):\n  return x + u"a"']),
])
def test_idle_words_make_no_new_task(plain, others):
  assert {identity.key('k', source) for source in (plain, *others)} == {identity.key('k', plain)}


def test_names_that_are_reached_by_their_text_count():
  for source, old, new in (
      ('class A:\n  n = 1\n  m = 2\ndef f(x):\n  return A.n', ' n ', ' k '),
      ('def g(*, a=1, b=2):\n  return a - b\ndef f(x):\n  return g(a=x)', '*, a=1, b=2',
       '*, b=2, a=1'),
      ('n = 0\ndef f(x):\n  global n\n  n = x\n  return g()\ndef g(): return n',
       '  global n\n', '')):
    assert old in source
    assert identity.key('k', source) != identity.key('k', source.replace(old, new, 1))


def test_an_answer_gets_the_imports_it_lacks_and_no_others():
  theirs = ('from __future__ import annotations\nimport math, re\nfrom math import pow, sqrt\n'
            'def f(x):\n  return 1')
  missing = program.missing_imports
  assert missing('def f(x):\n  return pow(x, 2)', theirs) == ['from __future__ import annotations']
  assert missing('def f(x):\n  return math.pi + sqrt(x)', theirs)[1:] == [
      'import math', 'from math import sqrt']
  assert missing('import math\ndef f(re):\n  return math.pi', theirs)[1:] == []
  star = 'from math import *\ndef f(x):\n  return 1'
  assert missing('def f(x):\n  return pow(x, 2)', star) == []
  assert missing('def f(x):\n  return ceil(x)', star) == ['from math import *']


def test_only_what_needs_it_is_dedented():
  source = 'def f(x):\n  return """a\n  \nb"""'
  assert program.dedented(source) == source
  assert program.dedented('  def f(x):\n    return x\n') == 'def f(x):\n  return x\n'


def test_a_call_of_the_old_name_is_the_input_also_of_a_long_program():
  source = f'# {"long " * 8000}\ndef solve(x):\n  return x + 1\nprint(solve(3))'
  made = program.prepare(source, program.Rules(max_chars=50_000))
  assert made.call == '3' and made.source.endswith('def f(x):\n  return x + 1')
