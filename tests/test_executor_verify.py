# SPDX-License-Identifier: Apache-2.0
"""The trusted rules, driven with reports written by hand: no process is started here."""

import socket
import struct

import hypothesis
from hypothesis import strategies as st
import pytest
from trials import drive as _drive
from trials import trial as _trial
from trials import value as _value

from absolute_zero_jax.executor import reports, values, verify, workers
from absolute_zero_jax.types import Job, Status

_F = 'def f(x):\n  return x\n'


def test_validation_is_two_calls_in_one_process_and_one_in_another():
  verdict, units = _drive(
    _trial(Job('validate', _F, ('1', '2'))), [_value(1, 1), _value(2, 2)], [_value(2), _value(1)]
  )
  assert [(u.group, u.repeat, u.inputs) for u in units] == [
    ('a', 2, ('1', '2')),
    ('b', 1, ('2', '1')),
  ]
  assert verdict.status is Status.OK and verdict.program == _F and len(verdict.key) == 64
  assert [(r.input, r.output, r.matches) for r in verdict.runs] == [
    ('1', '1', True),
    ('2', '2', True),
  ]


@pytest.mark.parametrize('source, given, pinned', [
  ('def f(x):\n  return "".join(set(x))', "'ab'", True),
  ('def f(x):\n  return hash(x)', '1', True),
  ('def f(x):\n  return [*{x[:1], "b"}]', '1', True),
  ('def f(d):\n  return list(d.keys() & d)', '1', True),
  (_F, "{'a', 'b'}", True),
  (_F, "[1, 'a']", False),
])
def test_an_answer_that_the_hash_seed_may_decide_runs_under_one(source, given, pinned):
  groups = set()
  for n in range(12):
    text = f'{source}# {n}'
    one, other = (_trial(Job('run', text, (given,))).take()[0].group for _ in range(2))
    assert one == other
    groups.add(one)
  assert groups == ({'a', 'b'} if pinned else {''})


@pytest.mark.parametrize(
  'first, second',
  [
    ([_value(1, 2)], None),
    ([_value(1, 1)], [_value(2)]),
    ([_value(1, 1)], [_value(True)]),
    ([_value(1, 1)], [_value(1.0)]),
    ([_value([1], (1,))], None),
    ([_value(1, 1)], [[['x', 'KeyError']]]),
    ([[['x', 'KeyError'], ['x', 'IndexError']]], None),
    ([[['v', ['i', 1]], ['x', 'KeyError']]], None),
    ([_value(1, 1)], ([], Status.CRASHED)),
    ([_value({'a': 1}, {'a': True})], None),
  ],
)
def test_results_that_differ_are_nondeterministic(first, second):
  verdict, _ = _drive(_trial(Job('validate', _F, ('1',))), first, *([second] if second else []))
  assert (
    verdict.status is Status.NONDETERMINISTIC
    and not verdict.runs[0].matches
    and verdict.runs[0].output == ''
  )


@pytest.mark.parametrize(
  'result',
  [{3, 1, 2}, float('nan'), [float('nan')], -0.0, {'b': 1, 'a': 2}, None, 'é\ud800', 10**4000, ...],
)
def test_equal_results_are_accepted_and_shown_canonically(result):
  verdict, _ = _drive(
    _trial(Job('validate', _F, ('1',))), [_value(result, result)], [_value(result)]
  )
  assert verdict.status is Status.OK and verdict.runs[0].matches
  assert verdict.runs[0].output == values.text(result)


def test_dict_order_may_differ_between_processes():
  verdict, _ = _drive(
    _trial(Job('validate', _F, ('1',))),
    [_value({'a': 1, 'b': 2}, {'a': 1, 'b': 2})],
    [_value({'b': 2, 'a': 1})],
  )
  assert verdict.status is Status.OK and verdict.runs[0].output == "{'a': 1, 'b': 2}"


@pytest.mark.parametrize(
  'frame',
  [
    None,
    1,
    [],
    {},
    [['v']],
    [['v', 1]],
    [['q', 1]],
    [['v', ['i', 1]], ['v', ['i', 1]], ['v', ['i', 1]]],
    [['x', 1]],
    [['x', 'a' * 1000]],
    [['m', 1]],
    [['u', None]],
    [['r']],
    'v',
    [[['v', ['i', 1]]]],
    [['v', ['S', [['l', []]]]]],
  ],
)
def test_malformed_frames_never_count_as_a_result(frame):
  verdict, _ = _drive(_trial(Job('run', _F, ('1',), ('1',))), [frame])
  assert verdict.status is Status.CRASHED and not verdict.runs[0].matches


def test_frames_beyond_the_inputs_change_nothing():
  verdict, _ = _drive(_trial(Job('run', _F, ('1',), ('2',))), [_value(1), _value(2), _value(2)])
  assert [r.matches for r in verdict.runs] == [False]


