# SPDX-License-Identifier: Apache-2.0
"""Text to token ids and back, by the conventions of the model the tokenizer came with.

  load('dir' | 'tokenizer.json' | 'tokenizer.model' | 'model.gguf' | 'bytes') -> Tokenizer
  text --encode--> ids                  special tokens inside the text are spelled, not obeyed
  messages --chat_ids--> ids            only the chat template itself writes special tokens
  ids --decode--> text, --stop_position--> how many of them to keep

No torch, no transformers, no JAX.
"""

import bisect
from collections.abc import Callable, Iterable, Mapping, Sequence
import datetime
import functools
import itertools
import json
import os
import pathlib
import re
import threading
from typing import Any

import tokenizers

from absolute_zero_jax import tokenizer_files, tokenizer_gguf, tokenizer_spec

# Ends of a turn that many models leave out of their eos; they count where they are special tokens.
_TURN_ENDS = ('<|im_end|>', '<|eot_id|>', '<|eom_id|>', '<|endoftext|>', '<|end_of_text|>')
PLAIN_TAGS = ('<think>', '</think>', '<answer>', '</answer>')


def load(path: str | os.PathLike, *, plain_tags: Iterable[str] = PLAIN_TAGS,
         chat_template: str | None = None) -> 'Tokenizer':
  """The tokenizer of a model.

  Args:
    path: a Hugging Face directory, a tokenizer.json, a sentencepiece tokenizer.model, a .gguf
      file, or 'bytes' for `byte_tokenizer()`.
    plain_tags: texts that are always spelled with ordinary tokens, because the embeddings of
      their own tokens may be untrained (Qwen3's base models: ids 151667 and 151668). Pass () for
      a model that was trained on its think tokens.
    chat_template: a jinja template in place of the model's own; '' for none.

  Raises:
    ValueError: nothing readable is at `path`, a tokenizer of an unsupported kind, or a damaged one.
  """
  if path == 'bytes':
    return byte_tokenizer(chat_template)
  path = pathlib.Path(os.path.expanduser(path))
  if not path.exists():
    raise ValueError(f'There is no tokenizer at {path}. Name a directory with tokenizer.json or '
                     "tokenizer.model, a .gguf file, or 'bytes'; that of a model by name lies at "
                     '`models.hub.resolve(name)`.')
  if path.is_file() and path.suffix not in ('.gguf', '.json', '.model'):
    raise ValueError(f'{path} is no tokenizer; a single file must be tokenizer.json, '
                     'tokenizer.model or a .gguf file.')
  reader = tokenizer_gguf if path.is_file() and path.suffix == '.gguf' else tokenizer_files
  plain_tags = tuple(plain_tags)
  try:
    return Tokenizer(reader.read(path), plain_tags=plain_tags, chat_template=chat_template)
  except (ArithmeticError, AttributeError, LookupError, TypeError, UnicodeDecodeError) as error:
    raise ValueError(f'{path} holds a value of a wrong form ({type(error).__name__}: {error}). '
                     'Fetch it again.') from error


def byte_tokenizer(chat_template: str | None = None) -> 'Tokenizer':
  """256 bytes, then <pad> (256), <bos> (257) and <eos> (258); no BOS by default."""
  byte_level = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True,
                'use_regex': False}
  specials = ('<pad>', '<bos>', '<eos>')
  spec = {
      'version': '1.0', 'truncation': None, 'padding': None, 'normalizer': None,
      'pre_tokenizer': byte_level, 'post_processor': None, 'decoder': byte_level,
      'added_tokens': [tokenizer_spec.added_token(256 + index, text, special=True)
                       for index, text in enumerate(specials)],
      'model': {'type': 'BPE', 'merges': [],
                'vocab': tokenizer_spec.byte_of_char()},
  }
  names = dict(zip(('pad_token', 'bos_token', 'eos_token'), specials))
  return Tokenizer(tokenizer_spec.Source('bytes', spec, names, adds_bos=False),
                   chat_template=chat_template)


