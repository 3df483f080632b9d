# SPDX-License-Identifier: Apache-2.0
"""Self-play with the carried model raises what it solves on unseen programs; coins do not.

Smaller than configs/tiny.py, so that it fits a test run; docs/learning.md has the long runs.
"""

import functools
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
STEPS = 5
CHANGES = {
    'model.name': BASE, 'train.steps': STEPS, 'train.minutes': 0.0, 'selfplay.batch': 16,
    'optimizer.name': 'muon', 'optimizer.learning_rate': 1e-3,             # five steps are enough
    'sampler.max_solve_tokens': 192, 'heldout.every_steps': STEPS, 'heldout.count': 60,
    'heldout.samples': 4, 'heldout.seed': 7, 'checkpoint.every_steps': STEPS,
    'checkpoint.export': False}

pytestmark = pytest.mark.skipif(
    BASE == 'carried:tiny' and not (hub.CARRIED / 'tiny' / 'model.safetensors').exists(),
    reason='the carried model has no weights here; configs/tiny_pretrain.py makes them')


@pytest.fixture(scope='module')
def scores(tmp_path_factory):
  """scores(control) -> (items of the base, items after the run), played by a command line once."""
  flags = [f'--config.{field}={value}' for field, value in CHANGES.items()]
  environment = os.environ | {'XLA_FLAGS': '', 'JAX_DISABLE_MOST_OPTIMIZATIONS': '0'}

  @functools.cache
  def play(control='none'):
    workdir = epath.Path(tmp_path_factory.mktemp(control))
    played = subprocess.run(
        [sys.executable, '-m', 'absolute_zero_jax.main', '--config',
         f'configs/tiny.py:control={control}', '--workdir', str(workdir), *flags], cwd=ROOT,
        capture_output=True, text=True, env=environment, timeout=900)
    assert played.returncode == 0, played.stderr
    print(played.stdout)
    return [evaluate.read_items(workdir / 'heldout' / f'{step:06d}.jsonl') for step in (0, STEPS)]

  return play


def _gain(before, after, quantity='sampled'):
  return evaluate.compare(before, after)['same/mean'][quantity]


def test_self_play_raises_the_sampled_mean_beyond_its_noise(scores):
  gain, low, _ = _gain(*scores())
  assert low > 0.01, f'sampled mean {gain:+.3f}, 95 % from {low:+.3f}'


@pytest.mark.slow
def test_random_rewards_do_not(scores):
  coins = scores('random_rewards')
  for quantity in ('sampled', 'greedy'):
    gain, low, _ = _gain(*coins, quantity)
    assert low <= 0.01, f'{quantity} {gain:+.3f}, 95 % from {low:+.3f}'
  # And the true rewards end above the coins, program by program.
  assert scores()[0] == coins[0]
  gain, low, _ = _gain(coins[1], scores()[1])
  assert low > 0.01, f'sampled mean {gain:+.3f} over coins, 95 % from {low:+.3f}'
