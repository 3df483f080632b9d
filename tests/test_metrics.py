# SPDX-License-Identifier: Apache-2.0
"""What is written can be read back by TensorBoard, and a resumed run does not show steps twice."""

import io
import json

from etils import epath
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from absolute_zero_jax import metrics


def _write(workdir, first, steps):
  w = metrics.Writer(epath.Path(workdir), first)
  for step in steps:
    w.scalars(step, {'solve/accuracy': step / 10})
    w.text(step, 'sample', '**bold** \ud800')      # a lone surrogate must not stop the run
    w.flush()
  w.close()


@pytest.mark.parametrize('name', ['lr[3]', 'a*b', 'a?', 'a\\b'])
def test_a_workdir_that_would_be_read_as_a_pattern_is_refused(tmp_path, name):
  with pytest.raises(ValueError, match='give another folder'):
    metrics.absolute(tmp_path / name)
  assert str(metrics.absolute(tmp_path / 'lr=1e-3,{a} b%41')) == str(tmp_path / 'lr=1e-3,{a} b%41')


def test_tensorboard_reads_scalars_and_texts(tmp_path):
  _write(tmp_path, 1, [1, 2])
  events = EventAccumulator(str(tmp_path / 'tensorboard')).Reload()
  assert [(e.step, pytest.approx(e.value)) for e in events.Scalars('solve/accuracy')] == [
      (1, 0.1), (2, 0.2)]
  assert events.Tensors('sample')[0].tensor_proto.string_val[0].startswith(b'**bold**')


def test_steps_after_the_checkpoint_are_replaced_on_resume(tmp_path):
  _write(tmp_path, 1, [1, 2, 3])
  with (tmp_path / 'metrics.jsonl').open('a') as f:
    f.write('{"step": 4, "torn')                   # an older writer died here
  _write(tmp_path, 3, [3, 4])
  lines = [json.loads(x) for x in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
  assert [x['step'] for x in lines] == [1, 2, 3, 4]
  events = EventAccumulator(str(tmp_path / 'tensorboard')).Reload()
  assert [e.step for e in events.Scalars('solve/accuracy')] == [1, 2, 3, 4]


def test_nonfinite_values_are_counted_not_averaged():
  m = metrics.Mean()
  for x in (1.0, 3.0, float('nan')):
    m.add('x', x)
  assert m.result() == {'x': 2.0, 'x/nonfinite': 1.0}


def test_table_aligns_and_marks_missing_values():
  text = metrics.table(['kind', 'rate'], [['deduction', 0.5], ['x', float('nan')], ['y', None]])
  assert text.splitlines() == [
      'kind       rate', '---------  ----', 'deduction   0.5', 'x             -', 'y             -']


def test_console_prints_plain_lines_when_piped():
  stream = io.StringIO()
  console = metrics.Console(stream)
  with console.bar('decode', 10, 'tok') as bar:
    bar.update(10)
  console.line('done')
  assert stream.getvalue() == 'done\n'


def test_what_takes_long_says_how_far_it_is_when_piped(monkeypatch):
  stream, now = io.StringIO(), [0.0]
  monkeypatch.setattr(metrics.time, 'perf_counter', lambda: now[0])
  with metrics.Console(stream).bar('decode', 10, 'tok') as bar:
    for now[0] in (29.0, 31.0, 60.0, 61.5):
      bar.update(2)
    bar.total += 2
    now[0] = 95.0
    bar.update(1)
  assert stream.getvalue().splitlines() == [
      '[  31.0s] decode: 4 of 10', '[  61.5s] decode: 8 of 10', '[  95.0s] decode: 9 of 12']


def test_a_workdir_may_be_text(tmp_path):
  writer = metrics.Writer(str(tmp_path), 1)
  writer.scalars(1, {'a': 2.0})
  writer.close()
  assert metrics.read_history(str(tmp_path), 1) == [{'step': 1, 'a': 2.0}]


def test_a_workdir_may_lie_at_home(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))      # the shell leaves the ~ of --workdir=~/runs
  assert metrics.absolute('~/runs') == epath.Path(tmp_path / 'runs')
  assert metrics.absolute('gs://bucket/~/runs') == epath.Path('gs://bucket/~/runs')


def test_lines_that_nobody_can_read_are_dropped(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_bytes(b'{"step": null}\n[]\n{"step": 1, "a\xff": 2.0}\n{"step": "2"}\n\xff\n')
  assert metrics.read_history(tmp_path, 9) == [{'step': 1, 'a\ufffd': 2.0}]
  _write(tmp_path, 2, [2])
  assert [row['step'] for row in metrics.read_history(tmp_path, 9)] == [1, 2]
