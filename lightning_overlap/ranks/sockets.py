"""The sockets of a gloo process group, which has no interface for them. Works on Linux; elsewhere no socket is found."""

from __future__ import annotations

import os
import select
import socket
import stat
import struct
import sys
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

if sys.platform == "linux":
    import fcntl
    import termios

KEEPALIVE_INTERVAL = 5
"""Seconds of silence before the first keep-alive probe, and between probes."""
KEEPALIVE_PROBES = 4
"""Probes without an answer after which a connection fails: 25 seconds after the peer's last packet."""
_DESCRIPTORS = "/proc/self/fd"
_BYTES_AT = 120
"""Where the kernel's ``tcp_info`` has the numbers of bytes that were acknowledged and received."""
ENDED = (("", 0), ("", 0))
"""The addresses of a connection that has ended. All such connections have them, so they identify no connection."""


class Sockets:
    """Connections of this process, each by a duplicate of its file descriptor."""

    def __init__(self) -> None:
        self._held: list[socket.socket] = []

    @classmethod
    @contextmanager
    def made_inside(cls) -> Iterator[Sockets]:
        """Yields an object that contains, after the block, the connections that were made inside."""
        made = cls()
        before = {inode for _, inode in _sockets()}
        yield made
        # By inode, since numbers of descriptors are reused.
        made._held = _connections(descriptor for descriptor, inode in _sockets() if inode not in before)

    @classmethod
    def of_port(cls, port: int) -> Sockets:
        """Returns the connections from or to a port, on this machine or another."""
        matching = cls()
        for connection in _connections(descriptor for descriptor, _ in _sockets()):
            local, remote = _ends(connection)
            if port in (local[1], remote[1]):
                matching._held.append(connection)
            else:
                connection.close()
        return matching

    def ends(self) -> list[tuple[Any, Any]]:
        """Returns the addresses of each connection's two ends, this process's first."""
        return [_ends(connection) for connection in self._held]

    def keep(self, ends: Collection[tuple[Any, Any]]) -> None:
        """Keeps the connections between these ends, and closes the descriptors of the others."""
        kept = [connection for connection in self._held if _ends(connection) in ends and _ends(connection) != ENDED]
        for connection in self._held:
            if connection not in kept:
                connection.close()
        self._held = kept

    @property
    def known(self) -> bool:
        """Whether any connection is known."""
        return bool(self._held)

    def shut_down(self) -> None:
        """Ends the connections, also for other holders of their descriptors. Transfers on them fail on both ends."""
        for connection in self._held:
            with suppress(OSError):  # the other end has ended it
                connection.shutdown(socket.SHUT_RDWR)

    def keep_alive(self) -> None:
        """Turns on TCP keep-alive, so that the end of a silent peer is noticed.

        A killed peer sends one packet, which a full link may drop; a crashed machine sends none. A rank that only receives would
        notice only at the timeout. Data that is not acknowledged fails after the same time.
        """
        if sys.platform == "linux":
            for connection in self._held:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_INTERVAL)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * KEEPALIVE_INTERVAL * (KEEPALIVE_PROBES + 1))

    def bound_send_buffers(self, nbytes: int) -> None:
        """Sets the size of the kernel's send buffers (the kernel doubles it)."""
        for connection in self._held:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, nbytes)

    def is_idle(self) -> bool:
        """Whether all data that was sent is acknowledged; False where that is not known."""
        if sys.platform != "linux" or not self._held:
            return False
        return not any(struct.unpack("i", fcntl.ioctl(s, termios.TIOCOUTQ, bytes(4)))[0] for s in self._held)

    def bytes_moved(self) -> int | None:
        """Returns the bytes that were acknowledged and received; None where that is not known."""
        if sys.platform != "linux":
            return None
        states = [s.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_AT + 16) for s in self._held]
        if any(len(state) < _BYTES_AT + 16 for state in states):  # before Linux 4.1
            return None
        return sum(sum(struct.unpack_from("QQ", state, _BYTES_AT)) for state in states)

    def is_closed(self) -> bool:
        """Whether the other end of any connection is closed."""
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


def _ends(connection: socket.socket) -> tuple[Any, Any]:
    """Returns address and port of this process's end and of the other end."""
    try:
        (address, port, *_), (peer, peers_port, *_) = connection.getsockname(), connection.getpeername()
    except OSError:
        return ENDED
    return (address.partition("%")[0], port), (peer.partition("%")[0], peers_port)  # each end has its own name for the interface


def _connections(descriptors: Iterable[int]) -> list[socket.socket]:
    """Returns the sockets that are connected, by duplicates of their descriptors."""
    connected = []
    for descriptor in descriptors:
        connection = _duplicate(descriptor)
        if connection is None:
            continue
        if connection.family not in (socket.AF_INET, socket.AF_INET6):  # process groups have no others
            connection.close()
            continue
        try:
            connection.getpeername()
        except OSError:  # it listens
            connection.close()
        else:
            connected.append(connection)
    return connected


def _duplicate(descriptor: int) -> socket.socket | None:
    """Returns a socket by a duplicate of its descriptor; None if it is closed meanwhile, or is another file's now."""
    with suppress(OSError):
        copy = os.dup(descriptor)
        try:
            return socket.socket(fileno=copy)
        except OSError:
            os.close(copy)
    return None


def _sockets() -> Iterator[tuple[int, int]]:
    """Yields descriptor and inode of every socket of this process."""
    for name in os.listdir(_DESCRIPTORS) if os.path.isdir(_DESCRIPTORS) else ():
        try:
            status = os.fstat(int(name))
        except OSError:  # closed meanwhile, as that of listdir
            continue
        if stat.S_ISSOCK(status.st_mode):
            yield int(name), status.st_ino
