# SPDX-License-Identifier: Apache-2.0
"""LoRA: train two thin matrices beside each frozen weight matrix, W + (alpha / rank) a b.

    adapters --attach--> params for `decoder.hidden`     (training: `Learner(materialize=...)`)
    adapters --merge---> params of the plain shape       (sampling, export)

  adapters = lora.init(model_config, key, rank=16)
  trainer = learner.of_decoder(model_config, tx, algorithm, materialize=lora.attaching(alpha=32.0))
  state = trainer.init(adapters)
  work = trainer.prepare(rows, state.params, frozen=params)
  state, metrics = trainer.update(state, work, frozen=params)
  hf.save(model_config, lora.merge(params, state.params, alpha=32.0), path)

The frozen weights get no gradient and no optimizer state. The decoder merges inside its layer scan,
so with remat='full' only one layer's merged matrices and their gradients exist at a time.

Source: LoRA (arXiv:2106.09685).
"""

from collections.abc import Callable, Sequence
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from absolute_zero_jax.models import decoder
from absolute_zero_jax.models.config import ModelConfig

# Matrices of a layer, and how many of their leading axes (after the layer's) are inputs.
TARGETS = {'q': 1, 'k': 1, 'v': 1, 'o': 2, 'gate': 1, 'up': 1, 'down': 1}


def specs(config: ModelConfig, *, rank: int, targets: Sequence[str] = tuple(TARGETS)) -> Any:
  """Shapes and logical axes of the adapters, stacked over layers; for `sharding.shardings`.

  Raises ValueError for an unknown target, none, or a rank below 1.
  """
  check_targets(targets)
  if rank < 1:
    raise ValueError(f'lora.rank={rank} must be at least 1; leave LoRA out for full training.')
  layers, out = decoder.param_specs(config)['layers'], {}
  for name in targets:
    shape, axes = layers[name]
    cut = 1 + TARGETS[name]
    out[name] = {'a': decoder.Spec((*shape[:cut], rank), (*axes[:cut], None)),
                 'b': decoder.Spec((shape[0], rank, *shape[cut:]), (axes[0], None, *axes[cut:]))}
  return out


def check_targets(targets: Sequence[str]) -> None:
  """Raises ValueError for an unknown target, a repeated one, or none."""
  unknown = [t for t in targets if t not in TARGETS]
  if unknown or not targets or len(set(targets)) != len(targets):
    raise ValueError(f'lora.targets={tuple(targets)} cannot work; allowed: one or more of '
                     f'{", ".join(TARGETS)}, each once.')


def init(config: ModelConfig, key: jax.Array, *, rank: int,
         targets: Sequence[str] = tuple(TARGETS)) -> Any:
  """Adapters that change nothing yet: a uniform in +-1/sqrt(inputs), as in PEFT, and b zero.

  float32, whatever the weights are.
  """
  out = {}
  for i, (name, pair) in enumerate(specs(config, rank=rank, targets=targets).items()):
    bound = 1 / math.sqrt(math.prod(pair['a'].shape[1:-1]))
    a = jax.random.uniform(jax.random.fold_in(key, i), pair['a'].shape, jnp.float32, -bound, bound)
    out[name] = {'a': a, 'b': jnp.zeros(pair['b'].shape, jnp.float32)}
  return out


def attach(params: decoder.Params, adapters: Any, *, alpha: float) -> decoder.Params:
  """`params` with the adapters beside the weights, for `decoder.hidden`; traced or not.

  The weights inside are constants of the gradient.
  """
  pairs = {name: {'a': pair['a'], 'b': pair['b'] * _scale(pair, alpha)}
           for name, pair in adapters.items()}
  frozen = jax.lax.stop_gradient(params)
  return frozen | {'layers': frozen['layers'] | {'lora': pairs}}


def attaching(*, alpha: float) -> Callable[[Any, decoder.Params], decoder.Params]:
  """`attach` in the form that `Learner(materialize=...)` takes: (adapters, params) -> params."""
  return lambda adapters, params: attach(params, adapters, alpha=alpha)


@functools.partial(jax.jit, static_argnames='alpha')
def merge(params: decoder.Params, adapters: Any, *, alpha: float) -> decoder.Params:
  """Plain parameters with the adapters added in, in the dtype of the weights."""
  layers = dict(params['layers'])
  for name, pair in adapters.items():
    product = jax.vmap(lambda a, b: jnp.tensordot(a, b, 1))(
        pair['a'], pair['b'] * _scale(pair, alpha))
    layers[name] = (layers[name] + product).astype(layers[name].dtype)
  return params | {'layers': layers}


def _scale(pair, alpha):
  return jnp.asarray(alpha / pair['a'].shape[-1], pair['b'].dtype)
