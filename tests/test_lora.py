# SPDX-License-Identifier: Apache-2.0
"""LoRA: merged = attached, only adapters move, the gradient is the chain rule's, memory, export."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from absolute_zero_jax import learner, lora, reinforce, sharding
from absolute_zero_jax.models import decoder, hf
from absolute_zero_jax.models.config import ModelConfig

CONFIG = ModelConfig('qwen2', vocab=96, embed=16, layers=2, heads=4, kv_heads=2, head_dim=4, ffn=32,
                     qkv_bias=True)
ALPHA = 6.0


@pytest.fixture(scope='module')
def params():
  return jax.tree.map(lambda x: x * 10 if x.std() > 0 else x,
                      decoder.init(CONFIG, jax.random.key(0)))


def _adapters(seed=1, **options):
  """Adapters whose b is not zero, as in the middle of training."""
  fresh = lora.init(CONFIG, jax.random.key(seed), rank=3, **options)
  return {name: {'a': p['a'], 'b': 0.1 * jax.random.normal(jax.random.key(i), p['b'].shape)}
          for i, (name, p) in enumerate(fresh.items())}


def _rows():
  rng = np.random.default_rng(0)
  rows = []
  for i in range(4):
    n = int(rng.integers(3, 30))
    rows.append(learner.Row(rng.integers(1, 96, 9).tolist(), rng.integers(1, 96, n).tolist(),
                            [0.0] * n, [0.0] * n, float(i % 2), 'deduction', 'solve', 0))
  return rows


def _trainer(tx, mesh=None):
  return learner.of_decoder(CONFIG, tx, reinforce.get('rloo', aggregation='token'), mesh=mesh,
                            max_grad_norm=0.0, materialize=lora.attaching(alpha=ALPHA))


def test_fresh_adapters_change_nothing(params):
  merged = lora.merge(params, lora.init(CONFIG, jax.random.key(0), rank=4), alpha=ALPHA)
  for new, old in zip(jax.tree.leaves(merged), jax.tree.leaves(params)):
    np.testing.assert_array_equal(new, old)


@pytest.mark.parametrize('targets', [tuple(lora.TARGETS), ('q', 'o')])
def test_attached_equals_merged_equals_the_definition(params, targets):
  adapters = _adapters(targets=targets)
  tokens = jnp.arange(24).reshape(2, 12)
  merged = lora.merge(params, adapters, alpha=ALPHA)
  want = decoder.logits(CONFIG, merged, tokens)
  got = decoder.logits(CONFIG, lora.attach(params, adapters, alpha=ALPHA), tokens)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
  assert float(jnp.abs(want - decoder.logits(CONFIG, params, tokens)).max()) > 0.1
  o, pair = params['layers']['o'][1], jax.tree.map(lambda x: x[1], adapters['o'])
  by_hand = np.asarray(o) + ALPHA / 3 * np.einsum('nhr,rd->nhd', pair['a'], pair['b'])
  np.testing.assert_allclose(merged['layers']['o'][1], by_hand, rtol=1e-5, atol=1e-6)


def test_the_update_moves_only_adapters_by_the_gradient_of_the_merged_model(params):
  rows, adapters = _rows(), _adapters()
  record = optax.trace(decay=0.0)
  trainer = _trainer(record)
  state = trainer.init(jax.tree.map(jnp.copy, adapters))
  before = jax.device_get(params)
  state, metrics = trainer.update(state, trainer.prepare(rows, state.params, frozen=params),
                                  frozen=params)
  full = learner.of_decoder(CONFIG, record, reinforce.get('rloo', aggregation='token'),
                            max_grad_norm=0.0)
  merged = lora.merge(params, adapters, alpha=ALPHA)
  dense, same = full.update(full.init(merged), full.prepare(rows, merged))
  np.testing.assert_allclose(metrics['loss'], same['loss'], rtol=1e-5, atol=1e-7)
  np.testing.assert_allclose(metrics['entropy'], same['entropy'], rtol=1e-5)
  d_w = dense.opt_state.trace['layers']['down']                     # [L, F, D]
  pair, got = adapters['down'], state.opt_state.trace['down']
  want_a = ALPHA / 3 * np.einsum('lfd,lrd->lfr', d_w, pair['b'])
  want_b = ALPHA / 3 * np.einsum('lfd,lfr->lrd', d_w, pair['a'])
  for g, w in ((got['a'], want_a), (got['b'], want_b)):
    np.testing.assert_allclose(g, w, atol=1e-5 * np.abs(w).max() + 1e-9, rtol=1e-4)
  for new, old in zip(jax.tree.leaves(params), jax.tree.leaves(before)):
    np.testing.assert_array_equal(new, old)


def test_training_adapters_lowers_the_loss_on_a_mesh_too(params):
  mesh = sharding.make_mesh(2, 2, 2)
  place = lambda tree, spec: sharding.place(
      jax.device_get(tree), sharding.shardings(spec, mesh))
  frozen = place(params, decoder.param_specs(CONFIG))
  adapters = place(lora.init(CONFIG, jax.random.key(0), rank=3), lora.specs(CONFIG, rank=3))
  assert adapters['gate']['b'].sharding.spec[-1] == 'tensor'
  trainer = _trainer(learner.make_optimizer(3e-3), mesh)
  state, rows = trainer.init(adapters), _rows()

  def solved(state):
    """Mean log-prob of the rewarded responses."""
    work = trainer.prepare(rows, state.params, frozen=frozen)
    out = trainer.logprobs(state.params, work.parts[0], trained=True, frozen=frozen)
    return sum(float((x * b.advantages_BT.reshape(x.shape[0], -1)[
        np.arange(x.shape[0])[:, None], b.index_CM] * (b.index_CM >= 0)).sum())
               for x, b in zip(out, work.parts[0]))

  start = solved(state)
  for _ in range(5):
    state, metrics = trainer.update(
        state, trainer.prepare(rows, state.params, frozen=frozen), frozen=frozen)
  assert solved(state) > start + 1 and metrics['skipped_updates'] == 0
  assert state.opt_state[0].mu['q']['a'].shape == state.params['q']['a'].shape


def test_full_matrices_and_their_gradients_exist_for_one_layer_only():
  config = ModelConfig('llama', vocab=32, embed=64, layers=24, heads=4, kv_heads=2, head_dim=16,
                       ffn=256, tied=True)
  abstract = jax.eval_shape(lambda: decoder.init(config, jax.random.key(0)))
  adapters = jax.eval_shape(lambda: lora.init(config, jax.random.key(0), rank=2))
  tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)

  def temp_bytes(trainable, of):
    def loss(trainable, frozen, tokens):
      ones = jnp.ones_like(tokens)
      return decoder.hidden(config, of(trainable, frozen), tokens, ones, ones, remat='full').sum()
    program = jax.jit(jax.grad(loss)).lower(trainable, abstract, tokens).compile()
    stats = program.memory_analysis()
    return stats.temp_size_in_bytes + stats.output_size_in_bytes

  layers = sum(4 * np.prod(x.shape) for x in jax.tree.leaves(abstract['layers']))
  thin = temp_bytes(adapters, lora.attaching(alpha=1.0))
  thick = temp_bytes(adapters, lambda a, p: lora.merge(p, a, alpha=1.0))
  assert thick > 2 * layers > 4 * thin


def test_the_merged_export_is_read_back(params, tmp_path):
  merged = lora.merge(params, _adapters(), alpha=ALPHA)
  hf.save(CONFIG, merged, tmp_path / 'model')
  _, read = hf.load(tmp_path / 'model')
  for new, old in zip(jax.tree.leaves(read), jax.tree.leaves(merged)):
    np.testing.assert_array_equal(new, old)


@pytest.mark.parametrize('options, match', [
    (dict(rank=0), 'lora.rank=0'), (dict(rank=2, targets=('q', 'embed')), 'lora.targets'),
    (dict(rank=2, targets=()), 'one or more'), (dict(rank=2, targets=('q', 'q')), 'each once')])
def test_impossible_adapters_are_refused(options, match):
  with pytest.raises(ValueError, match=match):
    lora.specs(CONFIG, **options)
