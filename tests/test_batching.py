# SPDX-License-Identifier: Apache-2.0
"""What the host keeps and chooses between chunks: prompts at hand, shapes of prefill."""

from absolute_zero_jax import batching, sampler
from absolute_zero_jax.models.config import ModelConfig

CONFIG = ModelConfig('llama', vocab=61, embed=16, layers=1, heads=2, kv_heads=2, head_dim=8, ffn=16,
                     tied=True)


def test_prompts_that_no_waiting_row_needs_are_forgotten():
  made = object.__new__(batching.Prompts)
  inserts = [batching._Insert({context: (0, 1)}, (), None, (1, 32, 0))
             for context in ((1,), (2, 3))]
  made.prefix_of, made.prefixes, made.ready = {(1,): (), (2, 3): (2,)}, {(2,): None}, inserts
  made.keep({(2, 3)})
  assert (made.ready, made.prefixes) == (inserts[1:], {(2,): None})
  made.keep({(1,)})
  assert (made.ready, made.prefixes) == ([], {})


def test_once_there_are_many_prefills_reuse_shapes_that_hold_them():
  ours = sampler.Sampler(CONFIG, pad_id=0, stop_ids=[], max_prompt_tokens=64, max_programs=3)
  chosen = ours._programs.prefill_shapes
  ours.assume({'prefill': [(4, 32, 0), (1, 64, 0)], 'decode': []})
  assert chosen(6, 48, 0, False) == [(4, 48), (1, 48), (1, 48)]          # below the limit
  ours.assume({'prefill': [(4, 32, 0), (1, 64, 0), (16, 64, 32)], 'decode': []})
  assert chosen(4, 32, 0, False) == [(4, 32)]
  assert chosen(6, 32, 0, False) == [(4, 32), (1, 64), (1, 64)]
  assert chosen(6, 32, 0, True) == [(4, 32), (4, 32)]                    # rows may stay empty
  assert chosen(1, 32, 0, True) == [(1, 64)]                             # in the fewest slots
  assert chosen(2, 48, 0, False) == [(1, 64), (1, 64)]
  assert chosen(2, 48, 32, True) == [(16, 64)]                           # behind a prefix
  assert chosen(2, 48, 32, False) == [(1, 64), (1, 64)]                  # the longest, one by one


def test_a_batch_is_never_wider_than_its_slots():
  ours = sampler.Sampler(CONFIG, pad_id=0, stop_ids=[], slots=4, min_slots=8)
  assert ours._widths == (4, 4)
