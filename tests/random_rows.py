# SPDX-License-Identifier: Apache-2.0
"""Rows to learn from, made at random; ids are 1 to 95."""

import numpy as np

from absolute_zero_jax import learner


def rows(count=13, seed=0, longest=40, **fixed):
  rng = np.random.default_rng(seed)
  out = []
  for i in range(count):
    n = int(rng.integers(1, longest))
    row = dict(prompt_ids=rng.integers(1, 96, rng.integers(1, 30)).tolist(),
               response_ids=rng.integers(1, 96, n).tolist(),
               sampler_logprobs=(-4 * rng.random(n)).tolist(),
               model_logprobs=(-4 * rng.random(n)).tolist(), reward=float(rng.standard_normal()),
               kind='ab'[i % 2], role=('propose', 'solve')[i % 3 == 0], prompt=i // 4)
    out.append(learner.Row(**row | fixed))
  return out


def answers(prompts=5, each=7, seed=0):
  """Rows of which `each` answer the same prompt; a prompt of a single token is among them."""
  firsts = rows(prompts, seed)
  firsts[0] = learner.Row(**vars(firsts[0]) | {'prompt_ids': [5]})
  return [learner.Row(**vars(row) | {'prompt_ids': firsts[i % prompts].prompt_ids})
          for i, row in enumerate(rows(prompts * each, seed + 1))]
