# SPDX-License-Identifier: Apache-2.0
"""Command line: `python -m absolute_zero_jax.main --config configs/smollm2.py --workdir runs/x`.

Flags become a checked config, then `train.run` does the work. JAX is imported inside `main`, after
a bad flag has been refused. A user's error is one paragraph and a non-zero exit status.
"""

import ast
import contextlib
import importlib
import os
import pathlib
import runpy
import signal
import sys
import sysconfig
import textwrap
import traceback

from absl import flags
from ml_collections import config_flags

from absolute_zero_jax import config as config_lib
from absolute_zero_jax.executor import ExecutorError

USAGE = """Trains a language model by Absolute Zero self-play.

  python -m absolute_zero_jax.main --config configs/smollm2.py --workdir runs/smollm2

Any field of the config can be set: --config.train.steps=3 --config.selfplay.batch=8.
absolute_zero_jax/config.py lists every field with its meaning; --dry_run prints the resolved one,
--config FILE --help what the file says of itself and of its arguments.
The same command on the same --workdir continues an interrupted run.
"""

# Modules that define run(config, workdir), by `config.command`.
_COMMANDS = {'selfplay': 'train', 'seed': 'train', 'pretrain': 'pretrain', 'evaluate': 'evaluate'}
_REMOTE = ('gs', 's3')
# Files of Python and of packages: an error that comes from there alone is not the user's code.
_LIBRARIES = {pathlib.Path(sysconfig.get_path(name)).resolve()
              for name in ('stdlib', 'platstdlib', 'purelib', 'platlib')}
def main(argv: list[str] | None = None) -> int:
  """Runs one command line; returns the exit status: 0, 1 (failed), 2 (bad flags), 130 (Ctrl-C)."""
  argv = sys.argv if argv is None else argv
  values = _flags(argv)
  try:
    c, workdir = _parse(argv, values)
    if c is None:
      print(f'{USAGE}\nFlags:\n{values.get_help()}{_about(argv)}')
      return 0
    config_lib.validate(c)
  except (flags.Error, OSError, ValueError, KeyError, AttributeError, TypeError, SyntaxError) as e:
    return _fail(e, 2, values)
  if values.dry_run:
    print(c)
    return 0
  try:
    # The module imports JAX.
    importlib.import_module(f'absolute_zero_jax.{_COMMANDS[c.command]}').run(c, workdir)
  except KeyboardInterrupt:
    hint = 'The same command begins anew.'
    if c.command in ('selfplay', 'pretrain'):
      hint = _resume_hint(workdir, again=True) or (
          f'Nothing was saved yet (checkpoint.every_steps={c.checkpoint.every_steps}): the same '
          'command begins anew.')
    print(f'\nInterrupted. {hint}', file=sys.stderr)
    return 130
  except (ValueError, OSError, ImportError, ExecutorError) as e:
    # A truncated file, a wrong tokenizer, a full disk: the message says what and what to do.
    # CheckpointError, whose module imports JAX, says itself what is safe.
    hint = ('' if type(e).__name__ == 'CheckpointError'
            else _resume_hint(workdir, again=isinstance(e, OSError)))
    return _fail(e, 1, values, f'{_place(e)}{hint}')
  except RuntimeError as e:
    if 'RESOURCE_EXHAUSTED' not in str(e):
      raise
    reason = RuntimeError(f'out of memory: {str(e).strip().splitlines()[0]}')
    return _fail(reason, 1, values, f'Try a smaller train.micro_batch_tokens or sampler.slots, '
                 "model.remat='full', or model.dtype and model.param_dtype='bfloat16'. "
                 f'{_resume_hint(workdir, again=False)}')
  return 0


def _flags(argv: list[str]) -> flags.FlagValues:
  """The flags of one command line: of each its own, so that a notebook can run several."""
  values = flags.FlagValues()
  config_flags.DEFINE_config_file(
      'config', None, 'Config file, e.g. configs/smollm2.py, with arguments after a colon: '
      'configs/smollm2.py:gpu.', lock_config=True, flag_values=values, sys_argv=argv)
  flags.DEFINE_string(
      'workdir', None, 'Folder for checkpoints, logs and records; local or remote (gs://...). '
      'Default: runs/NAME_OF_CONFIG.', flag_values=values)
  flags.DEFINE_bool('dry_run', False, 'Print the resolved config and stop.', flag_values=values)
  flags.DEFINE_bool('traceback', False, 'Show the full traceback of an error.', flag_values=values)
  flags.DEFINE_bool('help', False, 'Show this text.', short_name='h', flag_values=values)
  return values


