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
  evaluate,
  lora,
  metrics,
  parts,
  seeding,
  selfplay,
  sharding,
  summary,
  tasks,
)
from absolute_zero_jax import config as config_lib
from absolute_zero_jax import learner as learner_lib
from absolute_zero_jax import sampler as sampler_lib
from absolute_zero_jax.models import decoder, hf
from absolute_zero_jax.tasks import identity
from absolute_zero_jax.tasks import prompts as prompts_lib
from absolute_zero_jax.types import Episode, Role

# Fields of `config.selfplay` that are fields of `phases.Rules` too.
_RULES = ('batch', 'mc_samples', 'references', 'solve_source', 'draw', 'recent_steps',
          'reference_draw', 'keep', 'refuse_duplicates', 'show_references', 'train_propose',
          'mc_use', 'solver_only_steps', 'solve_samples', 'refuse_independent', 'max_alike',
          'overlap')


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
    self._calls = 0                   # of the sampler in this iteration; part of their keys
    self._say = progress or (lambda text: None)
    self._console = console or metrics.Console(io.StringIO())
    # With `train.off_policy_steps`: the rows of the latest play, which the next one trains on.
    self._ahead: tuple[list[learner_lib.Row], learner_lib.Update] | None = None
    self._closers = contextlib.ExitStack()
    try:
      self._build(fresh)
    except BaseException:
      self.close()
      raise

  def _build(self, fresh: bool) -> None:
    c, start = self.c, time.perf_counter()
    self.prompts = prompts_lib.load(c.selfplay.prompts, c.selfplay.wrapper, c.selfplay.format_rule)
    self.kinds, self.rewards = parts.kinds(c), parts.rewards(c)
    prompts_lib.check(
        self.prompts, [k for k in self.kinds if type(k) in tasks.KINDS.values()],
        references=c.selfplay.references * c.selfplay.show_references,
        propose=c.command == 'seed' or c.selfplay.solver_only_steps < c.train.steps,
        solve=c.command != 'seed')
    algorithm, optimizer = parts.algorithm(c), parts.optimizer(c)
    lora.check_targets(c.lora.targets)          # with rank 0 too: a typo is found before it counts
    excludes = evaluate.excludes(c)
    if not callable(excludes):
      raise config_lib.ConfigError(f'selfplay.exclude={c.selfplay.exclude!r} is {excludes!r:.80}; '
                                   'it must be a function of a task.')
    self.executor = self._closers.enter_context(contextlib.closing(parts.executor(c)))
    self._say(f'executor: {self.executor.isolation}')

    self.mesh = parts.mesh(c)
    self.key = jax.random.key(c.seed)
    self.model, params, self.source = (parts.model(c, self.key, self.mesh) if fresh
                                       else parts.model_without_parameters(c))
    self.tokenizer = parts.tokenizer(c, self.source)
    self.tokenizer.check(self.model.vocab)
    count = _count(decoder.param_specs(self.model))
    self._say(f'model: {c.model.name}, {count / 1e6:.{1 if count < 1e7 else 0}f}M parameters, '
              f'{time.perf_counter() - start:.1f} s')
    for note in parts.notes(c, self.model, self.tokenizer, self.source):
      self._say(f'note: {note}')

    self.learner = parts.learner(c, self.model, self.mesh, algorithm, optimizer)
    self.sampler = parts.sampler(c, self.model, self.mesh, self.tokenizer)
    needs_base = c.lora.rank or 'base' in (c.roles.propose, c.roles.reference)
    if needs_base and params is None:
      params = parts.model(c, self.key, self.mesh)[1]
    self.base = params if needs_base else None
    # Random weights come from the seed, and from the machine in their last bits.
    self._base_checksum = checkpoint.checksum(self.base) if needs_base and self.source else None
    self.state = None if params is None else self._start(params)
    self._merged: tuple[int, Any] | None = None

    self.buffer = buffer_lib.TaskBuffer(
        [k.name for k in self.kinds], capacity=c.selfplay.buffer_size,
        eviction=c.selfplay.eviction, seed=c.seed)
    for kind in self.kinds:
      self.buffer.extend(kind.seeds())
    if fresh and c.selfplay.seeds:
      found, tried = (
          seeding.of_grammar(c.seed, c.seeding.tasks, self.kinds, self.executor.submit,
                             cases=c.selfplay.induction_cases) if c.selfplay.seeds == 'grammar'
          else seeding.load(c.selfplay.seeds, self.kinds, self.executor.submit))
      kept = [task for task in found if not excludes(task)]
      self.buffer.extend(kept)
      self._say(f'seeds: {len(found)} of {tried} tasks from {c.selfplay.seeds} passed validation'
                + f', {len(found) - len(kept)} are excluded' * (len(kept) < len(found)))
    self.rules = selfplay.Rules(max_prompt_tokens=c.sampler.max_prompt_tokens,
                                kind_batch=c.selfplay.kind_batch.to_dict(),
                                **{k: c.selfplay[k] for k in _RULES})
    self.tools = selfplay.Tools(kinds=self.kinds, prompts=self.prompts, tokenizer=self.tokenizer,
                                sample=self._sample, submit=self.executor.submit,
                                rewards=self.rewards, excludes=excludes,
                                shape=lambda task: (identity.shape(task.program) if task.program
                                                    else task.key))

  def params(self, role: Role | str) -> Any:
    """The weights that play `role`: the trained policy, or the frozen base."""
    return self.base if self.c.roles[Role(role).value] == 'base' else self.policy()

  def policy(self) -> Any:
    """The trained weights, LoRA adapters merged in; do not keep them across an update."""
    if not self.c.lora.rank:
      return self.state.params
    if self._merged is None or self._merged[0] != self.step:
      self._merged = self.step, lora.merge(self.base, self.state.params, alpha=self.c.lora.alpha)
    return self._merged[1]

  def iterate(self, on_proposal: Callable[[selfplay.Attempt], None] = lambda a: None) -> Iteration:
    """Plays one iteration and updates the policy; adds the valid proposals to the buffer.

    With `selfplay.updates` above 1 it plays and updates so often; all plays draw references and
    lagged tasks from the buffer as it was at the start. A play without a row to learn from (say, no
    task yet and no proposer to train) leaves the policy as it is and counts in the metric
    'train/updates_without_rows'. With `train.off_policy_steps` the update is that of the play
    before, see `_Behind`.
    """
    step, rounds = self.step + 1, self.c.selfplay.updates
    self._calls = 0
    timer, start = metrics.Timer(), time.perf_counter()
    before = self.sampler.stats()
    source = self.buffer.snapshot() if rounds > 1 else self.buffer
    results, updates, episodes = [], [], []
    behind = _Behind(self) if self.c.train.off_policy_steps else None

    def idle():
      with timer('update'):
        behind.dispatch()
    tools = self.tools if behind is None else self.tools._replace(idle=idle)
    for n in range(rounds):
      rng = np.random.default_rng([self.c.seed, step, n] if n else [self.c.seed, step])
      results.append(selfplay.iterate(
          step, self.buffer, tools, self.rules, rng, timer=timer, on_proposal=on_proposal,
          source=source, name=f'{step}.{n}' if n else ''))
      with timer('update'):
        played, update = (self._update if behind is None else behind.finish)(results[-1].episodes)
      episodes += played
      updates.append(update)
    result = selfplay.Result(*(sum(lists, []) for lists in zip(*results)))
    with timer('metrics'):
      numbers = summary.scalars(result, flag_words=self.c.log.flag_words,
                                learnability=self.c.reward.learnability)
      numbers |= summary.buffer_scalars(self.buffer)
    timer.seconds['iteration'] = time.perf_counter() - start
    self.step = step
    return Iteration(step, result, episodes, numbers | self._metrics(updates, timer, before))

  def score(self) -> list[dict[str, Any]]:
    """The policy's items on the held-out programs, see `evaluate.measure`; changes nothing."""
    shapes = self.sampler.shapes()
    items = evaluate.measure(self.c, self.tools, self.sampler, self.policy(),
                             console=self._console)
    # Or play would be served by the shapes of scoring, whose rounding is another.
    self.sampler.assume(shapes)
    return items

  def make_seeds(self, folder: epath.PathLike) -> dict[str, int]:
    """Lets the policy propose `seeding.tasks` seed tasks and writes them; tasks by file name.

    After every round the files hold what there is. Adds the tasks to the buffer.
    """
    c = self.c
    self._calls = 0
    def on_round(name, size):
      seeding.write(self.buffer, folder, c.seeding.tasks)
      self._say(f'seeds: {min(size, c.seeding.tasks)} of {c.seeding.tasks} {name}')
    seeding.generate(self.buffer, self.tools, self.rules, np.random.default_rng([c.seed, 0]),
                     count=c.seeding.tasks, patience=c.seeding.patience, timer=metrics.Timer(),
                     on_round=on_round)
    return seeding.write(self.buffer, folder, c.seeding.tasks)

  def host_state(self) -> dict[str, Any]:
    """What a checkpoint holds beside the arrays; JSON-able."""
    return {'step': self.step, 'prompts': self.prompts.hash, 'buffer': self.buffer.state(),
            'ahead': self._ahead and [dataclasses.asdict(row) for row in self._ahead[0]],
            'shapes': self.sampler.shapes(), 'base': self._base_checksum,
            'python': '.'.join(map(str, sys.version_info[:2]))}

  def arrays(self) -> dict[str, Any]:
    """What a checkpoint holds as arrays."""
    return {'train': self.state, 'key': np.asarray(jax.random.key_data(self.key))}

  def restore(self, checkpoints: checkpoint.Checkpoints, step: int) -> None:
    """Continues from a checkpoint of this run.

    Raises:
      checkpoint.CheckpointError: the checkpoint was made with other prompts, or base weights.
    """
    host = checkpoints.restore_host(step)
    for what, then, now in (
        (f'prompts than {self.c.selfplay.prompts!r}', host['prompts'], self.prompts.hash),
        (f'weights than model.name={self.c.model.name!r}', host.get('base'), self._base_checksum)):
      if then not in (None, now):         # None: without a base, or of an earlier version
        raise checkpoint.CheckpointError(f'checkpoint {step} was made with other {what} holds now; '
                                         'restore those files, or start a new --workdir.')
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
    # Checkpoints of earlier versions have no shapes, and no rows ahead.
    if 'shapes' in host:
      self.sampler.assume(host['shapes'])
    ahead = self.c.train.off_policy_steps and host.get('ahead')
    rows = [learner_lib.Row(**row) for row in ahead or ()]
    self._ahead = (rows, self._prepare(rows)) if rows else None

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

  def _update(self, episodes: list[Episode]) -> tuple[list[Episode], dict[str, float]]:
    """One update from the episodes that train; they come back with their advantages."""
    rows = [row_of(e) for e in episodes if e.train]
    if not rows:
      return episodes, {'updates_without_rows': 1.0}
    work = self._prepare(rows)
    return _with_advantages(episodes, work), self._dispatch(work)()

  def _prepare(self, rows: list[learner_lib.Row]) -> learner_lib.Update:
    reference = self.base if self.c.roles.reference == 'base' else None
    return self.learner.prepare(rows, self.state.params, frozen=self._frozen(),
                                reference=reference)

  def _dispatch(self, work: learner_lib.Update) -> Callable[[], dict[str, float]]:
    """Starts an update; the metrics it returns are a function that waits for it."""
    # The decode-layout weights are stale after the update: make room for the gradient.
    self.sampler.release()
    self._merged = None
    self.state, numbers = self.learner.dispatch(self.state, work, frozen=self._frozen())
    return lambda: numbers() | {'updates_without_rows': 0.0}

  def _frozen(self) -> Any:
    return self.base if self.c.lora.rank else None

  def _sample(self, role: Role, prompts, counts, stop_fn, on_finish, more=None):
    """`sample` of `phases.Tools`: by the weights that play the role, with a key of its own."""
    s = self.c.sampler
    self._calls += 1
    key = jax.random.fold_in(jax.random.fold_in(self.key, self.step + 1), self._calls)
    limits = {Role.PROPOSE: s.max_propose_tokens, Role.SOLVE: s.max_solve_tokens}
    def requests_of(pairs, role):
      return [sampler_lib.Request(prompt_ids=ids, samples=n, max_new_tokens=limits[role])
              for ids, n in pairs]
    requests = requests_of(zip(prompts, counts, strict=True), role)
    with self._console.bar(role.value, sum(counts), 'seq') as bar:
      def finished(sample):
        on_finish(sample)
        bar.update(1)
      def further():
        pairs = more()
        if pairs is None:
          return None
        bar.total += sum(n for _, n in pairs)
        return requests_of(pairs, Role.SOLVE)
      return self.sampler.generate(
          self.params(role), requests, key, temperature=s.temperature, top_k=s.top_k,
          top_p=s.top_p, min_p=s.min_p, stop_fn=stop_fn, on_finish=finished,
          more=None if more is None else further)

  def _metrics(self, updates, timer, before) -> dict[str, float]:
    after, out, mean = self.sampler.stats(), {}, metrics.Mean()
    for update in updates:
      for name, value in update.items():
        mean.add(f'train/{name}', value)
    out |= mean.result()
    out |= {f'time/{k}': v for k, v in timer.seconds.items() if k not in ('propose', 'solve')}
    out |= {f'sampler/{k}': v - before.get(k, 0) for k, v in after.items()}
    if out.get('sampler/slot_steps'):
      out['sampler/occupancy'] = out['sampler/live_steps'] / out['sampler/slot_steps']
    out['sampler/tokens_per_s'] = out['sampler/tokens'] / max(timer.seconds['decode'], 1e-9)
    out['compilations'] = self.sampler.compilations() + self.learner.compilations()
    out |= {f'executor/{k}': v for k, v in self.executor.stats().items()}
    return out


