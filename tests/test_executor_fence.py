# SPDX-License-Identifier: Apache-2.0
"""What the kernel refuses to a program: seen from inside a real child, and through /proc."""

import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import textwrap
import time

import pytest

from absolute_zero_jax.executor import __main__, Executor, fence, IsolationError, syscalls
from absolute_zero_jax.types import Job, Status

ROOT = pathlib.Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(
  bool(fence.supported()), reason=f'no fence here: {fence.supported()}'
)


@pytest.fixture(scope='module')
def unguarded():
  """The fence alone: the static policy is off, so programs may try everything."""
  with Executor(workers=2, policy=False, memory_mb=256, score_timeout_s=5.0) as started:
    yield started


def _run(started, body, *inputs):
  program = 'def f(x):\n' + textwrap.indent(textwrap.dedent(body), '  ')
  return started.run([Job('run', program, inputs or ('1',))])[0]


_RAW = """
    import ctypes
    libc = ctypes.CDLL(None, use_errno=True)
    result = libc.syscall(x, *[ctypes.c_long(a) for a in {args}])
    return [result, ctypes.get_errno()]
    """
_EPERM = '[-1, 1]'


@pytest.mark.parametrize(
  'name, args',
  [
    ('openat', (-100, 0, 0)),
    ('socket', (1, 1, 0)),
    ('execve', (0, 0, 0)),
    ('execveat', (-100, 0, 0, 0, 0)),
    ('fork', ()),
    ('vfork', ()),
    ('clone', (17, 0, 0, 0, 0)),
    ('clone3', (0, 0)),
    ('kill', (1, 9)),
    ('kill', (-1, 9)),
    ('tgkill', (1, 1, 9)),
    ('tkill', (1, 9)),
    ('rt_sigqueueinfo', (1, 9, 0)),
    ('prlimit64', (1, 0, 0, 0)),
    ('setrlimit', (7, 0)),
    ('dup', (3,)),
    ('dup2', (3, 0)),
    ('dup3', (3, 0, 0)),
    ('prctl', (4, 1, 0, 0, 0)),
    ('seccomp', (1, 0, 0)),
    ('setitimer', (0, 0, 0)),
    ('memfd_create', (0, 0)),
    ('sendmsg', (3, 0, 0)),
    ('recvmsg', (3, 0, 0)),
    ('fcntl', (3, 8, 1)),
    ('fcntl', (3, 10, 9)),
    ('wait4', (-1, 0, 0, 0)),
    ('close_range', (0, 9, 0)),
    ('capset', (0, 0)),
    ('landlock_create_ruleset', (0, 0, 0)),
  ],
)
def test_calls_are_refused_by_number(unguarded, name, args):
  number = syscalls.NUMBERS[platform.machine()].get(name)
  if number is None:
    pytest.skip(f'{platform.machine()} has no {name}')
  assert _run(unguarded, _RAW.format(args=args), str(number)).runs[0].output == _EPERM


@pytest.mark.parametrize('name', fence._FATAL)
def test_calls_that_nobody_makes_by_accident_end_the_program(unguarded, name):
  before = unguarded.stats()['security_events']
  number = syscalls.NUMBERS[platform.machine()][name]
  verdict = _run(unguarded, _RAW.format(args=(0, 0, 0, 0, 0)), str(number))
  assert (verdict.status, verdict.error) == (Status.UNSAFE, 'forbidden system call')
  assert unguarded.stats()['security_events'] == before + 1


@pytest.mark.skipif(platform.machine() != 'x86_64', reason='the x32 interface')
def test_the_x32_interface_is_closed(unguarded):
  assert _run(unguarded, _RAW.format(args=()), str(0x40000000 + 39)).status is Status.UNSAFE


def test_unknown_calls_are_refused(unguarded):
  outputs = [
    r.output for r in _run(unguarded, _RAW.format(args=(0, 0)), *map(str, range(460, 480))).runs
  ]
  assert outputs == [_EPERM] * 20


def test_no_memory_can_be_made_executable(unguarded):
  number = syscalls.NUMBERS[platform.machine()]['mmap']
  for protection in (4, 5, 7):
    output = (
      _run(unguarded, _RAW.format(args=(0, 4096, protection, 0x22, -1, 0)), str(number))
      .runs[0]
      .output
    )
    assert output == _EPERM
  assert (
    _run(unguarded, _RAW.format(args=(0, 4096, 3, 0x22, -1, 0)), str(number)).runs[0].output
    != _EPERM
  )


def test_a_child_has_three_null_descriptors_and_its_job(unguarded):
  verdict = _run(
    unguarded,
    """
      import os
      found = []
      for fd in range(64):
        try:
          os.get_inheritable(fd)
          found.append(fd)
        except OSError:
          pass
      return [found, os.read(0, 9), os.write(1, b"x"), os.write(2, b"x"), dict(os.environ)]
      """,
  )
  assert verdict.runs[0].output == "[[0, 1, 2, 3], b'', 1, 1, {}]"


