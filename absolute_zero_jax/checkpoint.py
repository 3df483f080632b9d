# SPDX-License-Identifier: Apache-2.0
"""Saves and restores a whole run: weights, optimizer, keys, buffers and counters in one step.

One orbax step directory holds `state` (arrays) and `host` (JSON). Orbax writes into a temporary
directory and renames it, so a kill at any moment leaves the previous step whole; the directory may
be remote (`gs://...`). Format versions are checked before anything is used, and the arrays' bits
against a checksum among the JSON.
"""

from collections.abc import Iterator
import contextlib
import errno
import fcntl
import json
import os
import shutil
from typing import Any
import zlib

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from absolute_zero_jax import metrics

FORMAT = 1


class CheckpointError(ValueError):
  """A workdir or checkpoint that this run cannot continue."""


class Checkpoints:
  """The step directories under `workdir/checkpoints`; the newest `keep` stay.

  `save` returns before the bytes are on disk (they are written in the background, the arrays are
  copied first); `wait` and `close` block until they are.
  """

  def __init__(self, workdir: epath.PathLike, *, keep: int = 2):
    def make():
      return ocp.CheckpointManager(
          metrics.absolute(workdir) / 'checkpoints', item_names=('state', 'host'),
          options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True))
    try:
      self._manager = make()
    except FileNotFoundError:    # a step that the process's last run was still deleting
      self._manager = make()
    self._checksums: dict[int, int | None] = {}      # of the steps whose host was read

  def latest(self) -> int | None:
    """The newest complete step, or None."""
    return self._manager.latest_step()

  def steps(self) -> list[int]:
    """All complete steps, oldest first."""
    return sorted(self._manager.all_steps())

  def save(self, step: int, state: Any, host: dict[str, Any]) -> None:
    """`state`: a pytree of arrays (NamedTuples stay what they are); `host`: JSON-able."""
    self._manager.save(step, force=True, args=ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        host=ocp.args.JsonSave({'format': FORMAT, 'checksum': checksum(state)} | host)))

  def restore_host(self, step: int) -> dict[str, Any]:
    """Raises CheckpointError for a damaged step, or one of another format."""
    host = self._restore(step, ocp.args.Composite(host=ocp.args.JsonRestore())).host
    if not isinstance(host, dict):
      raise self._damaged(step, 'host holds no JSON object')
    if host.get('format') != FORMAT:
      raise CheckpointError(f'checkpoint {step} has format {host.get("format")!r}, this version '
                            f'reads {FORMAT}; continue it with the version that wrote it.')
    self._checksums[step] = host.get('checksum')     # earlier versions wrote none
    return host

  def restore_state(self, step: int, abstract: Any) -> Any:
    """`abstract` gives structure, shapes, dtypes and shardings (`jax.ShapeDtypeStruct` leaves).

    Raises CheckpointError for a damaged step.
    """
    state = self._restore(step, ocp.args.Composite(
        state=ocp.args.StandardRestore(abstract))).state
    if step not in self._checksums:
      self.restore_host(step)
    if self._checksums[step] not in (None, checksum(state)):
      raise self._damaged(step, 'its arrays are not those that were saved')
    return state

  def _restore(self, step, args):
    try:
      return self._manager.restore(step, args=args)
    except Exception as error:  # orbax raises Exception itself for bytes that it cannot read
      if _interrupted(error):
        raise KeyboardInterrupt from error
      missing = isinstance(error, FileNotFoundError)
      if missing and step not in self.steps():
        raise CheckpointError(f'there is no checkpoint {step} in {self._manager.directory}; there '
                              f'are {self.steps() or "none"}.') from error
      if isinstance(error, (jax.errors.JaxRuntimeError, OSError)) and not missing:
        raise                                        # not the bytes' fault
      raise self._damaged(step, repr(error)) from error

  def _damaged(self, step, reason):
    earlier = max((s for s in self.steps() if s < step), default=None)
    after = ('begin anew: there is no earlier one' if earlier is None
             else f'continue from checkpoint {earlier}')
    reason = reason if len(reason) <= 200 else f'{reason[:200]} ...'
    return CheckpointError(f'checkpoint {step} is damaged, or out of reach ({reason}). If it is '
                           f'damaged, delete the folder {self._manager.directory / str(step)} to '
                           f'{after}.')

  def wait(self) -> None:
    self._manager.wait_until_finished()

  def close(self) -> None:
    self._manager.wait_until_finished()
    self._manager.close()


