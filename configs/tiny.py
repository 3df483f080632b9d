# SPDX-License-Identifier: Apache-2.0
"""Self-play of the small model that `configs/tiny_pretrain.py` makes.

python -m absolute_zero_jax.main --config configs/tiny.py --workdir runs/tiny \
    --config.model.name=runs/tiny_base/export

Score base and result with `configs/tiny_eval.py`. Hardware: 2 CPU cores. Time and result: not yet
run.
"""

from absolute_zero_jax import config as base


def get_config(arg=None):
  base.parse_arg(arg)
  c = base.get_config()
  c.train.steps = 150
  c.train.micro_batch_tokens = 8192
  c.model.remat = 'none'
  c.selfplay.prompts = 'tiny'
  c.selfplay.batch = 32
  c.selfplay.mc_samples = 8
  c.selfplay.mc_use = 'reuse'
  c.selfplay.references = 1
  c.selfplay.induction_cases = 6
  c.selfplay.exclude = 'heldout'
  c.sampler.slots = 128
  c.sampler.max_prompt_tokens = 256
  c.sampler.max_propose_tokens = 96
  c.sampler.max_solve_tokens = 128
  c.executor.validate_timeout_s = 1.0
  c.executor.score_timeout_s = 1.0
  c.executor.memory_mb = 256
  c.algorithm.role_weights.propose = 0.3
  c.algorithm.skip_zero_rows = True
  c.optimizer.learning_rate = 1e-4
  c.checkpoint.every_steps = 25
  return c
