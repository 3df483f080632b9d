# SPDX-License-Identifier: Apache-2.0
"""The training loop: play, score, log, save, until `train.steps`; the command line calls `run`.

A killed run continues from its newest checkpoint; what it had written about later iterations is
written again, with the same content.
"""

import contextlib
import errno
import math
import os
import shutil
import signal
import tempfile
import time
from typing import Any

from etils import epath
import jax

from absolute_zero_jax import checkpoint, evaluate, metrics, parts, records, report, summary
from absolute_zero_jax import config as config_lib
from absolute_zero_jax.run import Run

# May change between the parts of one run; anything else belongs to another run.
FREE_FIELDS = ('train', 'log', 'checkpoint', 'mesh', 'executor.workers',
               'executor.min_isolation', 'sampler.slots', 'sampler.min_slots', 'sampler.chunk',
               'sampler.cache_block', 'sampler.prompt_block', 'sampler.max_programs',
               'sampler.cpu_devices', 'model.remat', 'model.attention')


def run(c: config_lib.ConfigDict, workdir: str | os.PathLike, *, stream=None) -> Run:
  """Trains until `train.steps`, continuing what `workdir` holds; returns the finished `Run`.

  Writes config.json, checkpoints/, tensorboard/, metrics.jsonl, episodes/ and, at the end, export/;
  with `heldout.every_steps` also heldout/. `train.minutes` may end it earlier, in the same way.
  With `command='seed'` it trains nothing and writes seeds/ instead.
  """
  config_lib.validate(c)
  workdir = metrics.absolute(workdir)
  console = metrics.Console(stream)
  budget = _Budget(c.train.minutes)
  parts.use_compilation_cache()
  parts.show_cpu_devices(c)
  with contextlib.ExitStack() as stack:
    raise_lost = stack.enter_context(interrupts())
    stack.enter_context(checkpoint.owned(workdir))
    checkpoints = checkpoint.Checkpoints(workdir, keep=c.checkpoint.keep)
    stack.callback(checkpoints.close)
    latest = checkpoints.latest()
    # Without a checkpoint there is no run to protect, only a first try that failed.
    checkpoint.claim(workdir, config_lib.to_json(c), free=FREE_FIELDS if latest else None,
                     differences=config_lib.differences)
    if latest is None:                 # what a run without checkpoints left is not this one's
      _clear(workdir, 'heldout/*.jsonl', 'episodes/*.gz')
    current = stack.enter_context(Run(c, progress=console.stamp, console=console,
                                      fresh=latest is None))
    if c.command == 'seed':
      _seed(current, workdir / 'seeds', console)
      return current
    if latest is not None:
      current.restore(checkpoints, latest)
      console.stamp(f'continues after iteration {latest} of {c.train.steps}')
    # Row 0 is the base's score.
    writer = metrics.Writer(workdir, current.step + (latest is not None))
    stack.callback(writer.close)
    # Rows of a first try that failed are none of this run's.
    history = [] if latest is None else metrics.read_history(workdir, current.step)
    budget.score_s = next((row['time/heldout'] for row in reversed(history)
                           if 'time/heldout' in row), 0.0)
    if current.step < c.train.steps:
      console.stamp('plays; the first iteration also compiles, which a second start need not')
    if latest is None and c.heldout.every_steps:
      scores = _score(current, workdir, console, budget)
      history.append({'step': 0} | scores)
      writer.scalars(0, scores)
      writer.flush()
    more = current.step < c.train.steps
    while more:
      raise_lost()
      row, more = _one_step(current, workdir, writer, console, checkpoints, budget)
      history.append({'step': current.step} | row)
    checkpoints.wait()
    if current.step < c.train.steps:
      console.stamp(f'train.minutes={c.train.minutes:g} are over after iteration {current.step}; '
                    'the same command plays on for as long')
    if c.checkpoint.export:
      _export(current, workdir / 'export')
    _print_summary(current, workdir, history, console)
    return current


def _clear(folder: epath.Path, *patterns: str) -> None:
  for pattern in patterns:
    for path in folder.glob(pattern):
      path.unlink(missing_ok=True)


def _seed(current: Run, folder: epath.Path, console) -> None:
  wanted = current.c.seeding.tasks
  made = current.make_seeds(folder)
  for path in folder.glob('*.jsonl'):
    if path.name not in made:            # of another seed run; a play would read it, too
      path.unlink()
  for name, count in made.items():
    console.line(f'{folder / name}: {count} tasks'
                 + (f'; {wanted} were asked for, see seeding.patience' * (count < wanted)))
  console.line(f'Play on from them with --config.selfplay.seeds={folder}')


class _Budget:
  """`train.minutes` from now on: whether one more iteration fits in, and a scoring after it."""

  def __init__(self, minutes: float):
    self._end = time.perf_counter() + 60 * minutes if minutes else math.inf
    self.score_s = 0.0                # of the latest scoring

  def allows(self, iteration_s: float, scorings: int) -> bool:
    return time.perf_counter() + iteration_s + scorings * self.score_s < self._end


def _score(current: Run, workdir, console, budget: _Budget) -> dict[str, float]:
  """Scores the policy on the held-out programs; writes all items, returns the scalars."""
  start = time.perf_counter()
  items = current.score()
  folder = workdir / 'heldout'
  folder.mkdir(parents=True, exist_ok=True)
  evaluate.write_items(folder / f'{current.step:06d}.jsonl', items)
  budget.score_s = time.perf_counter() - start
  scores = evaluate.summarize(items)
  console.stamp(f'held out, iteration {current.step}: {evaluate.line(scores)}')
  return evaluate.scalars(scores) | {'time/heldout': budget.score_s}


