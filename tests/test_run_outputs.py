# SPDX-License-Identifier: Apache-2.0
"""What a run gives beside a policy: seeds, scores on the way, and words of warning."""

import io
import json
import math

import jax
import numpy as np
import pytest
import scripted
import scripted_runs

from absolute_zero_jax import config, metrics, run, train

prompts, one_device = scripted_runs.prompts, scripted_runs.one_device
make = scripted_runs.make


def test_what_would_go_unseen_is_said(make):
  c, said = make(), []
  for c.sampler.max_prompt_tokens in (1024, 8192):           # the model has 2,048 positions
    with run.Run(c, progress=said.append):
      assert any('the model was made for' in line for line in said) == (
          c.sampler.max_prompt_tokens > 2048)
  row = {'train/loss': 0.0, 'train/grad_norm': 0.0, 'train/entropy': 0.0, 'time/iteration': 1.0,
         'sampler/tokens_per_s': 1.0}
  for skipped in (0.0, 1.0):
    line = run.summary.step_line(1, 1, row | {'train/skipped_updates': skipped}, [])
    assert ('not finite' in line) == bool(skipped)
  mean = metrics.Mean()
  for name, value in (row | {'train/grad_norm': math.inf, 'train/skipped_updates': 1.0}).items():
    mean.add(name, value)
  assert 'not finite' in run.summary.step_line(1, 1, mean.result(), [])
  c = make(selfplay__mc_samples=1)
  with run.Run(c, progress=said.append):
    assert any('mc_samples=1' in line for line in said)


def test_words_with_signs_are_found():
  find = run.summary._word_finder(('C++', '<escape>', 'take over', '#hack'))
  texts = ['I use C++ here', 'an <escape> tag', 'Take Over', 'a #hack', 'xC++', 'take overs']
  assert [find(text) for text in texts] == [True] * 4 + [False] * 2


def test_generated_seeds_load_again_equal(make, tmp_path, capsys, monkeypatch):
  c = make(seeding__tasks=6, seeding__clean=('comments',))
  c.command = 'seed'
  written = train.run(c, tmp_path / 'a')
  assert 'pairs.jsonl: 6 tasks' in capsys.readouterr().out
  assert sorted(p.name for p in (tmp_path / 'a').rglob('*.*')) == [
      'config.json', 'induction.jsonl', 'pairs.jsonl']
  seeds = tmp_path / 'seeds[1]'
  (tmp_path / 'a' / 'seeds').rename(seeds)
  c = make(selfplay__seeds=str(seeds))
  with run.Run(c) as current:
    for kind in c.selfplay.kinds:
      made, read = written.buffer.tasks(kind)[:6], current.buffer.tasks(kind)
      assert made == read and len(read) == 6
      assert not any('#' in task.program for task in read)
    assert [t.program for t in current.buffer.tasks('deduction')] == [
        t.program for t in current.buffer.tasks('abduction')]
  monkeypatch.setattr(scripted, '_response', lambda prompt, rng: 'no</think> answer</answer>')
  c = make(seeding__tasks=6, seeding__patience=2)
  c.command = 'seed'
  stream = io.StringIO()
  left = tmp_path / 'b' / 'seeds' / 'induction.jsonl'      # of an earlier run of more kinds
  left.parent.mkdir(parents=True)
  left.write_text('{}')
  c.selfplay.kinds = ('deduction', 'abduction')
  train.run(c, tmp_path / 'b', stream=stream)          # gives up, and says what it has
  assert not left.exists()
  assert stream.getvalue().count('seeds: 1 of 6') == 2
  assert 'pairs.jsonl: 1 tasks; 6 were asked for' in stream.getvalue()
  c.selfplay.kinds = ('error',)
  with pytest.raises(config.ConfigError, match='seed files hold'):
    config.validate(c)


def test_seeds_stay_until_there_are_others(make, tmp_path, monkeypatch):
  c = make(selfplay__seeds=str(tmp_path / 'seeds'), selfplay__kinds=('deduction',))
  c.command = 'seed'
  (tmp_path / 'seeds').mkdir()
  (tmp_path / 'seeds' / 'pairs.jsonl').write_text(
      '{"snippet": "def f(a): return a", "input": "1"}\n')
  def interrupted(*args, **kwargs):
    raise KeyboardInterrupt
  monkeypatch.setattr(run.seeding, 'generate', interrupted)
  with pytest.raises(KeyboardInterrupt):
    train.run(c, tmp_path)
  assert (tmp_path / 'seeds' / 'pairs.jsonl').exists()


HELDOUT = {'selfplay__exclude': 'heldout', 'heldout__every_steps': 2, 'heldout__count': 4,
           'heldout__samples': 2, 'heldout__parts': ('same',), 'selfplay__induction_cases': 6}


def _rows(workdir):
  lines = [json.loads(x) for x in (workdir / 'metrics.jsonl').read_text().splitlines()]
  return {x['step']: {k: v for k, v in x.items() if k.startswith('heldout/')} for x in lines}


def test_scoring_on_the_way_changes_nothing_and_resumes(make, tmp_path):
  text = io.StringIO()

  def play(name, **changes):
    c = make(**HELDOUT | {'selfplay__kinds': ('deduction',), 'train__steps': 3} | changes)
    c.checkpoint.every_steps = 3
    return train.run(c, tmp_path / name, stream=text)
  whole, without = play('whole'), play('without', heldout__every_steps=0)
  # The clock ends the first part after an iteration, which it saves.
  assert play('parts', train__minutes=1e-6).step == 1
  assert 'are over after iteration 1;' in text.getvalue()
  resumed = play('parts')
  for other in (without, resumed):
    assert other.host_state() == whole.host_state()
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(other.state),
                 jax.device_get(whole.state))
  rows, again = _rows(tmp_path / 'whole'), _rows(tmp_path / 'parts')
  # At the start, every two iterations, and at the end; the first part of the other ended after one.
  assert {step for step, row in rows.items() if row} == {0, 2, 3}
  assert {step for step, row in again.items() if row} == {0, 1, 2, 3}
  assert all(again[step] == row for step, row in rows.items() if row)
  last = rows[3]
  for kind in ('deduction', 'abduction', 'induction', 'mean'):    # all kinds, whatever is played
    for quantity in ('greedy', 'sampled', 'pass@2', 'tokens'):
      name = f'heldout/same/{kind}/{quantity}'
      assert last[f'{name}_low'] <= last[name] <= last[f'{name}_high']
  assert 0 < last['heldout/same/mean/sampled'] <= last['heldout/same/mean/pass@2']
  assert sorted(p.name for p in (tmp_path / 'whole' / 'heldout').iterdir()) == [
      '000000.jsonl', '000002.jsonl', '000003.jsonl']
  assert not any(_rows(tmp_path / 'without').values())


def test_programs_that_are_scored_must_be_excluded(make):
  with pytest.raises(config.ConfigError, match="selfplay.exclude='heldout'"):
    config.validate(make(**HELDOUT | {'selfplay__exclude': ''}))
