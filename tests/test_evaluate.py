# SPDX-License-Identifier: Apache-2.0
"""The held-out measure: scripted models get what they deserve; intervals and pass@k by hand."""

import dataclasses
import io
import json
import random

import jax
import numpy as np
import pytest

from absolute_zero_jax import (
  buffer,
  checkpoint,
  evaluate,
  executor,
  grammar,
  lexicon,
  metrics,
  selfplay,
  tasks,
  tokenizer,
)
from absolute_zero_jax import config as config_lib
from absolute_zero_jax.models import decoder, hf, loading
from absolute_zero_jax.sampler import Sample
from absolute_zero_jax.tasks import prompts as prompts_lib
from absolute_zero_jax.types import Task

KINDS = ('deduction', 'abduction', 'induction')
TOKENS = tokenizer.load(lexicon.FOLDER)
PROMPTS = prompts_lib.load('tiny')
ANSWER = PROMPTS.formats['solve_deduction'].after


@pytest.fixture(scope='module')
def service():
  with executor.start(workers=2, min_isolation='weak', score_timeout_s=0.5) as made:
    yield made


def _score(service, script, *, samples=4, count=4, todo=None):
  """Scores of a model that answers `script(task, sample number, temperature)`."""
  tools = selfplay.Tools(kinds=[tasks.get(k, cases=6) for k in KINDS], prompts=PROMPTS,
                         tokenizer=TOKENS, sample=None, submit=service.submit, rewards=None)
  todo = todo or evaluate.held_out_tasks(3, count, 'same', kinds=KINDS)

  def generate(requests, temperature, stop_fn, on_finish):
    del stop_fn
    out = []
    for i, (request, task) in enumerate(zip(requests, todo, strict=True)):
      assert tuple(TOKENS.encode(tasks.get(task.kind).solve_prompt(task, PROMPTS))) == (
          request.prompt_ids)
      out.append([])
      for n in range(request.samples):
        ids = (*TOKENS.encode(script(task, n, temperature)), TOKENS.eos_id)
        out[-1].append(Sample(i, n, ids, (-0.5,) * len(ids), (-0.5,) * len(ids), 'stop'))
        on_finish(out[-1][-1])
    return out
  return evaluate.score(todo, tools, generate, samples=samples, limit=64)


def _gold(task):
  return {'deduction': task.output, 'abduction': task.input, 'induction': task.program}[task.kind]


def test_a_model_that_knows_gets_everything(service):
  items = _score(service, lambda task, n, t: ANSWER + _gold(task))
  assert len(items) == 12 and all(i['greedy'] == 1 and i['right'] == 4 for i in items)
  scores = evaluate.summarize(items)
  assert scores['same/mean']['greedy'] == scores['same/mean']['pass@4'] == [1, 1, 1]
  assert scores['same/deduction']['entropy'][0] == 0.5 and scores['same/mean']['thinks'][0] == 0


@pytest.mark.parametrize('field, value, words', [
    ('heldout.base', 'carried:tinny', 'does not come with this package'),
    ('heldout.parts', ('same', 'nope.jsonl'), 'cannot be read')])
def test_what_can_be_refused_is_refused_before_anything_is_scored(
    tmp_path, monkeypatch, field, value, words):
  monkeypatch.setattr(evaluate, '_loaded', lambda *args: pytest.fail('a model was loaded'))
  c = config_lib.get_config()
  c.selfplay.prompts = 'tiny'
  c.update_from_flattened_dict({field: value})
  with pytest.raises(ValueError, match=words):
    evaluate.run(c, tmp_path / 'w', stream=io.StringIO())


def test_a_right_answer_in_the_wrong_form_is_wrong(service, monkeypatch):
  """Only solve rates of proposals pass over the form (azr_spec.md, 7.1 and 7.2)."""
  made = selfplay.answer
  monkeypatch.setattr(selfplay, 'answer', lambda *args, **options: [
      [dataclasses.replace(a, well_formed=False) for a in group]
      for group in made(*args, **options)])
  items = _score(service, lambda task, n, t: ANSWER + _gold(task))
  assert all(i['greedy'] == i['right'] == i['pass@4'] == i['formed'] == 0 for i in items)


