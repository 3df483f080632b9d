# SPDX-License-Identifier: Apache-2.0
"""The task buffer: draws, eviction, counters, and a state that comes back exactly."""

import json

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from absolute_zero_jax import buffer, tasks
from absolute_zero_jax.types import Task

KINDS = ('deduction', 'abduction', 'induction')


def _task(number, step=1, kind='deduction', cases=None):
  cases = cases or ((str(number), repr(str(number))),)
  return Task(kind, f'def f(a):\n  return a + {number}', cases, born_step=step,
              key=f'{kind}{number}')


def _filled(steps, **options):
  made = buffer.TaskBuffer(KINDS, **options)
  for number, step in enumerate(steps):
    made.add(_task(number, step))
  return made


def _rng(seed=0):
  return np.random.default_rng(seed)


def test_the_zero_triplet_seeds_every_kind():
  made = buffer.TaskBuffer(KINDS)
  seeds = [task for kind in KINDS for task in tasks.get(kind).seeds()]
  made.extend(seeds)
  assert made.sizes() == {'deduction': 1, 'abduction': 1, 'induction': 1}
  assert made.tasks('deduction')[0].cases == (("'Hello world'", "'Hello world'"),)
  item = made.tasks('induction')[0]
  assert (len(item.cases), item.shown) == (6, 3)
  made.extend(seeds)
  assert len(made) == 3


def test_equal_keys_are_stored_once():
  made = _filled([1, 1])
  assert not made.add(_task(0))
  assert made.sizes()['deduction'] == 2
  assert 'deduction0' in made and 'abduction0' not in made


@pytest.mark.parametrize('bad', [Task('deduction', 'x', (('1', '1'),)),
                                 Task('deduction', 'x', (), key='k')])
def test_a_task_needs_a_key_and_a_case(bad):
  with pytest.raises(ValueError, match='key and a case'):
    buffer.TaskBuffer().add(bad)


def test_a_full_ring_drops_the_oldest():
  made = _filled(range(1, 8), capacity=3)
  assert [t.born_step for t in made.tasks('deduction')] == [5, 6, 7]
  assert made.add(_task(0, 8))          # its key left with it


def test_a_reservoir_keeps_every_task_with_equal_chance():
  kept = np.zeros(20)
  for seed in range(400):
    made = _filled(range(1, 21), capacity=5, eviction='reservoir', seed=seed)
    kept[[t.born_step - 1 for t in made.tasks('deduction')]] += 1
  assert kept.sum() == 400 * 5
  # 100 expected each, standard deviation 8.7; a ring gives 0 for the first 15.
  assert np.abs(kept - 100).max() < 40


def test_a_reservoir_of_one_keeps_the_first_of_two_half_of_the_time():
  kept = [_filled([1, 1], capacity=1, eviction='reservoir', seed=seed).tasks('deduction')[0].key
          for seed in range(200)]
  assert 70 < kept.count('deduction0') < 130


def test_reservoirs_of_kinds_choose_by_themselves():
  made = buffer.TaskBuffer(capacity=5, eviction='reservoir')
  for number in range(60):
    made.extend(_task(number, kind=kind) for kind in KINDS[:2])
  kept = [[task.program for task in made.tasks(kind)] for kind in KINDS[:2]]
  assert kept[0] != kept[1]


def test_max_new_takes_new_ones_first_and_repeats_nothing():
  made = _filled([0] * 5 + [3] * 2 + [4] * 2)
  drawn = made.draw('deduction', _rng(), 6, step=5)
  assert sorted(t.born_step for t in drawn)[-2:] == [4, 4]
  assert sum(t.born_step == 4 for t in drawn) == 2
  assert len({t.key for t in drawn}) == 6
  wide = made.draw('deduction', _rng(), 4, step=5, recent_steps=2)
  assert sorted(t.born_step for t in wide) == [3, 3, 4, 4]


def test_fresh_tasks_count_as_new():
  made = _filled([0] * 5 + [5] * 3)
  drawn = made.draw('deduction', _rng(), 3, step=5)
  assert [t.born_step for t in drawn] == [5, 5, 5]


def test_half_new_takes_at_most_half():
  made = _filled([0] * 50 + [4] * 10)
  firsts = [sum(t.born_step == 4 for t in made.draw('deduction', _rng(s), 8, step=4,
                                                    strategy='half_new')) for s in range(50)]
  assert min(firsts) == 4
  assert np.mean(firsts) < 5.5          # 4 + 4 * 6/56 = 4.4; max_new gives 8


@pytest.mark.parametrize('strategy, least', [('max_new', 2), ('half_new', 2)])
def test_seeds_are_never_new(strategy, least):
  made = _filled([0] * 20 + [1, 1])
  for seed in range(8):
    drawn = made.draw('deduction', _rng(seed), 4, step=1, strategy=strategy, recent_steps=9)
    assert sum(task.born_step == 1 for task in drawn) >= least


def test_step_weights_new_tasks_and_never_seeds():
  made = _filled([0] * 10 + [1] * 10 + [9] * 10)
  drawn = made.draw('deduction', _rng(), 2000, step=10, strategy='step')
  steps = np.array([t.born_step for t in drawn])
  assert (steps == 0).sum() == 0
  assert abs((steps == 9).mean() - 0.9) < 0.03
  seeds = _filled([0] * 4).draw('deduction', _rng(), 8, step=1, strategy='step')
  assert len(seeds) == 8


