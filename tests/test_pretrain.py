# SPDX-License-Identifier: Apache-2.0
"""Pre-training on generated programs: learns, resumes bit for bit, leaves a model that loads."""

import io
import json
import random
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from absolute_zero_jax import config as config_lib
from absolute_zero_jax import (
  documents,
  grammar,
  guesses,
  lexicon,
  optimizer,
  parts,
  pretrain,
  tokenizer,
)
from absolute_zero_jax.models import decoder, loading


def _config(**fields):
  c = config_lib.get_config()
  c.command = 'pretrain'
  c.model.name = ('random:qwen2,vocab=600,embed=32,layers=1,heads=2,kv_heads=2,head_dim=16,ffn=64,'
                  'tied=true')
  c.model.tokenizer, c.model.remat = str(lexicon.FOLDER), 'none'
  c.selfplay.prompts, c.selfplay.induction_cases = 'tiny', 6
  c.pretrain.batch = 4
  c.train.steps, c.checkpoint.every_steps, c.log.every_steps = 12, 4, 4
  c.optimizer.name = 'muon'       # as in configs/tiny_pretrain.py
  c.optimizer.learning_rate, c.optimizer.schedule, c.optimizer.warmup_steps = 1e-2, 'cosine', 2
  for name, value in fields.items():
    section, _, field = name.partition('__')
    c[section][field] = value
  return c


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  folder = tmp_path_factory.mktemp('whole')
  return folder, pretrain.run(_config(), folder, stream=io.StringIO())


def test_the_loss_falls(finished):
  lines = [json.loads(x) for x in (finished[0] / 'metrics.jsonl').read_text().splitlines()]
  assert [x['step'] for x in lines] == [4, 8, 12]
  # log(600) = 6.4 at the start
  assert lines[0]['pretrain/answer'] > lines[1]['pretrain/answer'] > lines[2]['pretrain/answer']
  assert lines[2]['pretrain/answer'] < 5.5


def test_a_stopped_run_continues_bit_for_bit(finished, tmp_path, monkeypatch):
  made = pretrain.make_batch
  def failing(c, tokens, failed=()):
    make = made(c, tokens, failed)
    def batch(step):
      if step == 10:
        raise RuntimeError('killed')
      return make(step)
    return batch
  monkeypatch.setattr(pretrain, 'make_batch', failing)
  with pytest.raises(RuntimeError, match='killed'):
    pretrain.run(_config(), tmp_path, stream=io.StringIO())
  monkeypatch.undo()
  text = io.StringIO()
  state = pretrain.run(_config(), tmp_path, stream=text)
  assert 'continues after step 8' in text.getvalue()
  same = jax.tree.map(lambda a, b: bool(jnp.all(a == b)), state, finished[1])
  assert all(jax.tree.leaves(same))


def test_a_run_that_died_before_its_last_export_writes_it(finished, tmp_path, monkeypatch):
  shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
  shutil.rmtree(tmp_path / 'export')
  pretrain.run(_config(), tmp_path, stream=io.StringIO())
  files = [folder / 'export' / 'model.safetensors' for folder in (tmp_path, finished[0])]
  assert files[0].read_bytes() == files[1].read_bytes()


class _Dropped:
  """A signal that comes where Python drops what its handler raises."""

  def __del__(self):
    signal.raise_signal(signal.SIGTERM)


@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
def test_a_preempted_run_ends_after_the_step(tmp_path, monkeypatch):
  made, steps = pretrain.compiled_step, []

  def compiled_step(*args):
    step = made(*args)
    def one(state, batch):
      steps.append(_Dropped())
      steps[-1] = 1
      return step(state, batch)
    return one
  monkeypatch.setattr(pretrain, 'compiled_step', compiled_step)
  before = signal.getsignal(signal.SIGTERM)
  with pytest.raises(KeyboardInterrupt):
    pretrain.run(_config(), tmp_path, stream=io.StringIO())
  assert steps == [1] and signal.getsignal(signal.SIGTERM) is before


def test_the_export_loads_as_any_model_does(finished):
  model, params, _ = loading.load(finished[0] / 'export')
  assert model.family == 'qwen2' and model.tied
  same = jax.tree.map(lambda a, b: bool(jnp.all(a == b)), params, finished[1].params)
  assert all(jax.tree.leaves(same))
  tokens = tokenizer.load(finished[0] / 'export')
  carried = tokenizer.load(lexicon.FOLDER)
  assert tokens.encode('def f(a):\n    return a + 12') == carried.encode(
      'def f(a):\n    return a + 12')
  assert tokens.stop_ids == carried.stop_ids and tokens.pad_id == carried.pad_id


