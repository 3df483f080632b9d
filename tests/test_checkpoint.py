# SPDX-License-Identifier: Apache-2.0
"""Checkpoints give back exactly what was saved, sharded or not, and refuse what is not theirs."""

import json
import shutil
import subprocess
import sys
from typing import NamedTuple

from etils import epath
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from absolute_zero_jax import checkpoint, config


class State(NamedTuple):
  step: jax.Array
  params: dict


def _state(mesh):
  w = jax.random.normal(jax.random.key(0), (8, 4)).astype(jnp.bfloat16)
  return State(jnp.int32(3), {'w': jax.device_put(w, NamedSharding(mesh, P('data')))})


def test_round_trip_keeps_values_types_and_shardings(tmp_path):
  mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  state = _state(mesh)
  host = {'buffer': {'tasks': ['def f(x):\n  return "\u00e9"']}}
  saver = checkpoint.Checkpoints(tmp_path, keep=2)
  for step in (1, 2, 3):
    saver.save(step, state, host)
  saver.close()

  reader = checkpoint.Checkpoints(tmp_path, keep=2)
  assert reader.latest() == 3
  assert not (tmp_path / 'checkpoints' / '1').exists()       # keep=2
  assert reader.restore_host(3)['buffer'] == host['buffer']
  back = reader.restore_state(3, checkpoint.abstract_like(state))
  assert isinstance(back, State) and back.params['w'].dtype == jnp.bfloat16
  assert back.params['w'].sharding == state.params['w'].sharding
  np.testing.assert_array_equal(back.params['w'], state.params['w'])
  reader.close()


def test_a_step_without_its_commit_is_not_seen(tmp_path):
  mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  saver = checkpoint.Checkpoints(tmp_path)
  saver.save(1, _state(mesh), {})
  saver.close()
  # What a kill during the next save leaves: a temporary directory, never renamed.
  (tmp_path / 'checkpoints' / '2.orbax-checkpoint-tmp').mkdir()
  reader = checkpoint.Checkpoints(tmp_path)
  assert reader.latest() == 1
  reader.close()


def test_another_format_is_refused(tmp_path, monkeypatch):
  mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  saver = checkpoint.Checkpoints(tmp_path)
  monkeypatch.setattr(checkpoint, 'FORMAT', 99)
  saver.save(1, _state(mesh), {})
  saver.wait()
  monkeypatch.undo()
  with pytest.raises(checkpoint.CheckpointError, match='format 99'):
    saver.restore_host(1)
  saver.close()


def _data(step):
  """The files that hold the array's bytes."""
  return [p for p in (step / 'state').rglob('*') if p.is_file() and p.parent.name == 'd']


def _truncate(step):
  for file in _data(step):
    file.write_bytes(file.read_bytes()[:20])


@pytest.mark.parametrize('damage', [
    _truncate, lambda step: shutil.rmtree(step / 'state'),
    lambda step: shutil.rmtree(step / 'host'),
    lambda step: (step / 'host' / 'metadata').write_text('{"form'),
    lambda step: (step / 'host' / 'metadata').write_text('[]')])
def test_a_damaged_step_is_named_with_the_one_before_it(tmp_path, damage):
  mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  state = _state(mesh)
  saver = checkpoint.Checkpoints(tmp_path)
  for step in (1, 2):
    saver.save(step, state, {})
  saver.close()
  folder = tmp_path / 'checkpoints'

  def restore(step):
    reader = checkpoint.Checkpoints(tmp_path)
    assert reader.latest() == step
    try:
      reader.restore_host(step)
      reader.restore_state(step, checkpoint.abstract_like(state))
    finally:
      reader.close()
  damage(folder / '2')
  with pytest.raises(checkpoint.CheckpointError, match='2 is damaged.*/2 to continue from .* 1.'):
    restore(2)
  shutil.rmtree(folder / '2')
  restore(1)
  damage(folder / '1')
  with pytest.raises(checkpoint.CheckpointError, match='1 is damaged.*no earlier one'):
    restore(1)


def test_the_checksum_is_that_of_the_bits_wherever_they_are():
  mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  state = _state(mesh)
  assert checkpoint.checksum(state) == checkpoint.checksum(jax.device_get(state))
  w = np.asarray(state.params['w']).copy()
  w.view(np.uint16)[5, 2] ^= 1
  assert checkpoint.checksum(state) != checkpoint.checksum(state._replace(params={'w': w}))
  assert checkpoint.checksum({'a': np.float32(0.0)}) != checkpoint.checksum({'a': np.float32(-0.0)})


