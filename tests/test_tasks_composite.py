# SPDX-License-Identifier: Apache-2.0
"""Composite proposals: schedule, drawing, and the check that f builds on what it was given."""

import dataclasses
import types

import numpy as np
import pytest

from absolute_zero_jax import buffer, intrinsic, phases, tasks
from absolute_zero_jax.tasks import composite, metrics, program, prompts
from absolute_zero_jax.types import Task


def _parts(count=1):
  return [Task(composite.KIND, f'def g_{i}(x):\n    return x + {i}', ()) for i in range(count)]


@pytest.mark.parametrize(('step', 'count', 'chance'), [
    (100, 0, 0.0), (101, 1, 0.1), (150, 1, 0.1), (151, 2, 0.11), (201, 3, 0.12), (301, 3, 0.14),
    (99_999, 3, 0.8)])
def test_schedule_of_the_reference(step, count, chance):
  schedule = composite.Schedule(every_steps=50, chance=0.1)
  assert schedule.at(step) == (count, pytest.approx(chance))


def test_it_is_off_by_default():
  made = buffer.TaskBuffer()
  made.extend(tasks.get('deduction').seeds())
  kind = tasks.get('deduction')
  for seed in range(20):
    assert len(kind.references(made, np.random.default_rng(seed), 6)) == 1


@pytest.mark.parametrize(('source', 'reason'), [
    ('def f(a):\n  return g_0(a) * 2', ''),
    ('def f(a):\n  return sum(g_0(x) for x in range(a))', ''),          # the reference refuses both
    ('def f(a):\n  for i in range(a):\n    a += g_0(len(str(i)))\n  return a', ''),
    ('def f(a):\n  return a', 'composite_unused'),
    ('def f(a):\n  return g_0(1) + a', 'composite_unused'),
    ('def f(a):\n  return g_0(a)', 'composite_wrapper'),
    ('def f(a):\n  "Doubles."\n  pass\n  return g_0(x=a)', 'composite_wrapper'),
    ('def f(a):\n  y = g_0(a)\n  return y', 'composite_wrapper'),
    ('def f(a):\n  y: int = g_0(a)\n  return y', 'composite_wrapper'),
    ('def f(a):\n  y = g_0(a)\n  return a', ''),
    ('def f(a):\n  y = g_0(a)\n  return y + 1', ''),
    ('def g_0(x):\n  return 1\ndef f(a):\n  return g_0(a) + 1', 'composite_redefined'),
    ('def f(a):\n  g_0 = len\n  return g_0(a) + 1', 'composite_redefined'),
    ('def h(a):\n  return g_0(a)\ndef f(a):\n  return a', 'composite_unused'),
])
def test_f_must_build_on_the_parts(source, reason):
  assert composite.refusal(source, _parts()) == reason


def test_every_part_must_be_called():
  assert composite.refusal('def f(a):\n  return g_0(a) + 1', _parts(2)) == 'composite_unused'
  assert composite.refusal('def f(a):\n  return g_0(a) + g_1(a)', _parts(2)) == ''


def test_a_composite_proposal_goes_the_whole_way():
  schedule = composite.Schedule(start_step=0, count_max=2, count_min=2, chance=1.0)
  kind = tasks.get('deduction', composites=schedule)
  made = buffer.TaskBuffer()
  for n in range(5):
    source = f'def f(x):\n    return f(x - 1) if x > 9 else x * {n}'
    made.add(Task('deduction', source, (('3', '1'),), key=str(n)))
  made.add(Task('deduction', 'def h(x): return x\ndef f(x): return h(x)', (('3', '1'),), key='h'))
  references = kind.references(made, np.random.default_rng(0), 2)
  plain, parts = composite.split(references)
  assert (len(plain), len(parts)) == (2, 2)
  prompt = kind.propose_prompt(references, prompts.load('think'))
  assert all(part.program in prompt for part in parts) and 'g_0, g_1' in prompt
  answer = '```python\ndef f(x):\n    return g_0(x) + g_1(x)\n```\n```input\n3\n```'
  proposal = kind.parse_proposal(answer, references)
  scope = {}
  exec(proposal.program, scope)
  assert isinstance(scope['f'](12), int)
  assert proposal.extra['composite_functions'] == [part.program for part in parts]
  assert 'g_' not in kind.propose_prompt(plain, prompts.load('think'))


def test_too_long_a_prompt_loses_all_parts_or_none():
  """Of two parts the one left would be asked for by the other's number."""
  schedule = composite.Schedule(start_step=0, count_max=2, count_min=2, chance=1.0)
  kind = tasks.get('deduction', composites=schedule)
  made = buffer.TaskBuffer()
  for n in range(6):
    source = 'def f(x):\n' + '    x = x + 1\n' * 9 * n + f'    return x * {n}'
    made.add(Task('deduction', source, (('3', '1'),), key=str(n)))
  tools = types.SimpleNamespace(prompts=prompts.load('think'),
                                tokenizer=types.SimpleNamespace(encode=str.split))
  seen = set()
  for limit in range(400, 1200, 20):
    rules = types.SimpleNamespace(references=2, show_references=True, reference_draw='uniform',
                                  max_prompt_tokens=limit)
    references, _ = phases._propose_prompt(kind, made, tools, rules, np.random.default_rng(0))
    seen.add(len(composite.split(references)[1]))
  assert seen == {0, 2}


