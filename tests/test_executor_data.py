# SPDX-License-Identifier: Apache-2.0
"""Real programs: CRUXEval in both directions, and the reference's seeds, each loss named."""

import collections
import json

import pytest

from absolute_zero_jax.executor import Executor
from absolute_zero_jax.types import Job, Status


def _rows(path):
  return [json.loads(line) for line in path.open()]


def test_cruxeval_golds_are_accepted_and_verify_in_both_directions(shared_data):
  rows = _rows(shared_data / 'cruxeval' / 'cruxeval_even.jsonl')
  with Executor() as executor:
    proposed = executor.run(
      [Job('validate', r['code'], (r['input'],), (r['output'],)) for r in rows]
    )
    left = {
      r['id'] for r, v in zip(rows, proposed) if not (v.status is Status.OK and v.runs[0].matches)
    }
    # A global's name and two lambdas; `range(100, 120)` (522) is a value here.
    assert left == {'sample_258', 'sample_344', 'sample_364'}
    kept = [(r, v) for r, v in zip(rows, proposed) if r['id'] not in left]
    answers = executor.run(
      [Job('compare', inputs=(r['output'],), expected=(v.runs[0].output,)) for r, v in kept]
    )
    inputs = executor.run(
      [
        Job('run', v.program, (r['input'], v.runs[0].input), (v.runs[0].output,) * 2)
        for r, v in kept
      ]
    )
  assert all(v.runs[0].matches for v in answers) and len(answers) == 397
  assert all(run.matches for v in inputs for run in v.runs)


def reason(run, recorded):
  """Why a recorded value was not reproduced; '' if it was."""
  if run.status is Status.OK:
    if run.matches:
      return ''
    if recorded == '':
      return 'recorded value empty'
    return (
      'recorded value truncated' if len(recorded) >= 390 and '...' in recorded else 'another value'
    )
  if run.error.startswith('output: type:'):
    return 'recorded value of an unsupported type'
  if run.error.startswith('output: too'):
    return 'output too large'
  if run.error.startswith('import ') or run.error == 'name open':
    return 'module not offered'
  if run.status is Status.NONDETERMINISTIC:
    return 'order of a set, or an address'
  if run.error.startswith('input: '):
    return 'input is no constant'
  return 'recorded value empty' if recorded == '' else f'{run.status.value} {run.error}'


def reproduce(executor, rows):
  """(number of recorded values, reasons of those not reproduced, verdicts)."""
  jobs = [
    Job(
      'validate',
      r['snippet'],
      *(
        (tuple(r['inputs']), tuple(r['outputs']))
        if 'inputs' in r
        else ((r['input'],), (r['output'],))
      ),
    )
    for r in rows
  ]
  verdicts = executor.run(jobs)
  reasons = [
    reason(run, job.expected[i]) for job, v in zip(jobs, verdicts) for i, run in enumerate(v.runs)
  ]
  return len(reasons), collections.Counter(r for r in reasons if r), verdicts


_NAMED = {
  'recorded value empty',
  'recorded value truncated',
  'recorded value of an unsupported type',
  'output too large',
  'module not offered',
  'order of a set, or an address',
  'input is no constant',
  'error NameError',
}


@pytest.mark.parametrize(
  'pattern, share, tasks',
  [
    ('*seed_io.jsonl', 0.95, 768),
    pytest.param('*code_f*.jsonl', 0.96, 768, marks=pytest.mark.slow),
  ],
)
def test_seed_tasks_are_reproduced_and_verify_themselves(shared_data, pattern, share, tasks):
  rows = [
    row
    for path in sorted((shared_data / 'azr_seeds').glob(pattern))
    if ('code_f' in path.name) == ('code_f' in pattern)
    for row in _rows(path)
  ]
  assert len(rows) == tasks
  with Executor() as executor:
    count, reasons, verdicts = reproduce(executor, rows)
    print(f'{pattern}: {count - sum(reasons.values())} of {count}', dict(reasons))
    assert set(reasons) <= _NAMED
    assert 1 - sum(reasons.values()) / count >= share
    good = [(v, run) for v in verdicts for run in v.runs if run.status is Status.OK]
    golds = executor.run(
      [Job('compare', inputs=(run.output,), expected=(run.output,)) for _, run in good]
    )
    assert all(v.runs[0].matches for v in golds)
    again = executor.run(
      [
        Job(
          'run',
          v.program,
          tuple(r.input for r in v.runs if r.input and r.output),
          tuple(r.output for r in v.runs if r.input and r.output),
        )
        for v in verdicts
        if v.program
      ]
    )
    assert all(run.matches for v in again for run in v.runs)
