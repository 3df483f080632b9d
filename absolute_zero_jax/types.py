# SPDX-License-Identifier: Apache-2.0
"""The nouns of self-play: task, job, verdict, turn, episode.

Standard library only, because the executor's processes import this module. Array nouns
(`learner.Batch`, `sampler.Sample`) live with the device code.

`The reference`, here and everywhere, is the code of the Absolute Zero Reasoner. Its names stand on
the right: propose = gen, solve = pred, deduction = code_o, abduction = code_i, induction = code_f.
"""

import dataclasses
import enum
from typing import Any


class Role(enum.StrEnum):
  """What the model is asked for: a new task, or the answer to one. Each is its own name as text."""
  PROPOSE = 'propose'
  SOLVE = 'solve'


class Status(str, enum.Enum):
  """How one program run, or one whole job, ended. The only vocabulary of outcomes."""
  OK = 'ok'                            # finished; every output is a plain value
  ERROR = 'error'                      # raised, or its output is no plain value
  TIMEOUT = 'timeout'                  # wall or CPU limit
  MEMORY = 'memory'                    # address-space limit
  REJECTED = 'rejected'                # refused before running: syntax, policy, input is no literal
  UNSAFE = 'unsafe'                    # tried something forbidden while running
  NONDETERMINISTIC = 'nondeterministic'
  CRASHED = 'crashed'                  # the process died, or its report was unreadable


@dataclasses.dataclass(frozen=True)
class Task:
  """One validated problem. Values are canonical literal text written by the trusted side.

  Attributes:
    kind: name of the task type, e.g. 'deduction'.
    program: source that defines `f`; imports first.
    cases: (argument list, output) pairs. Deduction and abduction have one, induction has several;
      the error kind stores the exception's name (or 'NoError') as output.
    message: induction only: the hint shown with the visible cases.
    shown: induction only: how many leading cases the solver sees; the rest score it.
    born_step: iteration that proposed it; 0 for seeds.
    key: hash of the normalised program and its inputs; equal keys are duplicates.
    extra: anything a user's own kind needs; must be JSON-serialisable. 'independent': True says
      that the output was found not to depend on the input (`tasks.probes`), 'original_snippet'
      the program without functions that it was given (`tasks.composite`).
  """
  kind: str
  program: str
  cases: tuple[tuple[str, str], ...]
  message: str = ''
  shown: int = 0
  born_step: int = 0
  key: str = ''
  extra: dict[str, Any] = dataclasses.field(default_factory=dict)

  @classmethod
  def from_row(cls, row: dict[str, Any]) -> 'Task':
    """The task that `dataclasses.asdict` made the row of, also after JSON made lists of tuples."""
    return cls(**row | {'cases': tuple((given, output) for given, output in row['cases'])})

  @property
  def input(self) -> str:
    """Argument list of the first case."""
    return self.cases[0][0]

  @property
  def output(self) -> str:
    """Output of the first case."""
    return self.cases[0][1]

  @property
  def independent(self) -> bool:
    """Whether the output was found not to depend on the input."""
    return bool(self.extra.get('independent'))

  @property
  def own_program(self) -> str:
    """What the proposer wrote of the program: not the functions that a composite was given."""
    return self.extra.get('original_snippet', self.program)


@dataclasses.dataclass(frozen=True)
class Job:
  """One program and its K inputs, for the executor to run or to check.

  Attributes:
    op: 'validate' applies the static policy, runs every input three times in two processes with
      different hash seeds, and checks that each output equals itself under the scoring comparison;
      'run' runs each input once and compares with `expected` where given;
      'compare' runs nothing: `inputs` are answers, compared with `expected` as values.
    program: source that defines `f`; unused by 'compare'.
    inputs: argument lists as text, e.g. `"'abc', [1, 2]"`.
    expected: canonical values as text, one per input, or () for none. An exception's name where
      `expect_error`.
    expect_error: the outcome is the exception's class name, or 'NoError' (the error kind).
    timeout_s: limit of processor time per process, see docs/executor.md; 0 takes the executor's
      default for the op.
  """
  op: str
  program: str = ''
  inputs: tuple[str, ...] = ()
  expected: tuple[str, ...] = ()
  expect_error: bool = False
  timeout_s: float = 0.0


@dataclasses.dataclass(frozen=True)
class Run:
  """What one input of a job led to.

  Attributes:
    status: see `Status`.
    input: canonical argument list, '' when the text was no literal argument list.
    output: canonical value text, '' unless status is ok (or the exception's name when the job
      said `expect_error`).
    matches: output equals the expected value; False when none was given.
    error: exception class name or reason, '' when ok.
  """
  status: Status
  input: str = ''
  output: str = ''
  matches: bool = False
  error: str = ''


@dataclasses.dataclass(frozen=True)
class Verdict:
  """The executor's answer to one `Job`: the worst status, and one `Run` per input.

  Attributes:
    program: the source as it runs and is shown (only for 'validate'; '' when rejected).
    key: hash of the program's normal form and the canonical inputs (only for 'validate').
  """
  status: Status
  runs: tuple[Run, ...] = ()
  error: str = ''
  program: str = ''
  key: str = ''
  wall_s: float = 0.0
  cpu_s: float = 0.0


@dataclasses.dataclass(frozen=True)
class Turn:
  """One prompt and one sampled response; log-probs are per response token, stop token included.

  Attributes:
    sampler_logprobs: under the distribution that was sampled (temperature, truncation).
    model_logprobs: under the model itself, as the sampler's forward computed them.
    finish: 'stop' or 'length'.
  """
  prompt_ids: tuple[int, ...]
  response_ids: tuple[int, ...]
  sampler_logprobs: tuple[float, ...]
  model_logprobs: tuple[float, ...]
  text: str = ''
  finish: str = 'stop'


EPISODE_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Episode:
  """One rewarded attempt in one role; the record that training, logs and reports read.

  Attributes:
    group: attempts that share a prompt carry the same group (prompt baselines).
    status: outcome in words, e.g. 'ok', 'wrong', 'format', 'nondeterministic'.
    parts: the terms `reward` was made of, by name (format, accuracy, learnability, ...).
    advantage: per response token once computed, () before.
    train: False for Monte-Carlo solves that only measure learnability.
  """
  role: Role
  kind: str
  step: int
  group: str
  turns: tuple[Turn, ...]
  status: str
  reward: float
  parts: dict[str, float] = dataclasses.field(default_factory=dict)
  task: Task | None = None
  answer: str = ''
  advantage: tuple[float, ...] = ()
  train: bool = True
  version: int = EPISODE_VERSION
