# SPDX-License-Identifier: Apache-2.0
"""The carried tokenizer, and documents: true, in the exact form of the prompts of self-play."""

import collections
import itertools
import random
import re

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from absolute_zero_jax import documents, grammar, lexicon, tasks, tokenizer, tracing
from absolute_zero_jax.tasks import prompts as prompts_lib
from absolute_zero_jax.types import Role, Task

PROMPTS = prompts_lib.load('tiny')
TOKENS = tokenizer.load(lexicon.FOLDER)
ANSWER = PROMPTS.formats['solve_deduction'].after


@pytest.fixture(scope='module')
def written():
  rng = random.Random(0)
  write = documents.Writer(PROMPTS, documents.Recipe())
  return [write.document(rng) for _ in range(300)]


def test_the_carried_tokenizer_is_the_one_that_is_built(tmp_path):
  lexicon.save(tmp_path)
  for name in ('tokenizer.json', 'tokenizer_config.json'):
    assert (tmp_path / name).read_text() == (lexicon.FOLDER / name).read_text()


@given(st.text() | st.text(alphabet="def f(a):\n    return+-[]'0123456789, #answerthink"))
@settings(max_examples=200, deadline=None)
def test_any_text_comes_back(text):
  assert TOKENS.decode(TOKENS.encode(text)) == text


def test_transformers_reads_the_same_tokenizer():
  transformers = pytest.importorskip('transformers')
  # AutoTokenizer would split words as Qwen2's own tokenizer does, whatever the file says.
  theirs = transformers.PreTrainedTokenizerFast.from_pretrained(lexicon.FOLDER)
  rng = random.Random(1)
  texts = [grammar.example(rng).program for _ in range(20)]
  texts += [*lexicon.MARKERS, 'héllo 日本\x00\n# answer\n-12 345', '  x  ==y']
  for text in texts:
    assert theirs(text)['input_ids'] == TOKENS.encode(text)
    assert theirs.decode(TOKENS.encode(text)) == text
  assert (theirs.eos_token_id, theirs.pad_token_id) == (TOKENS.eos_id, TOKENS.pad_id)


def test_words_are_single_tokens_and_programs_are_short():
  assert all(len(TOKENS.encode(w)) == 1 for w in (*lexicon.words(), *lexicon.MARKERS))
  assert TOKENS.vocab_size == 600 and TOKENS.stop_ids == {TOKENS.eos_id}
  rng = random.Random(1)
  lengths = [len(TOKENS.encode(grammar.example(rng).program)) for _ in range(100)]
  assert np.mean(lengths) < 25


def test_proposals_are_read_back_as_they_were_written(written):
  kinds = {k: tasks.get(k, cases=6) for k in ('deduction', 'abduction', 'induction')}
  seen = set()
  for (prompt, response), *_ in written:
    name = next((k for k in kinds if prompt.endswith(f'# new {k}\n') or
                 prompt.startswith(f'# new {k}\n')), None)
    if name is None:
      continue
    seen.add(name)
    well_formed, body = PROMPTS.extract(Role.PROPOSE, name, response, finished=True)
    reference = Task('deduction', prompt.partition('\n')[2], (('1', '1'),))
    found = kinds[name].parse_proposal(body, [reference])
    assert well_formed and not isinstance(found, str), (response, found)
    outputs = [grammar.run(found.program, i) for i in found.inputs]
    assert None not in outputs and len(outputs) == (6 if name == 'induction' else 1)
  assert seen == set(kinds)


