# SPDX-License-Identifier: Apache-2.0
"""Abduction: given a program and an output, find an input (`code_i` of the reference)."""

import dataclasses

from absolute_zero_jax.tasks import deduction, text
from absolute_zero_jax.types import Job, Task


@dataclasses.dataclass(frozen=True)
class Abduction(deduction.Deduction):
  """Program + output -> input. Any input that leads to the output is right."""
  name: str = 'abduction'

  def parse_answer(self, answer: str) -> str | None:
    """An argument list from the last input block, `# Input:` line, or the whole answer.

    A call of f around it is taken off. Text that is no list of constants is handed on as it is, so
    that it is scored as wrong rather than as badly formed.
    """
    found = deduction.answer_text(answer, 'input')
    return found and (deduction.arguments_of(found, search=False) or found)

  def checking_jobs(self, task: Task, answer: str) -> list[Job]:
    """Runs the program on the answer and compares with the stored output.

    No job, so wrong, for what is no data: the executor would work out a search through inputs.
    """
    if text.arguments(answer) is None:
      return []
    return [Job('run', task.program, (answer,), (task.output,), timeout_s=self.timeout_s)]
