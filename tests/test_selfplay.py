# SPDX-License-Identifier: Apache-2.0
"""One iteration with a scripted model and the real executor: who gets which reward, and why."""

import collections
from concurrent import futures
import contextlib
import random
import threading
import time
import types

import example_kind
import numpy as np
import pytest

from absolute_zero_jax import buffer as buffer_lib
from absolute_zero_jax import phases, rewards, selfplay, summary, tasks, tokenizer
from absolute_zero_jax.executor import Executor
from absolute_zero_jax.sampler import Sample
from absolute_zero_jax.tasks import identity
from absolute_zero_jax.tasks import prompts as prompts_lib
from absolute_zero_jax.types import Role, Task

GOOD = ('<think>x</think><answer>```python\ndef f(x):\n  return x + %d\n```\n'
        '```input\n2\n```</answer>')
LOOP = GOOD.replace('return x + %d', 'while x: pass')
RANDOM = GOOD.replace('return x + %d', 'return id(object()) + x')


@pytest.fixture(scope='module')
def executor():
  with Executor(validate_timeout_s=0.5, score_timeout_s=1.0) as e:
    yield e


class Script:
  """A model that answers by rule, and finishes its rows in an order of its own."""

  def __init__(self, proposals, answers, shuffle_seed=0):
    self.proposals, self.answers = proposals, answers
    self.tokenizer = tokenizer.load('bytes')
    self.shuffle = random.Random(shuffle_seed)
    self.prompts = {Role.PROPOSE: [], Role.SOLVE: []}

  def sample(self, role, prompt_ids, counts, stop_fn, on_finish, more=None):
    """With `more`, answers follow the proposals, and three rows end between two looks."""
    asked, rows, samples = [], [], {}

    def ask(role, pairs):
      self.prompts[role].append([self.tokenizer.decode(ids) for ids, _ in pairs])
      new = [(len(asked) + i, n) for i, (_, count) in enumerate(pairs) for n in range(count)]
      asked.extend((role, self.tokenizer.decode(ids), count) for ids, count in pairs)
      self.shuffle.shuffle(new)
      rows.extend(new)

    def end(i, n):
      role, prompt, _ = asked[i]
      text = (self.proposals[i % len(self.proposals)] if role == Role.PROPOSE
              else self.answers(prompt, n))
      ids = tuple(self.tokenizer.encode(text))
      assert stop_fn is None or stop_fn(i, ids) in (None, len(ids))
      samples[i, n] = Sample(i, n, ids, (-1.0,) * len(ids), (-1.0,) * len(ids), 'stop')
      on_finish(samples[i, n])

    ask(role, list(zip(prompt_ids, counts)))
    while more is not None or rows:
      further = None if more is None else more()
      more = None if further is None else more
      if further:
        ask(Role.SOLVE, further)
      for _ in range(min(3, len(rows)) if more is not None else len(rows)):
        end(*rows.pop(0))
    return [[samples[i, n] for n in range(count)] for i, (_, _, count) in enumerate(asked)]


def _play(script, executor, *, steps=1, kinds=('deduction',), probes=0,
          rule='strict', **changes):
  tools = selfplay.Tools(
      kinds=[tasks.get(k, probes=probes) for k in kinds],
      prompts=prompts_lib.load('think', rule=rule), tokenizer=script.tokenizer,
      sample=script.sample, submit=executor.submit, rewards=rewards.get(),
      shape=lambda task: identity.shape(task.program))
  rules = selfplay.Rules(**dict(
      batch=4, mc_samples=4, references=2, solve_source='fresh', draw='max_new', recent_steps=1,
      reference_draw='uniform', keep='all', refuse_duplicates=True, show_references=True,
      train_propose=True, mc_use='measure', max_prompt_tokens=20000) | changes)
  buffer = buffer_lib.TaskBuffer(kinds)
  for kind in tools.kinds:
    buffer.extend(kind.seeds())
  results = [selfplay.iterate(step, buffer, tools, rules, np.random.default_rng([0, step]),
                              timer=lambda *_, **__: contextlib.nullcontext())
             for step in range(1, steps + 1)]
  return results, buffer


def _answer(*right):
  """Sample n of a task answers x + 1 correctly where right[n]; single answers use right[0]."""
  def answers(prompt, n):
    output = '3' if right[n % len(right)] else '99'
    return f'<think>.</think><answer>```output\n{output}\n```</answer>'
  return answers


