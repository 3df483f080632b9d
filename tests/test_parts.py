# SPDX-License-Identifier: Apache-2.0
"""Names of a config that cannot become objects are refused in words."""

import pytest

from absolute_zero_jax import config, parts

RANDOM = 'random:llama,layers=1'


def _config(**changes):
  c = config.get_config()
  c.model.name = RANDOM
  for field, value in changes.items():
    section, _, name = field.partition('__')
    c[section][name] = config.ConfigDict(value) if isinstance(value, dict) else value
  return c


def test_a_random_model_needs_a_tokenizer():
  c = _config()
  _, _, source = parts.model_without_parameters(c)
  with pytest.raises(config.ConfigError, match=f"model.tokenizer=''.*{RANDOM}.*'carried:tiny'"):
    parts.tokenizer(c, source)
