# SPDX-License-Identifier: Apache-2.0
"""How the reference runs programs, as its specification describes it; the peer of `executor.py`.

An import check on the syntax tree in the trainer, then one pebble map of one source text to a
reused worker, where two alarms guard exec of all lines but the last and eval of the last; the
result must survive str and pickle, is cut at 400 characters, and is evaluated in the trainer.
"""

import ast
import contextlib
import functools
import io
import os
import pickle
import re
import signal
import traceback


class _Runtime:
  """Globals of one call; travels to the worker with it."""

  def __init__(self):
    self._globals = {}

  def run(self, code):
    if re.search(r'(\s|^)?input\(', code):
      raise RuntimeError()
    exec(code, self._globals)

  def value(self, expression):
    return eval(expression, self._globals)


def _alarmed(seconds, function, argument):
  def give_up(number, frame):
    raise TimeoutError()
  old = signal.signal(signal.SIGALRM, give_up)
  signal.setitimer(signal.ITIMER_REAL, seconds)
  try:
    return function(argument)
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, old)


def _work(lines, runtime, parse_first=False):
  try:
    if parse_first:
      ast.parse('\n'.join(lines))
    if 'print(' in lines[-1]:
      stream = io.StringIO()
      with contextlib.redirect_stdout(stream):
        _alarmed(10, runtime.run, '\n'.join(lines))
      result = stream.getvalue()
    else:
      _alarmed(10, runtime.run, '\n'.join(lines[:-1]))
      result = _alarmed(10, runtime.value, lines[-1])
    str(result)
    pickle.dumps(result)
    return result, 'Done'
  except BaseException:
    return '', traceback.format_exc().split('\n')[-2]


def quiet():
  """Sends what the programs print elsewhere; for the start of a worker."""
  os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def call(pool, source, parse_first=False):
  """(printed result, status) of one source text in the worker of a `pebble.ProcessPool`."""
  worker = functools.partial(_work, runtime=_Runtime(), parse_first=parse_first)
  iterator = pool.map(worker, [source.split('\n')], timeout=10).result()
  try:
    result, status = next(iterator)
  except TimeoutError:
    result, status = '', 'Timeout Error'
  return str(result).strip()[:400], status.strip()[:400]


_BANNED = ('logging', 'random', 'multiprocessing', 'pebble', 'subprocess', 'threading', 'datetime',
           'time', 'hashlib', 'hmac', 'bcrypt', 'os.sys', 'os.path', 'sys.exit', 'os.environ',
           'calendar')


def may_import(program):
  """Whether the reference's check lets the program pass: no imported name is a banned word."""
  found = []
  for node in ast.walk(ast.parse(program)):
    if isinstance(node, ast.Import):
      found += [part for alias in node.names for part in alias.name.split('.')]
    elif isinstance(node, ast.ImportFrom):
      found += [*(node.module or '').split('.'), *(alias.name for alias in node.names)]
  return not any(name in _BANNED for name in found)


def step(pool, deduction, abduction, induction, answers):
  """The calls of one training step; `answers(abduction, k)` are those to task k. Their number."""
  calls = 0

  def check(program, text):
    assert may_import(program)
    source = (
      f'{program}\nreturned = f({text})\nif returned != f({text}):\n'
      '  raise Exception("Non-deterministic code")\nrepr(returned)'
    )
    return call(pool, source, parse_first=True)

  def verify(program, text, gold):
    output, status = call(pool, f'{program}\n{gold} == f({text})')
    return 'error' not in status.lower() and bool(eval(output or '0'))

  for p, i, _ in deduction + abduction:
    check(p, i)
    calls += 1
  for p, cases in induction:
    for i, _ in cases:
      check(p, i)
      calls += 1
  for _, _, o in deduction:        # in the trainer, as the reference does
    for _ in range(9):
      eval(f'eval({o!r}) == eval({o!r})')
  for k, (p, i, o) in enumerate(abduction):
    for answer in [*answers(abduction, k), i]:
      verify(p, answer, o)
      calls += 1
  for p, cases in induction:
    for _ in range(9):
      for i, o in cases[5:]:
        verify(p, i, o)
        calls += 1
  return calls
