# SPDX-License-Identifier: Apache-2.0
"""What a tokenizer is made of, whatever file it came from: the content of a tokenizer.json.

  tokenizer.json (+ config files)  tokenizer_files.py --.
  tokenizer.model (sentencepiece)  tokenizer_spm.py -----+--> Source --> plain() --> Tokenizer
  model.gguf                       tokenizer_gguf.py ---'

One representation means one encoder, one decoder and one way to save.
"""

from collections.abc import Callable, Iterable, Sequence
import dataclasses
import functools
import re
from typing import Any

NAMES = ('bos_token', 'eos_token', 'unk_token', 'pad_token', 'sep_token', 'cls_token',
         'mask_token')


@dataclasses.dataclass(frozen=True)
class Source:
  """What a tokenizer is made of, whatever file it came from.

  Attributes:
    origin: path for error messages.
    spec: content of a tokenizer.json.
    names: text of the tokens that the model calls by one of `NAMES`.
    adds_bos: None leaves the decision to the spec's post-processor.
    stops: further ids that end a response, e.g. the eos list of generation_config.json.
  """
  origin: str
  spec: dict[str, Any]
  names: dict[str, str]
  adds_bos: bool | None = None
  chat_template: str = ''
  stops: tuple[int, ...] = ()


def added_token(index: int, content: str, *, special: bool) -> dict[str, Any]:
  """An entry of a tokenizer.json's added_tokens that matches its text and nothing around it."""
  return {'id': index, 'content': content, 'single_word': False, 'lstrip': False, 'rstrip': False,
          'normalized': False, 'special': special}


def plain(source: Source, tags: Iterable[str]) -> tuple[dict[str, Any], frozenset[str]]:
  """The spec with `tags` spelled by ordinary tokens, and the texts plain text must not become.

  A tag that is an added token keeps its id and its text for decoding, but leaves the list of
  texts that are looked for while encoding. Merges that would build a special token or a tag out
  of pieces are dropped.
  """
  spec = dict(source.spec, truncation=None, padding=None)  # both would change ids silently
  model = dict(spec['model'])
  if model.get('type', 'BPE') != 'BPE':
    raise ValueError(f'{source.origin} holds a {model["type"]} tokenizer; the LLaMA and Qwen '
                     'families use BPE, and nothing else is supported.')
  tags = set(tags)
  ids = _given_out(spec['added_tokens'], model['vocab'])
  if ids.keys() & tags:
    model['vocab'] = model['vocab'] | ids      # removing a token would shift all that follow
  spec['added_tokens'] = sorted(
      (token | {'id': ids[token['content']]} for token in spec['added_tokens']
       if token['content'] not in tags), key=lambda token: token['id'])
  banned = {token['content'] for token in spec['added_tokens'] if token.get('special')} | tags
  model['merges'] = [pair for pair in model.get('merges', []) if _joined(pair) not in banned]
  known = set(model['vocab']) | {token['content'] for token in spec['added_tokens']}
  spec['model'] = model
  return spec, frozenset(banned & known)


def post_processor(bos: str | None, bos_id: int | None) -> dict[str, Any]:
  """What puts BOS, if given, before a text for readers of a saved tokenizer.json."""
  single: list[dict[str, Any]] = [{'Sequence': {'id': 'A', 'type_id': 0}}]
  special = {}
  if bos is not None:
    single.insert(0, {'SpecialToken': {'id': bos, 'type_id': 0}})
    special = {bos: {'id': bos, 'ids': [bos_id], 'tokens': [bos]}}
  pair = [*single, {'Sequence': {'id': 'B', 'type_id': 1}}]
  return {'type': 'TemplateProcessing', 'single': single, 'pair': pair, 'special_tokens': special}


def reader(decoder: dict[str, Any] | None, origin: str) -> tuple[Callable[[str], bytes], bool]:
  """(token text -> bytes, whether a decoded text loses its first space) of a spec's decoder."""
  steps = (decoder or {}).get('decoders', [decoder or {}])
  kinds = {step.get('type'): step for step in steps}
  if 'ByteLevel' in kinds:
    alphabet = byte_of_char()

    def byte_level(text):
      return bytes(map(alphabet.get, text)) if set(text) <= alphabet.keys() else text.encode()
    return byte_level, False
  if not kinds.keys() & {'Metaspace', 'ByteFallback'}:
    raise ValueError(f'{origin} decodes by {sorted(map(str, kinds))}; supported are byte-level BPE '
                     'and sentencepiece-like BPE.')

  def sentencepiece(text):
    if re.fullmatch('<0x[0-9A-F]{2}>', text):
      return bytes.fromhex(text[3:5])
    return text.replace('\u2581', ' ').encode()
  strips = (kinds.get('Strip', {}).get('start', 0) > 0
            or kinds.get('Metaspace', {'prepend_scheme': 'never'}).get('prepend_scheme') != 'never')
  return sentencepiece, strips


@functools.cache
def byte_of_char() -> dict[str, int]:
  """GPT-2's alphabet: printable bytes stand for themselves, the rest for U+0100 and on."""
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  rest = [byte for byte in range(256) if byte not in printable]
  return {chr(byte): byte for byte in printable} | {
      chr(256 + index): byte for index, byte in enumerate(rest)}


def _given_out(tokens: Sequence[dict[str, Any]], vocab: dict[str, int]) -> dict[str, int]:
  """Ids of added tokens by text: the vocabulary's, else the next ones in order.

  Loading, and so transformers, heeds no other id that a file may declare: one that is taken, or
  beyond the next.
  """
  ids, after = {}, len(vocab)
  for text in (token['content'] for token in tokens):
    ids[text] = vocab.get(text, after)
    after += text not in vocab
  return ids


def _joined(merge: str | Sequence[str]) -> str:
  # 'a b' in older files, ['a', 'b'] in newer ones.
  return ''.join(merge) if not isinstance(merge, str) else merge.replace(' ', '', 1)
