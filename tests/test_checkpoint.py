# SPDX-License-Identifier: Apache-2.0
"""Checkpoints give back exactly what was saved, sharded or not, and refuse what is not theirs."""

import json
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


def test_a_workdir_belongs_to_one_config(tmp_path):
  workdir = epath.Path(tmp_path / 'run')
  c = config.get_config()
  claim = lambda: checkpoint.claim(
      workdir, config.to_json(c), free=('train.steps', 'log'), differences=config.differences)
  claim()
  c.train.steps, c.log.samples = 9, 0                        # free: the run goes on
  claim()
  assert json.loads((tmp_path / 'run' / 'config.json').read_text())['train']['steps'] == 9
  c.optimizer.learning_rate = 1.0
  with pytest.raises(checkpoint.CheckpointError, match='optimizer.learning_rate'):
    claim()
