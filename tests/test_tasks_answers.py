# SPDX-License-Identifier: Apache-2.0
"""What answers and messages say, in the ways in which models write them."""

import dataclasses
import time

import pytest

from absolute_zero_jax import config, parts, tasks
from absolute_zero_jax.tasks import prompts, text
from absolute_zero_jax.types import Role, Task

SOURCE = 'def f(a, b):\n    return a * b'


def _task(program=SOURCE):
  return Task('deduction', program, (('3, 4', '12'),), key='k')


@pytest.mark.parametrize('answer, want', [
    ('output(12)', '12'), ('<output>12</output>', '12'), ('The output is 12', '12'),
    ('So the output is: `[1, 2]`.', '[1, 2]'), ('the output is 1.', '1'), ('Output:\n12', '12'),
    ('The output is:\n\n7', '7'), ('Output:\n\n7', '7'), ('the output is [1].', '[1]'),
    ('# Output: 7.', '7'), ('Given\n```python\ndef f(a): pass\n```\nthe output is 7', '7'),
    ('The output is:\n```\n7\n```\nf adds one.', '7'),
    ('Output:\n```\n7\n```\nThis follows since f adds.', '7'),
    ('First the output is computed by adding.\n```\n7\n```', '7'),
    ('```\n7\n```\nSo the output is as given above.', '7'), ('the output is ...', '...'),
    ('```message\nhi\n```\n<output>7</output>', '7'), ('```\n7\n```\nfor\n```message\n6\n```', '7'),
    ("'the output is 5'", "'the output is 5'"), ('f(3)', 'f(3)'), ('7', '7')])
def test_an_answer_in_words_is_read(answer, want):
  assert tasks.get('deduction').parse_answer(answer) == want
  answer, want = (x.replace('output', 'input').replace('Output', 'Input') for x in (answer, want))
  assert tasks.get('abduction').parse_answer(answer) == text.arguments(want)


_IN_LABEL, _IN_LINE = '```output\n1\n```\n', '# Output: 2\n'
_IN_WORDS, _IN_BLOCK = 'The output is 3\n', '```\n4\n```\n'


@pytest.mark.parametrize('answer, want', [
    (_IN_LABEL + _IN_LINE + _IN_WORDS + _IN_BLOCK, '1'), (_IN_LINE + _IN_WORDS + _IN_BLOCK, '2'),
    (_IN_WORDS + _IN_BLOCK, '3'), ('So\n' + _IN_BLOCK, '4'), (2 * _IN_BLOCK + _IN_LABEL, '1')])
def test_of_several_ways_to_answer_the_plainest_counts(answer, want):
  assert tasks.get('deduction').parse_answer(answer) == want


@pytest.mark.parametrize('given, want', [
    ("''.join(['A'] * 3)", "'AAA'"), ("'$x'.upper(), '$'", "'$X', '$'"),
    ('sorted([3, 1])', '[1, 3]'), ('f(sorted([3, 1]))', '[1, 3]'), ('f(1) + f(2)', None),
    ('[i for i in range(3)]', None), ('open(1)', None),
    ('min(i for i in range(3) if i > 1)', None)])
def test_an_abduction_may_work_out_constants_and_search_for_none(given, want):
  kind = tasks.get('abduction')
  answer = kind.parse_answer(f'```input\n{given}\n```')
  assert (answer if kind.checking_jobs(_task(), answer) else None) == want


@pytest.mark.parametrize('given, want', [
    ('sorted([3, 1])', '[1, 3]'), ('[i for i in range(3)]', '[0, 1, 2]'), ("'x'.upper()", "'X'")])
def test_a_proposed_input_may_be_worked_out(given, want):
  answer = f'```python\n{SOURCE}\n```\n```input\n{given}\n```'
  assert tasks.get('deduction').parse_proposal(answer, ()).inputs == (want,)