class Tokenizer:
  """Encoder, decoder and chat template of one model. Made by `load`; safe to share by threads.

  Attributes:
    vocab_size: highest id plus one; the model's own vocabulary may be padded beyond it.
    bos_id, eos_id: None where the model has none.
    pad_id: the model's own, else eos, else a stop or another special token, else 0.
    stop_ids: eos, the eos list of generation_config.json, and turn ends such as <|im_end|>.
    special_ids: ids that plain text never becomes (but unknown characters, where a model has an
      unknown token in place of bytes) and `decode(skip_special=True)` leaves out.
    adds_bos: whether the model's own convention starts a text with BOS.
    chat_template: jinja source, '' for none.
  """

  def __init__(self, source: tokenizer_spec.Source, *, plain_tags: Iterable[str] = PLAIN_TAGS,
               chat_template: str | None = None):
    spec, unreachable = tokenizer_spec.plain(source, plain_tags)
    try:
      self._backend = tokenizers.Tokenizer.from_str(json.dumps(spec))
    except Exception as error:  # the Rust side raises bare Exception
      raise ValueError(f'{source.origin} cannot be read as a tokenizer: {error}. Fetch it again, '
                       'or update the `tokenizers` package.') from error
    self._lock = threading.Lock()
    # A prompt is measured before it is asked, and asked again by a later draw.
    self._ids = functools.lru_cache(maxsize=1024)(self._encode)
    self._vocab = self._backend.get_vocab(with_added_tokens=True)
    self._origin = source.origin
    self._names = {name: text for name, text in source.names.items() if text in self._vocab}
    self._added = {token['id']: token for token in spec['added_tokens']}
    self.vocab_size = self._num_ids = 1 + max(self._vocab.values())
    self.special_ids = frozenset(i for i, token in self._added.items() if token.get('special'))
    self.bos_id, self.eos_id, pad_id = (
        self._vocab.get(self._names.get(name)) for name in ('bos_token', 'eos_token', 'pad_token'))
    ends = (self._vocab.get(text) for text in _TURN_ENDS)
    self.stop_ids = frozenset(
        {i for i in ends if i in self.special_ids}
        | {i for i in (*source.stops, self.eos_id) if i is not None and 0 <= i < self.vocab_size})
    # A sampler never draws it unless it is a stop, so it should be no ordinary token.
    named = [i for i in (pad_id, self.eos_id) if i is not None]
    self.pad_id = [*named, *sorted(self.stop_ids), *sorted(self.special_ids), 0][0]
    self.chat_template = source.chat_template if chat_template is None else chat_template
    if not isinstance(self.chat_template, str):
      raise ValueError(f'{source.origin}: chat_template={self.chat_template!r} must be a text.')
    self.adds_bos = self.bos_id is not None and (
        self._backend.encode('').ids[:1] == [self.bos_id]
        if source.adds_bos is None else source.adds_bos)
    self._spec = spec | {'post_processor': tokenizer_spec.post_processor(
        self._names['bos_token'] if self.adds_bos else None, self.bos_id)}
    self._to_bytes, self._strips_start = tokenizer_spec.reader(spec.get('decoder'), source.origin)
    for text in sorted(unreachable - {spec['model'].get('unk_token')}):
      if self._vocab[text] in self.encode(text, bos=False):
        raise ValueError(f'{source.origin} turns the plain text {text!r} into the special token '
                         f'{self._vocab[text]}. Leave it out of plain_tags or use another model.')

  def encode(self, text: str, *, bos: bool | None = None, allow_special: bool = False) -> list[int]:
    """Token ids of `text`.

    Args:
      bos: whether BOS comes first; None follows the model's convention. Never twice. True raises
        ValueError where the model has none.
      allow_special: False spells special tokens that occur in the text ('<|im_end|>' in a program
        does not end a turn). True turns them into their ids; for text of our own only. Added
        tokens that the model does not call special are vocabulary and always become one id.

    Lone surrogates, which UTF-8 cannot write, become U+FFFD.
    """
    if bos and self.bos_id is None:
      raise ValueError(f'{self._origin} has no BOS token; pass bos=None or False.')
    try:
      text.encode()
    except UnicodeEncodeError:
      text = text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')
    ids = list(self._ids(text, allow_special))
    if (self.adds_bos if bos is None else bos) and not (allow_special and ids[:1] == [self.bos_id]):
      ids.insert(0, self.bos_id)
    return ids

  def _encode(self, text, allow_special):
    with self._lock:  # a setting of the shared backend, not an argument
      self._backend.encode_special_tokens = not allow_special
      return tuple(self._backend.encode(text, add_special_tokens=False).ids)

  def decode(self, ids: Iterable[int], *, skip_special: bool = False,
             continues: bool = False) -> str:
    """The text of `ids`; bytes that are no UTF-8 become U+FFFD.

    Args:
      skip_special: leave out `special_ids`.
      continues: the ids go on after others, as a response does. It matters for sentencepiece
        models: the space they put before a text is taken away again only where a text starts.

    Ids without a token give no text. An id outside of the vocabulary raises ValueError.
    """
    text = b''.join(self.token_bytes(ids, skip_special=skip_special)).decode('utf-8', 'replace')
    return text[1:] if self._strips_start and not continues and text[:1] == ' ' else text

  def token_bytes(self, ids: Iterable[int], *, skip_special: bool = False) -> list[bytes]:
    """The UTF-8 bytes of each token; one character may span several tokens.

    `codecs.getincrementaldecoder('utf-8')('replace')` turns a stream of them into text.
    """
    ids = [int(index) for index in ids]
    if ids and not 0 <= min(ids) <= max(ids) < self._num_ids:
      wrong = next(index for index in ids if not 0 <= index < self._num_ids)
      raise ValueError(f'Token id {wrong} is outside of 0 to {self._num_ids - 1}, the ids of '
                       f'{self._origin}. Are these ids of another model?')
    if skip_special:
      ids = [index for index in ids if index not in self.special_ids]
    return [self._table[index] if index < self.vocab_size else b'' for index in ids]

  def stop_position(self, ids: Sequence[int], stops: Iterable[str] | str,
                    accept: Callable[[str], bool] = lambda text: True) -> int | None:
    """How many of a response's `ids` to keep so that their text just contains one of `stops`.

    The smallest such number: the last kept token completes the stop text, and may hold characters
    beyond it. None if no stop text occurs. Special tokens count as their text. Empty texts raise.

    Args:
      accept: whether the text up to the end of a stop text is a whole response; if not, the next
        one is looked for. What is whole must stay so however it goes on: few texts are asked about.
    """
    pieces = self.token_bytes(ids)
    data = b''.join(pieces)
    ends = set()
    for stop in [stops] if isinstance(stops, str) else stops:
      if not stop:
        raise ValueError('A stop text must not be empty.')
      ends |= {found.end() for found in re.finditer(re.escape(stop.encode()), data)}
    ends = sorted(ends)
    is_whole = lambda end: accept(data[:end].decode('utf-8', 'replace'))
    if not ends or not is_whole(ends[-1]):
      return None
    end = ends[bisect.bisect_left(ends, True, key=is_whole)]
    return 1 + bisect.bisect_left(list(itertools.accumulate(map(len, pieces))), end)

  def chat(self, messages: Sequence[Mapping[str, Any]], *,
           add_generation_prompt: bool = True) -> str:
    """`messages` ({'role', 'content'}) as the model's chat template writes them.

    Encode the result with `allow_special=True`; `chat_ids` does, and also guards the contents.

    Raises:
      ValueError: there is no template, it is broken, or it refuses these messages.
    """
    if not self.chat_template:
      raise ValueError(f'{self._origin} has no chat template (a base model?). Use a prompt set '
                       'without chat, or load with chat_template=...')
    try:
      return self._template.render(
          messages=list(messages), tools=None, documents=None,
          add_generation_prompt=add_generation_prompt, **self._names)
    except Exception as error:  # a template is a program: it may fail in any way
      raise ValueError(f'The chat template of {self._origin} failed: {error}') from error

  def chat_ids(self, messages: Sequence[Mapping[str, str]], *,
               add_generation_prompt: bool = True) -> list[int]:
    """Token ids of a chat; special tokens inside the contents are spelled, not obeyed."""
    contents = ''.join(message['content'] for message in messages)
    specials = [self._added[index]['content'] for index in sorted(self.special_ids)]
    hostile = sorted((text for text in specials if text in contents), key=len, reverse=True)
    marker = next(mark for mark in map('\ue000{}\ue001'.format, itertools.count())
                  if mark not in contents)
    guarded = [dict(message) for message in messages]
    for message in guarded:
      for index, text in enumerate(hostile):
        message['content'] = message['content'].replace(text, f'{marker}{index}\ue002')
    first, *rest = self.chat(guarded, add_generation_prompt=add_generation_prompt).split(marker)
    ids = self.encode(first, bos=False, allow_special=True)
    for part in rest:
      index, _, text = part.partition('\ue002')
      ids += self.encode(hostile[int(index)], bos=False)
      ids += self.encode(text, bos=False, allow_special=True)
    return ids

  def check(self, model_vocab: int) -> None:
    """Raises ValueError unless a model of `model_vocab` embeddings can take every id.

    Models often pad their vocabulary; after this call the ids in between decode to no text.
    """
    if self.vocab_size > model_vocab:
      raise ValueError(
          f'{self._origin} has token ids up to {self.vocab_size - 1}, but the model has only '
          f'{model_vocab} embeddings: they do not belong together. Take the tokenizer from the '
          "model's own directory.")
    self._num_ids = model_vocab

  def save(self, directory: str | os.PathLike) -> None:
    """Writes files that `transformers.AutoTokenizer` and `load` read and that give equal ids.

    tokenizer.json, tokenizer_config.json, and generation_config.json (with the stop ids) unless
    there is one. Plain tags stay plain: their tokens keep their ids, but are no added tokens.
    Beside a config.json of model type qwen2, transformers cuts texts by Qwen2's own rule, whatever
    tokenizer.json says: there the ids are equal only for tokenizers of that rule.
    """
    directory = pathlib.Path(directory) if isinstance(directory, str) else directory
    directory.mkdir(parents=True, exist_ok=True)
    config = {'tokenizer_class': 'PreTrainedTokenizerFast', 'add_bos_token': self.adds_bos,
              'clean_up_tokenization_spaces': False, **self._names}
    # Besides tokenizer.json, because some classes of transformers build themselves anew.
    config['added_tokens_decoder'] = {
        str(index): {key: value for key, value in token.items() if key != 'id'}
        for index, token in sorted(self._added.items())}
    if self.chat_template:
      config['chat_template'] = self.chat_template
    generation = {'bos_token_id': self.bos_id, 'eos_token_id': sorted(self.stop_ids),
                  'pad_token_id': self.pad_id}
    contents = {'tokenizer.json': self._spec, 'tokenizer_config.json': config}
    if not (directory / 'generation_config.json').exists():
      contents['generation_config.json'] = {k: v for k, v in generation.items() if v is not None}
    for name, content in contents.items():
      text = json.dumps(content, ensure_ascii=False, indent=2) + '\n'
      (directory / name).write_text(text, encoding='utf-8')

  @functools.cached_property
  def _table(self) -> list[bytes]:
    """Bytes by id; b'' where an id has no token."""
    table = [b''] * self.vocab_size
    for text, index in self._vocab.items():
      table[index] = text.encode() if index in self._added else self._to_bytes(text)
    return table

  @functools.cached_property
  def _template(self):
    import jinja2  # here: only chats need it
    import jinja2.ext
    import jinja2.sandbox

    def raise_exception(message):
      raise jinja2.TemplateError(message)

    class Generation(jinja2.ext.Extension):
      """`{% generation %}`: marks what an assistant says, for trainers; its text is its body."""
      tags = {'generation'}

      def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(('name:endgeneration',), drop_needle=True)

    def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
      return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                        sort_keys=sort_keys)

    # The same environment as transformers', so that a template means the same here.
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, Generation])
    environment.filters['tojson'] = to_json
    environment.globals['raise_exception'] = raise_exception
    environment.globals['strftime_now'] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(self.chat_template)
