# SPDX-License-Identifier: Apache-2.0
"""Prompt sets: rendering, stops, extraction, hashes, sets of one's own."""

import functools
import json

import pytest

from absolute_zero_jax import tasks, tokenizer
from absolute_zero_jax.tasks import prompts
from absolute_zero_jax.types import Role, Task

SOURCE = "def f(text):\n    return text + '$price'"
TASK = Task('deduction', SOURCE, (("'a'", "'a$price'"),), key='k')


def _copy(tmp_path, name='compact', **changes):
  folder = tmp_path / 'mine'
  folder.mkdir()
  for path in (prompts.BUILT_IN / name).iterdir():
    (folder / path.name).write_text(path.read_text())
  for file, body in changes.items():
    (folder / f'{file}.txt').write_text(body)
  return folder


def test_values_are_inserted_as_they_are():
  for name in ('compact', 'think'):
    assert '$price' in tasks.get('deduction').solve_prompt(TASK, prompts.load(name))


def test_compact_prompts_end_in_an_open_response_that_is_read_back():
  given = prompts.load('compact')
  kind = tasks.get('deduction')
  prompt = kind.propose_prompt([TASK], given)
  assert prompt.endswith('\n\ndef f(')
  response = "x):\n    return x * 2\nf('ab')\n\n"
  well_formed, answer = given.extract(Role.PROPOSE, 'deduction', response)
  assert well_formed
  assert kind.parse_proposal(answer, []) == tasks.Proposal(
      'def f(x):\n    return x * 2', ("'ab'",))


@pytest.mark.parametrize(('kind', 'role', 'response', 'read'), [
    ('deduction', 'solve', "'ab'\n", "'ab'"), ('abduction', 'solve', "('ab', 2)\n", "'ab', 2"),
    ('error', 'solve', ' ValueError\n', 'ValueError'),
    ('induction', 'solve', 'x):\n    return x\n\n', 'def f(x):\n    return x'),
])
def test_compact_answers_are_read(kind, role, response, read):
  given = prompts.load('compact')
  well_formed, answer = given.extract(role, kind, response)
  assert well_formed and tasks.get(kind).parse_answer(answer) == read


def test_a_cut_response_is_not_well_formed_unless_the_model_ended_it():
  given = prompts.load('compact')
  assert given.extract('solve', 'deduction', '12')[0] is False   # 12 may be the start of 1234
  assert given.extract('solve', 'deduction', '12', finished=True) == (True, '```output\n12\n```')


def test_stop_at_is_the_end_of_the_first_stop():
  given = prompts.load('compact')
  assert given.stop_at('solve', 'deduction', '12') is None
  assert given.stop_at('solve', 'deduction', '12\n34\n') == 3
  assert given.extract('solve', 'deduction', '12\n34\n')[1] == '```output\n12\n```'


def test_every_stop_is_free_of_what_its_response_needs():
  # A stop inside a well-formed response would cut it: the examples are such responses.
  given = prompts.load('compact')
  for kind, pages in given.examples.items():
    for example in (e for page in pages for e in page):
      for stop in given.stops('propose', kind):
        assert stop not in example.program and stop not in example.message


def test_think_prompts_open_the_thinking_and_stop_after_the_answer():
  given = prompts.load('think')
  kind = tasks.get('deduction')
  assert kind.solve_prompt(TASK, given).endswith('Assistant: <think>')
  assert given.stops(Role.SOLVE, 'deduction') == ('</answer>',)
  response = ' easy </think>\n<answer>\n```output\n12\n```\n</answer>'
  assert given.extract(Role.SOLVE, 'deduction', response) == (True, '```output\n12\n```')
  assert given.extract(Role.SOLVE, 'deduction', ' easy <answer>12</answer>') == (False, '')
  assert given.extract(Role.SOLVE, 'deduction', 'no') == (False, '')


@pytest.mark.parametrize(('response', 'kept'), [
    ('so</think><answer>5</answer> and more', 'so</think><answer>5</answer>'),
    ('in <answer>...</answer> tags</think><answer>5</answer>', None),
    ('so</think><answer>```python\nx = "</answer>"\n```</answer>', None),
    ('so</think> 5</answer> never mind', 'so</think> 5</answer>'),
    ('so</think><answer>```python\nx\n```</answer></answer>',
     'so</think><answer>```python\nx\n```</answer>'),
    ('an <answer>5</answer> without an end of thinking', '')])
def test_a_response_is_cut_where_its_answer_ends(response, kept):
  given, bytewise = prompts.load('think'), tokenizer.load('bytes')

  def cut(given):
    return bytewise.stop_position(bytewise.encode(response), given.stops('solve', 'deduction'),
                                  functools.partial(given.ends, 'solve', 'deduction'))

  assert cut(given) == (None if kept == '' else len(kept or response))
  assert cut(prompts.load('think', rule='azr')) is None       # as the reference: EOS alone


