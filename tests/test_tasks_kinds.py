# SPDX-License-Identifier: Apache-2.0
"""Every kind from text to task to score, with verdicts written by hand, and one of our own kind."""

import dataclasses
import json
import sys
import time

import numpy as np
import pytest

from absolute_zero_jax import buffer, tasks
from absolute_zero_jax.tasks import identity, induction, program, prompts, seed_files, text
from absolute_zero_jax.types import Job, Run, Status, Verdict

SOURCE = 'def f(a, b):\n    return a * b'
PROPOSAL = f'```python\n{SOURCE}\n```\n```input\n3, 4\n```'
PAIR_KINDS = ('deduction', 'abduction', 'error')


def _ok(*pairs, matches=False):
  runs = tuple(Run(Status.OK, i, o, matches) for i, o in pairs)
  return Verdict(Status.OK, runs)


def _task(kind='deduction'):
  made = tasks.get(kind)
  return made.to_task(tasks.Proposal(SOURCE, ('3, 4',)), [_ok(('3, 4', '12'))], 7)


@pytest.mark.parametrize('name', PAIR_KINDS)
def test_a_proposal_becomes_a_task(name):
  kind = tasks.get(name)
  proposal = kind.parse_proposal(PROPOSAL, [])
  assert proposal == tasks.Proposal(SOURCE, ('3, 4',))
  job, = kind.validation_jobs(proposal)
  assert job == Job('validate', SOURCE, ('3, 4',), expect_error=name == 'error')
  gold = 'NoError' if name == 'error' else '12'
  task = kind.to_task(proposal, [_ok(('3, 4', gold))], 7)
  assert (task.kind, task.cases, task.born_step) == (name, (('3, 4', gold),), 7)
  assert task.key == identity.key(name, SOURCE, ('3, 4',))


@pytest.mark.parametrize('status', [s for s in Status if s is not Status.OK])
@pytest.mark.parametrize('name', [*PAIR_KINDS, 'induction'])
def test_a_bad_verdict_names_itself(name, status):
  proposal = tasks.Proposal(SOURCE, ('3, 4', '1, 1'))
  assert tasks.get(name).to_task(proposal, [Verdict(status)], 1) == status.value


@pytest.mark.parametrize(('answer', 'reason'), [
    ('', 'no_program'), ('no fence', 'no_program'), (f'```python\n{SOURCE}\n```', 'no_input'),
    ('```python\ndef f(a:\n```', 'syntax'),
    (f'```python\n{SOURCE}\n```\n```input\nx, y\n```', 'input_not_literal'),
    (f'```python\n{SOURCE}\n```\n```input\n1) or (True\n```', 'input_not_literal'),
    (f'```python\n{SOURCE}\n```\n```input\n\n```', 'no_input'),
    (PROPOSAL.replace('3, 4', '[' * 9000 + ']' * 9000), 'input_not_literal'),
    (PROPOSAL.replace('3, 4', '3, c=4'), 'named_input'),
])
def test_a_formless_proposal_names_its_fault(answer, reason):
  assert tasks.get('deduction').parse_proposal(answer, []) == reason


@pytest.mark.parametrize('answer', [
    f'```input\n3, 4\n```\nthen\n```py\n{SOURCE}\n```',          # order and label do not matter
    f'```python\n{SOURCE}\n```\n# Input: 3, 4',
    f'```python\n{SOURCE}\nf(3, 4)\n```',
    f'```python\n{SOURCE}\n```\n```input\nf(3,\n  4)  # two\n```',
])
def test_other_ways_to_write_a_proposal(answer):
  found = tasks.get('abduction').parse_proposal(answer, [])
  assert found == tasks.Proposal(SOURCE, ('3, 4',))


def test_a_copy_of_a_reference_is_refused():
  copy = PROPOSAL.replace('a * b', 'x * y').replace('a, b', 'x, y')
  assert tasks.get('deduction').parse_proposal(copy, [_task()]) == 'copied'
  assert tasks.get('deduction').parse_proposal(copy.replace('3', '5'), [_task()]) != 'copied'