def test_one_step_is_adamw_on_the_weighted_next_token_loss():
  c = _config()
  c.optimizer.clip_norm = 0.5
  model = loading.random_config(c.model.name)
  tx = optimizer.make_optimizer(1e-2)
  batch = pretrain.make_batch(c, tokenizer.load(lexicon.FOLDER))(1)

  documents = [(t[s == n], w[s == n]) for t, s, w in zip(
      batch.tokens_BT, batch.segments_BT, batch.weights_BT) for n in range(1, s.max() + 1)]
  tokens_BT = np.zeros((len(documents), 256), np.int32)
  weights_BT = np.zeros((len(documents), 256), np.float32)
  for i, (ids, weights) in enumerate(documents):
    tokens_BT[i, :len(ids)], weights_BT[i, :len(ids)] = ids, weights

  def loss(params):
    """A whole log-softmax over documents that stand alone, each in a row of its own."""
    logp_BTV = jax.nn.log_softmax(decoder.logits(model, params, tokens_BT))
    logp_BT = jnp.take_along_axis(logp_BTV[:, :-1], tokens_BT[:, 1:, None], 2)[..., 0]
    return -jnp.sum(logp_BT * weights_BT[:, 1:]) / weights_BT[:, 1:].sum()

  state = pretrain.start(c, tx)
  gradient = jax.jit(jax.grad(loss))(state.params)
  norm = np.sqrt(sum(float(jnp.sum(g * g)) for g in jax.tree.leaves(gradient)))
  assert norm > 0.5
  clipped = jax.tree.map(lambda g: g * (0.5 / norm), gradient)
  # Adam's first moment after one step is (1 - b1) of the clipped gradient.
  new, found = pretrain.compiled_step(model, tx, c)(state, batch)
  assert float(found['norm']) == pytest.approx(norm, rel=1e-4)
  for mine, theirs in zip(jax.tree.leaves(new.opt_state[0].mu), jax.tree.leaves(clipped)):
    np.testing.assert_allclose(mine, 0.1 * theirs, atol=2e-6)


def test_prompts_that_no_bare_answer_continues_are_refused_before_any_work(tmp_path):
  with pytest.raises(ValueError, match="selfplay.prompts='think' .*formats of .*solve_deduction"):
    pretrain.run(_config(selfplay__prompts='think'), tmp_path / 'run', stream=io.StringIO())
  assert not (tmp_path / 'run').exists()


def test_a_run_goes_on_with_its_own_wrong_guesses(tmp_path, monkeypatch):
  """Asked once after each step that the config names; a resumed run reads them from the file."""
  fields = {'pretrain__guess_steps': (2, 4), 'pretrain__guess_count': 7, 'train__steps': 8}
  example = grammar.example(random.Random(1))
  asked, given = [], []
  def make(params, key, **options):
    asked.append((options['seed'], options['count']))
    return len(asked) * [documents.Failed(example, (('    return 1', 'if 1 == 2: False'),))]
  monkeypatch.setattr(guesses, 'make', make)
  batch = pretrain.make_batch
  monkeypatch.setattr(pretrain, 'make_batch', lambda c, t, failed=(): given.append(
      failed) or batch(c, t, failed))
  whole = pretrain.run(_config(**fields), tmp_path / 'a', stream=io.StringIO())
  assert asked == [('0 2', 7), ('0 4', 7)] and [len(x) for x in given] == [0, 1, 2]
  asked.clear()
  pretrain.run(_config(**fields, checkpoint__keep=9), tmp_path / 'b', stream=io.StringIO())
  for step in (8,):
    shutil.rmtree(tmp_path / 'b' / 'checkpoints' / str(step))
  again = pretrain.run(_config(**fields, checkpoint__keep=9), tmp_path / 'b', stream=io.StringIO())
  assert len(asked) == 2 and len(given) == 7 and len(given[-1]) == 2
  assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool(jnp.all(a == b)), whole, again)))
  # Beyond that step nothing can make them again.
  (tmp_path / 'b' / 'guesses_4.jsonl').unlink()
  with pytest.raises(ValueError, match=r'guesses_4\.jsonl is missing'):
    pretrain.run(_config(**fields | {'train__steps': 10}), tmp_path / 'b', stream=io.StringIO())


def test_a_longer_run_goes_on_from_a_finished_one(finished, tmp_path):
  del finished
  short = _config(train__steps=4)
  pretrain.run(short, tmp_path, stream=io.StringIO())
  state = pretrain.run(_config(train__steps=6), tmp_path, stream=io.StringIO())
  assert int(state.step) == 6