def test_each_proposal_gets_its_status_and_reward(executor):
  script = Script([GOOD % 1, LOOP, RANDOM, 'no tags at all'], _answer(True, True, True, False))
  (result,), buffer = _play(script, executor)
  assert [a.status for a in result.proposals] == ['ok', 'timeout', 'nondeterministic', 'format']
  rewards_ = [e.reward for e in result.episodes if e.role == Role.PROPOSE]
  # p = 3/4 -> learnability 1/4; the others are no tasks.
  assert rewards_ == [0.25, -1.0, -1.0, -1.0]
  assert buffer.sizes() == {'deduction': 2}                 # the zero triplet and the new one
  assert buffer.tasks('deduction')[1].cases == (('2', '3'),)


@pytest.mark.parametrize('rule, rate, wanted', [('azr', 1.0, 0.0), ('strict', 0.5, 0.5)])
def test_the_reference_measures_without_the_format_test(executor, rule, rate, wanted):
  """Two right answers in four have a word between thinking and answer."""
  def answers(prompt, n):
    return _answer(True)(prompt, n).replace('</think>', '</think> so ' if n % 2 else '</think>')

  (result,), _ = _play(Script([GOOD % 1], answers), executor, rule=rule)
  assert result.proposals[0].solve_rate == rate
  assert [e.reward for e in result.episodes if e.role == Role.PROPOSE][0] == wanted
  assert {a.status for a in result.measured} == {'ok', 'format'}
  measured = [e.reward for e in result.episodes if e.role == Role.SOLVE and not e.train]
  assert sorted(measured) == [-1.0, -1.0, 1.0, 1.0]


def test_a_kind_may_have_a_batch_of_its_own(executor):
  script = Script([GOOD % n for n in range(5)], _answer(True))
  (result,), _ = _play(script, executor, kinds=('deduction', 'abduction'), batch=2,
                       kind_batch={'deduction': 5})
  counts = collections.Counter(a.kind.name for a in result.proposals)
  assert counts == {'deduction': 5, 'abduction': 2}
  counts = collections.Counter(a.kind.name for a in result.solved)
  assert counts == {'deduction': 5, 'abduction': 2}


@pytest.mark.parametrize('right, learnable', [((True,) * 4, 0.0), ((False,) * 4, 0.0),
                                              ((True, False, False, False), 0.75)])
def test_learnability_is_one_minus_solve_rate_and_zero_at_both_ends(executor, right, learnable):
  (result,), _ = _play(Script([GOOD % 1], _answer(*right)), executor, batch=1)
  assert result.proposals[0].solve_rate == sum(right) / 4
  assert result.episodes[0].reward == learnable


def test_a_repeated_proposal_is_refused_and_earns_nothing(executor):
  script = Script([GOOD % 1, GOOD % 1, (GOOD % 1).replace('x + 1', 'x + 1  # again'), GOOD % 5],
                  _answer(True))
  (result,), buffer = _play(script, executor)
  assert [a.status for a in result.proposals] == ['ok', 'duplicate', 'duplicate', 'ok']
  assert result.episodes[1].reward == -1.0
  (result,), _ = _play(script, executor, refuse_duplicates=False)
  assert [a.status for a in result.proposals] == ['ok'] * 4


def test_programs_alike_up_to_constants_and_names_are_refused_beyond_the_limit(executor):
  renamed = (GOOD % 7).replace('f(x)', 'f(y)').replace('return x', 'return y')
  assert renamed != GOOD % 7
  script = Script([GOOD % 1, renamed, (GOOD % 1).replace('+', '-'), (GOOD % 1).replace('1', 'x')],
                  _answer(True))
  for limit, status in ((0, 'ok'), (1, 'alike'), (2, 'ok')):
    (result,), buffer = _play(script, executor, max_alike=limit)
    assert [a.status for a in result.proposals] == ['ok', status, 'ok', 'ok']
    assert (result.episodes[1].reward == -1.0) == (status == 'alike')
    assert len(buffer.tasks('deduction')) == 4 + (status == 'ok')


