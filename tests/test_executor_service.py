# SPDX-License-Identifier: Apache-2.0
"""The service as its users meet it: verdicts, futures, queue, limits."""

import os
import subprocess
import sys
import threading
import time

import pytest

from absolute_zero_jax import executor as room
from absolute_zero_jax.executor import child, Executor, QueueFull
from absolute_zero_jax.types import Job, Status

_LOOP = 'def f(x):\n  while True: pass\n'
pytestmark = pytest.mark.skipif(
  not os.path.isdir('/proc/self'), reason='looks at processes through /proc'
)


@pytest.fixture(scope='module')
def executor():
  with Executor(workers=2, validate_timeout_s=1.0, score_timeout_s=2.0, memory_mb=192) as started:
    yield started


@pytest.mark.parametrize(
  'program, status, error',
  [
    ('def f(x):\n  return x', 'ok', ''),
    ('def f(x):\n  return x[5]', 'error', 'TypeError'),
    (_LOOP, 'timeout', 'time limit'),
    ('def f(x):\n  return len([0] * 10**10)', 'memory', 'MemoryError'),
    ('def f(x):\n  raise SystemExit', 'error', 'SystemExit'),
    (
      'import collections\ndef f(x):\n  return collections.Counter("aab")',
      'error',
      'output: type:Counter',
    ),
    (
      'import collections\ndef f(x):\n  return collections.deque([1])',
      'error',
      'output: type:deque',
    ),
    (
      'def f(x):\n  return list({"a", "b", "c", "d", "e", "f", "g"})',
      'nondeterministic',
      'two processes differ',
    ),
    ('def f(x, seen=[]):\n  seen.append(x)\n  return seen', 'nondeterministic', 'two calls differ'),
    ('def f(x):\n  return id(x)', 'nondeterministic', ''),
    ('def f(x):\n  return object().__str__()', 'nondeterministic', ''),
    ('def f(x):\n  return {"b", "a", x}', 'ok', ''),
    ('def f(x):\n  return "x" * 100000', 'error', 'output: too big'),
    ('def f(x):\n  print("x" * 10**6)\n  return None', 'ok', ''),
    ('def f(x):\n  return x +', 'rejected', 'syntax'),
    ('def f(x):\n  return f(x)', 'error', 'RecursionError'),
    ('x = 1 / 0\ndef f(x):\n  return 1', 'error', 'ZeroDivisionError'),
    ('def f(x):\n  return (x for x in ())', 'error', 'output: type:generator'),
    ('def f(x):\n  return "é".encode("shift_jis", "replace")', 'ok', ''),
    (
      'import decimal, fractions, statistics, heapq, json, re\n'
      'def f(x):\n  return statistics.mean([1, 2])',
      'ok',
      '',
    ),
    (
      'import dataclasses\n@dataclasses.dataclass\nclass P:\n  a: int\n'
      'def f(x):\n  return dataclasses.astuple(P(x))',
      'ok',
      '',
    ),
    ('def f(x):\n  return "\\N{BULLET}" + "%d %s" % (x, 2.5)', 'ok', ''),
    (
      'from dataclasses import dataclass\n@dataclass\nclass Node:\n  val: int\n'
      '  next: "Node" = None\ndef f(x):\n  return Node(x, Node(3)).next.val, str(Node)',
      'ok',
      '',
    ),
    (
      'from __future__ import annotations\nimport dataclasses, typing\n@dataclasses.dataclass\n'
      'class A:\n  c: typing.ClassVar[int] = 1\n  d: list[A] = ()\n'
      'def f(x):\n  return len(dataclasses.fields(A)), len(typing.get_type_hints(A))',
      'ok',
      '',
    ),
    ('def f(x):\n  return "\xe9" * 30000', 'error', 'output: too big'),  # only when doubled
    ('import task\ndef f(x):\n  return 1', 'rejected', 'import task'),
  ],
  ids=range(26),
)
def test_each_status(executor, program, status, error):
  verdict = executor.run([Job('validate', program, ('1',))])[0]
  assert (verdict.status.value, error) == (
    status,
    error if error in verdict.error else verdict.error,
  )
  assert verdict.runs[0].matches is (status == 'ok')


