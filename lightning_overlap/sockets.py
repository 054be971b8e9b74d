"""The sockets behind a gloo process group, for which it has neither an option nor a question. Linux; elsewhere nothing is known."""

from __future__ import annotations

import os
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager

if sys.platform == "linux":
    import fcntl
    import termios

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
        for descriptor in set(_descriptors()) - before:
            try:
                connection = socket.socket(fileno=os.dup(descriptor))
            except OSError:  # it is no socket, or closed since
                continue
            try:
                connection.getpeername()
            except OSError:  # it listens
                connection.close()
            else:
                made._held.append(connection)

    def bound_send_buffers(self, nbytes: int) -> None:
        """Bounds what the kernel holds of each (it doubles the number for its own needs)."""
        for connection in self._held:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, nbytes)

    def at_rest(self) -> bool:
        """Whether nothing that was sent is on its way; False where that is not known."""
        if sys.platform != "linux" or not self._held:
            return False
        return not any(struct.unpack("i", fcntl.ioctl(s, termios.TIOCOUTQ, bytes(4)))[0] for s in self._held)

    def close(self) -> None:
        """Closes the descriptors, not the connections."""
        for connection in self._held:
            connection.close()
        self._held.clear()


def _descriptors() -> list[int]:
    return [int(name) for name in os.listdir(_DESCRIPTORS)] if os.path.isdir(_DESCRIPTORS) else []