def test_muon_turns_every_singular_value_of_a_matrix_into_about_one():
  """And leaves embeddings, norms and biases to AdamW, with Nesterov's step."""
  model = loading.random_config('random:qwen2,vocab=40,embed=16,layers=2,heads=2,kv_heads=1,'
                                'head_dim=8,ffn=24,tied=true')
  params = decoder.init(model, jax.random.key(0))
  gradient = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape), params)
  change = {}
  for name in optimizer.NAMES:
    tx = optimizer.make_optimizer(1e-2, name=name)
    change[name], _ = jax.jit(tx.update)(gradient, tx.init(params), params)
  layers = change['muon']['layers']
  flat = {'q': (16, 16), 'k': (16, 8), 'v': (16, 8), 'o': (16, 16), 'gate': (16, 24),
          'up': (16, 24), 'down': (24, 16)}
  for name, shape in flat.items():
    for matrix in np.asarray(layers[name]):
      # An orthogonal matrix whose larger side is n, times sqrt(n): entries of RMS 1.
      values = np.linalg.svd(matrix.reshape(shape), compute_uv=False) / max(shape) ** 0.5
      # Five iterations do not bring up the smallest ones.
      assert 0.2e-2 * 0.6 < np.median(values) < values.max() < 0.2e-2 * 1.3, name
  # The first step with Nesterov's momentum (Dozat, 2016): b1 m / (1 - b1^2) + g, m = (1 - b1) g.
  longer = 0.9 * (1 - 0.9) / (1 - 0.9**2) + 1
  np.testing.assert_allclose(change['muon']['embed'], longer * change['adamw']['embed'], rtol=1e-3)
  for name in ('attn_norm', 'ffn_norm', 'q_bias', 'k_bias', 'v_bias'):
    np.testing.assert_allclose(layers[name], longer * change['adamw']['layers'][name], rtol=1e-3)
  with pytest.raises(ValueError, match="'lion' is unknown; allowed: adamw, muon"):
    optimizer.make_optimizer(1e-2, name='lion')


def test_prompts_count_less():
  c = _config()
  c.pretrain.think_prior = c.pretrain.think      # so that openings of thoughts weigh 1, too
  batch = pretrain.make_batch(c, tokenizer.load(lexicon.FOLDER))(3)
  assert [round(float(w), 3) for w in np.unique(batch.weights_BT)] == [
      0.0, 0.2, 1.0, pretrain.recipe(c).turn_weight]


def test_a_carried_tokenizer_has_a_name_instead_of_a_path():
  c = _config()
  c.model.tokenizer = 'carried:tiny'
  text = 'def f(a):\n    return a + 12'
  assert parts.tokenizer(c, None).encode(text) == tokenizer.load(lexicon.FOLDER).encode(text)
  c.model.tokenizer = 'carried:none'
  with pytest.raises(ValueError, match='carried:none'):
    parts.tokenizer(c, None)


def test_weights_in_bfloat16_are_moved_by_small_steps():
  c = _config(model__param_dtype='bfloat16')
  tx = optimizer.make_optimizer(1e-5)
  batch = pretrain.make_batch(c, tokenizer.load(lexicon.FOLDER))(1)
  state = pretrain.start(c, tx)
  before = np.asarray(state.params['layers']['up'], np.float32)
  step = pretrain.compiled_step(loading.random_config(c.model.name), tx, c)
  for _ in range(8):
    state, _ = step(state, batch)
  moved = np.asarray(state.params['layers']['up'], np.float32) != before
  # A step of 1e-5 is below half the distance of neighbours above 0.005: to nearest, none moves.
  assert moved[np.abs(before) > 0.005].mean() > 0.02


def test_documents_longer_than_every_line_are_said(tmp_path):
  with pytest.raises(ValueError, match='line_tokens=64 is less than each of 200 documents'):
    pretrain.run(_config(pretrain__line_tokens=64, model__tokenizer='bytes',
                         pretrain__batch=1), tmp_path, stream=io.StringIO())


def test_guesses_of_a_run_whose_checkpoints_are_gone_are_not_another_s(tmp_path):
  (tmp_path / 'guesses_2.jsonl').write_text('{}\n')
  pretrain.run(_config(train__steps=3, checkpoint__export=False), tmp_path, stream=io.StringIO())
  assert not (tmp_path / 'guesses_2.jsonl').exists()


@pytest.mark.parametrize('field, value, words', [
    ('selfplay__induction_cases', 2, 'pretrain.questions=3'),
    ('pretrain__depths', (1.0,), '0 to 5')])
def test_a_mixture_that_cannot_be_made_is_refused(field, value, words):
  with pytest.raises(config_lib.ConfigError, match=words):
    config_lib.validate(_config(**{field: value}))
