# SPDX-License-Identifier: Apache-2.0
"""What the README says is true: its Python runs, its test command is CI's, its files exist."""

import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
README = (ROOT / 'README.md').read_text()
COMMANDS = re.findall(r'```bash\n(.*?)```', README, re.S)
PYTHON = re.findall(r'```python\n(.*?)```', README, re.S)
TINY = ("c.model.name = 'random:llama,vocab=259,embed=32,layers=2,heads=2,kv_heads=1,head_dim=16,"
        "ffn=64'\nc.model.tokenizer = 'bytes'")


def _run(code, cwd, timeout=300):
  out = subprocess.run([sys.executable, '-c', code], cwd=cwd, capture_output=True, text=True,
                       timeout=timeout, env=_environment())
  assert out.returncode == 0, out.stderr
  return out.stdout


def _environment():
  import os
  return os.environ | {'PYTHONPATH': str(ROOT), 'XLA_FLAGS': ''}


def test_a_self_play_step_takes_under_40_lines(tmp_path):
  code = PYTHON[0]
  assert len([line for line in code.splitlines() if line.strip()]) < 40
  # The README's model is SmolLM2; here a random one of the same family, byte by byte.
  code = re.sub(r'c\.model\.name = .*', TINY, code)
  for long, short in (('= 16, 768', '= 8, 4096'), ('= 128, 64', '= 16, 16')):
    assert long in code
    code = code.replace(long, short)
  out = _run(code, tmp_path)
  assert 'deduction' in out and 'propose' in out and 'solve_abduction/accuracy' in out
  assert (tmp_path / 'my_model' / 'model.safetensors').exists()


@pytest.mark.slow
@pytest.mark.model
def test_the_same_step_with_the_real_model(tmp_path, smollm2):
  out = _run(re.sub(r"'smollm2-135m-instruct'", repr(str(smollm2)), PYTHON[0]), tmp_path, 1200)
  assert 'def f(' in out


def test_the_executor_alone(tmp_path):
  out = _run(PYTHON[1], tmp_path)
  assert "ok [\"'cba'\"]" in out and 'timeout' in out


def test_the_test_command_is_what_ci_runs():
  (command,) = (c.strip() for c in COMMANDS if 'pytest' in c)
  assert command in (ROOT / '.ci' / 'run').read_text()


def test_every_run_sets_itself_up_and_the_first_needs_no_download():
  runs = [c for c in COMMANDS if 'absolute_zero_jax.main' in c]
  assert [re.search(r'--config (\S+)', c)[1] for c in runs] == [
      'configs/tiny.py', 'configs/smollm2.py']
  assert COMMANDS[0] == runs[0] and "'.[plot]'" in runs[0]
  for command in runs:
    assert len(command.strip().splitlines()) == 1 and command.startswith('python3 -m venv .venv')
  assert "c.model.name = 'carried:" in (ROOT / 'configs' / 'tiny.py').read_text()


def test_every_file_the_readme_names_exists():
  for name in re.findall(r'`([\w/]+(?:\.py|/))`', README):
    assert (ROOT / name).exists() or (ROOT / 'absolute_zero_jax' / name).exists(), name
  for link in re.findall(r'\]\((?!http)([^)]+)\)', README):
    assert (ROOT / link.partition('#')[0]).exists(), link