def test_an_output_too_long_to_be_answered_is_no_task():
  verdict, _ = _drive(_trial(Job('validate', _F, ('1',))), [_value('x' * 9000, 'x' * 9000)])
  assert verdict.status is Status.ERROR and verdict.error == 'output: too long'


def test_a_gold_must_verify_itself(monkeypatch):
  monkeypatch.setattr(verify.compare, 'value_of', lambda text: 'something else')
  verdict, _ = _drive(_trial(Job('validate', _F, ('1',))), [_value(1, 1)], [_value(1)])
  assert verdict.status is Status.ERROR and verdict.error == 'gold does not verify itself'


def test_only_the_input_that_kills_its_process_is_lost():
  verdict, units = _drive(
    _trial(Job('run', _F, ('1', '2', '3'), ('1', '2', '3'))),
    ([_value(1)], Status.TIMEOUT),
    ([], Status.TIMEOUT),                # it had the whole limit, and no input before it
    [_value(3)],
  )
  assert [u.inputs for u in units] == [('1', '2', '3'), ('2', '3'), ('3',)]
  assert [r.status for r in verdict.runs] == [Status.OK, Status.TIMEOUT, Status.OK]
  assert verdict.status is Status.TIMEOUT and verdict.runs[2].matches


@pytest.mark.parametrize('end', [Status.TIMEOUT, Status.MEMORY])
def test_a_limit_that_others_used_up_costs_no_input(end):
  cache = verify.Cache(10)
  verdict, units = _drive(
    verify.Trial(Job('run', _F, ('1', '2', '3'), ('1', '2', '3')), verify.Rules(), cache),
    ([_value(1), _value(2)], end), [_value(3)])
  assert [u.inputs for u in units] == [('1', '2', '3'), ('3',)]
  assert verdict.status is Status.OK and all(r.matches for r in verdict.runs)
  again = verify.Trial(Job('run', _F, ('3',), ('3',)), verify.Rules(), cache).verdict
  assert again.runs[0].matches
  # As often as a program may die; what is given up then is not remembered.
  cache, used = verify.Cache(10), ([_value(1)], end)
  verdict, units = _drive(
    verify.Trial(Job('run', _F, tuple(map(str, range(9)))), verify.Rules(), cache), *[used] * 4)
  assert [len(u.inputs) for u in units] == [9, 8, 7, 6]
  assert [r.status for r in verdict.runs] == [Status.OK] * 4 + [end] * 5
  assert verify.Trial(Job('run', _F, ('4',)), verify.Rules(), cache).verdict is None


def test_a_program_that_keeps_dying_is_given_up():
  died = ([], Status.TIMEOUT)
  verdict, units = _drive(_trial(Job('run', _F, tuple(map(str, range(9))))), died, died, died)
  assert len(units) == 3 and {r.status for r in verdict.runs} == {Status.TIMEOUT}
  assert [r.error for r in verdict.runs] == ['timeout'] * 3 + ['not run'] * 6


def test_a_program_that_does_not_load_fails_on_every_input():
  verdict, _ = _drive(_trial(Job('run', _F, ('1', '2'))), [[['m', 'NameError']]])
  assert [(r.status, r.error) for r in verdict.runs] == [(Status.ERROR, 'NameError')] * 2


def test_many_inputs_are_split_over_processes():
  inputs = tuple(map(str, range(100)))
  verdict, units = _drive(
    _trial(Job('run', _F, inputs, inputs)),
    [_value(i) for i in range(64)],
    [_value(i) for i in range(64, 100)],
  )
  assert [len(u.inputs) for u in units] == [64, 36]
  assert all(r.matches for r in verdict.runs)


def test_the_name_of_the_exception_is_the_value_of_the_error_kind():
  verdict, _ = _drive(
    _trial(Job('validate', _F, ('1', '2'), expect_error=True)),
    [[['x', 'KeyError'], ['x', 'KeyError']], [['r'], ['r']]],
    [[['r']], [['x', 'KeyError']]],
  )
  assert [r.output for r in verdict.runs] == ['KeyError', 'NoError'] and verdict.status is Status.OK
  answers = _trial(
    Job(
      'compare',
      inputs=('keyerror: 1', 'IndexError', ' noerror ', ''),
      expected=('KeyError', 'KeyError', 'NoError', 'KeyError'),
      expect_error=True,
    )
  ).verdict
  assert [r.matches for r in answers.runs] == [True, False, True, False]


def test_answers_are_compared_as_values_without_running_anything():
  inputs = (
    '1',
    '1.0',
    'True',
    "{'b': 1, 'a': 2}",
    '[1]',
    '1+1',
    'x',
    '9**9**9',
    "__import__('os')",
    'nan',
  )
  expected = ('1', '1', '1', "{'a': 2, 'b': 1}", '(1,)', '2', '1', '1', '1', "float('nan')")
  strict = _trial(Job('compare', inputs=inputs, expected=expected)).verdict
  loose = _trial(Job('compare', inputs=inputs, expected=expected), equality='loose').verdict
  assert [r.matches for r in strict.runs] == [
    True,
    False,
    False,
    True,
    False,
    False,
    False,
    False,
    False,
    True,
  ]
  assert [r.matches for r in loose.runs] == [
    True,
    True,
    True,
    True,
    False,
    True,
    False,
    False,
    False,
    True,
  ]
  assert strict.status is Status.REJECTED and strict.runs[7].status is Status.REJECTED