def _interrupted(error: BaseException | None) -> bool:
  """Whether `error` is what orbax makes of an interrupt that comes while it calls back."""
  while error is not None and not isinstance(error, KeyboardInterrupt):
    error = error.__cause__ or error.__context__
  return error is not None


def checksum(tree: Any) -> int:
  """A number that a flipped bit of the arrays changes, and their shardings do not."""
  # Integers, whose sum is the same in any order.
  return zlib.crc32(np.array(jax.device_get([_sum_of_bits(x) for x in jax.tree.leaves(tree)])))


@jax.jit
def _sum_of_bits(x):
  return jnp.sum(x.view(f'uint{8 * x.dtype.itemsize}'), dtype=jnp.uint32)


def abstract_like(tree: Any) -> Any:
  """Shapes, dtypes and shardings of a tree of arrays, without the arrays."""
  return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, 'sharding', None)), tree)


@contextlib.contextmanager
def owned(workdir: epath.PathLike) -> Iterator[None]:
  """Keeps every other run out of a local `workdir` meanwhile, in this process and in others.

  Removes the half-written checkpoints of a killed run from it. Of several hosts the first one holds
  it for all.

  Raises:
    CheckpointError: another run is in it.
  """
  workdir = metrics.absolute(workdir)
  if '://' in str(workdir) or jax.process_index():
    yield
    return
  workdir.mkdir(parents=True, exist_ok=True)
  handle = os.open(workdir, os.O_RDONLY)       # the lock ends with the process, however that ends
  try:
    try:
      fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:                       # other errors: a file system without locks
      if e.errno == errno.EWOULDBLOCK:
        raise CheckpointError(f'another run is going on in {workdir}; wait for it, end it, or use '
                              'another --workdir.') from None
    for left in (workdir / 'checkpoints').glob('*.orbax-checkpoint-tmp*'):
      shutil.rmtree(left, ignore_errors=True)
    yield
  finally:
    os.close(handle)


def _at(config: dict[str, Any], field: str) -> str:
  for name in field.split('.'):
    config = config.get(name, 'not set') if isinstance(config, dict) else 'not set'
  return f'{config!r:.60}'


def claim(workdir: epath.PathLike, config: dict[str, Any], *, free: tuple[str, ...] | None,
          differences) -> None:
  """Writes `workdir/config.json`, or checks that the run found there is the same one.

  Fields in `free` (exact names or sections) may change between the parts of a run; None lets every
  field change.

  Raises:
    CheckpointError: the workdir belongs to a run with another config.
  """
  workdir = metrics.absolute(workdir)
  path = workdir / 'config.json'
  workdir.mkdir(parents=True, exist_ok=True)
  if free is not None and not path.exists():
    raise CheckpointError(f'{workdir} holds checkpoints, but no config.json that says of which '
                          'run; put it back, or use another --workdir.')
  if free is not None:
    try:
      found = json.loads(path.read_text())
      if not isinstance(found, dict):
        raise ValueError(f'it holds {found!r:.60}')
    except ValueError as e:
      raise CheckpointError(f'{path} is not readable JSON ({e}); use another --workdir.') from e
    changed = [f for f in differences(found, config)
               if not any(f == x or f.startswith(x + '.') for x in free)]
    if changed:
      there = '; '.join(f'{field} is {_at(found, field)} there and {_at(config, field)} here'
                        for field in changed)
      raise CheckpointError(f'{workdir} belongs to a run with another config: {there}. Use another '
                            '--workdir, or set these fields back to continue that run.')
  metrics.write_atomically(path, json.dumps(config, indent=1, sort_keys=True))