def _parse(argv: list[str], values: flags.FlagValues):
  """(config, workdir) from a command line; config is None when help was asked for.

  Raises ValueError, or what the flags library and the config file raise, for a bad command line.
  """
  _check_config_flags(argv[1:])
  rest = values(argv)
  if values.help:
    return None, None
  if len(rest) > 1:
    raise ValueError(f'{rest[1]!r} is no flag; flags start with --. See --help.')
  if values.config is None:
    raise ValueError('--config is missing, e.g. --config configs/smollm2.py. See --help.')
  name = config_flags.get_config_filename(values['config']).partition(':')[0]
  stem = name.rpartition('/')[2].removesuffix('.py')
  # The shell leaves the ~ of --workdir=~/x alone.
  workdir = os.path.expanduser(values.workdir or f'runs/{stem}')
  scheme, remote, _ = workdir.partition('://')
  if remote and scheme not in _REMOTE:
    raise ValueError(f'--workdir {workdir!r}: {scheme}:// is unknown; allowed: a local folder, '
                     f'{", ".join(f"{name}://" for name in _REMOTE)}.')
  if not remote and os.path.lexists(workdir) and not os.path.isdir(workdir):
    raise ValueError(f'--workdir {workdir!r} is a file, or a link to nothing; give a folder, which '
                     'need not exist.')
  return values.config, workdir


def _config_spec(args: list[str]) -> str | None:
  """What --config is set to, file and arguments; None without it."""
  spec = None
  for i, arg in enumerate(args):
    name, equals, value = arg.lstrip('-').partition('=')
    if arg.startswith('-') and name == 'config':
      spec = value if equals else (args[i + 1] if i + 1 < len(args) else '')
  return spec


def _about(argv: list[str]) -> str:
  path = pathlib.Path((_config_spec(argv[1:]) or '').partition(':')[0])
  if not path.is_file():
    return ''
  return f'\n{path}:\n\n{ast.get_docstring(ast.parse(path.read_text())) or ""}'


def _check_config_flags(args: list[str]) -> None:
  """Refuses a missing file, a bad file argument or an unknown field in words of our own.

  The flags library reports all three as tracebacks or without the field's full name.
  """
  spec = _config_spec(args)
  if spec is None:
    return
  path, _, file_arg = spec.partition(':')
  if not pathlib.Path(path).is_file():
    raise ValueError(f'--config {path!r} is no file; the ones that come along are in configs/.')
  try:
    module = runpy.run_path(path)
    if 'get_config' not in module:
      raise ValueError(f'--config {path!r} defines no get_config(arg=None).')
    c = module['get_config'](file_arg or None)
  except (ValueError, OSError):              # says what is wrong in its own words
    raise
  except Exception as e:                     # the file is code of the user's: anything may happen
    text = str(e).replace('\\n', ' ').replace("\\'", "'")
    raise ValueError(f'--config {path!r} {_place(e)}: {type(e).__name__}: {text}') from e
  if not isinstance(c, config_lib.ConfigDict):
    raise ValueError(f'--config {path!r}: its get_config gives {type(c).__name__}, and must return '
                     'a ConfigDict.')
  for arg in args:
    field = arg.lstrip('-').partition('=')[0]
    if arg.startswith('-') and field == 'config.preset':
      raise ValueError('--config.preset would only rename what the file chose: give the preset to '
                       f'the file, --config {path}:preset=NAME, if it takes one.')
    if arg.startswith('-') and field.startswith('config.'):
      config_lib.check_field(c, field.removeprefix('config.'))


def _fail(e: Exception, status: int, values: flags.FlagValues, hint: str = '') -> int:
  if values.is_parsed() and values.traceback:
    raise e
  text = str(e.args[0]) if isinstance(e, KeyError) and e.args else str(e) or type(e).__name__
  text = text.rstrip() if text.rstrip().endswith(('.', '?', '!')) else f'{text.rstrip()}.'
  print(textwrap.fill(f'error: {" ".join(text.split())} {hint}'.strip(), 100,
                      break_long_words=False, break_on_hyphens=False), file=sys.stderr)
  return status


def _place(e: Exception) -> str:
  """Where an error comes from that passed through a file of the user's own."""
  own = pathlib.Path(__file__).resolve().parent
  frames = []
  while e is not None:                   # what an error was raised from lies deeper
    frames += traceback.extract_tb(e.__traceback__)
    e = e.__cause__
  for frame in reversed(frames):
    path = pathlib.Path(frame.filename).resolve()
    if path.is_file() and not path.is_relative_to(own) and not any(
        path.is_relative_to(place) for place in _LIBRARIES):
      return f'({path.name}:{frame.lineno}; --traceback shows more) '
  return ''


def _resume_hint(workdir: str, again: bool) -> str:
  folder = pathlib.Path(workdir) / 'checkpoints'
  if '://' in workdir:
    return f'{"The same command continues" if again else "Checkpoints are kept"} in {workdir}.'
  try:
    steps = [int(p.name) for p in folder.iterdir() if p.name.isdecimal()]
  except OSError:                        # none yet, or no name of a folder
    steps = []
  if not steps:
    return ''
  return (f'What was done up to step {max(steps)} is safe in {workdir}'
          f'{"; the same command continues there" if again else ""}.')


def _leave(status: int):
  """Ends the process: after an interrupt at once, since orbax's threads may wait for minutes."""
  if status == 130:
    signal.signal(signal.SIGINT, signal.SIG_IGN)   # what is left is to leave
    for stream in (sys.stdout, sys.stderr):
      with contextlib.suppress(OSError):           # a closed pipe
        stream.flush()
    os._exit(status)
  sys.exit(status)


if __name__ == '__main__':
  _leave(main())
