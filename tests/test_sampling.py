# SPDX-License-Identifier: Apache-2.0
"""Token draws against exact probabilities: who is drawn, how often, and with which log-prob."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from absolute_zero_jax import sampling

_DRAWS = 20_000
_draw = jax.jit(sampling.draw, static_argnames=('platform',))


def _exact(logits_V, allowed_V, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
  """Probabilities by sorting, in float64, in the order of HF's logits processors."""
  x = np.where(allowed_V, np.asarray(logits_V, np.float64), -np.inf) / temperature
  p = np.exp(x - x.max())
  if top_k:
    p[p < np.sort(p)[::-1][min(top_k, p.size) - 1]] = 0
  if top_p < 1:
    order = np.argsort(-p, kind='stable')
    above = np.cumsum(p[order]) - p[order]
    first_removed = p[order][above >= top_p * p.sum()]
    p[p <= (first_removed[0] if first_removed.size else -1)] = 0
  p[p < min_p * p.max()] = 0
  return p / p.sum()


def _case(V, seed=0):
  r = np.random.default_rng(seed)
  logits_V = (r.standard_normal(V) * 2.0).astype(np.float32)
  allowed_V = np.ones(V, bool)
  logits_V[3] += 6                         # the most likely token is a padding id
  allowed_V[3] = False
  return logits_V, allowed_V


