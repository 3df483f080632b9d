# SPDX-License-Identifier: Apache-2.0
"""Metrics of an update by hand: sums of tokens, micro-batches and steps, and their means."""

import jax.numpy as jnp
import numpy as np
import random_rows as rows_lib

from absolute_zero_jax import learner, learner_metrics, packing

GROUPS = ('propose_a', 'solve_a')


def _filled(rows, **values):
  """One micro-batch of padded rows with more places than tokens to score; row i in group i % 2."""
  layout = packing.plan(rows, micro_batch_tokens=10**6)
  batch, = packing.fill(layout, rows, [i % 2 for i in range(len(rows))], **values)
  assert (batch.index_CM < 0).any()
  return batch


def test_sums_are_over_trained_tokens_and_those_of_each_group():
  rows = [learner.Row(**vars(row) | {'model_logprobs': [-1.0 - i] * len(row.response_ids)})
          for i, row in enumerate(rows_lib.rows(5))]
  lengths = np.array([len(row.response_ids) for row in rows])
  batch = _filled(rows, model_logprobs=[np.array(row.model_logprobs) for row in rows])
  # Places without a token hold 7, which must count for nothing.
  logprob_CM = jnp.where(batch.index_CM >= 0, 0.0, 7.0)
  out = learner_metrics.sums(batch, 8, 2.5, logprob_CM, logprob_CM + 3, {'kl_old': logprob_CM + 1})
  gap = lengths * np.arange(1, 6)
  group_R = lambda x: [x[::2].sum(), x[1::2].sum(), *[0] * 6]
  np.testing.assert_allclose(out['tokens_R'], group_R(lengths))
  np.testing.assert_allclose(out['mismatch_abs_R'], group_R(gap))
  np.testing.assert_allclose(out['kl_old_R'], group_R(lengths))
  np.testing.assert_allclose(out['entropy'], 3 * lengths.sum())
  np.testing.assert_allclose([out['mismatch_abs'], out['mismatch_max']], [gap.sum(), 5])
  assert (out['loss'], out['tokens'], out['kl_old']) == (2.5, lengths.sum(), lengths.sum())
  own = np.where(batch.index_CM >= 0, 0.0, 7.0)
  np.testing.assert_allclose(learner_metrics.mismatch(batch, own), gap.sum() / lengths.sum())


def test_micro_batches_add_and_steps_are_averaged():
  parts = [{'loss': 1.0, 'tokens': 2.0, 'tokens_R': np.array([2.0, 0, 0]), 'mismatch_max': 5.0,
            'entropy': 4.0, 'entropy_R': np.array([4.0, 0, 0])},
           {'loss': 0.5, 'tokens': 6.0, 'tokens_R': np.array([2.0, 4, 0]), 'mismatch_max': 3.0,
            'entropy': 4.0, 'entropy_R': np.array([1.0, 3, 0])}]
  one = learner_metrics.add(*parts)
  assert (one['loss'], one['tokens'], one['mismatch_max'], one['entropy']) == (1.5, 8, 5, 8)
  steps = [one | {'grad_norm': 2.0, 'skipped_updates': 1.0},
           one | {'loss': 0.5, 'grad_norm': 4.0, 'skipped_updates': 1.0, 'mismatch_max': 9.0,
                  'entropy_R': np.array([0.0, 0, 0])}]
  assert learner_metrics.finish(steps, GROUPS) == {
      'loss': 1.0, 'grad_norm': 3.0, 'tokens': 16.0, 'skipped_updates': 2.0, 'mismatch_max': 9.0,
      'entropy': 1.0, 'propose_a/entropy': 0.625, 'solve_a/entropy': 0.375,
      'optimizer_steps': 2.0}


def test_the_batch_says_how_much_signal_and_padding_it_has():
  rows = rows_lib.rows(4, longest=9)
  lengths = np.array([len(row.response_ids) for row in rows])
  _, rollout = packing.rollout(rows)
  advantage_BT = rollout.mask_BT * np.array([2.0, 0, -1, 0])[:, None]
  batch = _filled(rows)
  out = learner_metrics.of_batch(rollout, advantage_BT, [0, 1, 0, 0], GROUPS, [[batch]])
  size = 2 * lengths[0] + lengths[2]
  held = lengths.sum() + sum(len(row.prompt_ids) for row in rows)
  want = {'rows': 4, 'rows_without_advantage': 2, 'advantage_abs': size / lengths.sum(),
          'micro_batches': 1, 'positions': held, 'padding_share': 1 - held / batch.tokens_BT.size,
          'propose_a/rows_without_advantage': 1, 'solve_a/rows_without_advantage': 1,
          'propose_a/advantage_abs': size / (lengths.sum() - lengths[1]),
          'solve_a/advantage_abs': 0}
  assert out.keys() == want.keys()
  np.testing.assert_allclose([out[name] for name in want], list(want.values()))
