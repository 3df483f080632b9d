# SPDX-License-Identifier: Apache-2.0
"""Text written by a model, read as literals: folding, refusals, calls of f; hostile text."""

import math
import time

import hypothesis
from hypothesis import strategies as st
import pytest

from absolute_zero_jax.executor import literals, values

_PATIENT = hypothesis.settings(
  max_examples=150, deadline=None, suppress_health_check=list(hypothesis.HealthCheck)
)


@pytest.mark.parametrize(
  'text, shown',
  [
    ("dict(a=1), 'u'", "{'a': 1}, 'u'"),
    ("'$78'.upper(), '$'", "'$78', '$'"),
    ('list(range(3))', '[0, 1, 2]'),
    ("''.join(['A'] * 3)", "'AAA'"),
    ('2**31 - 1', '2147483647'),
    ('[-1 * (10 ** 9)]', '[-1000000000]'),
    ("'a,b'.split(',')", "['a', 'b']"),
    ('[x for x in range(2, 9) if x % 2 == 0]', '[2, 4, 6, 8]'),
    ("''.join([chr(ord('a')+i) for i in range(3)])", "'abc'"),
    ('x=1, y=[2]', 'x=1, y=[2]'),
    ('1,\n  2  # two\n', '1, 2'),
    ('1,', '1'),
    ('', ''),
    ("float('inf'), nan", "float('inf'), float('nan')"),
    ('3125^2, 5', '3127, 5'),
    ('{3, 1, 2}', '{1, 2, 3}'),
    ("{'a': {'b'}}", "{'a': {'b'}}"),
    ('range(3)', 'range(0, 3)'),
    ("'é\\n'", "'é\\n'"),
    ('1 << 4, ~3, not 1', '16, -4, False'),
  ],
)
def test_constant_inputs_are_folded(text, shown):
  assert literals.parse_inputs(text).text == shown


@pytest.mark.parametrize(
  'text',
  [
    '1) or (True',
    '1)\nprint(2',
    '1), f(2',
    '*[1]',
    "**{'x': 1}",
    'lambda: 1',
    'x',
    'x := 1',
    '1\x00',
    '[' * 200,
    '-' * 5000 + '1',
    'not ' * 2000 + '1',
    '9**9**9',
    "'a' * 10**9",
    '[0] * 10**9',
    '1 << 10**9',
    'range(10**9), list(range(10**9))',
    "'%999999999d' % 1",
    "'x'.center(10**9)",
    "'x'.zfill(10**9)",
    "''.join(['a' * 9999] * 9999)",
    'bytes(10**9)',
    'round(7, -10**9)',
    "'x'.replace('', 'y' * 9000).replace('', 'y' * 9000)",
    'sum([[1]] * 9, [])[0]',
    'open(1)',
    "__import__('os')",
    '().__class__',
    "'a'.__class__",
    '[a for a, b in [(1, 2)]]',
    '[[x for x in range(999)] for y in range(999)]',
    "type('E', (), {})()",
    'f(1)',
    'dict(**{})',
    'yield 1',
    'await x',
    'f"{1}"',
    '"""\n""") or f("""1"""',
    '1 if 1 else 2',
    'a' * 9000,
    "'" + 'a' * 9000 + "'",
    '(1, 2',
    '1 2',
    "str.join('', ['a'])",
    '{**{}}',
    '[*[1]]',
    'int',
    '...()',
    '[].append(1)',
    "{'a': 1}.__len__()",
    "'{}'.format(1)",
    '(lambda: 1)()',
    '1 .real',
    'max([], key=len)',
  ],
  ids=lambda text: text[:20],
)
def test_inputs_that_are_no_constants_are_refused(text):
  with pytest.raises(literals.LiteralError):
    literals.parse_inputs(text)


@pytest.mark.parametrize(
  'text',
  [
    '1+1',
    "len('abc')",
    "'a'*3",
    "'x'.upper()",
    'sorted([2, 1])',
    '[i for i in [1]]',
    '2**3',
    '[0]*3',
    'max(1, 2)',
    'not True',
    '~1',
    "int('1')",
    'str(1)',
    'list(set([2, 1, 2]))',
    'tuple({2: 1})',
    "set('abca')",
    "list('abc')",
  ],
)
def test_answers_must_be_values_already_unless_folding_is_asked_for(text):
  with pytest.raises(literals.LiteralError):
    literals.parse_value(text)
  literals.parse_value(text, fold=True)


