# SPDX-License-Identifier: Apache-2.0
"""Draws one token per row from logits, with exact log-probs and without sorting the vocabulary.

    logits_BV -> weights exp((logit - max) / temperature) -> keep those above a threshold per row
              -> inverse CDF in two levels (a block of 128, then a token inside it)

A categorical draw by Gumbel noise costs one random number per vocabulary entry, which on a CPU is
dearer than the model; this one needs two per row. Top-k, top-p and min-p all keep the tokens whose
weight reaches a threshold. The threshold is found exactly by a search over the 30 bits of a float
in [0, 1], since non-negative floats order like their bit patterns.

Letters: B rows, V vocabulary, C = 128 block width, N = V/C blocks, I groups of J rows.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

_BLOCK = 128
_GROUP = 8                       # rows whose weights stay in a core's cache between passes
_TOP_BITS = 30                   # the bit pattern of 1.0 is below 2**30


class Options(NamedTuple):
  """Sampling parameters as traced scalars, so that changing them compiles nothing.

  `temperature` 0 is greedy; `top_k` 0, `top_p` 1 and `min_p` 0 switch each truncation off.
  """
  temperature: jax.Array
  top_k: jax.Array
  top_p: jax.Array
  min_p: jax.Array


class Draw(NamedTuple):
  """Drawn tokens, and their log-probs under the sampling distribution and under the model."""
  tokens_B: jax.Array
  sampler_logprobs_B: jax.Array
  model_logprobs_B: jax.Array


def options(temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
            min_p: float = 0.0) -> Options:
  """Checked sampling parameters.

  Raises ValueError outside temperature >= 0, top_k >= 0, 0 < top_p <= 1, 0 <= min_p <= 1.
  """
  is_finite = 0 <= temperature < float('inf')
  allowed = {'temperature': (temperature, is_finite, 'at least 0 (0: greedy)'),
             'top_k': (top_k, 0 <= top_k < float('inf') and top_k == int(top_k),
                       'an integer >= 0 (0: off)'),
             'top_p': (top_p, 0 < top_p <= 1, 'above 0 and at most 1 (1: off)'),
             'min_p': (min_p, 0 <= min_p <= 1, 'between 0 (off) and 1')}
  for name, (value, is_allowed, bound) in allowed.items():
    if not is_allowed:
      raise ValueError(f'{name}={value} must be {bound}.')
  top_p = max(top_p, 1e-30)              # a subnormal number would keep nothing at all
  return Options(jnp.float32(temperature), jnp.int32(min(top_k, 2**31 - 1)), jnp.float32(top_p),
                 jnp.float32(min_p))


def draw(logits_BV: jax.Array, allowed_V: jax.Array, uniform_B2: jax.Array, opts: Options, *,
         platform: str = 'cpu') -> Draw:
  """Draws a token of each row by two uniform numbers in [0, 1).

  Tokens outside `allowed_V` (padding ids) are never drawn. Truncation is applied in the order of
  HF: temperature, top-k, top-p of what top-k left, min-p; tokens tied with the last kept one are
  kept. `sampler_logprobs` are renormalised over what is kept (0 when greedy), `model_logprobs` are
  log-softmax of the untouched logits over the whole vocabulary. Greedy takes the lowest id among
  equal best logits.

  Args:
    platform: that of the devices; 'cpu' works on a few rows at a time, for a core's caches.
  """
  B, V = logits_BV.shape
  pad = -V % _BLOCK
  if pad:
    logits_BV = jnp.pad(logits_BV, ((0, 0), (0, pad)), constant_values=-jnp.inf)
    allowed_V = jnp.pad(allowed_V, (0, pad))
  if platform != 'cpu' or B <= _GROUP or B % _GROUP:
    return _draw(logits_BV, allowed_V, uniform_B2, opts, platform)
  logits_IJV = logits_BV.reshape(B // _GROUP, _GROUP, V + pad)
  uniform_IJ2 = uniform_B2.reshape(B // _GROUP, _GROUP, 2)
  drawn = jax.lax.map(lambda x: _draw(x[0], allowed_V, x[1], opts, platform),
                      (logits_IJV, uniform_IJ2))
  return jax.tree.map(lambda x: x.reshape(B), drawn)


def _draw(logits_BV, allowed_V, uniform_B2, opts, platform):
  B, V = logits_BV.shape
  temperature = jnp.where(opts.temperature == 0, 1.0, opts.temperature)
  block_BNC = logits_BV.astype(jnp.float32).reshape(B, V // _BLOCK, _BLOCK)
  allowed_1NC = allowed_V.reshape(1, -1, _BLOCK)
  # The vocabulary is read for maxima and for sums; all else looks at blocks, or at one of them.
  reduce = functools.partial(_reduce_two, platform=platform)
  peak_BN, best_BN = reduce(jax.lax.max, -jnp.inf, block_BNC,
                            jnp.where(allowed_1NC, block_BNC, -jnp.inf))
  peak_B, best_B = jnp.max(peak_BN, -1), jnp.max(best_BN, -1)
  floor_B = _floor(block_BNC, allowed_1NC, best_B, temperature, opts)

  def weights(logits, allowed, best, floor):
    kept = allowed & (logits >= floor)
    return jnp.where(kept, jnp.exp((logits - best) / temperature), 0.0)

  total_BN, mass_BN = reduce(
      jax.lax.add, 0.0, jnp.exp(block_BNC - peak_B[:, None, None]),
      weights(block_BNC, allowed_1NC, best_B[:, None, None], floor_B[:, None, None]))
  is_greedy = opts.temperature == 0
  n_B = jnp.where(is_greedy, jnp.argmax(best_BN, -1), _pick(mass_BN, uniform_B2[:, 0]))
  row_BC = jnp.take_along_axis(block_BNC, n_B[:, None, None], 1)[:, 0]
  allowed_BC = allowed_1NC[0, n_B]
  weight_BC = weights(row_BC, allowed_BC, best_B[:, None], floor_B[:, None])
  c_B = jnp.where(is_greedy, jnp.argmax(jnp.where(allowed_BC, row_BC, -jnp.inf), -1),
                  _pick(weight_BC, uniform_B2[:, 1]))
  sampler_B = jnp.where(is_greedy, 0.0,
                        jnp.log(_at(weight_BC, c_B)) - jnp.log(jnp.sum(mass_BN, -1)))
  model_B = _at(row_BC, c_B) - peak_B - jnp.log(jnp.sum(total_BN, -1))
  return Draw((n_B * _BLOCK + c_B).astype(jnp.int32), sampler_B, model_B)


def _reduce_two(op, start, x_BNC, y_BNC, platform):
  """Two reductions of the last axis; on a GPU in one pass, which a CPU cannot vectorise."""
  start = jnp.float32(start)
  if platform == 'gpu':
    out = jax.lax.reduce((x_BNC, y_BNC), (start,) * 2,
                         lambda a, b: (op(a[0], b[0]), op(a[1], b[1])), (2,))
  else:
    out = [jax.lax.reduce(x, start, op, (2,)) for x in (x_BNC, y_BNC)]
  # Or the compiler would read the vocabulary again for what is computed from these.
  return jax.lax.optimization_barrier(tuple(out))


def _floor(block_BNC, allowed_1NC, best_B, temperature, opts):
  """The least logit of each row that truncation keeps; -inf without truncation."""
  B = best_B.shape[0]

  def cut():
    logits_BV = jnp.where(allowed_1NC, block_BNC, -jnp.inf).reshape(B, -1)
    # Unnormalised probabilities, 1 for the best token.
    weight_BV = jnp.exp((logits_BV - best_B[:, None]) / temperature)
    top_k = jnp.where(opts.top_k == 0, weight_BV.shape[1], opts.top_k).astype(jnp.float32)
    kth_B = jax.lax.cond(opts.top_k > 0, lambda: _threshold(weight_BV, None, top_k + 0 * best_B),
                         lambda: jnp.zeros_like(best_B))
    kept_BV = jnp.where(weight_BV >= kth_B[:, None], weight_BV, 0.0)
    mass_B = opts.top_p * jnp.sum(kept_BV, -1)
    pth_B = jax.lax.cond(opts.top_p < 1, lambda: _threshold(kept_BV, kept_BV, mass_B),
                         lambda: jnp.zeros_like(best_B))
    least_B = jnp.maximum(opts.min_p, jnp.maximum(kth_B, pth_B))
    # As a logit, since weights that are computed again elsewhere may differ in the last bit.
    return jnp.min(jnp.where(weight_BV >= least_B[:, None], logits_BV, jnp.inf), -1)

  truncates = (opts.top_k > 0) | (opts.top_p < 1) | (opts.min_p > 0)
  return jax.lax.cond(truncates, cut, lambda: jnp.full_like(best_B, -jnp.inf))


def _threshold(weight_BV, amount_BV, limit_B):
  """Smallest weight of each row such that the amounts strictly above it stay below `limit_B`.

  Amounts of None count tokens. Returns 0 where everything may stay.
  """
  bits_BV = jax.lax.bitcast_convert_type(weight_BV, jnp.int32)

  def narrow(i, low_B):
    # The answer is the smallest bit pattern x with amount(above x) < limit; it lies in
    # [low, low + 2**(30 - i)), and this pass decides in which half.
    half = jnp.left_shift(1, _TOP_BITS - 1 - i)
    over_BV = bits_BV >= (low_B + half)[:, None]
    amount_B = jnp.sum(jnp.where(over_BV, 1.0 if amount_BV is None else amount_BV, 0.0), -1)
    return jnp.where(amount_B >= limit_B, low_B + half, low_B)

  low_B = jax.lax.fori_loop(0, _TOP_BITS, narrow, jnp.zeros(limit_B.shape, jnp.int32))
  return jax.lax.bitcast_convert_type(low_B, jnp.float32)


def _pick(weight_BN, uniform_B):
  sums_BN = jnp.cumsum(weight_BN, -1)
  # Sums in blocks need not grow steadily: an index of weight 0 is never meant.
  above_BN = (sums_BN > uniform_B[:, None] * sums_BN[:, -1:]) & (weight_BN > 0)
  # Rounding may lift uniform * total to the total itself; then the last possible index is meant,
  # not the last index, whose weight may be 0.
  last_B = jnp.max(jnp.where(weight_BN > 0, jnp.arange(weight_BN.shape[1])[None], 0), -1)
  first_B = jnp.argmax(above_BN, -1).astype(jnp.int32)
  return jnp.where(jnp.any(above_BN, -1), first_B, last_B.astype(jnp.int32))


def _at(x_BV, index_B):
  return jnp.take_along_axis(x_BV, index_B[:, None], 1)[:, 0]