def test_answers_and_thinking_are_true(written):
  """Each answer, read as self-play reads it and run again; and each line of thinking."""
  counts, guesses = {}, 0
  for document in written:
    first = document[0][0]
    program = first.partition('\nf(')[0].partition('\n# f(?)')[0]
    for prompt, response in document:
      if ANSWER not in response:
        continue
      kind = _kind(prompt)
      _, body = PROMPTS.extract(Role.SOLVE, kind, response, finished=True)
      answer = tasks.get(kind).parse_answer(body)
      thought = response.partition(ANSWER)[0]
      counts[kind, bool(thought)] = counts.get((kind, bool(thought)), 0) + 1
      if kind == 'deduction':
        given = prompt.rpartition('\nf(')[2][:-1]
        assert grammar.run(program, given) == answer
        if thought:
          assert thought == documents.THINK + ''.join(
              f'\n{line}' for line in tracing.trace(program, given))
      elif kind == 'abduction':
        assert grammar.run(program, answer) == prompt.rpartition(' is ')[2]
        if thought:
          backwards = reversed(tracing.trace(program, answer))
          assert thought == documents.THINK + ''.join(f'\n{line}' for line in backwards)
      else:
        _check_cases(answer, prompt)
        pairs = dict(re.findall(r'f\((.*)\) == (.*)', prompt))
        *failed, last = thought.removeprefix(documents.THINK).split(documents.REJECT)
        for guess in failed:
          assert guess.endswith(': False')
          assert not grammar.is_held_out(grammar.key(_program(guess, answer)))
        guesses += len(failed)
        for guess in (*failed, last) if thought else ():
          lines = tracing.check(_program(guess, answer), list(pairs.items()))
          assert guess == ''.join(f'\n{line}' for line in lines)
        assert not thought or _program(last, answer) == answer
  assert set(counts) == {(k, t) for k in ('deduction', 'abduction', 'induction')
                         for t in (False, True)}
  thinking = sum(n for (_, thinks), n in counts.items() if thinks) / sum(counts.values())
  assert 0.7 < thinking < 0.85 and guesses > 20


def _kind(prompt):
  if prompt.startswith('# find f'):
    return 'induction'
  return 'abduction' if '\n# f(?) is ' in prompt else 'deduction'


def _check_cases(program, text):
  for inputs, output in re.findall(r'^f\((.*)\) == (.*)$', text, re.M):
    assert grammar.run(program, inputs) == output, (program, inputs)


def _program(guess, answer):
  """The program of a guess, whose thought leaves its first line out."""
  return '\n'.join([answer.split('\n')[0], *re.findall(r'^    .*$', guess, re.M)])


def test_later_questions_continue_the_prompt_of_self_play(written):
  """The first question is the solver's prompt itself; what follows is that prompt's ending."""
  several = [d for d in written if len(d) > 1]
  assert several
  for document in several:
    program = document[0][0].partition('\nf(')[0].partition('\n# f(?)')[0]
    for prompt, response in document:
      kind = _kind(prompt)
      answer = tasks.get(kind).parse_answer(response.partition(ANSWER)[2])
      given = prompt.rpartition('\nf(')[2][:-1] if kind == 'deduction' else answer
      task = Task(kind, program, ((given, grammar.run(program, given)),), key='k')
      whole = tasks.get(kind).solve_prompt(task, PROMPTS)
      assert whole.endswith(prompt) and whole in (prompt, program + prompt)


def test_rows_hold_whole_documents_and_depend_on_the_seed_alone():
  write = documents.Writer(PROMPTS, documents.Recipe())
  def rows():
    return documents.rows(write, TOKENS, random.Random('7'), (8, 320))
  first = rows()
  assert all(np.array_equal(a, b) for a, b in zip(first, rows()))
  assert (first.segments_BT > 0).mean() > 0.9
  for tokens_T, positions_T, segments_T, weights_T in zip(*first):
    for segment in range(1, segments_T.max() + 1):
      mine = segments_T == segment
      assert np.array_equal(positions_T[mine], np.arange(mine.sum()))
      assert tokens_T[mine][-1] == TOKENS.eos_id
      assert weights_T[mine][0] == 0 and weights_T[mine][-1] == 1
    assert not weights_T[segments_T == 0].any()


@pytest.mark.parametrize('prior', [0.1, 0.25, 0.6])
def test_weights_make_the_share_of_thinking_that_is_asked_for(prior):
  """The share that minimises the weighted loss of the first token is the weighted share."""
  write = documents.Writer(PROMPTS, documents.Recipe(propose=0, think=0.45, think_prior=prior))
  stream = documents.encoded(write, TOKENS, random.Random(3))
  think = TOKENS.encode(documents.THINK, bos=False)
  answer = TOKENS.encode(ANSWER, bos=False)
  assert len(think) == len(answer) == 1
  total, answers = {think[0]: 0.0, answer[0]: 0.0}, 0
  for _ in range(1200):
    ids, weights = next(stream)
    # An answer opens with one of two marks, behind its prompt's tokens; the answer mark that ends
    # a thought stands behind text of the response.
    for i, (token, weight) in enumerate(zip(ids, weights)):
      if token in total and weights[i - 1] == write.recipe.prompt_weight:
        total[token] += weight
        answers += 1
  share = total[think[0]] / sum(total.values())
  assert answers > 1500 and share == pytest.approx(prior, abs=0.03)


