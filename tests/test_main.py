# SPDX-License-Identifier: Apache-2.0
"""The command line answers a user's mistake with one paragraph, a non-zero status and no work."""

import importlib.util
import pathlib
import signal
import subprocess
import sys
import types

import pytest

from absolute_zero_jax import config, main, parts

ROOT = pathlib.Path(__file__).resolve().parents[1]


def _run(*args):
  return subprocess.run([sys.executable, '-m', 'absolute_zero_jax.main', *args], cwd=ROOT,
                        capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize('args, words', [
    ((), '--config is missing'),
    (('--config', 'configs/nope.py'), 'is no file'),
    (('--config', 'configs/smoke.py:foo'), "'foo' is unknown"),
    (('--config', 'configs/smoke.py', '--config.train.stepz=3'), "Did you mean 'steps'"),
    (('--config', 'configs/smoke.py', '--config.train.steps=x'), 'train.steps'),
    (('--config', 'configs/smoke.py', '--config.train.steps=0'), 'train.steps=0 is impossible'),
    (('--confi', 'configs/smoke.py'), 'Did you mean'),
    (('--config', 'configs/smoke.py', 'stray'), 'is no flag'),
    (('--config', 'configs/smoke.py', '--config.preset=azr_paper'), 'configs/smoke.py:preset=NAME'),
    (('--config', 'configs/smoke.py', '--workdir', 'zz://x'), 'gs://, s3://'),
])
def test_a_bad_command_line_is_one_paragraph(args, words):
  out = _run(*args)
  assert out.returncode == 2
  assert out.stderr.startswith('error: ')
  assert words in ' '.join(out.stderr.split())
  assert 'Traceback' not in out.stderr and len(out.stderr.splitlines()) < 12


def test_help_and_dry_run_import_no_jax():
  code = ('import sys; from absolute_zero_jax import main; '
          'status = main.main(["x"] + sys.argv[1:]); '
          'assert not [m for m in sys.modules if m.split(".")[0] in ("jax", "flax")]; '
          'sys.exit(status)')
  for args, words in [(['--help'], '--workdir'),
                      (['--config', 'configs/tiny.py', '--help'], 'control=NAME'),
                      (['--config', 'configs/smoke.py', '--dry_run', '--config.train.steps=7'],
                       'steps: 7')]:
    out = subprocess.run([sys.executable, '-c', code, *args], cwd=ROOT, capture_output=True,
                         text=True, timeout=120)
    assert out.returncode == 0, out.stderr
    assert words in out.stdout


def test_an_interrupted_process_waits_for_no_thread():
  code = ('import threading, time; from absolute_zero_jax import main\n'
          'threading.Thread(target=time.sleep, args=(600,)).start()\n'
          'print("bye")\nmain._leave(130)')
  out = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True,
                       timeout=60)
  assert (out.returncode, out.stdout) == (130, 'bye\n')


def test_an_interrupt_says_what_is_saved(tmp_path, monkeypatch, capsys):
  from absolute_zero_jax import train

  def interrupted(*_):
    raise KeyboardInterrupt
  monkeypatch.setattr(train, 'run', interrupted)
  before = signal.getsignal(signal.SIGINT)
  argv = ['x', '--config', str(ROOT / 'configs/tiny.py'), '--workdir', str(tmp_path)]
  assert main.main(argv) == 130
  assert ('Nothing was saved yet (checkpoint.every_steps=5): the same command begins anew'
          in capsys.readouterr().err)
  for step in ('5', '10', '15.orbax-checkpoint-tmp'):
    (tmp_path / 'checkpoints' / step).mkdir(parents=True)
  assert main.main(argv) == 130
  assert f'up to step 10 is safe in {tmp_path}; the same' in capsys.readouterr().err
  assert signal.getsignal(signal.SIGINT) is before                       # a notebook goes on


def test_a_damaged_checkpoint_is_not_called_safe(tmp_path, monkeypatch, capsys):
  from absolute_zero_jax import checkpoint, train

  def damaged(*_):
    raise checkpoint.CheckpointError('checkpoint 4 is damaged')
  monkeypatch.setattr(train, 'run', damaged)
  (tmp_path / 'checkpoints' / '4').mkdir(parents=True)
  argv = ['x', '--config', str(ROOT / 'configs/tiny.py'), '--workdir', str(tmp_path)]
  assert main.main(argv) == 1
  said = capsys.readouterr().err
  assert said.startswith('error: checkpoint 4 is damaged.') and 'safe' not in said