def _is_below(pid, ancestor):
  while pid > 1 and pid != ancestor:
    stat = pathlib.Path(f'/proc/{pid}/stat').read_text()
    pid = int(stat.rpartition(')')[2].split()[1])
  return pid == ancestor


def _busy_child(service):
  """Status and limits of a process of the service with two filters that used processor time."""
  for path in pathlib.Path('/proc').glob('[0-9]*/status'):
    try:
      text = path.read_text()
      found = dict(line.split(':\t', 1) for line in text.splitlines() if ':\t' in line)
      busy = float((path.parent / 'stat').read_text().rpartition(')')[2].split()[11]) > 10
      if found.get('Seccomp') == '2' and found.get('Seccomp_filters', '2') == '2' and busy:
        if not _is_below(int(path.parent.name), service):
          continue
        return found, (path.parent / 'limits').read_text() if os.getuid() == 0 else ''
    except (OSError, ValueError):
      continue
  return {}, ''


def test_the_fence_as_the_kernel_tells_it_from_outside():
  with Executor(workers=2, policy=False, score_timeout_s=4.0) as started:
    future = started.submit(Job('run', 'def f(x):\n  while True: pass', ('1',)))
    fields, deadline = {}, time.monotonic() + 20
    while not fields and time.monotonic() < deadline:
      time.sleep(0.2)
      fields, limits = _busy_child(started._link._process.pid)
    assert fields, 'no process with two filters is busy'
    assert (
      fields['NoNewPrivs'] == '1' and int(fields['CapEff'], 16) == int(fields['CapPrm'], 16) == 0
    )
    if os.getuid() == 0:
      assert set(fields['Uid'].split()) == {str(fence.NOBODY)} and fields['Groups'].strip() == ''
    for name, value in (
      [
        ('processes', 0),
        ('file size', 0),
        ('core file size', 0),
        ('address space', 512 << 20),
        ('open files', 16),
        ('stack size', 8 << 20),
      ]
      if limits
      else ()
    ):
      line = next(line for line in limits.splitlines() if line.startswith(f'Max {name}'))
      assert line.split()[-3:-1] == [str(value)] * 2 or line.split()[-2:] == [str(value)] * 2, line
    future.result()


def test_the_level_is_what_the_layers_give():
  on = dict.fromkeys(('limits', 'privileges', 'seccomp', 'landlock', 'user', 'namespaces'), 'on')
  assert (
    fence.level(on)
    == fence.level(on | {'namespaces': 'EPERM'})
    == fence.level(on | {'user': 'not root'})
    == 'full'
  )
  assert fence.level(on | {'landlock': 'ENOSYS'}) == 'standard'
  assert fence.level(on | {'user': 'not root', 'namespaces': 'EPERM'}) == 'standard'
  assert (
    fence.level(on | {'seccomp': 'EINVAL'})
    == fence.level(on | {'limits': 'EPERM'})
    == fence.level({})
    == 'weak'
  )


def test_without_the_filter_the_service_refuses_and_names_the_remedy():
  with pytest.raises(
    IsolationError, match=r"isolation is weak.*seccomp: switched off.*min_isolation='weak'"
  ):
    Executor(workers=2, layers=('user', 'landlock'))
  with pytest.raises(IsolationError, match=r'isolation is standard.*landlock: switched off'):
    Executor(workers=2, min_isolation='full', layers=('seccomp',))


def test_a_weaker_fence_runs_only_when_it_is_accepted_and_says_so():
  with Executor(workers=2, layers=(), min_isolation='weak', score_timeout_s=0.5) as started:
    assert started.isolation.level == 'weak' and 'OPEN: ' in str(started.isolation)
    verdicts = started.run(
      [
        Job('run', 'def f(x):\n  return x + 1', ('1',), ('2',)),
        Job('run', 'def f(x):\n  while True: pass', ('1',)),
        Job('run', 'def f(x):\n  return len([0] * 10**11)', ('1',)),
        Job('run', 'import os\ndef f(x): return 1', ('1',)),
      ]
    )
    assert [v.status.value for v in verdicts] == ['ok', 'timeout', 'memory', 'rejected']
    assert started.stats()['isolation_level'] == 0.0


@pytest.mark.parametrize(
  'layers, level', [(('seccomp',), 'standard'), (('seccomp', 'landlock'), 'standard')]
)
def test_the_filter_alone_is_a_standard_fence(layers, level):
  with Executor(workers=2, layers=layers) as started:
    assert started.isolation.level == level
    assert not [name for name, result in started.isolation.attempts.items() if result == 'OPEN']


