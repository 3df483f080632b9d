# SPDX-License-Identifier: Apache-2.0
"""Error prediction: does the program raise on the input, and what (`code_e` of the reference)."""

import ast
from collections.abc import Sequence
import dataclasses
import io
import keyword
import re
import tokenize

from absolute_zero_jax.tasks import deduction, program, text
from absolute_zero_jax.types import Job, Task, Verdict

NO_ERROR = 'NoError'
# What `Error.parse_answer` can give back; the executor cuts names at 60 characters.
_ANSWERABLE = re.compile(r'[A-Za-z_]\w{0,58}')


@dataclasses.dataclass(frozen=True)
class Error(deduction.Deduction):
  """Program + input -> class name of the exception, or NoError.

  Attributes:
    banned_statements: keywords a proposal may not use, e.g. ('raise', 'assert'), so that the error
      has to be found rather than read.
  """
  name: str = 'error'
  banned_statements: tuple[str, ...] = ()

  def __post_init__(self):
    unknown = set(self.banned_statements) - {*keyword.kwlist, *keyword.softkwlist}
    if unknown:
      raise ValueError(f'banned_statements={self.banned_statements!r}: {sorted(unknown)} are no '
                       'keywords of Python.')

  def seeds(self) -> list[Task]:
    """The zero triplet, which raises nothing."""
    task = super().seeds()[0]
    return [dataclasses.replace(task, cases=((deduction.HELLO, NO_ERROR),))]

  def _fields(self, references: Sequence[Task], prompts, variant: int) -> dict[str, str]:
    return {**super()._fields(references, prompts, variant),
            'banned_statements': ', '.join(self.banned_statements) or 'none'}

  def parse_proposal(self, answer: str, references: Sequence[Task]) -> program.Proposal | str:
    """As for deduction; 'banned_statement' where the program holds one."""
    found = super().parse_proposal(answer, references)
    if isinstance(found, str):
      return found
    tree = text.parse(found.program)
    if tree is None:       # with the functions it builds on
      return 'program_too_long'
    # Words such as `match` are names too, and then no statements.
    used = {type(node).__name__.lower() for node in ast.walk(tree)} & set(keyword.softkwlist)
    used.update(token.string for token in tokenize.generate_tokens(
        io.StringIO(found.program).readline) if keyword.iskeyword(token.string))
    return 'banned_statement' if used & set(self.banned_statements) else found

  def validation_jobs(self, proposal: program.Proposal) -> list[Job]:
    """As for deduction, with the exception's name as the outcome."""
    return [dataclasses.replace(job, expect_error=True)
            for job in super().validation_jobs(proposal)]

  def _probes(self, proposal: program.Proposal) -> tuple[str, ...]:
    return ()            # most inputs raise nothing: equal outcomes say nothing

  def to_task(self, proposal: program.Proposal, verdicts: Sequence[Verdict],
              step: int) -> Task | str:
    """As for deduction; 'error_name' where no answer could give the exception's name."""
    task = super().to_task(proposal, verdicts, step)
    if isinstance(task, str):
      return task
    tree = text.parse(task.program)
    is_ambiguous = tree is not None and NO_ERROR in program.bound_names(tree)
    return 'error_name' if is_ambiguous or not _ANSWERABLE.fullmatch(task.output) else task

  def parse_answer(self, answer: str) -> str | None:
    """The first identifier of the answer, e.g. `ValueError` of `ValueError: bad digit`."""
    said = deduction.answer_text(answer, 'output', reads=re.compile('[A-Z]').match)
    found = re.search(r'[A-Za-z_]\w*(\.\w+)*', said or '')
    return found and found[0].rsplit('.', 1)[-1]

  def checking_jobs(self, task: Task, answer: str) -> list[Job]:
    """None: names are compared as text."""
    return []

  def accuracy(self, task: Task, answer: str, verdicts: Sequence[Verdict]) -> float:
    """1 when the names are equal, upper and lower case aside."""
    return float(answer.lower() == task.output.lower())
