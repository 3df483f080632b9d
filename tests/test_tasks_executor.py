# SPDX-License-Identifier: Apache-2.0
"""Kinds with the real executor: what it accepts must verify against itself."""

import pytest

from absolute_zero_jax import tasks
from absolute_zero_jax.executor import Executor
from absolute_zero_jax.tasks import seed_files
from absolute_zero_jax.types import Job


@pytest.fixture(scope='module')
def executor():
  with Executor(workers=2, min_isolation='weak') as made:
    yield made


def _tasks(kind, proposals, executor):
  verdicts = executor.run([job for p in proposals for job in kind.validation_jobs(p)])
  made = [kind.to_task(p, [v], 0) for p, v in zip(proposals, verdicts)]
  return [task for task in made if not isinstance(task, str)]


def _accuracy(kind, task, answer, executor):
  return kind.accuracy(task, answer, executor.run(kind.checking_jobs(task, answer)))


@pytest.mark.parametrize('name', tasks.KINDS)
def test_the_zero_triplet_is_valid_and_verifies(name, executor):
  kind = tasks.get(name)
  task, = kind.seeds()
  proposal = tasks.Proposal(task.program, tuple(i for i, _ in task.cases), task.message)
  again, = _tasks(kind, [proposal], executor)
  assert (again.cases, again.key, again.shown) == (task.cases, task.key, task.shown)
  answer = task.program if name == 'induction' else task.output
  assert _accuracy(kind, task, answer, executor) == 1
  assert _accuracy(kind, task, 'def f(a): return 0' if name == 'induction' else '0', executor) == 0


def test_accepted_seeds_solve_themselves(shared_data, executor):
  folder = shared_data / 'azr_seeds'
  pairs = seed_files.read(folder / '7b_coder_seed_io.jsonl')[:40]
  for name in ('deduction', 'abduction'):
    kind = tasks.get(name)
    made = _tasks(kind, pairs, executor)
    assert len(made) >= 38
    for task in made[::4]:
      answer = task.output if name == 'deduction' else task.input
      assert _accuracy(kind, task, kind.parse_answer(answer), executor) == 1
  kind = tasks.get('induction')
  made = _tasks(kind, seed_files.read(folder / '7b_code_f_seed_io.jsonl')[:20], executor)
  assert len(made) >= 18
  assert all(_accuracy(kind, t, t.program, executor) == 1 for t in made)


@pytest.mark.parametrize(('program', 'given', 'status'), [
    ('def f(a):\n  return 1 // a', '0', 'error'),
    ('def f(a):\n  while a: pass\n  return a', '1', 'timeout'),
    ('import random\ndef f(a):\n  return a + random.random()', '1', 'rejected nondeterministic'),
    ('def f(a):\n  return hash(str(a))', '1', 'nondeterministic'),
    ('def f(a):\n  return lambda: a', '1', 'error'),
])
def test_what_is_no_task_says_why(program, given, status, executor):
  kind = tasks.get('deduction')
  verdicts = executor.run(kind.validation_jobs(tasks.Proposal(program, (given,))))
  assert kind.to_task(tasks.Proposal(program, (given,)), verdicts, 0) in status


def test_what_one_input_leaves_does_not_reach_the_next(executor):
  """Else an answer may read its outputs off a list, whatever the inputs are."""
  listed = 'out = iter([1, 2, 3])\ndef f(x):\n  return next(out)'
  counted = 'n = 0\ndef f(x):\n  global n\n  n += 1\n  return n'
  for program in (listed, counted):
    [verdict] = executor.run([Job('run', program, ('7', '8', '9'))])
    assert [r.output for r in verdict.runs] == ['1', '1', '1']


@pytest.mark.parametrize('program, want', [
    # A module outlives the program that is loaded anew.
    ('import math\ndef f(x):\n  try: math.n += 1\n  except AttributeError: math.n = 1\n'
     '  return [10, 20, 30][math.n - 1]', ['10', '10', '10']),
    ('import keyword\ndef f(x):\n  keyword.kwlist.append(x)\n  return keyword.kwlist[35:]',
     ['[12]', '[7]', '[8]']),
    ('from decimal import Decimal, getcontext\ndef f(x):\n  if x > 9:\n    getcontext().prec = 6\n'
     '  return str(Decimal(1) / Decimal(x))[:9]', ["'0.0833333'", "'0.1428571'", "'0.125'"]),
], ids=['attribute', 'list', 'context'])
def test_what_one_input_leaves_in_a_module_does_not_reach_the_next(executor, program, want):
  [verdict] = executor.run([Job('run', program, ('12', '7', '8'))])
  assert [run.output for run in verdict.runs] == want


def test_of_a_program_that_imports_and_dies_a_few_processes_are_enough(executor):
  program = 'import math\ndef f(x):\n  while x < 5: pass\n  return x'
  [verdict] = executor.run([Job('run', program, ('9', '1', '2', '3', '8'), timeout_s=0.1)])
  assert [run.status.value for run in verdict.runs] == ['ok', *['timeout'] * 4]
  assert [run.error for run in verdict.runs][-1] == 'not run' and verdict.wall_s < 2
