# SPDX-License-Identifier: Apache-2.0
"""Generated programs: deterministic, ending, dependent on input; traces and splits are true."""

import ast
import hashlib
import os
import random
import subprocess
import sys

import pytest

from absolute_zero_jax import grammar
from absolute_zero_jax.types import Task


@pytest.fixture(scope='module')
def examples():
  rng = random.Random(0)
  return [grammar.example(rng) for _ in range(300)]


def _call(source, given):
  """An interpreter of the test's own."""
  scope = {}
  exec(source, scope)
  return repr(scope['f'](*ast.literal_eval(f'({given},)')))


def test_the_same_seed_gives_the_same_programs_in_a_process_with_another_hash_seed(examples):
  code = ('import random; from absolute_zero_jax import grammar; r = random.Random(0); '
          'print([grammar.example(r) for _ in range(20)])')
  out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True,
                       env=os.environ | {'PYTHONHASHSEED': '7'}, timeout=60)
  assert out.stdout.strip() == repr(examples[:20])


def test_outputs_are_what_python_says_and_repeat(examples):
  for e in examples:
    assert tuple(_call(e.program, given) for given in e.inputs) == e.outputs
    assert all(len(o) <= grammar.MAX_VALUE_CHARS for o in e.outputs)


def test_outputs_depend_on_inputs(examples):
  for e in examples:
    assert len(set(e.inputs)) == len(e.inputs) == 6
    assert len(set(e.outputs)) >= 3


def test_programs_use_the_language(examples):
  text = '\n'.join(e.program for e in examples)
  for part in ('for ', 'while ', 'if ', 'else', 'for i in', '{', '(', "'", '['):
    assert part in text
  assert len({e.key for e in examples}) > 200
  assert {type(ast.literal_eval(o)) for e in examples for o in e.outputs} == {
      int, list, str, tuple, dict}


def test_deep_programs_are_longer_than_any_that_is_trained_on():
  def statements(source):
    return sum(isinstance(n, ast.stmt) for n in ast.parse(source).body[0].body) - 1
  rng = random.Random(1)
  # `v = 0` and the loop behind it are one statement of the grammar and two of Python.
  assert min(statements(grammar.example(rng, grammar.DEEP).program) for _ in range(50)) >= 4
  assert max(statements(grammar.example(rng).program) for _ in range(200)) <= 2 * 3


def test_rivals_are_wrong_short_and_of_the_training_side(examples):
  rng = random.Random(2)
  made = [(e, grammar.rival(rng, e, range(3))) for e in examples]
  rivals = [(e, source) for e, source in made if source is not None]
  assert len(rivals) > 0.8 * len(examples)
  agreeing = 0
  for e, source in rivals:
    assert not grammar.is_held_out(grammar.key(source))
    # One statement of the grammar is at most two of Python.
    assert len(ast.parse(source).body[0].body) <= 2 + 1
    results = [grammar.run(source, given) for given in e.inputs[:3]]
    right = [r == wanted for r, wanted in zip(results, e.outputs)]
    assert None not in results and not all(right)
    assert type(ast.literal_eval(results[0])) is type(ast.literal_eval(e.outputs[0]))
    agreeing += any(right)
  assert agreeing > len(rivals) / 4           # by chance it is 6 %


def test_the_split_is_by_the_normal_form():
  source = 'def f(a):\n    c = a + 3\n    return c * 2'
  renamed = 'def f(number):\n  # a comment\n  x=number+3\n  return x * 2'
  assert grammar.key(source) == grammar.key(renamed) != grammar.key(source.replace('3', '4'))
  task = Task('deduction', renamed, (('1', '8'),), key='k')
  assert grammar.excludes(task) == grammar.is_held_out(grammar.key(source))


def test_no_training_program_is_on_the_test_side(examples):
  tests = [*grammar.test_set(5, 20), *grammar.test_set(5, 10, 'deeper')]
  assert all(grammar.is_held_out(e.key) for e in tests)
  assert not any(grammar.is_held_out(e.key) for e in examples)
  assert all(grammar.key(e.program) == e.key for e in (*tests, *examples[:20]))


def test_the_test_set_is_one_on_every_python():
  """The keys are what Python 3.11 gave when the carried model was pre-trained without them."""
  first = grammar.test_set(20261123, 20)
  digest = hashlib.sha256('\n'.join(e.program for e in first).encode()).hexdigest()
  assert digest.startswith('4f471181bacf4db2')
  assert [e.key for e in first[:2]] == ['0e1ad7a0e80beaf2acb1d83f75c17aad',
                                        'db112e2011fc6329f3ae947b0d7b6e45']


def test_test_sets_depend_on_the_seed_alone():
  first = grammar.test_set(5, 8)
  assert first == grammar.test_set(5, 20)[:8] != grammar.test_set(6, 8)
  assert len({e.key for e in first}) == 8
  with pytest.raises(ValueError, match='deeper'):
    grammar.test_set(5, 8, 'other')


@pytest.mark.parametrize('made, wanted, same', [
    ('[True]', '[1]', False), ('{1.0: 2}', '{1: 2}', False),
    ("{'a': 1, 'b': 2}", "{'b': 2, 'a': 1}", True),
    ('(1, [2])', '(1, [2])', True), ('range(0, 3)', 'range(3)', False)])
def test_values_agree_as_answers_do(made, wanted, same):
  assert grammar.agree(made, wanted) is same