def test_an_output_that_does_not_depend_on_the_input_is_seen_and_refused_on_request(executor):
  flat = (GOOD % 1).replace('return x + 1', 'return [x, 7][1]')
  script = Script([GOOD % 1, flat, GOOD % 5, 'no tags'], _answer(True, True, True, False))
  for refuse, status, reward in ((False, 'ok', 0.0), (True, 'independent', -1.0)):
    (result,), buffer = _play(script, executor, probes=3, refuse_independent=refuse)
    assert [a.status for a in result.proposals] == ['ok', status, 'ok', 'format']
    assert result.episodes[1].reward == reward
    assert len(buffer.tasks('deduction')) == 3 + (not refuse)
    numbers = summary.scalars(result)
    assert numbers['propose_deduction/independent_share'] == 0.25
    assert numbers['propose/independent_share'] == 0.25
    for how in ('one_minus', 'inverse', 'variance'):
      rates = [a.solve_rate for a in result.proposals if a.status == 'ok']
      assert summary.scalars(result, learnability=how)['propose_deduction/learnability'] == (
          pytest.approx(np.mean([rewards.learnability(r, how) for r in rates])))
  (result,), _ = _play(script, executor, refuse_independent=True)       # nothing was tested
  assert result.proposals[1].status == 'ok'


def test_results_do_not_depend_on_the_order_of_completion(executor):
  runs = [_play(Script([GOOD % 1, GOOD % 2, LOOP, GOOD % 3], _answer(True, False), seed), executor,
                steps=2, kinds=('deduction', 'abduction')) for seed in (0, 1)]
  (a, buffer_a), (b, buffer_b) = runs
  assert [r.episodes for r in a] == [r.episodes for r in b]
  assert buffer_a.state() == buffer_b.state()


@pytest.mark.parametrize('changes', [
    {}, {'mc_use': 'reuse', 'solve_samples': 2}, {'mc_use': 'train', 'solve_source': 'lagged'},
    {'keep': 'non_one'}, {'solver_only_steps': 1}], ids=str)
def test_overlapped_phases_give_what_phases_in_turn_give(changes, executor):
  """Whatever is validated when, and in whatever order rows end: the same episodes and buffer."""
  def play(seed, **more):
    script = Script([GOOD % 1, RANDOM, GOOD % 2, 'no tags', GOOD % 3, GOOD % 4],
                    _answer(True, False, True), seed)
    results, memory = _play(script, executor, steps=2, batch=6, mc_samples=3,
                            **more, **changes)
    return [r.episodes for r in results], memory.state(), script.prompts
  episodes, state, prompts = play(0)
  for overlap, seed in ((1, 3), (4, 4)):
    found = play(seed, overlap=overlap)
    assert found[:2] == (episodes, state)
    calls = [len(found[2][role]) for role in (Role.PROPOSE, Role.SOLVE)]
    assert calls[0] == len(prompts[Role.PROPOSE]) and calls[1] > len(prompts[Role.SOLVE]), found[2]


def test_what_decodes_together_does_not_depend_on_the_executors_timing(executor):
  class Late:
    """The executor, some of whose verdicts come late."""
    def __init__(self, seed):
      self.random = random.Random(seed)

    def submit(self, job):
      inner, outer = executor.submit(job), futures.Future()
      threading.Timer(self.random.choice((0, 0, 0.2)),
                      lambda: outer.set_result(inner.result())).start()
      return outer
  runs = []
  for seed in (0, 1):
    script = Script([GOOD % n for n in range(6)], _answer(True, False))
    _play(script, Late(seed), batch=6, overlap=1)
    runs.append(script.prompts)
  assert runs[0] == runs[1] and len(runs[0][Role.SOLVE]) == 2


def test_of_equal_proposals_in_flight_one_is_valid(executor):
  (result,), memory = _play(Script([GOOD % 1], _answer(True, False)), executor, overlap=2)
  assert sorted(a.status for a in result.proposals) == ['duplicate'] * 3 + ['ok']
  assert [a.place for a in result.proposals] == [0, 1, 2, 3]
  assert memory.sizes() == {'deduction': 2} and len(result.measured) == 4