@pytest.mark.parametrize('block, call, want', [
    ('```input\n1\n```\n', '\nf(2)', '1'), ('', '\nf(2)', '2'), ('', '', '3')])
def test_an_input_block_goes_before_a_call_and_a_call_before_a_line(block, call, want):
  answer = f'{block}```python\ndef f(x):\n  return x{call}\n```\n# Input: 3\n'
  assert tasks.get('deduction').parse_proposal(answer, ()).inputs == (want,)


def test_an_answer_of_many_openings_is_read_in_linear_time():
  kind = tasks.get('deduction')
  for answer in ('<output>' * 20_000, 'the output is ' * 20_000, 'output(' + ') ' * 40_000 + 'x',
                 'the output is' + ' ' * 40_000 + '\n', 'output:\n' * 20_000 + ' ' * 40_000):
    started = time.process_time()
    kind.parse_answer(answer)
    assert time.process_time() - started < 1


_DOCUMENTED = '''def f(x):
    """Count the vowels,
    upper and lower case alike.
    """
    # every vowel counts once
    return sum(c in "aeiou" for c in x.lower())'''


@pytest.mark.parametrize('message, program, told', [
    ('Vowels, upper and lower case alike.', _DOCUMENTED, False),
    ('# every vowel counts once', _DOCUMENTED, False),
    ('return sum(c in "aeiou" for c in x.lower())', _DOCUMENTED, True),
    ('It will return x + 12 at times.', 'def f(x):\n    return x + 1', False),
    ('It will return x + 1.', 'def f(x):\n    return x + 1', True),
    ('It is x * 3 - 10 + x', 'def f(x): return x * 3 - 10 + x', False),
    ('So return x * 2 + 100', 'def f(x):\n  "doc"; return x * 2 + 100', True),
    ('So return x * 3 - 10', 'def f(x): return x * 3 - 10', True)])
def test_a_message_may_repeat_what_is_said_and_not_the_code(message, program, told):
  answer = f'```input\n1\n```\n```input\n2\n```\n```message\n{message}\n```'
  kind = tasks.get('induction', cases=2)
  found = kind.parse_proposal(answer, [_task(program)])
  assert found == 'message_tells_code' if told else found.message == message
  free = dataclasses.replace(kind, quotes_code=True)
  assert free.parse_proposal(answer, [_task(program)]).message == message


def test_the_papers_presets_let_a_message_quote_the_program():
  for preset in ('azr_paper', 'azr_paper_eq', 'azr_main'):
    c = config.apply_preset(config.get_config(), preset)
    kind, = (k for k in parts.kinds(c) if k.name == 'induction')
    assert kind.quotes_code
  assert c.algorithm.whiten_count == 'token'


def test_every_answer_has_one_vote_in_the_equations_as_printed():
  c = config.apply_preset(config.get_config(), 'azr_paper_eq')
  assert (c.algorithm.aggregation, c.algorithm.whiten_count) == ('sequence', 'sequence')


def test_a_first_line_of_many_arrows_is_read_in_linear_time():
  kind = tasks.get('induction', cases=2)
  answer = '```input\n1\n```\n```input\n2\n```\n```message\nadds one\n```'
  for line in (')->' * 2700, 'maps (a) -> b, ' * 540, '(1, 2), ' * 1000):
    program = f'# {line}\ndef f(x):\n  return x + 1'
    started = time.process_time()
    assert kind.parse_proposal(answer, [_task(program)]).message == 'adds one'
    assert time.process_time() - started < 1


def test_under_the_references_rule_an_answer_that_is_not_closed_is_all_the_rest():
  made = prompts.load('think', rule='azr')
  said = ' t </think> <answer>\n```output\n5\n```\n'
  for finished in (True, False):
    assert made.extract(Role.SOLVE, 'deduction', said, finished=finished) == (
        False, '```output\n5\n```')
  strict = prompts.load('think', rule='strict')
  assert strict.extract(Role.SOLVE, 'deduction', said, finished=True)[0] is False
