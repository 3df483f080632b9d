# SPDX-License-Identifier: Apache-2.0
"""Builds the carried tokenizer: byte-level BPE whose merges spell the words of `grammar`.

  python -m absolute_zero_jax.lexicon FOLDER

A program of the grammar takes some 14 tokens, at most 50: an indented `return` is one, so is `c = `
on a line of its own, a small number, a method call. Letters inside strings stay single, since the
model has to reverse and count them. Any other text is spelled byte by byte, and comes back as it
was.
"""

import json
import pathlib
import sys

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

FOLDER = pathlib.Path(__file__).with_name('carried') / 'tiny'
PAD, END = '<|pad|>', '<|end|>'
ANSWER, THINK, REJECT = '\n# answer\n', '\n# think', '\n# no'
# Texts of the prompt set 'tiny', one token each.
MARKERS = (ANSWER, THINK, REJECT, '# example\n', '# new deduction\n', '# new abduction\n',
           '# new induction\n', '# find f\n', '\n# f(?) is ')
_NAMES = 'abcdeghij'
_CALLS = ('len', 'sum', 'max', 'min', 'abs', 'sorted', 'list', 'tuple', 'range', 'str')
_METHODS = ('.append(', '.count(', '.find(', '.get(', ".replace(", '.reverse()', '.sort()',
            '.upper()', '.values()', '.items()', '.keys()', "''.join(")
_WORDS = (
    'def f(', 'def f(a):', 'def f(a, b):', '\n    return ', '\n    ', '\n        ',
    '\n            ', '\nf(', ') == ', ' for i in ', 'for i in ', 'for j in ', 'if ', ' if ',
    ' else ', 'else:', 'while ', ' in ', ' not ', ' and ', ' or ', 'True', 'False', 'None', ', ',
    ': ', '[]', '{}', "''", '[::-1]', '[1:]', '[:2]', '[:-1]', '[0]', '[1]', '[-1]', ' % 2 == ',
    ' + ', ' - ', ' * ', ' % ', ' // ', ' == ', ' != ', ' > ', ' < ', ' += ', ' -= ', ' *= ',
    ' = ', ',)')


def words() -> list[str]:
  """The texts that become one token each, bytes and markers aside; longest first."""
  found = [*_WORDS, *_METHODS, *(f'{call}(' for call in _CALLS),
           *(f'{line}{name} = ' for line in ('\n', '\n    ') for name in _NAMES),
           *(f"'{letter}'" for letter in 'abcde'), *(f'-{n}' for n in range(1, 10)),
           *(str(n) for n in range(100))]
  return sorted(set(found), key=lambda word: (-len(word), word))


def build() -> tokenizers.Tokenizer:
  """The tokenizer; the same in every call."""
  numbers = r'-[1-9](?![0-9])|[0-9]{1,2}'
  escaped = [_escape(word) for word in words() if not word.lstrip('-').isdigit()]
  pattern = tokenizers.Regex('|'.join([*escaped, numbers, r'[\s\S]']))
  made = tokenizers.Tokenizer(models.BPE())
  made.pre_tokenizer = pre_tokenizers.Sequence([
      pre_tokenizers.Split(pattern, 'isolated'),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
  made.decoder = decoders.ByteLevel()
  made.train_from_iterator(words(), trainers.BpeTrainer(
      vocab_size=4096, min_frequency=1, show_progress=False, special_tokens=[PAD, END],
      initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
  # No special tokens: text may contain them, and they are read back as text.
  made.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in MARKERS])
  return made


def save(folder: pathlib.Path) -> None:
  """Writes tokenizer.json and what `transformers` wants beside it."""
  folder.mkdir(parents=True, exist_ok=True)
  build().save(str(folder / 'tokenizer.json'))
  config = {'tokenizer_class': 'PreTrainedTokenizerFast', 'add_bos_token': False,
            'clean_up_tokenization_spaces': False, 'eos_token': END, 'pad_token': PAD}
  (folder / 'tokenizer_config.json').write_text(json.dumps(config, indent=2) + '\n')


def _escape(word: str) -> str:
  """The word as a pattern; `re.escape` would escape blanks, which Oniguruma reads otherwise."""
  return ''.join(f'\\{c}' if c in '\\.^$*+?()[]{}|' else c for c in word)


if __name__ == '__main__':
  save(pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
