# SPDX-License-Identifier: Apache-2.0
"""Logits, greedy continuations and weights against transformers in float32."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import reference_models as reference

from absolute_zero_jax.models import decoder, gguf, hf, loading

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
torch.set_num_threads(1)                   # its threads spin while JAX computes
TOLERANCE = 1e-4                           # of the largest |logit|


@functools.cache
def forward(config):
  return jax.jit(functools.partial(decoder.logits, config))


def worst(config, params, model, tokens_BT):
  want_BTV = reference.logits(model, tokens_BT)
  got_BTV = np.asarray(forward(config)(params, tokens_BT))
  return np.abs(got_BTV - want_BTV).max() / np.abs(want_BTV).max()


def assert_same_continuation(config, params, model, prompt, steps=64):
  """Ours equals the reference's, or first leaves it where its two best logits are < 1e-4 apart.

  Ours is read off one pass over the reference's text: as long as both agree, our own greedy text
  is that text, and beyond the first difference there is nothing to compare.
  """
  ids = torch.tensor([prompt])
  text = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                        max_new_tokens=steps, min_new_tokens=steps, eos_token_id=None,
                        pad_token_id=0).numpy()
  assert text.shape == (1, len(prompt) + steps)
  ours = np.asarray(forward(config)(params, text)).argmax(-1)[0]
  best_TV = np.sort(reference.logits(model, text)[0], axis=-1)[:, -2:]
  for at in range(len(prompt), text.shape[1]):
    if ours[at - 1] != text[0, at]:
      low, high = best_TV[at - 1]
      assert high - low < 1e-4, f'{ours[at - 1]} for {text[0, at]} at {at}, gap {high - low}'
      return


@pytest.fixture(scope='module', params=sorted(reference.MODELS))
def case(request, tmp_path_factory):
  """(transformers model, directory it was saved in, our config, our params)."""
  model = reference.make(request.param)
  folder = tmp_path_factory.mktemp(request.param)
  model.save_pretrained(folder)
  return model, folder, *hf.load(folder)


def test_logits_agree(case):
  model, _, config, params = case
  tokens_BT = np.random.default_rng(0).integers(0, config.vocab, (2, 80))
  assert worst(config, params, model, tokens_BT) <= TOLERANCE    # measured: 6e-7 to 1e-6


def test_greedy_continuation_agrees(case):
  model, _, config, params = case
  assert_same_continuation(config, params, model, [5, 17, 3, 60, 9, 33])


def test_export_is_loaded_by_transformers_bit_for_bit(case, tmp_path):
  model, _, config, params = case
  hf.save(config, params, tmp_path / 'out')
  again, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'out',
                                                                  output_loading_info=True)
  assert not info['missing_keys'] and not info['unexpected_keys']
  assert type(again) is type(model)
  want = model.state_dict()
  have = again.state_dict()
  assert set(have) == set(want)
  assert all(torch.equal(have[name], want[name]) for name in want)
  tokens = torch.tensor([[1, 2, 3, 40, 50]])
  assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_the_measure_notices_a_change_of_any_parameter(case):
  model, _, config, params = case
  tokens_BT = np.random.default_rng(0).integers(0, config.vocab, (2, 80))
  for tree, name in [(params, n) for n in params if n != 'layers'] + [
      (params['layers'], n) for n in params['layers']]:
    kept = tree[name]                      # not a mere factor: q and k norms would cancel it
    tree[name] = np.asarray(kept) * np.linspace(0.8, 1.2, kept.shape[-1], dtype=np.float32)
    error = worst(config, params, model, tokens_BT)
    tree[name] = kept
    assert error > 5 * TOLERANCE, name     # smallest measured: 3e-3, k_bias


def test_the_measure_notices_wrong_rope_numbers(tmp_path):
  model = reference.make('llama3_scaled')
  model.save_pretrained(tmp_path)
  config, params = hf.load(tmp_path)
  tokens_BT = np.random.default_rng(0).integers(0, config.vocab, (2, 80))
  for changed in (dataclasses.replace(config, rope_theta=config.rope_theta * 1.1),
                  dataclasses.replace(config, rope_scaling=None)):
    assert worst(changed, params, model, tokens_BT) > 5 * TOLERANCE


@pytest.mark.model
def test_smollm2_gguf_agrees_with_transformers(smollm2):
  """Weights equal bit for bit; logits within 1e-4; 64 greedy tokens agree."""
  model = transformers.AutoModelForCausalLM.from_pretrained(
      smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32).eval()
  config, params = gguf.load(smollm2)
  have = dict(zip((n for s in hf.slots(config) for n in s.names()),
                  hf.tensors(config, params)))
  for name, want in model.state_dict().items():
    if name != 'lm_head.weight':           # tied
      np.testing.assert_array_equal(have.pop(name), want.numpy(), err_msg=name)
  assert not have
  rng = np.random.default_rng(1)
  assert worst(config, params, model, rng.integers(0, config.vocab, (2, 96))) <= TOLERANCE
  # 'def fibonacci(n):\n    """Return the n-th Fibonacci number."""\n'
  prompt = [1604, 3987, 46477, 24, 94, 727, 472, 1620, 14362, 260, 304, 29, 373, 24681, 46477,
            1230, 7996, 198]
  assert_same_continuation(config, params, model, prompt)


@pytest.mark.model
def test_smollm2_export_gives_transformers_the_same_logits(smollm2, tmp_path):
  config, params, path = loading.load(smollm2)
  hf.save(config, params, tmp_path / 'out', generation=loading.generation_config(path))
  again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'out').eval()
  assert again.generation_config.eos_token_id == [2]
  tokens_BT = np.random.default_rng(2).integers(0, config.vocab, (1, 64))
  assert worst(config, params, again, tokens_BT) <= TOLERANCE
  for ours, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(hf.load(tmp_path / 'out')[1])):
    np.testing.assert_array_equal(ours, theirs)