@pytest.mark.parametrize(
  'text, value',
  [
    ('-1', -1),
    ('1+2j', 1 + 2j),
    ('inf', math.inf),
    ('-inf', -math.inf),
    ('nan', math.nan),
    ('set()', set()),
    ('frozenset({1})', frozenset({1})),
    ('dict(a=1, b=2)', {'a': 1, 'b': 2}),
    ('Ellipsis', ...),
    (' 1 ', 1),
    ('1, 2', (1, 2)),
    ("float('-inf')", -math.inf),
    ("'a' 'b'", 'ab'),
    ('[1,\n2]', [1, 2]),
    ("b'\\x00'", b'\0'),
    ('range(0, 3)', range(3)),
    ('list(range(3))', [0, 1, 2]),
    ('set([1, 2])', {1, 2}),
    ('frozenset(set())', frozenset()),
    ('dict([(1, 2)])', {1: 2}),
  ],
)
def test_answers_may_be_spelled_as_python_prints_them(text, value):
  assert values.equal(literals.parse_value(text), value)


@_PATIENT
@hypothesis.given(
  st.text(max_size=60)
  | st.text('()[]{}\'",:+-*/%0123456789.efnjx =\\\n', max_size=80)
  | st.lists(
    st.sampled_from(
      [
        '(',
        ')',
        '[',
        ']',
        '{',
        '}',
        ',',
        '1',
        "'a'",
        ' for x in ',
        'range',
        '**',
        '<<',
        '9999',
        '*',
        '-',
        'dict',
        '.join',
        '.split',
        '.replace',
        'x',
        '=',
        'sum',
        'lambda:',
        'not ',
        'f(',
        'None',
        'str',
        'if ',
        '\n',
      ]
    ),
    max_size=25,
  ).map(''.join)
)
def test_any_text_is_a_value_or_a_literal_error(text):
  for parse in (
    literals.parse_value,
    literals.parse_inputs,
    lambda t: literals.parse_inputs(t, {}),
  ):
    try:
      parse(text)
    except literals.LiteralError:
      pass


@pytest.mark.parametrize(
  'text',
  [
    '[[0] * 9999] * 9999',
    'str([[0] * 9999] * 9999)',
    '{((0,) * 9999,) * 9999}',
    '[[0] * 9999] * 9999 == [[0] * 9999] * 9999',
    '[sum(y) for y in [list(range(9999))] for i in range(9999)]',
    '[list(range(9999)) for i in range(9999)]',
    '[2**9999 for i in range(9999)]',
    "['x' * 9999 for i in range(9999)]",
    'len(str([' + 'y, ' * 1000 + ']))'.replace('y', "'x' * 999"),
    '[9999 in y for y in [list(range(9999))] for i in range(9999)]',
    'sorted([[0] * 99] * 9999) * 99',
  ],
  ids=lambda text: text[:25],
)
def test_folding_is_cheap_whatever_the_text_asks_for(text):
  began = time.process_time()
  with pytest.raises(literals.LiteralError):
    literals.parse_inputs(text)
  assert time.process_time() - began < 0.5


def test_a_call_of_f_in_an_input_asks_for_its_result():
  with pytest.raises(literals.NeedsCall) as needs:
    literals.parse_inputs('f([1, 2]) + f(3)', {})
  assert needs.value.inputs == '[1, 2]'
  assert literals.parse_inputs('f([1, 2]) + f(3)', {'[1, 2]': 5, '3': 7}).text == '12'


@pytest.mark.parametrize('text', [
  'set(range(0, 37778931862957161693184, 2305843009213693951))',
  'frozenset(range(0, 37778931862957161693184, 2305843009213693951))',
  'dict(zip(range(0, 2**73, 2**61 - 1), range(4096)))',
  'set(list(range(0, 37778931862957161693184, 2305843009213693951)))',
  '{i * (2**61 - 1) for i in range(3000)}', '{i * (2**61 - 1): 0 for i in range(3000)}',
  "bytes('" + ''.join(chr(0x4e00 + 7 * i % 2000) for i in range(2000)) + "', 'punycode')",
])
def test_what_is_dear_to_build_is_refused_before_it_is_built(text):
  """Numbers that share a hash, and codecs of quadratic time: one thread serves everybody."""
  started = time.process_time()
  for fold in (False, True):
    with pytest.raises(literals.LiteralError):
      literals.parse_value(text, fold=fold)
  with pytest.raises(literals.LiteralError):
    literals.parse_inputs(text)
  assert time.process_time() - started < 0.3


def test_many_equal_or_ordinary_members_are_built():
  assert literals.parse_value('{i % 7 for i in range(4000)}', fold=True) == set(range(7))
  assert len(literals.parse_value('set(range(4000))')) == 4000


@pytest.mark.parametrize('text', [
  "bytes('abc', 'utf-8')", "float('007_0.50')", "float(' 1e3 ')", 'float(3)', "complex('1+2j')"])
def test_an_answer_leaves_no_reading_to_the_checker(text):
  with pytest.raises(literals.LiteralError, match='conversion'):
    literals.parse_value(text)
