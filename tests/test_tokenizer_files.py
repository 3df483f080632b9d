# SPDX-License-Identifier: Apache-2.0
"""Files of tokenizers: saved, GGUF, the real SmolLM2's, damaged ones."""

import io
import json
import re
import shutil
import subprocess
import sys

import pytest
from small_tokenizers import CORPUS, TEXTS, write_json
from tokenizers import pre_tokenizers

from absolute_zero_jax import tokenizer, tokenizer_gguf

# --- saving


@pytest.mark.parametrize('model_type', [None, 'llama', 'qwen3'])
def test_saved_files_give_transformers_and_us_the_same_ids(loaded, tmp_path, model_type):
  transformers = pytest.importorskip('transformers')
  loaded.save(tmp_path / 'out')
  if model_type:
    write_json(tmp_path / 'out' / 'config.json', model_type=model_type)
  again = tokenizer.load(tmp_path / 'out')
  reference = transformers.AutoTokenizer.from_pretrained(tmp_path / 'out')
  for text in TEXTS:
    ids = loaded.encode(text)
    assert again.encode(text) == ids
    assert reference.encode(text, split_special_tokens=True) == ids, text
    special = loaded.encode(text, allow_special=True)
    assert reference.encode(text) == special, text
    assert reference.decode(ids) == loaded.decode(ids)
  for field in ('vocab_size', 'bos_id', 'eos_id', 'pad_id', 'stop_ids', 'special_ids', 'adds_bos',
                'chat_template'):
    assert getattr(again, field) == getattr(loaded, field), field
  assert (reference.bos_token_id, reference.eos_token_id) == (loaded.bos_id, loaded.eos_id)


_CONFIG = dict(tokenizer_class='PreTrainedTokenizerFast', bos_token='<|begin_of_text|>',
               eos_token='<|end_of_text|>')


@pytest.mark.parametrize('case', [
    'says no BOS', 'says BOS', 'no config', 'added_tokens', 'other end', 'other end, newer'])
