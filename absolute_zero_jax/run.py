# SPDX-License-Identifier: Apache-2.0
"""A run in memory: the choices of a config become objects, and one call plays one iteration.

  with Run(config) as run:
    iteration = run.iterate()       # self-play, then one update
    print(iteration.metrics['solve_deduction/accuracy'])

Iteration t draws only from the seed of the run, from t, and from what a checkpoint holds, so a run
that continues from a checkpoint equals one that was never interrupted.
"""

from collections.abc import Callable
import contextlib
import dataclasses
import io
import sys
import time
from typing import Any, NamedTuple

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np

from absolute_zero_jax import buffer as buffer_lib
from absolute_zero_jax import (
  checkpoint,
  executor,
  lora,
  metrics,
  reinforce,
  rewards,
  selfplay,
  sharding,
  summary,
  tasks,
)
from absolute_zero_jax import config as config_lib
from absolute_zero_jax import learner as learner_lib
from absolute_zero_jax import sampler as sampler_lib
from absolute_zero_jax import tokenizer as tokenizer_lib
from absolute_zero_jax.models import decoder, hf, hub, loading
from absolute_zero_jax.tasks import program, seed_files
from absolute_zero_jax.tasks import prompts as prompts_lib
from absolute_zero_jax.types import Episode, Role

_RULES = ('batch', 'mc_samples', 'references', 'solve_source', 'draw', 'recent_steps',
          'reference_draw', 'keep', 'refuse_duplicates', 'show_references', 'train_propose',
          'mc_use')
_ALGORITHM = ('name', 'whiten_by', 'whiten_count', 'aggregation', 'aggregation_rows', 'clip_low',
              'clip_high', 'dual_clip', 'entropy_coef', 'kl_coef', 'kl_kind', 'kl_in',
              'importance', 'importance_cap')


class Iteration(NamedTuple):
  """What `Run.iterate` returns."""
  step: int
  result: selfplay.Result
  episodes: list[Episode]             # the result's, with advantages
  metrics: dict[str, float]


