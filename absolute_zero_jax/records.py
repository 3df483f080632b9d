# SPDX-License-Identifier: Apache-2.0
"""Episode records: one gzipped jsonl file per iteration under `workdir/episodes`.

The one format for replays and analyses; `read` and `pandas.read_json(path, lines=True)` open it.
Log-probs and advantages are rounded to 6 digits; everything else is exact. Answers that only
measure a task are among them, with `train` false.
"""

from collections.abc import Iterable
import dataclasses
import gzip
import json
import os
from typing import Any

from etils import epath

from absolute_zero_jax.types import Episode, EPISODE_VERSION, Role, Task, Turn


def write(directory: os.PathLike | str, step: int, episodes: Iterable[Episode]) -> None:
  """Writes `directory/000042.jsonl.gz` atomically; the directory may be remote."""
  directory = epath.Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  text = ''.join(json.dumps(to_json(e)) + '\n' for e in episodes)
  path = directory / f'{step:06d}.jsonl.gz'
  temporary = directory / f'.{path.name}.tmp'
  # mtime=0: the same episodes give the same bytes.
  temporary.write_bytes(gzip.compress(text.encode('ascii'), 3, mtime=0))
  temporary.replace(path)


def read(path: os.PathLike | str) -> list[Episode]:
  """The episodes of one file.

  Raises:
    ValueError: the file was written by another version of the format.
  """
  text = gzip.decompress(epath.Path(path).read_bytes()).decode('ascii')
  return [from_json(json.loads(line)) for line in text.splitlines()]


def to_json(e: Episode) -> dict[str, Any]:
  """The episode as data for one line of a file."""
  out = dataclasses.asdict(e)
  out['role'] = e.role.value
  out['advantage'] = _rounded(e.advantage)
  for turn in out['turns']:
    for name in ('sampler_logprobs', 'model_logprobs'):
      turn[name] = _rounded(turn[name])
  return out


def from_json(d: dict[str, Any]) -> Episode:
  """The episode of such data; raises ValueError for another version of the format."""
  if d.get('version') != EPISODE_VERSION:
    raise ValueError(f'episode record of version {d.get("version")!r}; '
                     f'this package reads {EPISODE_VERSION}.')
  turns = tuple(Turn(**{k: tuple(v) if isinstance(v, list) else v for k, v in t.items()})
                for t in d['turns'])
  task = None if d['task'] is None else Task.from_row(d['task'])
  return Episode(**d | {'role': Role(d['role']), 'turns': turns, 'task': task,
                        'advantage': tuple(d['advantage'])})


def _rounded(values: Iterable[float]) -> list[float]:
  return [float(f'{v:.6g}') for v in values]
