# SPDX-License-Identifier: Apache-2.0
"""Host arithmetic of the sampler: few static sizes for many lengths, and shared prompt prefixes.

Every distinct array size is a compiled program, so lengths are rounded up to a short ladder, rows
to powers of two, numbers of prompts are split into powers of four, and prompts are clustered by the
tokens they begin with.
"""

from collections.abc import Iterable, Sequence

Tokens = tuple[int, ...]


def ladder(first: int, cap: int) -> tuple[int, ...]:
  """Sizes first, 1.5 first, 2 first, 3 first, 4 first, ... up to the first one of at least `cap`.

  Multiples of 16 where `first` is one of 32.
  """
  sizes = [first]
  while sizes[-1] < cap:
    power = first << (len(sizes) // 2)
    sizes.append(power * 3 // 2 if len(sizes) % 2 else power)
  return tuple(sizes)


def fit(sizes: Sequence[int], need: int) -> int:
  """The smallest of ascending `sizes` that holds `need`. Raises ValueError if none does."""
  for size in sizes:
    if size >= need:
      return size
  raise ValueError(f'no size in {tuple(sizes)} holds {need}.')


def width(rows: int, shards: int = 1) -> int:
  """Batch size for `rows` sequences: a power of two times the number of row shards."""
  size = shards
  while size < rows:
    size *= 2
  return size


def batches(count: int, most: int, padded: bool = False) -> list[int]:
  """Splits `count` prompts into batches of 64, 16, 4 and 1, none above `most`.

  Without padding; or `padded`: several prompts go in batches of the largest allowed size alone.
  """
  sizes = []
  if padded and count > 1:
    size = next(size for size in (64, 16, 4, 1) if size <= max(1, most))
    return [size] * -(-count // size)
  for size in (64, 16, 4, 1):
    if size <= max(1, most):
      sizes += [size] * (count // size)
      count %= size
  return sizes


def shared_prefixes(contexts: Iterable[Tokens], shortest: int) -> dict[Tokens, Tokens]:
  """For each distinct context the prefix that it should share with others; () for none.

  Contexts fall into clusters such that prefilling each cluster's common prefix once saves the most
  tokens; prefixes below `shortest` tokens are not worth a call of their own.
  """
  ordered = sorted(set(contexts))
  common = [_common(a, b) for a, b in zip(ordered, ordered[1:])]
  prefixes = {}
  for begin, end, size in _clusters(common, 0, len(ordered), shortest)[1]:
    prefixes |= {context: context[:size] for context in ordered[begin:end]}
  return prefixes


def _clusters(common, begin, end, shortest):
  """Best (tokens saved, [(begin, end, prefix size)]) for the sorted contexts begin..end-1.

  `common[i]` is the number of tokens that contexts i and i + 1 share.
  """
  best = 0, [(begin, end, 0)]
  pending = [(begin, end)]
  # Cutting where neighbours share least, recursively, visits the nodes of the contexts' prefix
  # tree; a stack instead of recursion, since 10,000 nested prompts are possible.
  tree = []
  while pending:
    a, b = pending.pop()
    cut = min(range(a, b - 1), key=common.__getitem__, default=None)
    tree.append((a, b, cut))
    if cut is not None:
      pending += [(a, cut + 1), (cut + 1, b)]
  plans = {}
  for a, b, cut in reversed(tree):
    size = common[cut] if cut is not None else 0
    saved = (b - a - 1) * size if size >= shortest else 0
    best = saved, [(a, b, size if saved else 0)]
    if cut is not None:
      left, right = plans.pop((a, cut + 1)), plans.pop((cut + 1, b))
      if left[0] + right[0] > saved:
        best = left[0] + right[0], left[1] + right[1]
    plans[a, b] = best
  return plans.get((begin, end), best)


def _common(a, b):
  count = 0
  for x, y in zip(a, b):
    if x != y:
      break
    count += 1
  return count
