# SPDX-License-Identifier: Apache-2.0
"""AdamW or Muon with a schedule; AdamW's moments may be stored in bfloat16."""

import jax
import jax.numpy as jnp
import optax
from optax import contrib

NAMES = ('adamw', 'muon')
SCHEDULES = ('constant', 'cosine')
DECAYS = ('all', 'matrices')
# Of a layer's weights, as `models.decoder.Block` stores them (axis 0 counts layers): the axes that
# a product contracts, and those it leaves.
_MATRICES = {'q': (1, (2, 3)), 'k': (1, (2, 3)), 'v': (1, (2, 3)), 'o': ((1, 2), 3),
             'gate': (1, 2), 'up': (1, 2), 'down': (1, 2)}
_MUON_MOMENTUM = 0.95
# Update size in units of AdamW's, which is about 0.2 to 0.4 (Moonlight, arXiv 2502.16982, 2.2), so
# that a learning rate means the same for both.
_MUON_RMS = 0.2


def make_optimizer(learning_rate: float = 1e-6, *, name: str = 'adamw', schedule: str = 'constant',
                   warmup_steps: int = 0, steps: int = 0, b1: float = 0.9, b2: float = 0.999,
                   eps: float = 1e-8, weight_decay: float = 0.0, decay: str = 'all',
                   moment_dtype: str = 'float32') -> optax.GradientTransformation:
  """AdamW as in torch (decoupled decay, bias correction, eps outside the root), or Muon.

  Muon (Jordan et al., 2024; optax.contrib) orthogonalises the momentum of the layers' matrices; all
  else, embeddings and norms, is left to AdamW with Nesterov momentum and without decay. It learns
  faster from little text, and self-play from weights that it made keeps answers more various
  (docs/learning_runs.md); for weights that AdamW made, stay with AdamW (Liu et al.,
  arXiv:2502.16982, on fine-tuning). It takes no `eps` and no `decay`: what decays are those
  matrices.

  The gradient is clipped by the learner, not here.

  Args:
    name: one of `NAMES`.
    schedule: after a linear warm-up from 0, 'constant' or 'cosine' (to zero at `steps`).
    decay: what `weight_decay` shrinks: 'all' parameters (torch's and the reference's behaviour), or
      'matrices' (no norms, no biases).
    moment_dtype: 'float32', or 'bfloat16' for half the memory. bfloat16 moments are rounded
      stochastically: plain rounding would freeze the second moment, which moves by 0.1 % a step
      where bfloat16 resolves 0.4 %. Muon: of the momentum alone, rounded to nearest.

  Raises:
    ValueError: an unknown name, schedule or decay; a number that cannot work; 'cosine' with no step
      after the warm-up.
  """
  for field, value, holds, allowed in (
      ('learning_rate', learning_rate, 0 <= learning_rate < float('inf'), '0 or more'),
      ('warmup_steps', warmup_steps, warmup_steps >= 0, '0 or more'),
      ('b1', b1, 0 <= b1 < 1, '0 or more, less than 1'),
      ('b2', b2, 0 <= b2 < 1, '0 or more, less than 1'),
      ('eps', eps, eps > 0, 'more than 0'),
      ('weight_decay', weight_decay, weight_decay >= 0, '0 or more'),
      ('moment_dtype', moment_dtype, moment_dtype in ('float32', 'bfloat16'), 'float32, bfloat16')):
    if not holds:
      raise ValueError(f'{field}={value!r} is impossible; allowed: {allowed}.')
  if name not in NAMES:
    raise ValueError(f'optimizer {name!r} is unknown; allowed: {", ".join(NAMES)}.')
  if schedule not in SCHEDULES:
    raise ValueError(f'schedule={schedule!r} is unknown; allowed: {", ".join(SCHEDULES)}.')
  if decay not in DECAYS:
    raise ValueError(f'decay={decay!r} is unknown; allowed: {", ".join(DECAYS)}.')
  if schedule == 'cosine' and steps <= warmup_steps:
    raise ValueError(f"schedule='cosine' with warmup_steps={warmup_steps} needs more steps than "
                     f'steps={steps}; set it to the length of the run.')
  rate = learning_rate_schedule(learning_rate, schedule=schedule, warmup_steps=warmup_steps,
                                steps=steps)
  if name == 'muon':
    tx = contrib.muon(rate, beta=_MUON_MOMENTUM, weight_decay=weight_decay, adam_b1=b1,
                      adam_b2=b2, mu_dtype=moment_dtype, consistent_rms=_MUON_RMS,
                      muon_weight_dimension_numbers=_muon_axes)
    # Else second moments are stored in the parameters' dtype, and freeze in bfloat16.
    wide = lambda params: jax.tree.map(lambda x: x.astype(jnp.float32), params)
    return optax.GradientTransformationExtraArgs(lambda params: tx.init(wide(params)), tx.update)
  adam = _stored_as(optax.scale_by_adam(b1=b1, b2=b2, eps=eps), jnp.dtype(moment_dtype))
  return optax.chain(
      adam,
      optax.add_decayed_weights(weight_decay, mask=_is_matrix if decay == 'matrices' else None),
      optax.scale_by_learning_rate(rate))