def test_a_small_store_fills_the_batch_by_repeating():
  made = _filled([0, 1])
  drawn = made.draw('deduction', _rng(), 5, step=1)
  assert len(drawn) == 5 and {t.key for t in drawn} == {'deduction0', 'deduction1'}
  assert made.draw('abduction', _rng(), 5, step=1) == []


def test_references_join_kinds_and_can_prefer_new_ones():
  made = _filled([0] * 20 + [19] * 20)
  made.add(_task(0, kind='abduction'))
  assert len(made.references(('deduction', 'abduction'), _rng(), 100)) == 41
  assert len({t.key for t in made.references(('deduction',), _rng(), 6)}) == 6
  drawn = [t.born_step for s in range(200)
           for t in made.references(('deduction',), _rng(s), 1, 'step')]
  assert np.mean(np.array(drawn) == 19) > 0.88   # 20 / 21; uniform gives 0.5


@pytest.mark.parametrize('call', [
    lambda b: b.draw('deduction', _rng(), 1, step=1, strategy='newest'),
    lambda b: b.references(('deduction',), _rng(), 1, 'oldest'),
    lambda b: buffer.TaskBuffer(eviction='random'), lambda b: buffer.TaskBuffer(capacity=0),
    lambda b: buffer.TaskBuffer.from_state({'version': 99})])
def test_wrong_options_are_refused(call):
  with pytest.raises(ValueError, match='must be|version'):
    call(_filled([1]))


def test_counts_follow_tasks_in_and_out():
  made = buffer.TaskBuffer(KINDS, capacity=2)
  for number in range(3):
    task = _task(number, cases=((str(number % 2), "'a'"),))
    made.add(task)
    assert made.counts()['outputs'].get('str', {}).get("'a'", 0) == min(number, 1)
    made.count_types(task)
    made.count_types(task)              # counted once
  assert made.counts() == {'inputs': {'int': {'0': 1, '1': 1}}, 'outputs': {'str': {"'a'": 2}},
                           'errors': {}}
  made.extend(_task(number, cases=(("'x'", '1'),)) for number in (3, 4))
  assert made.counts() == {'inputs': {'str': {"'x'": 2}}, 'outputs': {'int': {'1': 2}},
                           'errors': {}}


def test_errors_are_counted_as_errors():
  made = buffer.TaskBuffer()
  made.extend([_task(1, kind='error', cases=(('1', 'ValueError'),))])
  assert made.counts()['errors'] == {'str': {'ValueError': 1}}
  assert made.counts()['outputs'] == {}


TASKS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 9), st.sampled_from(KINDS),
                           st.text(max_size=5)), max_size=40)


@settings(max_examples=100, deadline=None)
@given(TASKS, st.integers(1, 9), st.sampled_from(buffer.EVICTION), st.integers(0, 40))
def test_state_is_json_and_comes_back_exactly(rows, capacity, eviction, cut):
  tasks = [Task(kind, f'# {word}', ((repr(word), repr(n)), ('1', '2')), word, 1, step,
                f'{kind}{n}', {'w': [word]}) for n, step, kind, word in rows]
  whole = buffer.TaskBuffer(KINDS, capacity=capacity, eviction=eviction, seed=3)
  resumed = buffer.TaskBuffer(KINDS, capacity=capacity, eviction=eviction, seed=3)
  for number, task in enumerate(tasks):
    if number == cut:
      resumed = buffer.TaskBuffer.from_state(json.loads(json.dumps(resumed.state())))
    for one in (whole, resumed):
      one.add(task)
      if number % 3:
        one.count_types(task)
  resumed = buffer.TaskBuffer.from_state(json.loads(json.dumps(resumed.state())))
  assert resumed.state() == whole.state()
  assert resumed.counts() == whole.counts()
  for kind in KINDS:
    assert resumed.tasks(kind) == whole.tasks(kind)
    assert len(whole.tasks(kind)) <= capacity
    for strategy in buffer.SOLVER_STRATEGIES:
      draws = [b.draw(kind, _rng(5), 7, step=5, strategy=strategy) for b in (whole, resumed)]
      assert draws[0] == draws[1]
      assert len(draws[0]) == (7 if whole.tasks(kind) else 0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=30), st.integers(1, 30), st.integers(0, 7),
       st.sampled_from(('max_new', 'half_new', 'uniform_total')))
def test_a_draw_repeats_only_when_it_must(steps, count, step, strategy):
  made = _filled(steps)
  drawn = made.draw('deduction', _rng(), count, step=step, strategy=strategy)
  assert len(drawn) == count
  times = np.unique([t.key for t in drawn], return_counts=True)[1]
  assert len(times) == min(count, len(steps))
  assert times.max() - times.min() <= 1


def test_a_snapshot_stays_as_it_was():
  made = _filled([1, 1])
  for task in made.tasks('deduction'):
    made.count_types(task)
  taken, state, counts = made.snapshot(), made.state(), made.counts()
  made.extend([_task(7)])
  assert taken.state() == state and taken.counts() == counts != made.counts()
  taken.extend([_task(8), _task(9)])
  assert made.sizes()['deduction'] == 3 and made.state()['added'] == {'deduction': 3}


def test_references_of_one_kind_need_no_tuple():
  assert len(_filled([1, 1]).references('deduction', _rng(), 5)) == 2