def test_a_guess_that_fails_is_read_but_not_learnt():
  write = documents.Writer(PROMPTS, documents.Recipe(propose=0, induce=1, think=1))
  rng = random.Random(5)
  failed = right = 0
  while failed < 20:
    (prompt, response), = write.document(rng)
    (ids, weights), = itertools.islice(
        documents.encoded(_Said(write.recipe, [(prompt, response)]), TOKENS, rng), 1)
    assert ids == [*TOKENS.encode(prompt), *TOKENS.encode(response, bos=False), TOKENS.eos_id]
    skipped = TOKENS.decode([i for i, w in zip(ids, weights) if w == 0])
    *guesses, last = response.removeprefix(documents.THINK).split(documents.REJECT)
    assert skipped == ''.join(
        f'\n{line}' for guess in guesses for line in re.findall(r'^    .*$', guess, re.M))
    final = TOKENS.encode(last, bos=False)
    turns = {_first_difference(final, TOKENS.encode(guess, bos=False)) for guess in guesses}
    assert weights[-len(final) - 1:] == [
        write.recipe.turn_weight if i in turns else 1.0 for i in range(len(final) + 1)]
    failed += len(guesses)
    right += not guesses
  assert right


def _first_difference(ours, theirs):
  return next(i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b)


def test_own_wrong_guesses_take_the_place_of_rivals():
  rng = random.Random(2)
  examples = [grammar.example(rng) for _ in range(5)]
  row = tuple((f'    return {n}', f'if {n} == 0: False') for n in range(1, 5))
  failed = [documents.Failed(e, row) for e in examples]
  write = documents.Writer(PROMPTS, documents.Recipe(propose=0, induce=1, think=1), failed)
  known = {e.program for e in examples}
  lengths = collections.Counter()
  for _ in range(400):
    (_, response), = write.document(rng)
    thought, _, answer = response.partition(ANSWER)
    *wrong, last = thought.removeprefix(documents.THINK).split(documents.REJECT)
    assert (answer in known) == bool(wrong) and last.endswith(': True')
    # In the order in which they were made, from the first one on.
    assert wrong == [''.join(f'\n{x}' for x in lines) for lines in row[:len(wrong)]]
    lengths[len(wrong)] += 1
  assert 0.7 < 1 - lengths[0] / 400 < 0.9
  assert set(lengths) == {0, 1, 2, 3} and min(lengths.values()) > 50


def test_a_thought_that_would_be_too_long_has_fewer_wrong_guesses():
  example = grammar.example(random.Random(2))
  row = ((*['    a = 1'] * 40, '    return 1', 'if 1 == 0: False'),) * 3
  write = documents.Writer(PROMPTS, documents.Recipe(propose=0, induce=1, think=1, fail=1),
                           [documents.Failed(example, row)])
  rng = random.Random(2)
  wrong = {write.document(rng)[0][1].count(documents.REJECT) for _ in range(20)}
  assert wrong == {1}


class _Said:
  """A writer that says what it is given."""

  def __init__(self, recipe, said):
    self.recipe, self._said = recipe, said

  def document(self, rng):
    del rng
    return self._said


def test_the_elicitation_sets_differ_only_in_how_the_response_opens():
  task = Task('deduction', 'def f(a):\n    return a', (('1', '1'),), key='k')
  plain = tasks.get('deduction').solve_prompt(task, PROMPTS)
  for name, opening in (('tiny_think', documents.THINK), ('tiny_direct', ANSWER)):
    other = prompts_lib.load(name)
    assert tasks.get('deduction').solve_prompt(task, other) == plain + opening
    assert other.files['propose_deduction'] == PROMPTS.files['propose_deduction']
    assert other.hash != PROMPTS.hash


def test_an_answer_stands_behind_its_mark_and_must_end():
  def extract(response, finished=True):
    return PROMPTS.extract(Role.SOLVE, 'deduction', response, finished=finished)
  assert extract(f'{ANSWER}7') == (True, '7')
  assert extract(f'\n# think\na = 3{ANSWER}7') == (True, '7')
  assert extract(f'{ANSWER}7', finished=False)[0] is False
  assert extract('\n# think\na = 3')[0] is False
  direct = prompts_lib.load('tiny_direct')
  assert direct.extract(Role.SOLVE, 'deduction', '7', finished=True) == (True, '7')
