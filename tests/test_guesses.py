# SPDX-License-Identifier: Apache-2.0
"""A model's own wrong guesses: run by the executor, kept if wrong, written and read back."""

import random
import types

from etils import epath
import jax
import pytest

from absolute_zero_jax import documents, grammar, guesses, lexicon, tokenizer, tracing
from absolute_zero_jax.executor import Executor
from absolute_zero_jax.tasks import prompts as prompts_lib

PROMPTS = prompts_lib.load('tiny')
TOKENS = tokenizer.load(lexicon.FOLDER)
RECIPE = documents.Recipe()


class _Scripted:
  """A sampler that answers every induction with the same texts; the last one is the greedy one."""

  def __init__(self, texts):
    self._texts = texts
    self.requests = []

  def generate(self, params, requests, key, progress=None, temperature=1.0):
    del params, key, progress
    self.requests = requests
    assert {r.samples for r in requests} == {1 if temperature == 0 else guesses.SAMPLES}
    texts = self._texts[-1:] if temperature == 0 else self._texts
    return [[types.SimpleNamespace(ids=(*TOKENS.encode(text, bos=False), TOKENS.eos_id),
                                   finish=finish) for text, finish in texts]
            for _ in requests]


@pytest.fixture(scope='module')
def executor():
  with Executor(workers=2, score_timeout_s=0.5) as service:
    yield service


def _make(executor, texts, count=30):
  sampler = _Scripted(texts)
  return sampler, guesses.make(
      None, jax.random.key(0), seed=3, count=count, sampler=sampler, tokenizer=TOKENS,
      prompts=PROMPTS, recipe=RECIPE, submit=executor.submit)


def test_wrong_guesses_are_kept_as_the_grammar_would_check_them(executor):
  source = 'def f(a):\n    c = [a, a]\n    return c'
  sampler, made = _make(executor, [(source, 'stop'), (source, 'stop')])
  assert len(sampler.requests) == 30 and made
  for failed in made:
    # Once, though it was sampled twice.
    assert failed.checks == (tuple(tracing.check(
        source, documents.pairs_shown(failed.example, RECIPE))),)
    assert failed.checks[0][-1].endswith(': False')
    assert failed.example.program.startswith('def f(a):')
  prompt = TOKENS.decode(sampler.requests[0].prompt_ids)
  assert prompt.startswith('# find f\nf(') and prompt.endswith('\n# answer\n')


def test_the_preferred_guess_comes_first(executor):
  drawn = 'def f(a):\n    return [a]', 'stop'
  preferred = 'def f(a):\n    return (a,)', 'stop'
  _, made = _make(executor, [drawn, preferred])
  assert made
  for failed in made:
    assert [check[0] for check in failed.checks] == ['    return (a,)', '    return [a]']


def test_a_value_that_is_no_literal_is_a_wrong_one(executor):
  _, made = _make(executor, [('def f(a):\n    return frozenset([1])', 'stop'),
                             ("def f(a):\n    return float('inf')", 'stop')], count=20)
  assert made and all(check[-1].endswith(': False') for failed in made for check in failed.checks)


def test_every_induction_has_the_values_of_its_own_inputs(executor):
  """Also where a program occurs twice, with other inputs."""
  source = 'def f(a):\n    c = [a, a]\n    return c'
  _, made = _make(executor, [(source, 'stop')], count=120)
  keys = [failed.example.key for failed in made]
  assert len(set(keys)) < len(keys)
  for failed in made:
    assert failed.checks == (tuple(tracing.check(
        source, documents.pairs_shown(failed.example, RECIPE))),)


def test_what_cannot_serve_is_left_out(executor):
  """Errors, long values, unfinished texts, other parameters, files, and what is no program."""
  for text, finish in (
      ('def f(a):\n    return a.nothing', 'stop'), ("def f(a):\n    return 'x' * 99", 'stop'),
      ('def f(a):\n    c = 1', 'length'), ('def f(a, b, c):\n    return a', 'stop'),
      ('def f(a):\n    while True:\n        a = a', 'stop'), ('f(', 'stop'), ('', 'stop'),
      ("def f(a):\n    c = open('/tmp/azj_guess', 'w')\n    return a", 'stop')):
    _, made = _make(executor, [(text, finish)], count=4)
    assert made == [], text
  assert not epath.Path('/tmp/azj_guess').exists()


def test_right_guesses_and_the_test_side_are_left_out(executor):
  rng = random.Random('guesses 3')
  example = grammar.example(rng, RECIPE.depths, cases=RECIPE.cases)
  _, made = _make(executor, [(example.program, 'stop')], count=1)
  assert made == []
  held = grammar.test_set(1, 20)
  names = {grammar.is_held_out(grammar.key(e.program)) for e in held}
  _, made = _make(executor, [(e.program, 'stop') for e in held], count=3)
  assert names == {True} and made == []


def test_they_come_back_as_they_were_written(executor, tmp_path):
  _, made = _make(executor, [('def f(a):\n    c = [a, 0]\n    return c', 'stop')], count=10)
  path = epath.Path(tmp_path) / 'guesses.jsonl'
  guesses.write(path, made)
  assert made and guesses.read(path) == made
