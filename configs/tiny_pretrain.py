# SPDX-License-Identifier: Apache-2.0
"""Pre-trains the carried model on programs of the project's own grammar: no human-written data.

python -m absolute_zero_jax.main --config configs/tiny_pretrain.py --workdir runs/tiny_base

Hardware: 2 CPU cores. `workdir/export` is a Hugging Face directory (Qwen2 architecture). The same
command continues an interrupted run; --config.train.steps=N makes it longer, and
--config.model.name=FOLDER begins with the weights there. How the carried weights came about is in
docs/learning.md.
"""

from absolute_zero_jax import config as base


def get_config(arg=None):
  base.parse_arg(arg)
  c = base.get_config()
  c.command = 'pretrain'
  c.model.name = ('random:qwen2,vocab=600,embed=192,layers=4,heads=6,kv_heads=6,head_dim=32,'
                  'ffn=512,tied=true,max_positions=512')
  c.model.tokenizer = 'carried:tiny'
  c.model.remat = 'none'
  c.selfplay.prompts = 'tiny'
  c.selfplay.induction_cases = 6
  c.pretrain.batch, c.pretrain.line_tokens = 12, 352
  c.train.steps = 7000
  c.pretrain.guess_steps = (3000, 5000)
  c.optimizer.name = 'muon'
  c.optimizer.learning_rate = 4e-3
  c.optimizer.warmup_steps = 50
  c.optimizer.schedule = 'cosine'
  c.optimizer.b2 = 0.98
  c.optimizer.weight_decay = 0.05
  c.optimizer.decay = 'matrices'
  c.checkpoint.every_steps = 200
  c.log.every_steps = 50
  return c
