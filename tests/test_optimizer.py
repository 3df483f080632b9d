# SPDX-License-Identifier: Apache-2.0
"""Optimizers in few bits, and what decays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from absolute_zero_jax import learner, optimizer


def test_bfloat16_moments_follow_float32_ones():
  wide, narrow = (learner.make_optimizer(1e-2, moment_dtype=d) for d in ('float32', 'bfloat16'))
  params = {'w': jnp.ones((64, 64))}
  states = [tx.init(params) for tx in (wide, narrow)]
  assert states[1][0].nu['w'].dtype == jnp.bfloat16
  step = jax.jit(lambda tx_state, g, narrow_tx: (narrow if narrow_tx else wide).update(
      {'w': g}, tx_state, params)[1], static_argnums=2)
  for i in range(300):
    g = jax.random.normal(jax.random.key(i), (64, 64))
    states = [step(s, g, n) for n, s in enumerate(states)]
  means = [float(s[0].nu['w'].astype(jnp.float32).mean()) for s in states]
  # Rounded to nearest, the second moment stops where 0.1 % is less than half a bfloat16 step.
  np.testing.assert_allclose(means[1], means[0], rtol=0.01)


def test_stochastic_rounding_keeps_the_mean_and_what_is_exact():
  x = jnp.full((20000,), 1.0 + 2**-9)
  got = optimizer.round_to(x, jnp.dtype('bfloat16'), jax.random.key(0)).astype(jnp.float32)
  assert set(np.unique(got)) == {1.0, 1.0078125}
  np.testing.assert_allclose(got.mean(), x[0], atol=1e-4)
  exact = jnp.array([0.0, -1.5, jnp.inf, -jnp.inf])
  np.testing.assert_array_equal(
      optimizer.round_to(exact, jnp.dtype('bfloat16'), jax.random.key(1)), exact)
  # Of all bits, to which noise is added: unguarded, the last is -0.
  nans = jax.lax.bitcast_convert_type(jnp.uint32([0x7FC00000, 0x7F800001, 0x7FFFFFFF]), jnp.float32)
  assert jnp.isnan(optimizer.round_to(nans, jnp.dtype('bfloat16'), jax.random.key(1))).all()
  a, b = optimizer.round_tree([x[:99]] * 2, [x[:99].astype(jnp.bfloat16)] * 2, jax.random.key(2))
  assert (a != b).any()                        # each leaf has its own noise


def test_rates_by_hand():
  rate = optimizer.learning_rate_schedule(1.0, schedule='cosine', warmup_steps=4, steps=8)
  np.testing.assert_allclose([rate(i) for i in range(9)], [
      0.25, 0.5, 0.75, 1, 1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5, 0], atol=1e-6)
  learner.make_optimizer(schedule='cosine', warmup_steps=4, steps=5)
  with pytest.raises(ValueError, match='steps=4; set it to the length of the run'):
    learner.make_optimizer(schedule='cosine', warmup_steps=4, steps=4)


def test_weight_decay_may_spare_norms_and_biases():
  params = {'embed': jnp.ones((4, 2)), 'layers': {'attn_norm': jnp.ones((2, 2)),
                                                  'q_bias': jnp.ones((2, 2, 2))}}
  zero = jax.tree.map(jnp.zeros_like, params)
  moved = {}
  for decay in ('all', 'matrices'):
    tx = learner.make_optimizer(0.1, weight_decay=0.5, decay=decay)
    change, _ = tx.update(zero, tx.init(params), params)
    moved[decay] = [float(x.sum()) != 0 for x in jax.tree.leaves(change)]
  assert moved == {'all': [True, True, True], 'matrices': [True, False, False]}


def test_muon_keeps_second_moments_of_bfloat16_weights_in_float32():
  tx = learner.make_optimizer(1e-3, name='muon')
  params = jax.tree.map(lambda shape: jnp.ones(shape, jnp.bfloat16),
                        {'embed': (8, 4), 'layers': {'up': (2, 4, 8)}},
                        is_leaf=lambda x: isinstance(x, tuple))
  state = tx.init(params)

  @jax.jit
  def after(state, size, steps):
    gradient = {'embed': jnp.full((8, 4), size), 'layers': {'up': jnp.ones((2, 4, 8))}}
    return jax.lax.fori_loop(0, steps, lambda _, s: tx.update(gradient, s[1], params),
                             tx.update(gradient, state, params))
  _, state = after(state, 1.0, 1500)
  change, _ = after(state, 0.1, 6000)
  # Where the moment froze at 1, the step would be a tenth of the rate.
  np.testing.assert_allclose(np.asarray(change['embed'], np.float32), -1e-3, rtol=0.4)


def test_muon_turns_each_layers_matrix_as_a_whole_at_adamws_size():
  shapes = {'q': (2, 12, 2, 3), 'o': (2, 2, 3, 12), 'up': (2, 12, 6)}
  rows = {'q': 12, 'o': 6, 'up': 12}
  keys = dict(zip(shapes, jax.random.split(jax.random.key(0), 3)))
  gradient = {'layers': {n: jax.random.normal(keys[n], shape) for n, shape in shapes.items()}}
  params = jax.tree.map(jnp.ones_like, gradient)
  tx = learner.make_optimizer(1.0, name='muon')
  change = jax.jit(lambda: tx.update(gradient, tx.init(params), params)[0])()
  for name, x in change['layers'].items():
    values = np.linalg.svd(np.asarray(x).reshape(2, rows[name], -1), compute_uv=False)
    assert values.max() < 2 * values.min(), name       # of the gradient itself: 3 times and more
    np.testing.assert_allclose(np.sqrt(np.mean(np.square(x))), 0.2, rtol=0.2)


def test_muon_decays_matrices_alone():
  params = {'embed': jnp.ones((4, 2)), 'layers': {'up': jnp.ones((2, 4, 2))}}
  zero = jax.tree.map(jnp.zeros_like, params)
  tx = learner.make_optimizer(0.1, name='muon', weight_decay=0.5)
  change = jax.jit(lambda: tx.update(zero, tx.init(params), params)[0])()
  assert not change['embed'].any()
  np.testing.assert_allclose(change['layers']['up'], -0.05, rtol=1e-6)
