# SPDX-License-Identifier: Apache-2.0
"""The feature table, the docs and the config name only what exists."""

import ast
import functools
import importlib
import pathlib
import pkgutil
import re

import pytest
import scripted

import absolute_zero_jax
from absolute_zero_jax import config, parts, run

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / 'absolute_zero_jax'
FEATURES = (ROOT / 'docs' / 'features.md').read_text()
# The places where names are promised: every page, and the comments of the config.
PAGES = {p.name: p.read_text() for p in [*(ROOT / 'docs').glob('*.md'), ROOT / 'README.md']}
MODULES = {m.name for m in pkgutil.iter_modules(absolute_zero_jax.__path__)}


@functools.cache
def _names(path):
  """Dotted names that a file defines: functions, classes, methods, module variables."""
  found = set()
  def look(body, prefix):
    for node in body:
      if isinstance(node, ast.FunctionDef | ast.ClassDef):
        found.add(f'{prefix}{node.name}')
        if isinstance(node, ast.ClassDef):
          look(node.body, f'{prefix}{node.name}.')
      targets = (node.targets if isinstance(node, ast.Assign)
                 else [node.target] if isinstance(node, ast.AnnAssign) else [])
      found.update(f'{prefix}{t.id}' for t in targets if isinstance(t, ast.Name))
  look(ast.parse(path.read_text()).body, '')
  return found


def _rows(first):
  return [line for line in FEATURES.splitlines() if re.match(rf'\| {first} \|', line)]


def test_every_feature_and_every_defect_has_its_row():
  features, defects = _rows(r'F\d\d'), _rows(r'\d+')
  assert [r[2:5] for r in features] == [f'F{n:02d}' for n in range(1, 35)]
  assert [int(r.split('|')[1]) for r in defects] == list(range(1, 40))
  for row in features:
    cells = [c.strip() for c in row.split('|')[1:-1]]
    assert len(cells) == 5 and all(cells[:3]), row
    if not cells[2].startswith('planned'):                  # planned ones have nothing to show yet
      assert re.search(r'`[\w/]+\.py:', cells[3]) and '::test_' in cells[4], row


def test_files_functions_and_tests_of_the_table_exist():
  places = re.findall(r'`([\w/]+\.py):([\w.]+)`', FEATURES)
  tests = re.findall(r'`(test_\w+\.py)::(test_\w+)`', FEATURES)
  assert len(places) > 50 and len(tests) > 80
  for file, name in places:
    assert name in _names(PACKAGE / file), (file, name)
  for file, name in tests:
    assert name in _names(ROOT / 'tests' / file), (file, name)


@pytest.mark.parametrize('page', [*sorted(PAGES), 'config.py'])
def test_dotted_names_are_real(page):
  """`section.field` of the config, or `module.name` of the package."""
  text = PAGES.get(page) or (PACKAGE / 'config.py').read_text()
  c = config.get_config()
  for name in re.findall(r'`([a-z_]+(?:\.[A-Za-z_]\w*)+)`', text):
    first = name.partition('.')[0]
    if name.endswith(('.py', '.md', '.txt', '.json', '.jsonl')):
      continue
    if isinstance(c.get(first), config.ConfigDict):
      try:
        config.check_field(c, name)
        continue
      except config.ConfigError:
        assert first in MODULES, name
    if first in MODULES and not name.startswith('executor.'):   # there, an object of that name
      assert _resolves(name), name


def _resolves(name):
  parts = name.split('.')
  for cut in range(len(parts), 0, -1):
    try:
      found = importlib.import_module('.'.join(['absolute_zero_jax', *parts[:cut]]))
    except ImportError:
      continue
    for part in parts[cut:]:
      found = getattr(found, part, None)
    return found is not None
  return False


def test_the_metrics_of_a_run_are_documented():
  """Every family of names that the code writes has a row."""
  text = PAGES['metrics.md']
  source = ''.join((PACKAGE / f).read_text() for f in (
      'summary.py', 'learner_metrics.py', 'tasks/metrics.py'))
  for name in ('valid_rate', 'learnability', 'comment_plan_share', 'distinct_answer_share',
               'reflection_share', 'flagged_share', 'truncated_share', 'diversity', 'branches',
               'independent_share', 'mismatch_abs', 'rows_without_advantage', 'solve_rate_share',
               'learnable_share'):
    assert name in source and name in text, name


def test_the_examples_of_extending_play_an_iteration(tmp_path, monkeypatch):
  """Each module of the page is a file of a user's, each line about `c` one of the config."""
  monkeypatch.setattr(parts.sampler_lib, 'Sampler', scripted.Sampler)
  monkeypatch.syspath_prepend(str(tmp_path))
  monkeypatch.syspath_prepend(str(ROOT / 'tests'))
  c = config.get_config()
  config.shrink(c)
  c.selfplay.prompts = scripted.prompt_folder(tmp_path / 'set')
  c.selfplay.batch, c.selfplay.mc_samples, c.executor.workers = 4, 4, 2
  for code in re.findall(r'```python\n(.*?)```', PAGES['extending.md'], re.S):
    if code.startswith('# my_'):
      (tmp_path / code.splitlines()[0][2:]).write_text(code)
    else:
      exec(code, {'c': c})
  assert c.executor.name == 'my_executor:Counting' and c.selfplay.kinds[1:]
  c.reward.intrinsic = {}              # the page's terms ask for packages
  with run.Run(c) as current:
    iteration = current.iterate()
  assert iteration.metrics['executor/jobs'] > 0 and iteration.metrics['train/grad_norm'] > 0
  assert any('malus' in e.parts for e in iteration.episodes)
