# SPDX-License-Identifier: Apache-2.0
"""Text generation by continuous batching: requests in, samples out as they finish.

    requests -> rows -> queue --refill--> slots of one running batch --chunk--> tokens --> samples
                          prompts are prefilled once, shared        host looks between chunks

Rows that finish leave; waiting ones take their slots; when none wait, the batch shrinks to the next
power of two. Caches grow along a ladder of sizes. What a row draws depends on the parameters, its
prompt and its key alone, not on the rows beside it (float rounding aside). All device code is in
`decoding`; this file decides what runs, and holds no parameters longer than a call needs them,
except the decode-layout copy of the latest ones (`Sampler.release` drops it).
"""

import collections
import dataclasses
import functools
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from absolute_zero_jax import decoding, sampling, schedule, sharding
from absolute_zero_jax.models import decoder
from absolute_zero_jax.models.config import ModelConfig

_SHORTEST_PREFIX = 32           # a shared prefix below this is recomputed with each prompt
_PREFILL_TOKENS = 4096          # at most this many prompt tokens in one prefill call
_SHORTEST_PROMPT = 32           # prompts are padded to a ladder that starts here

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


@dataclasses.dataclass
class _Row:
  request: int
  sample: int
  stream: int
  context: tuple[int, ...]       # all prompt tokens but the last, which the first step reads
  last: int
  most: int
  ids: list[int] = dataclasses.field(default_factory=list)
  sampler: list[float] = dataclasses.field(default_factory=list)
  model: list[float] = dataclasses.field(default_factory=list)

  @property
  def length(self) -> int:
    """Tokens in the cache: the newest one is read by the next step."""
    return len(self.context) + len(self.ids)