def test_inductions_are_scored_alike_whatever_training_pays(monkeypatch):
  seen = []
  monkeypatch.setattr(evaluate, 'score', lambda tasks, tools, *args, **kwargs: (
      seen.append(tools.kinds), [])[1])
  for paid in ('binary', 'accuracy', 'if_one_correct'):
    c = config_lib.get_config()
    c.reward.induction, c.heldout.count, c.heldout.parts = paid, 1, ('same',)
    tools = selfplay.Tools(kinds=(), tokenizer=None, sample=None, submit=None, prompts=PROMPTS,
                           rewards=None)
    evaluate.measure(c, tools, None, None)
    assert c.reward.induction == paid
  assert {kind.score for kinds in seen for kind in kinds if kind.name == 'induction'} == {'binary'}


def test_programs_of_a_file_are_scored_as_they_stand(service, tmp_path, monkeypatch):
  path = tmp_path / 'written.jsonl'
  path.write_text('\n'.join(json.dumps(dict(code=code, input=given, output=output, id='x'))
                            for code, given, output in (
      ('def f(n):\n    return n[::-1]', "'ab'", "'ba'"),
      ('def f(x, y):\n    return {x: y}', '1, [2]', '{1: [2]}'))) + '\n')
  todo = evaluate.file_tasks(path, KINDS)
  assert [t.kind for t in todo] == ['deduction'] * 2 + ['abduction'] * 2
  monkeypatch.setenv('HOME', str(tmp_path))
  assert evaluate.file_tasks('~/written.jsonl', KINDS) == todo
  items = _score(service, lambda task, n, t: ANSWER + _gold(task), todo=todo, samples=0)
  assert all(i['greedy'] == 1 for i in items)
  items = _score(service, lambda task, n, t: ANSWER + '[1]', todo=todo, samples=0)
  assert not any(i['greedy'] for i in items)
  record = {'code': 'def f(x):\n    return "\u2028\x85"', 'input': '1',
            'output': repr('\u2028\x85')}
  path.write_text(json.dumps(record, ensure_ascii=False))
  assert evaluate.file_tasks(path, KINDS)[0].program == record['code']
  path.write_text('{"code": "def f(): pass"}')
  with pytest.raises(ValueError, match="'input'"):
    evaluate.file_tasks(path, KINDS)
  path.write_text('{"code": "def f(x): pass", "input": 1, "output": "None"}')
  with pytest.raises(ValueError, match='no text'):
    evaluate.file_tasks(path, KINDS)
  with pytest.raises(ValueError, match='no_such.jsonl'):
    evaluate.file_tasks(tmp_path / 'no_such.jsonl', KINDS)


def test_wrong_hostile_and_unfinished_answers_get_nothing(service):
  wrong = {'deduction': '__import__("os").getpid()', 'abduction': 'open("/etc/passwd").read()',
           'induction': 'def f(a, b=0):\n    while True:\n        pass'}
  items = _score(service, lambda task, n, t: ANSWER + wrong[task.kind], samples=0, count=1)
  assert all(i['greedy'] == 0 and i['formed'] == 1 and 'sampled' not in i for i in items)
  items = _score(service, lambda task, n, t: _gold(task), samples=0)
  assert all(i['greedy'] == 0 and i['formed'] == 0 for i in items)


def test_sampled_and_greedy_are_told_apart_and_thinking_is_seen(service):
  def script(task, n, temperature):
    right = temperature == 1 and n == 0
    return f'\n# think\na = 1{ANSWER}' + (_gold(task) if right else '[None]')
  for item in _score(service, script):
    assert (item['greedy'], item['sampled'], item['pass@4']) == (0, 0.25, 1)
    assert item['thinks'] == 1


def test_pass_at_k_by_hand():
  assert evaluate.pass_at(8, 0, 8) == 0 and evaluate.pass_at(8, 1, 8) == 1
  assert evaluate.pass_at(4, 1, 2) == pytest.approx(0.5)
  assert evaluate.pass_at(5, 2, 3) == pytest.approx(1 - 1 / 10)
  with pytest.raises(ValueError, match='k <= n'):
    evaluate.pass_at(4, 1, 5)


