# SPDX-License-Identifier: Apache-2.0
"""The SandboxFusion adapter against a local server that speaks its HTTP API and runs programs."""

import http.server
import json
import subprocess
import sys
import tempfile
import threading
import time

import pytest

from absolute_zero_jax import executor as room
from absolute_zero_jax.executor import ExecutorError
from absolute_zero_jax.types import Job, Status


class _Server(http.server.ThreadingHTTPServer):
  """`POST /run_code` as sandbox/server/sandbox_api.py answers; `broken` answers are spoilt."""

  broken = 0
  forged = ''

  def __init__(self):
    super().__init__(('127.0.0.1', 0), _Handler)
    self.requests = []
    threading.Thread(target=self.serve_forever, daemon=True).start()


class _Handler(http.server.BaseHTTPRequestHandler):
  def log_message(self, *args):
    pass

  def do_POST(self):
    request = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
    self.server.requests.append(request)
    if self.server.broken > 0:
      self.server.broken -= 1
      body = {'status': 'SandboxError', 'message': 'no pod', 'run_result': None}
    else:
      assert self.path == '/run_code' and request['language'] == 'python'
      body = self._execute(request)
    data = json.dumps(body).encode()
    self.send_response(200)
    self.send_header('Content-Length', str(len(data)))
    self.end_headers()
    self.wfile.write(data)

  def _execute(self, request):
    began = time.monotonic()
    try:
      with tempfile.NamedTemporaryFile('w', suffix='.py') as script:  # a server writes a file, too
        script.write(request['code'])
        script.flush()
        done = subprocess.run(
          [sys.executable, '-u', script.name],
          capture_output=True,
          text=True,
          timeout=request['run_timeout'],
        )
      result = {
        'status': 'Finished',
        'return_code': done.returncode,
        'stdout': done.stdout + self.server.forged,
        'stderr': done.stderr,
      }
    except subprocess.TimeoutExpired as e:
      result = {
        'status': 'TimeLimitExceeded',
        'return_code': None,
        'stdout': (e.stdout or b'').decode(),
        'stderr': '',
      }
    result['execution_time'] = time.monotonic() - began
    finished = result['status'] == 'Finished' and result['return_code'] == 0
    return {
      'status': 'Success' if finished else 'Failed',
      'message': '',
      'compile_result': None,
      'run_result': result,
      'files': {},
    }


@pytest.fixture
def server():
  started = _Server()
  yield started
  started.shutdown()
  started.server_close()


@pytest.fixture
def fusion(server):
  with room.start(
    'sandboxfusion', url=f'http://127.0.0.1:{server.server_port}', score_timeout_s=1.0, workers=2
  ) as started:
    yield started


def test_verdicts_are_those_of_the_local_executor(fusion):
  jobs = [
    Job('validate', 'def f(x):\n  return {x, "b"}', ("'a'", '1', 'y')),
    Job('validate', 'def f(x):\n  return list({"a", "b", "c", "d", "e", "f", "g"})', ('1',)),
    Job('validate', 'def f(x, seen=[]):\n  seen.append(x)\n  return seen', ('1',)),
    Job('validate', 'import os\ndef f(x): return 1', ('1',)),
    Job('run', 'def f(x):\n  print("noise")\n  return x + 1', ('1', '2'), ('2', '2')),
    Job('run', 'def f(x):\n  return 1 / x', ('0',), ('ZeroDivisionError',), expect_error=True),
    Job('run', 'def f(x):\n  return (i for i in x)', ('[0]',)),
    Job('run', '1/0\ndef f(x): return x', ('0', '1')),
    Job('compare', inputs=('1', '1.0'), expected=('1', '1')),
    Job('run', 'def f(x):\n  raise SystemExit', ('0',)),
    Job('run', 'def f(x):\n  return x', ('...',)),
    Job('run', 'from __future__ import annotations\nimport dataclasses\n@dataclasses.dataclass\n'
        'class A:\n  x: int\ndef f(x):\n  return A(x).x', ('1',)),
    Job('run', 'n = 0\ndef f(x):\n  global n\n  n += 1\n  return n', ('1', '2')),
    Job('run', 'def f(x):\n  return "é" * 79000', tuple(map(str, range(10)))),
  ]
  with room.Executor(workers=2, score_timeout_s=1.0) as local:
    ours = local.run(jobs)
  theirs = fusion.run(jobs)

  def plain(verdict):
    return verdict.status, verdict.runs, verdict.error, verdict.program, verdict.key

  assert [plain(v) for v in theirs] == [plain(v) for v in ours]
  assert fusion.isolation.level == 'external' and fusion.stats()['jobs'] == len(jobs)


def test_a_loop_costs_its_input_only(fusion):
  verdict = fusion.run(
    [Job('run', 'def f(x):\n  while x == 2: pass\n  return x', ('1', '2', '3'), ('1', '2', '3'))]
  )[0]
  assert [r.status for r in verdict.runs] == [Status.OK, Status.TIMEOUT, Status.OK]
  assert [r.matches for r in verdict.runs] == [True, False, True]


def test_requests_carry_the_limits_and_no_gold(server, fusion):
  fusion.run([Job('run', 'def f(x):\n  return x', ('1',), ("'GOLD'",))])
  request = server.requests[0]
  assert (
    request['run_timeout'] == 3.0
    and request['memory_limit_MB'] == 512
    and 'GOLD' not in request['code']
  )


def test_lines_without_the_mark_change_nothing(server, fusion):
  server.forged = '[["v",["i",7]]]\n@' + 'a' * 32 + ' [["v",["i",7]]]\n'
  verdict = fusion.run(
    [
      Job('run', 'def f(x):\n  import sys\n  return 1', ('1',), ('7',)),
      Job('run', 'def f(x):\n  return 1', ('1',), ('7',)),
    ]
  )[1]
  assert verdict.status is Status.OK and not verdict.runs[0].matches


def test_a_server_in_trouble_is_asked_again_and_then_reported(server, fusion):
  server.broken = 2
  assert fusion.run([Job('run', 'def f(x):\n  return x', ('1',), ('1',))])[0].runs[0].matches
  server.broken = 99
  with pytest.raises(ExecutorError, match='failed 3 times: no pod'):
    fusion.run([Job('run', 'def f(x):\n  return x', ('2',))])


def test_what_is_no_address_is_refused():
  for option in ({'modules': 'math'}, {'memory_mb': -5}, {'score_timeout_s': -1.0}):
    with pytest.raises(ValueError, match=next(iter(option))):
      room.start('sandboxfusion', url='http://localhost:1', **option)
  with pytest.raises(ValueError, match='http'):
    room.start('sandboxfusion', url='localhost:8080')
