# SPDX-License-Identifier: Apache-2.0
"""Sizes and prefixes that the sampler chooses on the host."""

import pytest

from absolute_zero_jax import schedule


def test_schedules():
  assert schedule.ladder(64, 600) == (64, 96, 128, 192, 256, 384, 512, 768)
  assert schedule.fit((64, 96, 128), 65) == 96
  assert [schedule.width(n) for n in (1, 2, 3, 33)] == [1, 2, 4, 64]
  assert schedule.width(3, shards=6) == 6 and schedule.width(7, shards=6) == 12
  assert schedule.batches(23, 64) == [16, 4, 1, 1, 1] and schedule.batches(5, 2) == [1] * 5
  assert schedule.batches(23, 20, padded=True) == [16, 16] and schedule.batches(1, 64, True) == [1]
  with pytest.raises(ValueError, match='holds 129'):
    schedule.fit((64, 128), 129)


def test_shared_prefixes_save_the_most_tokens():
  a, b = tuple(range(40)), tuple(range(100, 150))
  contexts = [a + (1,), a + (2,), a, b + (1,), b + (2, 3), (7,), ()]
  found = schedule.shared_prefixes(contexts, 32)
  assert found == {a + (1,): a, a + (2,): a, a: a, b + (1,): b, b + (2, 3): b, (7,): (), (): ()}
  # One prefix of 40 for nine rows saves more than one of 60 for two of them.
  deep = [a + (i,) for i in range(7)] + [a + tuple(range(50, 70)) + (i,) for i in range(2)]
  assert {len(p) for p in schedule.shared_prefixes(deep, 32).values()} == {40}
  assert set(schedule.shared_prefixes([a + (1,), a + (2,)], 41).values()) == {()}
