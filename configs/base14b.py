# SPDX-License-Identifier: Apache-2.0
"""Qwen2.5-14B by Absolute Zero self-play.

python -m absolute_zero_jax.main --config configs/base14b.py --workdir runs/base14b

Hardware: TPU v5p-16, or 8 GPUs of 80 GB (the reference). Time and result: not yet run.
`:preset=azr_paper` or `:preset=azr_paper_eq` for the published numbers, `:gpu` for a GPU mesh,
`:smoke` for two iterations of a tiny model on CPU.
Source: the reference's scripts/selfplay/14b.sh (lengths, batch, schedule).
"""

from absolute_zero_jax import config as base


def get_config(arg=None):
  a = base.parse_arg(arg, preset='azr', gpu=False, smoke=False)
  c = base.apply_preset(base.get_config(), a.preset)
  c.model.name = 'Qwen/Qwen2.5-14B'
  c.model.dtype = 'bfloat16'
  c.selfplay.prompts = 'think'
  c.mesh.fsdp = -1
  c.mesh.data = 1
  c.mesh.tensor = 4
  c.model.attention = 'cudnn' if a.gpu else 'splash'
  return base.shrink(c) if a.smoke else c
