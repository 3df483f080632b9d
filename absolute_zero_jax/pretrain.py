# SPDX-License-Identifier: Apache-2.0
"""Pre-trains a small model on generated programs until `train.steps`; the command line calls `run`.

  documents (a thread writes ahead) --Rows--> [jit] next-token loss -> optimizer --> export/
      ^---- guesses_STEP.jsonl <-- executor <-- sampler, after each of `pretrain.guess_steps`

A batch depends on the seed, the number of its step and the guesses alone, so a killed run goes on
from its newest checkpoint with the very numbers it would have had. A finished run continues with a
larger `train.steps`; the learning rate then follows the schedule of the new length.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
import contextlib
import functools
import os
import random
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from absolute_zero_jax import (
  checkpoint,
  documents,
  guesses,
  logprobs,
  metrics,
  optimizer,
  parts,
  sharding,
)
from absolute_zero_jax import config as config_lib
from absolute_zero_jax import learner as learner_lib
from absolute_zero_jax import sampler as sampler_lib
from absolute_zero_jax import train as train_lib
from absolute_zero_jax.models import decoder, hf, loading
from absolute_zero_jax.tasks import prompts as prompts_lib

_AHEAD = 4                       # batches written before they are asked for


def run(c: config_lib.ConfigDict, workdir: str | os.PathLike, *, stream=None) -> Any:
  """Pre-trains, continuing what `workdir` holds; returns the final `learner.TrainState`.

  Writes config.json, tensorboard/, metrics.jsonl, checkpoints/ and with each of them export/.

  Raises:
    ValueError: a config that cannot work, or a model that cannot be loaded.
  """
  config_lib.validate(c)
  workdir = metrics.absolute(workdir)
  console = metrics.Console(stream)
  parts.use_compilation_cache()
  model, _, source = parts.model_without_parameters(c)
  tokenizer = parts.tokenizer(c, source)
  tokenizer.check(model.vocab)
  documents.Writer(prompts_lib.load(c.selfplay.prompts), recipe(c))    # may refuse the prompts
  tx = optimizer.make_optimizer(steps=c.train.steps, **{
      k: v for k, v in c.optimizer.to_dict().items() if k not in ('clip_norm', 'accumulate_dtype')})
  with contextlib.ExitStack() as stack:
    raise_lost = stack.enter_context(train_lib.interrupts())
    stack.enter_context(checkpoint.owned(workdir))
    checkpoints = checkpoint.Checkpoints(workdir, keep=c.checkpoint.keep)
    stack.callback(checkpoints.close)
    latest = checkpoints.latest()
    checkpoint.claim(workdir, config_lib.to_json(c), differences=config_lib.differences,
                     free=train_lib.FREE_FIELDS if latest else None)
    state = start(c, tx)
    if latest is not None:
      checkpoints.restore_host(latest)                       # of this format?
      state = checkpoints.restore_state(latest, checkpoint.abstract_like(state))
      console.stamp(f'continues after step {latest} of {c.train.steps}')
    console.stamp(f'model: {sum(x.size for x in jax.tree.leaves(state.params)) / 1e6:.2f}M '
                  f'parameters; {c.pretrain.batch} x {c.pretrain.line_tokens} tokens a step')
    writer = metrics.Writer(workdir, (latest or 0) + 1)
    stack.callback(writer.close)
    compiled = compiled_step(model, tx, c)

    def update(state, batch):
      raise_lost()
      return compiled(state, batch)
    def save(step, state):
      checkpoints.save(step, state, {'step': step})
      if c.checkpoint.export:
        hf.save(model, state.params, workdir / 'export', tokenizer=tokenizer)
    if latest is None:                   # of another run, whose checkpoints are gone
      for path in workdir.glob('guesses_*.jsonl'):
        path.unlink()
    done = latest or 0
    for begin, end in stages(c):
      if done >= end:
        continue
      failed = _own_guesses(c, model, state, begin, done, workdir, tokenizer, console)
      with _written_ahead(make_batch(c, tokenizer, failed), done + 1, end) as batches:
        state = _train(c, state, update, batches, writer, console, save, end)
      done = end
    if c.checkpoint.export and latest == done:     # nothing was left to do; was it exported?
      hf.save(model, state.params, workdir / 'export', tokenizer=tokenizer)
    console.stamp(f'{workdir}/export holds the model' if c.checkpoint.export else 'done')
    return state


def start(c: config_lib.ConfigDict, tx) -> learner_lib.TrainState:
  """The weights that `model.name` says ('random:...' from the seed), and the optimizer's state."""
  _, params, _ = loading.load(c.model.name, dtype=jnp.dtype(c.model.param_dtype),
                              key=jax.random.key(c.seed))
  return learner_lib.TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))


