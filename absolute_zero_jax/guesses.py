# SPDX-License-Identifier: Apache-2.0
"""A model's own wrong guesses at inductions, for its further pre-training to learn from.

  params, key --sampler--> a guess --executor--> values on the shown pairs --> guesses_STEP.jsonl
                   ^------ the next guess, told what came of those before -------'

A wrong guess that was drawn at random gives itself away by its looks, so a model that reads only
such ones never learns to compare values, nor to leave out what it has just tried. Its own guesses
look right to it, one after the other. They are a model's text, so they run in the executor, never
here.
"""

from collections.abc import Callable, Sequence
from concurrent import futures
import dataclasses
import json
import random
import re

from etils import epath
import jax

from absolute_zero_jax import documents, grammar, metrics, tasks, tracing
from absolute_zero_jax import sampler as sampler_lib
from absolute_zero_jax.models import decoder
from absolute_zero_jax.tasks import prompts as prompts_lib
from absolute_zero_jax.types import Job, Status

# At each induction it guesses so often in a row, once at each of these temperatures.
ROUNDS = 3
TEMPERATURES = (0.0, 1.0)
MAX_TOKENS = 96                  # of a guess, with the values that it writes in between
_STATEMENT = re.compile(r'\n(    .*)(?=\n)')


def make(params: decoder.Params, key: jax.Array, *, seed: str, count: int,
         sampler: sampler_lib.Sampler, tokenizer, prompts: prompts_lib.PromptSet,
         recipe: documents.Recipe, submit: Callable[[Job], futures.Future],
         progress: Callable[[int, int, int], None] | None = None) -> list[documents.Failed]:
  """Asks `count` inductions of the training side, with thinking opened; keeps the wrong guesses.

  The inductions depend on `seed` alone. A guess is kept if it runs on the shown pairs, is not right
  on all of them, and is of the shape of the grammar's programs and not of the test side. As long as
  that is so, and the sampler takes what has to be read, the next one is asked for.
  """
  rng = random.Random(f'guesses {seed}')
  examples = [grammar.example(rng, recipe.depths, cases=recipe.cases) for _ in range(count)]
  kind = tasks.get('induction', cases=recipe.cases)
  asked = [kind.solve_prompt(documents.induction(e, recipe), prompts) for e in examples]

  def stop(_, ids):
    return len(ids) if _source('', tokenizer.decode(ids)) else None

  made = []
  for turn, temperature in enumerate(TEMPERATURES):
    tried: list[list[tuple[str, ...]]] = [[] for _ in examples]
    going = range(count)
    for number in range(ROUNDS):
      before = (turn * ROUNDS + number) * count
      texts = (asked[n] + documents.thought(documents.rejected(tried[n])) for n in going)
      ids = {n: tuple(tokenizer.encode(text)) for n, text in zip(going, texts)}
      going = [n for n in going if len(ids[n]) <= sampler.max_prompt_tokens]
      samples = sampler.generate(
          params, [sampler_lib.Request(ids[n], 1, MAX_TOKENS, stream=n) for n in going],
          jax.random.fold_in(key, number), temperature=temperature, stop_fn=stop,
          progress=progress and (
              lambda tokens, rows, of, before=before: progress(tokens, before + rows, of)))
      sources = [_source(examples[n].program.split('\n')[0], tokenizer.decode(s.ids))
                 for n, (s,) in zip(going, samples)]
      jobs = [_jobs(examples[n], source, recipe, submit) for n, source in zip(going, sources)]
      checks = [_lines(examples[n], source, mine, recipe)
                for n, source, mine in zip(going, sources, jobs)]
      for n, lines in zip(going, checks):
        tried[n] += [lines] if lines else []
      going = [n for n, lines in zip(going, checks) if lines]
    made += [documents.Failed(e, tuple(x)) for e, x in zip(examples, tried) if x]
  return made


def _source(head: str, text: str) -> str:
  """The program that a thought guesses, without the values in between; '' before its `return`."""
  lines = [head]
  for line in _STATEMENT.findall(text):
    lines.append(line)
    if line.startswith('    return '):
      return '\n'.join(lines)
  return ''


def _jobs(example, source, recipe, submit) -> dict[str, futures.Future]:
  """By program, what its statements make on the shown inputs; empty for what is no wrong guess."""
  try:
    parts = tracing.pieces(source)
  except ValueError:
    return {}
  if grammar.is_held_out(grammar.key(source)):
    return {}
  programs = dict.fromkeys([source, *(program for _, _, program in parts if program)])
  inputs = example.inputs[:recipe.shown]
  return {program: submit(Job('run', program, inputs)) for program in programs}


def _lines(example, source, jobs, recipe) -> tuple[str, ...]:
  """The guess as it is worked out; () if a value is missing or too long, or if it is right."""
  outputs = {}
  for program, job in jobs.items():
    runs = job.result().runs
    if len(runs) < recipe.shown or any(
        run.status is not Status.OK or len(run.output) > grammar.MAX_VALUE_CHARS for run in runs):
      return ()
    outputs[program] = [run.output for run in runs]
  pairs = documents.pairs_shown(example, recipe)
  if not jobs or all(grammar.agree(made, wanted)
                     for made, (_, wanted) in zip(outputs[source], pairs)):
    return ()
  return tuple(tracing.check(source, pairs, lambda program, _: outputs[program]))


def write(path: epath.Path, made: Sequence[documents.Failed]) -> None:
  """One line of JSON per induction."""
  metrics.write_atomically(path, ''.join(
      json.dumps(dataclasses.asdict(x)) + '\n' for x in made))


def read(path: epath.Path) -> list[documents.Failed]:
  """What `write` wrote."""
  out = []
  for line in path.read_text().splitlines():
    row = json.loads(line)
    example = {k: tuple(v) if isinstance(v, list) else v for k, v in row['example'].items()}
    out.append(documents.Failed(grammar.Example(**example), tuple(map(tuple, row['checks']))))
  return out
