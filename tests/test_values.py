# SPDX-License-Identifier: Apache-2.0
"""Plain values: exact round trips, equality, hostile frames refused."""

import json
import math

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
    (range(3, 4), range(3, 9, 7), True, True),
    (range(3, 5), range(3, 6, 2), False, False),
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


@pytest.mark.parametrize(
  'value', [complex(0.0, -2.0), complex(-0.0, -2.0), complex(-0.0, 2.0), complex(1, -0.0)]
)
def test_the_text_of_a_complex_number_keeps_the_signs_of_its_zeros(value):
  read = literals.parse_value(values.text(value))
  for got, want in ((read.real, value.real), (read.imag, value.imag)):
    assert (got, math.copysign(1, got)) == (want, math.copysign(1, want))


def test_sets_are_shown_in_one_order_and_dicts_in_their_own():
  assert values.text({'b', 'a', 1}) == "{'a', 'b', 1}"
  assert values.text({'b': 1, 'a': 2}) == "{'b': 1, 'a': 2}"
  assert values.text([math.nan, -math.inf, frozenset(), set(), (1,)]) == (
    "[float('nan'), float('-inf'), frozenset(), set(), (1,)]"
  )
