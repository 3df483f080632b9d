# SPDX-License-Identifier: Apache-2.0
"""Harmless attempts at forbidden things, made from inside a fenced child to test the fence."""

import _socket
import _thread
import errno
import os


def attempts() -> dict[str, str]:
  """What was tried -> 'denied (REASON)' or 'OPEN'. Nothing is changed where an attempt succeeds."""
  found = {}
  for name, attempt in _ATTEMPTS.items():
    try:
      attempt()
      found[name] = 'OPEN'
    except OSError as e:
      found[name] = f'denied ({errno.errorcode.get(e.errno, e.errno)})'
    except (RuntimeError, MemoryError, ValueError) as e:
      found[name] = f'denied ({type(e).__name__})'
  return found


def _fork() -> None:
  if os.fork() == 0:
    os._exit(0)


def _execute() -> None:
  try:
    os.execv('/nonexistent', ['x'])
  except FileNotFoundError:
    pass       # the call itself went through


def _descriptors() -> None:
  for fd in range(4, 64):
    try:
      os.get_inheritable(fd)
    except OSError:
      continue
    return
  raise OSError(errno.EBADF, 'none')


def _environment() -> None:
  if not any('KEY' in k or 'TOKEN' in k or k in ('HOME', 'USER') for k in os.environ):
    raise ValueError('scrubbed')


_ATTEMPTS = {
    'read a file': lambda: os.close(os.open('/etc/passwd', os.O_RDONLY)),
    'list a folder': lambda: os.listdir('/'),
    'stat a file': lambda: os.stat('/etc/passwd'),
    # O_TMPFILE makes a file without a name, so that success leaves nothing behind.
    'write a file': lambda: os.open('/tmp', os.O_WRONLY | getattr(os, 'O_TMPFILE', 0), 0o600),
    'make a memory file': lambda: os.memfd_create('probe'),
    'make a TCP socket': lambda: _socket.socket(_socket.AF_INET, _socket.SOCK_STREAM, 0),
    'make a Unix socket': lambda: _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0),
    'start a process': _fork,
    'start a thread': lambda: _thread.start_new_thread(int, ()),
    'execute a program': _execute,
    'signal the parent': lambda: os.kill(os.getppid() or 1, 0),
    'signal everybody': lambda: os.kill(-1, 0),
    'change its priority': lambda: os.setpriority(os.PRIO_PROCESS, 0, 19),
    'use a descriptor above 3': _descriptors,
    'see a user in the environment': _environment,
    'allocate 8 GB': lambda: bytearray(8 << 30),
}
