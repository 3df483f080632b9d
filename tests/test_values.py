# SPDX-License-Identifier: Apache-2.0
"""Plain values and model-written literals: exact round trips, equality, hostile text refused."""

import json
import math
import time

import hypothesis
from hypothesis import strategies as st
import pytest

from absolute_zero_jax.executor import literals, values

_SCALARS = (
  st.none()
  | st.booleans()
  | st.integers()
  | st.integers(-(10**400), 10**400)
  | st.floats()
  | st.complex_numbers()
  | st.binary(max_size=20)
  | st.just(...)
  | st.text(max_size=20)
  | st.text(st.characters(categories=['Cs', 'Cc', 'Lo']), max_size=8)
  | st.builds(range, st.integers(-99, 99), st.integers(-99, 99), st.integers(1, 9))
)
_HASHABLE = st.recursive(
  _SCALARS,
  lambda inner: st.lists(inner, max_size=4).map(tuple) | st.frozensets(inner, max_size=4),
  max_leaves=8,
)
PLAIN = st.recursive(
  _HASHABLE,
  lambda inner: (
    st.lists(inner, max_size=5)
    | st.lists(inner, max_size=4).map(tuple)
    | st.dictionaries(_HASHABLE, inner, max_size=4)
    | st.sets(_HASHABLE, max_size=4)
  ),
  max_leaves=25,
)
_JSON = st.recursive(
  st.none()
  | st.booleans()
  | st.integers()
  | st.text(max_size=9)
  | st.sampled_from(['s', 'i', 'I', 'd', 'l', 't', 'S', 'F', 'f', 'c', 'y', 'n', 'b', 'r']),
  lambda inner: st.lists(inner, max_size=5),
  max_leaves=40,
)
_PATIENT = hypothesis.settings(
  max_examples=150, deadline=None, suppress_health_check=list(hypothesis.HealthCheck)
)


def _wire(value):
  frame = json.dumps(values.encode(value), ensure_ascii=False).encode('utf-8', 'surrogatepass')
  return values.decode(values.load_frame(frame))


def _types(value):
  inner = (
    value.items()
    if type(value) is dict
    else value
    if type(value) in (list, tuple, set, frozenset)
    else ()
  )
  return (type(value), sorted([repr(_types(v)) for v in inner]))


@_PATIENT
@hypothesis.given(PLAIN)
def test_every_value_crosses_the_wire_unchanged(value):
  there = _wire(value)
  assert values.equal(there, value)
  assert _types(there) == _types(value)


@_PATIENT
@hypothesis.given(PLAIN)
def test_the_text_of_a_value_is_read_back_as_that_value(value):
  text = values.text(value)
  hypothesis.assume(len(text) < literals.MAX_CHARS)
  assert values.equal(literals.parse_value(text), value)
  assert literals.parse_inputs(text).text == text


@_PATIENT
@hypothesis.given(PLAIN, PLAIN)
def test_loose_equality_is_pythons_except_for_nan(a, b):
  hypothesis.assume('nan' not in values.text([a, b]))
  assert values.equal(a, b, 'loose') == (a == b)
  assert values.equal(a, a, 'loose') and values.equal(b, b, 'strict')
  if values.equal(a, b, 'strict'):
    assert a == b


@_PATIENT
@hypothesis.given(_JSON)
def test_the_decoder_answers_any_json_with_a_value_or_its_own_error(tagged):
  try:
    values.text(values.decode(tagged))
  except values.ValuesError:
    pass


@_PATIENT
@hypothesis.given(
  st.binary(max_size=200) | st.text(max_size=200).map(lambda s: s.encode('utf-8', 'replace'))
)
def test_any_bytes_are_a_frame_or_an_error(data):
  try:
    values.load_frame(data)
  except values.ValuesError:
    pass


@pytest.mark.parametrize(
  'frame',
  [
    b'[' * 60_000,
    b'["i",' + b'9' * 50_000 + b']',
    b'["f",1.5]',
    b'["f",NaN]',
    b'[1e999]',
    b'["s","' + b'x' * 70_000 + b'"]',
    b'\xff\xfe',
    b'',
    b'{"a":',
  ],
  ids=range(9),
)
def test_hostile_frames_are_refused(frame):
  with pytest.raises(values.ValuesError):
    values.decode(values.load_frame(frame))