class Sampler:
  """Generates for one model config; owns compiled programs and the decode-layout weights.

  Attributes set at construction:
    slots: rows in the running batch; memory is that of `slots` caches of the longest live row.
    chunk: decode steps between two looks of the host.
    cache_block: smallest cache size; further sizes are 1.5, 2, 3, 4, ... times it.
    dtype: of weights, activations and cache while generating.
    vocab: ids from here on are never drawn (a table padded beyond the tokenizer); 0: all may be.
    max_programs: how many decode shapes may be compiled before larger compiled ones are reused.

  Raises ValueError for sizes below 1, and stop or pad ids outside the vocabulary.
  """

  def __init__(self, config: ModelConfig, mesh: Mesh | None = None, *, pad_id: int,
               stop_ids: Sequence[int], slots: int = 64, chunk: int = 16, cache_block: int = 64,
               max_prompt_tokens: int = 1024, max_new_tokens: int = 512,
               dtype: Any = jnp.float32, attention: str = 'xla', vocab: int = 0,
               max_programs: int = 32):
    sizes = {'slots': slots, 'chunk': chunk, 'cache_block': cache_block, 'max_programs': max_programs,
             'max_prompt_tokens': max_prompt_tokens, 'max_new_tokens': max_new_tokens}
    for name, value in sizes.items():
      if value < 1:
        raise ValueError(f'{name}={value} must be at least 1.')
    for name, ids in (('pad_id', [pad_id]), ('stop_ids', sorted(stop_ids))):
      for i in ids:
        if not 0 <= i < config.vocab:
          raise ValueError(f'{name}={i} is outside the vocabulary of {config.vocab}.')
    self.config, self.mesh, self.dtype, self.attention = config, mesh, jnp.dtype(dtype), attention
    self.chunk, self.max_programs = chunk, max_programs
    self.max_prompt_tokens, self.max_new_tokens = max_prompt_tokens, max_new_tokens
    self.slots = schedule.width(slots, sharding.row_shards(mesh))
    allowed_V = np.arange(config.vocab) < (vocab or config.vocab)
    allowed_V[pad_id] = pad_id in stop_ids
    self._allowed_V = allowed_V
    self._stops_E = np.array(sorted(stop_ids) or [-1], np.int32)
    self._prompt_sizes = schedule.ladder(_SHORTEST_PROMPT, max_prompt_tokens)
    # A ring must hold a padded prefix and a padded prompt behind it.
    longest = 2 * self._prompt_sizes[-1] + max_new_tokens + chunk
    self._cache_sizes = schedule.ladder(cache_block, longest)
    self._programs: dict[tuple, Any] = {}
    self._prepared: tuple[list, decoder.Params, decoding.Weights] | None = None
    self._stats = collections.Counter()

  def generate(self, params: decoder.Params, requests: Sequence[Request], key: jax.Array, *,
               temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0,
               stop_fn: StopFn | None = None,
               on_finish: Callable[[Sample], None] | None = None,
               progress: Callable[[int, int, int], None] | None = None) -> list[list[Sample]]:
    """Samples of each request, in the order of the requests.

    Calls with different keys share no noise; the same key repeats the call. `temperature` 0 is
    greedy. After each chunk, `stop_fn(request, ids)` sees every row that grew, with its response so
    far, and may return how many of its tokens to keep: the row then ends with finish 'stop'.
    `on_finish(sample)` is called as rows end; `progress(tokens, finished, rows)` after each chunk.

    Raises ValueError, before any work, for an empty or too long prompt, ids outside the vocabulary,
    more new tokens than the sampler's maximum, and sampling parameters out of range.
    """
    rows = self._rows(requests)
    opts = sampling.options(temperature, top_k, top_p, min_p)
    started = time.perf_counter()
    params, weights = self._prepare(params)
    self._stats['prepare_s'] += time.perf_counter() - started
    results = [[None] * request.samples for request in requests]

    def finish(row, reason):
      sample = Sample(row.request, row.sample, tuple(row.ids), tuple(row.sampler),
                      tuple(row.model), reason)
      results[row.request][row.sample] = sample
      if on_finish is not None:
        on_finish(sample)

    batch = _Batch(self, params, weights, rows, key, opts)
    done = 0
    while batch.queue or any(batch.slots):
      batch.refill()
      batch.fit()
      grown = batch.decode()
      started = time.perf_counter()
      for b, stopped in grown:
        row = batch.slots[b]
        reason = 'stop' if stopped else 'length' if len(row.ids) == row.most else None
        keep = None if stop_fn is None else stop_fn(row.request, tuple(row.ids))
        if keep is not None:
          reason = 'stop'
          for values in (row.ids, row.sampler, row.model):
            del values[keep:]
        if reason is not None:
          batch.slots[b] = None
          done += 1
          self._stats['tokens'] += len(row.ids)
          finish(row, reason)
      if progress is not None:
        progress(sum(len(r.ids) for r in rows), done, len(rows))
      self._stats['host_s'] += time.perf_counter() - started
    return results

  def compilations(self) -> int:
    """Programs compiled so far."""
    return len(self._programs)

  def stats(self) -> dict[str, float]:
    """Totals since construction: tokens, seconds by phase, and the share of slots in use.

    `prompt_tokens` are those of all rows, `prefill_tokens` those computed after sharing. Seconds
    of prefill and decode include those of compiling (`compile_s`).
    """
    totals = {name: 0.0 for name in ('tokens', 'prompt_tokens', 'prefill_tokens', 'prepare_s',
                                     'prefill_s', 'decode_s', 'host_s', 'compile_s', 'steps')}
    totals |= {k: float(v) for k, v in self._stats.items()}
    totals['occupancy'] = totals.pop('live_steps', 0.0) / max(totals.pop('slot_steps', 0.0), 1.0)
    totals['programs'] = float(self.compilations())
    return totals

  def release(self) -> None:
    """Frees the decode-layout weights; the next call makes them again."""
    self._prepared = None

  def _rows(self, requests):
    rows = []
    for i, request in enumerate(requests):
      prompt = tuple(int(token) for token in request.prompt_ids)
      if not 1 <= len(prompt) <= self.max_prompt_tokens:
        raise ValueError(f'request {i} has a prompt of {len(prompt)} tokens; allowed are 1 to '
                         f'max_prompt_tokens={self.max_prompt_tokens}.')
      if min(prompt) < 0 or max(prompt) >= self.config.vocab:
        raise ValueError(f'request {i} has token ids from {min(prompt)} to {max(prompt)}; the '
                         f'vocabulary is 0 to {self.config.vocab - 1}.')
      most = request.max_new_tokens or self.max_new_tokens
      if not 1 <= most <= self.max_new_tokens:
        raise ValueError(f'request {i} asks for max_new_tokens={most}; allowed are 1 to the '
                         f"sampler's max_new_tokens={self.max_new_tokens}.")
      if request.samples < 1:
        raise ValueError(f'request {i} asks for samples={request.samples}; at least 1.')
      stream = i if request.stream < 0 else request.stream
      rows += [_Row(i, s, stream, prompt[:-1], prompt[-1], most) for s in range(request.samples)]
      self._stats['prompt_tokens'] += len(prompt) * request.samples
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
    weights = self._call(('weights', _layout(used)), functools.partial(
        decoding.weights, self.config, dtype=self.dtype, mesh=self.mesh), used)
    # Weak references: the trainer's old parameters must be free to go.
    self._prepared = [_reference(x) for x in leaves], placed, weights
    return used, weights

  def _call(self, key, function, *args, donate=()):
    """Runs `function(*args)` by the program compiled for `key`, which names all static sizes."""
    program = self._programs.get(key)
    if program is None:
      started = time.perf_counter()
      program = jax.jit(function, donate_argnums=donate).lower(*args).compile()
      self._programs[key] = program
      self._stats['compile_s'] += time.perf_counter() - started
    return program(*args)

  def _shape(self, width, size):
    """(width, size) itself, or once too many shapes are compiled, one of those that holds it."""
    compiled = [key[1:] for key in self._programs if key[0] == 'decode']
    if (width, size) in compiled or len(compiled) < self.max_programs:
      return width, size
    fitting = [shape for shape in compiled if shape[0] >= width and shape[1] >= size]
    return min(fitting, key=lambda s: s[0] * s[1], default=(width, size))