class Run:
  """One run in memory: model, optimizer state, task buffer, executor.

  Use it as a context manager, or call `close()`. `step` counts finished iterations.

  Args:
    progress: called with one line of text when something that takes long begins or ends.
    fresh: False leaves weights and seed tasks to `restore`, which must follow.

  Raises:
    ValueError: before any work, for a config that cannot work; while loading, for a model,
      tokenizer or prompt set that is missing or broken.
  """

  def __init__(self, c: config_lib.ConfigDict, *, progress: Callable[[str], None] | None = None,
               console: metrics.Console | None = None, fresh: bool = True):
    config_lib.validate(c)
    self.c = c
    self.step = 0
    self.save_s = 0.0                 # of the last checkpoint, for the timeline
    self._say = progress or (lambda text: None)
    self._console = console or metrics.Console(io.StringIO())
    self._closers = contextlib.ExitStack()
    try:
      self._build(fresh)
    except BaseException:
      self.close()
      raise

  def _build(self, fresh: bool) -> None:
    """The only place where names in the config become objects."""
    c = self.c
    self.prompts = prompts_lib.load(c.selfplay.prompts)
    self.kinds = [self._kind(name) for name in c.selfplay.kinds]
    self.rewards = config_lib.load_object(c.reward.name, {'azr': rewards.get}, 'reward.name')(
            **{k: v for k, v in _plain(c.reward).items() if k != 'name'})
    algorithm = reinforce.get(
        **{k: c.algorithm[k] for k in _ALGORITHM},
        role_estimators=tuple(_plain(c.algorithm.role_estimators).items()),
        role_weights=tuple(_plain(c.algorithm.role_weights).items()),
        aggregation_tokens=c.algorithm.aggregation_tokens or max(
            c.sampler.max_propose_tokens, c.sampler.max_solve_tokens))
    optimizer = learner_lib.make_optimizer(
        steps=c.train.steps, **{k: v for k, v in _plain(c.optimizer).items()
                                if k not in ('clip_norm', 'accumulate_dtype')})
    self.executor = self._closers.enter_context(contextlib.closing(executor.start(
        c.executor.name, workers=c.executor.workers, min_isolation=c.executor.min_isolation,
        validate_timeout_s=c.executor.validate_timeout_s,
        score_timeout_s=c.executor.score_timeout_s, memory_mb=c.executor.memory_mb,
        **_plain(c.executor.options))))
    self._say(f'executor: {self.executor.isolation}')

    self.mesh = sharding.make_mesh(**_plain(c.mesh))
    self.key = jax.random.key(c.seed)
    start = time.perf_counter()
    self.model, params, self.source = self._load_model() if fresh else self._shapes_only()
    self.tokenizer = tokenizer_lib.load(c.model.tokenizer or self.source)
    self.tokenizer.check(self.model.vocab)
    self._say(f'model: {c.model.name}, {_count(decoder.param_specs(self.model)) / 1e6:.0f}M '
              f'parameters, {time.perf_counter() - start:.1f} s')

    self.learner = learner_lib.of_decoder(
        self.model, optimizer, algorithm, mesh=self.mesh, dtype=c.model.dtype,
        remat=c.model.remat, attention=c.model.attention, old_logprobs=c.algorithm.old_logprobs,
        max_grad_norm=c.optimizer.clip_norm, accumulate_dtype=c.optimizer.accumulate_dtype,
        epochs=c.algorithm.epochs, mini_batches=c.algorithm.mini_batches,
        skip_zero_rows=c.algorithm.skip_zero_rows, pack=c.train.pack,
        micro_batch_tokens=c.train.micro_batch_tokens,
        materialize=lora.attaching(alpha=c.lora.alpha) if c.lora.rank else None)
    self.sampler = sampler_lib.Sampler(
        self.model, self.mesh, pad_id=self.tokenizer.pad_id, stop_ids=self.tokenizer.stop_ids,
        slots=c.sampler.slots, chunk=c.sampler.chunk, dtype=c.model.dtype,
        attention=c.model.attention, vocab=self.tokenizer.vocab_size,
        max_prompt_tokens=c.sampler.max_prompt_tokens,
        max_new_tokens=max(c.sampler.max_propose_tokens, c.sampler.max_solve_tokens))
    needs_base = c.lora.rank or 'base' in (c.roles.propose, c.roles.reference)
    if needs_base and params is None:
      params = self._load_model()[1]
    self.base = params if needs_base else None
    self.state = None if params is None else self._start(params)
    self._merged: tuple[int, Any] | None = None

    self.buffer = buffer_lib.TaskBuffer(
        [k.name for k in self.kinds], capacity=c.selfplay.buffer_size,
        eviction=c.selfplay.eviction, seed=c.seed)
    for kind in self.kinds:
      self.buffer.extend(kind.seeds())
    if fresh and c.selfplay.seeds:
      self._add_seed_files(epath.Path(c.selfplay.seeds))
    self.rules = selfplay.Rules(max_prompt_tokens=c.sampler.max_prompt_tokens,
                                **{k: c.selfplay[k] for k in _RULES})
    self.tools = selfplay.Tools(kinds=self.kinds, prompts=self.prompts, tokenizer=self.tokenizer,
                                sample=self._sample, submit=self.executor.submit,
                                rewards=self.rewards)

  def params(self, role: Role) -> Any:
    """The weights that play `role`: the trained policy, or the frozen base."""
    return self.base if self.c.roles[role.value] == 'base' else self.policy()

  def policy(self) -> Any:
    """The trained weights, LoRA adapters merged in; do not keep them across an update."""
    if not self.c.lora.rank:
      return self.state.params
    if self._merged is None or self._merged[0] != self.step:
      self._merged = self.step, lora.merge(self.base, self.state.params, alpha=self.c.lora.alpha)
    return self._merged[1]

  def iterate(self, on_proposal: Callable[[selfplay.Attempt], None] = lambda a: None) -> Iteration:
    """Plays one iteration and updates the policy once; adds the valid proposals to the buffer."""
    step = self.step + 1
    self._calls = 0
    timer, start = metrics.Timer(), time.perf_counter()
    before = self.sampler.stats()
    rng = np.random.default_rng([self.c.seed, step])
    result = selfplay.iterate(step, self.buffer, self.tools, self.rules, rng, timer=timer,
                              on_proposal=on_proposal)
    trained = [e for e in result.episodes if e.train]
    with timer('update'):
      # The decode-layout weights are stale after the update: make room for the gradient.
      self.sampler.release()
      self._merged = None
      frozen = self.base if self.c.lora.rank else None
      reference = self.base if self.c.roles.reference == 'base' else None
      work = self.learner.prepare([_row(e) for e in trained], self.state.params, frozen=frozen,
                                  reference=reference)
      self.state, update = self.learner.update(self.state, work, frozen=frozen)
    advantages = iter(work.advantages)
    episodes = [dataclasses.replace(e, advantage=tuple(map(float, next(advantages))))
                if e.train else e for e in result.episodes]
    timer.seconds['iteration'] = time.perf_counter() - start
    self.step = step
    return Iteration(step, result, episodes, self._metrics(result, update, timer, before))

  def host_state(self) -> dict[str, Any]:
    """What a checkpoint holds beside the arrays; JSON-able."""
    return {'step': self.step, 'prompts': self.prompts.hash, 'buffer': self.buffer.state(),
            'python': '.'.join(map(str, sys.version_info[:2]))}

  def arrays(self) -> dict[str, Any]:
    """What a checkpoint holds as arrays."""
    return {'train': self.state, 'key': jax.random.key_data(self.key)}

  def restore(self, checkpoints: checkpoint.Checkpoints, step: int) -> None:
    """Continues from a checkpoint of this run.

    Raises:
      checkpoint.CheckpointError: the checkpoint was made with other prompts.
    """
    host = checkpoints.restore_host(step)
    if host['prompts'] != self.prompts.hash:
      raise checkpoint.CheckpointError(
          f'checkpoint {step} was made with other prompts than {self.c.selfplay.prompts!r} holds '
          'now; restore those files, or start a new --workdir.')
    if self.state is None:
      # Zeros of the right shapes and places: the cheapest way to the optimizer state's layout.
      self.state = self._start(sharding.zeros(
          decoder.param_specs(self.model), self.mesh, self.c.model.param_dtype))
    abstract = checkpoint.abstract_like(self.arrays())
    self.state = None                 # frees the memory that the restored arrays need
    arrays = checkpoints.restore_state(step, abstract)
    self.state = arrays['train']
    # Through the host: a restored array is tied to the devices it was restored to.
    self.key = jax.random.wrap_key_data(np.asarray(arrays['key']))
    self.buffer = buffer_lib.TaskBuffer.from_state(host['buffer'])
    self.step = host['step']

  def export(self, path: epath.PathLike) -> None:
    """Writes the policy as a Hugging Face directory that `transformers` loads."""
    hf.save(self.model, self.policy(), path, tokenizer=self.tokenizer)

  def close(self) -> None:
    """Ends the executor and its processes; safe to call twice."""
    self._closers.close()

  def __enter__(self) -> 'Run':
    return self

  def __exit__(self, *_: Any) -> None:
    self.close()

  def _start(self, params: Any) -> learner_lib.TrainState:
    """The state before the first update, for full weights or for adapters."""
    c = self.c
    if c.lora.rank:
      specs = lora.specs(self.model, rank=c.lora.rank, targets=c.lora.targets)
      adapters = lora.init(self.model, jax.random.fold_in(self.key, 0), rank=c.lora.rank,
                           targets=c.lora.targets)
      return self.learner.init(sharding.place(adapters, sharding.shardings(specs, self.mesh)))
    # A copy where the start is still needed: the policy's buffers are donated to the update.
    return self.learner.init(params if self.base is None else jax.tree.map(jnp.copy, params))

  def _kind(self, name: str):
    c = self.c
    options = _plain(c.selfplay.kind_options)
    if 'rules' in options:
      rules = options['rules']
      if rules.get('banned_words') == 'azr':
        rules['banned_words'] = program.AZR_BANNED_WORDS
      options['rules'] = tasks.Rules(**rules)
    return tasks.get(name, cases=c.selfplay.induction_cases, score=c.reward.induction, **options)

  def _add_seed_files(self, path: epath.Path) -> None:
    """Validates the tasks of jsonl seed files and adds those that pass, for every kind they fit."""
    files = sorted(path.glob('*.jsonl')) if path.is_dir() else [path]
    if not files or not path.exists():
      raise ValueError(f'selfplay.seeds={str(path)!r} is no .jsonl file and no folder of them.')
    kinds = {k.name: k for k in self.kinds}
    proposals = [p for file in files for p in seed_files.read(file)]
    todo = [(kinds[name], p) for p in proposals for name in seed_files.kinds_of(p)
            if name in kinds]
    jobs = [(kind, p, [self.executor.submit(j) for j in kind.validation_jobs(p)])
            for kind, p in todo]
    found = [kind.to_task(p, [f.result() for f in pending], 0) for kind, p, pending in jobs]
    added = self.buffer.extend(t for t in found if not isinstance(t, str))
    self._say(f'seeds: {added} of {len(todo)} tasks from {path} passed validation')

  def _load_model(self):
    return loading.load(
        self.c.model.name, dtype=jnp.dtype(self.c.model.param_dtype), key=self.key,
        shardings_fn=lambda m: sharding.shardings(decoder.param_specs(m), self.mesh))

  def _shapes_only(self):
    name = self.c.model.name
    if name.startswith('random:'):
      return loading.random_config(name), None, None
    source = loading.weights(hub.resolve(name))
    return loading.read_config(source), None, source

  def _sample(self, role: Role, prompts, counts, stop_fn, on_finish):
    s = self.c.sampler
    self._calls += 1
    key = jax.random.fold_in(jax.random.fold_in(self.key, self.step + 1), self._calls)
    limit = s.max_propose_tokens if role == Role.PROPOSE else s.max_solve_tokens
    requests = [sampler_lib.Request(prompt_ids=ids, samples=n, max_new_tokens=limit)
                for ids, n in zip(prompts, counts, strict=True)]
    total = sum(counts)
    with self._console.bar(role.value, total, 'seq') as bar:
      def finished(sample):
        on_finish(sample)
        bar.update(1)
      return self.sampler.generate(
          self.params(role), requests, key, temperature=s.temperature, top_k=s.top_k,
          top_p=s.top_p, min_p=s.min_p, stop_fn=stop_fn, on_finish=finished)

  def _metrics(self, result, update, timer, before) -> dict[str, float]:
    after = self.sampler.stats()
    out = summary.scalars(result)
    out |= {f'train/{k}': v for k, v in update.items()}
    out |= {f'time/{k}': v for k, v in timer.seconds.items() if k not in ('propose', 'solve')}
    out |= {f'sampler/{k}': v - before.get(k, 0) for k, v in after.items()}
    out['sampler/tokens_per_s'] = out['sampler/tokens'] / max(timer.seconds['decode'], 1e-9)
    out['compilations'] = self.sampler.compilations() + self.learner.compilations()
    out |= {f'executor/{k}': v for k, v in self.executor.stats().items()}
    out |= {f'buffer/{k}': v for k, v in self.buffer.sizes().items()}
    return out


def _row(e: Episode) -> learner_lib.Row:
  """The learner's view of an episode: its last turn."""
  turn = e.turns[-1]
  return learner_lib.Row(
      prompt_ids=turn.prompt_ids, response_ids=turn.response_ids,
      sampler_logprobs=turn.sampler_logprobs, model_logprobs=turn.model_logprobs, reward=e.reward,
      kind=e.kind, role=e.role.value, prompt=e.group)


def _count(specs: Any) -> int:
  leaves = jax.tree.leaves(specs, is_leaf=lambda s: hasattr(s, 'shape'))
  return sum(int(np.prod(s.shape)) for s in leaves)


def _plain(section: config_lib.ConfigDict) -> dict[str, Any]:
  return section.to_dict()
