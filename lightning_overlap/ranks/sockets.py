"""The sockets behind a gloo process group, for which it has neither an option nor a question. Linux; elsewhere nothing is known."""

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

ASK_AFTER = 5
"""Seconds of silence after which a peer is asked whether it is there, and until it is asked again."""
ASK_TIMES = 4
"""Questions without an answer after which it is given up: 25 seconds after it was last heard of."""
_DESCRIPTORS = "/proc/self/fd"
ENDED = (("", 0), ("", 0))
"""The addresses of a connection that has ended: the same on all ranks, so that they say nothing of who was connected."""


class Sockets:
    """Connections of this process, by descriptors of their own."""

    def __init__(self) -> None:
        self._held: list[socket.socket] = []

    @classmethod
    @contextmanager
    def made_inside(cls) -> Iterator[Sockets]:
        """Gives what is filled, at the end of the block, with the connections that were made inside."""
        made = cls()
        before = {inode for _, inode in _sockets()}
        yield made
        # By inode: a descriptor's number may have been another file's before, the listing's own among them.
        made._held = _connections(descriptor for descriptor, inode in _sockets() if inode not in before)

    @classmethod
    def of_port(cls, port: int) -> Sockets:
        """Connections that a port of this machine, or of another one, has accepted."""
        found = cls()
        for connection in _connections(descriptor for descriptor, _ in _sockets()):
            here, there = _ends(connection)
            if port in (here[1], there[1]):
                found._held.append(connection)
            else:
                connection.close()
        return found

    def ends(self) -> list[tuple[Any, Any]]:
        """The addresses of each one's two ends, this process's first."""
        return [_ends(connection) for connection in self._held]

    def keep(self, ends: Collection[tuple[Any, Any]]) -> None:
        """Keeps those between these ends, and lets go of the others."""
        kept = [connection for connection in self._held if _ends(connection) in ends and _ends(connection) != ENDED]
        for connection in self._held:
            if connection not in kept:
                connection.close()
        self._held = kept

    @property
    def known(self) -> bool:
        """Whether there are any."""
        return bool(self._held)

    def hang_up(self) -> None:
        """Ends the connections, whoever has a descriptor of them. Who waits for what comes or goes on one of them gets an error."""
        for connection in self._held:
            with suppress(OSError):  # the other end was quicker
                connection.shutdown(socket.SHUT_RDWR)

    def keep_alive(self) -> None:
        """Has the kernel ask after a peer from which nothing comes.

        A peer that was killed says so once, in a packet that a full link may drop; one whose machine is gone says nothing.
        Who only waits to receive would not know before the timeout. What is sent and not acknowledged is given up as soon.
        """
        if sys.platform == "linux":
            for connection in self._held:
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


def _ends(connection: socket.socket) -> tuple[Any, Any]:
    """Address and port of this process's end and of the other one."""
    try:
        (address, port, *_), (peer, peers_port, *_) = connection.getsockname(), connection.getpeername()
    except OSError:
        return ENDED
    return (address.partition("%")[0], port), (peer.partition("%")[0], peers_port)  # each end has a name of its own for its interface


def _connections(descriptors: Iterable[int]) -> list[socket.socket]:
    """Those of the sockets that are connected, as descriptors of their own."""
    found = []
    for descriptor in descriptors:
        try:
            connection = socket.socket(fileno=os.dup(descriptor))
        except OSError:  # closed since
            continue
        if connection.family not in (socket.AF_INET, socket.AF_INET6):  # process groups have no others
            connection.close()
            continue
        try:
            connection.getpeername()
        except OSError:  # it listens
            connection.close()
        else:
            found.append(connection)
    return found


def _sockets() -> Iterator[tuple[int, int]]:
    """Descriptor and inode of every socket of this process."""
    for name in os.listdir(_DESCRIPTORS) if os.path.isdir(_DESCRIPTORS) else ():
        try:
            status = os.fstat(int(name))
        except OSError:  # closed since, as the listing's own is
            continue
        if stat.S_ISSOCK(status.st_mode):
            yield int(name), status.st_ino
