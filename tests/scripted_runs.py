# SPDX-License-Identifier: Apache-2.0
"""Runs whose model is random and whose sampler is scripted: a small config, and some iterations.

A test file takes the fixtures `prompts`, `one_device` and `make` by assigning them.
"""

import importlib.util
import pathlib

import jax
import pytest
import scripted

from absolute_zero_jax import parts, run

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(scope='module')
def prompts(tmp_path_factory):
  return scripted.prompt_folder(tmp_path_factory.mktemp('prompts') / 'set')


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
  mesh = run.sharding.make_mesh(devices=jax.devices()[:1])
  monkeypatch.setattr(run.sharding, 'make_mesh', lambda **sizes: mesh)


@pytest.fixture
def make(monkeypatch, prompts):
  """make(preset, **changes) -> config of a tiny run whose sampler is scripted."""
  monkeypatch.setattr(parts.sampler_lib, 'Sampler', scripted.Sampler)

  def build(preset='azr', **changes):
    c = smoke(preset)
    c.selfplay.prompts, c.selfplay.batch, c.selfplay.mc_samples = prompts, 4, 4
    c.optimizer.learning_rate, c.checkpoint.export = 1e-3, False
    c.executor.workers = 2
    for field, value in changes.items():
      section, _, name = field.partition('__')
      c[section][name] = value
    return c
  return build


def smoke(preset):
  """configs/smoke.py with a model that compiles faster still."""
  spec = importlib.util.spec_from_file_location('smoke', ROOT / 'configs' / 'smoke.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  c = module.get_config(f'preset={preset}')
  c.model.name = 'random:llama,vocab=259,embed=16,layers=1,heads=1,kv_heads=1,head_dim=16,ffn=16'
  c.model.remat = 'none'
  return c


def play(c, steps=1, learns=False):
  """The iterations and the run; without `learns` the updates are left out, to save compiling."""
  with run.Run(c) as current:
    if not learns:
      current._update = lambda episodes: (episodes, {})
    return [current.iterate() for _ in range(steps)], current
