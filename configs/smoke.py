# SPDX-License-Identifier: Apache-2.0
"""Two iterations of a random byte-level model: every part runs, nothing is learned. Seconds on CPU.

python -m absolute_zero_jax.main --config configs/smoke.py --workdir runs/smoke

`configs/smoke.py:preset=azr_paper` plays another preset.
"""

from absolute_zero_jax import config as base


def get_config(arg=None):
  a = base.parse_arg(arg, preset='azr')
  return base.shrink(base.apply_preset(base.get_config(), a.preset))
