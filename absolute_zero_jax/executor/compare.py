# SPDX-License-Identifier: Apache-2.0
"""Answers against golds as values: what 'compare' jobs say, without running anything."""

from collections.abc import Iterable
import functools
from typing import Any

from absolute_zero_jax.executor import literals, values
from absolute_zero_jax.types import Job, Run, Status, Verdict

# Of a longer text no value is remembered: it takes up to 50 times the room.
MAX_KEPT_CHARS = 256

# From best to worst; a verdict has the worst status of its runs.
SEVERITY = (Status.OK, Status.REJECTED, Status.ERROR, Status.NONDETERMINISTIC, Status.TIMEOUT,
            Status.MEMORY, Status.CRASHED, Status.UNSAFE)


def answers(job: Job, equality: str) -> Verdict:
  """The verdict on a job's inputs, which are answers, against what it expects."""
  runs = []
  for i, answer in enumerate(job.inputs):
    gold = job.expected[i] if i < len(job.expected) else ''
    try:
      if job.expect_error:
        literals.check_text(answer)
        runs.append(Run(Status.OK, answer, error_name(answer),
                        error_name(answer) == error_name(gold) != ''))
        continue
      value = literals.parse_value(answer, fold=equality == 'loose')
      text = values.text(value)
    except literals.LiteralError as e:
      runs.append(Run(Status.REJECTED, error=f'answer: {e}'))
      continue
    try:
      matches = values.equal(value, value_of(gold), equality)
    except literals.LiteralError:
      matches = False
    runs.append(Run(Status.OK, text, text, matches))
  status, error = worst_of(runs)
  return Verdict(status, tuple(runs), error=error)


def worst_of(runs: Iterable[Run]) -> tuple[Status, str]:
  """Status and error of the worst run; OK for none."""
  worst = max(runs, key=lambda r: SEVERITY.index(r.status), default=Run(Status.OK))
  return worst.status, worst.error


def value_of(text: str) -> Any:
  """The value that a text says; LiteralError where it is none."""
  parse = _parsed if len(text) <= MAX_KEPT_CHARS else literals.parse_value
  return parse(text)


@functools.lru_cache(2048)
def _parsed(text: str) -> Any:
  return literals.parse_value(text)


def error_name(text: str) -> str:
  """An exception's name as it is compared: first word, up to a colon, in lower case.

  Source: the reference's treatment of code_e answers.
  """
  words = text.strip().strip('\'"`').split(':')[0].split()
  return words[0].lower() if words else ''