def test_a_task_is_validated_and_verified_in_three_directions(executor):
  proposed = executor.run(
    [
      Job(
        'validate', '\n# sum of a list\ndef f(a, b=1):\n  return sum(a) + b\n', ('[1, 2], b = 3',)
      )
    ]
  )[0]
  gold = proposed.runs[0]
  assert (proposed.program, gold.input, gold.output) == (
    '# sum of a list\ndef f(a, b=1):\n  return sum(a) + b\n',
    '[1, 2], b=3',
    '6',
  )
  deduction, abduction, induction = executor.run(
    [
      Job('compare', inputs=('6', ' 6', '7', '6.0'), expected=(gold.output,) * 4),
      Job(
        'run', proposed.program, ('[6], 0', '[1]', '1) or (True', '[3, 3], b=0'), (gold.output,) * 4
      ),
      Job('run', 'def f(a, b):\n  for x in a: b += x\n  return b', (gold.input,), (gold.output,)),
    ]
  )
  assert [r.matches for r in deduction.runs] == [True, True, False, False]
  assert [r.matches for r in abduction.runs] == [True, False, False, True]
  assert [r.matches for r in induction.runs] == [True]


def test_results_keep_the_order_of_the_jobs(executor):
  jobs = [
    Job('run', f'def f(x):\n  return x + {i % 7}', (str(i),), (str(i + i % 7),)) for i in range(300)
  ]
  assert all(v.runs[0].matches for v in executor.run(jobs))


@pytest.mark.parametrize('padding', ['', 'x' * 3000], ids=['compiled before', 'compiled there'])
def test_it_does_not_matter_where_a_program_is_compiled(monkeypatch, padding):
  """The trainer's own interpreter may run optimised; the programs never do."""
  monkeypatch.setenv('PYTHONOPTIMIZE', '2')
  programs = {
    'def f(x):\n  """Says."""\n  return f.__doc__, x': '',
    'def f(x):\n  assert x > 1': 'AssertionError',
    'def f(x):\n  return 1\nbreak': 'SyntaxError',     # parses, but does not compile
    'def f(x):\n  try:\n    return 1\n  finally:\n    x += 1': '',
    'from __future__ import annotations\ndef f(x: y):\n  return f.__annotations__["x"]': '',
  }
  texts = [f'{program}\n# {padding}' for program in programs]
  packed = {type(child.pack_program(text)) for text in texts}
  assert packed == ({str} if padding else {bytes, str})
  with Executor(workers=2) as executor:
    verdicts = executor.run([Job('run', text, ('1',)) for text in texts])
  assert [v.error for v in verdicts] == list(programs.values())
  assert [v.runs[0].output for v in verdicts if not v.error] == ["('Says.', 1)", '1', "'y'"]


def test_texts_that_are_dear_to_compile_are_left_to_the_child():
  """The supervisor serves everybody: what it compiles must cost it next to nothing."""
  nested = 'def f(a):\n' + ''.join(
    f'{" " * (i + 1)}try: a\n{" " * (i + 1)}finally:\n' for i in range(19)
  )
  dear = [f'{nested}{" " * 20}a', *('def f(a):\n  return ' + '+'.join(150 * [x])
                                    for x in ("'a'*4096", '(1,)*256'))]
  # Compiling this one crashes CPython 3.12.1.
  crashes = 'def f(a):\n  return ' + '[' * 21 + 'a' + ' for a in a]' * 21
  for text in (*dear, crashes):
    assert child.pack_program(text) is text
  names = ','.join(f'a{i}' for i in range(190))
  fair = ['def f(a):\n  return ' + 'lambda a:' * 200 + 'a',
          f'def f(a):\n match a:\n  case [{names}]|[{",".join(names.split(",")[::-1])}]: return 1',
          'def f(a):\n  return ' + '+'.join(30 * ["'a'*4096"])]
  for text in fair:
    began = time.process_time()
    child.pack_program(text)
    assert time.process_time() - began < 0.1      # 10 ms on a quiet machine


def test_each_run_starts_from_a_clean_interpreter(executor):
  vandal = 'import math\ndef f(x):\n  math.sqrt = lambda y: 0\n  str.upper\n  return 1'
  programs = [vandal, 'import math\ndef f(x):\n  return math.sqrt(x)'] * 20
  verdicts = executor.run([Job('run', p, (str(4 + i),)) for i, p in enumerate(programs)])
  assert [v.runs[0].output != '0' for v in verdicts[1::2]] == [True] * 20


def test_a_forged_object_or_answer_never_matches(executor):
  body = (
    ':\n  def __eq__(self, o): return True\n  def __repr__(self): return "5"\n'
    'def f(x):\n  return E('
  )
  always_equal, sly_int = f'class E{body})', f'class E(int){body}5)'
  for program in (always_equal, sly_int):
    verdict = executor.run([Job('run', program, ('1',), ('5',))])[0]
    assert not verdict.runs[0].matches and verdict.runs[0].output == ''


def test_equal_runs_are_executed_once():
  with Executor(workers=2) as started:
    started.run([Job('run', 'def f(x):\n  return x', ('1',))] * 50)
    started.run([Job('run', 'def f(x):\n  return x', ('1', '2'))] * 50)
    stats = started.stats()
    assert stats['jobs'] == 100 and stats['runs'] == 2 and stats['forks'] == 2


