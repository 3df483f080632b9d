# SPDX-License-Identifier: Apache-2.0
"""Whole runs of a tiny model: everything is written, and a killed run continues bit for bit."""

import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import types

from etils import epath
import jax
import numpy as np
import pytest

from absolute_zero_jax import checkpoint, config, grammar, metrics, records, train

ROOT = pathlib.Path(__file__).resolve().parents[1]


def _config(steps=2):
  c = config.get_config()
  c.model.name = 'random:llama,vocab=259,embed=32,layers=2,heads=2,kv_heads=1,head_dim=16,ffn=64'
  c.model.tokenizer = 'bytes'
  c.train.steps = steps
  c.train.micro_batch_tokens = 8192
  c.selfplay.batch, c.selfplay.mc_samples, c.selfplay.references = 2, 2, 1
  c.selfplay.induction_cases = 4
  c.selfplay.kinds = ('deduction', 'induction')
  c.sampler.slots, c.sampler.max_prompt_tokens = 4, 4096
  c.sampler.max_propose_tokens = c.sampler.max_solve_tokens = 16
  c.optimizer.learning_rate = 1e-3
  c.algorithm.entropy_coef = 0.1           # random text earns -1 throughout: this still moves it
  c.checkpoint.every_steps = 1
  return c


def _episodes(workdir):
  files = sorted((epath.Path(workdir) / 'episodes').glob('*.gz'))
  return [[records.to_json(e) for e in records.read(f)] for f in files]


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('run') / 'whole'
  stream = io.StringIO()
  finished = train.run(_config(), workdir, stream=stream)
  return workdir, stream.getvalue(), finished


def test_a_run_writes_everything_it_promises(uninterrupted):
  workdir, printed, finished = uninterrupted
  assert finished.step == 2
  assert sorted(p.name for p in workdir.iterdir()) == [
      'checkpoints', 'config.json', 'episodes', 'export', 'metrics.jsonl', 'tensorboard']
  for words in ('iteration 2/2', 'valid proposals', 'learnability', 'tokens/s', 'time: '):
    assert words in printed
  lines = [json.loads(x) for x in (workdir / 'metrics.jsonl').read_text().splitlines()]
  assert [x['step'] for x in lines] == [1, 2]
  assert {'propose_deduction/valid_rate', 'solve_induction/accuracy', 'train/grad_norm',
          'time/decode', 'sampler/tokens_per_s', 'buffer/deduction'} <= set(lines[0])
  first = _episodes(workdir)[0]
  assert len(first) == 2 * (2 + 2) and all(e['version'] == 1 for e in first)
  assert all(len(e['turns'][0]['model_logprobs']) == len(e['turns'][0]['response_ids'])
             for e in first)


def test_the_second_iteration_compiles_nothing(uninterrupted):
  lines = [json.loads(x)
           for x in (uninterrupted[0] / 'metrics.jsonl').read_text().splitlines()]
  assert lines[1]['compilations'] == lines[0]['compilations']


def test_each_iteration_reports_its_own_share_of_busy_slots(uninterrupted):
  lines = [json.loads(x)
           for x in (uninterrupted[0] / 'metrics.jsonl').read_text().splitlines()]
  for x in lines:
    assert 0.2 < x['sampler/occupancy'] == x['sampler/live_steps'] / x['sampler/slot_steps'] <= 1


def test_weights_moved_and_the_export_holds_them(uninterrupted):
  from absolute_zero_jax.models import hf, loading
  workdir, _, finished = uninterrupted
  _, start, _ = loading.load(_config().model.name, key=jax.random.key(0))
  _, exported = hf.load(workdir / 'export')
  moved = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max()),
                       exported, start)
  assert max(jax.tree.leaves(moved)) > 1e-4
  jax.tree.map(np.testing.assert_array_equal, exported, jax.device_get(finished.state.params))


def test_a_run_in_two_parts_equals_an_uninterrupted_one(uninterrupted, tmp_path, monkeypatch):
  whole, _, finished = uninterrupted
  monkeypatch.chdir(tmp_path.parent)              # a workdir relative to where one stands, too
  train.run(_config(steps=1), tmp_path.name, stream=io.StringIO())
  stream = io.StringIO()
  second = train.run(_config(steps=2), tmp_path.name, stream=stream)
  assert 'continues after iteration 1' in stream.getvalue()
  assert _episodes(tmp_path) == _episodes(whole)
  assert second.host_state() == finished.host_state()
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(second.state),
               jax.device_get(finished.state))


