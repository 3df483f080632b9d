# SPDX-License-Identifier: Apache-2.0
"""The run: choices become objects in `Run`, then propose, solve, update, log, save.

  with Run(config) as run:
    result = run.iterate()          # one iteration of self-play and one update
    print(result.metrics['solve_deduction/accuracy'])

`run(config, workdir)` does this in a loop with checkpoints, logs, records and a summary; the
command line calls it. A killed run continues from its newest checkpoint with the same randomness:
iteration t draws only from the seed of the run, from t, and from what the checkpoint holds.
"""

from collections.abc import Callable
import contextlib
import dataclasses
import errno
import io
import os
import pathlib
import shutil
import signal
import time
from typing import Any, NamedTuple

from etils import epath
import jax
import numpy as np

from absolute_zero_jax import buffer as buffer_lib
from absolute_zero_jax import (
    buffer as buffer_lib,
    checkpoint,
    config as config_lib,
    executor,
    learner as learner_lib,
    metrics,
    records,
    reinforce,
    sampler as sampler_lib,
    scoring,
    selfplay,
    sharding,
    summary,
    tasks,
    tokenizer as tokenizer_lib,
)
from absolute_zero_jax import config as config_lib
from absolute_zero_jax import learner as learner_lib
from absolute_zero_jax import sampler as sampler_lib
from absolute_zero_jax import tokenizer as tokenizer_lib
from absolute_zero_jax.models import decoder, hf, hub, loading
from absolute_zero_jax.tasks import prompts as prompts_lib
from absolute_zero_jax.types import Episode, Role

# May change between the parts of one run; anything else belongs to another run.
FREE_FIELDS = ('train', 'log', 'checkpoint', 'mesh', 'executor', 'sampler.slots', 'sampler.chunk',
               'model.remat', 'model.attention')
