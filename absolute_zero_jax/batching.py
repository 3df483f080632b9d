# SPDX-License-Identifier: Apache-2.0
"""The running batch behind `sampler`: which row sits in which slot, and what runs next.

    queue --refill--> slots --fit--> rings of the right size --decode--> tokens per slot
              |
           Prompts: prefill each distinct prompt, and each shared prefix, once

`Programs` holds the compiled device code; a key names every static size, so its length is the count
of compilations.
"""

import collections
from collections.abc import Callable
import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from absolute_zero_jax import decoding, sampling, schedule, sharding
from absolute_zero_jax.models import decoder
from absolute_zero_jax.models.config import ModelConfig

_PREFILL_TOKENS = 4096          # at most this many prompt tokens in one prefill call


@dataclasses.dataclass
class Row:
  """One response on its way: its prompt, its random stream, and the tokens so far."""
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


@dataclasses.dataclass
class Programs:
  """Compiled programs, the sizes they may have, and totals of what they did."""
  config: ModelConfig
  mesh: jax.sharding.Mesh | None
  dtype: Any
  attention: str
  chunk: int
  most: int                      # decode shapes, and prefill shapes, before larger ones are reused
  prompt_sizes: tuple[int, ...]
  cache_sizes: tuple[int, ...]
  compiled: dict[tuple, Any] = dataclasses.field(default_factory=dict)
  # Of decoding and prefill, in the order met. Apart from `compiled`, which also holds what scoring
  # has used, so that a process that goes on with a run chooses as the one before it would have.
  shapes: dict[str, list[tuple]] = dataclasses.field(
      default_factory=lambda: {'decode': [], 'prefill': []})
  stats: collections.Counter = dataclasses.field(default_factory=collections.Counter)

  def call(self, key: tuple, function: Callable, *args, donate: tuple[int, ...] = (),
           options: dict[str, str] | None = None) -> Any:
    """Runs `function(*args)` by the program compiled for `key`, which names all static sizes."""
    program = self.compiled.get(key)
    if program is None:
      started = time.perf_counter()
      program = jax.jit(function, donate_argnums=donate).lower(*args).compile(options)
      self.compiled[key] = program
      self.stats['compile_s'] += time.perf_counter() - started
    if key[0] in self.shapes and key[1] not in self.shapes[key[0]]:
      self.shapes[key[0]].append(key[1])
    return program(*args)

  def shape(self, width: int, size: int) -> tuple[int, int]:
    """(width, size) itself, or once too many shapes are compiled, one of those that holds it."""
    known = self.shapes['decode']
    if (width, size) in known or len(known) < self.most:
      return width, size
    fitting = [shape for shape in known if shape[0] >= width and shape[1] >= size
               and shape[0] % sharding.row_shards(self.mesh) == 0]
    return min(fitting, key=lambda s: s[0] * s[1], default=(width, size))

  def prefill_shapes(self, prompts: int, size: int, ahead: int,
                     padded: bool) -> list[tuple[int, int]]:
    """(prompts, slots each) of the calls that prefill `prompts` of up to `size` tokens.

    `padded` allows rows without a prompt (see `schedule.batches`). Once too many shapes are
    compiled, those are reused, and prompts that fit none go one by one.
    """
    exact = [(count, size)
             for count in schedule.batches(prompts, _PREFILL_TOKENS // size, padded)]
    known = self.shapes['prefill']
    if len(known) < self.most or all((*shape, ahead) in known for shape in exact):
      return exact
    shapes = []
    while prompts > 0:
      fitting = [(k[0], k[1]) for k in known
                 if k[2] == ahead and k[1] >= size and (padded or k[0] <= prompts)]
      # As many prompts as one call can take, in as few slots.
      shapes.append(max(fitting, key=lambda s: (min(s[0], prompts), -s[0] * s[1]),
                        default=(1, self.prompt_sizes[-1])))
      prompts -= shapes[-1][0]
    return shapes


def layout(params: decoder.Params) -> tuple:
  """What a program compiled for these parameters depends on."""
  return tuple((x.shape, str(x.dtype), x.sharding) for x in jax.tree.leaves(params))


def platform(weights: decoding.Weights) -> str:
  """'cpu', 'gpu' or 'tpu'; where the weights are is the only place to learn it."""
  return next(iter(weights.embed_VD.devices())).platform


class Batch:
  """The running batch of one `generate` call: slots, rings, and the prompts that wait.

  Each shard of a mesh has an equal, consecutive part of the slots; a row stays in its shard
  (`sharding.lone_shards`). `widths` are the fewest and the most slots that it may have.
  """

  def __init__(self, programs: Programs, params: decoder.Params, weights: decoding.Weights,
               rows: list[Row], widths: tuple[int, int], key: jax.Array, opts: sampling.Options,
               allowed_V: np.ndarray, stops_E: np.ndarray):
    self.programs, self.weights, self.key, self.opts = programs, weights, key, opts
    self.allowed_V, self.stops_E = allowed_V, stops_E
    self.platform = platform(weights)
    self.queue = collections.deque(rows)
    self.fewest, self.most = widths
    self.shards = sharding.lone_shards(programs.mesh)
    self.slots = [None] * self._width(len(rows))
    self.prompts = Prompts(programs, params, [row.context for row in rows], self.platform)
    self.cache, self.size, self.slot = None, 0, 0

  def busy(self) -> bool:
    """Whether any row waits or runs."""
    return bool(self.queue) or any(row is not None for row in self.slots)

  def add(self, rows: list[Row]) -> None:
    """Lets more rows wait; a batch that has become narrow widens for them."""
    self.queue.extend(rows)
    self.prompts.add([row.context for row in rows])
    live = sum(row is not None for row in self.slots)
    width = self._width(live + len(self.queue))
    if width <= len(self.slots):
      return
    if self.cache is None:
      self.slots += [None] * (width - len(self.slots))
    else:
      width, size = self.programs.shape(width, self.size)
      self._resize(width, size)
      self.size = size

  def free(self, slot: int) -> None:
    """Takes a finished row out."""
    self.slots[slot] = None

  def refill(self):
    """Moves waiting rows into free slots, once there are enough of them to be worth a prefill."""
    free = sorted((b for b, row in enumerate(self.slots) if row is None),
                  key=lambda b: (b % (len(self.slots) // self.shards), b))    # shards in turn
    if not self.queue or len(free) < max(1, len(self.slots) // 8):
      return
    started = time.perf_counter()
    taken = [(b, self.queue.popleft()) for b in free[:len(self.queue)]]
    inserts = self.prompts.prefill([row.context for _, row in taken])
    for b, row in taken:
      self.slots[b] = row
    self.fit(ring=max([insert.size for insert in inserts], default=0), narrow=False)
    new = {id(row) for _, row in taken}
    taken = [(b, row) for b, row in enumerate(self.slots) if id(row) in new]   # `fit` may move them
    for insert in inserts:
      found = [(b, *insert.rows[row.context]) for b, row in taken if row.context in insert.rows]
      self._insert(insert, found)
    self.prompts.keep({row.context for row in self.queue})
    jax.block_until_ready(self.cache)
    self.programs.stats['prefill_s'] += time.perf_counter() - started

  def fit(self, ring=0, narrow=True):
    """Grows the rings to what the next chunk needs; narrows the batch when no row waits."""
    live = [row for row in self.slots if row is not None]
    if not live:
      return
    p = self.programs
    most_left = max(row.most - len(row.ids) for row in live)
    longest = max(row.length for row in live)
    need = max(ring, longest + min(p.chunk, most_left))
    width = len(self.slots)
    if narrow and not self.queue:
      width = min(width, self._width(self.shards * max(self._live_of_shards())))
    if self.cache is not None and need <= self.size and width == len(self.slots):
      return
    # Room for one more block than needed, so that a ring is not copied after every chunk.
    size = schedule.fit(p.cache_sizes, max(need, longest + min(p.cache_sizes[0], most_left)))
    if self.size > size > self.size // 2:      # no copy to save less than half
      size = self.size
    width, size = p.shape(width, size)
    if self.cache is not None and (width, size) == (len(self.slots), self.size):
      return
    if self.cache is None:
      self.cache = p.call(('cache', width, size), functools.partial(
          decoding.empty_cache, p.config, width, size, p.dtype, p.mesh, self.platform))
      self.slots += [None] * (width - len(self.slots))
    else:
      self._resize(width, size)
    self.size = size

  def decode(self):
    """Runs one chunk. Returns (slot, row, tokens added, stopped) of the rows that grew."""
    p = self.programs
    started = time.perf_counter()
    live = [(b, row) for b, row in enumerate(self.slots) if row is not None]
    table = np.zeros((6, len(self.slots)), np.int32)
    for b, row in live:
      table[:, b] = (row.ids[-1] if row.ids else row.last, row.length, len(row.ids),
                     row.most - len(row.ids), row.stream, row.sample)
    steps = min(p.chunk, int(table[3].max()))
    program = functools.partial(decoding.decode, p.config, chunk=p.chunk, dtype=p.dtype,
                                mesh=p.mesh, platform=self.platform)
    self.cache, chunk = p.call(
        ('decode', (len(self.slots), self.size)), program, self.weights, self.cache,
        np.int32(self.slot), decoding.Rows(*table), np.int32(steps), self.key, self.opts,
        self.allowed_V, self.stops_E, donate=(1,))
    chunk = jax.device_get(chunk)
    ran = int(chunk.steps.max())        # in a shard that stopped before no row is left
    self.slot = (self.slot + ran) % self.size
    p.stats.update(steps=ran, slot_steps=ran * len(self.slots),
                    live_steps=int(chunk.counts_B.sum()))
    for b, row in live:
      n = chunk.counts_B[b]
      row.ids += chunk.tokens_BC[b, :n].tolist()
      row.sampler += chunk.sampler_logprobs_BC[b, :n].tolist()
      row.model += chunk.model_logprobs_BC[b, :n].tolist()
    p.stats['decode_s'] += time.perf_counter() - started
    return [(b, row, int(chunk.counts_B[b]), bool(chunk.stopped_B[b])) for b, row in live]

  def _width(self, rows):
    rows = max(self.fewest, min(rows, self.most))
    return schedule.width(rows, sharding.row_shards(self.programs.mesh))

  def _live_of_shards(self):
    """Number of rows in the slots of each shard."""
    live = np.array([row is not None for row in self.slots])
    return live.reshape(self.shards, -1).sum(1).tolist()

  def _insert(self, insert, found):
    """Copies prefilled prompts into cache rows; `found` holds (slot, source, length)."""
    p = self.programs
    size = len(self.slots) // self.shards
    counts, table = np.zeros(self.shards, np.int32), np.zeros((3, len(self.slots)), np.int32)
    for slot, source, length in found:
      shard, target = divmod(slot, size)
      table[:, shard * size + counts[shard]] = target, source, length
      counts[shard] += 1
    key = ('insert', len(self.slots), self.size, insert.shape)
    function = functools.partial(decoding.insert, mesh=p.mesh, platform=self.platform)
    args = counts, *table, np.int32(self.slot)
    # On the devices once, not once for each layer.
    if p.mesh is None:
      args = jax.device_put(args)
    else:
      whole = sharding.replicated(p.mesh)
      by_row = sharding.rows(p.mesh) if self.shards > 1 else whole
      args = sharding.place(args, (*[by_row] * 4, whole))
    self.cache = tuple(
        p.call(key, function, k, v, insert.new, insert.prefix, np.int32(layer), *args,
               donate=(0, 1))
        for layer, (k, v) in enumerate(self.cache))

  def _resize(self, width, size):
    """Keeps the live rows in rings of `size` slots; those of a shard stay in order."""
    p = self.programs
    old, new = len(self.slots) // self.shards, width // self.shards
    slots, keep = [], []
    for begin in range(0, len(self.slots), old):
      own, order = self.slots[begin:begin + old], list(range(old))
      if new != old:
        order = sorted(order, key=lambda b: own[b] is None)[:new]
      slots += [own[b] for b in order] + [None] * (new - len(order))
      keep += order + [0] * (new - len(order))
    function = functools.partial(decoding.resize, size=size, mesh=p.mesh)
    resized = []
    for k, v in self.cache:
      resized.append(p.call(('resize', len(self.slots), self.size, width, size), function, k, v,
                            np.array(keep, np.int32), np.int32(self.slot)))
      k.delete()
      v.delete()
    self.slots, self.cache = slots, tuple(resized)
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


class Prompts:
  """Keys and values of prompts: computed once each, kept while a waiting row needs them."""

  def __init__(self, programs, params, contexts, platform):
    self.programs, self.params, self.padded = programs, params, platform != 'cpu'
    # Devices of a CPU prefill everything each: one that waits for another takes up a thread that
    # the other may need.
    self.mesh = None if platform == 'cpu' else programs.mesh
    self.layout = layout(params)
    self.prefix_of = schedule.shared_prefixes(contexts, programs.prompt_sizes[0])
    self.prefixes: dict[tuple[int, ...], _Insert] = {}
    self.ready: list[_Insert] = []

  def add(self, contexts):
    """Contexts that come later share prefixes among themselves."""
    new = set(contexts) - self.prefix_of.keys()
    self.prefix_of |= schedule.shared_prefixes(new, self.programs.prompt_sizes[0])

  def prefill(self, contexts):
    """Inserts that cover `contexts`; computes those not at hand."""
    known = {context for insert in self.ready for context in insert.rows}
    groups = collections.defaultdict(list)
    for context in dict.fromkeys(contexts):
      if context and context not in known:
        prefix = self.prefix_of[context]
        rest = len(context) - len(prefix)
        size = schedule.fit(self.programs.prompt_sizes, rest) if rest else 0
        groups[prefix, size].append(context)
    for (prefix, size), members in groups.items():
      if not size:
        self.ready.append(self._prefix(prefix))
        continue
      ahead = self._prefix(prefix).shape[1] if prefix else 0
      begin = 0
      for count, slots in self.programs.prefill_shapes(len(members), size, ahead, self.padded):
        part = members[begin:begin + count]
        self.ready.append(self._compute(part, slots, prefix, count))
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
      size = schedule.fit(self.programs.prompt_sizes, len(prefix))
      made = self._compute([prefix], size, (), 1, at_end=True)
      self.prefixes[prefix] = dataclasses.replace(made, rows={prefix: (0, size)})
    return self.prefixes[prefix]

  def _compute(self, contexts, size, prefix, count, at_end=False):
    """Prefills up to `count` contexts behind their prefix, aligned to the start of their slots."""
    p = self.programs
    before = self._prefix(prefix) if prefix else None
    ahead = before.shape[1] if before else 0
    tokens_BT, positions_BT, segments_BT = np.zeros((3, count, size), np.int32)
    for b, context in enumerate(contexts):
      rest = context[len(prefix):]
      where = slice(size - len(rest), size) if at_end else slice(0, len(rest))
      tokens_BT[b, where] = rest
      positions_BT[b, where] = np.arange(len(prefix), len(context))
      segments_BT[b, where] = 1
    shape = count, size, ahead
    function = functools.partial(_prefill, p.config, dtype=p.dtype, attention=p.attention,
                                 mesh=self.mesh)
    seen_A = (np.arange(ahead) >= ahead - len(prefix)).astype(np.int32) if before else None
    new = p.call(('prefill', shape, self.layout), function, self.params, tokens_BT, positions_BT,
                 segments_BT, before.new if before else None, seen_A,
                 options=sharding.compiler_options(p.mesh, p.dtype))
    p.stats['prefill_tokens'] += sum(len(context) - len(prefix) for context in contexts)
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