def test_what_stands_beside_a_tokenizer_counts_as_in_transformers(case, llama3_dir, tmp_path):
  transformers = pytest.importorskip('transformers')
  spec = json.loads((llama3_dir / 'tokenizer.json').read_text())
  files = {'tokenizer_config': dict(_CONFIG)}
  if case == 'says no BOS':
    files['tokenizer_config']['add_bos_token'] = False
  elif case == 'says BOS':
    files['tokenizer_config']['add_bos_token'] = True
    spec['post_processor'] = None
  elif case == 'no config':
    files = {}
  elif case == 'added_tokens':                 # as version 4 of transformers left it
    files['added_tokens'] = {t['content']: t['id'] for t in spec['added_tokens']}
  else:
    files['special_tokens_map'] = {'eos_token': '<|eot_id|>', 'bos_token': '<|begin_of_text|>'}
    if 'newer' in case:
      files['tokenizer_config']['added_tokens_decoder'] = {
          str(t['id']): {k: v for k, v in t.items() if k != 'id'} for t in spec['added_tokens']}
  (tmp_path / 'tokenizer.json').write_text(json.dumps(spec))
  for name, content in files.items():
    write_json(tmp_path / f'{name}.json', **content)
  special = {t['id'] for t in spec['added_tokens'] if t['special']}
  ours, reference = tokenizer.load(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
  for text in ('hello <|eot_id|> x', '', *CORPUS):
    assert ours.encode(text, allow_special=True) == reference.encode(text)
    assert not set(ours.encode(text, bos=False)) & special               # spelled, not obeyed
  if files:
    assert (ours.bos_id, ours.eos_id) == (reference.bos_token_id, reference.eos_token_id)
    assert ours.special_ids >= set(reference.all_special_ids)


def test_a_saved_qwen2_keeps_its_ids_where_transformers_builds_its_own_class(qwen_dir, tmp_path):
  transformers = pytest.importorskip('transformers')
  ours = tokenizer.load(qwen_dir)
  ours.save(tmp_path)
  write_json(tmp_path / 'config.json', model_type='qwen2')
  reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
  for text in TEXTS:
    assert reference.encode(text) == ours.encode(text, allow_special=True), text


def test_saving_keeps_a_generation_config_that_is_there(qwen_dir, tmp_path):
  write_json(tmp_path / 'generation_config.json', temperature=0.5)
  tokenizer.load(qwen_dir).save(str(tmp_path))
  assert json.loads((tmp_path / 'generation_config.json').read_text()) == {'temperature': 0.5}


# --- gguf


def write_gguf(path, kind, tokens, types, *, pre=None, merges=None, scores=None, **ids):
  gguf = pytest.importorskip('gguf')
  writer = gguf.GGUFWriter(path, 'llama')
  writer.add_tokenizer_model(kind)
  writer.add_token_list(tokens)
  writer.add_token_types(types)
  if pre:
    writer.add_tokenizer_pre(pre)
  if merges is not None:
    writer.add_token_merges(merges)
  if scores is not None:
    writer.add_token_scores(scores)
  for name, index in ids.items():
    getattr(writer, f'add_{name}_token_id')(index)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.close()


@pytest.mark.parametrize('name, pre', [('qwen_dir', 'qwen2'), ('llama3_dir', 'llama-bpe')])
def test_a_byte_level_gguf_gives_the_ids_of_the_directory(name, pre, request, tmp_path):
  folder = request.getfixturevalue(name)
  spec = json.loads((folder / 'tokenizer.json').read_text())
  vocab = spec['model']['vocab'] | {t['content']: t['id'] for t in spec['added_tokens']}
  kinds = {t['content']: 3 if t['special'] else 4 for t in spec['added_tokens']}
  tokens = sorted(vocab, key=vocab.get)
  names = {'llama-bpe': {'bos': '<|begin_of_text|>', 'eos': '<|end_of_text|>'}}.get(
      pre, {'eos': '<|im_end|>', 'pad': '<|endoftext|>'})
  write_gguf(tmp_path / 'm.gguf', 'gpt2', tokens, [kinds.get(t, 1) for t in tokens], pre=pre,
             merges=[' '.join(m) for m in spec['model']['merges']],
             **{name: vocab[text] for name, text in names.items()})
  ours, directory = tokenizer.load(tmp_path / 'm.gguf'), tokenizer.load(folder)
  assert ours.adds_bos == directory.adds_bos
  assert (ours.eos_id, ours.pad_id) == (directory.eos_id, directory.pad_id)
  for text in TEXTS:
    for allow_special in (False, True):
      assert ours.encode(text, allow_special=allow_special) == directory.encode(
          text, allow_special=allow_special), text


def test_a_sentencepiece_gguf_gives_the_ids_of_the_model_file(llama2_dir, llama2_model, tmp_path):
  reference = pytest.importorskip('sentencepiece').SentencePieceProcessor(model_proto=llama2_model)
  count = reference.vocab_size()
  kinds = [2 if reference.is_unknown(i) else 3 if reference.is_control(i) else
           6 if reference.is_byte(i) else 4 if reference.id_to_piece(i) == '<think>' else 1
           for i in range(count)]
  write_gguf(tmp_path / 'm.gguf', 'llama', [reference.id_to_piece(i) for i in range(count)], kinds,
             scores=[reference.get_score(i) for i in range(count)], unk=0, bos=1, eos=2)
  ours, directory = tokenizer.load(tmp_path / 'm.gguf'), tokenizer.load(llama2_dir)
  assert (ours.bos_id, ours.eos_id, ours.adds_bos) == (1, 2, True)
  for text in TEXTS:
    assert ours.encode(text) == directory.encode(text), text


def test_gguf_mistakes_are_named(tmp_path):
  path = tmp_path / 'm.gguf'
  write_gguf(path, 'gpt2', ['a', 'b'], [1, 1], pre='tekken', merges=[])
  with pytest.raises(ValueError, match="by 'tekken'; supported are"):
    tokenizer.load(path)
  write_gguf(path, 'bert', ['a', 'b'], [1, 1])
  with pytest.raises(ValueError, match="kind 'bert'"):
    tokenizer.load(path)
  data = path.read_bytes()
  for size in (5, 23, 30, 60, len(data) - 20):
    path.write_bytes(data[:size])
    with pytest.raises(ValueError, match='m.gguf'):
      tokenizer.load(path)
  path.write_bytes(b'GGUF' + (1).to_bytes(4, 'little') + data[8:])
  with pytest.raises(ValueError, match='version 1'):
    tokenizer.load(path)
  path.write_bytes(b'')
  with pytest.raises(ValueError, match='no GGUF'):
    tokenizer.load(path)
  write_gguf(path, 'gpt2', ['a', 'b', 'a'], [1, 1, 1], pre='qwen2', merges=[])
  with pytest.raises(ValueError, match='m.gguf names a token twice'):
    tokenizer.load(path)
  write_gguf(path, 'gpt2', ['a', 'b'], [1], pre='qwen2', merges=[])
  with pytest.raises(ValueError, match='token_type has 1 entries for 2 tokens'):
    tokenizer.load(path)
  write_gguf(path, 'llama', ['<unk>', 'b'], [2, 1], scores=[0.0] * 3)
  with pytest.raises(ValueError, match='scores has 3 entries for 2 tokens'):
    tokenizer.load(path)


# --- the real SmolLM2


@pytest.fixture(scope='session')
def programs(shared_data):
  """Every string of the seed tasks and CRUXEval."""
  texts = {}
  for path in sorted((shared_data / 'azr_seeds').glob('*.jsonl')) + sorted(
      (shared_data / 'cruxeval').glob('*.jsonl')):
    for line in path.read_text().splitlines():
      texts |= dict.fromkeys(v for v in json.loads(line).values() if isinstance(v, str))
  assert len(texts) > 500
  return list(texts)


@pytest.mark.model
def test_smollm2_ids_are_those_of_transformers_where_it_cuts_digits_rightly(smollm2, programs):
  pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  reference = transformers.AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
  ours = tokenizer.load(smollm2)
  texts = programs + TEXTS
  # Its GGUF reader leaves out the model's digit rule, which shows where two or more characters
  # of white space stand before a digit.
  for text in (t for t in texts if not re.search(r'\s\s\d', t)):
    assert ours.encode(text, allow_special=True) == reference.encode(text), text
    assert ours.encode(text) == reference.encode(text, split_special_tokens=True), text
  reference.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
      pre_tokenizers.Digits(individual_digits=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False)])
  for text in texts:
    assert ours.encode(text) == reference.encode(text, split_special_tokens=True), text
  chat = [{'role': 'user', 'content': 'What is 2 + 2?'}]
  text = reference.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
  assert ours.chat(chat) == text
  assert ours.chat_ids(chat) == reference.encode(text)


