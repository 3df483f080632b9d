# SPDX-License-Identifier: Apache-2.0
"""From rows of token ids to micro-batches of few static shapes: numpy, on the host.

    rows --plan--> Plan (where each row lies) --fill--> [Batch, ...] --take_rows--> values per row

A micro-batch holds at most `micro_batch_tokens` positions. Rows are laid out longest first, so that
those of one micro-batch have similar lengths; its length T is the bucket of its longest row and its
number of rows follows from T, hence the few shapes. With `pack`, several rows share one line of T
positions (first fit, longest first) and are kept apart by their segment numbers. With
`share_prompts`, rows that answer the same prompt hold it once:

    prompt without its last token | last token, response 1 | last token, response 2 | ...
    segment GROUP * g             | GROUP * g + 1          | GROUP * g + 2          |

The last token stands before every response, since the first token of a response is scored there.
Eight answers of 10 tokens to a prompt of 40 are 127 positions instead of 400.

Letters: B lines of a micro-batch, T positions of a line, C blocks of B / C lines (one per data
shard of the mesh), M scored tokens of a block.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any, NamedTuple

import numpy as np

from absolute_zero_jax.advantages import Rollout
from absolute_zero_jax.models.attention import GROUP

# Lines that hold shared prompts may be so many times as long as the longest row.
_SHARED_LINE = 2


@dataclasses.dataclass(frozen=True)
class Row:
  """One prompt and one response to learn from.

  Attributes:
    sampler_logprobs: of the response tokens under the distribution they were drawn from.
    model_logprobs: of the response tokens under the model at temperature 1, by the sampler.
    reward: of the whole response, or one number per response token.
    prompt: group id; rows that answer the same prompt carry the same.
    mask: one truth value per response token, False for text the model did not write (the
      environment's turns); () trains every token. A row needs a token that is trained, and only
      such tokens have rewards of their own.
  """
  prompt_ids: Sequence[int]
  response_ids: Sequence[int]
  sampler_logprobs: Sequence[float]
  model_logprobs: Sequence[float]
  reward: float | Sequence[float]
  kind: str
  role: str
  prompt: str | int
  mask: Sequence[bool] = ()


class Batch(NamedTuple):
  """One micro-batch. `segments_BT` is 0 on padding; `mask_BT` is 1 on trained response tokens.

  Everything per token stands at the position of the token itself, and is scored from the position
  before it. `weights_BT` carries the aggregation over the whole update, so a loss is
  sum(weights * token loss) over all micro-batches. `groups_BT` numbers the (role, kind).
  `index_CM` lists the trained tokens of each block as flat positions, -1 where it has fewer.
  """
  tokens_BT: Any
  positions_BT: Any
  segments_BT: Any
  mask_BT: Any
  advantages_BT: Any
  weights_BT: Any
  old_logprobs_BT: Any
  sampler_logprobs_BT: Any
  model_logprobs_BT: Any
  ref_logprobs_BT: Any
  groups_BT: Any
  index_CM: Any


@dataclasses.dataclass(frozen=True)
class Place:
  """Where a row lies.

  Attributes:
    batch, line: micro-batch, and line in it.
    start: position of its first own token, which is of its prompt.
    first: position of the first token of its response.
    shared: position of the prompt's tokens that are not its own, up to the last; -1 without such.
  """
  batch: int
  line: int
  start: int
  first: int
  segment: int
  shared: int = -1


@dataclasses.dataclass(frozen=True)
class Plan:
  """Places of the rows, and (B, T, M) of each micro-batch; `blocks` is C of all of them."""
  places: tuple[Place, ...]
  shapes: tuple[tuple[int, int, int], ...]
  blocks: int


def plan(rows: Sequence[Row], *, micro_batch_tokens: int, blocks: int = 1, pack: bool = False,
         share_prompts: bool = False, buckets: Sequence[int] = (),
         few_shapes: bool = False) -> Plan:
  """Decides the place of every row; depends on the lengths alone, so equal calls agree.

  Args:
    micro_batch_tokens: B * T of a micro-batch is at most this, unless one line per block needs
      more.
    blocks: data shards; B is a multiple of it.
    share_prompts: hold a prompt once for several of its responses.
    buckets: allowed line lengths, ascending; () takes 64, 128, 256, 384, 512, 768, 1024, ... .
    few_shapes: of packed lines the last micro-batch, too, is padded to the size of the others,
      however few they are: for devices that compute faster than they compile.

  Raises:
    ValueError: no rows; an empty prompt or response; a row longer than the last bucket.
  """
  lengths = [_checked_length(i, row) for i, row in enumerate(rows)]
  if not rows:
    raise ValueError('an update needs at least one row; none was given.')
  longest = max(lengths)
  items = [[i] for i in range(len(rows))]
  if share_prompts:
    limit = min(_SHARED_LINE * longest, micro_batch_tokens // blocks, *buckets[-1:])
    items = _shared(rows, max(longest, limit))
    lengths = [_item_length(rows, item) for item in items]
    longest = max(lengths)
  order = sorted(range(len(items)), key=lambda j: (-lengths[j], j))
  longest = bucket(longest, buckets)
  lines = _first_fit(order, lengths, longest) if pack else [[j] for j in order]
  places: list[Place | None] = [None] * len(rows)
  shapes, needs, done = [], [], 0
  while done < len(lines):
    T = longest if pack else bucket(lengths[lines[done][0]], buckets)
    full = max(1, micro_batch_tokens // (T * blocks)) * blocks
    part = lines[done:done + full]
    done += len(part)
    B = min(full, blocks * _power_of_two(-(-len(part) // blocks)))
    if pack and (few_shapes or len(lines) > 3 * full):
      B = full      # one shape for all; of more than three at most a quarter is padding
    part = [[items[j] for j in line] for line in part]
    need = _place(rows, part, B, blocks, len(shapes), places)
    shapes.append((B, T))
    needs.append(need)
  # One scored-token budget for all micro-batches of a shape, in quarters of the block.
  budget = {}
  for shape, need in zip(shapes, needs):
    quarter = -(-shape[0] * shape[1] // blocks // 4)
    budget[shape] = max(budget.get(shape, 0), -(-need // quarter) * quarter)
  return Plan(tuple(places), tuple((*s, budget[s]) for s in shapes), blocks)


def fill(p: Plan, rows: Sequence[Row], groups: Sequence[int] = (),
         **values: Sequence[np.ndarray]) -> list[Batch]:
  """Micro-batches of numpy arrays.

  `values` maps field names of `Batch` without their suffix ('advantages', 'old_logprobs', ...) to
  one array of response tokens per row; what is not given is 0.
  """
  out = []
  for B, T, M in p.shapes:
    ints = [np.zeros((B, T), np.int32) for _ in range(3)]
    floats = [np.zeros((B, T), np.float32) for _ in range(7)]
    out.append(Batch(*ints, *floats, np.zeros((B, T), np.int32),
                     np.full((p.blocks, M), -1, np.int32)))
  for i, (row, place) in enumerate(zip(rows, p.places)):
    batch = out[place.batch]
    ids = (*row.prompt_ids, *row.response_ids)
    skip = len(row.prompt_ids) - (place.first - place.start)
    if place.shared >= 0:
      _put(batch, place.line, place.shared, ids[:skip], 0, place.segment // GROUP * GROUP)
    _put(batch, place.line, place.start, ids[skip:], skip, place.segment)
    response = (place.line, slice(place.first, place.first + len(row.response_ids)))
    batch.mask_BT[response] = mask(row)
    batch.groups_BT[response] = groups[i] if len(groups) else 0
    for name, per_row in values.items():
      getattr(batch, f'{name}_BT')[response] = per_row[i]
  for batch in out:
    for block, mask_T in enumerate(batch.mask_BT.reshape(p.blocks, -1)):
      found = np.flatnonzero(mask_T)
      batch.index_CM[block, :len(found)] = found
  return out


def take_rows(p: Plan, rows: Sequence[Row], batches: Sequence[Batch],
              scored: Sequence[np.ndarray]) -> list[np.ndarray]:
  """Undoes the layout: per-token results [C, M] of each micro-batch to one array per row.

  Response tokens outside a row's own mask get 0.
  """
  spread = []
  for batch, value_CM in zip(batches, scored):
    flat_CT = np.zeros((p.blocks, batch.mask_BT.size // p.blocks), np.float32)
    for block, index_M in enumerate(batch.index_CM):
      flat_CT[block, index_M[index_M >= 0]] = np.asarray(value_CM)[block, index_M >= 0]
    spread.append(flat_CT.reshape(batch.mask_BT.shape))
  out = []
  for row, place in zip(rows, p.places):
    span = slice(place.first, place.first + len(row.response_ids))
    out.append(spread[place.batch][place.line, span])
  return out


def rollout(rows: Sequence[Row]) -> tuple[tuple[str, ...], Rollout]:
  """Names of the roles, and the padded arrays that estimators read."""
  masks = [mask(row) for row in rows]
  reward = []
  for row, mask_T in zip(rows, masks):
    if not np.ndim(row.reward):
      reward_T = np.zeros(len(mask_T))
      reward_T[np.flatnonzero(mask_T)[-1:]] = row.reward     # the last token that is trained
    else:
      reward_T = np.asarray(row.reward, np.float64)
    reward.append(reward_T)
  def number(names):
    return np.unique(np.array([str(n) for n in names]), return_inverse=True)
  (roles, role_B), (_, kind_B), (_, prompt_B) = (
      number([r.role for r in rows]), number([r.kind for r in rows]),
      number([r.prompt for r in rows]))
  return tuple(roles.tolist()), Rollout(
      padded(reward), padded(masks), role_B, kind_B, prompt_B)


def padded(per_row: Sequence[np.ndarray]) -> np.ndarray:
  """One float64 array [B, T] of values per response token, zeros on the right."""
  out_BT = np.zeros((len(per_row), max(len(x) for x in per_row)))
  for out_T, x in zip(out_BT, per_row):
    out_T[:len(x)] = x
  return out_BT


def mask(row: Row) -> np.ndarray:
  """1.0 on the response tokens of a row that are trained."""
  return np.asarray(row.mask if len(row.mask) else np.ones(len(row.response_ids)), np.float32)


def bucket(length: int, buckets: Sequence[int] = ()) -> int:
  """The smallest allowed line length that holds `length` tokens.

  The default lengths are powers of two and one and a half times those, from 64 on (without 96 and
  192, since attention works in blocks of 128): at most a third of a line is padding. Raises
  ValueError where none is long enough.
  """
  if not len(buckets):
    buckets = (64, 128, *(n for k in range(8, 40) for n in (2**k, 3 * 2**(k - 1))))
  for size in buckets:
    if length <= size:
      return size
  raise ValueError(f'a row of {length} tokens does not fit the longest bucket {buckets[-1]}; add a '
                   'longer one to length_buckets, or shorten prompts or responses.')


def _put(batch, line, start, ids, position, segment):
  """Writes tokens that are at `position` and on of their row."""
  where = (line, slice(start, start + len(ids)))
  batch.tokens_BT[where] = ids
  batch.positions_BT[where] = np.arange(position, position + len(ids))
  batch.segments_BT[where] = segment


def _place(rows, lines, B, blocks, number, places) -> int:
  """Deals lines to blocks, fewest scored tokens first; returns the most a block has to score."""
  scored = [sum(int(mask(rows[i]).sum()) for item in line for i in item) for line in lines]
  total, used = [0] * blocks, [0] * blocks
  for j in sorted(range(len(lines)), key=lambda j: (-scored[j], j)):
    block = min((b for b in range(blocks) if used[b] < B // blocks), key=lambda b: (total[b], b))
    start = 0
    for group, item in enumerate(lines[j], 1):
      shared = -1
      if len(item) > 1:
        shared, start = start, start + len(rows[item[0]].prompt_ids) - 1
      for member, i in enumerate(item, 1):
        first = start + (1 if len(item) > 1 else len(rows[i].prompt_ids))
        places[i] = Place(number, block * (B // blocks) + used[block], start, first,
                          GROUP * group + member, shared)
        start = first + len(rows[i].response_ids)
    total[block] += scored[j]
    used[block] += 1
  return max(max(total), 1)


def _shared(rows: Sequence[Row], limit: int) -> list[list[int]]:
  """Indices of rows with equal prompts, in parts of at most `limit` positions each."""
  parts: list[list[int]] = []
  newest: dict[tuple[int, ...], list[int]] = {}
  for i, row in enumerate(rows):
    prompt = tuple(map(int, row.prompt_ids))
    part = newest.get(prompt, [])
    if not part or len(part) == GROUP - 1 or _item_length(rows, [*part, i]) > limit:
      part = newest[prompt] = []
      parts.append(part)
    part.append(i)
  return parts


def _item_length(rows: Sequence[Row], item: Sequence[int]) -> int:
  """Positions of rows that share a prompt; of a row by itself."""
  prompt = len(rows[item[0]].prompt_ids)
  responses = sum(len(rows[i].response_ids) for i in item)
  return prompt + responses if len(item) == 1 else prompt - 1 + len(item) + responses


def _first_fit(order: Sequence[int], lengths: Sequence[int], size: int) -> list[list[int]]:
  """First-fit-decreasing: each row goes to the first line that still has room."""
  lines, room = [], []
  for i in order:
    j = next((j for j, free in enumerate(room) if lengths[i] <= free), len(lines))
    if j == len(lines):
      lines.append([])
      room.append(size)
    lines[j].append(i)
    room[j] -= lengths[i]
  return lines


def _power_of_two(n: int) -> int:
  return 1 << (n - 1).bit_length()


def _checked_length(i: int, row: Row) -> int:
  n = len(row.response_ids)
  if not len(row.prompt_ids) or not n:
    raise ValueError(f'row {i} ({row.role} {row.kind}) has {len(row.prompt_ids)} prompt and {n} '
                     'response tokens; both need at least one (the stop token counts).')
  for name in ('sampler_logprobs', 'model_logprobs', 'mask'):
    value = getattr(row, name)
    if len(value) != n and not (name == 'mask' and not len(value)):
      raise ValueError(f'row {i} ({row.role} {row.kind}): {name} has {len(value)} entries for {n} '
                       'response tokens; give one each, the stop token included.')
  if min(row.prompt_ids) < 0 or min(row.response_ids) < 0:
    raise ValueError(f'row {i} ({row.role} {row.kind}) has a negative token id.')
  if not np.all(np.isfinite(row.reward)):
    raise ValueError(f'row {i} ({row.role} {row.kind}): reward={row.reward} must be finite.')
  if np.ndim(row.reward) and len(row.reward) != n:
    raise ValueError(f'row {i} ({row.role} {row.kind}): {len(row.reward)} rewards for {n} response '
                     'tokens; give one number for the whole response, or one each.')
  trained_T = mask(row) > 0
  if not trained_T.any():
    raise ValueError(f'row {i} ({row.role} {row.kind}): its mask trains no token; leave it out.')
  if np.ndim(row.reward) and np.any(np.asarray(row.reward)[~trained_T]):
    raise ValueError(f'row {i} ({row.role} {row.kind}) has a reward on a token that its mask '
                     'leaves out, where it would count for nothing; put it on the last trained '
                     'token before.')
  return len(row.prompt_ids) + n
