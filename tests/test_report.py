# SPDX-License-Identifier: Apache-2.0
"""What a run reports about learning: gains by hand, curves, and a plot if it can be drawn."""

import builtins

from etils import epath
import pytest

from absolute_zero_jax import evaluate, report


@pytest.fixture
def workdir(tmp_path):
  """A run that solved every second of 40 programs at first, three of four at last."""
  for step, right in ((0, lambda i: i % 2), (25, lambda i: i % 4), (99, lambda i: 0)):
    items = [{'part': 'same', 'kind': kind, 'key': str(i), 'greedy': float(bool(right(i))),
              'sampled': 0.5, 'pass@8': 1.0, 'tokens': 3.0}
             for kind in ('deduction', 'abduction') for i in range(40)]
    (tmp_path / 'heldout').mkdir(exist_ok=True)
    evaluate.write_items(epath.Path(tmp_path) / 'heldout' / f'{step:06d}.jsonl', items)
  return epath.Path(tmp_path)


def _history(scores):
  rows = [{'step': step, 'solve_deduction/reward': step / 25, 'solve_abduction/reward': 0.0,
           'train/entropy': 1.0} for step in range(1, 26)]
  rows = [{'step': 0}, *rows]
  for step, value in scores.items():
    name = 'heldout/same/mean/greedy'
    rows[step] |= {name: value, f'{name}_low': value - 0.1, f'{name}_high': value + 0.1}
  return rows


def test_gains_are_paired_and_end_where_the_run_ended(workdir):
  lines = report.gains(workdir, last=25).splitlines()
  assert lines[0].split() == ['held', 'out,', '%', 'iteration', '0', 'iteration', '25', 'change',
                              '95', '%', 'interval']
  greedy = next(line for line in lines if line.startswith('same/mean greedy')).split()
  # Pairs: 10 of 40 gained, none lost. Unpaired the interval would hold 5.
  assert greedy[2:5] == ['50.0', '75.0', '+25.0']
  assert float(greedy[5]) == pytest.approx(25 - 13.4, abs=2)
  assert float(greedy[7]) == pytest.approx(25 + 13.4, abs=2)
  assert 'same/abduction sampled' in report.gains(workdir) and 'tokens' not in lines[2]
  with pytest.raises(ValueError, match='heldout.every_steps'):
    report.gains(workdir / 'nowhere')
  with pytest.raises(ValueError, match='logged nothing'):
    report.write(workdir, [])


def test_curves_start_and_end_with_the_values():
  lines = report.curves(_history({0: 0.25, 25: 0.5})).splitlines()
  assert lines[0].split() == ['same', 'greedy', '0.25', '▁█', '0.5']
  reward = next(line for line in lines if line.startswith('solve reward')).split()
  assert reward[2:] == ['0.02', report.sparkline(range(25)), '0.5']


@pytest.mark.parametrize('args, status, words', [
    ([], 2, 'usage:'), (['--help'], 0, 'usage:'), (['nowhere'], 1, 'no metrics.jsonl')])
def test_the_command_line(args, status, words, capsys):
  assert report.main(args) == status
  assert words in ''.join(capsys.readouterr())


def test_sparklines():
  assert report.sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == '▁▂▃▄▅▆▇█'
  assert report.sparkline([5, 5]) == '▁▁' and report.sparkline([]) == ''
  assert report.sparkline(range(1000), width=8) == '▁▂▃▄▅▆▇█'


def test_the_report_comes_with_a_plot(workdir):
  text = report.write(workdir, _history({0: 0.25, 25: 0.5}))
  assert 'iteration 25' in text and 'learning.png' in text
  assert (workdir / 'learning.png').read_bytes().startswith(b'\x89PNG')


def test_a_part_with_a_blank_in_its_name_has_its_interval(monkeypatch):
  axes, drawn = pytest.importorskip('matplotlib.axes'), []
  monkeypatch.setattr(axes.Axes, 'fill_between', lambda self, *of, **_: drawn.extend(of))
  report.plot([{name.replace('same', 'my test'): value for name, value in row.items()}
               for row in _history({0: 0.25, 25: 0.5})])
  assert drawn == [[0, 25], (0.15, 0.4), (0.35, 0.6)]


def test_without_matplotlib_the_report_says_what_to_install(workdir, monkeypatch):
  real = builtins.__import__

  def without(name, *args, **kwargs):
    if name.partition('.')[0] == 'matplotlib':
      raise ImportError(name)
    return real(name, *args, **kwargs)
  monkeypatch.setattr(builtins, '__import__', without)
  text = report.write(workdir, _history({0: 0.25}))
  assert 'absolute_zero_jax[plot]' in text and not (workdir / 'learning.png').exists()


@pytest.mark.parametrize('of', (str, epath.Path))
def test_a_workdir_may_be_any_path(workdir, of):
  assert report.gains(of(workdir)) == report.gains(workdir)
  assert report.gains(workdir, 25) in report.write(of(workdir), _history({0: 0.5, 25: 0.75}))
  file = of(workdir / 'heldout' / '000000.jsonl')
  evaluate.write_items(file, evaluate.read_items(file)[:3])
  assert len(evaluate.read_items(file)) == 3
