# SPDX-License-Identifier: Apache-2.0
"""Scores a model on held-out programs of the grammar that nobody has trained on.

python -m absolute_zero_jax.main --config configs/tiny_eval.py --workdir runs/eval_base

The result of a run against the base, on a test nobody has seen:
--config.model.name=runs/tiny/export --config.heldout.base=carried:tiny --config.heldout.seed=N.
With thinking opened in the prompt, or answers at once: --config.selfplay.prompts=tiny_think, or
tiny_direct. Hardware: 2 CPU cores.
"""

from absolute_zero_jax import config as base


def get_config(arg=None):
  base.parse_arg(arg)
  c = base.get_config()
  c.command = 'evaluate'
  c.model.name = 'carried:tiny'
  c.selfplay.prompts = 'tiny'
  c.selfplay.induction_cases = 6
  c.sampler.slots = 128
  c.sampler.min_slots = 16
  c.sampler.cpu_devices = -1
  c.sampler.max_prompt_tokens = 256
  c.sampler.max_solve_tokens = 256
  return c
