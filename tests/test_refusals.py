# SPDX-License-Identifier: Apache-2.0
"""Called directly, without a config, the sampler and the learner refuse what cannot work."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
import pytest

from absolute_zero_jax import learner, optimizer, packing, reinforce, sampler, sampling
from absolute_zero_jax.models import decoder
from absolute_zero_jax.models.config import ModelConfig

CONFIG = ModelConfig('llama', vocab=61, embed=16, layers=1, heads=2, kv_heads=2, head_dim=8, ffn=16,
                     tied=True)
KEY = jax.random.key(0)
ROW = packing.Row((1, 2), (3, 4), (0., 0.), (0., 0.), 1., 'deduction', 'solve', 'a')


@functools.cache
def _params():
  return decoder.init(CONFIG, jax.random.key(1))


def _sampler(**options):
  return sampler.Sampler(CONFIG, **dict(
      pad_id=0, stop_ids=[], slots=2, chunk=4, cache_block=32, max_prompt_tokens=16,
      max_new_tokens=8) | options)


def _learner(**options):
  return learner.of_decoder(CONFIG, optax.sgd(1.0), reinforce.get('trr_plus_plus'), **options)


@pytest.mark.parametrize('field, value', [
    ('max_grad_norm', -1.0), ('temperature', 0.0), ('temperature', -1.0), ('epochs', 0),
    ('mini_batches', 0), ('micro_batch_tokens', 0)])
def test_a_learner_names_a_number_that_cannot_work(field, value):
  with pytest.raises(ValueError, match=f'{field}=.*allowed'):
    _learner(**{field: value})


def test_shared_prompts_and_splash_attention_do_not_go_together():
  with pytest.raises(ValueError, match="attention='splash' cannot let responses share"):
    _learner(attention='splash', share_prompts=True)


@pytest.mark.parametrize('field, value', [
    ('learning_rate', -1e-3), ('learning_rate', float('nan')), ('warmup_steps', -5), ('b1', 1.0),
    ('b1', 1.5), ('b2', 1.0), ('eps', 0.0), ('weight_decay', -1.0), ('moment_dtype', 'int8')])
def test_an_optimizer_names_a_number_that_cannot_work(field, value):
  with pytest.raises(ValueError, match=f'{field}=.*allowed'):
    optimizer.make_optimizer(**{'learning_rate': 1e-3, field: value})


@pytest.mark.parametrize('changes, words', [
    ({'response_ids': (3, 61)}, 'token id 61; the vocabulary is 0 to 60'),
    ({'prompt_ids': (200, 1)}, 'token id 200'),
    ({'mask': (False, False)}, 'trains no token'),
    ({'reward': (1., 0.), 'mask': (False, True)}, 'reward on a token that its mask leaves out')])
def test_a_row_that_would_be_taken_for_another_is_refused(changes, words):
  rows = [ROW, dataclasses.replace(ROW, **changes)]
  with pytest.raises(ValueError, match=f'row 1 .*{words}'):
    _learner().prepare(rows, _params())


@pytest.mark.parametrize('changes, words', [
    ({'max_new_tokens': 2.5}, 'max_new_tokens=2.5 must be an integer'),
    ({'samples': 2.0}, 'samples=2.0 must be an integer'),
    ({'stream': 2**31}, 'stream=2147483648 must be an integer of 32 bits')])
def test_a_request_is_refused_before_any_work(changes, words):
  with pytest.raises(ValueError, match=f'request 0: {words}'):
    _sampler().generate(_params(), [sampler.Request((1, 2), **changes)], KEY)


@pytest.mark.parametrize('vocab, words', [
    (-1, '0 .all. to 61'), (62, '0 .all. to 61'), (1, 'leaves no token to draw')])
def test_a_vocabulary_must_leave_tokens_to_draw(vocab, words):
  with pytest.raises(ValueError, match=words):
    _sampler(vocab=vocab)


def test_weights_that_are_no_numbers_are_no_answers():
  broken = jax.tree.map(lambda x: x * jnp.nan, _params())
  with pytest.raises(ValueError, match='no finite numbers'):
    _sampler().generate(broken, [sampler.Request((1, 2))], KEY)


def test_one_sampler_takes_weights_of_two_dtypes():
  wide = _params()
  narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), wide)
  made = _sampler()
  both = [made.generate(p, [sampler.Request((1, 2))], KEY)[0][0] for p in (wide, narrow, wide)]
  assert both[0] == both[2] and len(both[1].ids) == 8


def test_a_share_of_the_probability_too_small_for_a_float_keeps_the_best_token():
  logits_BV = jnp.array([[0., 1., 3., 2.]] * 3)
  allowed_V = jnp.array([False, True, True, True])
  drawn = sampling.draw(logits_BV, allowed_V, jax.random.uniform(KEY, (3, 2)),
                        sampling.options(top_p=1e-40))
  assert drawn.tokens_B.tolist() == [2, 2, 2]
  with pytest.raises(ValueError, match='top_k=inf'):
    sampling.options(top_k=float('inf'))
