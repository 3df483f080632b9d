# SPDX-License-Identifier: Apache-2.0
"""Command line: `python -m absolute_zero_jax.main --config configs/smollm2.py --workdir runs/x`.

Flags become a checked config, then `train.run` does the work. JAX is imported inside `main`, after
a bad flag has been refused. A user's error is one paragraph and a non-zero exit status.
"""

import importlib
import pathlib
import runpy
import sys
import textwrap

from absl import flags
from ml_collections import config_flags

from absolute_zero_jax import config as config_lib

USAGE = """Trains a language model by Absolute Zero self-play.

  python -m absolute_zero_jax.main --config configs/smollm2.py --workdir runs/smollm2

Any field of the config can be set: --config.train.steps=3 --config.selfplay.batch=8.
absolute_zero_jax/config.py lists every field with its meaning; --dry_run prints the resolved one.
The same command on the same --workdir continues an interrupted run.
"""

# Modules that define run(config, workdir), by `config.command`.
_COMMANDS = {'selfplay': 'train', 'seed': 'train', 'pretrain': 'pretrain', 'evaluate': 'evaluate'}
_FLAGS = flags.FlagValues()
_CONFIG = config_flags.DEFINE_config_file(
    'config', None, 'Config file, e.g. configs/smollm2.py, with arguments after a colon: '
    'configs/smollm2.py:smoke.', lock_config=True, flag_values=_FLAGS)
_WORKDIR = flags.DEFINE_string(
    'workdir', None, 'Folder for checkpoints, logs and records; local or remote (gs://...). '
    'Default: runs/NAME_OF_CONFIG.', flag_values=_FLAGS)
_DRY_RUN = flags.DEFINE_bool(
    'dry_run', False, 'Print the resolved config and stop.', flag_values=_FLAGS)
_TRACEBACK = flags.DEFINE_bool(
    'traceback', False, 'Show the full traceback of an error.', flag_values=_FLAGS)
_HELP = flags.DEFINE_bool('help', False, 'Show this text.', short_name='h', flag_values=_FLAGS)


def main(argv: list[str] | None = None) -> int:
  """Runs one command line; returns the exit status: 0, 1 (failed), 2 (bad flags), 130 (Ctrl-C)."""
  argv = sys.argv if argv is None else argv
  try:
    c, workdir = parse(argv)
    if c is None:
      print(f'{USAGE}\nFlags:\n{_FLAGS.get_help()}')
      return 0
    config_lib.validate(c)
  except (flags.Error, OSError, ValueError, KeyError, AttributeError, TypeError, SyntaxError) as e:
    return _fail(e, 2)
  if _DRY_RUN.value:
    print(c)
    return 0
  try:
    # The module imports JAX.
    importlib.import_module(f'absolute_zero_jax.{_COMMANDS[c.command]}').run(c, workdir)
  except KeyboardInterrupt:
    print(f'\nInterrupted. {_resume_hint(workdir)}', file=sys.stderr)
    return 130
  except (ValueError, OSError) as e:
    # A truncated file, a wrong tokenizer, a full disk: the message says what and what to do.
    return _fail(e, 1, _resume_hint(workdir))
  return 0


def parse(argv: list[str]):
  """(config, workdir) from a command line; config is None when help was asked for."""
  _FLAGS.unparse_flags()
  _check_config_flags(argv[1:])
  rest = _FLAGS(argv)
  if _HELP.value:
    return None, None
  if len(rest) > 1:
    raise ValueError(f'{rest[1]!r} is no flag; flags start with --. See --help.')
  if _CONFIG.value is None:
    raise ValueError('--config is missing, e.g. --config configs/smollm2.py. See --help.')
  name = config_flags.get_config_filename(_FLAGS['config']).partition(':')[0]
  stem = name.rpartition('/')[2].removesuffix('.py')
  return _CONFIG.value, _WORKDIR.value or f'runs/{stem}'


def _check_config_flags(args: list[str]) -> None:
  """Refuses a missing file, a bad file argument or an unknown field in words of our own.

  The flags library reports all three as tracebacks or without the field's full name.
  """
  spec = None
  for i, arg in enumerate(args):
    name, equals, value = arg.lstrip('-').partition('=')
    if arg.startswith('-') and name == 'config':
      spec = value if equals else (args[i + 1] if i + 1 < len(args) else '')
  if spec is None:
    return
  path, _, file_arg = spec.partition(':')
  if not pathlib.Path(path).is_file():
    raise ValueError(f'--config {path!r} is no file; the ones that come along are in configs/.')
  module = runpy.run_path(path)
  if 'get_config' not in module:
    raise ValueError(f'--config {path!r} defines no get_config(arg=None).')
  c = module['get_config'](file_arg or None)
  for arg in args:
    field = arg.lstrip('-').partition('=')[0]
    if arg.startswith('-') and field.startswith('config.'):
      config_lib.check_field(c, field.removeprefix('config.'))


def _fail(e: Exception, status: int, hint: str = '') -> int:
  if _FLAGS.is_parsed() and _TRACEBACK.value:
    raise e
  text = str(e.args[0]) if isinstance(e, KeyError) and e.args else str(e) or type(e).__name__
  text = text.rstrip() if text.rstrip().endswith(('.', '?', '!')) else f'{text.rstrip()}.'
  print(textwrap.fill(f'error: {" ".join(text.split())} {hint}'.strip(), 100,
                      break_long_words=False, break_on_hyphens=False), file=sys.stderr)
  return status


def _resume_hint(workdir: str) -> str:
  folder = pathlib.Path(workdir) / 'checkpoints'
  if '://' not in workdir and not (folder.is_dir() and any(folder.iterdir())):
    return ''
  return f'Finished iterations are safe in {workdir}; the same command continues there.'


if __name__ == '__main__':
  sys.exit(main())
