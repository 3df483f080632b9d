# SPDX-License-Identifier: Apache-2.0
"""What a run with `heldout.every_steps` has learned: a table, curves in the terminal, a plot.

  python -m absolute_zero_jax.report runs/tiny      prints them again, writes learning.png there

Read from what the run wrote: heldout/ (every item of every scoring) and metrics.jsonl.
"""

from collections.abc import Mapping, Sequence
import io
import re
import sys

from etils import epath
import numpy as np

from absolute_zero_jax import evaluate, metrics

History = Sequence[Mapping[str, float]]

PLOT = 'learning.png'
NO_PLOT = "no plot: it needs matplotlib, pip install 'absolute_zero_jax[plot]'"
_BARS = '▁▂▃▄▅▆▇█'
_WIDTH = 48
_MEASURES = re.compile(r'greedy|sampled|pass@\d+')


def write(workdir: epath.PathLike, history: History) -> str:
  """The report as text; the plot goes to `workdir/learning.png` where matplotlib is installed.

  Args:
    history: the rows of metrics.jsonl, row 0 too.

  Raises ValueError for a run without rows, or without scores.
  """
  workdir = epath.Path(workdir)
  if not history:
    raise ValueError(f'{workdir} has logged nothing yet; play an iteration first.')
  parts = [gains(workdir, last=int(history[-1]['step'])), curves(history)]
  try:
    (workdir / PLOT).write_bytes(plot(history))
    parts.append(f'plot: {workdir / PLOT}')
  except ImportError:
    parts.append(NO_PLOT)
  return '\n\n'.join(parts)


def gains(workdir: epath.PathLike, last: int = sys.maxsize) -> str:
  """First and last scores in percent, and their paired difference with a 95 % interval.

  Scores after iteration `last` are left out: a killed run may have left some. Raises ValueError for
  a run without scores.
  """
  folder = epath.Path(workdir) / 'heldout'
  files = sorted(f for f in folder.glob('*.jsonl') if int(f.stem) <= last)
  if not files:
    raise ValueError(f'{workdir} holds no scores; set heldout.every_steps and play.')
  base, new = (evaluate.read_items(file) for file in (files[0], files[-1]))
  return evaluate.gains_table(
      base, new, [f'iteration {int(file.stem)}' for file in (files[0], files[-1])])


def curves(history: History) -> str:
  """One line per quantity: first value, its course, last value."""
  lines = []
  for name, (_, values) in series(history).items():
    values = np.asarray(values)
    lines.append([name, f'{values[0]:.3g}', sparkline(values), f'{values[-1]:.3g}'])
  width = max((len(line[0]) for line in lines), default=0)
  return '\n'.join(f'{name:<{width}}  {first:>6} {bars} {last}'
                   for name, first, bars, last in lines)


def sparkline(values: Sequence[float], width: int = _WIDTH) -> str:
  """Bars from the lowest to the highest value; more values than `width` are averaged in runs."""
  values = np.asarray(values, np.float64)
  if not len(values):
    return ''
  values = np.array([run.mean() for run in np.array_split(values, min(width, len(values)))])
  spread = np.ptp(values)
  level = (values - values.min()) / spread if spread > 0 else np.zeros_like(values)
  return ''.join(_BARS[int(x)] for x in np.minimum(level * len(_BARS), len(_BARS) - 1))


def series(history: History) -> dict[str, tuple[list[int], list[float]]]:
  """{quantity: (iterations, values)}: what tells learning from sharpening and from collapse."""
  names = {name for row in history for name in row}
  wanted = {name.removeprefix('heldout/').replace('/mean/', ' '): [name] for name in sorted(names)
            if name.startswith('heldout/') and '/mean/' in name
            and (_MEASURES.fullmatch(name.rpartition('/')[2]) or name.endswith('/thinks'))}
  for title, pattern in (('solve reward', r'solve_\w+/reward'),
                         ('propose reward', r'propose_\w+/reward'),
                         ('valid proposals', r'propose_\w+/valid_rate'),
                         ('tasks with 0 < p < 1', 'propose/learnable_share'),
                         ('outputs without input', 'propose/independent_share'),
                         ('program nodes', r'propose_\w+/program_nodes'),
                         ('entropy', 'train/entropy'),
                         ('answer tokens', r'solve_\w+/response_tokens')):
    wanted[title] = [name for name in names if re.fullmatch(pattern, name)]
  out = {}
  for title, members in wanted.items():
    found = [(int(row['step']), float(np.mean([row[n] for n in members if n in row])))
             for row in history if any(n in row for n in members)]
    if found:
      out[title] = tuple(map(list, zip(*found)))
  return out


def plot(history: History) -> bytes:
  """A PNG of four panels: held-out scores with their intervals, rewards, signal, form.

  Raises:
    ImportError: matplotlib is not installed.
  """
  from matplotlib import figure
  fig = figure.Figure(figsize=(11, 7.5), layout='constrained')
  axes = fig.subplots(2, 2).flat
  found = series(history)
  panels = (('held-out programs, mean of the kinds', [t for t in found if _MEASURES.search(t)]),
            ('reward in self-play', ['solve reward', 'propose reward']),
            ('signal and collapse', ['valid proposals', 'tasks with 0 < p < 1',
                                     'outputs without input', 'entropy']),
            ('size', ['answer tokens', 'program nodes']))
  for axis, (title, names) in zip(axes, panels, strict=True):
    for name in (n for n in names if n in found):
      steps, values = found[name]
      axis.plot(steps, values, label=name, marker='.' if len(steps) < 60 else '')
      part, _, quantity = name.rpartition(' ')       # a part's name may hold blanks
      column = f'heldout/{part}/mean/{quantity}'
      ends = [(row[f'{column}_low'], row[f'{column}_high']) for row in history if column in row]
      if ends:
        axis.fill_between(steps, *zip(*ends), alpha=0.15)
    axis.set(title=title, xlabel='iteration')
    if axis.lines:
      axis.legend(frameon=False, fontsize='small')
  out = io.BytesIO()
  fig.savefig(out, format='png', dpi=110)
  return out.getvalue()


def main(argv: Sequence[str]) -> int:
  """Prints the report of each workdir named; returns the exit status: 0, 1 (failed), 2 (usage)."""
  if not argv or {'-h', '--help'} & set(argv):
    print('usage: python -m absolute_zero_jax.report WORKDIR...\n\nFirst and last held-out scores '
          'of runs, and curves; the plot goes to WORKDIR/learning.png.')
    return 0 if argv else 2
  for name in argv:
    workdir = epath.Path(name)
    try:
      rows = metrics.read_history(workdir, sys.maxsize)
      if not rows:
        raise ValueError(f'{name} holds no metrics.jsonl with finished iterations; give the '
                         '--workdir of a run.')
      print(f'{name}: {len(rows)} rows\n\n{write(workdir, rows)}\n')
    except (ValueError, OSError) as e:
      print(f'error: {e}', file=sys.stderr)
      return 1
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