@pytest.mark.parametrize(('name', 'answer', 'read'), [
    ('deduction', '```output\n12\n```', '12'),
    ('deduction', '```output\n1\n```\n```output\n2\n```', '2'),
    ('deduction', '# Output: 12', '12'), ('deduction', ' 12 ', '12'), ('deduction', ' \n', None),
    ('deduction', '```\n[1]\n```', '[1]'),
    ('abduction', '```input\nf(3, 4)\n```', '3, 4'), ('abduction', '3,\n4', '3, 4'),
    ('abduction', '1) or (True', '1) or (True'), ('abduction', '', None),
    ('error', '```output\nValueError: bad\n```', 'ValueError'),
    ('error', 'json.JSONDecodeError', 'JSONDecodeError'), ('error', '12', None),
    ('induction', '```python\nold\n```\n```py\ndef f(x): pass\n```', 'def f(x): pass'),
    ('induction', '```\ndef f(x): pass\n```', 'def f(x): pass'),
    ('induction', 'def f(x): pass', None), ('induction', '```python\n\n```', None),
])
def test_answers_are_read(name, answer, read):
  assert tasks.get(name).parse_answer(answer) == read


def test_deduction_compares_values_and_abduction_runs_the_program():
  task = _task()
  assert tasks.get('deduction').checking_jobs(task, '12') == [
      Job('compare', inputs=('12',), expected=('12',))]
  assert tasks.get('abduction').checking_jobs(task, '12, 1') == [
      Job('run', SOURCE, ('12, 1',), ('12',))]


@pytest.mark.parametrize('answer', [
    'max(x for x in range(20) if x * 2 == 12), 1', '[x for x in range(20)]', 'sorted([3])[0], 4',
    '3 if 1 < 2 else 4, 4', "len('abc'), 4", '(lambda: 3)(), 4', '1) or (True'])
def test_an_abduction_that_leaves_the_work_to_the_checker_is_wrong(answer):
  assert tasks.get('abduction').checking_jobs(_task(), answer) == []
  assert tasks.get('abduction').accuracy(_task(), answer, []) == 0


@pytest.mark.parametrize('answer', [
    '3, 4', 'b=4, a=3', '[0] * 3, -1', 'nan, inf', 'Ellipsis, None'])
def test_an_abduction_that_is_data_is_run(answer):
  assert len(tasks.get('abduction').checking_jobs(_task(), answer)) == 1


@pytest.mark.parametrize(('source', 'arguments', 'read'), [
    (SOURCE, '3, 4', '3, 4'), (SOURCE, '3, b=4', '3, 4'), (SOURCE, 'b=[4], a=3', '3, [4]'),
    ('def f(a, b=2): return a', 'a=3', '3'), ('def f(a, b=2, c=3): return a', '3, c=1', None),
    ('def f(*, a): return a', 'a=3', None), ('def f(**a): return a', 'x=3', None),
    ('def f(a): return 1\ndef f(b): return b', 'b=3', '3'), (SOURCE, '3, a=4', None),
    ('no python at all', 'a=3', None)])
def test_named_inputs_are_put_in_their_places(source, arguments, read):
  assert text.positional(source, arguments) == read


@pytest.mark.parametrize(('verdict', 'accuracy'), [
    (_ok(('', ''), matches=True), 1.0), (_ok(('', '')), 0.0), (Verdict(Status.TIMEOUT), 0.0),
    (Verdict(Status.ERROR, (Run(Status.ERROR, matches=True),)), 0.0)])
def test_only_a_finished_equal_run_is_right(verdict, accuracy):
  for name in ('deduction', 'abduction'):
    assert tasks.get(name).accuracy(_task(), 'x', [verdict]) == accuracy


def test_errors_are_compared_by_name():
  kind = tasks.get('error')
  task = kind.to_task(tasks.Proposal(SOURCE, ('1, 0',)), [_ok(('1, 0', 'ValueError'))], 1)
  assert kind.checking_jobs(task, 'ValueError') == []
  assert kind.accuracy(task, 'valueerror', []) == 1 and kind.accuracy(task, 'NoError', []) == 0


@pytest.mark.parametrize('name', ['', 'Ошибка', 'a:b', 'A' * 60, 'a b', '1', '`x`'])
def test_an_error_that_no_answer_can_name_is_no_task(name):
  proposal = tasks.Proposal(SOURCE, ('1, 0',))
  assert tasks.get('error').to_task(proposal, [_ok(('1, 0', name))], 1) == 'error_name'


def test_a_banned_statement_is_refused():
  kind = tasks.get('error', banned_statements=('raise', 'assert'))
  answer = '```python\ndef f(a):\n  raise ValueError(a)\n```\n```input\n1\n```'
  assert kind.parse_proposal(answer, []) == 'banned_statement'


INPUTS = ''.join(f'```input\n{i}, 2\n```\n' for i in range(1, 6))


def _induction(**options):
  return tasks.get('induction', cases=4, **options)


