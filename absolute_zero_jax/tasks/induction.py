# SPDX-License-Identifier: Apache-2.0
"""Induction: given input/output pairs and a message, write the program (`code_f`)."""

from collections.abc import Iterable, Sequence
import dataclasses
import re

from absolute_zero_jax import rewards
from absolute_zero_jax.executor import literals, values
from absolute_zero_jax.tasks import deduction, identity, probes, program, text
from absolute_zero_jax.types import Job, Status, Task, Verdict

# The reference's first item holds the same values, one of them as the call dict(a=1, b=2).
_ZERO_VALUES = (deduction.HELLO, '1', "{'a': 1, 'b': 2}", '(1.1, 1.2, 1.3)',
                "'[[1, 0, 0], [0, 0, 0], [0, 0, 0]]'", '1001101100010001')
_ZERO_MESSAGE = 'Give back whatever is put in.'


@dataclasses.dataclass(frozen=True)
class Induction:
  """Examples + message -> program.

  Proposing means: given a program from the other kinds, write inputs and a message. The first half
  of the pairs is shown to the solver, the rest scores it.

  Attributes:
    cases: pairs per task; the paper has 10, small models manage 4 or 5.
    distinct_inputs: inputs that repeat an earlier one do not count.
    score: 'binary' (all hidden pairs right), 'accuracy' (share right) or 'if_one_correct'. A pair
      on which the program gives nothing counts as wrong.
    source_kinds: kinds whose programs are shown to the proposer.
    max_message_chars: longer messages are refused.
    quotes_code: allows a message that holds a line of the program.
    min_references: a proposer prompt needs its program.
    timeout_s: limit of processor time of each process; 0 takes the executor's.
  """
  name: str = 'induction'
  cases: int = 10
  distinct_inputs: bool = True
  score: str = 'binary'
  source_kinds: tuple[str, ...] = ('abduction', 'deduction')
  max_message_chars: int = 2000
  quotes_code: bool = False
  min_references: int = 1
  timeout_s: float = 0.0

  def __post_init__(self):
    object.__setattr__(self, 'source_kinds', tuple(self.source_kinds))
    if self.cases < 2:
      raise ValueError(f'induction cases={self.cases} must be at least 2: one shown, '
                       'one hidden.')
    if self.score not in rewards.INDUCTION:
      raise ValueError(f'induction score={self.score!r} must be one of {rewards.INDUCTION}.')

  def seeds(self) -> list[Task]:
    """Identity with six pairs, three shown."""
    cases = tuple((value, value) for value in _ZERO_VALUES)
    return [Task(self.name, deduction.IDENTITY, cases, _ZERO_MESSAGE, shown=3,
                 key=identity.key(self.name, deduction.IDENTITY, _ZERO_VALUES))]

  def references(self, buffer, rng, count: int, strategy: str = 'uniform') -> list[Task]:
    """One program from the union of the other kinds' stores, or from its own when they are empty.

    The union is not reduced: a program that is in both stores has twice the chance, as in the
    reference.
    """
    del count
    return (buffer.references(self.source_kinds, rng, 1, strategy)
            or buffer.references((self.name,), rng, 1, strategy))

  def propose_prompt(self, references: Sequence[Task], prompts, variant: int = 0) -> str:
    """Prompt for inputs and a message for the program of the one reference.

    Raises ValueError for no reference.
    """
    if not references:
      raise ValueError('an induction is proposed for the program of a reference; there is none.')
    source = references[0]
    return prompts.render('propose', self.name, program=source.program, input=source.input,
                          cases=self.cases,
                          references=prompts.references(self.name, (), variant, source.program))

  def parse_proposal(self, answer: str, references: Sequence[Task]) -> program.Proposal | str:
    """Program of the reference, the last `cases` inputs, and the message.

    Inputs are input blocks, or else lines of calls of f, one or a list. The message is the
    first message block, else message tags, else the line `# Message:`. It may not hold the code,
    but what docstrings and comments say.
    """
    blocks = text.fences(answer)
    inputs = [deduction.arguments_of(b.body) for b in blocks if b.label == 'input']
    inputs = inputs or [call for line in answer.split('\n') for call in text.calls(line)]
    if inputs and not any(inputs):
      return 'input_not_literal'
    source = references[0].program
    inputs = [text.positional(source, i) for i in inputs if i is not None]
    inputs = [i for i in inputs if i is not None]
    if self.distinct_inputs:
      inputs = _unlike(inputs)
    if len(inputs) < self.cases:
      return 'few_inputs'
    message = text.first(blocks, ('message',))
    if message is None:
      message = text.tagged(answer, 'message') or text.labelled_line(answer, 'message') or ''
    message = message.strip()
    if not message:
      return 'no_message'
    if len(message) > self.max_message_chars:
      return 'message_too_long'
    if not self.quotes_code and _tells_code(message, source):
      return 'message_tells_code'
    return program.Proposal(source, tuple(inputs[-self.cases:]), message)

  def validation_jobs(self, proposal: program.Proposal) -> list[Job]:
    """One job with all inputs."""
    return [Job('validate', proposal.program, proposal.inputs, timeout_s=self.timeout_s)]

  def to_task(self, proposal: program.Proposal, verdicts: Sequence[Verdict],
              step: int) -> Task | str:
    """The task, the status of the worst input (a bad one spoils the proposal), or 'few_inputs'."""
    verdict = verdicts[0]
    if verdict.status is not Status.OK:
      return verdict.status.value
    cases = tuple((run.input, run.output) for run in verdict.runs)
    # One value written in two ways; seed files do repeat inputs.
    if self.distinct_inputs and len(dict(cases)) < len(set(proposal.inputs)):
      return 'few_inputs'
    key = identity.key(self.name, proposal.program, [i for i, _ in cases])
    return Task(self.name, proposal.program, cases, proposal.message, shown=len(cases) // 2,
                born_step=step, key=key, extra=proposal.extra | (
                    {'independent': True} if probes.independent(verdict.runs) else {}))

  def solve_prompt(self, task: Task, prompts) -> str:
    """Prompt for the program: shown pairs and message."""
    return prompts.solve(task)

  def parse_answer(self, answer: str) -> str | None:
    """The last Python block, or else the last block without a label; None without either."""
    blocks = text.fences(answer)
    found = text.last(blocks, text.PYTHON_LABELS)
    if found is None:
      found = text.last(blocks, ('',))
    return program.dedented(found).strip('\n') or None if found else None

  def checking_jobs(self, task: Task, answer: str) -> list[Job]:
    """Runs the answer, with what it lacks of the task's imports on top, on the hidden inputs."""
    hidden = task.cases[task.shown:]
    source = program.with_imports(answer, program.missing_imports(answer, task.program))
    return [Job('run', source, tuple(i for i, _ in hidden), tuple(o for _, o in hidden),
                timeout_s=self.timeout_s)]

  def accuracy(self, task: Task, answer: str, verdicts: Sequence[Verdict]) -> float:
    """Score over all hidden pairs, by `score`; a pair without a result is wrong."""
    runs = [run for v in verdicts for run in v.runs]
    right = [run.status is Status.OK and run.matches for run in runs]
    missing = len(task.cases) - task.shown - len(right)
    return rewards.induction_score(right + [False] * missing, self.score)


def _unlike(inputs: Iterable[str]) -> list[str]:
  """The inputs that equal no earlier one for Python: 1, 1.0 and True are one key of a dict."""
  kept = {}
  for given in dict.fromkeys(inputs):
    try:
      found = literals.parse_inputs(given)
      key = values.key((*found.args, found.kwargs), 'loose')
    except literals.LiteralError:        # the executor says why, or works out a call of f
      key = None, given
    kept.setdefault(key, given)
  return list(kept.values())


def _tells_code(message: str, source: str) -> bool:
  """Whether a line of the program's body (of some length) stands in the message."""
  first, *body = program.without_docstrings(source).splitlines() or ['']
  head = re.search(r'\)\s*+(->[^:]*+)?:', first)
  body.append(first[head.end():] if head else first)           # def f(x): return ...
  lines = (line.strip(' \t;') for line in body)
  return any(len(line) >= 12 and not line.startswith('#')
             and re.search(re.escape(line) + r'(?!\w)', message) for line in lines)
