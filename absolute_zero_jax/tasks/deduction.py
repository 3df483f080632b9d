# SPDX-License-Identifier: Apache-2.0
"""Deduction: given a program and an input, predict the output (`code_o` of the reference).

The proposing half is shared by the kinds whose problem is one program with one input: abduction and
error prediction extend this class and differ in what is hidden.
"""

from collections.abc import Callable, Sequence
import dataclasses
import re
from typing import Any

from absolute_zero_jax.executor import literals
from absolute_zero_jax.tasks import composite, identity, probes, program, text
from absolute_zero_jax.types import Job, Status, Task, Verdict

IDENTITY = 'def f(a):\n    return a'
HELLO = "'Hello world'"
_LABELS = ('input', 'output', 'message')


@dataclasses.dataclass(frozen=True)
class Deduction:
  """Program + input -> output.

  Attributes:
    rules: what a proposed program must look like.
    min_references: the fewest references a proposer prompt can do with.
    composites: when a proposal must build on functions of earlier tasks; by default never.
    probes: changed inputs that a proposal also runs on, to find out whether its output depends on
      the input; what becomes of them does not make it invalid.
    timeout_s: limit of processor time of each process; 0 takes the executor's.
  """
  name: str = 'deduction'
  rules: program.Rules = program.Rules()
  min_references: int = 0
  composites: composite.Schedule = composite.Schedule()
  probes: int = 0
  timeout_s: float = 0.0

  def seeds(self) -> list[Task]:
    """The zero triplet: identity, and a greeting as input and output."""
    key = identity.key(self.name, IDENTITY, (HELLO,))
    return [Task(self.name, IDENTITY, ((HELLO, HELLO),), key=key)]

  def references(self, buffer, rng, count: int, strategy: str = 'uniform') -> list[Task]:
    """`count` tasks of this kind (or all there are), drawn without replacement.

    Functions that the proposal must call follow them, as tasks of kind 'composite'.
    """
    found = buffer.references((self.name,), rng, count, strategy)
    return found + composite.draw(buffer, self.name, rng, self.composites)

  def propose_prompt(self, references: Sequence[Task], prompts, variant: int = 0) -> str:
    """Prompt for a new program with an input; `variant` picks the prompt set's own examples."""
    return prompts.render('propose', self.name, **self._fields(references, prompts, variant))

  def _fields(self, references: Sequence[Task], prompts, variant: int) -> dict[str, str]:
    plain, parts = composite.split(references)
    return {'references': prompts.references(self.name, plain, variant),
            'banned': ', '.join(self.rules.banned_words) or 'none',
            'composite': prompts.composite([part.program for part in parts])}

  def parse_proposal(self, answer: str, references: Sequence[Task]) -> program.Proposal | str:
    """The proposal, or the reason why it has no valid form.

    The program is the first Python block (or the last, see `program.Rules.fence`). The input is the
    first input block, else a trailing call of f in the program, else the line `# Input: ...`. It
    must be a list of constants.
    """
    blocks = text.fences(answer)
    found = program.read(blocks, self.rules)
    if isinstance(found, str):
      return found
    given = text.first(blocks, ('input',))
    if given is None:
      given = found.call or text.labelled_line(answer, 'input')
    if not given:
      return 'no_input'
    arguments = arguments_of(given)
    if arguments is None:
      return 'input_not_literal'
    arguments = text.positional(found.source, arguments)
    if arguments is None:
      return 'named_input'
    plain, parts = composite.split(references)
    if any(task.key == identity.key(self.name, found.source, (arguments,)) for task in plain):
      return 'copied'
    if not parts:
      return program.Proposal(found.source, (arguments,))
    reason = composite.refusal(found.source, parts)
    if reason:
      return reason
    return program.Proposal(composite.join(found.source, parts), (arguments,),
                            extra={'composite_functions': [part.program for part in parts],
                                   'original_snippet': found.source})

  def validation_jobs(self, proposal: program.Proposal) -> list[Job]:
    """One job: run, repeat, and check that the output equals itself; and one of the probes."""
    jobs = [Job('validate', proposal.program, proposal.inputs, timeout_s=self.timeout_s)]
    probed = self._probes(proposal)
    # Not beside the proposal's own input: there they would share its time and what it changes.
    return jobs + [Job('validate', proposal.program, probed, timeout_s=self.timeout_s)
                   ] * bool(probed)

  def _probes(self, proposal: program.Proposal) -> tuple[str, ...]:
    return probes.inputs(proposal.inputs[0], self.probes)

  def to_task(self, proposal: program.Proposal, verdicts: Sequence[Verdict],
              step: int) -> Task | str:
    """The task with canonical values, or the status that made it invalid."""
    verdict, *probed = verdicts
    if verdict.status is not Status.OK:
      return verdict.status.value
    cases = tuple((run.input, run.output) for run in verdict.runs)
    key = identity.key(self.name, proposal.program, [i for i, _ in cases])
    independent = bool(probed) and probes.independent((*verdict.runs, *probed[0].runs))
    return Task(self.name, proposal.program, cases, born_step=step, key=key,
                extra=proposal.extra | ({'independent': True} if independent else {}))

  def solve_prompt(self, task: Task, prompts) -> str:
    """Prompt for the output."""
    return prompts.solve(task)

  def parse_answer(self, answer: str) -> str | None:
    """The last output block, `# Output:` line, or else the whole answer; None when blank."""
    return answer_text(answer, 'output')

  def checking_jobs(self, task: Task, answer: str) -> list[Job]:
    """Compares the answer, as a value, with the stored output. Runs no program."""
    return [Job('compare', inputs=(answer,), expected=(task.output,), timeout_s=self.timeout_s)]

  def accuracy(self, task: Task, answer: str, verdicts: Sequence[Verdict]) -> float:
    """1 when the value is equal, else 0."""
    return float(_matches(verdicts) == [True])


