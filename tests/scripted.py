# SPDX-License-Identifier: Apache-2.0
"""A sampler that writes valid proposals and mostly right answers, and a prompt set of few bytes.

It stands where `sampler.Sampler` stands in a run, so that buffers, Monte-Carlo rates, solver roles
and updates meet real tasks although the model is random. What it writes depends on the key of the
call alone. Its prompts hand over the right answer; some answers are wrong all the same.
"""

import collections
import json

import jax
import numpy as np

from absolute_zero_jax import tokenizer
from absolute_zero_jax.sampler import Sample

GOLD = {'deduction': 'output', 'abduction': 'input', 'induction': 'python', 'error': 'output'}
FIELD = {'deduction': '$output', 'abduction': '$input', 'induction': '$program', 'error': '$output'}


def prompt_folder(path):
  """Writes the prompt set; a user's own folder of templates."""
  path.mkdir(parents=True, exist_ok=True)
  files = {'wrapper_answer': '$task\n<|response|><think>', 'composite': '$names\n$functions\n'}
  for kind, field in FIELD.items():
    shown = '$program' if kind == 'induction' else '$references$composite'
    files[f'propose_{kind}'] = f'propose {kind}\n{shown}'
    files[f'reference_{kind}'] = '$program\n'
    files[f'solve_{kind}'] = f'solve {kind}\n{field}'
  for name, text in files.items():
    (path / f'{name}.txt').write_text(text)
  (path / 'set.json').write_text(json.dumps({'version': 1, 'wrapper': 'answer'}))
  return str(path)


class Sampler:
  """See the module; takes what `sampler.Sampler` takes."""

  def __init__(self, model, mesh=None, **options):
    del model, mesh, options
    self.tokenizer = tokenizer.load('bytes')
    self.tokens = collections.Counter()
    self.met = []                        # as if each number of requests were a shape

  def shapes(self):
    return {'decode': [list(shape) for shape in self.met], 'prefill': []}

  def assume(self, shapes):
    self.met = [list(shape) for shape in shapes['decode']]

  def generate(self, params, requests, key, *, stop_fn=None, on_finish=None, more=None,
               **options):
    del params, options
    out, lot = [], list(requests)
    if [len(lot), 1] not in self.met:
      self.met.append([len(lot), 1])
    while lot or more is not None:
      first = len(out)
      for i, request in enumerate(lot, first):
        prompt = self.tokenizer.decode(request.prompt_ids)
        out.append([])
        for n in range(request.samples):
          rng = np.random.default_rng([*np.asarray(jax.random.key_data(key)), i, n])
          ids = tuple(self.tokenizer.encode(_response(prompt, rng)))
          assert stop_fn is None or stop_fn(i, ids) == len(ids)
          out[-1].append(Sample(i, n, ids, (-1.0,) * len(ids), (-1.0,) * len(ids), 'stop'))
          self.tokens[prompt.split()[0]] += len(ids)
      for samples in reversed(out[first:]):
        for sample in samples:
          on_finish(sample)
      lot = None if more is None else more()
      more = None if lot is None else more
    return out

  def stats(self):
    return {'tokens': float(self.tokens.total())}

  def compilations(self):
    return 0

  def release(self):
    pass


def _response(prompt, rng):
  if rng.random() < 0.1:
    return 'no</think> answer</answer>'
  role, kind, *rest = prompt.split(maxsplit=2)
  if role not in ('propose', 'solve'):                        # a kind that brings its own pages
    body = f'({rng.integers(100)} + 3) * 7 - 2'
  elif role == 'propose':
    body = _proposal(kind, rng)
  else:
    body = _answer(kind, rest[0].removesuffix('<think>').strip(), rng)
  return f'hm, wait</think><answer>{body}</answer>'


def _proposal(kind, rng):
  a, b, c = (int(x) for x in rng.integers(1, 1000, 3))
  if kind == 'induction':
    inputs = ''.join(f'```input\n{a + i}\n```\n' for i in range(4))
    return f'{inputs}```message\nnumber {b}\n```'
  # Some run, some raise.
  fault = f' // {int(rng.random() > 0.2)}'
  return (f'```python\ndef f(x):\n  # first\n  # then\n  return [x * {a}, x{fault} + {b}]\n```\n'
          f'```input\n{c}\n```')


def _answer(kind, gold, rng):
  right = rng.random() < 0.6
  return f'```{GOLD[kind]}\n{gold if right else "[]"}\n```'
