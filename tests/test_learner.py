# SPDX-License-Identifier: Apache-2.0
"""The update against a plain loss and torch; independence of layout and devices; edge cases."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest
import random_rows as rows_lib
import tiny_learner
from tiny_learner import apart as _apart
from tiny_learner import CONFIG, RECORD
from tiny_learner import plain_logprobs as _plain_logprobs
from tiny_learner import update as _update

from absolute_zero_jax import learner, optimizer, reinforce, sharding

params = tiny_learner.params


@pytest.fixture(scope='module')
def whole(params):
  """All rows as one micro-batch on one device."""
  rows = rows_lib.rows()
  state, metrics, _ = _update(params, rows)
  assert metrics['micro_batches'] == 1
  assert metrics['positions'] == sum(len(r.prompt_ids) + len(r.response_ids) for r in rows)
  return state.opt_state.trace, metrics


def test_the_gradient_is_that_of_a_plain_loss_over_the_rows(params):
  """All logits, autodiff, no packing: only the definition is shared."""
  rows = rows_lib.rows(6, 5, 20)
  score = np.array([r.reward for r in rows])
  length = np.array([len(r.response_ids) for r in rows])
  group = np.array([f'{r.role}{r.kind}' for r in rows])

  @jax.jit
  def loss_of(params):
    total, logps = 0.0, _plain_logprobs(params, rows)
    for name in set(group):
      member = np.flatnonzero(group == name)
      value = np.repeat(score[member], length[member])
      mean, deviation = value.mean(), np.sqrt(value.var(ddof=1) + 1e-8)
      for i in member:
        logp_TV = logps[i]
        own_T = logp_TV[np.arange(length[i]), np.array(rows[i].response_ids)]
        entropy_T = -jnp.sum(jnp.exp(logp_TV) * logp_TV, axis=-1)
        token_T = -(score[i] - mean) / deviation * own_T - 0.01 * entropy_T
        total += jnp.sum(token_T) / length[member].sum() / len(set(group))
    return total

  state, metrics, _ = _update(params, rows)
  assert _apart(jax.grad(loss_of)(params), state.opt_state.trace) < 1e-5
  # The ratio is 1: the surrogate's value is -A per token, not -A log p.
  assert metrics['grad_norm'] > 0.1


@pytest.mark.parametrize('options', [
    dict(micro_batch_tokens=256), dict(micro_batch_tokens=256, pack=True),
    dict(chunk=7, remat='none')], ids=['micro', 'packed', 'small chunks'])
def test_the_layout_changes_nothing(params, whole, options):
  state, metrics, _ = _update(params, rows_lib.rows(), **options)
  assert _apart(whole[0], state.opt_state.trace) < 1e-6
  for name in ('loss', 'grad_norm', 'entropy', 'mismatch_abs', 'solve_a/entropy'):
    np.testing.assert_allclose(metrics[name], whole[1][name], rtol=1e-6)


@pytest.fixture(scope='module')
def answered(params):
  """As `whole`, for rows of which several answer the same prompt, each with its own copy of it."""
  state, metrics, _ = _update(params, rows_lib.answers())
  return state.opt_state.trace, metrics


@pytest.mark.parametrize('options', [
    dict(remat='none'), dict(pack=True, micro_batch_tokens=256, length_buckets=(128,))])
def test_sharing_the_prompts_changes_nothing(params, answered, options):
  gradient, expected = answered
  state, metrics, _ = _update(params, rows_lib.answers(), share_prompts=True, **options)
  assert _apart(gradient, state.opt_state.trace) < 3e-6
  for name in ('loss', 'grad_norm', 'entropy', 'mismatch_abs', 'solve_a/entropy'):
    np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-6)


@pytest.mark.parametrize('axes, options', [
    ((2, 2, 2), {}),
    ((1, 4, 2), dict(micro_batch_tokens=512, pack=True))])
def test_eight_devices_equal_one(params, whole, axes, options):
  mesh = sharding.make_mesh(*axes)
  state, metrics, _ = _update(params, rows_lib.rows(), mesh=mesh, **options)
  assert _apart(whole[0], state.opt_state.trace) < 1e-6
  for name in ('loss', 'grad_norm', 'entropy', 'mismatch_max'):
    np.testing.assert_allclose(metrics[name], whole[1][name], rtol=1e-6)


def test_optimizer_state_and_results_stay_sharded_like_the_parameters(params):
  mesh = sharding.make_mesh(1, 4, 2)
  tx = learner.make_optimizer(1e-3)
  state, _, trainer = _update(params, rows_lib.rows(), mesh=mesh, tx=tx)
  want = jax.tree.map(lambda x: x.sharding, state.params)
  assert want['layers']['gate'].spec == P(None, 'fsdp', 'tensor')
  for moments in (state.opt_state[0].mu, state.opt_state[0].nu):
    assert jax.tree.map(lambda x: x.sharding, moments) == want
  text = trainer._compiled['gradient'].lower(
      state.params, None, trainer._put(trainer.prepare(rows_lib.rows(), None).parts[0][0]),
      8).compile().as_text()
  assert 'all-reduce' in text or 'reduce-scatter' in text
  # No device ever holds the logits of the whole vocabulary, nor all hidden states.
  assert f',{CONFIG.vocab}]' not in text


def test_old_logprobs_recomputed_are_the_current_ones_in_the_first_step(params, whole):
  state, metrics, _ = _update(params, rows_lib.rows(), old_logprobs='recompute',
                              micro_batch_tokens=512)
  assert _apart(whole[0], state.opt_state.trace) < 2e-5
  np.testing.assert_allclose(metrics['ratio_mean'], 1, atol=1e-5)
  assert whole[1]['ratio_mean'] == 1 and whole[1]['clip_fraction'] == 0 == whole[1]['kl_old']


def test_adamw_clipping_and_schedule_equal_torch_over_steps(params):
  torch = pytest.importorskip('torch')
  rows, leaf = rows_lib.rows(4), ('layers', 'gate')
  schedule = dict(schedule='cosine', warmup_steps=2, steps=6)
  tx = optax.chain(RECORD, learner.make_optimizer(1e-2, weight_decay=0.1, **schedule))
  trainer = learner.of_decoder(CONFIG, tx, reinforce.get('reinforce_plus_plus'),
                               max_grad_norm=0.05)
  state = trainer.init(jax.tree.map(jnp.copy, params))
  weight = torch.nn.Parameter(torch.tensor(np.array(params[leaf[0]][leaf[1]])))
  other = torch.optim.AdamW([weight], lr=1.0, weight_decay=0.1)
  rate = optimizer.learning_rate_schedule(1e-2, **schedule)
  for step in range(5):
    state, metrics = trainer.update(state, trainer.prepare(rows, state.params))
    clipped = state.opt_state[0].trace
    assert metrics['grad_norm'] > 0.05
    np.testing.assert_allclose(optax.tree.norm(clipped), 0.05, rtol=1e-5)
    weight.grad = torch.tensor(np.array(clipped[leaf[0]][leaf[1]]))
    other.param_groups[0]['lr'] = float(rate(step))
    other.step()
    np.testing.assert_allclose(state.params[leaf[0]][leaf[1]], weight.detach().numpy(), rtol=2e-5,
                               atol=2e-6)
  assert [round(float(rate(i)), 6) for i in (0, 1, 2, 6)] == [0.005, 0.01, 0.01, 0.0]


def test_the_norm_of_a_long_gradient_is_exact_to_rounding():
  x = np.random.default_rng(0).standard_normal((40, 300, 500)).astype(np.float32) ** 3
  tree = {'a': jnp.asarray(x), 'b': jnp.full((3,), 100.0)}
  want = np.sqrt((x.astype(np.float64)**2).sum() + 3e4)
  for options in ({}, {'xla_cpu_experimental_ynn_fusion_type': ''}):
    got = jax.jit(learner._norm, compiler_options=options)(tree)
    np.testing.assert_allclose(got, want, rtol=3e-7)


def test_a_gradient_that_is_not_finite_is_skipped_and_counted(params):
  rows = rows_lib.rows(4)
  broken = jax.tree.map(jnp.copy, params)
  broken['final_norm'] = broken['final_norm'].at[0].set(jnp.nan)
  state, metrics, trainer = _update(broken, rows, tx=learner.make_optimizer(1e-2))
  assert metrics['skipped_updates'] == 1 and int(state.step) == 1
  assert int(state.opt_state[0].count) == 0
  for new, old in zip(jax.tree.leaves(state.params), jax.tree.leaves(broken)):
    np.testing.assert_array_equal(new, old)
  healthy = trainer.init(jax.tree.map(jnp.copy, params))
  _, metrics = trainer.update(healthy, trainer.prepare(rows, params))
  assert metrics['skipped_updates'] == 0


def test_the_state_is_donated_and_shapes_compile_once(params):
  trainer = learner.of_decoder(CONFIG, learner.make_optimizer(1e-3), reinforce.get('rloo'),
                               micro_batch_tokens=256)
  state = trainer.init(jax.tree.map(jnp.copy, params))
  fresh = lambda seed: rows_lib.rows(8, seed, 20, prompt_ids=[1] * 40)
  first = state.params['embed']
  shapes = set()
  for seed in range(4):
    work = trainer.prepare(fresh(seed), state.params)
    shapes |= {(b.tokens_BT.shape, b.index_CM.shape) for b in work.parts[0]}
    state, _ = trainer.update(state, work)
    assert trainer.compilations() == len(shapes) + 2     # one gradient each; add, apply
  assert first.is_deleted() and len(shapes) <= 2


def test_rows_without_advantage_may_be_left_out(params):
  rows = rows_lib.rows(8)
  rows = [learner.Row(**vars(r) | ({'reward': 0.1} if r.prompt else {})) for r in rows]
  want, all_of_them, _ = _update(params, rows, algorithm='rloo', fields={})
  got, fewer, _ = _update(params, rows, algorithm='rloo', fields={}, skip_zero_rows=True)
  assert _apart(want.opt_state.trace, got.opt_state.trace) < 1e-6
  assert fewer['rows_without_advantage'] == 4 and fewer['tokens'] < all_of_them['tokens']
  with pytest.raises(ValueError, match='skip_zero_rows'):
    _update(params, rows, skip_zero_rows=True)


def test_the_name_of_an_algorithm_is_not_one():
  with pytest.raises(ValueError, match=r"reinforce.get\('grpo'\)"):
    learner.of_decoder(CONFIG, RECORD, 'grpo')


def test_mini_batches_have_weights_of_their_own(params):
  rows = rows_lib.rows(9)
  trainer = learner.of_decoder(CONFIG, RECORD, reinforce.get('grpo'), mini_batches=2,
                               old_logprobs='sampler')
  work = trainer.prepare(rows, None)
  for part, count in zip(work.parts, (5, 4)):
    np.testing.assert_allclose(sum(b.weights_BT.sum() for b in part), 1, rtol=1e-5)
    assert sum((b.segments_BT.max(1) > 0).sum() for b in part) == count


def test_masked_response_tokens_are_context_only(params):
  row = rows_lib.rows(1, longest=20)[0]
  n = len(row.response_ids)
  keep = tuple(i % 3 > 0 for i in range(n))
  row = learner.Row(**vars(row) | {'mask': keep})
  other = learner.Row(**vars(row) | {'reward': -1.0})
  trainer = learner.of_decoder(CONFIG, RECORD, reinforce.get('trr_plus_plus'))
  work = trainer.prepare([row, other], None)
  assert sum(b.mask_BT.sum() for b in work.parts[0]) == 2 * sum(keep)
  for adv_T in work.advantages:
    np.testing.assert_array_equal(adv_T != 0, keep)


def test_bfloat16_weights_move_by_less_than_their_resolution(params):
  rows = rows_lib.rows(4)
  narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  trainer = learner.of_decoder(CONFIG, learner.make_optimizer(1e-4), reinforce.get('rloo'))
  state = trainer.init(jax.tree.map(jnp.copy, narrow))
  for _ in range(2):
    state, metrics = trainer.update(state, trainer.prepare(rows, state.params))
    if metrics['skipped_updates'] == 0 and int(state.step) == 1:
      warm = trainer.compilations()
  assert trainer.compilations() == warm
  assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype('bfloat16')}
  assert {x.dtype for x in jax.tree.leaves(state.opt_state[0].nu)} == {jnp.dtype('float32')}
  wide = [(a.astype(jnp.float32), b.astype(jnp.float32)) for a, b in zip(
      jax.tree.leaves(state.params['layers']), jax.tree.leaves(narrow['layers']))]
  moved = np.concatenate([np.asarray(a - b).ravel() for a, b in wide])
  # A step of 1e-4 is below half a bfloat16 step of weights above 0.05: to nearest, none would move.
  large = np.concatenate([np.abs(np.asarray(b)).ravel() for _, b in wide]) > 0.1
  assert 0.01 < np.mean(moved[large] != 0) < 0.5


def test_every_step_rounds_at_random_anew():
  trainer = learner.Learner(None, None, optax.sgd(2.0**-12), reinforce.get('rloo'),
                            max_grad_norm=0.0)
  state = trainer.init({'w': jnp.ones(4096, jnp.bfloat16)})
  step = jax.jit(lambda state: trainer._apply(state, {'w': jnp.ones(4096)}, {})[0])
  for _ in range(50):
    state = step(state)
  moved = 1 - np.asarray(state.params['w'], np.float32)
  # Each step moves one weight of 16; always the same ones if the noise stays.
  assert (moved > 0).mean() > 0.9
  np.testing.assert_allclose(moved.mean(), 50 / 4096, rtol=0.1)


def test_at_another_temperature_the_samplers_own_numbers_are_the_old_ones():
  rows = rows_lib.rows(2)
  for temperature, name in ((1.0, 'model_logprobs'), (0.5, 'sampler_logprobs')):
    trainer = learner.of_decoder(CONFIG, RECORD, reinforce.get('rloo'), old_logprobs='sampler',
                                 temperature=temperature)
    batch, = trainer.prepare(rows, None).parts[0]
    want = sorted(x for row in rows for x in getattr(row, name))
    for got_BT in (batch.old_logprobs_BT, batch.model_logprobs_BT):
      np.testing.assert_allclose(sorted(got_BT[batch.mask_BT > 0]), want, rtol=1e-6)


def test_of_rows_without_any_advantage_one_is_computed():
  trainer = learner.of_decoder(CONFIG, RECORD, reinforce.get('rloo'), skip_zero_rows=True)
  work = trainer.prepare(rows_lib.rows(4, reward=0.5), None)
  assert work.metrics['rows_without_advantage'] == 4
  assert [(batch.segments_BT.max(1) > 0).sum() for batch in work.parts[0]] == [1]


def test_gradients_are_summed_in_the_dtype_asked_for(params):
  for dtype in ('float32', 'bfloat16'):
    trainer = learner.of_decoder(CONFIG, RECORD, reinforce.get('rloo'), accumulate_dtype=dtype)
    batch = trainer.prepare(rows_lib.rows(2), None).parts[0][0]
    gradient = functools.partial(trainer._gradient, frozen=None, size=8)
    found, _ = jax.eval_shape(gradient, params, batch=batch)
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype(dtype)}


def test_parameters_of_numpy_can_be_trained_on_a_mesh(params):
  trainer = learner.of_decoder(CONFIG, learner.make_optimizer(1e-3), reinforce.get('rloo'),
                               mesh=sharding.make_mesh())
  state = trainer.init(jax.device_get(params))
  state, _ = trainer.update(state, trainer.prepare(rows_lib.rows(8), state.params))
  assert int(state.step) == 1 and _apart(params, state.params) > 0


def test_a_kind_whose_rows_are_left_out_has_no_means(params):
  rows = rows_lib.rows(8)
  rows = [dataclasses.replace(r, role='propose' if i < 4 else 'solve', kind='deduction',
                              prompt=i, reward=-1.0 if i < 4 else float(i % 2))
          for i, r in enumerate(rows)]
  for skip in (False, True):
    _, metrics, _ = _update(params, rows, fields={}, skip_zero_rows=skip)
    assert ('propose_deduction/entropy' in metrics) == (not skip)
    assert metrics['solve_deduction/entropy'] > 0


@pytest.mark.parametrize('wrong', [None, np.nan])
def test_advantages_that_are_no_numbers_are_refused(params, wrong):
  class Own(reinforce.Algorithm):
    def advantages(self, r, roles):
      return np.full_like(r.reward_BT, wrong) if wrong is not None else None
  trainer = learner.of_decoder(CONFIG, RECORD, Own())
  with pytest.raises(ValueError, match='algorithm.name makes advantages'):
    trainer.prepare(rows_lib.rows(4), params)