def test_fresh_solves_this_iterations_tasks_lagged_the_last_ones(executor):
  for source, born in (('fresh', [1, 2]), ('lagged', [0, 1])):
    script = Script([GOOD % 1], _answer(True))
    script.proposals = [GOOD % n for n in range(1, 5)]
    rounds = []
    original = script.sample

    def sample(role, *args, original=original, script=script, rounds=rounds):
      if role == Role.PROPOSE:
        rounds.append(0)
        script.proposals = [GOOD % (10 * len(rounds) + n) for n in range(4)]
      return original(role, *args)
    script.sample = sample
    results, _ = _play(script, executor, steps=2, solve_source=source)
    assert [{a.task.born_step for a in r.solved} for r in results] == [{b} for b in born], source


def test_monte_carlo_answers_train_only_on_request(executor):
  for use, count in (('measure', 2), ('train', 2 + 4)):
    (result,), _ = _play(Script([GOOD % 1], _answer(True, False)), executor, batch=1, mc_use=use)
    assert sum(e.train for e in result.episodes) == count, use
    mc = [e for e in result.episodes if e.role == Role.SOLVE][1:]
    assert len({e.group for e in mc}) == 1                  # one baseline for all answers


def test_extremes_stay_out_of_the_buffer_on_request(executor):
  for keep, right, size in (('all', (True,), 2), ('non_one', (True,), 1), ('non_one', (False,), 2),
                            ('non_extremes', (False,), 1)):
    _, buffer = _play(Script([GOOD % 1], _answer(*right)), executor, batch=1, keep=keep)
    assert buffer.sizes()['deduction'] == size, (keep, right)


def test_a_prompt_budget_drops_references_then_names_the_field(executor):
  script = Script([GOOD % 1], _answer(True))
  _play(script, executor, batch=1)
  needed = len(script.tokenizer.encode(script.prompts[Role.PROPOSE][0][0]))
  _play(Script([GOOD % 1], _answer(True)), executor, batch=1, max_prompt_tokens=needed - 1)
  with pytest.raises(ValueError, match='max_prompt_tokens=50 is too small'):
    _play(Script([GOOD % 1], _answer(True)), executor, batch=1, max_prompt_tokens=50)


WAIT = phases.Rules(**dict.fromkeys(
    ('batch', 'mc_samples', 'references', 'solve_source', 'draw', 'reference_draw', 'recent_steps',
     'keep', 'refuse_duplicates', 'show_references', 'train_propose', 'mc_use',
     'max_prompt_tokens')), deadline_s=0.3)


def test_a_verdict_may_wait_as_long_as_others_come():
  pending = [futures.Future() for _ in range(5)]
  def finish():
    for future in pending:
      time.sleep(0.2)
      future.set_result('verdict')
  with futures.ThreadPoolExecutor(1) as pool:
    pool.submit(finish)
    assert phases._result(pending[-1], WAIT, pending) == 'verdict'         # after a second
    pending.append(futures.Future())
    with pytest.raises(RuntimeError, match='no verdict within'):
      phases._result(pending[-1], WAIT, pending)


def test_a_timeout_of_the_executors_own_is_no_wait():
  future = futures.Future()
  future.set_exception(TimeoutError('no answer of the service'))
  with pytest.raises(TimeoutError, match='no answer of the service'):
    phases._result(future, WAIT, [futures.Future()])


EQUATION = '<think>x</think><answer>(1 + 3) * 7</answer>'
CASE = (('1', '2'),)


@pytest.mark.parametrize('method, given, words', [
    ('to_task', None, "must give a Task of kind 'equations'"),
    ('to_task', Task('deduction', '', CASE, key='k'), "must give a Task of kind 'equations'"),
    ('to_task', Task('equations', '', CASE), 'with a key'),
    ('to_task', Task('equations', '', (), key='k'), 'at least one case'),
    ('to_task', Task('equations', '', CASE, key='k', extra={'x': {1}}), 'JSON can hold'),
    ('parse_answer', ['1'], 'must give text, or None'),
    ('accuracy', None, 'must give a number in'), ('accuracy', 3.0, 'must give a number in'),
    ('accuracy', float('nan'), 'must give a number in')])
def test_what_a_kind_of_ones_own_gives_is_looked_at(method, given, words, monkeypatch):
  monkeypatch.setattr(example_kind.Equations, method, lambda *_: given)
  with pytest.raises(ValueError, match=f"the kind 'equations': {method} gave .*{words}"):
    _play(Script([EQUATION], lambda *_: EQUATION), types.SimpleNamespace(submit=None),
          kinds=('example_kind:Equations',))
