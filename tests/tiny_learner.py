# SPDX-License-Identifier: Apache-2.0
"""A tiny model whose gradients are all large, one update of it, and gradients compared."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from absolute_zero_jax import learner, reinforce, sharding
from absolute_zero_jax.models import decoder
from absolute_zero_jax.models.config import ModelConfig

CONFIG = ModelConfig('llama', vocab=96, embed=16, layers=2, heads=4, kv_heads=2, head_dim=4,
                     ffn=32, tied=True)
# Keeps the gradient it is given, so that tests can read it out of the state.
RECORD = optax.trace(decay=0.0)
ALL = 10**6


@pytest.fixture(scope='module')
def params():
  # Weights of about 1: with those of the usual initialisation all gradients but few are tiny.
  random = decoder.init(CONFIG, jax.random.key(0))
  return jax.tree.map(lambda x: x * 10 if x.std() > 0 else x, random)


def update(params, rows, *, mesh=None, tx=RECORD, algorithm='trr_plus_plus', fields=None,
           reference=None, **options):
  """State, metrics and learner after one update; the gradient is in `state.opt_state.trace`."""
  options = dict(max_grad_norm=0.0, micro_batch_tokens=ALL) | options
  fields = dict(entropy_coef=0.01) if fields is None else fields
  trainer = learner.of_decoder(CONFIG, tx, reinforce.get(algorithm, **fields), mesh=mesh, **options)
  if mesh is None:
    params = jax.tree.map(jnp.copy, params)
  else:
    params = sharding.place(jax.device_get(params),
                            sharding.shardings(decoder.param_specs(CONFIG), mesh))
  state = trainer.init(params)
  work = trainer.prepare(rows, state.params, reference=reference)
  state, metrics = trainer.update(state, work)
  return state, metrics, trainer


def apart(a, b):
  """Norm of the difference of two gradients, relative to the gradient's; the worst array."""
  pairs = zip(jax.tree.leaves(jax.device_get(a)), jax.tree.leaves(jax.device_get(b)))
  return max(float(np.linalg.norm(x - y) / np.linalg.norm(x)) for x, y in pairs)


def plain_logprobs(params, rows):
  """Per row: log-probs [n, V] of its response positions, from logits of padded rows."""
  ids = [[*r.prompt_ids, *r.response_ids] for r in rows]
  T = max(map(len, ids))
  tokens_BT = jnp.array([x + [0] * (T - len(x)) for x in ids])
  logp_BTV = jax.nn.log_softmax(decoder.logits(CONFIG, params, tokens_BT))
  return [logp_BTV[i, len(r.prompt_ids) - 1:len(ids[i]) - 1] for i, r in enumerate(rows)]
