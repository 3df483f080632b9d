# SPDX-License-Identifier: Apache-2.0
"""Tokenizers whose files hold values of a wrong form."""

import json
import re
import shutil

import pytest

from absolute_zero_jax import tokenizer


@pytest.mark.parametrize('file, content', [
    ('added_tokens.json', {'<x>': [1]}), ('added_tokens.json', {'<x>': '1'}),
    ('added_tokens.json', {'<x>': 2.7}), ('added_tokens.json', {'<x>': -1}),
    ('tokenizer_config.json', {'added_tokens_decoder': {'403': {}}}),
    ('tokenizer_config.json', {'added_tokens_decoder': {'403': 'x'}}),
    ('tokenizer_config.json', {'added_tokens_decoder': {'x': {'content': 'x'}}}),
    ('tokenizer_config.json', {'added_tokens_decoder': 7}),
    ('tokenizer_config.json', {'chat_template': ['x']}),
    ('tokenizer_config.json', {'chat_template': [{'a': 1}]}),
    ('tokenizer_config.json', {'chat_template': 5}),
    ('tokenizer_config.json', {'additional_special_tokens': [['x']]}),
    ('tokenizer.json', {'added_tokens': 5}), ('tokenizer.json', {'post_processor': [1]}),
    ('tokenizer.json', {'model': {'vocab': ['a'], 'merges': []}}),
    ('tokenizer.json', {'model': {'vocab': {'a': 0}, 'merges': [5]}}),
    ('chat_template.jinja', b'\xff')], ids=str)
def test_values_of_a_wrong_form_are_refused(qwen_dir, tmp_path, file, content):
  folder = shutil.copytree(qwen_dir, tmp_path / 'model')
  if isinstance(content, dict):
    there = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    content = json.dumps(there | content).encode()
  (folder / file).write_bytes(content)
  with pytest.raises(ValueError, match=re.escape(str(folder))) as error:
    tokenizer.load(folder)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('change', [
    {'token_type': 7}, {'pre': ['qwen2']}, {'merges': 2}, {'padding_token_id': [1]}], ids=str)
def test_values_of_a_wrong_form_in_a_gguf_are_refused(tmp_path, change):
  gguf = pytest.importorskip('gguf')
  writer = gguf.GGUFWriter(tmp_path / 'm.gguf', 'llama')
  good = {'model': 'gpt2', 'pre': 'qwen2', 'tokens': ['a', 'b'], 'merges': ['a b']}
  for key, value in (good | change).items():
    add = {str: writer.add_string, int: writer.add_uint32, list: writer.add_array}[type(value)]
    add(f'tokenizer.ggml.{key}', value)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.close()
  with pytest.raises(ValueError, match='m.gguf holds a value of a wrong form'):
    tokenizer.load(tmp_path / 'm.gguf')
