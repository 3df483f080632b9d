# SPDX-License-Identifier: Apache-2.0
"""The sampler against the decoder and transformers; and batching that no result shows."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_models

from absolute_zero_jax import batching, decoding, sampler, sharding
from absolute_zero_jax.models import decoder, hf
from absolute_zero_jax.models.config import ModelConfig

CONFIG = ModelConfig('qwen2', vocab=61, embed=24, layers=2, heads=4, kv_heads=2, head_dim=8, ffn=40,
                     rope_theta=1e4, qkv_bias=True, tied=True)
KEY = jax.random.key(7)


@functools.cache
def _params(seed=0):
  r = np.random.default_rng(seed)
  return jax.tree.map(
      lambda s: jnp.asarray(r.normal(1.0 if s.axes[-1] == 'norm' else 0.0, 0.3, s.shape),
                            jnp.float32),
      decoder.param_specs(CONFIG), is_leaf=lambda s: hasattr(s, 'axes'))


def _sampler(**changes):
  options = dict(pad_id=0, stop_ids=[], slots=4, chunk=4, cache_block=32, max_prompt_tokens=96,
                 max_new_tokens=24)
  return sampler.Sampler(CONFIG, **options | changes)


@functools.cache
def _shared_sampler():
  return _sampler()


def _prompt(length, seed):
  return tuple(np.random.default_rng(seed).integers(1, 61, length).tolist())


def _ids(results):
  return [[s.ids for s in samples] for samples in results]


@functools.cache
def _logprobs(prompt, ids, dtype='float32'):
  x = jnp.asarray([(prompt + ids + (0,) * 128)[:128]])         # one compiled shape
  logits = jax.jit(decoder.logits, static_argnums=0, static_argnames='dtype')
  logits_TV = logits(CONFIG, _params(), x, dtype=dtype)[0]
  at = len(prompt) - 1
  return np.asarray(jax.nn.log_softmax(logits_TV[at:at + len(ids)], -1))


@pytest.mark.parametrize('platform, options', [
    ('gpu', {}), ('gpu', {'max_programs': 2}), ('tpu', {'min_slots': 4})])
def test_the_way_of_accelerators_draws_the_same(monkeypatch, platform, options):
  """Padded prefills, rows inserted at once, no branches: with shared prefixes, refills, growth."""
  common = _prompt(40, 1)
  requests = [sampler.Request(common + _prompt(n, n), samples=2, max_new_tokens=3 + n % 21)
              for n in (1, 5, 9, 30, 50)]
  requests += [sampler.Request(_prompt(n, n), max_new_tokens=24) for n in (1, 2, 33, 70)]
  want = _shared_sampler().generate(_params(), requests, KEY)
  monkeypatch.setattr(batching, 'platform', lambda weights: platform)
  ours = _sampler(**options)
  got = ours.generate(_params(), requests, KEY)
  assert _ids(got) == _ids(want)
  for a, b in zip(sum(got, []), sum(want, [])):
    np.testing.assert_allclose(a.model_logprobs, b.model_logprobs, atol=2e-5)
  widths = {width for width, _ in ours.shapes()['decode']}
  assert (1 in widths or 2 in widths) == (not options)


def test_greedy_tokens_equal_those_of_transformers():
  import torch
  model = reference_models.make('qwen3_tied')
  config = ModelConfig.from_hf(model.config.to_dict())
  torch.set_num_threads(1)                       # its threads spin while JAX computes
  params = hf.assemble(config, {k: v.numpy() for k, v in model.state_dict().items()}.__getitem__)
  ours = sampler.Sampler(config, pad_id=0, stop_ids=[], slots=4, chunk=16, cache_block=96,
                         max_prompt_tokens=64, max_new_tokens=48)
  prompts = [_prompt(n, n) for n in (1, 5, 33)]
  out = ours.generate(params, [sampler.Request(p) for p in prompts], KEY, temperature=0)
  for prompt, samples in zip(prompts, out):
    ids = torch.tensor([prompt])
    with torch.no_grad():
      want = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                            max_new_tokens=48, min_new_tokens=48, eos_token_id=None,
                            pad_token_id=0, bad_words_ids=[[0]])[0, len(prompt):].tolist()
    got = list(samples[0].ids)
    if got != want:
      at = next(i for i, (a, b) in enumerate(zip(got, want)) if a != b)
      text = torch.tensor([list(prompt) + want[:at]])
      best = np.sort(reference_models.logits(model, text.numpy())[0, -1])[-2:]
      assert best[1] - best[0] < 1e-4, (at, got[at], want[at], best)


@pytest.mark.parametrize('options', [{}, {'temperature': 0.7, 'top_k': 9, 'top_p': 0.9}, {
    'temperature': 0.0}], ids=str)
def test_logprobs_are_those_of_the_decoder(options):
  requests = [sampler.Request(_prompt(n, n), samples=k) for n, k in ((1, 2), (40, 1), (70, 3))]
  out = _shared_sampler().generate(_params(), requests, KEY, **options)
  for request, samples in zip(requests, out):
    for s in samples:
      assert len(s.ids) == len(s.model_logprobs) == len(s.sampler_logprobs) == 24
      logp_TV = _logprobs(request.prompt_ids, s.ids)
      np.testing.assert_allclose(s.model_logprobs, logp_TV[range(24), s.ids], atol=1e-5)
      logp_TV = np.where(np.arange(61)[None] == 0, -np.inf, logp_TV)      # the pad id
      if options.get('temperature') == 0:
        assert list(s.ids) == logp_TV.argmax(-1).tolist() and not any(s.sampler_logprobs)
      elif not options:
        want = logp_TV - np.log(np.exp(logp_TV).sum(-1, keepdims=True))
        np.testing.assert_allclose(s.sampler_logprobs, want[range(24), s.ids], atol=1e-5)
      else:
        assert all(a > b for a, b in zip(s.sampler_logprobs, s.model_logprobs))


def test_in_bfloat16_they_are_as_near_those_of_float32_as_the_decoder_is():
  requests = [sampler.Request(_prompt(n, n), samples=2) for n in (1, 40, 70)]
  out = _sampler(dtype='bfloat16').generate(_params(), requests, KEY)
  off, usual = [], []
  for request, samples in zip(requests, out):
    for s in samples:
      want, narrow = (_logprobs(request.prompt_ids, s.ids, dtype)[range(24), s.ids]
                      for dtype in ('float32', 'bfloat16'))
      off.append(np.abs(s.model_logprobs - want))
      usual.append(np.abs(narrow - want))
  assert 0 < np.mean(off) < 1.5 * np.mean(usual) < 0.3


def test_neighbours_slots_and_order_do_not_change_a_row():
  """Alone, in a full batch, behind a queue that refills, in reverse: the same tokens."""
  requests = [sampler.Request(_prompt(n, n), samples=k, max_new_tokens=m, stream=n)
              for n, k, m in ((3, 2, 24), (50, 1, 5), (9, 3, 11), (17, 1, 24), (33, 4, 2))]
  together = _shared_sampler().generate(_params(), requests, KEY)
  backwards = _shared_sampler().generate(_params(), requests[::-1], KEY)[::-1]
  wide = _sampler(slots=16, chunk=24, cache_block=96).generate(_params(), requests, KEY)
  alone = [_shared_sampler().generate(_params(), [r], KEY)[0] for r in requests]
  assert _ids(together) == _ids(backwards) == _ids(wide) == _ids(alone)
  for a, b in zip(together, alone):
    for x, y in zip(a, b):
      np.testing.assert_allclose(x.model_logprobs, y.model_logprobs, atol=1e-5)
  assert [[len(i) for i in ids] for ids in _ids(together)] == (
      [[24] * 2, [5], [11] * 3, [24], [2] * 4])


def test_requests_may_follow_while_others_decode():
  """In three lots, the last one when nothing runs any more: the tokens of one call with all."""
  requests = [sampler.Request(_prompt(n, n), samples=k, max_new_tokens=m)
              for n, k, m in ((3, 2, 24), (50, 1, 5), (9, 3, 11), (17, 1, 24), (33, 4, 2),
                              (50, 2, 20))]
  whole = _shared_sampler().generate(_params(), requests, KEY)
  lots = [(), requests[1:3], None, requests[3:5], requests[5:], ()]
  running, finished = [], []

  def more():
    if not lots:
      return None
    if lots[0] is None and len(finished) < 6:        # the third lot waits for an empty batch
      return ()
    return lots.pop(0) or ()
  bit_by_bit = _shared_sampler().generate(
      _params(), requests[:1], KEY, more=more, on_finish=finished.append,
      progress=lambda tokens, done, rows: running.append((done, rows)))
  assert _ids(bit_by_bit) == _ids(whole)
  assert running[-1] == (13, 13) and {rows for _, rows in running} >= {2, 6, 13}
  for a, b in zip(sum(bit_by_bit, []), sum(whole, [])):
    np.testing.assert_allclose(a.model_logprobs, b.model_logprobs, atol=1e-5)


def test_noise_differs_between_samples_streams_and_calls_and_repeats_with_the_key():
  twice = [sampler.Request(_prompt(8, 1), samples=3), sampler.Request(_prompt(8, 1))]
  first = _ids(_shared_sampler().generate(_params(), twice, KEY))
  again = _ids(_shared_sampler().generate(_params(), twice, KEY))
  other = _ids(_shared_sampler().generate(_params(), twice, jax.random.fold_in(KEY, 1)))
  texts = [ids for results in (first, other) for samples in results for ids in samples]
  assert first == again and len(set(texts)) == 8


def test_a_stop_token_ends_a_row_and_stays_in_it():
  requests = [sampler.Request(_prompt(6, i), samples=4) for i in range(3)]
  free = _ids(_shared_sampler().generate(_params(), requests, KEY))
  stops = {5, 23, 42, 60}
  out = _sampler(stop_ids=stops).generate(_params(), requests, KEY)
  ended = 0
  for samples, ids in zip(out, free):
    for s, full in zip(samples, ids):
      at = next((i for i, token in enumerate(full) if token in stops), None)
      want = full if at is None else full[:at + 1]
      assert s.ids == want and len(s.model_logprobs) == len(want)
      assert s.finish == ('length' if at is None else 'stop')
      ended += at is not None
  assert ended >= 4


def test_what_a_row_that_rests_would_draw_ends_nothing():
  stops = set(range(1, 31))
  requests = [sampler.Request(_prompt(6, i), samples=4, max_new_tokens=m)
              for i, m in enumerate((1, 2, 24))]
  for s in sum(_sampler(slots=16, stop_ids=stops).generate(_params(), requests, KEY), []):
    assert s.finish == ('stop' if s.ids[-1] in stops else 'length')


def test_stop_fn_cuts_a_row_and_others_go_on():
  seen = []

  def stop_fn(request, ids):
    seen.append((request, ids))
    return 3 if request == 1 and len(ids) >= 3 else None

  requests = [sampler.Request(_prompt(6, i)) for i in range(3)]
  free = _ids(_shared_sampler().generate(_params(), requests, KEY))
  out = _shared_sampler().generate(_params(), requests, KEY, stop_fn=stop_fn)
  assert _ids(out) == [free[0], [free[1][0][:3]], free[2]]
  assert [s[0].finish for s in out] == ['length', 'stop', 'length']
  assert len(out[1][0].sampler_logprobs) == len(out[1][0].model_logprobs) == 3
  assert [len(ids) for request, ids in seen if request == 0] == [4, 8, 12, 16, 20, 24]
  assert [len(ids) for request, ids in seen if request == 1] == [4]
  nothing, = _shared_sampler().generate(_params(), requests[:1], KEY, stop_fn=lambda *seen: 0)
  assert (nothing[0].ids, nothing[0].model_logprobs, nothing[0].finish) == ((), (), 'stop')
  with pytest.raises(ValueError, match='stop_fn keeps 5 tokens of a response of 4'):
    _shared_sampler().generate(_params(), requests[:1], KEY, stop_fn=lambda *seen: 5)


def test_rows_leave_as_they_finish():
  left, steps = [], []
  requests = [sampler.Request(_prompt(4, i), max_new_tokens=m) for i, m in enumerate((24, 2, 9))]
  out = _shared_sampler().generate(_params(), requests, KEY, on_finish=left.append,
                                   progress=lambda *counts: steps.append(counts))
  assert [s.request for s in left] == [1, 2, 0] and left[0] is out[1][0]
  assert steps[0] == (10, 1, 3) and steps[-1] == (35, 3, 3)


def test_nothing_is_compiled_after_warm_up():
  ours = _sampler()
  requests = [sampler.Request(_prompt(n, n), samples=2) for n in (5, 20, 30)]
  ours.generate(_params(), requests, KEY)
  warm = ours.compilations()
  for temperature, extra in ((0.0, {}), (0.5, {'top_k': 3}), (2.0, {'top_p': 0.4, 'min_p': 0.2})):
    changed = [sampler.Request(_prompt(n + 1, n), samples=2) for n in (3, 24, 29)]
    ours.generate(_params(), changed, jax.random.key(9), temperature=temperature, **extra)
  ours.generate(_params(1), requests, KEY)                      # another update of the weights
  assert ours.compilations() == warm == ours.stats()['programs']
  assert ours.stats()['tokens'] == 5 * 6 * 24


def test_few_shapes_serve_all_lengths_once_the_cap_is_reached():
  ours = _sampler(max_programs=1)
  lengths = ((90, 24), (5, 3), (9, 9))
  requests = [sampler.Request(_prompt(n, n), max_new_tokens=m) for n, m in lengths]
  want = _ids(_sampler().generate(_params(), requests, KEY))
  assert _ids(ours.generate(_params(), requests[:1], KEY)) == want[:1]
  assert _ids(ours.generate(_params(), requests, KEY)) == want
  small = [sampler.Request(_prompt(9, 9), max_new_tokens=9, stream=2)]
  assert _ids(ours.generate(_params(), small, KEY)) == want[2:]
  assert len(ours.shapes()['decode']) <= 2     # uncapped: 4


def test_the_next_process_takes_the_shapes_that_this_one_would():
  ours, other = _sampler(max_programs=1), _sampler(max_programs=1)
  ours.generate(_params(), [sampler.Request(_prompt(90, 90), max_new_tokens=24)], KEY)
  other.assume(json.loads(json.dumps(ours.shapes())))
  small = [sampler.Request(_prompt(9, 9), max_new_tokens=9)]
  want, got = (s.generate(_params(), small, KEY) for s in (ours, other))
  assert got == want                           # log-probs too, to the bit
  assert other.shapes() == ours.shapes()


def test_what_was_compiled_for_scoring_leaves_play_as_it_is():
  ours, other = _sampler(max_programs=1), _sampler(max_programs=1)
  long, small = [[sampler.Request(_prompt(n, n), max_new_tokens=m)] for n, m in ((90, 24), (9, 9))]
  before = ours.shapes()
  ours.generate(_params(), long, KEY)
  ours.assume(before)                          # as `Run.score` does
  for requests in (long, small):
    got, want = (s.generate(_params(), requests, KEY) for s in (ours, other))
    assert got == want                         # log-probs too, to the bit
  assert ours.shapes() == other.shapes()       # entered by compiling alone: those of `small` too


def test_prompts_and_prefixes_are_prefilled_once():
  begin = _prompt(60, 0)
  requests = [sampler.Request(begin + _prompt(n, n), samples=8) for n in (5, 6, 7)]
  requests += [sampler.Request(begin + (1,)), sampler.Request(_prompt(3, 3))]
  ours = _sampler(slots=32)
  out = ours.generate(_params(), requests, KEY, temperature=0.0)
  assert ours.stats()['prefill_tokens'] == 60 + 4 + 5 + 6 + 2
  assert ours.stats()['prompt_tokens'] == 8 * 198 + 64
  for request, samples in zip(requests, out):
    logp_TV = _logprobs(request.prompt_ids, samples[0].ids)
    assert len({s.ids for s in samples}) == 1
    np.testing.assert_allclose(samples[0].model_logprobs, logp_TV[range(24), samples[0].ids],
                               atol=1e-5)


def test_weights_are_prepared_once_per_update_and_released():
  ours, requests = _sampler(), [sampler.Request(_prompt(5, 5))]
  ours.generate(_params(), requests, KEY)
  made = ours._prepared[2]
  ours.generate(_params(), requests, KEY)
  assert ours._prepared[2] is made
  changed = jax.tree.map(lambda x: x + 0.1, _params())
  a, b = (_ids(ours.generate(p, requests, KEY)) for p in (changed, _params()))
  assert a != b and ours._prepared[2] is not made
  ours.release()
  assert ours._prepared is None
  host = jax.tree.map(np.array, _params())
  assert _ids(ours.generate(host, requests, KEY)) == b
  host['embed'][:] *= -1                                         # changed in place
  assert _ids(ours.generate(host, requests, KEY)) != b


def test_nothing_to_do_is_done():
  assert _shared_sampler().generate(_params(), [], KEY) == []


@pytest.mark.parametrize('request_, message', [
    (sampler.Request(()), 'prompt of 0 tokens; allowed are 1 to max_prompt_tokens=96'),
    (sampler.Request((1,) * 97), 'prompt of 97 tokens'),
    (sampler.Request((1, 61)), 'token ids from 1 to 61'),
    (sampler.Request((1,), max_new_tokens=25), 'max_new_tokens=25.*max_new_tokens=24'),
    (sampler.Request((1,), samples=0), 'samples=0')])
def test_impossible_requests_are_refused_before_any_work(request_, message):
  done = []
  with pytest.raises(ValueError, match=message):
    _shared_sampler().generate(_params(), [sampler.Request((1,)), request_], KEY,
                               on_finish=done.append)
  assert not done


@pytest.mark.parametrize('changes, message', [
    ({'slots': 0}, 'slots=0'), ({'pad_id': 61}, 'pad_id=61'),
    ({'stop_ids': [3, -1]}, 'stop_ids=-1')])
def test_impossible_samplers_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    _sampler(**changes)


def test_only_ids_with_a_text_of_their_own_may_be_drawn():
  barred = lambda **options: np.flatnonzero(~_sampler(**options)._allowed_V).tolist()
  assert barred(pad_id=3) == [3] and barred(pad_id=3, stop_ids=[3]) == []
  assert barred(pad_id=3, vocab=59) == [3, 59, 60]


def test_keys_of_the_older_kind_draw_the_same_and_numbers_are_no_keys():
  requests = [sampler.Request(_prompt(5, 1))]
  draw = lambda key: _ids(_shared_sampler().generate(_params(), requests, key))
  assert draw(jax.random.PRNGKey(3)) == draw(jax.random.key(3))
  with pytest.raises(ValueError, match='key=3 is no key; make one'):
    draw(3)


def test_shapes_of_other_meshes_are_not_reused():
  mesh = sharding.make_mesh(data=3, devices=jax.devices()[:3])
  ours = sampler.Sampler(CONFIG, mesh, pad_id=0, stop_ids=[], slots=8, max_programs=1)
  ours.assume({'decode': [(16, 4096)], 'prefill': []})
  assert ours._programs.shape(3, 64) == (3, 64)
  ours.assume({'decode': [(16, 4096), (12, 4096)], 'prefill': []})
  assert ours._programs.shape(3, 64) == (12, 4096)


def test_a_batch_that_cannot_narrow_is_not_copied(monkeypatch):
  calls = []
  resize = batching.Batch._resize
  monkeypatch.setattr(batching.Batch, '_resize', lambda self, width, size: (
      calls.append(((len(self.slots), self.size), (width, size))), resize(self, width, size)))
  requests = [sampler.Request(_prompt(5, n), max_new_tokens=3 * n) for n in range(1, 9)]
  ours = _sampler(slots=8, max_programs=1)
  ours.generate(_params(), requests, KEY)
  assert not [call for call in calls if call[0] == call[1]]


def test_norms_and_biases_are_read_as_the_decoder_reads_them():
  laid = decoding.weights(CONFIG, _params(), jnp.bfloat16, None)
  assert laid.final_norm_D.dtype == laid.layers[0]['qkv_bias'].dtype == jnp.float32
  assert laid.embed_VD.dtype == laid.layers[0]['o'].dtype == jnp.bfloat16