_RULES = ('batch', 'mc_samples', 'references', 'solve_source', 'draw', 'recent_steps',
          'keep', 'refuse_duplicates', 'train_propose', 'mc_use')
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

  Raises:
    ValueError: before any work, for a config that cannot work; while loading, for a model,
      tokenizer or prompt set that is missing or broken.
  """

  def __init__(self, c: config_lib.ConfigDict, *, progress: Callable[[str], None] | None = None,
               console: metrics.Console | None = None, load_weights: bool = True):
    config_lib.validate(c)
    self.c = c
    self.step = 0
    self._say = progress or (lambda text: None)
    self._console = console or metrics.Console(io.StringIO())
    self._closers = contextlib.ExitStack()
    try:
      self._build(load_weights)
    except BaseException:
      self.close()
      raise

  def _build(self, load_weights: bool) -> None:
    """The only place where names in the config become objects."""
    c = self.c
    self.prompts = prompts_lib.load(c.selfplay.prompts)
    self.kinds = [self._kind(name) for name in c.selfplay.kinds]
    self.scoring = config_lib.load_object(
        c.reward.name, {'azr': scoring.Scoring}, 'reward.name')(
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
    self.model, params, self.source = self._load_model() if load_weights else self._shapes_only()
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
        micro_batch_tokens=c.train.micro_batch_tokens)
    self.sampler = sampler_lib.Sampler(
        self.model, self.mesh, pad_id=self.tokenizer.pad_id, stop_ids=self.tokenizer.stop_ids,
        slots=c.sampler.slots, chunk=c.sampler.chunk, dtype=c.model.dtype,
        attention=c.model.attention, vocab=self.tokenizer.vocab_size,
        max_prompt_tokens=c.sampler.max_prompt_tokens,
        max_new_tokens=max(c.sampler.max_propose_tokens, c.sampler.max_solve_tokens))
    self.state = None if params is None else self.learner.init(params)
    self.base = None
    if 'base' in (c.roles.propose, c.roles.reference):
      # A copy: the policy's own buffers are donated to the first update.
      self.base = jax.tree.map(jax.numpy.copy, params) if load_weights else self._load_model()[1]

    self.buffer = buffer_lib.TaskBuffer(
        c.selfplay.buffer_size, when_full=c.selfplay.eviction,
        reference_strategy=c.selfplay.reference_draw, seed=c.seed)
    for kind in self.kinds:
      self.buffer.extend(kind.seeds())
    self.rules = selfplay.Rules(max_prompt_tokens=c.sampler.max_prompt_tokens,
                                **{k: c.selfplay[k] for k in _RULES})
    self.tools = selfplay.Tools(kinds=self.kinds, prompts=self.prompts, tokenizer=self.tokenizer,
                                sample=self._sample, submit=self.executor.submit,
                                scoring=self.scoring)

  def params(self, role: Role) -> Any:
    """The weights that play `role`: the trained policy, or the frozen base."""
    return self.base if self.c.roles[role.value] == 'base' else self.state.params

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
      reference = self.base if self.c.roles.reference == 'base' else None
      work = self.learner.prepare([_row(e) for e in trained], self.state.params,
                                  reference=reference)
      self.state, update = self.learner.update(self.state, work)
    advantages = iter(work.advantages)
    episodes = [dataclasses.replace(e, advantage=tuple(map(float, next(advantages))))
                if e.train else e for e in result.episodes]
    timer.seconds['iteration'] = time.perf_counter() - start
    self.step = step
    return Iteration(step, result, episodes, self._metrics(result, update, timer, before))

  def host_state(self) -> dict[str, Any]:
    """What a checkpoint holds beside the arrays; JSON-able."""
    return {'step': self.step, 'prompts': self.prompts.hash, 'buffer': self.buffer.state(),
            'python': '.'.join(map(str, os.sys.version_info[:2]))}

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
      self.state = self.learner.init(sharding.zeros(
          decoder.param_specs(self.model), self.mesh, self.c.model.param_dtype))
    abstract = checkpoint.abstract_like(self.arrays())
    self.state = None                 # frees the memory that the restored arrays need
    arrays = checkpoints.restore_state(step, abstract)
    self.state = arrays['train']
    self.key = jax.random.wrap_key_data(arrays['key'])
    self.buffer = buffer_lib.TaskBuffer.from_state(host['buffer'])
    self.step = host['step']

  def export(self, path: epath.PathLike) -> None:
    """Writes the policy as a Hugging Face directory that `transformers` loads."""
    hf.save(self.model, self.state.params, path, tokenizer=self.tokenizer)

  def close(self) -> None:
    """Ends the executor and its processes; safe to call twice."""
    self._closers.close()

  def __enter__(self) -> 'Run':
    return self

  def __exit__(self, *_: Any) -> None:
    self.close()

  def _kind(self, name: str):
    c = self.c.selfplay
    options = {}
    if name == 'induction':
      options = {'num_inputs': c.induction_cases}
    elif name in tasks.KINDS:
      options = {'show_references': c.show_references}
    return tasks.get(name, **options | _plain(c.kind_options.get(name, config_lib.ConfigDict())))

  def _load_model(self):
    return loading.load(
        self.c.model.name, dtype=jax.numpy.dtype(self.c.model.param_dtype), key=self.key,
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
    out |= {f'buffer/{k.name}': self.buffer.size(k.name) for k in self.kinds}
    return out


def run(c: config_lib.ConfigDict, workdir: str | os.PathLike, *, stream=None) -> Run:
  """Trains until `train.steps`, continuing what `workdir` holds; returns the finished `Run`.

  Writes config.json, checkpoints/, tensorboard/, metrics.jsonl, episodes/ and, at the end, export/.
  """
  config_lib.validate(c)
  workdir = epath.Path(workdir)
  console = metrics.Console(stream)
  checkpoint.claim(workdir, config_lib.to_json(c), free=FREE_FIELDS,
                   differences=config_lib.differences)
  use_compilation_cache()
  with contextlib.ExitStack() as stack:
    checkpoints = checkpoint.Checkpoints(workdir, keep=c.checkpoint.keep)
    stack.callback(checkpoints.close)
    latest = checkpoints.latest()
    current = stack.enter_context(Run(c, progress=console.stamp, console=console,
                                      load_weights=latest is None))
    if latest is not None:
      current.restore(checkpoints, latest)
      console.stamp(f'continues after iteration {latest} of {c.train.steps}')
    writer = metrics.Writer(workdir, current.step + 1)
    stack.callback(writer.close)
    stack.enter_context(_terminate_as_interrupt())
    history = metrics.read_history(workdir, current.step)
    while current.step < c.train.steps:
      history.append(_one_step(current, workdir, writer, console, checkpoints))
    checkpoints.wait()
    if c.checkpoint.export:
      current.export(workdir / 'export')
    _print_summary(current, workdir, history, console)
    return current


def use_compilation_cache(path: str | os.PathLike = '') -> None:
  """Keeps compiled programs on disk, so that the next start compiles nothing it knows.

  Default place: $AZJ_CACHE_DIR/xla, else ~/.cache/absolute_zero_jax/xla.
  """
  root = os.environ.get('AZJ_CACHE_DIR') or pathlib.Path(
      os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache') / 'absolute_zero_jax'
  jax.config.update('jax_compilation_cache_dir', str(path or pathlib.Path(root) / 'xla'))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)


def _one_step(current: Run, workdir, writer, console, checkpoints) -> dict[str, float]:
  """One iteration with everything a run writes about it; returns its metrics."""
  c, step = current.c, current.step + 1
  shown = 0

  def on_proposal(attempt):
    nonlocal shown
    if attempt.status == 'ok' and shown < c.log.samples:
      shown += 1
      console.line(_proposal_text(attempt))

  trace = (jax.profiler.trace(str(workdir / 'profile')) if step == c.log.profile_step
           else contextlib.nullcontext())
  with trace:
    it = current.iterate(on_proposal)
  start = time.perf_counter()
  if step % c.checkpoint.every_steps == 0 or step == c.train.steps:
    _check_space(workdir, current.arrays())
    checkpoints.save(step, current.arrays(), current.host_state())
  records.write(workdir / 'episodes', step, it.episodes)
  it.metrics['time/save'] = time.perf_counter() - start
  it.metrics['time/iteration'] += it.metrics['time/save']
  writer.scalars(step, it.metrics)
  for name, text in summary.sample_texts(it.episodes, c.log.samples).items():
    writer.text(step, name, text)
  writer.flush()
  if step % c.log.every_steps == 0:
    console.stamp(summary.step_line(step, c.train.steps, it.metrics,
                                    [k.name for k in current.kinds]))
  return it.metrics


def _print_summary(current: Run, workdir, history, console) -> None:
  console.line('')
  console.line(f'{len(history)} iterations; means over all of them:')
  console.line(summary.final_table(history, [k.name for k in current.kinds]))
  console.line(f'time: {summary.time_line(history)}')
  tokens = sum(h['sampler/tokens'] for h in history)
  seconds = sum(h['time/decode'] for h in history)
  console.line(f'sampler: {tokens:.0f} tokens, {tokens / max(seconds, 1e-9):.0f} tokens/s; '
               f'tasks kept: '
               + ', '.join(f'{current.buffer.size(k.name)} {k.name}' for k in current.kinds))
  console.line(f'written to {workdir}: checkpoints/, tensorboard/, episodes/, metrics.jsonl'
               + (', export/ (Hugging Face format)' if current.c.checkpoint.export else ''))


def _proposal_text(attempt) -> str:
  task = attempt.task
  cases = '\n'.join(f'  f({i}) -> {o}' for i, o in task.cases)
  program = '\n'.join(f'    {line}' for line in task.program.splitlines())
  return f'  proposed {task.kind}:\n{program}\n{cases}'


def _row(e: Episode) -> learner_lib.Row:
  """The learner's view of an episode: its last turn."""
  turn = e.turns[-1]
  return learner_lib.Row(
      prompt_ids=turn.prompt_ids, response_ids=turn.response_ids,
      sampler_logprobs=turn.sampler_logprobs, model_logprobs=turn.model_logprobs, reward=e.reward,
      kind=e.kind, role=e.role.value, prompt=e.group)


