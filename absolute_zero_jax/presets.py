# SPDX-License-Identifier: Apache-2.0
"""Published settings by name, as differences from the defaults in `config`."""

from typing import Any

# What the paper's own code and the paper's own equations do, as differences from the default
# `azr`. Source: the reference's `paper` branch; arXiv:2505.03335v2 Eq. 4-9.
_AZR_PAPER = {
    'selfplay.solve_source': 'lagged', 'selfplay.refuse_duplicates': False,
    'selfplay.format_rule': 'azr', 'seeding.clean': ('comments', 'globals'),
    'reward.zero_learnability': -0.5, 'algorithm.aggregation': 'role_microbatch',
    'algorithm.aggregation_rows': 16, 'algorithm.entropy_coef': 0.001,
    'optimizer.weight_decay': 0.01,
    # Python's ==, as the reference compares; the fence and the parsers stay ours.
    'executor.options': {'equality': 'loose'},
    'selfplay.kind_options': {'rules': {
        'functions': 'one', 'rename': 'not_first', 'reject_constant': False,
        'banned_words': 'azr'}, 'distinct_inputs': False, 'quotes_code': True},
}
PRESETS: dict[str, dict[str, Any]] = {
    'azr': {},
    'azr_paper': _AZR_PAPER,
    'azr_paper_eq': _AZR_PAPER | {
        'selfplay.solve_source': 'fresh', 'reward.zero_learnability': 0.0,
        'algorithm.aggregation': 'sequence', 'algorithm.whiten_count': 'sequence'},
    # The reference's main branch; its greedy Monte-Carlo answers are not reproduced.
    'azr_main': _AZR_PAPER | {
        'algorithm.entropy_coef': 0.0, 'optimizer.weight_decay': 0.0,
        'algorithm.clip_high': 0.28, 'algorithm.dual_clip': 3.0},
}
# What `config.shrink` sets: a run of seconds on a CPU, whatever the config.
SMOKE: dict[str, Any] = {
    'model.name': 'random:qwen2,vocab=320,embed=64,layers=2,heads=4,kv_heads=2,head_dim=16,ffn=128',
    'model.tokenizer': 'bytes', 'model.dtype': 'float32', 'model.param_dtype': 'float32',
    'model.attention': 'xla',
    'mesh.data': -1, 'mesh.fsdp': 1, 'mesh.tensor': 1,
    'train.steps': 2, 'train.micro_batch_tokens': 16384,
    'selfplay.batch': 2, 'selfplay.kind_batch': {}, 'selfplay.mc_samples': 2,
    'selfplay.references': 1, 'selfplay.induction_cases': 4,
    'sampler.slots': 8, 'sampler.max_prompt_tokens': 8192, 'sampler.max_propose_tokens': 16,
    'sampler.max_solve_tokens': 16,
    'checkpoint.every_steps': 1,
}
