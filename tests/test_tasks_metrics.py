# SPDX-License-Identifier: Apache-2.0
"""Text and program metrics, by hand."""

import pytest

from absolute_zero_jax.tasks import metrics
from absolute_zero_jax.types import Task

SIMPLE = 'def f(a):\n  return a'
LOOP = ('def f(a):\n  # first\n  # then\n  for x in a:\n    if x and a:\n      return x\n\n'
        '  return a')


@pytest.mark.parametrize(('response', 'found'), [
    ('Wait, that is wrong.', True), ('let me double-check', True), ('I should re-evaluate', True),
    ('the awaited result', False), ('', False), ('It returns 3.', False)])
def test_reflection_words(response, found):
  assert metrics.reflects(response) == found


def test_program_numbers():
  assert metrics.program_lines(LOOP) == 7
  assert metrics.comment_share(LOOP) == 2 / 7
  assert metrics.comment_share('def f(:\n"') == 0
  assert metrics.has_comment_plan(LOOP) and not metrics.has_comment_plan(SIMPLE)
  assert metrics.branches(SIMPLE) == 1
  assert metrics.branches(LOOP) == 4                     # 1 + for + if + and
  assert metrics.branches('no python (') == metrics.nodes('no python (') == 0


def test_distance_is_a_distance():
  assert metrics.distance(SIMPLE, SIMPLE) == 0
  assert metrics.distance(SIMPLE, 'def f(b):\n  return b') == 0
  assert 0 < metrics.distance(SIMPLE, LOOP) == metrics.distance(LOOP, SIMPLE) <= 1
  assert metrics.distance(SIMPLE, '(') == 0


def test_diversity():
  assert metrics.diversity([SIMPLE]) == 0
  assert metrics.diversity([SIMPLE] * 3) == 0
  assert metrics.diversity([SIMPLE, LOOP]) == metrics.distance(SIMPLE, LOOP)
  assert metrics.distinct_share(['a', 'a', 'b', 'b']) == 0.5
  assert metrics.distinct_share([]) == 0


def test_task_metrics():
  tasks = [Task('deduction', SIMPLE, (('1', '1'),)), Task('deduction', LOOP, (('[1]', "'a'"),))]
  found = metrics.task_metrics(tasks, [[tasks[0]], []])
  assert found['program_lines'] == 4.5 and found['output_types'] == 2
  assert found['reference_distance'] == 0
  assert found['comment_plan_share'] == 0.5
  assert metrics.task_metrics([]) == {}


def test_type_metrics():
  found = metrics.type_metrics({'outputs': {'int': {'1': 3, '2': 1}, 'str': {'a': 4}}})
  assert found == {'outputs/types': 2, 'outputs/values': 3, 'outputs/total': 8,
                   'outputs/int/values': 2, 'outputs/int/total': 4,
                   'outputs/str/values': 1, 'outputs/str/total': 4}
