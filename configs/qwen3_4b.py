# SPDX-License-Identifier: Apache-2.0
"""Qwen3-4B-Base by Absolute Zero self-play.

python -m absolute_zero_jax.main --config configs/qwen3_4b.py --workdir runs/qwen3_4b

Hardware: TPU v5e-16, or 2 GPUs of 80 GB (the reference). Time and result: not yet run.
`:preset=azr_paper` or `:preset=azr_paper_eq` for the published numbers, `:gpu` for a GPU mesh,
`:smoke` for two iterations of a tiny model on CPU.
Source: the reference's scripts/selfplay/qwen3_4b.sh (lengths, batch, schedule).
"""

from absolute_zero_jax import config as base


def get_config(arg=None):
  a = base.parse_arg(arg, preset='azr', gpu=False, smoke=False)
  c = base.apply_preset(base.get_config(), a.preset)
  c.model.name = 'Qwen/Qwen3-4B-Base'
  c.model.dtype = 'bfloat16'
  c.selfplay.prompts = 'think'
  if a.preset != 'azr':               # its script accepts helper functions
    rules = c.selfplay.kind_options.rules
    rules.functions, rules.rename = 'any', 'any_last'
  if a.preset == 'azr_main':
    c.algorithm.aggregation_rows = 8
  c.mesh.fsdp = -1
  c.mesh.data = 1
  c.mesh.tensor = 2
  c.model.attention = 'cudnn' if a.gpu else 'splash'
  return base.shrink(c) if a.smoke else c