def test_rejections_name_their_reason_and_run_nothing():
  verdict = _trial(Job('validate', 'import os\n' + _F, ('1',))).verdict
  assert (verdict.status, verdict.error, verdict.program, len(verdict.runs)) == (
    Status.REJECTED,
    'import os',
    '',
    1,
  )
  verdict = _trial(Job('run', _F, ('1) or (True',))).verdict
  assert verdict.runs[0].status is Status.REJECTED and verdict.runs[0].input == ''


def test_a_call_of_f_as_input_is_replaced_by_its_value():
  verdict, units = _drive(
    _trial(Job('validate', _F, ('f([2])', '3'))),
    [_value([2])],
    [_value([2], [2]), _value(3, 3)],
    [_value([2]), _value(3)],
  )
  assert [u.group for u in units] == ['nested', 'a', 'b'] and units[0].inputs == ('[2]',)
  assert [r.input for r in verdict.runs] == ['[2]', '3']
  assert _trial(Job('run', _F, ('f(1)',))).verdict.status is Status.REJECTED


@pytest.mark.parametrize('depth, status', [(4, Status.OK), (5, Status.REJECTED)])
def test_an_input_may_call_f_four_times(depth, status):
  # As if f added one to what it is given: f(1) is 2, and f(f(1)) is 3.
  nested = [[_value(n)] for n in range(2, 6)]
  rest = [[_value(6, 6)], [_value(6)]] if status is Status.OK else []
  given = 'f(' * depth + '1' + ')' * depth
  verdict, _ = _drive(_trial(Job('validate', _F, (given,))), *nested, *rest)
  assert verdict.runs[0].status is status
  assert verdict.runs[0].input == ('5' if status is Status.OK else '')


def test_the_key_ignores_comments_and_input_spelling():
  def key(program, inputs):
    return _drive(_trial(Job('validate', program, inputs)), [_value(1, 1)], [_value(1)])[0].key

  assert key(_F, ('1',)) == key('def f(x):\n\n  # same\n  return x', (' 1 ',)) != key(_F, ('2',))


def test_a_forbidden_call_is_unsafe_unless_the_exception_is_the_answer():
  refused = [[['x', 'PermissionError']]]
  assert _drive(_trial(Job('run', _F, ('1',))), refused)[0].status is Status.UNSAFE
  verdict, _ = _drive(
    _trial(Job('run', _F, ('1',), ('PermissionError',), expect_error=True)), refused
  )
  assert verdict.status is Status.OK and verdict.runs[0].matches


_FRAME = st.binary(max_size=40).map(lambda b: struct.pack('<I', len(b)) + b)
_GOOD = st.sampled_from(
  [b'[["v",["i",1]]]', b'[["x","KeyError"]]', b'[["m","NameError"]]', b'null']
)


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(
  st.lists(
    _FRAME | _GOOD.map(lambda b: struct.pack('<I', len(b)) + b) | st.binary(max_size=20), max_size=8
  )
)
def test_whatever_a_child_writes_ends_in_a_verdict(parts):
  ours, theirs = socket.socketpair()
  with ours, theirs:
    ours.setblocking(False)
    trial = _trial(Job('run', _F, ('1', '2', '3'), ('7', '7', '7')))
    [unit] = trial.take()
    child = workers.Child(1, ours, None)
    child.start(None, unit, True)
    theirs.sendall(b''.join(parts))
    theirs.shutdown(socket.SHUT_WR)
    while child.end is None:
      child.receive()
    trial.feed(unit, child.report(0, 0.0, 0, 512))
    while trial.verdict is None:
      for more in trial.take():
        trial.feed(more, reports.Report((), Status.CRASHED))
  assert len(trial.verdict.runs) == 3 and not any(run.matches for run in trial.verdict.runs)


def test_a_fault_of_the_verifier_costs_one_job(monkeypatch):
  def fail(*_):
    raise OverflowError

  trial = _trial(Job('run', _F, tuple(map(str, range(100)))))  # two processes
  monkeypatch.setattr(verify, '_matches', fail)
  bad = _trial(Job('run', _F, ('1',), ('2',)))
  assert _drive(bad, [_value(1)])[0].status is Status.CRASHED
  assert bad.verdict.runs[0].error == 'fault of the verifier: OverflowError'
  monkeypatch.setattr(verify.Trial, '_settle', fail)
  first, second = trial.take()
  for unit in (first, second):
    trial.feed(unit, reports.Report((reports.understand(b'[["v",["i",1]]]', unit),), Status.OK))
  assert trial.verdict.status is Status.CRASHED and len(trial.verdict.runs) == 100
