# SPDX-License-Identifier: Apache-2.0
"""Where numbers and texts go: TensorBoard events, a jsonl file of scalars, and the terminal.

Scalars are named `room/quantity` or `kind_role/quantity`; one dict per iteration. The event files
are written with tensorboard's own writer, so nothing here needs TensorFlow.
"""

import collections
from collections.abc import Iterable, Iterator
import contextlib
import json
import math
import os
import shutil
import sys
import tempfile
import time

from etils import epath
from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, types_pb2
from tensorboard.plugins.text import metadata as text_metadata
from tensorboard.summary.writer.event_file_writer import EventFileWriter
import tqdm

_LINE_S = 30.0      # between two lines of a bar that is piped


class Mean:
  """Running means by name; non-finite values are counted under `NAME/nonfinite` instead."""

  def __init__(self):
    self._sum = collections.defaultdict(float)
    self._count = collections.Counter()

  def add(self, name: str, value: float) -> None:
    if not math.isfinite(value):
      name, value = f'{name}/nonfinite', 1.0
    self._sum[name] += value
    self._count[name] += 1

  def result(self) -> dict[str, float]:
    return {k: total / self._count[k] for k, total in self._sum.items()}


class Timer:
  """Seconds per phase of an iteration; phases may interleave.

  Nested ones count in both, unless the inner one is taken `out_of` the outer.
  """

  def __init__(self):
    self.seconds = collections.defaultdict(float)

  @contextlib.contextmanager
  def __call__(self, phase: str, out_of: str = '') -> Iterator[None]:
    start = time.perf_counter()
    try:
      yield
    finally:
      taken = time.perf_counter() - start
      self.seconds[phase] += taken
      if out_of:
        self.seconds[out_of] -= taken


class Writer:
  """Scalars and texts of a run under `workdir/tensorboard` and `workdir/metrics.jsonl`.

  `first_step` is the first iteration this process will write: events of a killed run at or after
  it are purged by TensorBoard, and dropped from metrics.jsonl here. A remote `workdir` gets the
  event file copied at every `flush`, because event writers append and object stores cannot.
  """

  def __init__(self, workdir: epath.PathLike, first_step: int):
    workdir = epath.Path(workdir)
    self._jsonl = workdir / 'metrics.jsonl'
    self._target = workdir / 'tensorboard'
    self._target.mkdir(parents=True, exist_ok=True)
    self._remote = '://' in str(workdir)
    self._local = tempfile.mkdtemp(prefix='azj_events_') if self._remote else str(self._target)
    self._events = EventFileWriter(self._local)
    self._events.add_event(event_pb2.Event(
        wall_time=time.time(), step=first_step,
        session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START)))
    self._lines = [x for x in _lines_of(self._jsonl) if _step_of(x) < first_step]

  def scalars(self, step: int, values: dict[str, float]) -> None:
    """One row of numbers, rounded to 6 digits in metrics.jsonl; durable after `flush`."""
    summary = summary_pb2.Summary()
    for name, value in sorted(values.items()):
      summary.value.add(tag=name, simple_value=float(value))
    self._add(step, summary)
    rounded = {k: float(f'{float(v):.6g}') for k, v in values.items()}
    self._lines.append(json.dumps({'step': step} | rounded))

  def text(self, step: int, name: str, markdown: str) -> None:
    """A text for TensorBoard alone."""
    tensor = tensor_pb2.TensorProto(dtype=types_pb2.DT_STRING)
    tensor.string_val.append(markdown.encode('utf-8', 'replace'))
    summary = summary_pb2.Summary()
    summary.value.add(tag=name, tensor=tensor,
                      metadata=text_metadata.create_summary_metadata(name, ''))
    self._add(step, summary)

  def flush(self) -> None:
    """Makes everything written so far durable; call once per iteration."""
    self._events.flush()
    write_atomically(self._jsonl, '\n'.join(self._lines) + '\n')
    if self._remote:
      for name in epath.Path(self._local).iterdir():
        name.copy(self._target / name.name, overwrite=True)

  def close(self) -> None:
    self.flush()
    self._events.close()
    if self._remote:
      shutil.rmtree(self._local, ignore_errors=True)

  def _add(self, step: int, summary: summary_pb2.Summary) -> None:
    self._events.add_event(event_pb2.Event(wall_time=time.time(), step=step, summary=summary))


