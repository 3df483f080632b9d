# SPDX-License-Identifier: Apache-2.0
"""Jobs on their way to a verdict, with reports written by hand in place of processes."""

import json

from absolute_zero_jax.executor import reports, values, verify
from absolute_zero_jax.types import Status


def value(*results):
  return [['v', values.encode(r)] for r in results]


def trial(job, **rules):
  return verify.Trial(job, verify.Rules(**rules), verify.Cache(100))


def drive(trial, *written):
  """Feeds reports, in order, to the units as they come; returns the verdict and the units."""
  units, written = [], list(written)
  while trial.verdict is None:
    for unit in trial.take():
      units.append(unit)
      frames, end = written.pop(0) if type(written[0]) is tuple else (written.pop(0), Status.OK)
      frames = tuple(reports.understand(json.dumps(frame).encode(), unit) for frame in frames)
      trial.feed(unit, reports.Report(frames, end, '' if end is Status.OK else end.value))
  assert not written
  return trial.verdict, units
