# SPDX-License-Identifier: Apache-2.0
"""Whether an output depends on the input is found by running changed inputs beside the proposed."""

import ast
import time

import pytest

from absolute_zero_jax import executor, tasks
from absolute_zero_jax.tasks import probes
from absolute_zero_jax.types import Run, Status, Verdict


@pytest.fixture(scope='module')
def service():
  with executor.start(workers=2, min_isolation='weak', validate_timeout_s=0.5) as made:
    yield made


def _task(service, source, given, kind='deduction', count=3):
  made = tasks.get(kind, probes=count)
  proposal = tasks.Proposal(source, given if isinstance(given, tuple) else (given,))
  return made.to_task(proposal, service.run(made.validation_jobs(proposal)), 1)


@pytest.mark.parametrize('given', [
    '3', '-5, 20', "'abc', [1, 2]", "{'a': 3}, True", '(1.5,)', "[[1, 2], 'a']", "''", '[]', '{1}'])
def test_changed_inputs_keep_their_types(given):
  found = probes.inputs(given, 3)
  assert found and len(set(found)) == len(found) and given not in found
  shape = [type(v) for v in ast.literal_eval(f'({given},)')]
  assert all([type(v) for v in ast.literal_eval(f'({x},)')] == shape for x in found)
  assert probes.inputs(given, 0) == ()


@pytest.mark.parametrize('given', ['int(3)', '1 + 2', "'a' * 3", 'list(range(4))'])
def test_an_input_that_must_be_worked_out_is_changed_too(given):
  found = probes.inputs(given, 3)
  assert len(found) > 1 and all(ast.literal_eval(x) is not None for x in found)


@pytest.mark.parametrize('given', ['None', 'a=3', 'f(3)', '(' * 200, ''])
def test_inputs_that_cannot_be_changed_are_left_alone(given):
  assert probes.inputs(given, 3) == ()


@pytest.mark.parametrize('source, given, independent', [
    ('def f(a):\n  y = 4 // 2\n  b = a\n  return y', '3', True),
    ('def f(a):\n  return a', '3', False),
    ('def f(a):\n  return a * 0 + 7', '3', True),
    ('def f(a):\n  return [a][0] is a', "'abc'", True),
    ('def f(a, b):\n  return len(b)', '1, [2, 3]', False),
    # A changed input on which it fails says nothing, and spoils nothing.
    ('def f(a):\n  return 10 // (a - 4)', '3', False),
    ('def f(a):\n  return {3: 5}[a]', '3', False),
    ('def f(a):\n  while a != 3: pass\n  return 5', '3', False),
])
def test_the_executor_decides(service, source, given, independent):
  task = _task(service, source, given)
  assert task.independent == independent
  assert task.cases[0][0] == given and len(task.cases) == 1
  assert not _task(service, source, given, count=0).independent


def test_a_proposal_that_fails_on_its_own_input_is_no_task(service):
  assert _task(service, 'def f(a):\n  return {4: 5, 1: 5}[a]', '3') == 'error'


def test_induction_looks_at_its_own_inputs(service):
  inputs = ('1', '2', '3', '4')
  same = _task(service, 'def f(a):\n  return 5 - a + a', inputs, 'induction')
  assert same.independent and len(same.cases) == 4
  assert not _task(service, 'def f(a):\n  return a > 3', inputs, 'induction').independent


def test_errors_are_not_probed(service):
  task = _task(service, 'def f(a):\n  return 5', '3', 'error')
  assert not task.independent and task.output == 'NoError'


def test_an_integer_that_grows_too_long_is_not_changed():
  assert len(probes.inputs('9' * 4200, 3)) == 3 and probes.inputs('9' * 4300, 3) == ()


def test_one_value_says_nothing():
  ok, bad = Run(Status.OK, '1', '5'), Run(Status.ERROR, '2')
  assert not probes.independent([ok, bad]) and probes.independent([ok, bad, ok])
  kind = tasks.get('deduction', probes=1)
  verdicts = Verdict(Status.OK, (ok,)), Verdict(Status.ERROR, (bad,))
  task = kind.to_task(tasks.Proposal('def f(a): return 5', ('1',)), verdicts, 1)
  assert task.cases == (('1', '5'),) and not task.independent


@pytest.mark.parametrize('source', [
    # Four calls of it take longer than the limit, one does not.
    'def f(x):\n  s = 0\n  while s < {n}:\n    s += 1\n  return s + x',
    'from decimal import Decimal, getcontext\ndef f(x):\n  if x > 7:\n    getcontext().prec = 6\n'
    '  return str(Decimal(1) / Decimal(x))',
], ids=['time', 'state'])
def test_probes_do_not_make_a_proposal_invalid(service, source):
  steps, scope = 5 * 10**6, {}
  exec(source.replace('{n}', str(steps)), scope)         # written here
  started = time.process_time()
  scope['f'](7)
  per_s = steps / max(time.process_time() - started, 1e-3)
  source = source.replace('{n}', str(int(0.35 * 0.5 * per_s)))
  task = _task(service, source, '7')
  assert not isinstance(task, str), task
  assert task.cases == _task(service, source, '7', count=0).cases