class _Behind:
  """An update one play behind: it runs while the executor checks the last answers of this play.

  So the rows of play t, which weights of t - 2 updates drew, change weights of t - 1 updates, and
  importance weights make up for that. The rows of the latest play wait in the checkpoint.
  """

  def __init__(self, run: Run):
    self._run = run
    self._numbers: Callable[[], dict[str, float]] | None = None

  def dispatch(self) -> None:
    """Starts the update, if there is one, and it has not been started."""
    if self._run._ahead is not None:
      _, work = self._run._ahead
      self._run._ahead = None
      self._numbers = self._run._dispatch(work)

  def finish(self, episodes: list[Episode]) -> tuple[list[Episode], dict[str, float]]:
    """Waits for the update, and keeps these episodes' rows for the next play."""
    self.dispatch()               # of a play that answered nothing
    numbers = self._numbers() if self._numbers else {'updates_without_rows': 1.0}
    rows = [row_of(e) for e in episodes if e.train]
    if rows:
      work = self._run._prepare(rows)
      self._run._ahead = rows, work
      episodes = _with_advantages(episodes, work)
    return episodes, numbers


def _with_advantages(episodes: list[Episode], work: learner_lib.Update) -> list[Episode]:
  advantages = iter(work.advantages)
  return [dataclasses.replace(e, advantage=tuple(map(float, next(advantages))))
          if e.train else e for e in episodes]


def row_of(e: Episode) -> learner_lib.Row:
  """The learner's view of an episode: its last turn."""
  turn = e.turns[-1]
  return learner_lib.Row(
      prompt_ids=turn.prompt_ids, response_ids=turn.response_ids,
      sampler_logprobs=turn.sampler_logprobs, model_logprobs=turn.model_logprobs, reward=e.reward,
      kind=e.kind, role=e.role.value, prompt=e.group)


def _count(specs: Any) -> int:
  leaves = jax.tree.leaves(specs, is_leaf=lambda s: hasattr(s, 'shape'))
  return sum(int(np.prod(s.shape)) for s in leaves)