def test_intervals_are_those_of_the_normal_approximation():
  values = np.arange(1000) % 4 == 0
  mean, low, high = evaluate.interval(values)
  half = 1.96 * (0.25 * 0.75 / 1000)**0.5
  assert mean == 0.25
  assert low == pytest.approx(0.25 - half, abs=0.003)
  assert high == pytest.approx(0.25 + half, abs=0.003)
  assert evaluate.interval(values) == [mean, low, high]


def test_paired_differences_are_narrower_than_unpaired():
  rng = np.random.default_rng(0)
  before = [{'part': 'same', 'kind': k, 'key': str(i), 'greedy': float(rng.random() < 0.5)}
            for k in KINDS for i in range(200)]
  after = [b | {'greedy': max(b['greedy'], float(i % 10 == 0))} for i, b in enumerate(before)]
  found = evaluate.compare(before, after)['same/mean']['greedy']
  gain = np.mean([a['greedy'] - b['greedy'] for a, b in zip(after, before)])
  assert found[0] == pytest.approx(gain, abs=1e-5)
  # Unpaired, the interval would be 0.11 wide and hold 0.
  assert found[1] > 0 and found[2] - found[1] < 0.08
  with pytest.raises(ValueError, match='heldout'):
    evaluate.compare(before, after[::-1])


def test_held_out_tasks_are_of_every_kind_and_part():
  todo = evaluate.held_out_tasks(3, 5, 'deeper', kinds=KINDS)
  assert [t.kind for t in todo] == [k for k in KINDS for _ in range(5)]
  assert all(grammar.excludes(t) for t in todo)
  assert {len(t.cases) for t in todo if t.kind == 'induction'} == {6}
  assert all(t.shown == 3 for t in todo if t.kind == 'induction')


@pytest.mark.parametrize('cases, shown', [(4, 2), (5, 2), (6, 3)])
def test_held_out_inductions_show_the_half_that_self_play_shows(cases, shown):
  task, = evaluate.held_out_tasks(1, 1, 'same', kinds=('induction',), cases=cases)
  assert (len(task.cases), task.shown) == (cases, shown)


def test_the_table_shows_half_the_width_of_an_interval():
  assert '50.0 ±10.0' in evaluate.table({'same/deduction': {'greedy': [0.5, 0.4, 0.6]}})


def test_self_play_refuses_programs_of_the_test_side(service):
  rng = random.Random(4)
  test, free = grammar.test_set(3, 1)[0], grammar.example(rng)
  texts = [f'{e.program}\nf({e.inputs[0]})' for e in (test, free)]
  # The same program, written otherwise.
  texts.append('# mine\n' + texts[0])

  def sample(role, prompts, counts, stop_fn, on_finish):
    del role, counts, stop_fn
    ids = [(*TOKENS.encode(t), TOKENS.eos_id) for t in texts]
    made = [[Sample(i, 0, x, (0.0,) * len(x), (0.0,) * len(x), 'stop')] for i, x in enumerate(ids)]
    assert len(made) == len(prompts)
    for (one,) in made:
      on_finish(one)
    return made

  kind = tasks.get('deduction')
  tools = selfplay.Tools(kinds=[kind], prompts=PROMPTS, tokenizer=TOKENS, sample=sample,
                         submit=service.submit, rewards=None, excludes=grammar.excludes)
  rules = selfplay.Rules(
      batch=3, mc_samples=1, references=0, solve_source='fresh', draw='max_new',
      reference_draw='uniform', recent_steps=1, keep='all', refuse_duplicates=True,
      show_references=True, train_propose=True, mc_use='measure', max_prompt_tokens=256)
  memory = buffer.TaskBuffer(['deduction'])
  found = selfplay.propose(1, memory, tools, rules, np.random.default_rng(0),
                           timer=metrics.Timer())
  assert [a.status for a in found] == ['excluded', 'ok', 'excluded']
  allowed = selfplay.propose(1, memory, tools._replace(excludes=lambda task: False), rules,
                             np.random.default_rng(0), timer=metrics.Timer())
  assert [a.status for a in allowed] == ['ok', 'ok', 'duplicate']