def stages(c: config_lib.ConfigDict) -> list[tuple[int, int]]:
  """The steps done at the beginning and at the end of each stage; the model guesses in between."""
  ends = [*(n for n in c.pretrain.guess_steps if n < c.train.steps), c.train.steps]
  return list(zip([0, *ends], ends))


def recipe(c: config_lib.ConfigDict) -> documents.Recipe:
  """The mixture that the config asks for."""
  p = c.pretrain
  return documents.Recipe(
      depths=tuple(p.depths), propose=p.propose, induce=p.induce, questions=p.questions,
      think=p.think, think_prior=p.think_prior, prompt_weight=p.prompt_weight,
      references=p.references, cases=c.selfplay.induction_cases)


def make_batch(c: config_lib.ConfigDict, tokenizer, failed: Sequence[documents.Failed] = (),
               ) -> Callable[[int], documents.Rows]:
  """A function of the number of the step; held-out programs never occur in it.

  `failed` is what the model itself has guessed wrong, see `guesses`.
  """
  p = c.pretrain
  write = documents.Writer(prompts_lib.load(c.selfplay.prompts), recipe(c), failed)
  def make(step):
    return documents.rows(write, tokenizer, random.Random(f'pretrain {c.seed} {step}'),
                          (p.batch, p.line_tokens))
  return make


def compiled_step(model, tx, c: config_lib.ConfigDict) -> Callable[..., Any]:
  """(state, rows) -> (state, sums); the state is donated."""
  hidden = functools.partial(decoder.hidden, model, dtype=jnp.dtype(c.model.dtype),
                             remat=c.model.remat, attention=c.model.attention)

  def loss_of(params, batch):
    hidden_BTD = hidden(params, batch.tokens_BT, batch.positions_BT, batch.segments_BT)
    before_ND = hidden_BTD[:, :-1].reshape(-1, hidden_BTD.shape[-1])
    logprob_N, _ = logprobs.score(before_ND, decoder.unembed(params),
                                  batch.tokens_BT[:, 1:].reshape(-1))
    weight_N = batch.weights_BT[:, 1:].reshape(-1)
    # An opening of thoughts, which weighs less, counts with the prompts here.
    answer_N = (weight_N >= 1).astype(jnp.float32)
    sums = {'answer': -jnp.sum(answer_N * logprob_N), 'answers': jnp.sum(answer_N),
            'prompt': -jnp.sum((weight_N > 0) * (1 - answer_N) * logprob_N),
            'prompts': jnp.sum((weight_N > 0) * (1 - answer_N))}
    return -jnp.sum(weight_N * logprob_N) / jnp.sum(weight_N), sums

  def step(state, batch):
    gradient, sums = jax.grad(loss_of, has_aux=True)(state.params, batch)
    norm = optax.tree.norm(gradient)
    scale = jnp.minimum(1, c.optimizer.clip_norm / jnp.maximum(norm, 1e-30))
    gradient = jax.tree.map(lambda g: g.astype(jnp.float32) * scale, gradient)
    change, opt_state = tx.update(gradient, state.opt_state, state.params)
    # As the learner does: bfloat16 weights are rounded at random.
    wide = jax.tree.map(lambda p, d: p.astype(jnp.float32) + d, state.params, change)
    key = jax.random.fold_in(jax.random.key(1), state.step)
    params = optimizer.round_tree(wide, state.params, key)
    return learner_lib.TrainState(state.step + 1, params, opt_state), sums | {'norm': norm}

  return jax.jit(step, donate_argnums=(0,),
                 compiler_options=sharding.compiler_options(dtype=c.model.dtype))


