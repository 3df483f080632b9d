# SPDX-License-Identifier: Apache-2.0
"""Sockets that a single-threaded loop waits for, each with the object it belongs to.

`selectors` cannot wait for the end of a stream alone; `poll(2)` can: with no event asked for it
reports only that the other side closed, and data that arrives before wakes nobody.
"""

import math
import select
import socket
from typing import Any

END, READ, WRITE = 0, select.POLLIN, select.POLLOUT       # END is reported in any case


class Poller:
  """What is waited for: one set of events and one owner per socket."""

  def __init__(self):
    self._poll = select.poll()
    self._owners: dict[int, Any] = {}

  def watch(self, sock: socket.socket, events: int, owner: Any) -> None:
    """Waits for `events` of `sock` from now on, in place of others that it was watched for."""
    self._poll.register(sock, events)
    self._owners[sock.fileno()] = owner

  def forget(self, sock: socket.socket) -> None:
    """Must come before the socket is closed."""
    self._poll.unregister(sock)
    del self._owners[sock.fileno()]

  def wait(self, timeout_s: float) -> list[tuple[Any, int]]:
    """Owners with what happened: WRITE, and READ for data as well as for the end of the stream."""
    ready = self._poll.poll(math.ceil(timeout_s * 1e3))
    return [(self._owners[fd], events & WRITE | (READ if events & ~WRITE else 0))
            for fd, events in ready]
