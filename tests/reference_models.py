# SPDX-License-Identifier: Apache-2.0
"""Small random transformers models of every family, the reference for weights and logits.

Norm gains and biases are moved off 1 and 0: a decoder that ignores them must fail.
"""

import pytest

_SIZES = dict(vocab_size=97, hidden_size=48, num_hidden_layers=3, num_attention_heads=6,
              num_key_value_heads=2, intermediate_size=80, max_position_embeddings=128)
_LLAMA3 = dict(rope_type='llama3', factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
               original_max_position_embeddings=32)
MODELS = {                               # name -> (family, what differs from _SIZES)
    'llama2': ('Llama', dict(num_key_value_heads=6, rms_norm_eps=1e-5, rope_theta=10000.0)),
    'llama3_scaled': ('Llama', dict(head_dim=16, rope_theta=5e5, rope_scaling=_LLAMA3)),
    'llama_linear': ('Llama', dict(rope_theta=1e4,
                                   rope_scaling=dict(rope_type='linear', factor=4.0))),
    'smollm2': ('Llama', dict(tie_word_embeddings=True, rope_theta=1e5, num_key_value_heads=3,
                              num_attention_heads=9, hidden_size=72)),
    'qwen2': ('Qwen2', dict(tie_word_embeddings=False, rope_theta=1e6)),
    'qwen2_tied': ('Qwen2', dict(tie_word_embeddings=True, rope_theta=1e6)),
    'qwen3': ('Qwen3', dict(tie_word_embeddings=False, head_dim=16, rope_theta=1e6)),
    'qwen3_tied': ('Qwen3', dict(tie_word_embeddings=True, head_dim=16, rope_theta=1e6)),
}


def make(name):
  """A float32 transformers model in eval mode; skips the test where torch is absent."""
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  family, changes = MODELS[name]
  torch.manual_seed(sorted(MODELS).index(name))
  config = getattr(transformers, f'{family}Config')(**_SIZES | changes)
  model = getattr(transformers, f'{family}ForCausalLM')(config).eval().float()
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(0.1 * torch.randn_like(parameter))
  return model


def logits(model, tokens_BT):
  """The reference's logits as a NumPy array [B, T, V]."""
  import torch
  with torch.no_grad():
    return model(torch.tensor(tokens_BT)).logits.float().numpy()
