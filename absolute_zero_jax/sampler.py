# SPDX-License-Identifier: Apache-2.0
"""Text generation by continuous batching: requests in, samples out as they finish.

    requests -> rows -> queue --refill--> slots of one running batch --chunk--> tokens --> samples
                          prompts are prefilled once, shared        host looks between chunks

Rows that finish leave; waiting ones take their slots; when none wait, the batch shrinks to the next
power of two. Caches grow along a ladder of sizes. What a row draws depends on the parameters, its
prompt and its key alone, not on the rows beside it (float rounding aside). `batching` decides what
runs next, `decoding` is the device code. Of the parameters only a decode-layout copy of the latest
ones outlives a call (`Sampler.release` drops it).
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import math
import time
from typing import Any
import weakref

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from absolute_zero_jax import batching, decoding, sampling, schedule, sharding
from absolute_zero_jax.models import decoder
from absolute_zero_jax.models.config import ModelConfig

StopFn = Callable[[int, tuple[int, ...]], int | None]


@dataclasses.dataclass(frozen=True)
class Request:
  """A prompt and how many samples of it are wanted.

  `max_new_tokens` 0 takes the sampler's. `stream` selects the random numbers; -1 means the
  request's index in the call. Samples of one request differ by their sample number.
  """
  prompt_ids: tuple[int, ...]
  samples: int = 1
  max_new_tokens: int = 0
  stream: int = -1


@dataclasses.dataclass(frozen=True)
class Sample:
  """One finished response. A stop token is its last id; log-probs are per id.

  `sampler_logprobs` are under the distribution drawn from (temperature, truncation; 0 if greedy),
  `model_logprobs` under the model itself, as a trainer would compute them.
  """
  request: int
  sample: int
  ids: tuple[int, ...]
  sampler_logprobs: tuple[float, ...]
  model_logprobs: tuple[float, ...]
  finish: str


class Sampler:
  """Generates for one model config; owns compiled programs and the decode-layout weights.

  Args:
    pad_id: never drawn, unless it ends a response too.
    stop_ids: each ends a response, whose last id it is.
    slots: rows in the running batch, rounded up to a power of two; memory is that of so many caches
      of the longest live row.
    min_slots: fewest rows of the running batch, however few are left: each width is a program.
    chunk: decode steps between two looks of the host.
    cache_block: smallest cache size; further sizes are 1.5, 2, 3, 4, ... times it.
    prompt_block: prompts are padded to sizes that grow likewise from this one; a beginning that
      several prompts share is prefilled once if it has as many tokens.
    max_prompt_tokens, max_new_tokens: bounds of every request.
    attention: of prefill, see `models.attention`.
    dtype: of matrices, activations and cache while generating (on a CPU, the cache is float32).
    vocab: ids from here on are never drawn (a table padded beyond the tokenizer); 0: all may be.
    max_programs: how many decode shapes, and how many prefill shapes, may be compiled before larger
      compiled ones are reused.

  Raises ValueError for sizes below 1, and stop or pad ids outside the vocabulary.
  """

  def __init__(self, config: ModelConfig, mesh: Mesh | None = None, *, pad_id: int,
               stop_ids: Sequence[int], slots: int = 64, min_slots: int = 1, chunk: int = 16,
               cache_block: int = 64, prompt_block: int = 32, max_prompt_tokens: int = 1024,
               max_new_tokens: int = 512, dtype: Any = jnp.float32, attention: str = 'xla',
               vocab: int = 0, max_programs: int = 32):
    sizes = {'slots': slots, 'min_slots': min_slots, 'chunk': chunk, 'cache_block': cache_block,
             'prompt_block': prompt_block, 'max_prompt_tokens': max_prompt_tokens,
             'max_new_tokens': max_new_tokens, 'max_programs': max_programs}
    for name, value in sizes.items():
      if value < 1:
        raise ValueError(f'{name}={value} must be at least 1.')
    for name, ids in (('pad_id', [pad_id]), ('stop_ids', sorted(stop_ids))):
      for i in ids:
        if not 0 <= i < config.vocab:
          raise ValueError(f'{name}={i} is outside the vocabulary of {config.vocab}.')
    if not 0 <= vocab <= config.vocab:
      raise ValueError(f'vocab={vocab} must be 0 (all) to {config.vocab}, what the model has.')
    self.config, self.mesh, self.dtype = config, mesh, jnp.dtype(dtype)
    self.max_prompt_tokens, self.max_new_tokens = max_prompt_tokens, max_new_tokens
    self._widths = min(min_slots, slots), schedule.width(slots, sharding.row_shards(mesh))
    self._allowed_V = np.arange(config.vocab) < (vocab or config.vocab)
    self._allowed_V[pad_id] = pad_id in stop_ids
    if not self._allowed_V.any():
      raise ValueError(f'vocab={vocab} with pad_id={pad_id} leaves no token to draw.')
    self._stops_E = np.array(sorted(stop_ids) or [-1], np.int32)
    prompt_sizes = schedule.ladder(prompt_block, max_prompt_tokens)
    # A ring must hold a padded prefix and a padded prompt behind it.
    longest = 2 * prompt_sizes[-1] + max_new_tokens + chunk
    self._programs = batching.Programs(config, mesh, self.dtype, attention, chunk, max_programs,
                                       prompt_sizes, schedule.ladder(cache_block, longest))
    self._prepared: tuple[list, decoder.Params, decoding.Weights] | None = None

  def generate(self, params: decoder.Params, requests: Sequence[Request], key: jax.Array, *,
               temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0,
               stop_fn: StopFn | None = None,
               on_finish: Callable[[Sample], None] | None = None,
               more: Callable[[], Sequence[Request] | None] | None = None,
               progress: Callable[[int, int, int], None] | None = None) -> list[list[Sample]]:
    """Samples of each request, in the order of the requests.

    Calls with different keys share no noise; the same key repeats the call. `temperature` 0 is
    greedy. After each chunk, `stop_fn(request, ids)` sees every row that grew, with its response so
    far, and may return how many of its tokens to keep: the row then ends with finish 'stop'.
    `on_finish(sample)` is called as rows end; `progress(tokens, finished, rows)` after each chunk.
    Before each chunk `more()` may give further requests, which are numbered on from the first ones,
    or None once none will follow.

    Raises ValueError for an empty or too long prompt, ids outside the vocabulary, more new tokens
    than the sampler's maximum (before any work on the requests concerned), sampling parameters out
    of range, and a key that is none.
    """
    rows = self._rows(requests)
    opts = sampling.options(temperature, top_k, top_p, min_p)
    if not hasattr(key, 'dtype'):
      raise ValueError(f'key={key!r:.80} is no key; make one, such as jax.random.key(0).')
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
      key = jax.random.wrap_key_data(key)      # of the older kind, jax.random.PRNGKey(0)
    stats = self._programs.stats
    started = time.perf_counter()
    params, weights = self._prepare(params)
    stats['prepare_s'] += time.perf_counter() - started
    results = [[None] * request.samples for request in requests]
    batch = batching.Batch(self._programs, params, weights, rows, self._widths, key, opts,
                           self._allowed_V, self._stops_E)
    tokens = finished = 0
    while more is not None or batch.busy():
      if more is not None:
        added = more()
        if added is None:
          more = None
        elif added:
          batch.add(self._rows(added, first=len(results)))
          results += [[None] * request.samples for request in added]
      if not batch.busy():
        continue
      batch.refill()
      batch.fit()
      grown = batch.decode()
      started = time.perf_counter()
      for slot, row, added, stopped in grown:
        tokens += added
        reason = _end(row, stopped, stop_fn)
        if reason is None:
          continue
        if not all(map(math.isfinite, row.model)):
          raise ValueError('the parameters give logits that are no finite numbers; some of them '
                           'may be NaN, or too large for the dtype.')
        batch.free(slot)
        finished += 1
        stats['tokens'] += len(row.ids)
        sample = Sample(row.request, row.sample, tuple(row.ids), tuple(row.sampler),
                        tuple(row.model), reason)
        results[row.request][row.sample] = sample
        if on_finish is not None:
          on_finish(sample)
      if progress is not None:
        progress(tokens, finished, sum(map(len, results)))
      stats['host_s'] += time.perf_counter() - started
    return results

  def compilations(self) -> int:
    """Programs compiled so far."""
    return len(self._programs.compiled)

  def shapes(self) -> dict[str, list[tuple]]:
    """The sizes of decoding and prefill met so far, which say what serves once there are many."""
    return {name: list(met) for name, met in self._programs.shapes.items()}

  def assume(self, shapes: dict[str, list[tuple]]) -> None:
    """Goes on from the `shapes` of another sampler, which may have been through JSON."""
    self._programs.shapes = {name: [tuple(shape) for shape in met] for name, met in shapes.items()}

  def stats(self) -> dict[str, float]:
    """Totals since construction: tokens, seconds by phase, and the share of slots in use.

    `prompt_tokens` are those of all rows, `prefill_tokens` those computed after sharing. Seconds
    of prepare, prefill and decode include those of compiling (`compile_s`).
    """
    totals = {name: 0.0 for name in ('tokens', 'prompt_tokens', 'prefill_tokens', 'prepare_s',
                                     'prefill_s', 'decode_s', 'host_s', 'compile_s', 'steps',
                                     'live_steps', 'slot_steps')}
    totals |= {k: float(v) for k, v in self._programs.stats.items()}
    totals['occupancy'] = totals['live_steps'] / max(totals['slot_steps'], 1.0)
    totals['programs'] = float(self.compilations())
    return totals

  def release(self) -> None:
    """Frees the decode-layout weights; the next call makes them again."""
    self._prepared = None

  def _rows(self, requests, first=0):
    rows = []
    for i, request in enumerate(requests, first):
      prompt = tuple(int(token) for token in request.prompt_ids)
      if not 1 <= len(prompt) <= self.max_prompt_tokens:
        raise ValueError(f'request {i} has a prompt of {len(prompt)} tokens; allowed are 1 to '
                         f'max_prompt_tokens={self.max_prompt_tokens}.')
      if min(prompt) < 0 or max(prompt) >= self.config.vocab:
        raise ValueError(f'request {i} has token ids from {min(prompt)} to {max(prompt)}; the '
                         f'vocabulary is 0 to {self.config.vocab - 1}.')
      for name in ('samples', 'max_new_tokens', 'stream'):
        value = getattr(request, name)
        if not isinstance(value, int | np.integer) or not -2**31 <= value < 2**31:
          raise ValueError(f'request {i}: {name}={value!r} must be an integer of 32 bits.')
      most = request.max_new_tokens or self.max_new_tokens
      if not 1 <= most <= self.max_new_tokens:
        raise ValueError(f'request {i} asks for max_new_tokens={most}; allowed are 1 to the '
                         f"sampler's max_new_tokens={self.max_new_tokens}.")
      if request.samples < 1:
        raise ValueError(f'request {i} asks for samples={request.samples}; at least 1.')
      stream = i if request.stream < 0 else request.stream
      rows += [batching.Row(i, s, stream, prompt[:-1], prompt[-1], most)
               for s in range(request.samples)]
      self._programs.stats['prompt_tokens'] += len(prompt) * request.samples
    return rows

  def _prepare(self, params):
    """(params on the devices, decode weights), made once per parameter tree."""
    leaves = jax.tree.leaves(params)
    if self._prepared is not None:
      known, placed, weights = self._prepared
      if len(known) == len(leaves) and all(ref() is x for ref, x in zip(known, leaves)):
        return params if placed is None else placed, weights
    self._prepared = None        # frees the old copy before the new one is made
    placed = None
    if self.mesh is not None and any(
        not isinstance(x, jax.Array) or x.sharding.device_set != set(self.mesh.devices.flat)
        for x in leaves):
      specs = decoder.param_specs(self.config)
      placed = sharding.place(params, sharding.shardings(specs, self.mesh))
    elif not all(isinstance(x, jax.Array) for x in leaves):
      placed = jax.tree.map(jnp.asarray, params)
    used = params if placed is None else placed
    weights = self._programs.call(('weights', batching.layout(used)), functools.partial(
        decoding.weights, self.config, dtype=self.dtype, mesh=self.mesh), used)
    # Weak references: the trainer's old parameters must be free to go.
    self._prepared = [_reference(x) for x in leaves], placed, weights
    return used, weights


def _end(row, stopped, stop_fn):
  """Why the row ends here, or None; cuts what `stop_fn` does not keep."""
  reason = 'stop' if stopped else 'length' if len(row.ids) == row.most else None
  keep = None if stop_fn is None else stop_fn(row.request, tuple(row.ids))
  if keep is None:
    return reason
  if not 0 <= keep <= len(row.ids):
    raise ValueError(f'stop_fn keeps {keep} tokens of a response of {len(row.ids)}; return None '
                     'or a number of tokens that exist.')
  for values in (row.ids, row.sampler, row.model):
    del values[keep:]
  return 'stop'


def _reference(x):
  """Weak where possible; NumPy arrays may change in place, so they never count as the same."""
  return weakref.ref(x) if isinstance(x, jax.Array) else lambda: None