@pytest.mark.parametrize(
  'tagged',
  [
    ['i', True],
    ['i', 1.5],
    ['b', '1'],
    ['s', 3],
    ['I', '0x' + 'f' * 4000],
    ['f', '1' * 40],
    ['f', 'x'],
    ['S', [['l', []]]],
    ['d', [[['l', []], ['n']]]],
    ['d', [[['i', 1], ['n']], [['b', 1], ['n']]]],
    ['S', [['i', 1], ['f', '1.0']]],
    ['q', 1],
    ['n', 1],
    [],
    'n',
    None,
    7,
    ['y', 'xy'],
    ['r', ['n'], ['n'], ['n']],
    ['r', ['i', 0], ['i', 1], ['i', 0]],
    ['d', [[['i', 1]]]],
    ['l', 'ab'],
    [['s'], 'x'],
  ],
)
def test_malformed_values_are_refused(tagged):
  with pytest.raises(values.ValuesError):
    values.decode(tagged)


def test_nesting_is_refused_before_it_costs_stack():
  value = []
  for _ in range(100_000):
    value = [value]
  with pytest.raises(values.ValuesError, match='too deep'):
    values.encode(value)
  loop = []
  loop.append(loop)
  with pytest.raises(values.ValuesError, match='too deep'):
    values.encode(loop)


@pytest.mark.parametrize(
  'value',
  [
    'x' * 100_000,
    b'x' * 100_000,
    1 << 100_000,
    [0] * 30_000,
    [1 << 10_000] * 100,
    {i: i for i in range(30_000)},
  ],
  ids=['str', 'bytes', 'int', 'list', 'ints', 'dict'],
)
def test_large_values_are_refused(value):
  with pytest.raises(values.ValuesError, match='too big'):
    values.encode(value)


class _Sly(int):
  def __eq__(self, other):
    return True

  __hash__ = int.__hash__


class _Meta(type):
  __name__ = property(lambda cls: 1 / 0)


@pytest.mark.parametrize(
  'value, name',
  [
    (_Sly(1), '_Sly'),
    (type('Counter', (dict,), {})(), 'Counter'),
    ((x for x in ()), 'generator'),
    (_Meta('M', (), {})(), 'M'),
    (len, 'builtin_function_or_method'),
    ({1: [_Sly(2)]}, '_Sly'),
    ({}.items(), 'dict_items'),
    (NotImplemented, 'NotImplementedType'),
  ],
)
def test_only_exact_builtin_types_are_plain(value, name):
  with pytest.raises(values.ValuesError, match=f'type:{name}'):
    values.encode(value)


# a, b, strict, loose
@pytest.mark.parametrize(
  'a, b, strict, loose',
  [
    (1, 1.0, False, True),
    (1, True, False, True),
    (0.0, False, False, True),
    (1, 1 + 0j, False, True),
    ({1: 2}, {True: 2.0}, False, True),
    ([1, [2]], [1, [2.0]], False, True),
    ([1], (1,), False, False),
    ('a', b'a', False, False),
    ({1}, frozenset({1}), False, True),
    ({1, 2}, {2, 1}, True, True),
    ({'a': 1, 'b': 2}, {'b': 2, 'a': 1}, True, True),
    (math.nan, math.nan, True, True),
    ([math.nan], [math.nan], True, True),
    (0.0, -0.0, True, True),
    (0.1 + 0.2, 0.3, False, False),
    (None, False, False, False),
    ('1', 1, False, False),
    ({1, 'a'}, {1.0, 'a'}, False, True),
    (range(3), range(0, 3, 1), True, True),
    (range(0), range(5, 5), True, True),
    (range(3), [0, 1, 2], False, False),
    ([], (), False, False),
    ({}, set(), False, False),
    (10**400, 10**400, True, True),
    (math.inf, math.inf, True, True),
    (math.inf, -math.inf, False, False),
  ],
)
def test_equality_table(a, b, strict, loose):
  assert values.equal(a, b, 'strict') is values.equal(b, a, 'strict') is strict
  assert values.equal(a, b, 'loose') is values.equal(b, a, 'loose') is loose


def test_sets_are_shown_in_one_order_and_dicts_in_their_own():
  assert values.text({'b', 'a', 1}) == "{'a', 'b', 1}"
  assert values.text({'b': 1, 'a': 2}) == "{'b': 1, 'a': 2}"
  assert values.text([math.nan, -math.inf, frozenset(), set(), (1,)]) == (
    "[float('nan'), float('-inf'), frozenset(), set(), (1,)]"
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
