# SPDX-License-Identifier: Apache-2.0
"""Which room may import which, read from the source; and that executor processes hold no JAX."""

import ast
import pathlib
import subprocess
import sys

PACKAGE = pathlib.Path(__file__).resolve().parents[1] / 'absolute_zero_jax'
_TOKENIZER = {'tokenizer', 'tokenizer_files', 'tokenizer_gguf', 'tokenizer_spec', 'tokenizer_spm'}
_HOST = {'tasks', 'rewards', 'buffer', 'records', 'intrinsic', 'grammar', 'documents',
         'lexicon', 'controls', 'gguf_header'} | _TOKENIZER
ALLOWED = {                              # room -> rooms it may import
    'types': set(), 'config': {'config_checks', 'presets'},
    'config_checks': set(), 'presets': set(),
    'executor': {'types'},
    'intrinsic': set(), 'rewards': {'intrinsic'},
    'tasks': {'types', 'rewards', 'intrinsic', 'executor'},
    'buffer': {'types', 'intrinsic'}, 'records': {'types'},
    'grammar': {'tasks', 'types'}, 'tracing': {'grammar'}, 'lexicon': set(),
    'documents': {'grammar', 'tasks', 'tracing', 'types'},
    'guesses': {'documents', 'grammar', 'metrics', 'models', 'sampler', 'tasks', 'tracing',
                'types'},
    'tokenizer': _TOKENIZER, 'tokenizer_files': {'tokenizer_spec', 'tokenizer_spm'},
    'tokenizer_gguf': {'gguf_header', 'tokenizer_spec', 'tokenizer_spm'},
    'tokenizer_spm': {'tokenizer_spec'}, 'tokenizer_spec': set(), 'gguf_header': set(),
    'sharding': set(), 'models': {'sharding', 'gguf_header'}, 'sampling': set(), 'schedule': set(),
    'decoding': {'models', 'sharding', 'sampling'},
    'batching': {'models', 'sharding', 'sampling', 'schedule', 'decoding'},
    'sampler': {'models', 'sharding', 'sampling', 'schedule', 'decoding', 'batching'},
    'logprobs': set(), 'advantages': set(), 'reinforce': {'advantages'}, 'optimizer': set(),
    'packing': {'advantages', 'models'}, 'learner_metrics': {'packing', 'reinforce', 'advantages'},
    'lora': {'models', 'sharding'},
    'learner': {'models', 'sharding', 'reinforce', 'advantages', 'logprobs', 'optimizer',
                'packing', 'learner_metrics'},
    'metrics': set(), 'checkpoint': {'metrics'},
    'summary': {'metrics', 'rewards', 'types', 'tasks'},
    'phases': {'types'}, 'selfplay': {'buffer', 'phases', 'rewards', 'types'},
    'seeding': {'buffer', 'selfplay', 'tasks', 'types', 'grammar'},
    'controls': {'rewards'},
}
NO_JAX = {'types', 'config', 'config_checks', 'presets', 'executor', 'main'} | _HOST


def _edges(path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (a.name for a in node.names)
    elif isinstance(node, ast.ImportFrom):
      if node.module == 'absolute_zero_jax':
        yield from (f'absolute_zero_jax.{a.name}' for a in node.names)
      else:
        yield node.module or ''


def violations(root):
  """One line per import that the house forbids."""
  out = []
  for path in sorted(root.rglob('*.py')):
    room = path.relative_to(root).parts[0].removesuffix('.py')
    for name in _edges(path):
      top, _, rest = name.partition('.')
      if top in ('jax', 'flax', 'optax') and room in NO_JAX:
        out.append(f'{path.name}: {room} must not import {top}')
      to = rest.partition('.')[0]
      if top == 'absolute_zero_jax' and room in ALLOWED and to and to != room:
        if to not in ALLOWED[room]:
          out.append(f'{path.name}: {room} must not import {to}')
  return out


def test_the_rooms_keep_their_doors():
  assert violations(PACKAGE) == []


def test_every_file_belongs_to_a_known_room():
  rooms = {p.stem for p in PACKAGE.iterdir() if p.suffix == '.py' or (p / '__init__.py').exists()}
  root = {'__init__', 'evaluate', 'main', 'parts', 'pretrain', 'report', 'run', 'train'}
  assert rooms - root <= set(ALLOWED)


def test_a_planted_violation_is_found(tmp_path):
  (tmp_path / 'executor').mkdir()
  client = 'import jax\nfrom absolute_zero_jax import tasks'
  (tmp_path / 'executor' / 'client.py').write_text(client)
  (tmp_path / 'reinforce.py').write_text('from absolute_zero_jax.models import decoder\n')
  assert violations(tmp_path) == [
      'client.py: executor must not import jax', 'client.py: executor must not import tasks',
      'reinforce.py: reinforce must not import models']


def test_modules_of_rooms_are_there_without_an_import():
  code = ('import absolute_zero_jax as azj; '
          'azj.models.loading.load; azj.tasks.prompts.load; azj.executor.client.Executor; '
          'assert not hasattr(azj.models, "lodaing") and not hasattr(azj.executor, "clinet")')
  subprocess.run([sys.executable, '-c', code], check=True, timeout=60, cwd=PACKAGE.parent)


def test_importing_host_rooms_loads_no_jax_and_no_torch():
  code = ('import sys, absolute_zero_jax.executor, absolute_zero_jax.tasks, '
          'absolute_zero_jax.buffer, absolute_zero_jax.rewards, absolute_zero_jax.main; '
          'bad = {m.split(".")[0] for m in sys.modules} & {"jax", "flax", "torch", "tensorflow"}; '
          'assert not bad, bad')
  subprocess.run([sys.executable, '-c', code], check=True, timeout=60, cwd=PACKAGE.parent)