def _one_step(current: Run, workdir, writer, console, checkpoints,
              budget: _Budget) -> tuple[dict[str, Any], bool]:
  """One iteration with everything a run writes about it: its metrics, and whether to go on."""
  c, step = current.c, current.step + 1
  shown = 0

  def on_proposal(attempt):
    nonlocal shown
    if attempt.status == 'ok' and shown < c.log.samples and step % c.log.every_steps == 0:
      shown += 1
      console.stamp(_proposal_text(attempt))

  trace = (jax.profiler.trace(str(workdir / 'profile')) if step == c.log.profile_step
           else contextlib.nullcontext())
  with trace:
    it = current.iterate(on_proposal)
  every = c.heldout.every_steps
  scores = bool(every) and step % every == 0
  more = step < c.train.steps and budget.allows(it.metrics['time/iteration'], scores + bool(every))
  if scores or every and not more:
    it.metrics.update(_score(current, workdir, console, budget))
  # What is logged comes first: a checkpoint promises that its iterations are on disk. So an
  # iteration's time to save is that of the checkpoint before it.
  it.metrics['time/save'] = current.save_s
  it.metrics['time/iteration'] += current.save_s
  records.write(workdir / 'episodes', step, it.episodes)
  writer.scalars(step, it.metrics)
  for name, text in summary.sample_texts(it.episodes, c.log.samples).items():
    writer.text(step, name, text)
  writer.flush()
  start = time.perf_counter()
  if step % c.checkpoint.every_steps == 0 or not more:
    _check_space(workdir, current.arrays())
    checkpoints.save(step, current.arrays(), current.host_state())
  current.save_s = time.perf_counter() - start
  if step % c.log.every_steps == 0:
    console.stamp(summary.step_line(step, c.train.steps, it.metrics,
                                    [k.name for k in current.kinds]))
  return it.metrics, more


def _export(current: Run, path: epath.Path) -> None:
  """Exports to a local folder, or to a remote one through a temporary one."""
  if '://' not in str(path):
    current.export(path)
    return
  with tempfile.TemporaryDirectory() as folder:
    local = epath.Path(folder) / 'export'
    current.export(local)
    path.mkdir(parents=True, exist_ok=True)
    for file in local.iterdir():
      file.copy(path / file.name, overwrite=True)


def _print_summary(current: Run, workdir, history, console) -> None:
  console.line('')
  if current.c.heldout.every_steps:
    try:
      console.line(report.write(workdir, history) + '\n')
    except ValueError as e:       # someone's hand in heldout/ or metrics.jsonl; the rest is whole
      console.line(f'note: no report: {e}\n')
  history = [h for h in history if h['step']]
  console.line(f'{len(history)} iterations; means over all of them:')
  console.line(summary.final_table(history, [k.name for k in current.kinds]))
  console.line(f'time: {summary.time_line(history)}')
  tokens = sum(h['sampler/tokens'] for h in history)
  seconds = sum(h['time/decode'] for h in history)
  console.line(f'sampler: {tokens:.0f} tokens, {tokens / max(seconds, 1e-9):.0f} tokens/s; '
               f'tasks kept: '
               + ', '.join(f'{n} {kind}' for kind, n in current.buffer.sizes().items()))
  console.line(f'written to {workdir}: checkpoints/, tensorboard/, episodes/, metrics.jsonl'
               + (', export/ (Hugging Face format)' if current.c.checkpoint.export else ''))


def _proposal_text(attempt) -> str:
  task = attempt.task
  cases = '\n'.join(f'  f({i}) -> {o}' for i, o in task.cases)
  program = '\n'.join(f'    {line}' for line in task.program.splitlines())
  return f'proposed {task.kind}:\n{program}\n{cases}'


def _check_space(workdir, arrays) -> None:
  """A full disk is better found before the write than in its middle."""
  if '://' in str(workdir):
    return
  need = sum(x.nbytes for x in jax.tree.leaves(arrays))
  free = shutil.disk_usage(str(workdir)).free
  if free < need * 1.05:
    raise OSError(errno.ENOSPC, f'no space for a checkpoint in {workdir}: it needs '
                  f'{need / 1e6:.0f} MB, {free / 1e6:.0f} MB are free. Free some, or lower '
                  'checkpoint.keep or set optimizer.moment_dtype=bfloat16')


@contextlib.contextmanager
def interrupts():
  """SIGTERM (a preempted machine) ends the run like Ctrl-C: cleanly, with its children.

  Yields what raises an interrupt again that was lost: Python drops what a handler raises while the
  garbage collector calls back, as it does JAX.
  """
  seen: list[int] = []
  def handler(number, _):
    seen.append(number)
    for later in old:      # once is enough: another would break what cleans up
      signal.signal(later, signal.SIG_IGN)
    raise KeyboardInterrupt
  def raise_lost():
    if seen:
      raise KeyboardInterrupt
  old = {}
  try:
    for number in (signal.SIGTERM, signal.SIGINT):
      old[number] = signal.signal(number, handler)
  except ValueError:       # not the main thread, e.g. in a notebook's worker
    yield raise_lost
    return
  try:
    yield raise_lost
  finally:
    for number, before in old.items():
      signal.signal(number, before)