def absolute(workdir: str | os.PathLike) -> epath.Path:
  """A folder's absolute path, as orbax wants it; a URL stays as it is.

  Raises ValueError for a local one whose characters orbax would read as a pattern.
  """
  if '://' in str(workdir):
    return epath.Path(workdir)
  path = os.path.abspath(os.path.expanduser(workdir))
  if set(path) & set('[*?\\'):
    raise ValueError(f'workdir={path!r} has one of [ * ? \\ in it, with which no checkpoint could '
                     'be read again; give another folder.')
  return epath.Path(path)


def write_atomically(path: epath.PathLike, text: str) -> None:
  """Writes a whole file, or leaves the old one: a reader never sees half of it."""
  path = epath.Path(path)
  temporary = path.parent / f'.{path.name}.tmp'
  temporary.write_text(text)
  temporary.replace(path)


def read_history(workdir: epath.PathLike, last_step: int) -> list[dict[str, float]]:
  """The scalars of the iterations up to `last_step` that an interrupted run has written."""
  lines = _lines_of(epath.Path(workdir) / 'metrics.jsonl')
  return [json.loads(x) for x in lines if _step_of(x) <= last_step]


class Console:
  """Progress for people: a live bar in a terminal, plain lines when piped."""

  def __init__(self, stream=None):
    self._stream = stream or sys.stdout
    self._live = self._stream.isatty()
    self._start = time.perf_counter()

  def line(self, text: str = '') -> None:
    tqdm.tqdm.write(text, file=self._stream)
    self._stream.flush()

  def stamp(self, text: str) -> None:
    """A line with the seconds since this console was made in front."""
    self.line(f'[{time.perf_counter() - self._start:6.1f}s] {text}')

  @contextlib.contextmanager
  def bar(self, name: str, total: int, unit: str) -> Iterator['tqdm.tqdm | _Lines']:
    """A bar to `update(n)`; when piped, a line every half minute."""
    if not self._live:
      yield _Lines(self, name, total)
      return
    with tqdm.tqdm(total=total, desc=f'  {name}', unit=unit, leave=False, file=self._stream,
                   dynamic_ncols=True) as bar:
      yield bar


class _Lines:
  """What a bar is in a log: `n` of `total` is said from time to time."""

  def __init__(self, console: Console, name: str, total: int):
    self.n, self.total = 0, total
    self._console, self._name = console, name
    self._said = time.perf_counter()

  def update(self, n: int = 1) -> None:
    self.n += n
    now = time.perf_counter()
    if now - self._said >= _LINE_S:
      self._said = now
      self._console.stamp(f'{self._name}: {self.n} of {self.total}')


def table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
  """Columns aligned with spaces; the first is left-aligned, the others right-aligned."""
  cells = [[str(x) for x in header]] + [[_cell(x) for x in row] for row in rows]
  width = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
  lines = ['  '.join(x.ljust(w) if i == 0 else x.rjust(w)
                     for i, (x, w) in enumerate(zip(row, width))).rstrip() for row in cells]
  lines.insert(1, '  '.join('-' * w for w in width))
  return '\n'.join(lines)


def _cell(x: object) -> str:
  if x is None or isinstance(x, float) and math.isnan(x):
    return '-'
  return f'{x:.3g}' if isinstance(x, float) else str(x)


def _lines_of(path: epath.Path) -> list[str]:
  return path.read_bytes().decode(errors='replace').splitlines() if path.exists() else []


def _step_of(line: str) -> float:
  try:
    step = json.loads(line)['step']
    return step if isinstance(step, int | float) else math.inf
  except (ValueError, KeyError, TypeError):
    return math.inf     # a torn line of an older writer: drop it
