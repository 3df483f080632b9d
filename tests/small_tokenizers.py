# SPDX-License-Identifier: Apache-2.0
"""Tokenizers of every kind, trained here on a few lines; the fixtures are offered by conftest."""

import io
import json
import random
import unicodedata

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from absolute_zero_jax import tokenizer

CORPUS = [
    'def f(x, y):\n    sum = 0\n    for i in range(9):\n        sum += x * i\n    return sum\n',
    'class A:\n\tdef g(self, name: str = "abc") -> list[int]:\n\t\treturn [ord(c) for c in name]',
    'The answer is 42, not 1234567. <think>I think so</think> <answer>yes</answer>\n\n',
    'print(f"{a!r:>10}")  # naïve café, 日本語, 😀😀\n    assert {1: 2} == dict(a=1) or x != y\n',
]
CHATML = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools') }}"
    "{% endif %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
LLAMA3_CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + "
    "'<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}")
TAGS = ('<think>', '</think>', '<answer>', '</answer>')
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r'|\s*[\r\n]+|\s+(?!\S)|\s+')
ALPHABET = [
    *' \n\t0123456789abcdefxyz()[]{}=+-*/_"\':,.<>|#éßñ日本😀\u0301\u00a0\x00', *TAGS, '    ',
    '\n\n', '<|im_end|>', '<|endoftext|>', '</s>', '<unk>', "'s", 'def f(x):', ' return', 'zebra']


def random_texts(count, seed=0):
  rng = random.Random(seed)
  return [''.join(rng.choice(ALPHABET) for _ in range(rng.randint(0, 40))) for _ in range(count)]


TEXTS = [*CORPUS, *random_texts(400), *(' ' * n + '7' for n in range(20)),
         *('\n' * n for n in range(9))]


def train_byte_level(pattern, specials, user_defined=(), whole_word=''):
  """A byte-level BPE as the LLaMA 3 and Qwen families have it, ids of added tokens last."""
  made = tokenizers.Tokenizer(models.BPE())
  made.pre_tokenizer = pre_tokenizers.Sequence([
      pre_tokenizers.Split(tokenizers.Regex(pattern), behavior='isolated'),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
  made.decoder = decoders.ByteLevel()
  made.train_from_iterator(CORPUS * 3, trainers.BpeTrainer(
      vocab_size=600, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
  if whole_word:  # no merges build it: LLaMA 3 looks words up before it merges
    spec = json.loads(made.to_str())
    spec['model']['vocab'][whole_word] = made.get_vocab_size()
    spec['model']['ignore_merges'] = True
    made = tokenizers.Tokenizer.from_str(json.dumps(spec))
  made.add_special_tokens([tokenizers.AddedToken(t, special=True) for t in specials])
  made.add_tokens([tokenizers.AddedToken(t, special=False) for t in user_defined])
  return made


def write_json(path, **content):
  path.write_text(json.dumps(content))


@pytest.fixture(scope='session')
def qwen_dir(tmp_path_factory):
  """Like Qwen3: no BOS, think tags among the added tokens, one added token after them."""
  folder = tmp_path_factory.mktemp('qwen')
  pattern = LLAMA3_SPLIT.replace('{1,3}', '')
  made = train_byte_level(pattern, ['<|endoftext|>', '<|im_start|>', '<|im_end|>'],
                          ['<tool_call>', '<think>', '</think>', '<after>'])
  made.normalizer = normalizers.NFC()
  made.save(str(folder / 'tokenizer.json'))
  write_json(folder / 'tokenizer_config.json', tokenizer_class='Qwen2Tokenizer', bos_token=None,
             eos_token='<|im_end|>', pad_token='<|endoftext|>', add_bos_token=False,
             chat_template=CHATML)
  write_json(folder / 'generation_config.json', eos_token_id=[
      made.token_to_id('<|im_end|>'), made.token_to_id('<after>')])
  return folder


@pytest.fixture(scope='session')
def llama3_dir(tmp_path_factory):
  """Like LLaMA 3: BOS by the post-processor, no pad token, two ends of turn."""
  folder = tmp_path_factory.mktemp('llama3')
  made = train_byte_level(LLAMA3_SPLIT, [
      '<|begin_of_text|>', '<|end_of_text|>', '<|start_header_id|>', '<|end_header_id|>',
      '<|eot_id|>'], whole_word='zebra')
  made.post_processor = processors.TemplateProcessing(
      single='<|begin_of_text|> $A',
      special_tokens=[('<|begin_of_text|>', made.token_to_id('<|begin_of_text|>'))])
  made.save(str(folder / 'tokenizer.json'))
  write_json(folder / 'tokenizer_config.json', tokenizer_class='PreTrainedTokenizerFast',
             bos_token={'__type': 'AddedToken', 'content': '<|begin_of_text|>'},
             eos_token='<|end_of_text|>',
             chat_template=[{'name': 'default', 'template': LLAMA3_CHAT}])
  return folder


@pytest.fixture(scope='session')
def llama2_model():
  """Bytes of a sentencepiece model trained as LLaMA 2's was."""
  sentencepiece = pytest.importorskip('sentencepiece')
  out = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter([*'\n'.join(CORPUS * 4).split('\n'), *(' ' * n for n in range(17))]),
      model_writer=out, vocab_size=420, model_type='bpe', byte_fallback=True, split_digits=True,
      normalization_rule_name='identity', remove_extra_whitespaces=False, minloglevel=2,
      allow_whitespace_only_pieces=True, hard_vocab_limit=False, user_defined_symbols=['<think>'])
  return out.getvalue()


@pytest.fixture(scope='session')
def llama2_dir(tmp_path_factory, llama2_model):
  folder = tmp_path_factory.mktemp('llama2')
  (folder / 'tokenizer.model').write_bytes(llama2_model)
  return folder


@pytest.fixture(scope='session', params=['qwen', 'llama3', 'llama2', 'bytes'])
def loaded(request, qwen_dir, llama3_dir, llama2_dir):
  """One tokenizer of every kind, plain tags on."""
  return tokenizer.load({'qwen': qwen_dir, 'llama3': llama3_dir, 'llama2': llama2_dir,
                         'bytes': 'bytes'}[request.param])


def normal(ours, text):
  """Qwen's tokenizers compose accents before anything else; the others change nothing."""
  composes = ours.chat_template == CHATML
  return unicodedata.normalize('NFC', text) if composes else text
