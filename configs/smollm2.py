# SPDX-License-Identifier: Apache-2.0
"""SmolLM2-135M-Instruct on a laptop CPU: three iterations of real self-play; on a GPU, 200.

python -m absolute_zero_jax.main --config configs/smollm2.py --workdir runs/smollm2

Hardware: 2 CPU cores, 8 GB; with `:gpu` behind the file's name, one NVIDIA GPU. Longer:
--config.train.steps=100. What came out is in docs/learning.md.
"""

from absolute_zero_jax import config as base


def get_config(arg=None):
  a = base.parse_arg(arg, gpu=False)
  c = base.get_config()
  c.train.steps = 3
  c.train.micro_batch_tokens = 2048
  c.train.pack = True
  c.train.share_prompts = True
  c.selfplay.batch = 8
  c.selfplay.mc_samples = 8
  c.selfplay.mc_use = 'reuse'
  c.selfplay.references = 2
  c.selfplay.induction_cases = 4
  c.selfplay.refuse_independent = True
  c.selfplay.max_alike = 1
  c.sampler.slots = 32
  c.sampler.max_prompt_tokens = 768
  c.sampler.max_propose_tokens = 128
  c.sampler.max_solve_tokens = 96
  # Sharper than 1: at T = 1 a model of this size seldom writes a program that runs.
  c.sampler.temperature = 0.9
  c.executor.validate_timeout_s = 1.0
  c.executor.score_timeout_s = 2.0
  c.executor.memory_mb = 256
  # At full weight and 3e-5, 36 of 37 valid programs were `return a` after twenty iterations.
  c.algorithm.role_weights.propose = 0.3
  c.algorithm.skip_zero_rows = True
  c.optimizer.learning_rate = 2e-5
  c.checkpoint.every_steps = 1
  if a.gpu:
    c.model.dtype = 'bfloat16'
    c.model.attention = 'cudnn'
    c.train.steps = 200
    c.train.micro_batch_tokens = 4096
    c.selfplay.batch = 16
    # Few programs to compile: most prompts have 150 to 250 tokens, most responses fewer than 50.
    c.train.length_buckets = (1024,)
    c.sampler.slots = c.sampler.min_slots = 256
    c.sampler.cache_block = 384
    c.sampler.prompt_block = 256
    c.sampler.max_programs = 8
    c.checkpoint.every_steps = 50
  return c
