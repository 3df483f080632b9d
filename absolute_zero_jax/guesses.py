# SPDX-License-Identifier: Apache-2.0
"""A model's own wrong guesses at inductions, for its further pre-training to learn from.

  params, key --sampler--> programs --executor--> values on the shown pairs --> guesses.jsonl

A wrong guess that was drawn at random gives itself away by its looks, so a model that reads only
such ones never learns to compare values, nor to leave out what it has just tried. Its own guesses
look right to it. They are a model's text, so they run in the executor, never here.
"""

from collections.abc import Callable, Sequence
from concurrent import futures
import dataclasses
import json
import random

from etils import epath
import jax

from absolute_zero_jax import documents, grammar, metrics, tasks, tracing
from absolute_zero_jax import sampler as sampler_lib
from absolute_zero_jax.models import decoder
from absolute_zero_jax.tasks import prompts as prompts_lib
from absolute_zero_jax.types import Job, Role, Status

SAMPLES = 4                      # guesses drawn at each induction, beside the preferred one
MAX_TOKENS = 64                  # of a guess


def make(params: decoder.Params, key: jax.Array, *, seed: int, count: int,
         sampler: sampler_lib.Sampler, tokenizer, prompts: prompts_lib.PromptSet,
         recipe: documents.Recipe, submit: Callable[[Job], futures.Future],
         progress: Callable[[int, int, int], None] | None = None) -> list[documents.Failed]:
  """Asks `count` inductions of the training side, answered at once, and keeps what is wrong.

  The inductions depend on `seed` alone. The guesses are the greedy answer and `SAMPLES` drawn at
  temperature 1, in this order, each text once. One is kept if it runs on the shown pairs, is not
  right on all of them, and is of the shape of the grammar's programs; inductions without one are
  left out, and a guess of the test side is, too.
  """
  rng = random.Random(f'guesses {seed}')
  examples = [grammar.example(rng, recipe.depths, cases=recipe.cases) for _ in range(count)]
  kind = tasks.get('induction', cases=recipe.cases)
  mark = prompts.formats[f'{Role.SOLVE.value}_induction'].after
  asked = [tuple(tokenizer.encode(
      kind.solve_prompt(documents.induction(e, recipe), prompts) + mark)) for e in examples]

  def answers(samples, before, **options):
    requests = [sampler_lib.Request(ids, samples, MAX_TOKENS) for ids in asked]
    return sampler.generate(params, requests, key, progress=progress and (
        lambda made, finished, left: progress(made, before + finished, left)), **options)

  preferred = answers(1, 0, temperature=0.0)
  drawn = answers(SAMPLES, count)
  guessed = [(example, list(dict.fromkeys(
      tokenizer.decode(s.ids[:-1]) for s in (*first, *others) if s.finish == 'stop')))
             for example, first, others in zip(examples, preferred, drawn)]
  pending = [[_jobs(example, source, recipe, submit) for source in sources]
             for example, sources in guessed]
  made = []
  for (example, sources), jobs in zip(guessed, pending):
    checks = [_lines(example, source, mine, recipe) for source, mine in zip(sources, jobs)]
    made.append(documents.Failed(example, tuple(filter(None, checks))))
  return [failed for failed in made if failed.checks]


def _jobs(example, source, recipe, submit) -> dict[str, futures.Future]:
  """By program, what its statements make on the shown inputs; empty for what is no wrong guess."""
  try:
    parts = tracing.pieces(source)
  except ValueError:
    return {}
  if (source.split('\n')[0] != example.program.split('\n')[0]
      or grammar.is_held_out(grammar.key(source))):
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
