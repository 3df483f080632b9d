# SPDX-License-Identifier: Apache-2.0
"""Self-play of the carried model, scored on held-out programs before, on the way and after.

python -m absolute_zero_jax.main --config configs/tiny.py --workdir runs/tiny

Hardware: 2 CPU cores; ends after 9 minutes, or little more. `:long` behind the file's name is the
long run, with less noise in each update: 75 iterations, 22 minutes. A control:
configs/tiny.py:control=NAME. What came out is in docs/learning.md.
"""

from absolute_zero_jax import config as base

# What a control changes. Each is scored on all kinds, whatever it plays.
CONTROLS = {
    'none': {},
    'random_rewards': {'reward.name': 'random'},
    'format_only': {'reward.name': 'format'},
    'validity_only': {'reward.name': 'validity'},
    'proposer_frozen': {'roles.propose': 'base', 'selfplay.train_propose': False,
                        'selfplay.overlap': 0},
    # As many answers per iteration as valid proposals would get, to tasks that never change.
    'solver_only': {'selfplay.seeds': 'grammar', 'seeding.tasks': 1000, 'selfplay.solve_samples': 8,
                    'selfplay.solver_only_steps': 10**9},
    'only_deduction': {'selfplay.kinds': ('deduction',)},
    'only_abduction': {'selfplay.kinds': ('abduction',)},
    # Its programs come from the other kinds, so it needs some to start with.
    'only_induction': {'selfplay.kinds': ('induction',), 'selfplay.seeds': 'grammar',
                       'seeding.tasks': 1000},
}


def get_config(arg=None):
  a = base.parse_arg(arg, control='none', long=False)
  if a.control not in CONTROLS:
    raise base.ConfigError(f'control={a.control!r} is unknown; allowed: {", ".join(CONTROLS)}.')
  c = base.get_config()
  c.model.name = 'carried:tiny'
  c.model.remat = 'none'
  c.train.steps = 2000
  c.train.minutes = 9.0
  c.train.micro_batch_tokens = 2048
  c.train.length_buckets = (512,)
  c.train.pack = True
  c.train.share_prompts = True
  c.selfplay.prompts = 'tiny'
  c.selfplay.batch = 16
  c.selfplay.mc_samples = 8
  c.selfplay.mc_use = 'reuse'
  c.selfplay.references = 1
  c.selfplay.overlap = 2
  c.selfplay.induction_cases = 6
  c.selfplay.exclude = 'heldout'
  c.selfplay.refuse_independent = True
  c.selfplay.max_alike = 1
  c.sampler.slots = 128
  c.sampler.min_slots = 16
  c.sampler.cpu_devices = -1
  c.sampler.max_prompt_tokens = 256
  c.sampler.max_propose_tokens = 96
  c.sampler.max_solve_tokens = 256
  c.executor.validate_timeout_s = 1.0
  c.executor.score_timeout_s = 1.0
  c.executor.memory_mb = 256
  c.algorithm.role_weights.propose = 0.3
  c.algorithm.skip_zero_rows = True
  c.optimizer.learning_rate = 2e-4
  c.checkpoint.every_steps = 5
  c.heldout.every_steps = 50
  c.heldout.count = 150
  c.heldout.parts = ('same',)
  c.log.every_steps = 5
  c.log.samples = 1
  if a.long:
    c.selfplay.batch = 48
    c.train.minutes, c.train.steps = 0.0, 75
    # Induction learns as much from the other kinds as from more of its own (docs/learning.md).
    c.selfplay.kind_batch = {'deduction': 64, 'abduction': 56, 'induction': 24}
  if 'selfplay.kinds' in CONTROLS[a.control]:      # as many proposals, all of one kind
    c.selfplay.batch, c.selfplay.kind_batch = 3 * c.selfplay.batch, {}
  c.update_from_flattened_dict(CONTROLS[a.control])
  return c
