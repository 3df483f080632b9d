# SPDX-License-Identifier: Apache-2.0
"""The language model: its config, its decoder, and the weight files it reads and writes."""

import absolute_zero_jax
from absolute_zero_jax.models.config import ModelConfig, RopeScaling

__all__ = ['ModelConfig', 'RopeScaling']


def __getattr__(name: str):
  return absolute_zero_jax.module_of(__name__, name)
