# SPDX-License-Identifier: Apache-2.0
"""What goes to a child process and what comes back, as the trusted side understands it.

  Unit --a child runs it--> frames (hostile bytes) --understand--> Frame of Outcomes --> Report
"""

import dataclasses
import functools
from typing import Any

from absolute_zero_jax.executor import literals, values
from absolute_zero_jax.types import Status

_REMEMBERED_BYTES = 1024    # of a frame; longer ones are seldom equal


@dataclasses.dataclass(frozen=True)
class Unit:
  """Work for one child process."""
  program: str
  inputs: tuple[str, ...]
  repeat: int
  expect_error: bool
  group: str                   # 'a', 'b' (another hash seed); '', 'nested': any process
  timeout_s: float


@dataclasses.dataclass(frozen=True)
class Outcome:
  """One call's result as the trusted side understands it; `value` only where status is ok."""
  status: Status
  text: str = ''
  value: Any = None
  error: str = ''
  limit_s: float = 0.0


@dataclasses.dataclass(frozen=True)
class Frame:
  """What one frame of a child claims, as the trusted side understands it.

  Attributes:
    outcomes: one per repetition of its input.
    load_failed: the program's own top level raised; no other frame follows.
  """
  outcomes: tuple[Outcome, ...]
  load_failed: bool = False


@dataclasses.dataclass(frozen=True)
class Report:
  """What became of a unit's process.

  Attributes:
    frames: the frames that arrived, at most one per input.
    end: OK if all frames arrived, otherwise why the process stopped.
  """
  frames: tuple[Frame, ...]
  end: Status
  error: str = ''
  wall_s: float = 0.0
  cpu_s: float = 0.0


def understand(data: bytes, unit: Unit) -> Frame:
  """The meaning of one hostile frame.

  Answers to one task mostly give the same values, so short frames are remembered.

  Raises:
    values.ValuesError: not the JSON that a frame is made of.
  """
  read = _understand if len(data) <= _REMEMBERED_BYTES else _understand.__wrapped__
  return read(data, unit.repeat, unit.expect_error)


@functools.lru_cache(2048)
def _understand(data: bytes, repeat: int, expect_error: bool) -> Frame:
  claims = values.load_frame(data)
  if type(claims) is list and len(claims) == 1 and _head(claims[0]) == 'm':
    return Frame((_outcome(['x', *claims[0][1:]], expect_error),) * repeat, load_failed=True)
  if type(claims) is not list or len(claims) != repeat:
    return Frame((Outcome(Status.CRASHED, error='malformed report'),))
  return Frame(tuple([_outcome(claim, expect_error) for claim in claims]))


def _head(claim: Any) -> str:
  return claim[0] if type(claim) is list and claim and type(claim[0]) is str else ''


def _outcome(claim: Any, expect_error: bool) -> Outcome:
  if type(claim) is not list:
    return Outcome(Status.CRASHED, error='malformed report')
  head = _head(claim)
  if head == 'r' and expect_error and len(claim) == 1:
    return Outcome(Status.OK, 'NoError')
  if head == 'v' and not expect_error and len(claim) == 2:
    try:
      value = values.decode(claim[1])
      text = values.text(value)
    except (values.ValuesError, ValueError, RecursionError) as e:
      return Outcome(Status.CRASHED if 'malformed' in str(e) else Status.ERROR, error=str(e)[:80])
    if len(text) > literals.MAX_CHARS:
      return Outcome(Status.ERROR, error='output: too long')
    return Outcome(Status.OK, text, value)
  if len(claim) == 2 and type(claim[1]) is str and len(claim[1]) <= 100:
    if head == 'x':
      return _raised(claim[1], expect_error)
    if head == 'u':
      return Outcome(Status.ERROR, error=f'output: {claim[1]}')
  return Outcome(Status.CRASHED, error='malformed report')


def _raised(name: str, expect_error: bool) -> Outcome:
  if name == 'MemoryError':
    return Outcome(Status.MEMORY, error=name)
  if expect_error:
    # Names are compared without regard to case, so such a class would read as no error at all.
    if name.lower() == 'noerror':
      return Outcome(Status.ERROR, error=f'an exception named {name}')
    return Outcome(Status.OK, name)
  # The fence answers forbidden calls with EPERM.
  return Outcome(Status.UNSAFE if name == 'PermissionError' else Status.ERROR, error=name)