def test_a_response_that_repeats_its_last_tag_costs_few_looks():
  bytewise, asked = tokenizer.load('bytes'), []
  response = 'so</think><answer>```python\n' + '</answer>\n' * 1000

  def ends(text):
    asked.append(text)
    return prompts.load('think').ends('solve', 'deduction', text)

  assert bytewise.stop_position(bytewise.encode(response), ['</answer>'], ends) is None
  cut = response + '```</answer>'
  assert bytewise.stop_position(bytewise.encode(cut + '</answer>' * 9), ['</answer>'], ends) == (
      len(cut))
  assert len(asked) < 20


@pytest.mark.parametrize(('response', 'result'), [
    (r'so \boxed{12}', (True, '12')), ('so 12', (False, ''))])
def test_boxed_wrapper(response, result):
  given = prompts.load('think', 'boxed')
  assert '\\boxed{}' in tasks.get('deduction').solve_prompt(TASK, given)
  assert given.extract('solve', 'deduction', response) == result


def test_no_wrapper_takes_the_whole_response():
  given = prompts.load('think', 'none')
  assert '<think>' not in tasks.get('deduction').solve_prompt(TASK, given)
  assert given.extract('solve', 'deduction', '12') == (True, '12')


def test_examples_vary_and_never_hand_over_the_answer():
  given = prompts.load('compact')
  kind = tasks.get('deduction')
  assert len({kind.propose_prompt([], given, v) for v in range(20)}) == 20
  assert kind.propose_prompt([], given, 3) == kind.propose_prompt([], given, 3)
  for page in given.examples['deduction']:
    for example in page:
      for step in range(8):
        shown = given.choose('solve', 'deduction', step, example.program)
        assert example.program not in [e.program for e in shown]


def test_equal_tasks_get_equal_solver_prompts():
  given = prompts.load('compact')
  assert given.solve(TASK) == given.solve(Task(**TASK.__dict__))


def test_examples_say_the_truth():
  # An example with a wrong output would teach wrong answers. They are ours, so they may run here.
  for pages in prompts.load('compact').examples.values():
    for example in (e for page in pages for e in page):
      scope = {}
      exec(example.program, scope)
      for given, output in example.cases:
        try:
          value = repr(eval(f'f({given})', scope))
          assert output in (value, 'NoError')
        except Exception as error:  # the error kind stores its name
          assert output == type(error).__name__


def test_hash_follows_content_and_wrapper(tmp_path):
  folder = _copy(tmp_path)
  same = prompts.load(str(folder))
  assert same.hash == prompts.load('compact').hash and len(same.hash) == 64
  assert prompts.load('think').hash != prompts.load('think', 'boxed').hash
  (folder / 'solve_deduction.txt').write_text('other $program $input')
  assert prompts.load(str(folder)).hash != same.hash


def test_a_folder_of_ones_own_is_used_word_for_word(tmp_path):
  folder = tmp_path / 'own'
  folder.mkdir()
  (folder / 'set.json').write_text(json.dumps(
      {'version': 4, 'wrapper': 'r1', 'formats': {'solve_deduction': {'stops': ['END']}}}))
  (folder / 'wrapper_r1.txt').write_text('U: $task\nA: <|response|><think>')
  (folder / 'solve_deduction.txt').write_text('Run\n$program\non $input')
  given = prompts.load(str(folder))
  assert given.solve(TASK) == f"U: Run\n{SOURCE}\non 'a'\nA: <think>"
  assert (given.version, given.stops('solve', 'deduction')) == (4, ('END',))
  with pytest.raises(ValueError, match='has no solve_abduction.txt'):
    given.render('solve', 'abduction')


def test_an_answer_may_be_looked_for_in_a_box(tmp_path):
  folder = _copy(tmp_path, 'think')
  boxed = r'so it is</think> \boxed{4}'
  assert prompts.load(str(folder)).extract('solve', 'deduction', boxed) == (False, '')
  settings = json.loads((folder / 'set.json').read_text())
  (folder / 'set.json').write_text(json.dumps(settings | {'boxed_retry': True}))
  assert prompts.load(str(folder)).extract('solve', 'deduction', boxed) == (False, '4')
  tagged = 'so</think> <answer>5</answer>'
  assert prompts.load(str(folder)).extract('solve', 'deduction', tagged) == (True, '5')


@pytest.mark.parametrize(('name', 'changes', 'words'), [
    ('solve_deduction', 'costs $5', 'lone'), ('solve_deduction', 'a ${input', 'lone'),
    ('wrapper_answer', 'an answer', r'wrapper_answer.txt mentions \[\]; a wrapper holds .task'),
    ('wrapper_answer', '$task $program', r"mentions \['program', 'task'\]"),
    ('solve_deduction', 'a<|response|>$input', 'no .field'),
    ('solve_deduction', 'a<|response|>b<|response|>', 'at most one')])
def test_a_malformed_template_is_refused(tmp_path, name, changes, words):
  with pytest.raises(ValueError, match=words):
    prompts.load(str(_copy(tmp_path, **{name: changes})))


def test_a_template_that_is_not_utf_8_is_named(tmp_path):
  folder = _copy(tmp_path)
  (folder / 'solve_error.txt').write_bytes(b'caf\xe9 $program')
  with pytest.raises(ValueError, match='solve_error.txt is not UTF-8'):
    prompts.load(str(folder))