def test_the_command_line_prints_the_layers_and_tests_itself(capsys):
  assert __main__.main(['--self-test']) == 0
  out = capsys.readouterr().out
  assert (
    'isolation: ' in out
    and 'seccomp      on' in out
    and 'FAIL' not in out
    and 'an endless loop: timeout' in out
  )


_AS_NOBODY = """
import ctypes, os, struct, sys, json
sys.path.insert(0, sys.argv[1])
from absolute_zero_jax.executor import Executor, fence
from absolute_zero_jax.types import Job
if os.getuid() == 0:
  os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
# Where unprivileged user namespaces are off, unshare answers EPERM; a filter does the same here.
fence.prctl(38, 1)
deny = fence._on_call(fence._NUMBERS['unshare'], [fence._return(fence._ERRNO)])
fence._install(b''.join([*fence._prologue(), *deny, fence._return(fence._ALLOW)]))
with Executor(workers=2, score_timeout_s=1.0) as e:
  good, loop, opened = e.run([Job('run', 'def f(x): return x', ('1',), ('1',)),
                              Job('run', 'def f(x):\\n  while True: pass', ('1',)),
                              Job('validate', 'import os\\ndef f(x): return os.getcwd()', ('1',))])
  print(json.dumps([e.isolation.level, e.isolation.layers, good.runs[0].matches,
                    loop.status.value, opened.status.value]))
"""


def readable_python():
  """An interpreter that an unprivileged user can start: ours, or the system's."""
  for candidate in (sys.executable, '/usr/bin/python3'):
    path = pathlib.Path(candidate).resolve()
    if path.exists() and all(p.stat().st_mode & 0o1 for p in [path, *path.parents]):
      return candidate
  pytest.skip('no interpreter that an unprivileged user could start')


def unprivileged_copy(tmp_path):
  """A copy of the package where every user can read it."""
  folder = pathlib.Path('/tmp') / f'azj-{os.getpid()}-{tmp_path.name}'
  shutil.copytree(
    ROOT / 'absolute_zero_jax',
    folder / 'absolute_zero_jax',
    ignore=shutil.ignore_patterns('__pycache__'),
  )
  for path in [folder, *folder.rglob('*')]:
    path.chmod(0o755 if path.is_dir() else 0o644)
  return folder


def test_an_unprivileged_user_without_namespaces_gets_a_standard_fence(tmp_path):
  python, folder = readable_python(), unprivileged_copy(tmp_path)
  try:
    done = subprocess.run(
      [python, '-c', _AS_NOBODY, str(folder)], capture_output=True, text=True, timeout=60, cwd='/'
    )
  finally:
    shutil.rmtree(folder)
  assert done.returncode == 0, done.stderr
  level, layers, *outcomes = json.loads(done.stdout)
  assert (
    level == 'standard'
    and layers['seccomp'] == 'on'
    and layers['user'] == 'not root'
    and layers['namespaces'] == 'EPERM'
  )
  assert outcomes == [True, 'timeout', 'rejected']


@pytest.mark.parametrize('machine', sorted(syscalls.NUMBERS))
def test_both_machines_have_every_call_that_the_filters_name(machine):
  """A missing number would leave the filter open, or broken; aarch64 never had the older calls."""
  missing = [
    name
    for name in fence._BASE + fence._FORKER + fence._FATAL + ['mmap', 'mprotect', 'fcntl', 'capset']
    if name not in syscalls.NUMBERS[machine]
  ]
  assert missing == ([] if machine == 'x86_64' else ['time', 'fork', 'dup2'])


@pytest.mark.parametrize(
  'machine, header',
  [
    ('x86_64', '/usr/include/x86_64-linux-gnu/asm/unistd_64.h'),
    ('aarch64', '/usr/include/asm-generic/unistd.h'),
  ],
)
def test_the_numbers_are_the_kernels(machine, header):
  if not os.path.exists(header):
    pytest.skip(f'no {header}')
  import re

  found = dict(re.findall(r'#define __NR(?:3264)?_(\w+)\s+(\d+)', pathlib.Path(header).read_text()))
  for name, number in syscalls.NUMBERS[machine].items():
    assert int(found.get(name, number)) == number, name


def test_shared_text_keeps_its_rights():
  code = """
    import sys
    from absolute_zero_jax.executor import memory

    def rights():
      found = {}
      for line in list(open('/proc/self/maps')):
        span, kind, _ = line.split(None, 2)
        start, end = (int(text, 16) for text in span.split('-'))
        if 'w' not in kind:
          found |= dict.fromkeys(range(start, end, 4096), kind)
      return found

    before = rights()
    memory.share_text()
    after = rights()
    assert before and all(after[page] == kind for page, kind in before.items())
    """
  subprocess.run([sys.executable, '-c', textwrap.dedent(code)], check=True, cwd=ROOT)