def test_self_play_refuses_programs_of_the_files_it_is_scored_on(tmp_path):
  c = config_lib.get_config()
  free = grammar.example(random.Random(4))
  task = lambda program: Task('deduction', program, (('1', '1'),))
  mine = task('def f(n):\n    return n + n # twice')
  assert not evaluate.excludes(c)(task(grammar.test_set(3, 1)[0].program))
  c.selfplay.exclude = 'heldout'
  assert evaluate.excludes(c)(task(grammar.test_set(3, 1)[0].program))
  assert not evaluate.excludes(c)(task(free.program)) and not evaluate.excludes(c)(mine)
  path = tmp_path / 'human.jsonl'
  path.write_text(json.dumps({'code': 'def f(x):\n  return x + x', 'input': '1', 'output': '2'}))
  c.heldout.parts = (str(path),)
  assert evaluate.excludes(c)(mine) and not evaluate.excludes(c)(task(free.program))


def test_the_command_scores_a_model_directory(tmp_path, monkeypatch):
  monkeypatch.setattr(metrics, '_LINE_S', 0.0)
  model = loading.random_config(
      'random:qwen2,vocab=600,embed=32,layers=1,heads=2,kv_heads=2,head_dim=16,ffn=64,tied=true')
  hf.save(model, decoder.init(model, jax.random.key(0)), tmp_path / 'model', tokenizer=TOKENS)
  c = config_lib.get_config()
  c.command, c.model.name = 'evaluate', str(tmp_path / 'model')
  c.selfplay.prompts, c.selfplay.induction_cases, c.selfplay.kinds = 'tiny', 6, KINDS
  c.executor.min_isolation, c.executor.workers = 'weak', 2
  c.sampler.slots, c.sampler.max_solve_tokens, c.sampler.max_prompt_tokens = 8, 8, 256
  c.sampler.max_propose_tokens = 8
  written = tmp_path / 'written.jsonl'
  written.write_text(''.join(json.dumps(dict(code=f'def f(x):\n    return {value}', input='1',
                                             output=value)) + '\n' for value in ('1', '9' * 600)))
  c.heldout.count, c.heldout.samples, c.heldout.parts = 2, 2, ('same', str(written))
  (tmp_path / 'twin').symlink_to(tmp_path / 'model')
  c.heldout.base = str(tmp_path / 'twin')
  text = io.StringIO()
  with checkpoint.owned(tmp_path / 'out'), pytest.raises(
      checkpoint.CheckpointError, match='another run is going on'):
    evaluate.run(c, tmp_path / 'out', stream=io.StringIO())
  results = evaluate.run(c, tmp_path / 'out', stream=text)
  assert json.loads((tmp_path / 'out' / 'results.json').read_text()) == results
  assert results['scores']['same/mean']['greedy'][0] == 0
  assert 'same/induction' in text.getvalue()
  for said in ('same, greedy answers: 6 of 6', 'same, samples: 12 of 12',
               'written, samples: 4 of 4'):
    assert said in text.getvalue()
  items = [json.loads(x) for x in (tmp_path / 'out' / 'items.jsonl').read_text().splitlines()]
  # Of the file one deduction and one abduction; the other program does not fit the prompt.
  assert [i['part'] for i in items] == ['same'] * 6 + ['written'] * 2
  # The same model twice: the same noise, so no gain at all, not in the samples either.
  assert (tmp_path / 'out' / 'base_items.jsonl').read_text().splitlines() == [
      json.dumps(i) for i in items]
  assert all(v == [0, 0, 0] for row in results['gains'].values() for v in row.values())
  assert results['model'].endswith('model') and results['base'].endswith('twin')
  assert results['base_scores'] == results['scores'] and '+0.0 to +0.0' in text.getvalue()
  # Another evaluation there leaves nothing of this one.
  c.heldout.base, c.heldout.parts = '', (str(written),)
  again = evaluate.run(c, tmp_path / 'out', stream=io.StringIO())
  assert 'base' not in again and again['test']['parts'] == [str(written)]
  assert not (tmp_path / 'out' / 'base_items.jsonl').exists()


def test_kinds_may_be_a_list_and_no_items_are_refused():
  todo = evaluate.held_out_tasks(3, 2, 'same', kinds=['deduction', 'induction'])
  assert todo == evaluate.held_out_tasks(3, 2, 'same', kinds=('deduction', 'induction'))
  for scored in (lambda: evaluate.summarize([]), lambda: evaluate.compare([], [])):
    with pytest.raises(ValueError, match='there are no items'):
      scored()