def test_a_sign_may_be_written(tmp_path):
  given = prompts.load(str(_copy(tmp_path, solve_deduction='costs $$5 $input')))
  assert "costs $5 'a'" in given.solve(TASK)         # a lone $ was seen in $$5


@pytest.mark.parametrize(('changes', 'words'), [
    ({'solve_deduction': '$zzz'}, r'solve_deduction.txt mentions \$zzz; its fields are blocks'),
    ({'reference_deduction': '$code'}, r'reference_deduction.txt mentions \$code'),
    ({'propose_deduction': '$program'}, r'propose_deduction.txt mentions \$program; .* references'),
    ({'propose_induction': '$banned'}, r'propose_induction.txt mentions \$banned')])
def test_what_a_played_kind_asks_for_is_checked_at_the_start(tmp_path, changes, words):
  kinds = [tasks.get('deduction'), tasks.get('induction')]
  given = prompts.load(str(_copy(tmp_path, **changes)))
  with pytest.raises(ValueError, match=words):
    prompts.check(given, kinds)
  prompts.check(given, [tasks.get('abduction')])


def test_a_file_is_missed_by_the_kinds_and_the_roles_that_are_played(tmp_path):
  folder = _copy(tmp_path)
  for file in ('propose_deduction', 'reference_abduction', 'solve_induction'):
    (folder / f'{file}.txt').unlink()
  given = prompts.load(str(folder))
  deduction, abduction, induction = map(tasks.get, ('deduction', 'abduction', 'induction'))
  for kind, file, options in ((deduction, 'propose_deduction', {'propose': False}),
                              (induction, 'solve_induction', {'solve': False})):
    with pytest.raises(ValueError, match=f'no {file}.txt'):
      prompts.check(given, [kind])
    prompts.check(given, [kind], **options)
  with pytest.raises(ValueError, match='no reference_abduction.txt'):
    prompts.check(given, [abduction])


@pytest.mark.parametrize('name', ['compact', 'think', 'tiny', 'tiny_direct', 'tiny_think'])
def test_the_sets_that_come_along_are_whole(name):
  names = list(tasks.KINDS) if name in ('compact', 'think') else [
      'deduction', 'abduction', 'induction']
  prompts.check(prompts.load(name), [tasks.get(kind) for kind in names])


@pytest.mark.parametrize(('load', 'words'), [
    (lambda: prompts.load('nowhere'), 'neither one of'),
    (lambda: prompts.load('think', 'xml'), 'must be none or one of'),
    (lambda: prompts.load('no.module:thing'), 'cannot be loaded'),
    (lambda: prompts.load(f'{__name__}:compact', 'answer'), "wrapper='answer' .* must be ''"),
    (lambda: prompts.load(f'{__name__}:compact', rule='azr'), "format_rule='azr' must be ''"),
    (lambda: prompts.load('types:SimpleNamespace'), 'lacks .*hash.*extract.*PromptSet')])
def test_wrong_names_are_refused(load, words):
  with pytest.raises(ValueError, match=words):
    load()


def compact():
  return prompts.load('compact')


def test_a_module_may_hold_a_set():
  assert prompts.load(f'{__name__}:compact') == compact()


def test_a_malformed_set_is_refused(tmp_path):
  folder = _copy(tmp_path)
  (folder / 'set.json').write_text('{"wrapper": "none"}')
  with pytest.raises(ValueError, match='malformed'):
    prompts.load(str(folder))


@pytest.mark.parametrize(('settings', 'words'), [
    ({'wraper': 'answer'}, 'wraper.* unknown; allowed: .*wrapper'),
    ({'base': 'nosuch'}, "base='nosuch' must be one of"),
    ({'formats': {'solv_deduction': {}}}, "'solv_deduction' must be propose_KIND or solve_KIND"),
    ({'formats': {'solve_deduction': {'aftr': 'x'}}}, 'solve_deduction: .*aftr.*after'),
    ({'formats': {'solve_deduction': {'stops': '</answer>'}}}, 'must be a list of texts'),
    ({'formats': {'solve_deduction': {'stops': ['']}}}, 'must be a list of texts')])
def test_settings_that_would_do_nothing_or_harm_are_refused(tmp_path, settings, words):
  folder = _copy(tmp_path)
  old = json.loads((folder / 'set.json').read_text())
  (folder / 'set.json').write_text(json.dumps(old | settings))
  with pytest.raises(ValueError, match=words):
    prompts.load(folder)


def test_a_missing_folder_is_refused_as_path_too(tmp_path):
  with pytest.raises(ValueError, match='is neither one of .* nor a folder'):
    prompts.load(tmp_path / 'none')
  assert prompts.load(_copy(tmp_path)).hash == prompts.load('compact').hash


def test_a_folder_may_lie_at_home(tmp_path, monkeypatch):
  folder = _copy(tmp_path)
  monkeypatch.setenv('HOME', str(tmp_path))
  assert prompts.load('~/mine').formats == prompts.load(folder).formats