@pytest.mark.parametrize('changes', [
    {'lora.rank': 2},
    {'roles.propose': 'base', 'selfplay.train_propose': False},
    {'roles.reference': 'base', 'algorithm.kl_coef': 0.1},
    {'algorithm.old_logprobs': 'recompute', 'algorithm.mini_batches': 2},
    {'selfplay.overlap': 1},
], ids=lambda c: next(iter(c)))
def test_options_run_resume_and_move_the_policy(changes, tmp_path):
  def c(steps):
    out = _config(steps)
    out.update_from_flattened_dict(changes)
    return out
  train.run(c(1), tmp_path, stream=io.StringIO())
  finished = train.run(c(2), tmp_path, stream=io.StringIO())
  assert finished.step == 2
  moved = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max()),
                       finished.policy(), train.Run(c(2)).policy())
  assert max(jax.tree.leaves(moved)) > 0


def test_seed_files_are_validated_and_added(shared_data):
  c = _config()
  c.selfplay.seeds = str(shared_data / 'azr_seeds' / '7b_seed_io.jsonl')
  lines = []
  with train.Run(c, progress=lines.append) as run:
    kept = run.buffer.sizes()
    assert 200 < kept['deduction'] <= 257 and kept['induction'] == 1
    assert all(t.born_step == 0 for t in run.buffer.tasks('deduction'))
  assert any('passed validation' in line for line in lines)
  c.selfplay.seeds = 'nowhere'
  with pytest.raises(ValueError, match='selfplay.seeds'):
    train.Run(c)


def test_seeds_of_the_test_side_are_left_out(tmp_path):
  c = _config()
  c.selfplay.exclude, c.selfplay.seeds = 'heldout', str(tmp_path / 'seeds.jsonl')
  tests = grammar.test_set(0, 3, 'same')
  rows = [{'snippet': e.program, 'input': e.inputs[0]} for e in tests]
  rows += [{'snippet': 'def f(x):\n    return x[::-1]', 'input': "'ab'"}]
  (tmp_path / 'seeds.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  lines = []
  with train.Run(c, progress=lines.append) as run:
    assert not any(map(grammar.excludes, run.buffer.tasks('deduction')))
    assert run.buffer.sizes()['deduction'] == 2          # the file's last one, and the first task
  assert any('4 of 4 tasks' in line and ', 3 are excluded' in line for line in lines)


def test_scores_of_a_first_try_are_none_of_the_next(tmp_path, monkeypatch):
  scores, seen = iter([0.1, 0.4]), []
  monkeypatch.setattr(train, '_score', lambda *_: {'heldout/same/mean/greedy': next(scores)})
  monkeypatch.setattr(train, '_print_summary', lambda current, workdir, history, console: (
      seen.extend(row['heldout/same/mean/greedy'] for row in history)))
  c = _config(1)
  c.heldout.every_steps, c.selfplay.exclude, c.checkpoint.export = 1, 'heldout', False

  def failing(*_):
    raise ValueError('first try')
  monkeypatch.setattr(train, '_one_step', failing)
  with pytest.raises(ValueError, match='first try'):
    train.run(c, tmp_path, stream=io.StringIO())
  left = [tmp_path / 'heldout' / '000004.jsonl', tmp_path / 'episodes' / '000003.jsonl.gz']
  for path in left:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b'')
  monkeypatch.setattr(train, '_one_step', lambda *_: ({'heldout/same/mean/greedy': 0.5}, False))
  train.run(c, tmp_path, stream=io.StringIO())
  assert seen == [0.4, 0.5] and not any(path.exists() for path in left)


def test_a_continued_run_knows_how_long_scoring_takes(tmp_path, monkeypatch):
  seen = []
  def step(current, workdir, writer, console, checkpoints, budget):
    seen.append(budget.score_s)
    current.step += 1
    checkpoints.save(current.step, current.arrays(), current.host_state())
    return {}, False
  monkeypatch.setattr(train, '_one_step', step)
  monkeypatch.setattr(train, '_score', lambda *_: {'time/heldout': 7.0})
  monkeypatch.setattr(train, '_print_summary', lambda *_: None)
  c = _config()
  c.heldout.every_steps, c.selfplay.exclude, c.checkpoint.export = 9, 'heldout', False
  for _ in range(2):
    train.run(c, tmp_path, stream=io.StringIO())
  assert seen == [0.0, 7.0]


def test_a_finished_run_ends_well_where_its_scores_are_gone(tmp_path):
  c, stream = _config(), io.StringIO()
  c.heldout.every_steps = 1
  current = types.SimpleNamespace(c=c, kinds=[], buffer=types.SimpleNamespace(sizes=dict))
  train._print_summary(current, tmp_path, [], metrics.Console(stream))     # no metrics.jsonl
  (tmp_path / 'heldout').mkdir()
  (tmp_path / 'heldout' / '000000.jsonl').write_text('{"par')
  train._print_summary(current, tmp_path, [{'step': 0}], metrics.Console(stream))
  assert stream.getvalue().count('note: no report: ') == 2
  assert stream.getvalue().count('written to') == 2