def test_induction_keeps_the_last_inputs_and_shows_half():
  kind = _induction()
  proposal = kind.parse_proposal(INPUTS + '```message\nmultiply\n```', [_task()])
  assert proposal == tasks.Proposal(SOURCE, ('2, 2', '3, 2', '4, 2', '5, 2'), 'multiply')
  verdict = _ok(*[(i, '0') for i in proposal.inputs])
  task = kind.to_task(proposal, [verdict], 3)
  assert (len(task.cases), task.shown, task.message) == (4, 2, 'multiply')
  job, = kind.checking_jobs(task, 'import re\ndef f(a, b): return a * b')
  assert (job.inputs, job.expected) == (('4, 2', '5, 2'), ('0', '0'))


@pytest.mark.parametrize(('answer', 'reason'), [
    (INPUTS, 'no_message'), ('```message\nhi\n```', 'few_inputs'),
    ('```input\n1, 2\n```\n' * 9 + '```message\nhi\n```', 'few_inputs'),      # all the same
    ('```input\nx\n```\n' * 9 + '```message\nhi\n```', 'input_not_literal'),
    (INPUTS + '```message\n' + 'a' * 3000 + '\n```', 'message_too_long'),
    (INPUTS + '```message\nwrite return a * b\n```', 'message_tells_code'),
    (INPUTS.replace('input', 'message'), 'few_inputs'),
])
def test_a_formless_induction_proposal_names_its_fault(answer, reason):
  assert _induction().parse_proposal(answer, [_task()]) == reason


def test_one_value_written_twice_is_one_input():
  pairs = [('5', '1'), ('5', '1'), ('6', '1'), ('7', '1')]      # canonical, as the executor has it
  proposal = tasks.Proposal(SOURCE, ('5', '6-1', '6', '7'), 'm')
  assert _induction().to_task(proposal, [_ok(*pairs)], 1) == 'few_inputs'
  assert len(_induction(distinct_inputs=False).to_task(proposal, [_ok(*pairs)], 1).cases) == 4


def test_an_answer_indented_as_a_whole_is_a_program():
  answer = '```python\n    def f(a):\n      return a\n```'
  assert _induction().parse_answer(answer) == 'def f(a):\n  return a'


@pytest.mark.parametrize('calls', [''.join(f'f({i}, 2)\n' for i in range(4)),
                                   '[f(0, 2), f(1, 2), f(2, 2), f(3, 2)]\n'])
def test_induction_reads_bare_calls(calls):
  answer = calls + '# Message: double it\n'
  found = _induction().parse_proposal(answer, [_task()])
  assert found.inputs == ('0, 2', '1, 2', '2, 2', '3, 2') and found.message == 'double it'


@pytest.mark.parametrize(('score', 'matches', 'accuracy'), [
    ('binary', [1, 1], 1.0), ('binary', [1, 0], 0.0), ('accuracy', [1, 0], 0.5),
    ('if_one_correct', [0, 1], 1.0), ('if_one_correct', [0, 0], 0.0),
    ('binary', [1], 0.0),            # a pair without a result is wrong, not dropped
    ('accuracy', [1], 0.5), ('accuracy', [], 0.0),
])
def test_induction_scores(score, matches, accuracy):
  kind = _induction(score=score)
  proposal = tasks.Proposal(SOURCE, ('1, 2', '2, 2', '3, 2', '4, 2'), 'm')
  task = kind.to_task(proposal, [_ok(*[(i, '0') for i in proposal.inputs])], 1)
  runs = tuple(Run(Status.OK, matches=bool(m)) for m in matches)
  assert kind.accuracy(task, 'x', [Verdict(Status.OK, runs)]) == accuracy


def test_the_tasks_imports_reach_the_solver():
  kind = _induction()
  task = dataclasses.replace(_task('induction'), program='import math\n' + SOURCE)
  assert kind.checking_jobs(task, 'def f(a, b): return math.pi')[0].program.startswith(
      'import math\n')


def test_induction_takes_programs_of_the_other_kinds():
  made = buffer.TaskBuffer()
  kind = tasks.get('induction')
  made.extend(kind.seeds())
  assert kind.references(made, np.random.default_rng(0), 6)[0].kind == 'induction'
  made.extend([_task()])
  assert kind.references(made, np.random.default_rng(0), 6) == [made.tasks('deduction')[0]]


