# SPDX-License-Identifier: Apache-2.0
"""Prints which isolation layers are active here, and why others are not.

  --self-test        also runs a handful of programs that must end as they should
  --min-isolation L  exit with an error below level L (default: 'weak', so that it reports)
"""

import argparse
import sys
import time

from absolute_zero_jax.executor import Executor, ExecutorError, fence, IsolationError
from absolute_zero_jax.types import Job, Status

_LEVELS = {
    'full': 'system call filter, limits, Landlock, and another user or namespaces',
    'standard': 'system call filter and limits; Landlock, other user or namespaces are missing',
    'weak': 'no system call filter, or limits missing: a program can do whatever this user can'}
# name, op, program, inputs, status
_PROGRAMS = (
    ('a function', 'validate', 'def f(x):\n  return [x, x * 2]', ('3',), Status.OK),
    ('an exception', 'validate', 'def f(x):\n  return 1 / x', ('0',), Status.ERROR),
    ('an endless loop', 'run', 'def f(x):\n  while True: pass', ('0',), Status.TIMEOUT),
    ('a memory bomb', 'run', 'def f(x):\n  return len([0] * 10**11)', ('0',), Status.MEMORY),
    ('the order of a set', 'validate', 'def f(x):\n  return list({"a", "b", "c", "d", "e", "f"})',
     ('0',), Status.NONDETERMINISTIC),
    ('a forbidden import', 'validate', 'import os\ndef f(x):\n  return os.getcwd()', ('0',),
     Status.REJECTED),
    ('an injected input', 'validate', 'def f(x):\n  return x', ('1) or (True',), Status.REJECTED),
    ('deep recursion', 'run', 'def f(x):\n  return f(x)', ('0',), Status.ERROR))


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(prog='python -m absolute_zero_jax.executor', description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--self-test', action='store_true')
  parser.add_argument('--min-isolation', choices=fence.LEVELS, default='weak')
  options = parser.parse_args(argv)
  started = time.monotonic()
  try:
    with Executor(workers=2, min_isolation=options.min_isolation) as executor:
      print(executor.isolation)
      print(f'  {executor.isolation.level}: {_LEVELS[executor.isolation.level]}')
      print(f'  started in {time.monotonic() - started:.2f} s')
      failed = _self_test(executor) if options.self_test else 0
  except (IsolationError, ExecutorError) as e:
    print(e, file=sys.stderr)
    return 1
  return 1 if failed else 0


def _self_test(executor: Executor) -> int:
  """Prints each attempt and each program's outcome; the number of surprises."""
  failed = 0
  for name, result in executor.isolation.attempts.items():
    failed += result == 'OPEN'
    print(f'  {"FAIL" if result == "OPEN" else "ok  "} {name}: {result}')
  for name, op, program, inputs, wanted in _PROGRAMS:
    verdict = executor.run([Job(op, program, inputs, timeout_s=1.0)])[0]
    good = verdict.status is wanted
    failed += not good
    print(f'  {"ok  " if good else "FAIL"} {name}: {verdict.status.value} {verdict.error}')
  return failed


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
