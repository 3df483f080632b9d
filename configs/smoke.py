# SPDX-License-Identifier: Apache-2.0
"""Two iterations of a random byte-level model: every part runs, nothing is learned. Seconds on CPU.

python -m absolute_zero_jax.main --config configs/smoke.py --workdir runs/smoke
"""

from absolute_zero_jax import config as base


def get_config(arg=None):
  base.parse_arg(arg)
  c = base.get_config()
  c.model.name = 'random:qwen2,vocab=320,embed=64,layers=2,heads=4,kv_heads=2,head_dim=16,ffn=128'
  c.model.tokenizer = 'bytes'
  c.train.steps = 2
  c.train.micro_batch_tokens = 8192
  c.selfplay.batch = 2
  c.selfplay.mc_samples = 2
  c.selfplay.references = 1
  c.selfplay.induction_cases = 4
  c.sampler.slots = 8
  c.sampler.max_prompt_tokens = 4096
  c.sampler.max_propose_tokens = 24
  c.sampler.max_solve_tokens = 16
  c.optimizer.learning_rate = 1e-4
  c.checkpoint.every_steps = 1
  return c
