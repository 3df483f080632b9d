# SPDX-License-Identifier: Apache-2.0
"""Traces, which thinking is made of: what the interpreter saw, with the working of each value."""

import ast
import random
import re

import pytest

from absolute_zero_jax import grammar, tracing


@pytest.fixture(scope='module')
def examples():
  rng = random.Random(4)
  return [grammar.example(rng, (0, 1, 2, 3)) for _ in range(150)]


def test_the_values_are_those_of_the_program(examples):
  """The last value of each variable, from a copy of the program that returns its locals."""
  for e in examples:
    lines = tracing.trace(e.program, e.inputs[0])
    assert lines == tracing.trace(e.program, e.inputs[0])
    names = [a.arg for a in ast.parse(e.program).body[0].args.args]
    values = grammar.values(e.inputs[0])
    assert lines[:len(names)] == tuple(f'{n} = {v!r}' for n, v in zip(names, values))
    head, _, _ = e.program.rpartition('\n    return ')
    scope = {}
    exec(f'{head}\n    return dict(locals())', scope)
    last = dict(found.groups() for line in lines if (found := re.match(r'(\w) = (.*)', line)))
    assert last == {k: repr(v) for k, v in scope['f'](*values).items()}


def test_the_working_is_true_and_needs_no_variables(examples):
  """Every expression can be computed on its own; what follows it is its value."""
  worked = 0
  for e in examples:
    *lines, end = [*tracing.trace(e.program, e.inputs[0]), f'return = {e.outputs[0]}']
    pending = []
    for line in (*lines, end):
      if found := re.match(r'if (.*): (True|False)$', line):
        assert bool(_compute(found[1])) == (found[2] == 'True'), (e.program, line)
      elif found := re.match(r'(\w+) = (.*)', line):
        # Of a call that changes its variable, the working is the argument's.
        changes = pending and f'{found[1]}.append(' in e.program
        changes = changes or pending and f'{found[1]}[' in e.program
        if pending and not changes:
          assert repr(pending[-1]) == found[2], (e.program, line)
        pending = []
      else:
        pending.append(_compute(line))
        worked += 1
        assert pending[0] == pending[-1], (e.program, line)
  assert worked > 150


@pytest.mark.parametrize('source, given, lines', [
    ('def f(a):\n    c = 0\n    for i in a:\n        c += i\n    return c * 2', '[3, 3]',
     ('a = [3, 3]', 'c = 0', 'i = 3', '0 + 3', 'c = 3', 'i = 3', '3 + 3', 'c = 6', '6 * 2')),
    ('def f(a):\n    while a > 3:\n        a -= 2\n    return a', '6',
     ('a = 6', 'if 6 > 3: True', '6 - 2', 'a = 4', 'if 4 > 3: True', '4 - 2', 'a = 2',
      'if 2 > 3: False')),
    ("def f(a, b):\n    return ''.join(sorted(a)) + b", "'ca', 'b'",
     ("a = 'ca'", "b = 'b'", "''.join(sorted('ca')) + 'b'", "'ac' + 'b'")),
    ('def f(a):\n    return sum(i + 1 for i in a if i > a[0])', '[2, 5, 1]',
     ('a = [2, 5, 1]', 'sum((i + 1 for i in [2, 5, 1] if i > [2, 5, 1][0]))', 'sum([6])')),
    ('def f(a):\n    c = []\n    c.append(a + 1)\n    return a + 3 if a > 4 else a - 1', '7',
     ('a = 7', 'c = []', '7 + 1', 'c = [8]', '7 + 3 if 7 > 4 else 7 - 1', '7 + 3')),
    ('def f(a):\n    a[0] = 1\n    return a', '[1]',
     ('a = [1]', 'a = [1]')),
    ("def f(a):\n    c = {}\n    for i in a:\n        c[i] = c.get(i, 0) + 1\n    return c", "'b'",
     ("a = 'b'", 'c = {}', "i = 'b'", "{}.get('b', 0) + 1", '0 + 1', "c = {'b': 1}")),
])
def test_by_hand(source, given, lines):
  assert tracing.trace(source, given) == lines


def test_a_guess_is_checked_on_true_values(examples):
  """Each value is what the statements before it make, run on their own, outside of a function."""
  values = 0
  for e in examples:
    pairs = list(zip(e.inputs, e.outputs))[:3]
    lines = tracing.check(e.program, pairs)
    body = [line for line in lines if line.startswith('    ')]
    head, *rest = e.program.split('\n')
    assert body == rest
    assert lines[-3:] == [f'if {o} == {o}: True' for _, o in pairs]
    names = [a.arg for a in ast.parse(e.program).body[0].args.args]
    code, waiting = [], []
    for line in lines[:-3]:
      if line.startswith('    '):
        assert not waiting, (e.program, lines)
        code.append(line[4:])
        continue
      waiting = waiting or [given for given, _ in pairs]
      scope = dict(zip(names, grammar.values(waiting.pop(0))))
      name, _, value = line.rpartition(' = ')
      exec('\n'.join(code), scope)
      assert value == repr(scope[name]), (e.program, line)
      values += 1
  assert values > 400


def test_checking_by_hand():
  source = ('def f(a, b):\n    c = []\n    for i in a:\n        c.append(i + b)\n    b += 1\n'
            '    return c[0] * b')
  assert tracing.check(source, [('[1, 2], 3', '16'), ('[5], 0', '4')]) == [
      '    c = []', '    for i in a:', '        c.append(i + b)', 'c = [4, 5]', 'c = [5]',
      '    b += 1', 'b = 4', 'b = 1', '    return c[0] * b', 'if 16 == 16: True',
      'if 5 == 4: False']
  # Up to the first that differs.
  assert tracing.check('def f(a):\n    a.sort()\n    return a', [
      ('[2, 1]', '[2, 1]'), ('[1]', '[1]')]) == [
          '    a.sort()', 'a = [1, 2]', 'a = [1]', '    return a', 'if [1, 2] == [2, 1]: False']


@pytest.mark.parametrize('made, wanted, same', [
    ("{'a': 1, 'b': 2}", "{'b': 2, 'a': 1}", True), ('1', 'True', False), ('[1]', '(1,)', False),
    ('[1, 2]', '[2, 1]', False), ("'a'", "'a'", True), ('range(0, 3)', '[0, 1, 2]', False),
    ('nan', '1', False)])
def test_values_agree_as_python_says_but_for_types(made, wanted, same):
  assert grammar.agree(made, wanted) is same


@pytest.mark.parametrize('source', [
    'x', 'f = 3', 'def f(a):\n    print(a)\n    return a', 'def f(a):\n  pass\n  return a', '',
    'def f(a):\n    return (', 'def f(a):\n    a, b = a, 2\n    return a', 'def f(a):\n\x00'])
def test_what_a_model_writes_may_be_of_another_shape(source):
  with pytest.raises(ValueError, match='shape'):
    tracing.pieces(source)


def _compute(expression):
  value = eval(expression, {})       # of a line that the interpreter wrote, in a test
  return value if isinstance(value, (int, str, list, tuple, dict)) else list(value)