@pytest.mark.parametrize('name', tasks.KINDS)
@pytest.mark.parametrize('chosen', ['compact', 'think'])
def test_every_kind_has_prompts_from_its_own_seeds(name, chosen):
  kind, given = tasks.get(name), prompts.load(chosen)
  seed = kind.seeds()[0]
  assert seed.kind == name and seed.key
  proposal, solving = kind.propose_prompt([seed], given), kind.solve_prompt(seed, given)
  assert 'return a' in proposal
  assert ('return a' in solving) == (name != 'induction' or chosen == 'compact')
  assert 'Hello world' in solving and '$' not in solving
  if name == 'induction':
    with pytest.raises(ValueError, match='there is none'):
      kind.propose_prompt([], given)


def test_get_passes_each_kind_its_own_options():
  options = {'cases': 6, 'score': 'accuracy', 'rules': tasks.Rules(functions='one')}
  assert tasks.get('induction', **options).cases == 6
  assert tasks.get('deduction', **options).rules.functions == 'one'


@pytest.mark.parametrize(('name', 'options', 'words'), [
    ('deductoin', {}, 'must be one of'), ('deduction', {'case': 1}, 'no kind has an option'),
    ('no.such:Kind', {}, 'cannot be loaded'), ('json:dumps', {}, 'cannot be made'),
    ('json:decoder', {}, 'lacks'), ('induction', {'cases': 1}, 'at least 2'),
    ('induction', {'score': 'best'}, 'must be one of')])
def test_wrong_kinds_are_refused(name, options, words):
  with pytest.raises(ValueError, match=words):
    tasks.get(name, **options)


def test_a_kind_of_another_domain_plays(monkeypatch):
  monkeypatch.syspath_prepend(str(__import__('pathlib').Path(__file__).parent))
  kind = tasks.get('example_kind:Equations', max_numbers=5)
  made, rng = buffer.TaskBuffer(), np.random.default_rng(0)
  made.extend(kind.seeds())
  given = prompts.load('think')
  references = kind.references(made, rng, 6)
  assert '1 + 2' in kind.propose_prompt(references, given)
  well_formed, answer = given.extract('propose', kind.name,
                                      'hm</think> <answer>(3 + 5) * 7 - 2</answer>')
  proposal = kind.parse_proposal(answer, references)
  assert well_formed and kind.validation_jobs(proposal) == []
  task = kind.to_task(proposal, [], 1)
  assert task.cases == (('2, 3, 5, 7', '54'),) and made.add(task)
  assert '54' in kind.solve_prompt(task, given)
  assert kind.accuracy(task, '7 * (5 + 3) - 2', []) == 1
  assert kind.accuracy(task, '7 * (5 + 3) - 3', []) == 0
  assert kind.accuracy(task, '54', []) == 0                  # the numbers must be used
  assert kind.accuracy(task, '__import__("os")', []) == 0
  assert kind.parse_proposal('9 ** 9 ** 9', []) == 'no_expression'
  assert buffer.TaskBuffer.from_state(json.loads(json.dumps(made.state()))).state() == made.state()
  sys.modules.pop('example_kind')


