# SPDX-License-Identifier: Apache-2.0
"""The update: rows with rewards in, new weights and metrics out.

    rows --prepare--> Update --update--> TrainState, metrics
                        |  per micro-batch [jit]: hidden -> scores -> token losses -> gradient
                        |  [jit] sum of gradients -> clip -> optimizer, donated

`prepare` works on the host with the whole batch: advantages, loss weights, layout; where asked, one
more forward for old or reference log-probs. All static shapes come from `packing.plan`.

Letters beside the usual: C blocks of a micro-batch (one per data shard), M scored tokens of a
block, R (role, kind) groups.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np
import optax

from absolute_zero_jax import learner_metrics, logprobs, optimizer, packing, reinforce, sharding
from absolute_zero_jax.models import decoder

Batch = packing.Batch
Row = packing.Row
make_optimizer = optimizer.make_optimizer

OLD_LOGPROBS = ('auto', 'current', 'recompute', 'sampler')
# Groups are counted in arrays of a multiple of this, so that another kind seldom recompiles.
_GROUP_STEP = 8


class TrainState(NamedTuple):
  """`step` counts calls of the optimizer, also those skipped for a gradient that is not finite."""
  step: jax.Array
  params: Any
  opt_state: Any


@dataclasses.dataclass(frozen=True)
class Update:
  """What one `Learner.update` consumes.

  Attributes:
    parts: micro-batches of each mini-batch; a mini-batch is one optimizer step.
    groups: names 'role_kind' of the numbers in `Batch.groups_BT`.
    advantages: of the response tokens of each row, in the order of the rows.
    metrics: what is known before the update.
  """
  parts: tuple[tuple[Batch, ...], ...]
  groups: tuple[str, ...]
  advantages: tuple[np.ndarray, ...]
  metrics: dict[str, float]


class Learner:
  """Compiled update and scoring functions of one model, algorithm and optimizer.

  Args:
    hidden: `(params, tokens_BT, positions_BT, segments_BT) -> hidden_BTD`; see `of_decoder`.
    unembed: `params -> [V, D]`.
    algorithm: `reinforce.get(...)`, or anything with its functions.
    mesh: None runs on the default device.
    materialize: `(trainable, frozen) -> params` where not the parameters themselves are trained
      (LoRA); `frozen` is what `prepare` and `update` are given under that name.
    old_logprobs: the policy that the ratio refers to. 'current': the weights of the update itself,
      ratio exactly 1 and no extra forward; right with one optimizer step per batch. 'recompute':
      one forward of the weights `prepare` is given. 'sampler': the sampler's own log-probs. 'auto':
      'current' where that is right; else 'sampler' as long as one micro-batch, scored anew by
      `prepare`, differs from it by at most `mismatch_bound` (mean of the absolute gaps), else
      'recompute'; the metric 'old_recomputed' says which. Nothing is remembered between updates.
    temperature: of the policy that is trained. At 1 the sampler's `model_logprobs` are the same
      numbers by another program; at any other value its `sampler_logprobs` are, provided it drew at
      that temperature without truncation.
    max_grad_norm: the whole gradient is scaled down to this norm; 0 is off.
    accumulate_dtype: of the gradient summed over micro-batches.
    epochs, mini_batches: passes over the batch, and optimizer steps per pass; mini-batch k takes
      rows k, k + mini_batches, ... with advantages of the whole batch and loss weights of its own.
    skip_zero_rows: rows without any advantage are left out of the computation (not of the loss
      weights), which is exact without entropy bonus and KL; metrics then mean the other rows.
    pack, share_prompts, micro_batch_tokens, length_buckets: see `packing.plan`.
    chunk: see `logprobs.score`.
    dtype: that `hidden` computes in; for the compiler, see `sharding.compiler_options`.
    vocab: token ids of rows must be below; 0 does not look.
  """

  def __init__(self, hidden: Callable[..., jax.Array], unembed: Callable[[Any], jax.Array],
               tx: optax.GradientTransformation, algorithm: Any, *, mesh: Mesh | None = None,
               materialize: Callable[[Any, Any], Any] | None = None, old_logprobs: str = 'current',
               mismatch_bound: float = 1e-3, temperature: float = 1.0, max_grad_norm: float = 1.0,
               accumulate_dtype: str = 'float32', epochs: int = 1, mini_batches: int = 1,
               skip_zero_rows: bool = False, pack: bool = False, share_prompts: bool = False,
               micro_batch_tokens: int = 4096, length_buckets: Sequence[int] = (), chunk: int = 0,
               dtype: Any = jnp.float32, vocab: int = 0):
    for name, value, holds, allowed in (
        ('temperature', temperature, 0 < temperature < float('inf'), 'above 0'),
        ('max_grad_norm', max_grad_norm, max_grad_norm >= 0, '0 (off) or more'),
        ('epochs', epochs, epochs >= 1, '1 or more'),
        ('mini_batches', mini_batches, mini_batches >= 1, '1 or more'),
        ('micro_batch_tokens', micro_batch_tokens, micro_batch_tokens >= 1, '1 or more')):
      if not holds:
        raise ValueError(f'{name}={value!r} is impossible; allowed: {allowed}.')
    if old_logprobs not in OLD_LOGPROBS:
      raise ValueError(f'old_logprobs={old_logprobs!r} is unknown; allowed: {OLD_LOGPROBS}.')
    if isinstance(algorithm, str):
      raise ValueError(f'algorithm={algorithm!r} is a name; give reinforce.get({algorithm!r}).')
    if old_logprobs == 'auto' and epochs * mini_batches == 1 and not algorithm.needs_old:
      old_logprobs = 'current'
    if old_logprobs == 'current' and epochs * mini_batches > 1:
      raise ValueError(f"old_logprobs='current' keeps every ratio at 1, which is wrong for the "
                       f'{epochs} x {mini_batches} optimizer steps per batch asked for; set '
                       "old_logprobs='recompute'.")
    if skip_zero_rows and (algorithm.entropy_coef or algorithm.needs_reference):
      raise ValueError('skip_zero_rows=True would drop the entropy bonus or KL of those rows; set '
                       'it to False, or entropy_coef and kl_coef to 0.')
    self._hidden, self._unembed, self._tx, self.algorithm = hidden, unembed, tx, algorithm
    self._mesh, self._dtype = mesh, dtype
    self._materialize = materialize or (lambda trainable, frozen: trainable)
    self._old, self._mismatch_bound = old_logprobs, mismatch_bound
    self._temperature, self._chunk = temperature, chunk
    self._max_norm, self._sum_dtype = max_grad_norm, jnp.dtype(accumulate_dtype)
    self._epochs, self._mini_batches, self._skip_zero = epochs, mini_batches, skip_zero_rows
    self._plan = functools.partial(
        packing.plan, micro_batch_tokens=micro_batch_tokens, pack=pack,
        share_prompts=share_prompts, buckets=length_buckets, blocks=sharding.row_shards(mesh),
        few_shapes=sharding.platform(mesh) != 'cpu')
    self._vocab = vocab
    self._traces = 0
    self._compiled: dict[str, Any] = {}

  def init(self, params: Any) -> TrainState:
    """The state at the start; `params` (what is trained) keep their arrays and shardings."""
    # Made eagerly: under jit the moments would come out replicated, whatever the parameters are.
    state = TrainState(jnp.zeros((), jnp.int32), params, self._tx.init(params))
    if self._mesh is None:
      return state
    whole = sharding.replicated(self._mesh)
    def put(x):
      on_mesh = isinstance(getattr(x, 'sharding', None), jax.sharding.NamedSharding)
      return x if on_mesh else jax.device_put(x, whole)
    return jax.tree.map(put, state)

  def prepare(self, rows: Sequence[Row], params: Any, *, frozen: Any = None,
              reference: Any = None) -> Update:
    """Advantages, weights and micro-batches of a batch of rows.

    Args:
      params: the trained tree of the policy; only read where old log-probs are computed.
      reference: full parameters of the KL anchor, where the algorithm needs one.

    Raises:
      ValueError: malformed rows, or a reference that the algorithm needs and was not given.
    """
    a = self.algorithm
    for i, row in enumerate(rows if self._vocab else ()):
      largest = max((*row.prompt_ids, *row.response_ids), default=0)
      if largest >= self._vocab:
        raise ValueError(f'row {i} ({row.role} {row.kind}) has token id {largest}; the vocabulary '
                         f'is 0 to {self._vocab - 1}.')
    values, about = self._logprobs_by_row(rows, params, frozen, reference)
    roles, rollout = packing.rollout(rows)
    if a.needs_old:
      rollout = rollout._replace(penalty_BT=a.penalty(
          packing.padded(values['old_logprobs']),
          packing.padded(values['ref_logprobs']) if a.needs_reference else None))
    advantage_BT = np.asarray(a.advantages(rollout, roles))
    if advantage_BT.shape != rollout.reward_BT.shape or not np.isfinite(advantage_BT).all():
      raise ValueError(f'algorithm.name makes advantages of shape {advantage_BT.shape} for tokens '
                       f'of shape {rollout.reward_BT.shape}, or some that are no finite numbers.')
    lengths = [len(r.response_ids) for r in rows]
    values['advantages'] = [x[:n] for x, n in zip(advantage_BT, lengths)]
    names = [f'{r.role}_{r.kind}' for r in rows]
    groups = tuple(sorted(set(names)))
    numbers = [groups.index(n) for n in names]
    parts = []
    for k in range(min(self._mini_batches, len(rows))):
      chosen = np.arange(k, len(rows), self._mini_batches)
      weight_BT = a.weights(reinforce.take(rollout, chosen))
      values['weights'] = [()] * len(rows)
      for i, weight_T in zip(chosen, weight_BT):
        values['weights'][i] = weight_T[:lengths[i]]
      if self._skip_zero:
        chosen = [i for i in chosen if np.any(values['advantages'][i])] or chosen[:1]
      part = [rows[i] for i in chosen]
      parts.append(tuple(packing.fill(
          self._plan(part), part, [numbers[i] for i in chosen],
          **{name: [per_row[i] for i in chosen] for name, per_row in values.items()})))
    return Update(tuple(parts), groups, tuple(values['advantages']),
                  about | learner_metrics.of_batch(rollout, advantage_BT, numbers, groups, parts))

  def update(self, state: TrainState, work: Update, *, frozen: Any = None,
             ) -> tuple[TrainState, dict[str, float]]:
    """All optimizer steps of a batch; `state` is consumed (its buffers are donated).

    A step whose gradient is not finite leaves weights and moments alone and counts in the metric
    'skipped_updates'. Metrics are means over all trained tokens of the batch, the ones named
    'role_kind/...' over those of that role and kind, unless their name says otherwise.
    """
    state, metrics = self.dispatch(state, work, frozen=frozen)
    return state, metrics()

  def dispatch(self, state: TrainState, work: Update, *, frozen: Any = None,
               ) -> tuple[TrainState, Callable[[], dict[str, float]]]:
    """`update` that only hands the work to the devices; calling its second result waits for it."""
    self._compile(state)
    size = -(-len(work.groups) // _GROUP_STEP) * _GROUP_STEP
    steps = []
    for _ in range(self._epochs):
      for part in work.parts:
        state, sums = self._step(state, frozen, part, size)
        steps.append(sums)
    return state, lambda: work.metrics | learner_metrics.finish(jax.device_get(steps), work.groups)

  def logprobs(self, params: Any, batches: Sequence[Batch], *, trained: bool = False,
               frozen: Any = None) -> list[np.ndarray]:
    """Log-probs [C, M] of the trained tokens of each micro-batch, in the order of `index_CM`.

    `params` are full parameters (a reference, another role's), or with `trained` the tree that this
    learner trains. `packing.take_rows` turns the result into one array per row.
    """
    if 'score' not in self._compiled:
      # The host reads them, in each of several processes.
      whole = ({'out_shardings': sharding.replicated(self._mesh)}
               if self._mesh is not None and self._mesh.is_multi_process else {})
      self._compiled['score'] = self._jit(self._score, static_argnums=(3,), **whole)
    out = [self._compiled['score'](params, frozen, self._put(b), trained) for b in batches]
    return jax.device_get(out)

  def compilations(self) -> int:
    """How many programs were traced since the start; constant once all shapes have been met."""
    return self._traces

  # --- traced

  def _score(self, params, frozen, batch, trained):
    self._traces += 1
    params = self._materialize(params, frozen) if trained else params
    return self._forward(params, batch)[0]

  def _forward(self, params, batch):
    """Log-probs and entropies [C, M] of the trained tokens; only these meet the vocabulary."""
    hidden_BTD = self._hidden(params, batch.tokens_BT, batch.positions_BT, batch.segments_BT)
    C, D = batch.index_CM.shape[0], hidden_BTD.shape[-1]
    hidden_CTD = hidden_BTD.reshape(C, -1, D)
    hidden_CTD = sharding.constrain(hidden_CTD, ('batch', None, None), self._mesh)
    # A token is predicted from the position before it; prompts are never empty, so there is one.
    before_CM = jnp.maximum(batch.index_CM - 1, 0)
    hidden_CMD = jnp.take_along_axis(hidden_CTD, before_CM[..., None], axis=1)
    target_CM = learner_metrics.pick(batch, batch.tokens_BT)
    return logprobs.score_blocks(hidden_CMD, self._unembed(params), target_CM,
                                 temperature=self._temperature, chunk=self._chunk)

  def _gradient(self, trainable, frozen, batch, size):
    self._traces += 1

    def loss_of(trainable):
      logprob_CM, entropy_CM = self._forward(self._materialize(trainable, frozen), batch)
      pick = functools.partial(learner_metrics.pick, batch)
      old_CM = (jax.lax.stop_gradient(logprob_CM) if self._old == 'current'
                else pick(batch.old_logprobs_BT))
      loss_CM, stats = self.algorithm.loss(reinforce.Scored(
          logprob_CM, entropy_CM, pick(batch.advantages_BT), old_CM,
          pick(batch.sampler_logprobs_BT), pick(batch.ref_logprobs_BT)))
      loss = jnp.sum(pick(batch.weights_BT) * jnp.where(batch.index_CM >= 0, loss_CM, 0))
      return loss, learner_metrics.sums(batch, size, loss, logprob_CM, entropy_CM, stats)

    gradient, sums = jax.grad(loss_of, has_aux=True)(trainable)
    return jax.tree.map(lambda g: g.astype(self._sum_dtype), gradient), sums

  def _add(self, a, b):
    self._traces += 1
    return jax.tree.map(jnp.add, a[0], b[0]), learner_metrics.add(a[1], b[1])

  def _apply(self, state, gradient, sums):
    self._traces += 1
    norm = _norm(gradient)
    finite = jnp.isfinite(norm)
    scale = jnp.minimum(1, self._max_norm / jnp.maximum(norm, 1e-30)) if self._max_norm else 1.0
    gradient = jax.tree.map(lambda g: g.astype(jnp.float32) * scale, gradient)
    change, opt_state = self._tx.update(gradient, state.opt_state, state.params)
    wide = jax.tree.map(lambda p, d: p.astype(jnp.float32) + d, state.params, change)
    # Weights stored in bfloat16 are rounded at random, else a small learning rate never moves them.
    key = jax.random.fold_in(jax.random.key(1), state.step)
    params = optimizer.round_tree(wide, state.params, key)
    keep = functools.partial(jax.tree.map, lambda new, old: jnp.where(finite, new, old))
    state = TrainState(state.step + 1, keep(params, state.params),
                       keep(opt_state, state.opt_state))
    return state, sums | {'grad_norm': norm, 'skipped_updates': 1 - finite.astype(jnp.float32)}

  # --- host

  def _logprobs_by_row(self, rows, params, frozen, reference):
    """Log-probs that the loss will ask for, by name, one array per row; and metrics about them."""
    a, out, about = self.algorithm, {}, {}
    for name in ('sampler_logprobs', 'model_logprobs'):
      out[name] = [np.asarray(getattr(r, name), np.float32) for r in rows]
    if self._temperature != 1:
      out['model_logprobs'] = out['sampler_logprobs']
    recompute = self._old == 'recompute' or self._old == 'current' and a.needs_old
    layout, tokens, scored = self._plan(rows), (), []
    if recompute or a.needs_reference or self._old == 'auto':
      tokens = packing.fill(layout, rows, model_logprobs=out['model_logprobs'])
    if self._old == 'auto':
      scored = self.logprobs(params, tokens[:1], trained=True, frozen=frozen)
      gap = learner_metrics.mismatch(tokens[0], scored[0])
      # A gap that is no number is no small one.
      recompute = not gap <= self._mismatch_bound
      about = {'old_mismatch': gap, 'old_recomputed': float(recompute)}
    if recompute:
      scored += self.logprobs(params, tokens[len(scored):], trained=True, frozen=frozen)
      out['old_logprobs'] = packing.take_rows(layout, rows, tokens, scored)
    elif self._old != 'current':
      out['old_logprobs'] = out['model_logprobs']
    if a.needs_reference:
      if reference is None:
        raise ValueError('the algorithm (kl_coef > 0, or one of your own) needs the parameters of '
                         'a reference; none were given. Pass reference=..., or set kl_coef to 0.')
      scored = self.logprobs(reference, tokens)
      out['ref_logprobs'] = packing.take_rows(layout, rows, tokens, scored)
    return out, about

  def _step(self, state, frozen, part, size):
    # No name is kept for a finished gradient: at most two live at the same time.
    total = self._compiled['gradient'](state.params, frozen, self._put(part[0]), size)
    for batch in part[1:]:
      total = self._compiled['add'](
          total, self._compiled['gradient'](state.params, frozen, self._put(batch), size))
    return self._compiled['apply'](state, *total)

  def _compile(self, state):
    if 'gradient' in self._compiled:
      return
    # Results stay where their inputs are; left to the compiler, a gradient may come out whole.
    where, summed = {}, {}
    if self._mesh is not None:
      layout = jax.tree.map(lambda x: x.sharding, state)
      where, summed = {'out_shardings': (layout, None)}, {'out_shardings': (layout.params, None)}
    self._compiled['gradient'] = self._jit(self._gradient, static_argnums=(3,), **summed)
    self._compiled['add'] = jax.jit(self._add, donate_argnums=(0,), **summed)
    self._compiled['apply'] = jax.jit(self._apply, donate_argnums=(0,), **where)

  def _jit(self, fn, **options):
    return jax.jit(fn, compiler_options=sharding.compiler_options(self._mesh, self._dtype),
                   **options)

  def _put(self, batch):
    if self._mesh is None:
      return batch
    return sharding.place(batch, sharding.rows(self._mesh, ndim=2))


def of_decoder(config: Any, tx: optax.GradientTransformation, algorithm: Any, *,
               mesh: Mesh | None = None, dtype: Any = jnp.float32, remat: str = 'full',
               attention: str = 'xla', **options: Any) -> Learner:
  """The `Learner` of `models.decoder` with this `ModelConfig`; options as there.

  Raises ValueError for options that cannot work, alone or together.
  """
  if attention == 'splash' and options.get('share_prompts'):
    raise ValueError("attention='splash' cannot let responses share a prompt; set "
                     "share_prompts=False, or attention='xla'.")
  hidden = functools.partial(decoder.hidden, config, dtype=jnp.dtype(dtype), remat=remat,
                             attention=attention, mesh=mesh,
                             packed=bool(options.get('pack') or options.get('share_prompts')))
  return Learner(hidden, decoder.unembed, tx, algorithm, mesh=mesh, dtype=dtype,
                 **{'vocab': config.vocab} | options)


def _norm(tree: Any) -> jax.Array:
  """Norm of all leaves together in float32, axis by axis.

  One sum over a whole leaf may run in sequence: with 26 million terms that cost 1e-4 of the norm.
  """
  total = jnp.zeros(())
  for x in jax.tree.leaves(tree):
    x = jnp.square(x.astype(jnp.float32))
    while x.ndim:
      x = jax.lax.optimization_barrier(jnp.sum(x, axis=-1))     # else XLA merges the sums
    total += x
  return jnp.sqrt(total)
