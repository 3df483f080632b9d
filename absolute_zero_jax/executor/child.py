# SPDX-License-Identifier: Apache-2.0
"""What a disposable child does: reads one job from descriptor 3, runs it, writes a frame per input.

  job     4-byte length, marshalled {program, inputs, repeat, expect_error}, see `pack`;
          the program is its marshalled code, or its text, see `pack_program`;
          an input is the marshalled code of a call of `f`, see `pack_call`
  frame   4-byte length, JSON list with one outcome per repetition of one input:
          ['v', tagged]   returned this value
          ['u', reason]   returned no plain value
          ['x', name]     raised an exception of this class
          ['r']           returned; the value was not asked for
          A frame [['m', name]] ends the stream: the program could not be loaded.

Everything here happens in the attacker's process: frames can say anything about this program, and
nothing about another. The trusted side decodes them with `values`, compares, and kills the process.
"""

import functools
import gc
import json
import marshal
import os
import re
import sys

from absolute_zero_jax.executor import probe, values

JOB_FD = 3
# Within these the dearest text found (patterns with many names) takes 6 ms to compile, 13 on 3.12.
_MAX_COMPILED_CHARS = 2048
_MAX_CODE_BYTES = 1 << 14
_BLOCKS = re.compile('for|while|try|with|except|match')
# Names that occur in canonical input text.
_INPUT_NAMES = {'__builtins__': {}, 'Ellipsis': ..., 'float': float, 'complex': complex, 'set': set,
                'frozenset': frozenset, 'range': range}


class _Discard:
  """Standard output and error of a program: counts, keeps nothing."""
  encoding = 'utf-8'

  def write(self, text):
    return len(text)

  def writelines(self, lines):
    pass

  def flush(self):
    pass

  def isatty(self):
    return False


def prepare() -> None:
  """Standard streams as programs see them; called once in the zygote."""
  sys.stdout = sys.stderr = _Discard()
  sys.stdin = None


def serve() -> None:
  """Runs the one job of this process; the caller ends the process afterwards."""
  job = unpack(_read())
  if 'probe' in job:
    _send(probe.attempts())
    return
  gc.enable()
  run(job.pop('program'), job['inputs'], job['repeat'], job['expect_error'], _send)
  os.close(JOB_FD)       # this is what the supervisor waits for


def pack(job: dict) -> bytes:
  """A job as it travels from the supervisor to a child; only ever in this direction.

  Marshal needs a third of the memory pages that JSON needs, and both ends are one interpreter.
  """
  data = marshal.dumps(job)
  return len(data).to_bytes(4, 'little') + data


def pack_program(source: str) -> bytes | str:
  """The program as `run` takes it; made by the supervisor, once for all its processes.

  A new process pays many times for compiling what a warm one pays. But the supervisor serves
  everybody, so a text that may be dear to compile, or cannot be, goes out as it is: a long one; one
  with `finally`, whose block is compiled at each way out and so doubles when nested; one with many
  products, since those of constants are worked out; and one with many blocks: comprehensions in
  more than twenty others crash CPython 3.12.1.
  """
  if (len(source) > _MAX_COMPILED_CHARS or 'finally' in source or source.count('*') > 32
      or len(_BLOCKS.findall(source)) > 16):
    return source
  return _compiled(source) or source


@functools.lru_cache(2048)
def _compiled(source: str) -> bytes:
  """Marshalled code; b'' where the text does not compile, or to more than is worth keeping."""
  try:
    code = marshal.dumps(compile(source, '<task>', 'exec', dont_inherit=True))
  except Exception:      # here a model's text would end the service; the child gets it as text
    return b''
  return code if len(code) <= _MAX_CODE_BYTES else b''


@functools.lru_cache(2048)
def pack_call(arguments: str) -> bytes:
  """Canonical arguments as `run` takes them; made by the supervisor, once for all programs.

  Compiling a call costs a child as much as running it. A text that cannot be compiled gives an
  input that raises.
  """
  try:
    return marshal.dumps(compile(f'f({arguments})', '<input>', 'eval', dont_inherit=True))
  except Exception:      # as above
    return b''


def unpack(data: bytes, _loads=marshal.loads) -> dict:
  return _loads(data)


def _read(_os_read=os.read) -> bytes:
  data = _os_read(JOB_FD, 1 << 16)
  if len(data) < 4:
    os._exit(0)
  missing = 4 + int.from_bytes(data[:4], 'little') - len(data)
  while missing > 0:
    part = _os_read(JOB_FD, 1 << 16)
    if not part:
      os._exit(0)
    data += part
    missing -= len(part)
  return data[4:]


_TO_JSON = json.JSONEncoder(ensure_ascii=False, separators=(',', ':'), check_circular=False).encode


def frame(outcomes: list, _to_json=_TO_JSON) -> bytes:
  """The wire form of one input's outcomes."""
  data = _to_json(outcomes).encode('utf-8', 'surrogatepass')
  if len(data) > values.MAX_FRAME_BYTES:
    data = _to_json([['u', 'too big']] * len(outcomes)).encode()
  return len(data).to_bytes(4, 'little') + data


def _send(outcomes: list, _write=os.write) -> None:
  data = frame(outcomes)
  while data:
    data = data[_write(JOB_FD, data):]


def run(program: bytes | str, inputs: list[bytes], repeat: int, expect_error: bool, send,
        _loads=marshal.loads) -> None:
  """Runs `f` on each input `repeat` times; `send` gets one list of outcomes per input.

  Where an input runs once, the program is loaded anew for each, so that none finds in it what
  another input left.
  """
  try:
    if type(program) is bytes:
      code = _loads(program)
    else:
      code = compile(program, '<task>', 'exec', dont_inherit=True)
    del program            # or it would be one more thing for the program to find
    function = _load(code)
  except BaseException as e:
    send([['m', values.type_name(type(e))]])
    return
  for i, packed in enumerate(inputs):
    call = None
    outcomes = []
    for _ in range(repeat):
      try:
        if i and repeat == 1:
          function = _load(code)
        call = call or _loads(packed)
        result = eval(call, {**_INPUT_NAMES, 'f': function})
        outcomes.append(['r'] if expect_error else _outcome(result))
        del result
      except BaseException as e:
        outcomes.append(['x', values.type_name(type(e))])
    send(outcomes)


def _load(code):
  # `dataclasses` and `typing` look a class's annotations up in its module.
  module = sys.modules['task'] = type(sys)('task')
  module.__dict__['__builtins__'] = __builtins__
  exec(code, module.__dict__)
  return module.__dict__['f']


def _outcome(result) -> list:
  try:
    return ['v', values.encode(result)]
  except values.ValuesError as e:
    return ['u', str(e)]