def test_a_process_runs_several_command_lines_each_with_its_own_overrides(monkeypatch, capsys):
  monkeypatch.setattr(sys, 'argv', ['ipykernel_launcher', '--f=kernel.json'])   # of a notebook
  start = ['x', '--config', str(ROOT / 'configs/smoke.py'), '--dry_run']
  said = []
  for more in (['--config.train.steps=31'], ['--config.train.minutes=7.5'], []):
    assert main.main(start + more) == 0
    said.append(capsys.readouterr().out)
  assert 'steps: 31' in said[0] and 'minutes: 7.5' not in said[0]
  assert 'steps: 31' not in said[1] and 'minutes: 7.5' in said[1]
  assert 'steps: 31' not in said[2] and 'minutes: 7.5' not in said[2]


def test_an_error_of_the_users_own_code_says_where(tmp_path, monkeypatch, capsys):
  (tmp_path / 'mine_raises.py').write_text(
      'def reward(**fields):\n  raise ValueError("not mine")\n')
  monkeypatch.syspath_prepend(tmp_path)
  argv = ['x', '--config', str(ROOT / 'configs/smoke.py'), '--workdir', str(tmp_path / 'run'),
          '--config.reward.name=mine_raises:reward']
  assert main.main(argv) == 1
  text = ' '.join(capsys.readouterr().err.split())
  assert 'not mine' in text and 'mine_raises.py:2; --traceback' in text


def test_the_place_is_that_of_what_an_error_was_raised_from(tmp_path, monkeypatch):
  (tmp_path / 'mine_adds.py').write_text('def reward(**fields):\n  return {} + fields\n')
  monkeypatch.syspath_prepend(tmp_path)
  c = config.get_config()
  c.reward.name = 'mine_adds:reward'
  with pytest.raises(config.ConfigError, match='unsupported operand') as error:
    parts.rewards(c)
  assert main._place(error.value) == '(mine_adds.py:2; --traceback shows more) '


def test_every_command_of_the_config_has_its_module():
  c = config.get_config()
  for command, module in main._COMMANDS.items():
    c.command = command
    config.validate(c)
    assert importlib.util.find_spec(f'absolute_zero_jax.{module}')
  c.command = 'play'
  with pytest.raises(config.ConfigError, match="'selfplay', 'seed'"):
    config.validate(c)


@pytest.mark.parametrize('text, words', [
    ('import no_such_module', "'{file}' (own.py:1; --traceback shows more) : ModuleNotFoundError"),
    ('def get_config(arg=None):\n  return misspelt', '(own.py:2; --traceback shows more) : NameE'),
    ('def get_config(arg=None):\n  1 / 0', 'ZeroDivisionError'),
    ('def get_config(arg=None):\n  pass', 'its get_config gives NoneType, and must return'),
    ('def get_config():\n  return 1', 'TypeError: get_config() takes 0'),
    ('from absolute_zero_jax import config\n'
     'def get_config(arg=None):\n  c = config.get_config()\n'
     '  c.selfplya.batch = 3\n  return c', 'Did you mean "selfplay"'),
])
def test_a_mistake_in_a_users_config_is_named_with_its_file(tmp_path, capsys, text, words):
  file = tmp_path / 'own.py'
  file.write_text(text)
  assert main.main(['x', '--config', str(file)]) == 2
  said = ' '.join(capsys.readouterr().err.split())
  assert words.format(file=file) in said and '\\' not in said


def test_a_workdir_that_is_a_file_is_refused(tmp_path, capsys):
  (tmp_path / 'file').write_text('')
  (tmp_path / 'link').symlink_to('nowhere')
  for name in ('file', 'link'):
    assert main.main(['x', '--config', 'configs/smoke.py', '--workdir', str(tmp_path / name)]) == 2
    assert 'is a file, or a link to nothing' in ' '.join(capsys.readouterr().err.split())


def test_out_of_memory_says_what_to_change(monkeypatch, capsys, tmp_path):
  def run(c, workdir):
    raise RuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 640000000000 bytes.\nmore')
  monkeypatch.setattr(main.importlib, 'import_module', lambda name: types.SimpleNamespace(run=run))
  assert main.main(['x', '--config', 'configs/smoke.py', '--workdir', str(tmp_path / 'w')]) == 1
  said = ' '.join(capsys.readouterr().err.split())
  assert 'out of memory' in said and 'train.micro_batch_tokens' in said and 'more' not in said
