# SPDX-License-Identifier: Apache-2.0
"""Reading model text: fences, tags, literals; hostile text; the two format rules."""

import time

from hypothesis import given, settings
from hypothesis import strategies as st
import pytest

from absolute_zero_jax.tasks import text


def _pairs(source):
  return [(b.label, b.body) for b in text.fences(source)]


@pytest.mark.parametrize(('source', 'blocks'), [
    ('```python\nx\n```', [('python', 'x')]),
    ('```\nx\n```', [('', 'x')]),
    ('a\n```input\n1\n```\nb\n```output\n2\n```', [('input', '1'), ('output', '2')]),
    ('``` Py extra words\nx\n```', [('py', 'x')]),
    ('```python\nopen', []),
    ('````message\nuse\n```python\nx\n```\n````', [('message', 'use\n```python\nx\n```')]),
    ('```message\nuse\n```input\n1\n```\nend\n```', [('message', 'use\n```input\n1\n```\nend')]),
    ('```input 1, 2```', [('input', '1, 2')]),
    ('```input\n1, 2```', [('input', '1, 2')]),
    ("```python\ns = '''\nx```\n'''\n```", [('python', "s = '''\nx```\n'''")]),
    ('text ```not``` a block', []),
    ('```a\r\nx\r\n```\r\n', [('a', 'x')]),
])
def test_fences(source, blocks):
  assert _pairs(source) == blocks


def test_a_message_cannot_smuggle_inputs():
  # Without nesting, the quoted block would count as the proposer's own input.
  source = '```message\nlike\n```input\n1\n```\n```\n```input\n2\n```'
  assert [body for label, body in _pairs(source) if label == 'input'] == ['2']


@given(st.text('`ab \n', max_size=60))
def test_fenced_text_is_read_back(body):
  body = body.replace('\r', '')
  assert _pairs(text.fenced('message', body)) == [('message', body)]


# case: (text, our rule, the reference's rule)
TRUTH = {
    'plain': ('<think>a</think><answer>b</answer>', True, True),
    'blank between': ('<think>a</think> \n<answer>b</answer>', True, True),
    'text after': ('<think>a</think><answer>b</answer> c', False, True),
    'two answers': ('<think>a</think><answer>b</answer><answer>c</answer>', False, True),
    'two think closes': ('<think>a</think>b</think><answer>c</answer>', False, True),
    'answer opened twice': ('<think>a</think><answer>b<answer>c</answer>', False, True),
    'answer tag in think': ('<think>a <answer> b</think><answer>c</answer>', True, True),
    'text between': ('<think>a</think> b <answer>c</answer>', False, False),
    'open answer': ('<think>a</think><answer>b', False, False),
    'no think': ('<answer>b</answer>', False, False),
    'leading blank': (' <think>a</think><answer>b</answer>', True, False),
    'empty': ('', False, False),
    'tag in a program': ('<think>a</think><answer>```python\ns = "</answer>"\n```</answer>',
                         True, True),
}


@pytest.mark.parametrize('case', TRUTH)
def test_format_truth_table(case):
  source, ours, reference = TRUTH[case]
  assert (text.think_answer(source) is not None) == ours
  assert text.is_well_formed_azr(source) == reference


@pytest.mark.parametrize('line', ['```' + ' ' * 80_000 + '`', '```' + 'a' * 80_000 + '`'])
def test_a_long_line_is_read_in_linear_time(line):
  began = time.monotonic()
  assert text.fences(line) == [] and time.monotonic() - began < 2


def test_a_tag_inside_a_program_does_not_cut_the_answer():
  answer = text.think_answer(TRUTH['tag in a program'][0])
  assert _pairs(answer) == [('python', 's = "</answer>"')]


def test_tagged_takes_the_last_opening_tag():
  assert text.tagged('<answer>a</answer> <answer>b</answer>', 'answer') == 'b'
  assert text.tagged('<answer>a', 'answer') is None


@pytest.mark.parametrize(('source', 'content'), [
    (r'so \boxed{1} or \boxed{f{x}y}', 'f{x}y'), (r'\boxed{1', None), ('none', None)])
def test_boxed(source, content):
  assert text.boxed(source) == content


@pytest.mark.parametrize(('source', 'arguments'), [
    ("'abc', 2", "'abc', 2"),
    ('[1,\n 2]  # two', '[1, 2]'),
    ('f(1, 2)', '1, 2'),
    ('print(f([1]))', '[1]'),
    ('assert f(1) == 2', '1'),
    ('n=3, k=[1]', 'n=3, k=[1]'),
    ('-1, {2: None}', '-1, {2: None}'),
    ("'x' * 9, 2 ** 10", "'x' * 9, 2 ** 10"),
    ('dict(a=1)', 'dict(a=1)'),
    ('1) or (True', None),
    ('x', None), ('*[1]', None), ('**{}', None), ('', None), ('open("f")', None),
    ('(lambda: 1)()', None), ('1; 2', None), ('f(f(1))', None), ('__import__("os")', None),
    ('1,\n2)\nf(3', None), ('a\0b', None), ('[x for x in [1]]', None),
])
def test_arguments_are_data(source, arguments):
  assert text.arguments(source) == arguments


@pytest.mark.parametrize(('source', 'value'), [
    ('[1,\n2]', '[1, 2]'), ('1+2j', '1 + 2j'), ('set()', 'set()'), ('1+1', None), ('x', None),
    ('f(1)', None), ("'a' 'b'", "'ab'"), ('0x' + 'f' * 5000, None)])
def test_literals(source, value):
  assert text.literal(source) == value


HOSTILE = {
    'nul': 'def f(a):\n  return "\0"', 'deep list': '[' * 5000 + ']' * 5000,
    'deep unary': '-' * 50000 + '1', 'long sum': '+'.join(['1'] * 20000),
    'huge': 'a' * 2_000_000, 'spaces': '``` a' + ' ' * 500_000 + 'x',
    'ticks': '`' * 500_000, 'fence lines': '```a\n' * 100_000,
    'closers': '</think>' * 100_000 + ' ' * 100_000, 'answers': '<answer>' * 200_000,
    'surrogate': '"\ud800"', 'digits': '9' * 100_000, 'braces': '\\boxed{' * 100_000,
    'blank lines': ' ' * 300_000 + '\n' * 300_000 + 'input',
    'elif': 'if a:\n  b\n' + 'elif a:\n  b\n' * 3000,
}


@pytest.mark.parametrize('name', HOSTILE)
def test_hostile_text_neither_raises_nor_stalls(name):
  source = HOSTILE[name]
  start = time.perf_counter()
  text.fences(source), text.outside_fences(source)
  text.tagged(source, 'answer'), text.boxed(source)
  text.think_answer('<think>' + source), text.is_well_formed_azr('<think>' + source)
  assert text.arguments(source) is None or name == 'surrogate'
  text.literal(source), text.parse(source), text.labelled_line(source, 'input')
  assert time.perf_counter() - start < 10  # a quadratic scan takes minutes


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=200))
def test_arguments_never_raise_and_are_stable(source):
  found = text.arguments(source)
  assert found is None or text.arguments(found) == found