def arguments_of(given: str, search: bool = True) -> str | None:
  """An input's argument list, or None: data as written, other constants as their values.

  Args:
    search: False refuses comprehensions, with which an answer would look for itself.
  """
  found = text.arguments(given)
  if found is None and (search or not re.search(r'\bfor\b', given)):
    call = re.fullmatch(r'f\((.*)\)', given.strip(), re.S)
    try:
      # sorted([3, 1]), 'x'.upper()
      found = literals.parse_inputs(call[1] if call else given).text or None
    except literals.LiteralError:
      pass
  return found


def answer_text(answer: str, label: str,
                reads: Callable[[str], Any] = text.arguments) -> str | None:
  """What an answer says, or None when that is blank.

  The last block of that label, the last `# Label:` line, what stands in words outside blocks (in
  `label(...)`, in tags, after `the label is`), the last block that may hold it, or all of it.

  Args:
    reads: None for words that are only prose, around a block that says it.

  Source: azr_spec 5.5.
  """
  blocks = text.fences(answer)
  found = text.last(blocks, (label,))
  if found is None:
    found = _unstopped(text.labelled_line(answer, label))
  if found is None and text.arguments(answer) is None:
    found = _unstopped(_in_words(text.outside_fences(answer), label))
    if found is not None and blocks and reads(found) is None:
      found = None
  if found is None and blocks:
    # What another label marks is quoted from the question.
    found = ([b for b in blocks if b.label not in _LABELS] or blocks)[-1].body
  found = (answer if found is None else found).strip()
  return found or None


def _unstopped(said: str | None) -> str | None:
  """Without a full stop at the end, which is the sentence's: no value is printed as `5.`."""
  if said is None or said.rstrip().endswith('..'):
    return said
  return said.strip().removesuffix('.').strip('`')


def _in_words(answer: str, label: str) -> str | None:
  def last(pattern):
    return next(reversed(re.findall(pattern, answer, re.I | re.M)), None)
  # Possessive, so that no run of blanks is divided in every way.
  ways = (lambda: last(rf'^[ \t]*+{label}\((.*)\)[ \t.]*$'),
          lambda: text.tagged(answer, label),
          lambda: last(rf'\bthe {label} is[ \t]*+(?::\s*+|(?!:))(\S.*)$'),
          lambda: last(rf'^[ \t]*+{label}[ \t]*+:[ \t]*+\n\s*+(\S.*)$'))
  return next((found for found in (way() for way in ways) if found is not None), None)


def _matches(verdicts: Sequence[Verdict]) -> list[bool]:
  return [run.status is Status.OK and run.matches for v in verdicts for run in v.runs]
