# SPDX-License-Identifier: Apache-2.0
"""A directory that appears whole or not at all.

    .name.part-PID/ is filled and flushed --> an earlier name/ steps aside --> rename --> name/
"""

from collections.abc import Iterator, Mapping
import contextlib
import errno
import glob
import json
import os
import pathlib
import shutil

# What an export may consist of. A directory with any other entry is not ours to replace.
_OURS = ('.json', '.safetensors', '.jinja', '.model', '.txt')


@contextlib.contextmanager
def replacing(path: str | os.PathLike, *, needed_bytes: int) -> Iterator[pathlib.Path]:
  """Yields an empty directory; when the block ends well it becomes `path`, replacing an export.

  If the block fails or is interrupted, `path` is as before and the part directory is removed; that
  of a killed process is removed by the next one. A process killed between the last two renames
  leaves the earlier export beside as `.name.old-PID`.

  Raises:
    ValueError: `path` is a file, or a directory that is no earlier export.
    OSError: fewer than `needed_bytes` are free (ENOSPC), or the system refuses the directory.
  """
  final = pathlib.Path(path).absolute()
  _refuse_foreign(final)
  part = final.with_name(f'.{final.name}.part-{os.getpid()}')
  try:
    final.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(final.parent).free
    if free < needed_bytes:
      raise OSError(errno.ENOSPC, f'{needed_bytes / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free')
    _clear(final)
    part.mkdir()
    yield part
    for file in part.iterdir():
      flush(file)
    flush(part)
    _swap(part, final)
  except OSError as e:
    if e.errno != errno.ENOSPC:
      raise
    raise OSError(errno.ENOSPC, f'no space left to write {final} ({e.strerror or e}); nothing was '
                  'kept of it. Free some space or choose a directory on another disk') from None
  finally:
    shutil.rmtree(part, ignore_errors=True)


def write_json(path: pathlib.Path, value: Mapping) -> None:
  """Writes `value` as indented JSON, keys in their order."""
  path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')


def flush(path: pathlib.Path) -> None:
  """Forces a file or directory entry to the disk, so that a rename cannot outlive its contents."""
  handle = os.open(path, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)


def _refuse_foreign(final: pathlib.Path) -> None:
  if final.is_symlink() or (final.exists() and not final.is_dir()):
    raise ValueError(f'{final} is a file or a link; give a new directory to export to')
  foreign = sorted(p.name for p in final.iterdir() if p.is_dir() or p.suffix not in _OURS) if (
      final.is_dir()) else []
  if final.is_dir() and any(final.iterdir()) and not (final / 'config.json').exists():
    foreign = foreign or sorted(p.name for p in final.iterdir())
  if foreign:
    raise ValueError(f'{final} holds {foreign[0]!r}, which no export wrote; give a new or empty '
                     'directory, or that of an earlier export, to export to')


def _clear(final: pathlib.Path) -> None:
  """Removes part directories of this process and of those that have ended."""
  for part in final.parent.glob(f'.{glob.escape(final.name)}.part-*'):
    pid = part.name.rpartition('-')[2]
    if pid.isdecimal() and (int(pid) == os.getpid() or not _runs(int(pid))):
      shutil.rmtree(part, ignore_errors=True)


def _runs(pid: int) -> bool:
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  except (PermissionError, OverflowError):
    pass
  return True


def _swap(part: pathlib.Path, final: pathlib.Path) -> None:
  old = final.with_name(f'.{final.name}.old-{os.getpid()}')
  had = final.exists()
  if had:
    final.rename(old)
  try:
    part.rename(final)
  except BaseException:
    if had:
      old.rename(final)
    raise
  flush(final.parent)
  if had:
    shutil.rmtree(old)