def _own_guesses(c, model, state, begin, done, workdir, tokenizer, console):
  """What the model guessed wrong at the beginning of a stage, from its file once it is written."""
  if not begin:
    return ()
  path = workdir / f'guesses_{begin}.jsonl'
  if path.exists():
    return guesses.read(path)
  if done > begin:
    raise ValueError(f'{path} is missing, which was written after step {begin}; put it back or '
                     'begin in another workdir.')
  console.stamp(f'asks {c.pretrain.guess_count} inductions for wrong guesses')
  sampler = sampler_lib.Sampler(
      model, None, pad_id=tokenizer.pad_id, stop_ids=tokenizer.stop_ids, slots=128,
      dtype=c.model.dtype, attention=c.model.attention, vocab=tokenizer.vocab_size,
      max_prompt_tokens=c.pretrain.line_tokens, max_new_tokens=guesses.MAX_TOKENS)
  rows = guesses.ROUNDS * len(guesses.TEMPERATURES) * c.pretrain.guess_count
  with contextlib.closing(parts.executor(c)) as executor, console.bar('guess', rows, 'seq') as bar:
    made = guesses.make(
        state.params, jax.random.fold_in(jax.random.key(c.seed), done), seed=f'{c.seed} {done}',
        count=c.pretrain.guess_count, sampler=sampler, tokenizer=tokenizer,
        prompts=prompts_lib.load(c.selfplay.prompts), recipe=recipe(c), submit=executor.submit,
        progress=lambda _, finished, __: bar.update(finished - bar.n))
  guesses.write(path, made)
  console.stamp(f'{sum(len(x.checks) for x in made)} wrong guesses at {len(made)} inductions')
  return made


def _train(c, state, update, batches, writer, console, save, end):
  """The steps of a stage that are left, up to `end`; logs means over `log.every_steps`."""
  sums: list[Any] = []
  since = time.perf_counter()
  for step, batch in batches:
    state, found = update(state, batch)
    sums.append(found)
    if step % c.log.every_steps == 0 or step == c.train.steps:
      values = _means(jax.device_get(sums))
      tokens = len(sums) * c.pretrain.batch * c.pretrain.line_tokens
      values['tokens_per_s'] = tokens / (time.perf_counter() - since)
      writer.scalars(step, {f'pretrain/{k}': v for k, v in values.items()})
      writer.flush()
      console.stamp(f'{step}/{c.train.steps}  answers {values["answer"]:.4f}  prompts '
                    f'{values["prompt"]:.4f} nats/token  norm {values["norm"]:.2f}  '
                    f'{values["tokens_per_s"]:.0f} tokens/s')
      sums, since = [], time.perf_counter()
    if step % c.checkpoint.every_steps == 0 or step == end:
      save(step, state)
  return state


def _means(sums: list[dict[str, np.ndarray]]) -> dict[str, float]:
  total = {k: float(np.sum([s[k] for s in sums], dtype=np.float64)) for k in sums[0]}
  return {'answer': total['answer'] / max(total['answers'], 1),
          'prompt': total['prompt'] / max(total['prompts'], 1), 'norm': total['norm'] / len(sums)}


@contextlib.contextmanager
def _written_ahead(make: Callable[[int], documents.Rows], first: int,
                   last: int) -> Iterator[Iterator[tuple[int, documents.Rows]]]:
  """(step, batch) from `first` to `last`, made in a thread while earlier ones are computed."""
  # Not as a context manager, which at an interrupt would wait for a batch that may never come.
  pool = futures.ThreadPoolExecutor(1)

  def batches():
    waiting = [pool.submit(make, step) for step in range(first, min(first + _AHEAD, last + 1))]
    for step in range(first, last + 1):
      batch = waiting.pop(0).result()
      if step + _AHEAD <= last:
        waiting.append(pool.submit(make, step + _AHEAD))
      yield step, batch
  try:
    yield batches()
  finally:
    pool.shutdown(wait=False, cancel_futures=True)