class _Batch:
  """The running batch of one `generate` call: slots, rings, and the prompts that wait."""

  def __init__(self, sampler, params, weights, rows, key, opts):
    self.sampler, self.params, self.weights = sampler, params, weights
    self.key, self.opts = key, opts
    self.queue = collections.deque(rows)
    shards = sharding.row_shards(sampler.mesh)
    self.slots = [None] * schedule.width(min(len(rows), sampler.slots), shards)
    self.prompts = _Prompts(sampler, params, [row.context for row in rows])
    self.cache, self.size, self.slot = None, 0, 0

  def refill(self):
    """Moves waiting rows into free slots, once there are enough of them to be worth a prefill."""
    free = [b for b, row in enumerate(self.slots) if row is None]
    if not self.queue or len(free) < max(1, len(self.slots) // 8):
      return
    started = time.perf_counter()
    taken = [(b, self.queue.popleft()) for b in free[:len(self.queue)]]
    inserts = self.prompts.prefill([row.context for _, row in taken])
    for b, row in taken:
      self.slots[b] = row
    self.fit(ring=max([insert.size for insert in inserts], default=0), narrow=False)
    for insert in inserts:
      found = [(b, *insert.rows[row.context]) for b, row in taken if row.context in insert.rows]
      self._insert(insert, found)
    self.prompts.keep({row.context for row in self.queue})
    jax.block_until_ready(self.cache)
    self.sampler._stats['prefill_s'] += time.perf_counter() - started

  def fit(self, ring=0, narrow=True):
    """Grows the rings to what the next chunk needs; narrows the batch when no row waits."""
    live = [row for row in self.slots if row is not None]
    if not live:
      return
    s = self.sampler
    most_left = max(row.most - len(row.ids) for row in live)
    longest = max(row.length for row in live)
    need = max(ring, longest + min(s.chunk, most_left))
    width = len(self.slots)
    if narrow and not self.queue:
      width = min(width, schedule.width(len(live), sharding.row_shards(s.mesh)))
    if self.cache is not None and need <= self.size and width == len(self.slots):
      return
    # Room for one more block than needed, so that a ring is not copied after every chunk.
    size = schedule.fit(s._cache_sizes, max(need, longest + min(s._cache_sizes[0], most_left)))
    if self.size > size > self.size // 2:
      size = self.size
    width, size = s._shape(width, size)
    if self.cache is None:
      self.cache = s._call(('cache', width, size), functools.partial(
          decoding.empty_cache, s.config, width, size, s.dtype, s.mesh))
      self.slots += [None] * (width - len(self.slots))
    else:
      self._resize(width, size)
    self.size = size

  def decode(self):
    """Runs one chunk. Returns [(slot, stopped)] of the rows that grew."""
    s = self.sampler
    started = time.perf_counter()
    live = [(b, row) for b, row in enumerate(self.slots) if row is not None]
    table = np.zeros((6, len(self.slots)), np.int32)
    for b, row in live:
      table[:, b] = (row.ids[-1] if row.ids else row.last, row.length, len(row.ids),
                     row.most - len(row.ids), row.stream, row.sample)
    steps = min(s.chunk, int(table[3].max()))
    program = functools.partial(decoding.decode, s.config, chunk=s.chunk, dtype=s.dtype,
                                mesh=s.mesh)
    self.cache, chunk = s._call(
        ('decode', len(self.slots), self.size), program, self.weights, self.cache,
        np.int32(self.slot), decoding.Rows(*table), np.int32(steps), self.key, self.opts,
        s._allowed_V, s._stops_E, donate=(1,))
    chunk = jax.device_get(chunk)
    ran = int(chunk.steps)
    self.slot = (self.slot + ran) % self.size
    s._stats.update(steps=ran, slot_steps=ran * len(self.slots),
                    live_steps=int(chunk.counts_B.sum()))
    for b, row in live:
      n = chunk.counts_B[b]
      row.ids += chunk.tokens_BC[b, :n].tolist()
      row.sampler += chunk.sampler_logprobs_BC[b, :n].tolist()
      row.model += chunk.model_logprobs_BC[b, :n].tolist()
    s._stats['decode_s'] += time.perf_counter() - started
    return [(b, bool(chunk.stopped_B[b])) for b, _ in live]

  def _insert(self, insert, found):
    """Copies prefilled prompts into cache rows; `found` holds (slot, source, length)."""
    s = self.sampler
    count, B = len(found), len(self.slots)
    table = np.zeros((3, B), np.int32)
    table[:, :count] = np.array(found, np.int32).T
    key = ('insert', B, self.size, insert.shape)
    function = functools.partial(decoding.insert, mesh=s.mesh)
    self.cache = tuple(
        s._call(key, function, k, v, insert.new, insert.prefix, np.int32(layer), np.int32(count),
                *table, np.int32(self.slot), donate=(0, 1))
        for layer, (k, v) in enumerate(self.cache))

  def _resize(self, width, size):
    """Keeps the live rows in rings of `size` slots; rows stay in order."""
    s = self.sampler
    order = list(range(len(self.slots)))
    if width != len(order):
      live = [b for b in order if self.slots[b] is not None]
      order = (live + [b for b in order if self.slots[b] is None])[:width]
      order += [0] * (width - len(order))
    function = functools.partial(decoding.resize, size=size, mesh=s.mesh)
    resized = []
    for k, v in self.cache:
      resized.append(s._call(('resize', len(self.slots), self.size, width, size), function, k, v,
                             np.array(order, np.int32), np.int32(self.slot)))
      k.delete()
      v.delete()
    slots = self.slots + [None] * (width - len(self.slots))
    self.slots = [slots[b] if i < len(self.slots) else None for i, b in enumerate(order)]
    self.cache = tuple(resized)
    self.slot = min(self.size, size) % size


@dataclasses.dataclass(frozen=True)
class _Insert:
  """Prefilled prompts: where each context is in `new`, and how many of its slots count."""
  rows: dict[tuple[int, ...], tuple[int, int]]
  new: tuple[jax.Array, jax.Array]
  prefix: tuple[jax.Array, jax.Array] | None
  shape: tuple[int, int, int]              # prompts, slots each, prefix slots

  @property
  def size(self) -> int:
    """Ring size that insertion needs."""
    return self.shape[1] + self.shape[2]


class _Prompts:
  """Keys and values of prompts: computed once each, kept while a waiting row needs them."""

  def __init__(self, sampler, params, contexts):
    self.sampler, self.params = sampler, params
    self.layout = _layout(params)
    self.prefix_of = schedule.shared_prefixes(contexts, _SHORTEST_PREFIX)
    self.prefixes: dict[tuple[int, ...], _Insert] = {}
    self.ready: list[_Insert] = []

  def prefill(self, contexts):
    """Inserts that cover `contexts`; computes those not at hand."""
    known = {context for insert in self.ready for context in insert.rows}
    groups = collections.defaultdict(list)
    for context in dict.fromkeys(contexts):
      if context and context not in known:
        prefix = self.prefix_of[context]
        rest = len(context) - len(prefix)
        size = schedule.fit(self.sampler._prompt_sizes, rest) if rest else 0
        groups[prefix, size].append(context)
    for (prefix, size), members in groups.items():
      if not size:
        self.ready.append(self._prefix(prefix))
        continue
      begin = 0
      for count in schedule.batches(len(members), _PREFILL_TOKENS // size):
        self.ready.append(self._compute(members[begin:begin + count], size, prefix))
        begin += count
    wanted = set(contexts)
    return [insert for insert in self.ready if wanted & insert.rows.keys()]

  def keep(self, contexts):
    """Forgets prompts that no waiting row needs."""
    self.ready = [insert for insert in self.ready if contexts & insert.rows.keys()]
    in_use = {self.prefix_of[context] for context in contexts}
    self.prefixes = {k: v for k, v in self.prefixes.items() if k in in_use}

  def _prefix(self, prefix):
    if prefix not in self.prefixes:
      size = schedule.fit(self.sampler._prompt_sizes, len(prefix))
      made = self._compute([prefix], size, (), at_end=True)
      self.prefixes[prefix] = dataclasses.replace(made, rows={prefix: (0, size)})
    return self.prefixes[prefix]

  def _compute(self, contexts, size, prefix, at_end=False):
    """Prefills the contexts behind their common prefix, aligned to the start of their slots."""
    s = self.sampler
    before = self._prefix(prefix) if prefix else None
    ahead = before.shape[1] if before else 0
    tokens_BT, positions_BT, segments_BT = np.zeros((3, len(contexts), size), np.int32)
    for b, context in enumerate(contexts):
      rest = context[len(prefix):]
      where = slice(size - len(rest), size) if at_end else slice(0, len(rest))
      tokens_BT[b, where] = rest
      positions_BT[b, where] = np.arange(len(prefix), len(context))
      segments_BT[b, where] = 1
    shape = len(contexts), size, ahead
    function = functools.partial(_prefill, s.config, dtype=s.dtype, attention=s.attention,
                                 mesh=s.mesh)
    seen_A = (np.arange(ahead) >= ahead - len(prefix)).astype(np.int32) if before else None
    new = s._call(('prefill', shape, self.layout), function, self.params, tokens_BT, positions_BT,
                  segments_BT, before.new if before else None, seen_A)
    s._stats['prefill_tokens'] += sum(len(context) - len(prefix) for context in contexts)
    rows = {context: (b, len(context) - len(prefix)) for b, context in enumerate(contexts)}
    return _Insert(rows, new, before.new if before else None, shape)


def _prefill(config, params, tokens_BT, positions_BT, segments_BT, prefix, seen_A, *, dtype,
             attention, mesh):
  """`decoder.prefill` with one prefix row for all prompts."""
  seen_BA = None
  if prefix is not None:
    B = tokens_BT.shape[0]
    prefix = [jnp.broadcast_to(x, (x.shape[0], B, *x.shape[2:])) for x in prefix]
    seen_BA = jnp.broadcast_to(seen_A[None], (B, seen_A.shape[0]))
  return decoder.prefill(config, params, tokens_BT, positions_BT, segments_BT, prefix, seen_BA,
                         dtype=dtype, attention=attention, mesh=mesh)


def _layout(params):
  """What a program compiled for these parameters depends on."""
  return tuple((x.shape, str(x.dtype), x.sharding) for x in jax.tree.leaves(params))


def _reference(x):
  """Weak where possible; NumPy arrays may change in place, so they never count as the same."""
  return weakref.ref(x) if isinstance(x, jax.Array) else lambda: None
