"""The link of this process to other hosts, which all of its groups share."""

from __future__ import annotations

import threading
from enum import IntEnum
from weakref import WeakKeyDictionary

from lightning_overlap.ranks.sockets import Sockets


class Urgency(IntEnum):
    """How soon data is needed. The lower is sent first.

    FOREGROUND is computed with next (keys and values, activations), REDUCTION is needed when backward has ended, GATHER in the next
    forward.
    """

    FOREGROUND = 0
    REDUCTION = 1
    GATHER = 2


class Link:
    """Knows whether more urgent data is on its way, for senders of less urgent data.

    What counts is what lies in the kernel's buffers: a transfer whose peer is late has nothing there, and holds nothing back. So no
    rank can wait for data that another rank holds back for ever. Where connections are not known (see :class:`Sockets`), nothing is
    held back.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # a connection's descriptor may not be closed while it is asked
        self._connections: WeakKeyDictionary[Sockets, Urgency] = WeakKeyDictionary()

    def add(self, sockets: Sockets, urgency: Urgency) -> None:
        """Adds connections that send data of one urgency."""
        with self._lock:
            self._connections[sockets] = urgency

    def close(self, sockets: Sockets) -> None:
        """Removes connections and closes their descriptors."""
        with self._lock:
            self._connections.pop(sockets, None)
            sockets.close()

    def is_free(self, urgency: Urgency) -> bool:
        """Whether no more urgent data than that is on its way."""
        with self._lock:
            return all(each.is_idle() or not each.known for each, other in self._connections.items() if other < urgency)
