# SPDX-License-Identifier: Apache-2.0
"""Llama-3.1-8B by Absolute Zero self-play.

python -m absolute_zero_jax.main --config configs/llama8b.py --workdir runs/llama8b

Hardware: TPU v5p-8, or 4 GPUs of 80 GB (the reference). Time and result: not yet run.
`:preset=azr_paper` or `:preset=azr_paper_eq` for the published numbers, `:gpu` for a GPU mesh,
`:smoke` for two iterations of a tiny model on CPU.
Source: the reference's scripts/selfplay/llama.sh (lengths, batch, schedule).
"""

from absolute_zero_jax import config as base


def get_config(arg=None):
  a = base.parse_arg(arg, preset='azr', gpu=False, smoke=False)
  c = base.apply_preset(base.get_config(), a.preset)
  c.model.name = 'meta-llama/Llama-3.1-8B'
  c.model.dtype = 'bfloat16'
  c.selfplay.prompts = 'think'
  if a.preset != 'azr':               # its script accepts helper functions
    rules = c.selfplay.kind_options.rules
    rules.functions, rules.rename = 'any', 'any_last'
    c.seeding.tasks = 64
  c.mesh.fsdp = -1
  c.mesh.data = 1
  c.mesh.tensor = 2 if a.gpu else 4
  c.model.attention = 'cudnn' if a.gpu else 'splash'
  return base.shrink(c) if a.smoke else c