def _check_space(workdir, arrays) -> None:
  """A full disk is better found before the write than in its middle."""
  if '://' in str(workdir):
    return
  need = sum(x.nbytes for x in jax.tree.leaves(arrays))
  free = shutil.disk_usage(str(workdir)).free
  if free < need * 1.05:
    raise OSError(errno.ENOSPC, f'no space for a checkpoint in {workdir}: it needs '
                  f'{need / 1e9:.2f} GB, {free / 1e9:.2f} GB are free. Free some, or lower '
                  'checkpoint.keep or set optimizer.moment_dtype=bfloat16')


@contextlib.contextmanager
def _terminate_as_interrupt():
  """SIGTERM (a preempted machine) ends the run like Ctrl-C: cleanly, with its children."""
  def handler(*_):
    raise KeyboardInterrupt
  try:
    old = signal.signal(signal.SIGTERM, handler)
  except ValueError:       # not the main thread, e.g. in a notebook's worker
    yield
    return
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, old)


def _count(specs: Any) -> int:
  leaves = jax.tree.leaves(specs, is_leaf=lambda s: hasattr(s, 'shape'))
  return sum(int(np.prod(s.shape)) for s in leaves)


def _plain(section: config_lib.ConfigDict) -> dict[str, Any]:
  return section.to_dict()