def test_rows_of_seeds_are_told_apart_and_read_as_proposals_are(tmp_path):
  rows = [{'snippet': SOURCE, 'input': '3, b=4'},
          {'snippet': SOURCE, 'inputs': ['1, 2', '3, 4'], 'message': ''}]
  (tmp_path / 'seeds.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  pair, induction = seed_files.read(tmp_path / 'seeds.jsonl')
  assert pair.inputs == ('3, 4',) and seed_files.kinds_of(pair) == seed_files.PAIR_KINDS
  assert seed_files.kinds_of(induction) == ('induction',)


def test_the_seed_files_of_the_reference_load(shared_data, tmp_path):
  files = sorted((shared_data / 'azr_seeds').glob('*_seed_io.jsonl'))
  assert len(files) == 6
  for path in files:
    found = seed_files.read(path)
    kind = tasks.get('induction' if 'code_f' in path.name else 'deduction')
    assert len(found) == 256
    assert all(kind.validation_jobs(p)[0].inputs for p in found)
    reasons = [program.prepare(p.program, program.Rules(reject_constant=False)) for p in found]
    assert not [r for r in reasons if isinstance(r, str)]
    # Verdicts as an executor would write them; the files' own texts stand in for its values.
    made = [kind.to_task(p, [_ok(*[(i, '0') for i in p.inputs])], 0) for p in found]
    seed_files.write(tmp_path / path.name, made)
    again = seed_files.read(tmp_path / path.name)
    assert [(p.program, p.inputs, p.message) for p in again] == [
        (t.program, tuple(i for i, _ in t.cases), t.message) for t in made]


def test_a_call_of_f_in_a_seed_file_stays_one(tmp_path):
  path = tmp_path / 'seeds.jsonl'
  path.write_text('{"snippet": "def f(a): return a + 1", "input": "f(3)"}\n')
  assert seed_files.read(path)[0].inputs == ('f(3)',)


def test_a_broken_seed_file_names_the_line(tmp_path):
  path = tmp_path / 'seeds.jsonl'
  path.write_text('{"snippet": "def f(a): return a", "input": "1"}\n\n{"snippet": 1}\n')
  with pytest.raises(ValueError, match=':3 is no seed row'):
    seed_files.read(path)
  with pytest.raises(ValueError, match='separate files'):
    seed_files.write(path, [*tasks.get('deduction').seeds(), *tasks.get('induction').seeds()])


def test_inputs_that_python_takes_for_one_are_one_input():
  """A table of the shown pairs would answer hidden ones: 1, 1.0 and True are one key."""
  answer = '\n'.join(f'```input\n{i}\n```' for i in ('1', '2', '1.0', 'True', '3', '[1]', '[1.0]'))
  found = _induction().parse_proposal(f'{answer}\n```message\nm\n```', [
      dataclasses.replace(_task(), program='def f(x):\n  return x')])
  assert found.inputs == ('1', '2', '3', '[1]')


def test_a_message_may_not_tell_a_program_of_one_line():
  source = 'def f(x: int) -> list: return sorted(set(x))[::-1][:3]'
  assert induction._tells_code('do return sorted(set(x))[::-1][:3] to it', source)
  assert not induction._tells_code('the three largest, once each', source)


def test_a_program_may_not_call_its_error_no_error():
  source = 'class NoError(Exception): pass\ndef f(x):\n  raise NoError'
  kind = tasks.get('error')
  assert kind.to_task(tasks.Proposal(source, ('1',)), [_ok(('1', 'NoError'))], 1) == 'error_name'


def test_an_induction_of_many_inputs_is_read_at_once():
  kind, reference = tasks.get('induction'), _task()
  for given in ('[1]*2600+[{i}], 1', '{i}, b={i}'):
    source = SOURCE + '\n' + '# more\n' * 1000
    blocks = ''.join(f'```input\n{given.format(i=i)}\n```\n' for i in range(150))
    started = time.process_time()
    found = kind.parse_proposal(blocks + '```message\nhint\n```',
                                [dataclasses.replace(reference, program=source)])
    assert len(found.inputs) == kind.cases and time.process_time() - started < 1.5


def test_a_sentence_that_names_an_error_is_read():
  kind = tasks.get('error')
  assert kind.parse_answer('NoError.') == 'NoError'
  assert kind.parse_answer('```output\njson.ValueError.\n```') == 'ValueError'
  asked = '```python\ndef f(a): pass\n```\n'
  assert kind.parse_answer(f'{asked}The output is ValueError: bad digit.') == 'ValueError'
  assert kind.parse_answer('The output is as follows.\n```\nKeyError\n```') == 'KeyError'


@pytest.mark.parametrize('word, body', [
    ('except', 'try:\n    return a\n  except ValueError:\n    return b'),
    ('else', 'if a:\n    return a\n  else:\n    return b'), ('def', 'return a'),
    ('class', 'class C: pass\n  return a'), ('try', 'try: return a\n  except* ValueError: b = 1'),
    ('match', 'match a:\n    case 1:\n      return a'), ('lambda', 'return (lambda x: x)(a)')])
def test_a_banned_keyword_is_refused_whatever_its_place(word, body):
  answer = f'```python\ndef f(a, b):\n  {body}\n```\n```input\n3, 4\n```'
  assert tasks.get('error', banned_statements=(word,)).parse_proposal(
      answer, []) == 'banned_statement'
  plain = answer.replace(body, 'match = a\n  return match')
  assert word == 'def' or tasks.get('error', banned_statements=(word,)).parse_proposal(
      plain, []).inputs == ('3, 4',)
  with pytest.raises(ValueError, match="'rise'"):
    tasks.get('error', banned_statements=('rise',))


def test_keywords_for_a_module_s_function_name_what_they_name():
  one = ('import functools\ndef g(a, b=1, c=2): return a, b, c\n'
         'def f(x): return functools.partial(g, b=5)(x)')
  other = one.replace('b=1, c=2): return a, b, c', 'c=1, b=2): return a, c, b')
  assert identity.key('k', one) != identity.key('k', other)
