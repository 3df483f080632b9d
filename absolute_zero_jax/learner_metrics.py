# SPDX-License-Identifier: Apache-2.0
"""Metrics of an update: sums over trained tokens on the device, names and means on the host.

`sums` runs inside jit, per micro-batch; sums of several micro-batches are added (entries ending in
'_max' take the larger), and `finish` divides. `of_batch` needs no device. Letters as in `learner`.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from absolute_zero_jax import packing, reinforce
from absolute_zero_jax.advantages import Rollout

# Counted per (role, kind) too.
_PER_GROUP = ('entropy', 'mismatch_abs', 'kl_old')
# Names that an algorithm's statistics cannot have, beside those ending in '_max' and '_R'.
_TAKEN = ('loss', 'tokens', 'grad_norm', 'skipped_updates', 'optimizer_steps', 'entropy',
          'mismatch_abs', 'mismatch_kl', 'old_mismatch', 'old_recomputed', 'rows',
          'rows_without_advantage', 'updates_without_rows', 'advantage_abs', 'micro_batches',
          'positions', 'padding_share')


def sums(batch: packing.Batch, size: int, loss: jax.Array, logprob_CM: jax.Array,
         entropy_CM: jax.Array, stats: dict[str, jax.Array]) -> dict[str, jax.Array]:
  """Sums over the trained tokens, and over those of each of `size` groups.

  'mismatch_*' compares the sampler's log-probs of the same tokens with the trainer's: two programs
  for one number, plus whatever the weights moved since.

  Raises ValueError for names in `stats` that mean something else here.
  """
  taken = [name for name in stats if name in _TAKEN or name.endswith(('_max', '_R'))]
  if taken:
    raise ValueError(f'algorithm.name: its loss has statistics called {taken}; take other names, '
                     "that do not end in '_max' or '_R' either.")
  mask_CM = (batch.index_CM >= 0).astype(jnp.float32)
  gap_CM = (pick(batch, batch.model_logprobs_BT) - logprob_CM) * mask_CM
  bound = reinforce.LOG_RATIO_BOUND
  token = {'entropy': entropy_CM, 'mismatch_abs': jnp.abs(gap_CM),
           'mismatch_kl': reinforce.kl(jnp.clip(gap_CM, -bound, bound), 'k3'), **stats}
  onehot_CMR = jax.nn.one_hot(pick(batch, batch.groups_BT), size) * mask_CM[..., None]
  out = {name: jnp.sum(jnp.where(mask_CM > 0, x_CM, 0)) for name, x_CM in token.items()}
  for name in _PER_GROUP:
    if name in token:
      x_CM = jnp.where(mask_CM > 0, token[name], 0)
      out[f'{name}_R'] = jnp.einsum('CM,CMR->R', x_CM, onehot_CMR)
  return jax.lax.stop_gradient(out | {
      'loss': loss, 'tokens': jnp.sum(mask_CM), 'tokens_R': jnp.sum(onehot_CMR, axis=(0, 1)),
      'mismatch_max': jnp.max(jnp.abs(gap_CM))})


def add(a: dict[str, jax.Array], b: dict[str, jax.Array]) -> dict[str, jax.Array]:
  """Sums of two micro-batches as one."""
  return {k: (jnp.maximum if k.endswith('_max') else jnp.add)(a[k], b[k]) for k in a}


def finish(steps: Sequence[dict[str, np.ndarray]], groups: Sequence[str]) -> dict[str, float]:
  """Metrics of all optimizer steps of a batch: token means; loss and norm are means of steps."""
  steps = [{k: np.asarray(v, np.float64) for k, v in s.items()} for s in steps]
  def total(name):
    return sum(s[name] for s in steps)
  out = {}
  for name in steps[0]:
    if name in ('loss', 'grad_norm'):
      out[name] = float(total(name) / len(steps))
    elif name.endswith('_max'):
      out[name] = float(max(s[name] for s in steps))
    elif name in ('skipped_updates', 'tokens'):
      out[name] = float(total(name))
    elif name.endswith('_R'):
      if name != 'tokens_R':
        mean_R = total(name) / np.maximum(total('tokens_R'), 1)
        out |= {f'{g}/{name[:-2]}': float(mean_R[i]) for i, g in enumerate(groups)
                if total('tokens_R')[i]}
    else:
      out[name] = float(total(name) / max(total('tokens'), 1))
  out['optimizer_steps'] = float(len(steps))
  return out


def of_batch(r: Rollout, advantage_BT: np.ndarray, numbers: Sequence[int], groups: Sequence[str],
             parts: Sequence[Sequence[packing.Batch]]) -> dict[str, float]:
  """What advantages and layout say: signal left in them, and the share of the work on padding."""
  live_B = np.any(advantage_BT != 0, axis=1)
  batches = [batch for part in parts for batch in part]
  places = sum(b.tokens_BT.size for b in batches)
  held = sum(int((b.segments_BT > 0).sum()) for b in batches)
  out = {'rows': float(len(live_B)), 'rows_without_advantage': float((~live_B).sum()),
         'advantage_abs': float(np.abs(advantage_BT).sum() / max(r.mask_BT.sum(), 1)),
         'micro_batches': float(len(batches)), 'positions': float(held),
         'padding_share': 1 - held / places}
  for i, group in enumerate(groups):
    member_B = np.asarray(numbers) == i
    out[f'{group}/rows_without_advantage'] = float((~live_B[member_B]).sum())
    out[f'{group}/advantage_abs'] = float(
        np.abs(advantage_BT[member_B]).sum() / max(r.mask_BT[member_B].sum(), 1))
  return out


def mismatch(batch: packing.Batch, logprob_CM: np.ndarray) -> float:
  """Mean |sampler's log-prob - given one| over the trained tokens of a micro-batch."""
  C = batch.index_CM.shape[0]
  index_CM = np.maximum(batch.index_CM, 0)
  sampler_CM = np.take_along_axis(batch.model_logprobs_BT.reshape(C, -1), index_CM, axis=1)
  return float(np.abs(sampler_CM - logprob_CM)[batch.index_CM >= 0].mean())


def pick(batch: packing.Batch, x_BT: jax.Array) -> jax.Array:
  """Values [C, M] at the trained tokens; a place without a token gets some value of its block."""
  C = batch.index_CM.shape[0]
  return jnp.take_along_axis(x_BT.reshape(C, -1), jnp.maximum(batch.index_CM, 0), axis=1)