def test_a_flipped_bit_in_a_file_that_reads_as_before_is_damage(tmp_path):
  state = {'w': jax.random.normal(jax.random.key(0), (4096,))}
  saver = checkpoint.Checkpoints(tmp_path)
  saver.save(1, state, {})
  saver.wait()
  file = max(_data(tmp_path / 'checkpoints' / '1'), key=lambda p: p.stat().st_size)
  whole = bytearray(file.read_bytes())
  whole[len(whole) // 2] ^= 1
  file.write_bytes(whole)
  with pytest.raises(checkpoint.CheckpointError, match='1 is damaged.*not those that were saved'):
    saver.restore_state(1, checkpoint.abstract_like(state))
  saver.close()


def test_a_checkpoint_of_an_earlier_version_is_read(tmp_path, monkeypatch):
  saver = checkpoint.Checkpoints(tmp_path)
  monkeypatch.setattr(checkpoint, 'checksum', lambda state: None)      # it had none
  saver.save(1, {'w': jnp.ones(3)}, {})
  saver.wait()
  monkeypatch.undo()
  assert saver.restore_state(1, {'w': jnp.zeros(3)})['w'].sum() == 3
  saver.close()


def test_an_interrupt_while_restoring_is_none_of_the_bytes(tmp_path, monkeypatch):
  saver = checkpoint.Checkpoints(tmp_path)
  saver.save(1, {'w': jnp.ones(3)}, {})
  saver.wait()
  def restore(*_, **__):             # as orbax does it
    try:
      raise KeyboardInterrupt
    except KeyboardInterrupt as e:
      raise Exception('Encountered error while reading') from e
  with monkeypatch.context() as patch:
    patch.setattr(saver._manager, 'restore', restore)
    with pytest.raises(KeyboardInterrupt):
      saver.restore_state(1, {'w': jnp.zeros(3)})
  saver.close()


def test_a_step_that_is_going_away_is_no_obstacle(tmp_path, monkeypatch):
  whole, calls = checkpoint.ocp.CheckpointManager, []
  def manager(*args, **options):
    calls.append(args)
    if len(calls) == 1:
      raise FileNotFoundError('checkpoints/2')
    return whole(*args, **options)
  monkeypatch.setattr(checkpoint.ocp, 'CheckpointManager', manager)
  saver = checkpoint.Checkpoints(tmp_path)
  assert saver.latest() is None and len(calls) == 2
  saver.close()


def test_a_workdir_belongs_to_one_config(tmp_path):
  workdir = epath.Path(tmp_path / 'run')
  c = config.get_config()
  claim = lambda free=('train.steps', 'log'): checkpoint.claim(
      workdir, config.to_json(c), free=free, differences=config.differences)
  with pytest.raises(checkpoint.CheckpointError, match='no config.json'):
    claim()
  claim(free=None)                                           # a new run
  c.train.steps, c.log.samples = 9, 0                        # free: the run goes on
  claim()
  assert json.loads((tmp_path / 'run' / 'config.json').read_text())['train']['steps'] == 9
  c.optimizer.learning_rate = 1.0
  with pytest.raises(checkpoint.CheckpointError,
                     match='optimizer.learning_rate is 1e-06 there and 1.0 here'):
    claim()
  for text in ('[]', 'null', '{"a'):
    (tmp_path / 'run' / 'config.json').write_text(text)
    with pytest.raises(checkpoint.CheckpointError, match='config.json is not readable JSON'):
      claim()


def test_only_a_section_frees_what_begins_with_its_name(tmp_path):
  claim = lambda values, free=('log',): checkpoint.claim(
      tmp_path, values, free=free, differences=config.differences)
  claim({'log': {'a': 1}, 'logs': 1}, free=None)
  claim({'log': {'a': 2}, 'logs': 1})
  with pytest.raises(checkpoint.CheckpointError, match='logs is 1 there and 2 here'):
    claim({'log': {'a': 2}, 'logs': 2})


def test_one_run_at_a_time_is_in_a_workdir(tmp_path):
  with checkpoint.owned(tmp_path / 'run'):
    with pytest.raises(checkpoint.CheckpointError, match='another run is going on in .*run'):
      with checkpoint.owned(tmp_path / 'run'):
        pass
    with checkpoint.owned(tmp_path / 'other'):
      pass
  with checkpoint.owned(tmp_path / 'run'):
    assert list((tmp_path / 'run').iterdir()) == []


def test_what_a_killed_save_left_goes_when_the_workdir_is_taken(tmp_path):
  folder = tmp_path / 'checkpoints'
  for name in ('1', '2.orbax-checkpoint-tmp', '3.orbax-checkpoint-tmp-17'):
    (folder / name / 'state').mkdir(parents=True)
  with checkpoint.owned(tmp_path):
    assert [p.name for p in folder.iterdir()] == ['1']


def test_a_killed_run_holds_its_workdir_no_longer(tmp_path):
  code = ('import sys, time; from absolute_zero_jax import checkpoint\n'
          'with checkpoint.owned(sys.argv[1]):\n  print("in", flush=True)\n  time.sleep(600)')
  other = subprocess.Popen([sys.executable, '-c', code, str(tmp_path)], stdout=subprocess.PIPE)
  try:
    assert other.stdout.readline() == b'in\n'
    with pytest.raises(checkpoint.CheckpointError, match='another run'):
      with checkpoint.owned(tmp_path):
        pass
  finally:
    other.kill()
    other.communicate()
  with checkpoint.owned(tmp_path):
    pass


def test_a_relative_workdir_holds_checkpoints_too(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  checkpoint.claim('run', {}, free=None, differences=config.differences)
  saver = checkpoint.Checkpoints('run')
  saver.save(1, {'w': jnp.ones(3)}, {'a': 1})
  saver.close()
  assert checkpoint.Checkpoints(tmp_path / 'run').restore_host(1)['a'] == 1
  monkeypatch.setenv('HOME', str(tmp_path))
  checkpoint.claim('~/run', {}, free=(), differences=config.differences)      # finds the run's own


def test_a_step_that_is_not_there_is_not_called_damaged(tmp_path):
  saver = checkpoint.Checkpoints(tmp_path)
  with pytest.raises(checkpoint.CheckpointError, match='no checkpoint None in .*; there are none'):
    saver.restore_host(saver.latest())
  saver.save(1, {'w': jnp.ones(3)}, {'a': 1})
  saver.wait()
  with pytest.raises(checkpoint.CheckpointError, match=r'no checkpoint 7 in .*; there are \[1\]'):
    saver.restore_host(7)
  saver.close()
