# SPDX-License-Identifier: Apache-2.0
"""The layout of an update: every token once, prompts shared, few shapes, clear refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_rows as rows_lib

from absolute_zero_jax import advantages, learner, packing
from absolute_zero_jax.types import Role


@pytest.mark.parametrize('pack', [False, True])
@pytest.mark.parametrize('seed', range(6))
def test_no_token_is_lost_or_doubled_by_the_layout(pack, seed):
  rng = np.random.default_rng(seed)
  rows = rows_lib.rows(int(rng.integers(1, 40)), seed, int(rng.integers(2, 150)))
  blocks, budget = int(rng.choice([1, 2, 4])), int(rng.choice([64, 256, 1024]))
  layout = packing.plan(rows, micro_batch_tokens=budget, blocks=blocks, pack=pack)
  values = [rng.random(len(r.response_ids)) for r in rows]
  batches = packing.fill(layout, rows, range(len(rows)), advantages=values)
  assert sum(int((b.segments_BT > 0).sum()) for b in batches) == sum(
      len(r.prompt_ids) + len(r.response_ids) for r in rows)
  for batch in batches:
    B, T = batch.tokens_BT.shape
    assert B % blocks == 0 and (B * T <= budget or B == blocks)
    assert (batch.index_CM >= 0).sum() == batch.mask_BT.sum()
  scored = [np.take_along_axis(b.advantages_BT.reshape(blocks, -1), np.maximum(b.index_CM, 0), 1)
            for b in batches]
  for got, want in zip(packing.take_rows(layout, rows, batches, scored), values):
    np.testing.assert_allclose(got, want, rtol=1e-6)
  for i, (row, place) in enumerate(zip(rows, layout.places)):
    batch, size = batches[place.batch], len(row.prompt_ids) + len(row.response_ids)
    span = slice(place.start, place.start + size)
    np.testing.assert_array_equal(batch.tokens_BT[place.line, span],
                                  [*row.prompt_ids, *row.response_ids])
    np.testing.assert_array_equal(batch.positions_BT[place.line, span], np.arange(size))
    assert (batch.segments_BT[place.line, span] == place.segment).all()
    assert (batch.groups_BT[place.line, place.first:place.start + size] == i).all()


@pytest.mark.parametrize('pack', [False, True])
def test_a_shared_prompt_is_held_once_and_its_last_token_by_every_row(pack):
  rows = rows_lib.answers(3, 6)
  layout = packing.plan(rows, micro_batch_tokens=10**6, pack=pack, share_prompts=True)
  values = [np.random.default_rng(i).random(len(r.response_ids)) for i, r in enumerate(rows)]
  batches = packing.fill(layout, rows, advantages=values)
  prompts = {tuple(r.prompt_ids) for r in rows}
  held = sum(int((b.segments_BT > 0).sum()) for b in batches)
  responses = sum(len(r.response_ids) for r in rows)
  assert held < sum(len(r.prompt_ids) for r in rows) + responses
  groups = {(p.batch, p.line, p.shared) for p in layout.places if p.shared >= 0}
  assert len(prompts) <= len(groups) < len(rows) / 2      # a group may be too long for one line
  for row, place, value in zip(rows, layout.places, values):
    batch = batches[place.batch]
    def read(start, end, name, batch=batch, line=place.line):
      return getattr(batch, name)[line, start:end]
    end, P = place.first + len(row.response_ids), len(row.prompt_ids)
    if place.shared < 0:
      continue
    assert place.first - place.start == 1
    np.testing.assert_array_equal(read(place.start, end, 'tokens_BT'),
                                  [row.prompt_ids[-1], *row.response_ids])
    np.testing.assert_array_equal(read(place.shared, place.shared + P - 1, 'tokens_BT'),
                                  row.prompt_ids[:-1])
    np.testing.assert_array_equal(read(place.start, end, 'positions_BT'),
                                  np.arange(P - 1, P + len(row.response_ids)))
    np.testing.assert_allclose(read(place.first, end, 'advantages_BT'), value, rtol=1e-6)
    # Responses see the prompt, whose number is a multiple, and not one another.
    assert set(read(place.shared, place.shared + P - 1, 'segments_BT')) <= {
        place.segment // packing.GROUP * packing.GROUP}


def _rows(prompt, *responses, **fields):
  """Rows that answer one prompt, by their lengths."""
  return [learner.Row(range(1, prompt + 1), [7] * n, [0.0] * n, [0.0] * n, 1.0, 'k', 'solve', 0,
                      **fields) for n in responses]


def test_lines_are_filled_to_the_last_token():
  # 40 + 6 * (1 + 9) are twice the longest row, as much as a line of shared prompts may hold.
  for count, lines in ((6, 1), (7, 2)):
    layout = packing.plan(_rows(41, *[9] * count), micro_batch_tokens=200, share_prompts=True,
                          buckets=(100,))
    assert layout.shapes[0][:2] == (lines, 100)
  layout = packing.plan(_rows(20, 12, 12), micro_batch_tokens=64, pack=True)
  assert [(p.line, p.start) for p in layout.places] == [(0, 0), (0, 32)]


def test_a_prompt_with_more_answers_than_segment_numbers_is_held_again(monkeypatch):
  monkeypatch.setattr(packing, 'GROUP', 4)
  layout = packing.plan([*_rows(5, *[2] * 7), *_rows(30, 2)], micro_batch_tokens=128, pack=True,
                        share_prompts=True, buckets=(64,))
  segments = [p.segment for p in layout.places[:7]]
  assert len(set(segments)) == 7 and not any(segment % 4 == 0 for segment in segments)


def test_scored_tokens_are_dealt_evenly_to_blocks():
  layout = packing.plan(_rows(5, 40, 10, 10, 10, 10), micro_batch_tokens=8 * 45, blocks=2,
                        buckets=(45,))
  assert layout.shapes == ((8, 45, 45),)     # in turn: 60 tokens to score in the first block


def test_packing_wastes_less_than_padding():
  rows = rows_lib.rows(60, 3, 200)
  cells = {pack: sum(B * T for B, T, _ in packing.plan(rows, micro_batch_tokens=1024,
                                                       pack=pack).shapes) for pack in (0, 1)}
  used = sum(len(r.prompt_ids) + len(r.response_ids) for r in rows)
  assert used / cells[1] > 0.85 > used / cells[0]


def test_packed_lines_of_one_length_need_one_shape_but_for_the_scored_tokens():
  shapes = set()
  for seed in range(20):
    rows = rows_lib.rows(96 + seed, seed, 200)
    shapes |= set(packing.plan(rows, micro_batch_tokens=1024, pack=True, share_prompts=True,
                               buckets=(256,)).shapes)
  assert {shape[:2] for shape in shapes} == {(4, 256)} and len(shapes) <= 4


def test_on_request_the_last_micro_batch_is_as_large_as_the_others():
  shapes = {few: {shape[:2] for n in range(1, 24) for shape in packing.plan(
      rows_lib.rows(n, n, 200), micro_batch_tokens=1024, pack=True, buckets=(256,),
      few_shapes=few).shapes} for few in (False, True)}
  assert shapes[True] == {(4, 256)} < shapes[False]
  five = packing.plan(rows_lib.rows(5, longest=2, prompt_ids=[1] * 200), micro_batch_tokens=1024,
                      pack=True, buckets=(256,))
  assert [shape[:2] for shape in five.shapes] == [(4, 256), (1, 256)]


def test_few_shapes_whatever_the_lengths():
  shapes = set()
  for seed in range(30):
    shapes |= set(packing.plan(rows_lib.rows(96, seed, 480), micro_batch_tokens=4096).shapes)
  assert len(shapes) <= 16, sorted(shapes)


def test_buckets():
  assert [packing.bucket(n) for n in (1, 64, 65, 129, 257, 400, 513, 1025, 14240)] == [
      64, 64, 128, 256, 384, 512, 768, 1536, 16384]
  assert packing.bucket(7, (5, 10)) == 10
  with pytest.raises(ValueError, match='length_buckets'):
    packing.bucket(11, (5, 10))


@pytest.mark.parametrize('change, match', [
    ({'reward': float('nan')}, 'reward=nan must be finite'),
    ({'prompt_ids': [3, -5]}, 'negative token id'),
    ({'response_ids': []}, 'at least one'), ({'prompt_ids': []}, 'at least one'),
    ({'model_logprobs': [0.0]}, 'model_logprobs has 1 entries'),
    ({'reward': [1.0]}, '1 rewards'), ({'mask': (True,)}, 'mask has 1')])
def test_malformed_rows_are_refused_by_number(change, match):
  rows = rows_lib.rows(3, 1)
  assert len(rows[1].response_ids) > 1
  rows[1] = learner.Row(**vars(rows[1]) | change)
  with pytest.raises(ValueError, match=f'row 1 .*{match}'):
    packing.plan(rows, micro_batch_tokens=64)
  with pytest.raises(ValueError, match='at least one row'):
    packing.plan([], micro_batch_tokens=64)


def test_the_rollout_numbers_roles_kinds_and_prompts():
  rows = rows_lib.rows(6)
  roles, r = packing.rollout(rows)
  assert roles == ('propose', 'solve')
  assert [roles[i] for i in r.role_B] == [row.role for row in rows]
  assert isinstance(r, advantages.Rollout)
  for row, reward_T, mask_T in zip(rows, r.reward_BT, r.mask_BT):
    n = len(row.response_ids)
    assert reward_T[n - 1] == row.reward == reward_T.sum() and mask_T.sum() == n
  row, = _rows(1, 3, mask=[True, True, False])
  assert packing.rollout([row])[1].reward_BT.tolist() == [[0, 1, 0]]


@pytest.mark.parametrize('change', [
    {'reward': np.float32(1)}, {'reward': np.int64(1)}, {'reward': jnp.float32(1)},
    {'reward': np.array(1.0)}, {'mask': (True, False)}, {'mask': np.array([True, False])},
    {'prompt_ids': jnp.array([1, 2]), 'response_ids': np.array([3, 4])},
    {'role': Role.SOLVE, 'sampler_logprobs': jnp.zeros(2)}])
def test_rows_may_hold_numbers_and_arrays_of_any_kind(change):
  usual = dict(prompt_ids=(1, 2), response_ids=(3, 4), sampler_logprobs=(0.0, 0.0),
               model_logprobs=(0.0, 0.0), reward=1.0, kind='deduction', role='solve', prompt='a')
  if 'mask' in change:
    usual['mask'] = [True, False]
  def laid_out(fields):
    rows = [learner.Row(**fields)] * 2
    plan = packing.plan(rows, micro_batch_tokens=128, share_prompts=True,
                        buckets=np.array([64, 128]))
    return packing.fill(plan, rows), packing.rollout(rows)
  for x, y in zip(jax.tree.leaves(laid_out(usual | change)), jax.tree.leaves(laid_out(usual))):
    np.testing.assert_array_equal(x, y)
