# SPDX-License-Identifier: Apache-2.0
"""The device mesh, and where each named axis of a parameter or activation lives on it.

    logical axes (models/decoder.py)  --RULES, shape, mesh-->  NamedSharding  --place-->  arrays

Mesh axes: `data` replicates the weights and splits the rows, `fsdp` splits both, `tensor` splits
heads, feed-forward width and vocabulary. A mesh of one device uses the same code.
"""

from collections.abc import Callable, Sequence
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

AXES = ('data', 'fsdp', 'tensor')

RULES = {
    'batch': ('data', 'fsdp'),
    'vocab': 'tensor',
    'embed': 'fsdp',
    'heads': 'tensor',
    'kv_heads': 'tensor',
    'ffn': 'tensor',
    'head_dim': None,
    'norm': None,
    'layers': None,
}

ROWS, WHOLE = P(RULES['batch']), P()


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1,
              devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Mesh of (data, fsdp, tensor) over `devices` (default: all); one size may be -1, 'the rest'.

  Raises ValueError if the sizes do not multiply to the number of devices.
  """
  devices = list(jax.devices() if devices is None else devices)
  sizes = [data, fsdp, tensor]
  if sum(size == -1 for size in sizes) > 1 or any(size < 1 and size != -1 for size in sizes):
    raise ValueError(f'mesh data={data}, fsdp={fsdp}, tensor={tensor}: sizes are at least 1, and '
                     'only one may be -1 (all remaining devices).')
  known = math.prod(size for size in sizes if size != -1)
  if -1 in sizes and len(devices) % known == 0:
    sizes[sizes.index(-1)] = len(devices) // known
  if math.prod(sizes) != len(devices):
    raise ValueError(f'mesh data={data}, fsdp={fsdp}, tensor={tensor} does not cover '
                     f'{len(devices)} devices; the sizes must multiply to {len(devices)}.')
  # The default axis types of new JAX versions are Explicit, which the decoder does not use.
  return Mesh(np.array(devices).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * 3)


def partition(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh,
              rules: dict[str, Any] | None = None) -> P:
  """PartitionSpec of an array whose dimensions are called `axes`.

  A mesh axis that does not divide its dimension is left out: 3 kv heads on tensor=2 are replicated.

  Raises ValueError for a name that is not in the rules.
  """
  rules = RULES if rules is None else rules
  entries = []
  for name, size in zip(axes, shape, strict=True):
    if name is not None and name not in rules:
      raise ValueError(f'no sharding rule for axis {name!r}; known: {sorted(rules)}')
    wanted = rules[name] if name is not None else None
    kept = []
    for axis in (wanted,) if isinstance(wanted, str) else wanted or ():
      if size % (math.prod(mesh.shape[a] for a in kept) * mesh.shape[axis]) == 0:
        kept.append(axis)
    entries.append(tuple(kept) if len(kept) > 1 else kept[0] if kept else None)
  return P(*entries)


def shardings(specs: Any, mesh: Mesh) -> Any:
  """Tree of NamedSharding for a tree of `decoder.Spec` (anything with `shape` and `axes`)."""
  return jax.tree.map(lambda s: NamedSharding(mesh, partition(s.axes, s.shape, mesh)),
                      specs, is_leaf=lambda s: hasattr(s, 'axes'))


def replicated(mesh: Mesh) -> NamedSharding:
  """Every device holds the whole array."""
  return NamedSharding(mesh, P())


def rows(mesh: Mesh, ndim: int = 1) -> NamedSharding:
  """The first dimension (sequences) split over data and fsdp, the others whole."""
  return NamedSharding(mesh, P(RULES['batch'], *(None,) * (ndim - 1)))


def row_shards(mesh: Mesh | None) -> int:
  """Into how many parts a batch is split; its size must be a multiple. 1 without a mesh."""
  return 1 if mesh is None else mesh.shape['data'] * mesh.shape['fsdp']


def lone_shards(mesh: Mesh | None) -> int:
  """How many shards of the rows `by_rows` runs by themselves; 1 where it leaves them together."""
  return 1 if mesh is None or mesh.shape['tensor'] > 1 else row_shards(mesh)


def by_rows(function: Callable[..., Any], mesh: Mesh | None, inputs: tuple[P, ...],
            outputs: P) -> Callable[..., Any]:
  """Inside jit: `function` on each shard of the rows for itself, so that none waits for another.

  `inputs` says of each argument whether a shard sees its part of the first dimension (`ROWS`) or
  everything (`WHOLE`). Where a tensor axis splits the layers, shards have to keep step, and the
  function sees all rows.
  """
  if lone_shards(mesh) == 1:
    return function
  return jax.shard_map(function, mesh=mesh, in_specs=inputs, out_specs=outputs, check_vma=False)


def place(tree: Any, target: Any) -> Any:
  """Puts host or device arrays where `target` (one sharding, or a tree of them) says.

  Works on several hosts too: each process hands over only the parts its devices hold.
  """
  def put(x, sharding):
    if jax.process_count() == 1 or isinstance(x, jax.Array) and not x.is_fully_addressable:
      return jax.device_put(x, sharding)
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])
  if isinstance(target, NamedSharding):
    return jax.tree.map(lambda x: put(x, target), tree)
  return jax.tree.map(put, tree, target)


def zeros(specs: Any, mesh: Mesh, dtype: Any) -> Any:
  """Arrays of zeros for a tree of specs, laid out on the mesh."""
  make = lambda s, where: jnp.zeros(s.shape, dtype, device=where)
  return jax.tree.map(make, specs, shardings(specs, mesh), is_leaf=lambda s: hasattr(s, 'axes'))


def constrain(x: jax.Array, axes: Sequence[str | None], mesh: Mesh | None) -> jax.Array:
  """Inside jit: asks the partitioner to keep `x` laid out by `axes`. No-op without a mesh."""
  if mesh is None:
    return x
  spec = partition(axes, x.shape, mesh)
  return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def platform(mesh: Mesh | None) -> str:
  """'cpu', 'gpu' or 'tpu': what the mesh is of, or without one, what JAX computes on."""
  return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


def compiler_options(mesh: Mesh | None = None, dtype: Any = 'float32') -> dict[str, str] | None:
  """For programs on many tokens at once: without XLA:CPU's YNN fusion, which makes them slower.

  Scoring took 1.2 to 1.7 times as long with it, prefilling 1.06 times, decoding 0.85 times; but
  products of 16 bits are fast by it alone (prefilling took 0.46 times as long, an update 0.3 to 0.9
  times). None in such a dtype, where this XLA does not know the option, and on another platform.
  """
  is_narrow = jnp.dtype(dtype).itemsize <= 2
  return _without_ynn() if platform(mesh) == 'cpu' and not is_narrow else None


@functools.cache
def _without_ynn():
  options = {'xla_cpu_experimental_ynn_fusion_type': ''}
  try:
    jax.jit(lambda x: x, compiler_options=options).lower(0.0).compile()
  except jax.errors.JaxRuntimeError:
    return None
  return options
