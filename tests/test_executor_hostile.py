# SPDX-License-Identifier: Apache-2.0
"""The corpus of hostile programs: stated outcomes, untouched canaries, undisturbed neighbours."""

import json
import os
import pathlib
import shutil
import subprocess

import hostile
import pytest
from test_executor_fence import readable_python, unprivileged_copy

from absolute_zero_jax.executor import fence

pytestmark = pytest.mark.skipif(
  bool(fence.supported()), reason=f'no fence here: {fence.supported()}'
)
# Real limits are larger; a loop costs its whole limit twice over.
_LIMITS = {
  'workers': 2,
  'validate_timeout_s': 0.5,
  'score_timeout_s': 1.0,
  'memory_mb': 160,
  'cache_size': 0,
}


@pytest.fixture(scope='module')
def corpus(shared_data):
  path = shared_data / 'attacks' / 'attacks.jsonl'
  if not path.exists():
    pytest.skip(f'no {path}')
  return path


def _check(result, rows):
  assert result['effects'] == []
  assert result['leaks'] == []
  assert result['wrong'] == []
  assert result['neighbours'] == rows and result['after']
  assert result['stats']['zygote_restarts'] == 0


@pytest.mark.parametrize('policy', [True, False], ids=['gate and fence', 'fence alone'])
def test_hostile_programs_are_contained(corpus, policy):
  rows = [json.loads(line) for line in corpus.open()]
  _check(hostile.run_corpus(rows, policy=policy, **_LIMITS), len(rows))


def test_hostile_programs_are_contained_for_an_unprivileged_user(corpus, tmp_path):
  """No root, no namespaces, no other user, no gate: the filter, the limits and Landlock."""
  if os.getuid() != 0:
    pytest.skip('the other tests already run without privileges')
  python, folder = readable_python(), unprivileged_copy(tmp_path)
  shutil.copy(pathlib.Path(__file__).parent / 'hostile.py', folder)
  shutil.copy(corpus, folder)
  options = _LIMITS | {'policy': False, 'layers': ['landlock', 'seccomp']}
  try:
    done = subprocess.run(
      [python, 'hostile.py', corpus.name, json.dumps(options)],
      capture_output=True,
      text=True,
      timeout=300,
      cwd=folder,
      env={'PYTHONPATH': str(folder)},
      user=65534,
      group=65534,
      extra_groups=[],
    )
  finally:
    shutil.rmtree(folder)
  assert done.returncode == 0, done.stderr
  result = json.loads(done.stdout)
  assert result['level'] == 'standard'
  _check(result, sum(1 for _ in corpus.open()))