def test_a_base_of_other_weights_is_refused(tmp_path):
  from absolute_zero_jax.models import hf, loading
  c = _config()
  name, c.model.name, c.lora.rank = c.model.name, str(tmp_path), 2
  def loaded(seed):
    model, params, _ = loading.load(name, key=jax.random.key(seed))
    hf.save(model, params, tmp_path)
    return train.Run(c)
  with loaded(seed=0) as run:
    host = run.host_state()
  with loaded(seed=1) as run:
    restore = lambda host: run.restore(types.SimpleNamespace(restore_host=lambda step: host), 1)
    with pytest.raises(checkpoint.CheckpointError, match='other weights than model.name='):
      restore(host)
    for right in (run.host_state(), host | {'base': None}):        # None: of an earlier version
      with pytest.raises(AttributeError, match='restore_state'):   # goes on to the arrays
        restore(right)


def test_another_config_is_refused_in_the_same_workdir(uninterrupted):
  c = _config()
  c.optimizer.learning_rate = 2e-3
  with pytest.raises(checkpoint.CheckpointError, match='optimizer.learning_rate'):
    train.run(c, uninterrupted[0], stream=io.StringIO())


def test_a_first_try_that_failed_does_not_own_the_workdir(tmp_path):
  c = _config(1)
  c.model.name = str(tmp_path / 'nowhere')
  with pytest.raises(ValueError, match='nowhere'):
    train.run(c, tmp_path / 'run', stream=io.StringIO())
  assert train.run(_config(1), tmp_path / 'run', stream=io.StringIO()).step == 1


def test_a_workdir_in_use_is_refused_before_anything_is_written(tmp_path):
  with checkpoint.owned(tmp_path):
    with pytest.raises(checkpoint.CheckpointError, match='another run is going on'):
      train.run(_config(1), tmp_path, stream=io.StringIO())
  assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named_before_the_write(uninterrupted, tmp_path, monkeypatch):
  usage = type('Usage', (), {'free': 1000})
  monkeypatch.setattr(train.shutil, 'disk_usage', lambda path: usage)
  with pytest.raises(OSError, match='no space for a checkpoint'):
    train.run(_config(), tmp_path, stream=io.StringIO())


class _Dropped:
  """A signal that comes where Python drops what its handler raises."""

  def __del__(self):
    signal.raise_signal(signal.SIGTERM)


def test_a_signal_while_loading_ends_the_run_too(tmp_path, monkeypatch):
  monkeypatch.setattr(train, 'Run', lambda *args, **kwargs: signal.raise_signal(signal.SIGTERM))
  before = signal.getsignal(signal.SIGTERM)
  with pytest.raises(KeyboardInterrupt):
    train.run(_config(), tmp_path, stream=io.StringIO())
  assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
def test_an_interrupt_that_python_drops_ends_the_run_after_the_iteration(tmp_path, monkeypatch):
  whole = train._one_step
  def step(*args):
    _Dropped()
    return whole(*args)
  monkeypatch.setattr(train, '_one_step', step)
  with pytest.raises(KeyboardInterrupt):
    train.run(_config(), tmp_path, stream=io.StringIO())
  assert len(_episodes(tmp_path)) == 1


@pytest.mark.parametrize('how', [
    signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow),
    pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_killed_process_continues_where_it_was(how, tmp_path):
  args = [sys.executable, '-m', 'absolute_zero_jax.main', '--config', 'configs/smoke.py',
          '--workdir', str(tmp_path), '--config.train.steps=3']
  first = subprocess.Popen(args, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                           text=True, start_new_session=True)
  deadline = time.monotonic() + 300
  while not (tmp_path / 'episodes' / '000001.jsonl.gz').exists():
    assert time.monotonic() < deadline and first.poll() is None
    time.sleep(0.1)
  os.kill(first.pid, how)
  _, errors = first.communicate(timeout=60)
  assert first.returncode != 0
  if how != signal.SIGKILL:
    assert 'Interrupted' in errors and 'Traceback' not in errors
  again = subprocess.run(args, cwd=ROOT, capture_output=True, text=True, timeout=300)
  assert again.returncode == 0, again.stderr
  assert 'continues after iteration' in again.stdout or 'iteration 1/3' in again.stdout
  assert len(_episodes(tmp_path)) == 3


def test_a_run_goes_on_where_the_machine_is_another(tmp_path):
  c = config.get_config()
  workdir = epath.Path(tmp_path)
  claim = lambda free=train.FREE_FIELDS: checkpoint.claim(
      workdir, config.to_json(c), free=free, differences=config.differences)
  claim(free=None)
  c.mesh.fsdp, c.sampler.cpu_devices, c.sampler.slots, c.executor.workers = 2, -1, 8, 4
  claim()
  c.sampler.temperature = 0.5
  with pytest.raises(ValueError, match='sampler.temperature'):
    claim()