def _many(logits_V, allowed_V, options, draws=_DRAWS, seed=0, **where):
  """Draws of one distribution, 1000 rows a call."""
  rows_BV = jnp.broadcast_to(jnp.asarray(logits_V)[None], (1000, logits_V.size))
  r = np.random.default_rng(seed)
  out = [_draw(rows_BV, jnp.asarray(allowed_V), r.random((1000, 2), np.float32), options, **where)
         for _ in range(draws // 1000)]
  return [np.concatenate(x) for x in zip(*out)]


@pytest.mark.parametrize('V', [200, 512])
@pytest.mark.parametrize('options', [
    {}, {'temperature': 0.6}, {'temperature': 1.7}, {'top_k': 7}, {'top_p': 0.8}, {'min_p': 0.1},
    {'temperature': 1.3, 'top_k': 20, 'top_p': 0.7}, {'top_k': 30, 'top_p': 0.9, 'min_p': 0.05}],
    ids=str)
def test_draws_follow_the_exact_distribution(V, options):
  logits_V, allowed_V = _case(V)
  p_V = _exact(logits_V, allowed_V, **options)
  tokens, sampler, model = _many(logits_V, allowed_V, sampling.options(**options))
  assert set(tokens) <= set(np.flatnonzero(p_V))
  with np.errstate(divide='ignore'):
    np.testing.assert_allclose(sampler, np.log(p_V)[tokens], atol=1e-5)
  x = np.asarray(logits_V, np.float64)
  want = x - x.max() - np.log(np.exp(x - x.max()).sum())
  np.testing.assert_allclose(model, want[tokens], atol=1e-5)
  common = p_V * _DRAWS >= 5
  counts = np.append(np.bincount(tokens, minlength=V)[common],
                     np.bincount(tokens, minlength=V)[~common].sum())
  expected = np.append(p_V[common], p_V[~common].sum()) * _DRAWS
  keep = expected > 0
  chi2 = ((counts - expected)[keep]**2 / expected[keep]).sum()
  freedom = keep.sum() - 1
  assert chi2 < freedom + 4.5 * np.sqrt(2 * freedom) + 3     # untruncated top-k 7: chi2 of 10**4


def test_kept_sets_equal_sorting_over_many_rows():
  """Every row of a batch its own distribution: log-probs show which tokens were kept."""
  r = np.random.default_rng(1)
  logits_BV = (r.standard_normal((64, 640)) * r.uniform(0.3, 5, (64, 1))).astype(np.float32)
  allowed_V = np.ones(640, bool)
  for options in ({'top_p': 0.95}, {'top_k': 50}, {'top_k': 50, 'top_p': 0.5}, {'top_p': 0.01},
                  {'top_p': 0.9999}, {'min_p': 1.0}, {'top_k': 1}, {'top_k': 640}, {'top_k': 9999}):
    for where in ({}, {'platform': 'gpu'}):
      drawn = _draw(logits_BV, allowed_V, r.random((64, 2), np.float32),
                    sampling.options(**options), **where)
      for b in range(64):
        p_V = _exact(logits_BV[b], allowed_V, **options)
        assert abs(np.log(p_V[drawn.tokens_B[b]]) - drawn.sampler_logprobs_B[b]) < 2e-5, options


def test_ties_at_the_edge_are_all_kept():
  logits_V = np.array([2.0, 1.0, 1.0, 1.0, 0.0] + [-9.0] * 123, np.float32)
  allowed_V = np.ones(128, bool)
  tokens, sampler, _ = _many(logits_V, allowed_V, sampling.options(top_k=2), draws=2000)
  assert set(tokens) == {0, 1, 2, 3}
  weights = np.exp([2.0, 1, 1, 1])
  np.testing.assert_allclose(sampler[tokens == 2], np.log(weights[2] / weights.sum()), atol=1e-6)
  tokens, _, _ = _many(logits_V, allowed_V, sampling.options(min_p=float(np.exp(-1.0))), draws=2000)
  assert set(tokens) == {0, 1, 2, 3}


def test_greedy_takes_the_first_best_allowed_token():
  logits_V = np.zeros(300, np.float32)
  logits_V[[40, 150, 299]] = 5.0, 5.0, 9.0
  allowed_V = np.arange(300) < 299
  for platform in ('cpu', 'gpu', 'tpu'):
    tokens, sampler, model = _many(logits_V, allowed_V, sampling.options(temperature=0),
                                   draws=1000, platform=platform)
    assert set(tokens) == {40} and not sampler.any()
    want = 5 - np.log(np.exp(logits_V.astype(np.float64)).sum())
    np.testing.assert_allclose(model, want, atol=1e-5)


def test_extreme_uniforms_never_reach_a_forbidden_or_impossible_token():
  """The largest float below 1 times the total may round up to it: the old clamp drew id V - 1."""
  r = np.random.default_rng(2)
  logits_BV = (r.standard_normal((1000, 300)) * 3).astype(np.float32)
  logits_BV[:, 250:] = -np.inf                   # impossible
  allowed_V = np.ones(300, bool)
  allowed_V[200:260] = False                     # forbidden, in the middle of a block and after it
  top = np.float32(1) - np.finfo(np.float32).epsneg
  for u, v in ((top, top), (0.0, 0.0), (0.0, top), (top, 0.0)):
    uniform = np.tile(np.array([[u, v]], np.float32), (1000, 1))
    drawn = _draw(logits_BV, allowed_V, uniform, sampling.options())
    assert drawn.tokens_B.max() < 200 and np.isfinite(drawn.sampler_logprobs_B).all()


def test_sums_that_grow_by_rounding_draw_nothing_impossible(monkeypatch):
  """XLA adds up more than 128 numbers in blocks: a sum may rise, or fall, where the weight is 0."""
  weight_BN = np.float32([[2, 0, 0, 0, 1, 1, 0, 0]] * 4)
  sums_BN = jnp.float32([[2, 2.2, 1.9, 2.2, 3.2, 4, 4.1, 4]] * 4)
  monkeypatch.setattr(sampling.jnp, 'cumsum', lambda x, axis: sums_BN)
  picked_B = sampling._pick(weight_BN, jnp.float32([0.1, 0.52, 0.9, 0.9999999]))
  assert picked_B.tolist() == [0, 4, 5, 5]


def test_the_smallest_top_p_keeps_the_best_token():
  logits_V = np.array([0.0, 3.0, 1.0], np.float32)
  tokens, sampler, _ = _many(logits_V, np.ones(3, bool), sampling.options(top_p=1e-40), draws=1000)
  assert set(tokens) == {1} and not sampler.any()


def test_tiny_temperature_is_greedy_without_overflow():
  logits_V, allowed_V = _case(512)
  tokens, sampler, _ = _many(logits_V, allowed_V, sampling.options(temperature=1e-4), draws=1000)
  assert set(tokens) == {int(np.where(allowed_V, logits_V, -np.inf).argmax())}
  np.testing.assert_allclose(sampler, 0, atol=1e-6)


@pytest.mark.parametrize('options, message', [
    ({'temperature': -1}, 'temperature=-1.*at least 0'), ({'top_p': 0.0}, 'top_p=0.0.*above 0'),
    ({'temperature': float('nan')}, 'temperature'), ({'top_k': -2}, 'top_k=-2'),
    ({'min_p': 1.5}, 'min_p=1.5.*between'), ({'top_k': 2.5}, 'top_k=2.5.*integer')])
def test_impossible_options_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    sampling.options(**options)
