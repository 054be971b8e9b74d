"""The sockets behind a gloo process group, for which it has neither an option nor a question. Linux; elsewhere nothing is known."""

from __future__ import annotations

import os
import select
import socket
import stat
import struct
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

if sys.platform == "linux":
    import fcntl
    import termios

ASK_AFTER = 5
"""Seconds of silence after which a peer is asked whether it is there, and until it is asked again."""
ASK_TIMES = 4
"""Questions without an answer after which it is given up: 25 seconds after it was last heard of."""
_DESCRIPTORS = "/proc/self/fd"


class Sockets:
    """Connections of this process, by descriptors of their own."""

    def __init__(self) -> None:
        self._held: list[socket.socket] = []

    @classmethod
    @contextmanager
    def made_inside(cls) -> Iterator[Sockets]:
        """Gives what is filled, at the end of the block, with the connections that were made inside."""
        made = cls()
        before = set(_descriptors())
        yield made
        made._held = _connections(set(_descriptors()) - before)

    @classmethod
    def all(cls) -> Sockets:
        """Every connection that this process has now."""
        found = cls()
        found._held = _connections(_descriptors())
        return found

    def keep_alive(self) -> None:
        """Has the kernel ask after a peer from which nothing comes.

        A peer that was killed says so once, in a packet that a full link may drop; one whose machine is gone says nothing.
        Who only waits to receive would not know before the timeout. What is sent and not acknowledged is given up as soon.
        """
        if sys.platform == "linux":
            for connection in self._held:
                if connection.family in (socket.AF_INET, socket.AF_INET6):
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, ASK_AFTER)
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, ASK_AFTER)
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, ASK_TIMES)
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * ASK_AFTER * (ASK_TIMES + 1))

    def bound_send_buffers(self, nbytes: int) -> None:
        """Bounds what the kernel holds of each (it doubles the number for its own needs)."""
        for connection in self._held:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, nbytes)

    def at_rest(self) -> bool:
        """Whether nothing that was sent is on its way; False where that is not known."""
        if sys.platform != "linux" or not self._held:
            return False
        return not any(struct.unpack("i", fcntl.ioctl(s, termios.TIOCOUTQ, bytes(4)))[0] for s in self._held)

    def hung_up(self) -> bool:
        """Whether the other end of one is gone."""
        if sys.platform != "linux" or not self._held:
            return False
        ends = select.poll()
        for connection in self._held:
            ends.register(connection, select.POLLRDHUP | select.POLLHUP | select.POLLERR)
        return bool(ends.poll(0))

    def close(self) -> None:
        """Closes the descriptors, not the connections."""
        for connection in self._held:
            connection.close()
        self._held.clear()


def _connections(descriptors: Iterable[int]) -> list[socket.socket]:
    """Those of the descriptors that are connections, as descriptors of their own."""
    found = []
    for descriptor in descriptors:
        try:
            if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                continue
            connection = socket.socket(fileno=os.dup(descriptor))
        except OSError:  # closed since
            continue
        try:
            connection.getpeername()
        except OSError:  # it listens
            connection.close()
        else:
            found.append(connection)
    return found


def _descriptors() -> list[int]:
    return [int(name) for name in os.listdir(_DESCRIPTORS)] if os.path.isdir(_DESCRIPTORS) else []