def test_more_parts_than_a_program_may_hold_are_data():
  parts = [dataclasses.replace(p, program=p.program + '#' * 9000) for p in _parts(4)]
  answer = '```python\ndef f(x):\n  return ' + ' + '.join(f'g_{i}(x)' for i in range(4))
  found = tasks.get('error').parse_proposal(answer + '\n```\n```input\n3\n```', parts)
  assert found == 'program_too_long'


def test_composites_do_not_nest_and_names_do_not_collide():
  made = buffer.TaskBuffer()
  helper = 'def h(x): return x\ndef f(x): return h(x) + {}'
  for n in range(4):
    made.add(Task('deduction', helper.format(n), (('3', '1'),), key=str(n)))
  made.add(Task('deduction', 'def f(x): return x', (('3', '1'),), key='c',
                extra={'composite_functions': ['x']}))
  schedule = composite.Schedule(start_step=0, count_min=3, count_max=3, chance=1.0)
  parts = composite.draw(made, 'deduction', np.random.default_rng(0), schedule)
  assert len(parts) == 1           # the others define h too, or are composites


def test_a_set_without_the_template_says_so():
  with pytest.raises(ValueError, match='no composite.txt'):
    tasks.get('deduction').propose_prompt(_parts(), prompts.load('compact'))


def test_renaming_f_is_refused_where_it_could_change_meaning():
  found = program.renamed('def f(x):\n  return f(x - 1)', 'g_0')
  assert found == 'def g_0(x):\n  return g_0(x - 1)'
  assert program.renamed('def f(x):\n  f = 1\n  return f', 'g_0') is None
  assert program.renamed('def f(x):\n  return g_0', 'g_0') is None


def test_imports_from_the_future_come_first():
  part = Task('composite', 'from __future__ import annotations\ndef g_0(x): return x + 1', ())
  plain = Task('composite', 'def g_1(x): return x * 2', ())
  joined = composite.join('from __future__ import annotations\ndef f(x): return g_0(g_1(x))',
                          [plain, part])
  scope = {}
  exec(compile(joined, 'joined', 'exec', dont_inherit=True), scope)        # written here
  assert scope['f'](3) == 7


def test_what_a_part_imports_is_not_bound_anew():
  part = Task(composite.KIND, 'from math import gcd\nimport re\ndef g_0(a): return gcd(a, 12)', ())
  body = 'def f(x):\n  return g_0(x) + 1'
  for line in ('def gcd(a, b): return 0', 'from statistics import mean as gcd', 're = 1'):
    assert composite.refusal(f'{line}\n{body}', [part]) == 'composite_redefined'
  for line in ('import re\nfrom math import gcd', 'def h(re):\n  gcd = re\n  return gcd'):
    assert composite.refusal(f'{line}\n{body}', [part]) == ''
  assert composite.refusal(f'import re\nre = 1\n{body}', [part]) == 'composite_redefined'


def test_parts_that_break_each_other_are_not_drawn_together():
  schedule = composite.Schedule(start_step=0, count_max=2, count_min=2, chance=1.0)
  imports = 'from math import gcd\ndef f(a): return gcd(a, 12)'
  for other, count in (('def gcd(a, b): return 0\ndef f(a): return gcd(a, 2)', 1),
                       ('from math import gcd\ndef f(a): return gcd(a, 9)', 2)):
    made = buffer.TaskBuffer()
    for key, source in (('a', imports), ('b', other)):
      made.add(Task('deduction', source, (('8', '4'),), key=key))
    drawn = composite.draw(made, 'deduction', np.random.default_rng(0), schedule)
    assert len(drawn) == count


def test_rewards_and_metrics_compare_what_a_proposer_wrote_itself():
  given = Task(composite.KIND, 'def g_0(x):\n  return [i for i in range(x) if i % 2 and i % 3]', ())
  shown = Task('deduction', 'def f(x):\n  return x', (('1', '1'),))
  own = 'def f(x):\n  return len(g_0(x))'
  whole = Task('deduction', composite.join(own, [given]), (('3', '1'),),
               extra={'original_snippet': own})
  alone = Task('deduction', own, (('3', '1'),))
  for name in ('complexity', 'halstead', 'mean_edit_distance'):
    term = intrinsic.TERMS[name]
    assert term(whole, [shown, given], {}, False) == term(alone, [shown], {}, False)
  assert metrics.task_metrics([whole], [[shown, given]])['reference_distance'] == (
      metrics.task_metrics([alone], [[shown]])['reference_distance'])
