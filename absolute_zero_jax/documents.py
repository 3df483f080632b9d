# SPDX-License-Identifier: Apache-2.0
"""What the carried model is pre-trained on: prompts of a prompt set, answered by an interpreter.

  random.Random --document--> spans of text --rows--> token arrays [B, T]

A document is one proposal, or one program with several questions about it, or one set of examples
with the program behind them. Every prompt is rendered by the task kinds and the prompt set that
self-play uses, so that the model meets there exactly what it has read here. Some answers begin with
thinking, which is what the interpreter saw on its way.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import random
import re
from typing import NamedTuple

import numpy as np

from absolute_zero_jax import grammar, tasks, tracing
from absolute_zero_jax.tasks import prompts as prompts_lib
from absolute_zero_jax.types import Role, Task

THINK, REJECT = '\n# think', '\n# no'
# Share of a batch that is filled: first-fit-decreasing finds room for nearly all of it.
_FILL = 0.98
_TRIES = 200              # documents of which one must fit a line
# Lines of a program inside a thought.
_GUESS = re.compile(r'((?:\n    .*)+)')


class Rows(NamedTuple):
  """Packed documents. `weights_BT` is the weight of each token as a target; 0 on padding."""
  tokens_BT: np.ndarray
  positions_BT: np.ndarray
  segments_BT: np.ndarray
  weights_BT: np.ndarray


@dataclasses.dataclass(frozen=True)
class Recipe:
  """The mixture.

  Attributes:
    depths: see `grammar`.
    propose: share of the documents that propose, the kinds alike.
    induce: share of the documents that solve inductions.
    questions: asked about each program, half deductions and half abductions.
    think: share of the answers that begin with thinking.
    think_prior: how often a model that has learnt this begins with thinking when left free. The
      first token of the answers that think is weighted for it, so that an ability may be taught
      in many examples and yet be used seldom.
    prompt_weight: of a prompt's tokens as targets; those of a response count 1.
    max_think_lines: of longer thinking the last wrong guesses are left out; if it is still longer,
      the answer is given at once.
    references: the most programs shown to a proposal.
    cases: pairs of an induction; the first half is shown.
    fail: share of the thoughts about inductions that begin with wrong guesses of the model's own,
      once there are some.
    turn_weight: of the token at which the right guess turns away from one that has failed. With 1
      a second guess is another one when it is drawn, but the likeliest one, token by token, is
      mostly the first again.
  """
  depths: Sequence[int] = grammar.SHALLOW
  propose: float = 0.15
  induce: float = 0.34
  questions: int = 3
  think: float = 0.8
  think_prior: float = 0.25
  prompt_weight: float = 0.2
  max_think_lines: int = 60
  references: int = 2
  cases: int = 6
  fail: float = 0.8
  turn_weight: float = 5.0

  @property
  def shown(self) -> int:
    """Pairs of an induction that its solver sees."""
    return self.cases // 2

  def think_weight(self) -> float:
    """Weight of the first token of an answer that thinks, where one that does not has 1."""
    share, prior = self.think, self.think_prior
    return prior * (1 - share) / max(share * (1 - prior), 1e-9) if 0 < share < 1 else 1.0


@dataclasses.dataclass(frozen=True)
class Failed:
  """An induction, and wrong guesses that a model made at it one after the other.

  A guess is the lines of `tracing.check`.
  """
  example: grammar.Example
  checks: tuple[tuple[str, ...], ...]


class Writer:
  """Documents of one prompt set and recipe; held-out programs never occur.

  Args:
    failed: inductions with a model's own wrong guesses, which then take the place of `rival`s.

  Raises:
    ValueError: the prompts are not continued by a bare answer, so none can be written.
  """

  def __init__(self, prompts: prompts_lib.PromptSet, recipe: Recipe,
               failed: Sequence[Failed] = ()):
    self._prompts, self.recipe, self._failed = prompts, recipe, failed
    names = ('deduction', 'abduction', 'induction')
    self._kinds = {name: tasks.get(name, cases=recipe.cases) for name in names}
    missing = [f'solve_{name}' for name in names if f'solve_{name}' not in prompts.formats]
    if missing or prompts.wrapper in prompts_lib.WRAPPERS_WITH_TAGS:
      raise ValueError(
          f"selfplay.prompts={prompts.name!r} (wrapper {prompts.wrapper!r}) cannot be pre-trained "
          f"on: its set.json has no formats of {missing or 'answers without tags'}; take 'tiny', "
          'or a set whose prompts an answer continues.')
    prompts_lib.check(prompts, self._kinds.values(), references=recipe.references)

  def document(self, rng: random.Random) -> list[tuple[str, str]]:
    """(prompt, response) pairs that follow each other; an end token stands after each response."""
    example = self._example(rng)
    draw = rng.random()
    if draw < self.recipe.propose:
      return [self._proposal(rng, example)]
    if draw < self.recipe.propose + self.recipe.induce:
      return [self._induction(rng, example)]
    out = []
    for case in rng.sample(range(self.recipe.cases), self.recipe.questions):
      kind = rng.choice(('deduction', 'abduction'))
      prompt = self._kinds[kind].solve_prompt(_task(kind, example, case), self._prompts)
      # The program stands once, before the first question.
      question = prompt.removeprefix(example.program) if out else prompt
      out.append((question, self._answer(rng, kind, example, case)))
    return out

  def _example(self, rng):
    return grammar.example(rng, self.recipe.depths, cases=self.recipe.cases)

  def _proposal(self, rng, example):
    kind = rng.choice(list(self._kinds))
    if kind == 'induction':
      prompt = self._kinds[kind].propose_prompt([_task('deduction', example, 0)], self._prompts)
      return prompt, ''.join(f'\nf({given})' for given in example.inputs)
    shown = [_task(kind, self._example(rng), 0)
             for _ in range(rng.choice((0, 0, *range(1, self.recipe.references + 1))))]
    prompt = self._kinds[kind].propose_prompt(shown, self._prompts)
    return prompt, f'{example.program}\nf({example.inputs[0]})'

  def _answer(self, rng, kind, example, case):
    given, output = example.inputs[case], example.outputs[case]
    steps: list[str] = []
    if rng.random() < self.recipe.think:
      steps += tracing.trace(example.program, given)
      if kind == 'abduction':
        steps.reverse()
    if len(steps) > self.recipe.max_think_lines:
      steps = []
    return _response(self._prompts, kind, steps, output if kind == 'deduction' else given)

  def _induction(self, rng, example):
    think = rng.random() < self.recipe.think
    wrong: Sequence[Sequence[str]] = ()
    if think and self._failed and rng.random() < self.recipe.fail:
      made = rng.choice(self._failed)
      example = made.example
      wrong = made.checks[:rng.choice((1, 2, 3))]
    elif think and not self._failed:
      wrong = self._rivals(rng, example)
    prompt = self._kinds['induction'].solve_prompt(induction(example, self.recipe), self._prompts)
    steps: list[str] = []
    if think:
      right = tracing.check(example.program, pairs_shown(example, self.recipe))
      steps = rejected(wrong) + right
      while wrong and len(steps) > self.recipe.max_think_lines:
        wrong = wrong[:-1]
        steps = rejected(wrong) + right
    if len(steps) > self.recipe.max_think_lines:
      steps = []
    return prompt, _response(self._prompts, 'induction', steps, example.program)

  def _rivals(self, rng, example):
    drawn = [grammar.rival(rng, example, range(self.recipe.shown))
             for _ in range(rng.choice((0, 0, 1, 1, 2)))]
    pairs = pairs_shown(example, self.recipe)
    return [tracing.check(guess, pairs) for guess in dict.fromkeys(filter(None, drawn))]


def induction(example: grammar.Example, recipe: Recipe) -> Task:
  """The example as a task to find its program."""
  return _task('induction', example, 0, recipe.shown)


def pairs_shown(example: grammar.Example, recipe: Recipe) -> list[tuple[str, str]]:
  """The pairs of an induction that the solver sees."""
  return list(zip(example.inputs, example.outputs))[:recipe.shown]


def rejected(wrong: Sequence[Sequence[str]]) -> list[str]:
  """Guesses that failed, as steps of a thought."""
  return [step for lines in wrong for step in (*lines, REJECT.strip())]


def thought(steps: Sequence[str]) -> str:
  """Thinking, opened and not yet closed by an answer."""
  return THINK + ''.join(f'\n{step}' for step in steps)


def rows(write: Writer, tokenizer, rng: random.Random, shape: tuple[int, int]) -> Rows:
  """`shape` (B, T) filled with whole documents; those longer than T are left out.

  Raises ValueError where all seem to be longer.
  """
  B, T = shape
  ints = [np.full((B, T), fill, np.int32) for fill in (tokenizer.pad_id, 0, 0)]
  out = Rows(*ints, np.zeros((B, T), np.float32))
  documents, total, shortest = [], 0, None
  for tried, (ids, weights) in enumerate(encoded(write, tokenizer, rng), 1):
    shortest = min(shortest or len(ids), len(ids))
    if tried == _TRIES and not documents:
      raise ValueError(f'pretrain.line_tokens={T} is less than each of {_TRIES} documents has; the '
                       f'shortest has {shortest}. Set it higher, or take another model.tokenizer '
                       'or selfplay.prompts.')
    if len(ids) <= T:
      documents.append((ids, weights))
      total += len(ids)
    if total > _FILL * B * T:
      break
  used, segments = [0] * B, [0] * B
  for ids, weights in sorted(documents, key=lambda d: -len(d[0])):
    line = next((i for i in range(B) if used[i] + len(ids) <= T), None)
    if line is None:     # a few short ones are left over
      continue
    place = line, slice(used[line], used[line] + len(ids))
    used[line] += len(ids)
    segments[line] += 1
    out.tokens_BT[place] = ids
    out.positions_BT[place] = np.arange(len(ids))
    out.segments_BT[place] = segments[line]
    # Nothing stands before the first token, so nothing predicts it.
    out.weights_BT[place] = [0.0, *weights[1:]]
  return out


def encoded(write: Writer, tokenizer,
            rng: random.Random) -> Iterator[tuple[list[int], list[float]]]:
  """(ids, weights) of one document after the other, without end."""
  recipe = write.recipe
  while True:
    ids: list[int] = []
    weights: list[float] = []
    for prompt, response in write.document(rng):
      prompt_ids = tokenizer.encode(prompt)
      ids += prompt_ids
      weights += [recipe.prompt_weight] * len(prompt_ids)
      for piece, its_weights in _weighed(response, recipe, tokenizer):
        ids += piece
        weights += its_weights
      ids.append(tokenizer.eos_id)
      weights.append(1.0)
    yield ids, weights


def _weighed(response: str, recipe: Recipe,
             tokenizer) -> Iterator[tuple[list[int], list[float]]]:
  """The tokens of the response in pieces, with their weights.

  A guess that fails weighs nothing, so that the model does not learn to make it, but what comes of
  it does: that it is worked out truly, and that another one follows.
  """
  def piece(text, weight=1.0):
    ids = tokenizer.encode(text, bos=False)
    return ids, [weight] * len(ids)

  if response.startswith(THINK):
    yield piece(THINK, recipe.think_weight())
    response = response.removeprefix(THINK)
  failed, mark, rest = response.rpartition(REJECT)
  for text in _GUESS.split(failed):
    yield piece(text, 0.0 if _GUESS.fullmatch(text) else 1.0)
  yield piece(mark)
  ids, weights = piece(rest)
  for guess in failed.split(REJECT) if mark else ():
    for i, (mine, theirs) in enumerate(zip(ids, piece(guess)[0])):
      if mine != theirs:
        weights[i] = recipe.turn_weight
        break
  yield ids, weights


def _task(kind: str, example: grammar.Example, case: int, shown: int = 0) -> Task:
  pairs = tuple(zip(example.inputs, example.outputs))
  cases = pairs if shown else (pairs[case],)
  return Task(kind, example.program, cases, shown=shown, key=example.key)


def _response(prompts, kind: str, steps: Sequence[str], answer: str) -> str:
  """The answer behind its mark, and before it the thinking, if there is any."""
  mark = prompts.formats[f'{Role.SOLVE.value}_{kind}'].after
  return (thought(steps) if steps else '') + mark + answer
