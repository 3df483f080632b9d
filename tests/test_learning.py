# SPDX-License-Identifier: Apache-2.0
"""Self-play with the carried model raises what it solves on unseen programs; coins do not.

Smaller than configs/tiny.py, so that it fits a test run; docs/learning.md has the long runs.
"""

import os
import pathlib
import subprocess
import sys

from etils import epath
import pytest

from absolute_zero_jax import evaluate
from absolute_zero_jax.models import hub

ROOT = pathlib.Path(__file__).resolve().parents[1]
BASE = 'carried:tiny'
STEPS = 10
CHANGES = {
    'model.name': BASE, 'train.steps': STEPS, 'train.minutes': 0.0, 'selfplay.batch': 16,
    'sampler.max_solve_tokens': 192, 'heldout.every_steps': STEPS, 'heldout.count': 60,
    'heldout.samples': 4, 'heldout.seed': 7, 'checkpoint.every_steps': STEPS,
    'checkpoint.export': False}

pytestmark = pytest.mark.skipif(
    BASE == 'carried:tiny' and not (hub.CARRIED / 'tiny' / 'model.safetensors').exists(),
    reason='the carried model has no weights here; configs/tiny_pretrain.py makes them')


@pytest.fixture(scope='module')
def scores(tmp_path_factory):
  """{control: (items of the base, items after the run)}; two command lines play side by side."""
  flags = [f'--config.{field}={value}' for field, value in CHANGES.items()]
  workdirs = {control: epath.Path(tmp_path_factory.mktemp(control))
              for control in ('none', 'random_rewards')}
  started = {control: subprocess.Popen(
      [sys.executable, '-m', 'absolute_zero_jax.main', '--config',
       f'configs/tiny.py:control={control}', '--workdir', str(workdir), *flags], cwd=ROOT,
      stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
      env=os.environ | {'XLA_FLAGS': ''}) for control, workdir in workdirs.items()}
  out = {}
  try:
    for control, process in started.items():
      printed, errors = process.communicate(timeout=900)
      assert process.returncode == 0, errors
      print(printed)
      out[control] = tuple(evaluate.read_items(workdirs[control] / 'heldout' / f'{step:06d}.jsonl')
                           for step in (0, STEPS))
  finally:
    for process in started.values():
      process.kill()
  return out


def _gain(before, after, quantity='sampled'):
  return evaluate.compare(before, after)['same/mean'][quantity]


def test_self_play_raises_the_sampled_mean_beyond_its_noise(scores):
  gain, low, _ = _gain(*scores['none'])
  assert low > 0.01, f'sampled mean {gain:+.3f}, 95 % from {low:+.3f}'


def test_random_rewards_do_not(scores):
  for quantity in ('sampled', 'greedy'):
    gain, low, _ = _gain(*scores['random_rewards'], quantity)
    assert low <= 0, f'{quantity} {gain:+.3f}, 95 % from {low:+.3f}'
  # And the true rewards end above the coins, program by program.
  assert scores['none'][0] == scores['random_rewards'][0]
  gain, low, _ = _gain(scores['random_rewards'][1], scores['none'][1])
  assert low > 0.01, f'sampled mean {gain:+.3f} over coins, 95 % from {low:+.3f}'
