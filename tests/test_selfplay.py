# SPDX-License-Identifier: Apache-2.0
"""One iteration with a scripted model and the real executor: who gets which reward, and why."""

import contextlib
import random

import numpy as np
import pytest

from absolute_zero_jax import buffer as buffer_lib
from absolute_zero_jax import rewards, selfplay, summary, tasks, tokenizer
from absolute_zero_jax.executor import Executor
from absolute_zero_jax.sampler import Sample
from absolute_zero_jax.tasks import prompts as prompts_lib
from absolute_zero_jax.types import Role

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

  def sample(self, role, prompt_ids, counts, stop_fn, on_finish):
    self.prompts[role].append([self.tokenizer.decode(p) for p in prompt_ids])
    rows = [(i, n) for i, count in enumerate(counts) for n in range(count)]
    texts = {}
    for i, n in rows:
      prompt = self.tokenizer.decode(prompt_ids[i])
      texts[i, n] = (self.proposals[i % len(self.proposals)] if role == Role.PROPOSE
                     else self.answers(prompt, n))
    samples = {}
    self.shuffle.shuffle(rows)
    for i, n in rows:
      ids = tuple(self.tokenizer.encode(texts[i, n]))
      samples[i, n] = Sample(i, n, ids, (-1.0,) * len(ids), (-1.0,) * len(ids), 'stop')
      on_finish(samples[i, n])
    return [[samples[i, n] for n in range(count)] for i, count in enumerate(counts)]


def _play(script, executor, *, steps=1, kinds=('deduction',), probes=0, **changes):
  tools = selfplay.Tools(
      kinds=[tasks.get(k, probes=probes) for k in kinds], prompts=prompts_lib.load('think'),
      tokenizer=script.tokenizer, sample=script.sample, submit=executor.submit,
      rewards=rewards.get())
  rules = selfplay.Rules(**dict(
      batch=4, mc_samples=4, references=2, solve_source='fresh', draw='max_new', recent_steps=1,
      reference_draw='uniform', keep='all', refuse_duplicates=True, show_references=True,
      train_propose=True, mc_use='measure', max_prompt_tokens=20000) | changes)
  buffer = buffer_lib.TaskBuffer(kinds)
  for kind in tools.kinds:
    buffer.extend(kind.seeds())
  results = [selfplay.iterate(step, buffer, tools, rules, np.random.default_rng([0, step]),
                              timer=lambda phase: contextlib.nullcontext())
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
  (result,), _ = _play(script, executor, refuse_independent=True)       # nothing was tested
  assert result.proposals[1].status == 'ok'


def test_results_do_not_depend_on_the_order_of_completion(executor):
  runs = [_play(Script([GOOD % 1, GOOD % 2, LOOP, GOOD % 3], _answer(True, False), seed), executor,
                steps=2, kinds=('deduction', 'abduction')) for seed in (0, 1)]
  (a, buffer_a), (b, buffer_b) = runs
  assert [r.episodes for r in a] == [r.episodes for r in b]
  assert buffer_a.state() == buffer_b.state()


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