def test_higher_priorities_run_first():
  with Executor(workers=2, score_timeout_s=0.3) as started:
    done = []
    blockers = [started.submit(Job('run', _LOOP, (str(i),))) for i in range(4)]
    slow = [started.submit(Job('run', f'def f(x):\n  return {i}', ('1',))) for i in range(20)]
    fast = started.submit(Job('run', 'def f(x):\n  return "first"', ('1',)), priority=5)
    for name, future in [('slow', slow[-1]), ('fast', fast)]:
      future.add_done_callback(lambda _, n=name: done.append(n))
    for future in [*blockers, *slow, fast]:
      future.result()
    assert done == ['fast', 'slow']


def test_the_queue_is_bounded_and_callbacks_may_submit():
  with Executor(workers=2, max_pending=4, score_timeout_s=0.4) as started:
    blockers = [started.submit(Job('run', _LOOP, (str(i),))) for i in range(4)]
    with pytest.raises(QueueFull, match='max_pending=4'):
      started.submit(Job('run', _LOOP, ('9',)), block=False)
    chained = []
    blockers[0].add_done_callback(
      lambda _: chained.append(started.submit(Job('run', _LOOP, ('0',))))
    )
    began = time.monotonic()
    late = started.submit(Job('run', 'def f(x):\n  return x', ('1',)))  # waits for room
    assert time.monotonic() - began > 0.2
    assert late.result().status is Status.OK
    assert chained[0].result(30).status is Status.TIMEOUT


def test_a_cancelled_future_disturbs_nobody(executor):
  futures = [executor.submit(Job('run', f'def f(x):\n  return {i}', ('1',))) for i in range(40)]
  cancelled = [f for f in futures[::2] if f.cancel()]
  assert [f.result().status for f in futures if f not in cancelled] == [Status.OK] * (
    40 - len(cancelled)
  )


def test_many_threads_may_submit(executor):
  results = []

  def work(k):
    jobs = [Job('run', f'def f(x):\n  return x * {k}', (str(i),), (str(i * k),)) for i in range(20)]
    results.append(all(v.runs[0].matches for v in executor.run(jobs)))

  threads = [threading.Thread(target=work, args=(k,)) for k in range(6)]
  [t.start() for t in threads]
  [t.join() for t in threads]
  assert results == [True] * 6


def test_oversized_jobs_are_answered(executor):
  verdicts = executor.run(
    [
      Job('run', 'def f(x):\n  return 1\n#' + 'x' * 10**6, ('1',)),
      Job('run', 'def f(x):\n  return 1', ("'" + 'x' * 10**6 + "'", '1')),
      Job('compare', inputs=('[' * 10**6,), expected=('1',)),
      Job('run', 'def f(x):\n  return x', tuple(map(str, range(200))), tuple(map(str, range(200)))),
    ]
  )
  assert verdicts[0].error == 'too long' and [r.status.value for r in verdicts[1].runs] == [
    'rejected',
    'ok',
  ]
  assert verdicts[2].runs[0].status is Status.REJECTED and all(r.matches for r in verdicts[3].runs)


@pytest.mark.parametrize(
  'options, message',
  [
    ({'workers': 3}, 'even'),
    ({'modules': ('numpy', 'math')}, r"\['numpy'\] are none of the standard library"),
    ({'workers': -2}, 'workers'),
    ({'workers': 2.0}, 'workers=2.0 must be an integer'),
    ({'memory_mb': 1}, 'memory_mb'),
    ({'equality': 'fuzzy'}, 'strict'),
    ({'min_isolation': 'best'}, 'full'),
    ({'layers': ('moat',)}, 'moat'),
    ({'modules': 'math'}, 'a tuple of names'),
    ({'cores': [0, 99999]}, r'cores=\[0, 99999\] must be numbers'),
    ({'score_timeout_s': 0}, 'score_timeout_s'),
    ({'cache_size': -1}, 'cache_size'),
  ],
)
def test_impossible_options_are_refused_before_anything_starts(options, message):
  with pytest.raises(ValueError, match=message):
    Executor(**options)


@pytest.mark.parametrize('job', [
    Job('walk'),
    Job('run', timeout_s=-1.0),
    Job('run', timeout_s=1e9),
    Job('run', timeout_s=None),
    Job('run', inputs='12'),
    Job('run', inputs=(1,)),
    Job('compare', inputs=('1',), expected='1'),
    Job('compare', inputs=('1',)),
    Job('run', inputs=('1',), expected=('1', '2')),
])
def test_what_is_no_job_is_refused(executor, job):
  with pytest.raises(ValueError, match='Job'):
    executor.submit(job)


