# SPDX-License-Identifier: Apache-2.0
"""Proposals at the edges of their rules: references that do not fit, programs that are alike."""

import collections
import types

import numpy as np
import pytest

from absolute_zero_jax import phases
from absolute_zero_jax.types import Task


def _task(size, kind='k'):
  return Task(kind, 'x' * size, (('1', '1'),), key=str(size))


@pytest.mark.parametrize('references, kept', [
    ((_task(10), _task(50), _task(30)), ['10', '30']),
    # Composites are numbered: without one, the others would be called by wrong names.
    ((_task(10), _task(50, 'composite'), _task(5, 'composite')), ['10'])])
def test_a_prompt_too_long_loses_its_longest_reference_and_with_a_composite_all(references, kept):
  kind = types.SimpleNamespace(
      name='k', min_references=0, references=lambda *args, **options: list(references),
      propose_prompt=lambda shown, prompts, variant: ''.join(t.program for t in shown))
  tools = types.SimpleNamespace(tokenizer=types.SimpleNamespace(encode=list), prompts=None)
  rules = types.SimpleNamespace(references=3, show_references=True, reference_draw='uniform',
                                max_prompt_tokens=45)
  found, ids = phases._propose_prompt(kind, None, tools, rules, np.random.default_rng(0))
  assert [t.key for t in found] == kept and len(ids) == sum(map(int, kept))


@pytest.mark.parametrize('needs, status', [(0, 'alike'), (1, 'ok')])
def test_programs_taken_from_references_may_be_alike(needs, status):
  kind = types.SimpleNamespace(name='k', min_references=needs, solve_prompt=lambda t, p: '')
  made = object.__new__(phases.Proposals)
  made._rules = types.SimpleNamespace(refuse_independent=False, refuse_duplicates=False,
                                      max_alike=1, max_prompt_tokens=9)
  made._tools = types.SimpleNamespace(
      excludes=lambda t: False, shape=lambda t: 'same', prompts=None,
      tokenizer=types.SimpleNamespace(encode=list))
  made._seen, made._buffer = set(), ()
  made._shapes = collections.Counter({('k', 'same'): 1})
  assert made._refused(kind, _task(1)) == status
