# SPDX-License-Identifier: Apache-2.0
"""What is remembered of programs that ran, and what is not."""

import ast
import gc

from trials import drive as _drive
from trials import value as _value

from absolute_zero_jax.executor import values, verify
from absolute_zero_jax.types import Job, Status

_F = 'def f(x):\n  return x\n'


def test_outcomes_are_remembered_but_not_those_of_a_shorter_limit():
  cache, rules = verify.Cache(10), verify.Rules()
  _drive(
    verify.Trial(Job('run', _F, ('1', '2')), rules, cache),
    ([_value(1)], Status.TIMEOUT), ([], Status.TIMEOUT),
  )
  assert verify.Trial(Job('run', _F, ('1', '2'), ('1', '2')), rules, cache).verdict.runs[0].matches
  assert cache.hits == 2
  assert verify.Trial(Job('run', _F, ('2',), timeout_s=9.0), rules, cache).verdict is None


def test_a_remembered_refusal_keeps_nothing_of_the_program_alive():
  cache, rules = verify.Cache(10), verify.Rules()
  program = 'def f(of_a_refused_program):\n  return eval("1")'
  refusals = [verify.Trial(Job('run', program, ('1',)), rules, cache).verdict for _ in range(3)]
  assert {(v.status, v.error) for v in refusals} == {(Status.REJECTED, 'name eval')}
  gc.collect()
  assert not [o for o in gc.get_objects()
              if isinstance(o, ast.arg) and o.arg == 'of_a_refused_program']


def test_a_validated_gold_is_remembered():
  cache, rules = verify.Cache(10), verify.Rules()
  _drive(verify.Trial(Job('validate', _F, ('1',)), rules, cache), [_value(1, 1)], [_value(1)])
  assert verify.Trial(Job('run', _F, ('1',), ('1',)), rules, cache).verdict.runs[0].matches


def test_of_a_long_output_the_text_alone_is_remembered():
  cache, value = verify.Cache(10), [{0}] * 100
  expected = values.text(value).replace(' ', '')
  answers = (expected, expected.replace('0', '1', 1))
  _drive(verify.Trial(Job('run', _F, ('1',)), verify.Rules(), cache), [_value(value)])
  assert type(cache.get((_F, '1', False)).value) is object
  for answer, matches in zip(answers, (True, False)):
    trial = verify.Trial(Job('run', _F, ('1',), (answer,)), verify.Rules(), cache)
    assert trial.verdict.runs[0].matches is matches and cache.hits


def test_a_crash_is_not_remembered():
  job, cache = Job('run', _F, ('1',), ('1',)), verify.Cache(10)
  crashed, _ = _drive(verify.Trial(job, verify.Rules(), cache), ([], Status.CRASHED))
  assert crashed.status is Status.CRASHED
  again, units = _drive(verify.Trial(job, verify.Rules(), cache), [_value(1)])
  assert len(units) == 1 and again.runs[0].matches