def test_executors_are_found_by_name():
  with room.start('local', workers=2) as started:
    assert started.run([Job('run', 'def f(x):\n  return x', ('1',))])[0].status is Status.OK
  with room.start('absolute_zero_jax.executor.client:Executor', workers=2):
    pass
  for name in ('remote', 'absolute_zero_jax.executor:Nothing', 'no_such_module:X'):
    with pytest.raises(ValueError, match=name):
      room.start(name)


def test_an_ellipsis_is_an_input(executor):
  [verdict] = executor.run([Job('validate', 'def f(x):\n  return x', ('...',))])
  assert verdict.runs[0].input == verdict.runs[0].output == 'Ellipsis'


def test_what_one_input_leaves_for_the_next_is_no_task(executor):
  program = 'seen = set()\ndef f(x):\n  seen.add(x)\n  return len(seen)'
  [several, one] = executor.run([Job('validate', program, n) for n in (('1', '2', '3'), ('1',))])
  assert several.status is Status.NONDETERMINISTIC and one.status is Status.OK


def test_a_program_meets_no_hash_seed_that_its_validation_has_not_seen():
  program = 'def f(x):\n  s = 0\n  for i in range(100000): s += i\n  return hash("w"), x - x'
  with Executor(workers=4) as started:
    verdicts = started.run([Job('run', f'{program}# {i}', ('1',)) for i in range(60)])
  assert len({v.runs[0].output for v in verdicts}) == 2


def test_loops_do_not_make_a_benign_program_time_out():
  with Executor(workers=2, score_timeout_s=0.25) as started:
    loops = [started.submit(Job('run', _LOOP, (str(i),))) for i in range(16)]
    benign = [
      started.submit(Job('run', 'def f(x):\n  return sum(range(1000)) + x', (str(i),)))
      for i in range(20)
    ]
    assert {f.result().status for f in benign} == {Status.OK}
    assert {f.result().status for f in loops} == {Status.TIMEOUT}


def test_a_limit_is_of_time_that_the_program_had():
  """Others that use every core for their own ends do not turn a slow program into a timeout."""
  hogs = [
    subprocess.Popen([sys.executable, '-c', 'while True: pass'])
    for _ in range(2 * (os.cpu_count() or 2))
  ]
  try:
    with Executor(workers=2, score_timeout_s=0.6, nice=5) as started:
      busy = 'def f(x):\n  s = 0\n  for i in range(1500000): s += i\n  return x'
      verdicts = started.run([Job('run', busy, (str(i),)) for i in range(4)])
      assert {v.status for v in verdicts} == {Status.OK}, [(v.wall_s, v.cpu_s) for v in verdicts]
  finally:
    for hog in hogs:
      hog.kill()
      hog.wait()


def test_a_blocked_program_does_not_keep_its_slot():
  with Executor(workers=2, policy=False, score_timeout_s=0.3) as started:
    began = time.monotonic()
    verdict = started.run([Job('run', 'import os\ndef f(x):\n  os.read(3, 1)', ('1',))])[0]
    assert verdict.status is Status.TIMEOUT and time.monotonic() - began < 5


def test_more_output_than_a_socket_holds_arrives_whole(executor):
  # 64 frames of 8 kB: the child cannot report them before somebody reads.
  jobs = [Job('run', 'def f(n):\n  return "x" * 8000 + str(n)', tuple(map(str, range(64))))]
  [verdict] = executor.run(jobs)
  assert [run.output[-3:-1].strip('x') for run in verdict.runs] == [str(n) for n in range(64)]


def test_results_before_a_lost_input_count():
  program = 'import os\ndef f(x):\n  return os._exit(1) if x == 3 else x'
  with Executor(workers=2, policy=False) as started:
    for bad in (program, 'def f(x):\n  while x == 3: pass\n  return x'):
      [verdict] = started.run([Job('run', bad, ('1', '2', '3', '4'), timeout_s=0.2)])
      assert [run.output for run in verdict.runs] == ['1', '2', '', '4']


def test_modules_of_a_longer_list_are_held_ready():
  program = 'import datetime\ndef f(x):\n  return datetime.date(2000, 1, x).isoformat()'
  with Executor(workers=2, modules=['datetime']) as started:
    [verdict] = started.run([Job('run', program, ('2',))])
  assert verdict.runs[0].output == "'2000-01-02'"


def test_a_program_that_keeps_writing_is_stopped():
  with Executor(workers=2, policy=False) as started:
    program = 'def f(x):\n  w = __import__("posix").write\n  while True: w(3, b"\\1\\0\\0\\0[")'
    verdict = started.run([Job('run', program, ('1', '2'))])[0]
    assert verdict.status is Status.CRASHED and not any(r.matches for r in verdict.runs)
