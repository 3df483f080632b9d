# SPDX-License-Identifier: Apache-2.0
"""Messages between client and supervisor: 4-byte length and JSON; data only, in both directions."""

import json
import struct
from typing import Any

from absolute_zero_jax.types import Job, Run, Status, Verdict

_LENGTH = struct.Struct('<I')


def pack(message: Any) -> bytes:
  """A message as `Inbox` reads it."""
  data = json.dumps(message, separators=(',', ':')).encode()
  return _LENGTH.pack(len(data)) + data


class Inbox:
  """Whole messages out of a byte stream."""

  def __init__(self):
    self._buffer = bytearray()

  def feed(self, data: bytes) -> list[Any]:
    """The messages completed by `data`, in order."""
    self._buffer += data
    messages, start = [], 0
    while len(self._buffer) - start >= 4:
      length = _LENGTH.unpack_from(self._buffer, start)[0]
      if len(self._buffer) - start - 4 < length:
        break
      messages.append(json.loads(self._buffer[start + 4:start + 4 + length]))
      start += 4 + length
    del self._buffer[:start]
    return messages


# Jobs and verdicts as lists that JSON can hold, and back.


def from_job(job: Job) -> list:
  return [job.op, job.program, job.inputs, job.expected, job.expect_error, job.timeout_s]


def to_job(fields: list) -> Job:
  op, program, inputs, expected, expect_error, timeout_s = fields
  return Job(op, program, tuple(inputs), tuple(expected), expect_error, timeout_s)


def from_verdict(v: Verdict) -> list:
  runs = [[r.status.value, r.input, r.output, r.matches, r.error] for r in v.runs]
  return [v.status.value, runs, v.error, v.program, v.key, v.wall_s, v.cpu_s]


def to_verdict(fields: list) -> Verdict:
  status, runs, error, program, key, wall_s, cpu_s = fields
  runs = tuple(Run(Status(r[0]), *r[1:]) for r in runs)
  return Verdict(Status(status), runs, error, program, key, wall_s, cpu_s)