@pytest.mark.model
def test_smollm2_conventions_and_round_trip(smollm2, programs, tmp_path):
  ours = tokenizer.load(smollm2)
  assert (ours.vocab_size, ours.bos_id, ours.eos_id, ours.pad_id) == (49152, 1, 2, 2)
  assert not ours.adds_bos and ours.stop_ids == {0, 2}
  ours.check(49152)
  # Digits one by one, and before the rule that gives the last space to the next word.
  pieces = ours.token_bytes(ours.encode('x =    120'))
  assert pieces == [b'x', b' =', b'    ', b'1', b'2', b'0']
  ours.save(tmp_path)
  again = tokenizer.load(tmp_path)
  for text in programs[:300] + TEXTS:
    assert ours.decode(ours.encode(text)) == text
    assert again.encode(text, allow_special=True) == ours.encode(text, allow_special=True)


# --- mistakes of users


def test_mistakes_are_named(tmp_path, llama3_dir):
  cases = {
      'absent': ('There is no tokenizer', None),
      'x.txt': ('must be tokenizer.json', 'hello'),
      'tokenizer.json': ('not valid JSON', '{"model": '),
      'list.json': ('no JSON object', '[]'),
      'empty.json': ('no model with a vocabulary', '{}'),
      'wordpiece.json': ('WordPiece', json.dumps({
          'added_tokens': [], 'model': {'type': 'WordPiece', 'vocab': {'a': 0}}})),
      'broken.json': ('cannot be read as a tokenizer', json.dumps({
          'added_tokens': [], 'model': {'type': 'BPE', 'vocab': {'a': 0}, 'merges': ['a b']}})),
      'decoder.json': ('decodes by', json.dumps({
          'added_tokens': [], 'model': {'type': 'BPE', 'vocab': {'a': 0}, 'merges': []}})),
      'tokenizer.model': ('no sentencepiece model', 'hello, this is text'),
      'zero.model': ('no sentencepiece model', ''),
  }
  for name, (message, content) in cases.items():
    if content is not None:
      (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
      tokenizer.load(tmp_path / name)
  with pytest.raises(ValueError, match='There is no tokenizer'):
    tokenizer.load('~nobody-of-that-name/m')
  (tmp_path / 'folder').mkdir()
  with pytest.raises(ValueError, match='neither tokenizer.json nor'):
    tokenizer.load(tmp_path / 'folder')


@pytest.mark.parametrize('ids', ['2', {'id': 2}, [1, '2'], 2.0, True, -1])
def test_ends_that_are_no_token_ids_are_refused(qwen_dir, tmp_path, ids):
  shutil.copytree(qwen_dir, tmp_path / 'model')
  (tmp_path / 'model' / 'generation_config.json').write_text(json.dumps({'eos_token_id': ids}))
  with pytest.raises(ValueError, match='generation_config.json: eos_token_id=.*a token id'):
    tokenizer.load(tmp_path / 'model')


def test_a_truncated_or_foreign_sentencepiece_model_is_refused(tmp_path, llama2_model):
  path = tmp_path / 'tokenizer.model'
  path.write_bytes(llama2_model[:len(llama2_model) // 2])
  with pytest.raises(ValueError, match='tokenizer.model'):
    tokenizer.load(path)
  sentencepiece = pytest.importorskip('sentencepiece')
  out = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(CORPUS * 4), model_writer=out, vocab_size=90, model_type='unigram',
      hard_vocab_limit=False, minloglevel=2)
  path.write_bytes(out.getvalue())
  with pytest.raises(ValueError, match='not of the LLaMA kind'):
    tokenizer.load(path)


def test_loading_imports_nothing_heavy(qwen_dir):
  code = ('import sys; from absolute_zero_jax import tokenizer; '
          f'tokenizer.load({str(qwen_dir)!r}).encode("x"); '
          'print([m for m in ("torch", "transformers", "jax", "numpy", "gguf", "sentencepiece", '
          '"jinja2") if m in sys.modules])')
  root = str(tokenizer_gguf.__file__).rsplit('/absolute_zero_jax', 1)[0]
  out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True,
                       cwd=root)
  assert out.stdout.strip() == '[]'


# --- what a model says of its tokens elsewhere


def test_more_special_tokens_of_an_older_save_are_special(qwen_dir, tmp_path):
  transformers = pytest.importorskip('transformers')
  spec = json.loads((qwen_dir / 'tokenizer.json').read_text())
  end = spec['added_tokens'].pop()['id']
  write_json(tmp_path / 'tokenizer.json', **spec)
  write_json(tmp_path / 'added_tokens.json', **{'<after>': end})
  write_json(tmp_path / 'tokenizer_config.json', tokenizer_class='PreTrainedTokenizerFast',
             eos_token='<|im_end|>', additional_special_tokens=['<after>'])
  ours = tokenizer.load(tmp_path, plain_tags=())
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  text = 'x = "<after>"'
  assert ours.encode(text) == theirs.encode(text, split_special_tokens=True)
  assert end in ours.special_ids and end in theirs.all_special_ids


@pytest.mark.parametrize('index', [5, 'end', 9999])     # of a piece, of another token, too high
@pytest.mark.parametrize('file', ['tokenizer_config', 'added_tokens', 'tokenizer'])
def test_an_id_that_cannot_be_moves_no_other(file, index, qwen_dir, tmp_path):
  transformers = pytest.importorskip('transformers')
  spec = json.loads((qwen_dir / 'tokenizer.json').read_text())
  texts = {token['content']: token['id'] for token in spec['added_tokens']}
  specials = {token['content'] for token in spec['added_tokens'] if token['special']} | (
      {'<new>'} if file != 'added_tokens' else set())
  index = texts['<|im_end|>'] if index == 'end' else index
  token = dict(content='<new>', special=True, lstrip=False, rstrip=False, normalized=False,
               single_word=False)
  files = {'tokenizer': spec, 'added_tokens': {},
           'tokenizer_config': dict(tokenizer_class='PreTrainedTokenizerFast',
                                    eos_token='<|im_end|>')}
  if file == 'tokenizer':
    spec['added_tokens'].append(token | {'id': index})
  else:
    files[file] |= {'<new>': index} if file == 'added_tokens' else {
        'added_tokens_decoder': {str(index): token}}
  for name, content in files.items():
    write_json(tmp_path / f'{name}.json', **content)
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  for tags in ((), tokenizer.PLAIN_TAGS):
    ours = tokenizer.load(tmp_path, plain_tags=tags)
    for text in ('<new>', *(text for text in texts if text not in tags)):
      ids = ours.encode(text, allow_special=True)
      assert ids == theirs.encode(text) and ours.decode(ids) == text
      assert (ids[0] in ours.special_ids) == (text in specials), text


def test_without_a_pad_token_a_stop_stands_in(qwen_dir):
  ours = tokenizer.load(qwen_dir / 'tokenizer.json')             # names no token at all
  assert ours.pad_id in ours.stop_ids


def test_fillers_of_a_gguf_are_no_text_and_its_named_tokens_are_special(tmp_path):
  tokens = ['a', 'b', '<|im_end|>', '[PAD3]', '[PAD4]']
  write_gguf(tmp_path / 'm.gguf', 'gpt2', tokens, [1, 1, 4, 5, 5], pre='qwen2', merges=[],
             eos=2)
  ours = tokenizer.load(tmp_path / 'm.gguf')
  ours.check(8)
  assert (ours.vocab_size, ours.decode([3, 4])) == (3, '') and 2 in ours.special_ids


def test_chat_templates_may_mark_generations_and_sort_keys(qwen_dir):
  template = ("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}"
              "{% endfor %}"
              "{{ {'b': 1, 'a': 'é'} | tojson(sort_keys=True, ensure_ascii=True) }}")
  ours = tokenizer.load(qwen_dir, chat_template=template)
  assert ours.chat([{'role': 'user', 'content': 'x'}]) == 'x{"a": "\\u00e9", "b": 1}'


@pytest.mark.parametrize('spaced', [True, False])
def test_a_config_says_whether_a_space_comes_first(llama2_dir, tmp_path, spaced):
  transformers = pytest.importorskip('transformers')
  shutil.copytree(llama2_dir, tmp_path / 'm')
  write_json(tmp_path / 'm' / 'config.json', model_type='llama')
  write_json(tmp_path / 'm' / 'tokenizer_config.json', tokenizer_class='LlamaTokenizer',
             add_prefix_space=spaced, add_bos_token=True, legacy=False)
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / 'm')
  assert tokenizer.load(tmp_path / 'm').encode('def f') == theirs.encode('def f')
