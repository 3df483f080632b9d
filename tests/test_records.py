# SPDX-License-Identifier: Apache-2.0
"""Episode records survive the round trip, whatever text a model wrote."""

import dataclasses

from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st
import pytest

from absolute_zero_jax import records
from absolute_zero_jax.types import Episode, Role, Task, Turn

TEXT = st.text(st.characters(blacklist_categories=()), max_size=40)   # lone surrogates included


@st.composite
def episodes(draw):
  n = draw(st.integers(0, 4))
  floats = st.floats(-20, 0).map(lambda x: float(f'{x:.6g}'))
  turn = Turn(prompt_ids=tuple(draw(st.lists(st.integers(0, 99), max_size=4))),
              response_ids=tuple(range(n)), text=draw(TEXT),
              sampler_logprobs=tuple(draw(st.lists(floats, min_size=n, max_size=n))),
              model_logprobs=tuple(draw(st.lists(floats, min_size=n, max_size=n))))
  task = Task(kind='deduction', program=draw(TEXT), cases=((draw(TEXT), draw(TEXT)),),
              extra={'note': draw(TEXT)})
  return Episode(role=draw(st.sampled_from(Role)), kind='deduction', step=3, group='3/x',
                 turns=(turn, turn), status='ok', reward=0.5, parts={'accuracy': 1.0},
                 task=draw(st.sampled_from([None, task])), advantage=(0.25,) * n)


@settings(max_examples=50, deadline=None)
@given(st.lists(episodes(), max_size=3))
def test_round_trip_is_exact(tmp_path_factory, some):
  directory = epath.Path(tmp_path_factory.mktemp('records'))
  records.write(directory, 7, some)
  assert records.read(directory / '000007.jsonl.gz') == some
  assert records.read(str(directory / '000007.jsonl.gz')) == some
  assert [p.name for p in directory.iterdir()] == ['000007.jsonl.gz']    # nothing half-written


def test_another_version_is_refused():
  d = records.to_json(Episode(role=Role.SOLVE, kind='k', step=0, group='', turns=(), status='ok',
                              reward=0.0))
  with pytest.raises(ValueError, match='version 99'):
    records.from_json(d | {'version': 99})
  assert dataclasses.asdict(records.from_json(d))['version'] == 1
