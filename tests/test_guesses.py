# SPDX-License-Identifier: Apache-2.0
"""A model's own wrong guesses: run by the executor, kept if wrong, written and read back."""

import random
import types

from etils import epath
import jax
import pytest

from absolute_zero_jax import documents, grammar, guesses, lexicon, tasks, tokenizer, tracing
from absolute_zero_jax.executor import Executor
from absolute_zero_jax.tasks import prompts as prompts_lib

PROMPTS = prompts_lib.load('tiny')
TOKENS = tokenizer.load(lexicon.FOLDER)
RECIPE = documents.Recipe()


class _Scripted:
  """A sampler that goes on with each thought by the text that `say(prompt, temperature)` gives."""
  max_prompt_tokens = 256

  def __init__(self, say):
    self._say = say
    self.calls = []

  def generate(self, params, requests, key, progress=None, temperature=1.0, stop_fn=None):
    del params, key, progress
    self.calls.append((temperature, [TOKENS.decode(r.prompt_ids) for r in requests]))
    out = []
    for request, prompt in zip(requests, self.calls[-1][1]):
      ids = TOKENS.encode(self._say(prompt, temperature), bos=False)
      ends = [n for n in range(len(ids) + 1) if stop_fn(request, ids[:n])]
      out.append([types.SimpleNamespace(ids=ids[:ends[0]] if ends else ids)])
    return out


@pytest.fixture(scope='module')
def executor():
  with Executor(workers=2, score_timeout_s=0.5) as service:
    yield service


def _make(executor, say, count=30):
  sampler = _Scripted(say)
  return sampler, guesses.make(
      None, jax.random.key(0), seed='3', count=count, sampler=sampler, tokenizer=TOKENS,
      prompts=PROMPTS, recipe=RECIPE, submit=executor.submit)


def _body(source):
  """The program as a thought would write it, with a value that is not to be believed."""
  return '\n' + '\n'.join(source.split('\n')[1:]) + "\nif 'so' == 'so': True"


def _checked(source, failed):
  source = '\n'.join([failed.example.program.split('\n')[0], *source.split('\n')[1:]])
  return tuple(tracing.check(source, documents.pairs_shown(failed.example, RECIPE)))


def test_a_row_of_wrong_guesses_each_told_of_those_before(executor):
  """Here three different ones; what is kept is what the executor made of them."""
  row = [f'def f(a):\n    c = [a, {n}]\n    return c' for n in range(3)]
  sampler, made = _make(
      executor, lambda prompt, _: _body(row[prompt.count(documents.REJECT)]))
  assert [t for t, _ in sampler.calls] == [0.0] * 3 + [1.0] * 3 and made
  for failed in made:
    assert failed.checks == tuple(_checked(source, failed) for source in row)
    assert failed.checks[0][-1].endswith(': False')
  prompts = {prompt for _, asked in sampler.calls for prompt in asked}
  for failed in made:
    mine = [documents.thought(documents.rejected(failed.checks[:n])) for n in range(3)]
    assert all(any(p.startswith('# find f\nf(') and p.endswith(told) for p in prompts)
               for told in mine)


def test_a_row_ends_with_what_is_right(executor):
  """And what stands before it is kept, also if it is the same guess again."""
  programs, wrong = {}, 'def f(a):\n    return [a, a]'
  kind = tasks.get('induction', cases=RECIPE.cases)
  rng = random.Random('guesses 3')
  for example in (grammar.example(rng, RECIPE.depths, cases=RECIPE.cases) for _ in range(30)):
    programs[kind.solve_prompt(documents.induction(example, RECIPE), PROMPTS)] = example.program
  def say(prompt, temperature):
    tried = prompt.count(documents.REJECT)
    right = programs[prompt.split(documents.THINK)[0]]
    return _body(right if tried == 2 or tried and not temperature else wrong)
  _, made = _make(executor, say)
  assert {len(failed.checks) for failed in made} == {1, 2}
  for failed in made:
    assert set(failed.checks) == {_checked(wrong, failed)}


def test_what_leaves_no_room_is_not_asked(executor):
  """A guess that the sampler cannot read is the last of its row."""
  sampler = _Scripted(lambda *_: _body('def f(a):\n    c = [a, 0]\n    return c'))
  sampler.max_prompt_tokens = 110
  made = guesses.make(
      None, jax.random.key(0), seed='3', count=30, sampler=sampler, tokenizer=TOKENS,
      prompts=PROMPTS, recipe=RECIPE, submit=executor.submit)
  sizes = [[len(TOKENS.encode(p)) for p in asked] for _, asked in sampler.calls]
  assert max(map(max, filter(None, sizes))) <= 110
  assert {len(failed.checks) for failed in made} >= {1, 2}


def test_a_value_that_is_no_literal_is_a_wrong_one(executor):
  for value in ('frozenset([1])', "float('inf')"):
    text = _body(f'def f(a):\n    return {value}')
    _, made = _make(executor, lambda *_, text=text: text, count=20)
    assert made and all(check[-1].endswith(': False') for failed in made
                        for check in failed.checks)


def test_every_induction_has_the_values_of_its_own_inputs(executor):
  """Also where a program occurs twice, with other inputs."""
  source = 'def f(a):\n    c = [a, a]\n    return c'
  _, made = _make(executor, lambda *_: _body(source), count=120)
  keys = [failed.example.key for failed in made]
  # Twice at least, once for each temperature.
  assert 2 * len(set(keys)) < len(keys)
  assert all(set(failed.checks) == {_checked(source, failed)} for failed in made)


def test_what_cannot_serve_is_left_out(executor):
  """Errors, long values, unfinished texts, files, and what is no program."""
  for text in ('\n    return a.nothing\n', "\n    return 'x' * 99\n", '\n    c = 1\n',
               '\n    return [a]', '\n    while True:\n        a = a\n    return a\n', 'f(', '',
               "\n    c = open('/tmp/azj_guess', 'w')\n    return a\n"):
    sampler, made = _make(executor, lambda *_, text=text: text, count=4)
    assert made == [] and [len(asked) for _, asked in sampler.calls] == [4, 0, 0] * 2, text
  assert not epath.Path('/tmp/azj_guess').exists()


def test_right_guesses_and_the_test_side_are_left_out(executor):
  rng = random.Random('guesses 3')
  example = grammar.example(rng, RECIPE.depths, cases=RECIPE.cases)
  _, made = _make(executor, lambda *_: _body(example.program), count=1)
  assert made == []
  head = example.program.split('\n')[0]
  held = [e for e in grammar.test_set(1, 60) if e.program.split('\n')[0] == head]
  assert len(held) > 9 and all(grammar.is_held_out(grammar.key(e.program)) for e in held)
  for text in (_body(e.program) for e in held):
    _, made = _make(executor, lambda *_, text=text: text, count=1)
    assert made == []


def test_they_come_back_as_they_were_written(executor, tmp_path):
  _, made = _make(executor, lambda *_: _body('def f(a):\n    c = [a, 0]\n    return c'), count=10)
  path = epath.Path(tmp_path) / 'guesses.jsonl'
  guesses.write(path, made)
  assert made and guesses.read(path) == made
