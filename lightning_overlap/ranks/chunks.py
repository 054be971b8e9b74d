"""Sends data in chunks, so that what becomes more urgent meanwhile waits for a chunk and not for all of it."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar

from torch import Tensor

from lightning_overlap.ranks.transfer import Transfer

CHUNK_BYTES = 1 << 19
"""Size of a chunk: more urgent data shares the link with at most WINDOW of them."""
WINDOW = 2
"""Chunks under way: one on the link and the next one."""
LINK_CHECK_INTERVAL = 0.002
"""Seconds between two checks whether the link is free of more urgent data."""
_MAX_CHUNKS = 1 << 14


class Chunk(NamedTuple):
    """A part of a tensor for one peer.

    Attributes:
        tensor: contiguous.
        peer: its rank in the group.
        tag: tells it from others between the two ranks.
    """

    tensor: Tensor
    peer: int
    tag: int


def chunks_of(pieces: Iterable[tuple[int, Tensor]], key: int) -> list[Chunk]:
    """Splits each peer's tensor into chunks; the first ones of all peers come first. Sender and receiver get the same tags.

    Chunks are larger than CHUNK_BYTES where there would be more than _MAX_CHUNKS of a tensor.

    Args:
        pieces: ranks of peers and 1-d tensors.
        key: of the transfer.
    """
    by_peer = [[Chunk(part, peer, key * _MAX_CHUNKS + i) for i, part in enumerate(_split(x))] for peer, x in pieces]
    return [chunk for together in itertools.zip_longest(*by_peer) for chunk in together if chunk is not None]


def _split(x: Tensor) -> Sequence[Tensor]:
    step = max(CHUNK_BYTES // x.element_size(), -(-x.numel() // _MAX_CHUNKS))
    return x.split(step) if x.numel() else ()


class ChunkedTransfer(Protocol):
    """A transfer that is sent in chunks."""

    transfer: Transfer

    def chunk_done(self, error: Exception | None) -> None:
        """Called once for each chunk, sent or failed."""


Whole = TypeVar("Whole", bound=ChunkedTransfer)


class ChunkSender(Generic[Whole]):
    """A thread that sends chunks on one kind of connections, the most urgent first.

    Args:
        name: of the thread.
        may_send: whether the link is free of more urgent data.
        post: posts a chunk of a transfer, and returns a function that waits until it is sent. Called on the thread.
    """

    def __init__(self, name: str, may_send: Callable[[], bool], post: Callable[[Whole, Chunk], Callable[[], None]]) -> None:
        self._may_send, self._post = may_send, post
        self._queue: list[tuple[int, int, int, Chunk, Whole]] = []
        self._step = 0
        self._number = itertools.count()
        self._closing = False
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.thread.start()

    def send(self, transfer: Whole, chunks: Sequence[Chunk], priority: int = 0) -> None:
        """Queues chunks, which are sent by step, priority and order of the calls."""
        with self.changed:
            for chunk in chunks:
                heapq.heappush(self._queue, (self._step, priority, next(self._number), chunk, transfer))
            self.changed.notify()

    def start_step(self) -> None:
        """Starts a step: chunks of earlier steps are sent before the new ones."""
        with self.changed:
            self._step += 1

    def close(self, *, drop: bool) -> None:
        """Lets the thread end after its last chunk, or drops what is queued."""
        with self.changed:
            self._closing = True
            dropped, self._queue = (self._queue, []) if drop else ([], self._queue)
            self.changed.notify()
        for *_, transfer in dropped:
            transfer.chunk_done(ConnectionError("the group has ended"))

    def _run(self) -> None:
        in_flight: list[tuple[Callable[[], None], Whole]] = []
        while True:
            with self.changed:
                # With a chunk under way, wait for that one instead.
                while not (in_flight or self._closing or (self._queue and self._may_send())):
                    self.changed.wait(LINK_CHECK_INTERVAL if self._queue else None)
                if self._closing and not in_flight and not self._queue:
                    return
                chosen = self._choose(WINDOW - len(in_flight))
            # Without the lock, which the main thread needs to queue more: a send copies its bytes before it returns.
            in_flight += self._start(chosen)
            chosen.clear()  # an idle thread must not keep tensors alive
            if in_flight:
                self._finish(*in_flight.pop(0))

    def _choose(self, most: int) -> list[tuple[Chunk, Whole]]:
        chosen: list[tuple[Chunk, Whole]] = []
        while self._queue and len(chosen) < most and (self._closing or self._may_send()):
            chosen.append(heapq.heappop(self._queue)[3:])
        return chosen

    def _start(self, chosen: Sequence[tuple[Chunk, Whole]]) -> list[tuple[Callable[[], None], Whole]]:
        started = []
        for chunk, transfer in chosen:
            transfer.transfer.started = transfer.transfer.started or time.perf_counter()
            try:
                started.append((self._post(transfer, chunk), transfer))
            except Exception as error:
                transfer.chunk_done(error)
        return started

    @staticmethod
    def _finish(wait: Callable[[], None], transfer: Whole) -> None:
        try:
            wait()
        except Exception as error:
            transfer.chunk_done(error)
        else:
            transfer.chunk_done(None)