def learning_rate_schedule(learning_rate: float, *, schedule: str = 'constant',
                           warmup_steps: int = 0, steps: int = 0) -> optax.Schedule:
  """Learning rate by the number of updates done; see `make_optimizer`."""
  if schedule == 'cosine':
    after = optax.cosine_decay_schedule(learning_rate, max(steps - warmup_steps, 1))
  else:
    after = optax.constant_schedule(learning_rate)
  if not warmup_steps:
    return after
  # The first update already has a rate above zero.
  first = learning_rate / warmup_steps
  warmup = optax.linear_schedule(first, learning_rate, max(warmup_steps - 1, 1))
  return optax.join_schedules([warmup, after], [warmup_steps])


def round_to(x: jax.Array, dtype: jnp.dtype, key: jax.Array) -> jax.Array:
  """Casts float32 to `dtype`; to bfloat16 up or down at random, so that the mean is kept."""
  if dtype != jnp.bfloat16:
    return x.astype(dtype)
  bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
  noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
  rounded = jax.lax.bitcast_convert_type((bits + noise) & jnp.uint32(0xFFFF0000), jnp.float32)
  return jnp.where(jnp.isfinite(x), rounded, x).astype(dtype)


def round_tree(tree, like, key: jax.Array):
  """`round_to` on every leaf, to the dtype of the same leaf of `like`, each with its own noise."""
  leaves, structure = jax.tree.flatten(tree)
  return structure.unflatten(
      round_to(x, y.dtype, jax.random.fold_in(key, i))
      for i, (x, y) in enumerate(zip(leaves, structure.flatten_up_to(like))))


def _stored_as(adam: optax.GradientTransformation, dtype) -> optax.GradientTransformation:
  """`adam` with moments stored in `dtype`, whatever that of the parameters; float32 inside."""
  def cast(state, dtype):
    moments = jax.tree.map(lambda x: x.astype(dtype), (state.mu, state.nu))
    return state._replace(mu=moments[0], nu=moments[1])

  def init(params):
    return cast(adam.init(params), dtype)

  def update(gradient, state, params=None):
    direction, new = adam.update(gradient, cast(state, jnp.float32), params)
    key = jax.random.fold_in(jax.random.key(0), new.count)
    mu, nu = round_tree((new.mu, new.nu), (state.mu, state.nu), key)
    return direction, new._replace(mu=mu, nu=nu)

  return optax.GradientTransformation(init, update)


def _muon_axes(params):
  """`MuonDimensionNumbers` of the layers' matrices, None for all else."""
  def axes(path, _):
    found = _MATRICES.get(getattr(path[-1], 'key', ''))
    return contrib.MuonDimensionNumbers(*found) if found else None
  return jax.tree_util.tree_map_with_path(axes, params)


def _is_matrix(params):
  """True for weights of matrix products; layers are stacked, so ranks cannot tell."""
  def claim(path, _):
    name = getattr(path[-1], 'key', '') if path else ''
    return not str(name).endswith(('norm', 'bias'))
  return jax.tree_util.tree_map_with_path(claim, params)
