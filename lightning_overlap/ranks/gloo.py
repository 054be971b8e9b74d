"""gloo: reduce-scatter, all-gather and all-to-all are made of point-to-point transfers.

gloo's own collectives move about twice the necessary bytes. Receives are posted before sends, so that both directions of a link run at
once. Gathers have their own process group, that is, their own connections, so a delayed gather cannot block a reduction. This makes
priorities safe: a gather is sent in chunks, the most urgent first, and only while this rank has no reduction under way. Gathers of an
earlier step are not delayed: a rank that is behind waits for them before it posts the reduction that this rank waits for. A rank posts
the receives of all gathers of a step before it waits for one of them, so a chunk always finds its receiver.
"""

from __future__ import annotations

import heapq
import itertools
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import Tensor

from lightning_overlap.ranks.engine import Engine, Piece, PostedWork
from lightning_overlap.ranks.members import Members
from lightning_overlap.ranks.pool import BufferPool
from lightning_overlap.ranks.sockets import Sockets
from lightning_overlap.ranks.transfer import Transfer, Waiter

CHUNK_BYTES = 1 << 20
"""Size of the chunks of a gather: a more urgent transfer waits for at most WINDOW of them."""
WINDOW = 2
"""Chunks under way on the gather connections: one on the link and the next one."""
SEND_BUFFER = 128 << 10
"""Size of the kernel's send buffer for a gather connection. A chunk counts as sent once it is in the buffer. The kernel would let the
buffer grow to megabytes, which would then share the link with more urgent reductions."""
LINK_CHECK_INTERVAL = 0.003
"""Seconds between two checks whether the link still sends a reduction, for which a gather is delayed."""
CLOSED_CONNECTION_GRACE = 4.0
"""Seconds of waiting after which a closed connection counts as a failure: the peer may have sent everything before it ended."""
THREAD_EXIT_TIMEOUT = 2.0
"""Seconds in which threads must end after their connections were closed."""
_MAX_CHUNKS = 1 << 14
_Operation = tuple[Callable[..., Any], Tensor, int, Any, int]
"""The function to call, a tensor, the peer's rank in the group, the process group, a tag."""


class GlooEngine(Engine):
    """Runs transfers that the caller posts and waits for.

    Args:
        members: as in :class:`Engine`.
        process_group: as in :class:`Engine`.
        gathers: as in :class:`Engine`.
        sockets: connections of ``process_group``; empty if they are not known.
        gather_sockets: connections of ``gathers``; empty if they are not known.
    """

    def __init__(
        self,
        members: Members,
        process_group: Any,
        gathers: Any = None,
        sockets: Sockets | None = None,
        gather_sockets: Sockets | None = None,
    ) -> None:
        super().__init__(members, process_group, gathers)
        self.sockets = sockets or Sockets()
        self.gather_sockets = gather_sockets or Sockets()

    def check_others(self, label: str, start: float) -> None:
        # If a peer ends in the middle of a point-to-point transfer, gloo does not wake the rank that waits for it.
        super().check_others(label, start)
        if (self.sockets.is_closed() or self.gather_sockets.is_closed()) and time.perf_counter() - start > CLOSED_CONNECTION_GRACE:
            raise self.failure(label, -1, ConnectionError("a peer's connection is closed"))

    def ends(self) -> tuple[list[Any], list[Any]]:
        """Returns the addresses of both ends of each socket that was made while the process groups were made, by any thread."""
        return self.sockets.ends(), self.gather_sockets.ends()

    def keep_connections(self, ends_of_peers: Sequence[tuple[list[Any], list[Any]]]) -> None:
        """Keeps the sockets between members, since another thread may have made others meanwhile.

        Turns on keep-alive, and bounds the send buffers of gathers.

        Args:
            ends_of_peers: :meth:`ends` of every other member.
        """
        for i, sockets in enumerate((self.sockets, self.gather_sockets)):
            sockets.keep([(mine, other) for ends in ends_of_peers for other, mine in ends[i]])
            sockets.keep_alive()
        self.gather_sockets.bound_send_buffers(SEND_BUFFER)

    def stop(self) -> None:
        self.sockets.close()
        self.gather_sockets.close()

    def abandon(self) -> None:
        """Ends the group after a failure, without waiting: shuts its sockets down, so that transfers under way fail on all members.

        If its sockets are not known, the process groups are left to the garbage collector: to destroy them could block.
        """
        known = self.sockets.known
        for sockets in (self.sockets, self.gather_sockets):
            sockets.shut_down()
        self.stop_threads(known)
        if known or self.members.size == 1:
            self.close()
        else:
            super().abandon()

    def stop_threads(self, closed: bool) -> None:
        """Ends the engine's threads after a failure, if their connections are ``closed``; otherwise they end with the timeout."""


class ThreadedGlooEngine(GlooEngine):
    """Posts and waits on threads; once stopped, on the caller's (a checkpoint after a fit). Arguments: see :class:`GlooEngine`."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.threads: Threads | None = Threads(self)

    def all_reduce(self, x: Tensor, op: Any, transfer: Transfer) -> Waiter:
        if self.threads is None:
            return super().all_reduce(x, op, transfer)
        # Posted by the caller, as all collectives, which are matched by the order of posting.
        work = dist.all_reduce(x, op, self.connected, async_op=True)
        return self._posted(transfer, [], works=[(work, -1)], reduction=True)

    def exchange(self, receives: Sequence[Piece], sends: Sequence[Piece], key: int, transfer: Transfer) -> Waiter:
        if self.threads is None:
            return super().exchange(receives, sends, key, transfer)
        operations: list[_Operation] = [(dist.irecv, x, peer, self.process_group, key) for peer, x in receives]
        operations += [(dist.isend, x, peer, self.process_group, key) for peer, x in sends]
        return self._posted(transfer, operations, reduction=True)

    def send(self, x: Tensor, peer: int, key: int, transfer: Transfer) -> Waiter:
        return self.exchange([], [(peer, x)], key, transfer) if self.threads is not None else super().send(x, peer, key, transfer)

    def receive(self, x: Tensor, peer: int, key: int, transfer: Transfer) -> Waiter:
        if self.threads is None:
            return super().receive(x, peer, key, transfer)
        return self._posted(transfer, [(dist.irecv, x, peer, self.process_group, key)], reduction=False)

    def all_gather(self, x: Tensor, pieces: Sequence[Tensor], key: int, priority: int, pool: BufferPool, transfer: Transfer) -> Waiter:
        if self.threads is None:
            return super().all_gather(x, pieces, key, priority, pool, transfer)
        rank, size, first = self.members.rank, self.members.size, key * _MAX_CHUNKS
        peers = [(rank + i) % size for i in range(1, size)]
        receives: list[_Operation] = [
            (dist.irecv, chunk, peer, self.gathers, first + i) for peer in peers for i, chunk in enumerate(_chunks(pieces[peer]))
        ]
        waiter = self._posted(transfer, receives, reduction=False)
        # Sent from a copy: the weights may be written before the last peer has received them.
        shard = pieces[rank]
        buffer = pool.take(shard.numel(), shard.dtype, shard.device)
        copy = buffer[: shard.numel()].copy_(shard)
        chunks = [(chunk, peer, first + i) for i, chunk in enumerate(_chunks(copy)) for peer in peers]
        if chunks and self.threads is not None:
            waiter.unsent, waiter.release = len(chunks), lambda: pool.give_back(buffer)
            self.threads.send(waiter, priority, chunks)
        return waiter

    def start_step(self) -> None:
        if self.threads is not None:
            self.threads.start_step()

    def stop(self) -> None:
        if self.threads is not None:
            self.threads.close()
            self.threads = None
        super().stop()

    def stop_threads(self, closed: bool) -> None:
        # A thread that returns from a wait of gloo's while the process ends would abort it: Python then ends the thread inside C++.
        # A thread that gloo does not wake waits until the timeout, without harm.
        if self.threads is not None and closed:
            self.threads.close(THREAD_EXIT_TIMEOUT)
        self.threads = None

    def _posted(
        self, transfer: Transfer, operations: list[_Operation], *, works: list[PostedWork] | None = None, reduction: bool
    ) -> ThreadedWaiter:
        waiter = ThreadedWaiter(self, transfer, works or [])
        if self.threads is None:
            raise self.failure(transfer.label, -1, ConnectionError("the group has ended"))
        self.threads.post(waiter, operations, reduction=reduction)
        return waiter

    def block_for(self, label: str, works: Sequence[PostedWork]) -> None:
        """Waits on a thread of this engine. Only the main thread looks for errors of other ranks meanwhile."""
        for work, peer in works:
            self.wait_for_one(label, work, peer)


@dataclass(eq=False)
class ThreadedWaiter:
    """Waits for a transfer that threads post and wait for.

    Attributes:
        engine: has the threads.
        transfer: record of the transfer.
        works: posted operations for which no thread has waited yet.
        unsent: number of a gather's chunks that are not sent.
        release: called after the last chunk.
        settled: set when a thread has waited for a reduction, or has posted a receive or a gather.
        error: the error of a thread; None without one.
    """

    engine: ThreadedGlooEngine
    transfer: Transfer
    works: list[PostedWork]
    unsent: int = 0
    release: Callable[[], None] | None = None
    settled: threading.Event = field(default_factory=threading.Event)
    error: Exception | None = None

    def arrived(self) -> bool:
        """Whether a thread has waited for the transfer: gloo does not tell whether a point-to-point operation is complete."""
        return self.settled.is_set() and not self.works

    def wait(self) -> None:
        start = time.perf_counter()
        self._wait_until_settled(start)
        if self.works:
            if self.engine.threads is None:
                self.engine.wait_for(self.transfer.label, self.works)
            else:
                self.engine.threads.wait_for(self)
                self._wait_until_settled(start)
        self.works.clear()

    def settle(self, error: Exception | None = None) -> None:
        """Called by a thread that has finished its work on the transfer."""
        self.error = self.error or error
        self.settled.set()

    def _wait_until_settled(self, start: float) -> None:
        # If the peer ends in the middle of a transfer, gloo never wakes the thread that waits for it.
        while not self.settled.wait(self.engine.members.announcements.interval):
            self.engine.check_others(self.transfer.label, start)
        if self.error is not None:
            raise self.error


class Threads:
    """Threads for work that would block the main thread.

    One posts, one waits for reductions, one waits in the place of the main thread, and one sends the chunks of gathers.

    To post copies the data to the socket, and waits while gloo's own thread reads from the same connection: about a millisecond a
    bucket, which the main thread should spend on compute. gloo does not tell whether a point-to-point operation is complete, so a
    thread has to block. The main thread must not, since it has to notice that a peer has ended. The threads hold Python's lock for
    microseconds; all arithmetic is on the main thread.
    """

    def __init__(self, engine: ThreadedGlooEngine) -> None:
        self._engine = engine
        self._posts: queue.SimpleQueue[tuple[ThreadedWaiter, list[_Operation], bool] | None] = queue.SimpleQueue()
        self._reductions: queue.SimpleQueue[ThreadedWaiter | None] = queue.SimpleQueue()
        self._requests: queue.SimpleQueue[ThreadedWaiter | None] = queue.SimpleQueue()
        self._chunks: list[tuple[int, int, int, Tensor, int, int, ThreadedWaiter]] = []
        self._step = 0
        self._number = itertools.count()
        self._reducing = 0
        self._closing = False
        self.changed = threading.Condition()
        name, work = engine.members.name, [self._post, self._wait_for_reductions, self._wait_for_requests]
        if engine.gathers is not None:
            work.append(self._send_chunks)
        self._threads = [threading.Thread(target=target, name=f"{name}.{target.__name__}", daemon=True) for target in work]
        for thread in self._threads:
            thread.start()

    def post(self, waiter: ThreadedWaiter, operations: list[_Operation], *, reduction: bool) -> None:
        """Posts operations in the order of the calls. A thread then waits for a reduction."""
        if reduction:
            with self.changed:
                self._reducing += 1
        self._posts.put((waiter, operations, reduction))

    def send(self, waiter: ThreadedWaiter, priority: int, chunks: list[tuple[Tensor, int, int]]) -> None:
        """Queues chunks (a tensor, the peer, a tag), which are sent by step, priority and order of the calls."""
        with self.changed:
            for tensor, peer, tag in chunks:
                heapq.heappush(self._chunks, (self._step, priority, next(self._number), tensor, peer, tag, waiter))
            self.changed.notify()

    def wait_for(self, waiter: ThreadedWaiter) -> None:
        """Lets a thread wait for posted operations; the caller then waits for the waiter's ``settled``."""
        waiter.settled.clear()
        self._requests.put(waiter)

    def start_step(self) -> None:
        """Starts a step: chunks of earlier steps are then sent before the new ones, also during reductions."""
        with self.changed:
            self._step += 1
            self.changed.notify()

    def close(self, limit: float | None = None) -> None:
        """Ends the threads after their last work; with a ``limit``, drops unsent chunks and waits at most so many seconds."""
        self._posts.put(None)
        self._requests.put(None)
        with self.changed:
            self._closing = True
            if limit is not None:
                self._chunks.clear()
            self.changed.notify()
        until = None if limit is None else time.monotonic() + limit
        for thread in self._threads:
            thread.join(None if until is None else max(0.0, until - time.monotonic()))

    def _post(self) -> None:
        while (item := self._posts.get()) is not None:
            self._start(*item)
            del item  # an idle thread must not keep tensors alive
        self._reductions.put(None)

    def _start(self, waiter: ThreadedWaiter, operations: list[_Operation], reduction: bool) -> None:
        try:
            for operation in operations:
                waiter.works.append(self._engine.post(waiter.transfer.label, *operation))
        except Exception as error:
            waiter.settle(error)
        if reduction:
            self._reductions.put(waiter)
        else:
            waiter.settle()

    def _wait_for_reductions(self) -> None:
        last = 0.0
        while (waiter := self._reductions.get()) is not None:
            transfer = waiter.transfer
            try:
                self._engine.block_for(transfer.label, waiter.works)
                transfer.complete = True
            except Exception as error:
                waiter.settle(error)
            waiter.works.clear()
            transfer.started = max(transfer.posted, last)
            transfer.done = last = time.perf_counter()
            waiter.settle()
            with self.changed:
                self._reducing -= 1
                self.changed.notify()
            del waiter, transfer

    def _wait_for_requests(self) -> None:
        while (waiter := self._requests.get()) is not None:
            try:
                self._engine.block_for(waiter.transfer.label, waiter.works)
            except Exception as error:
                waiter.settle(error)
            waiter.settle()
            del waiter

    def _may_send(self) -> bool:
        if not self._chunks:
            return False
        # A reduction may wait for a late peer while the link is idle. To delay gathers meanwhile would make the peer still later,
        # since its forward waits for them.
        return not self._reducing or self._chunks[0][0] < self._step or self._engine.sockets.is_idle()

    def _send_chunks(self) -> None:
        in_flight: list[tuple[PostedWork, ThreadedWaiter]] = []
        while True:
            with self.changed:
                # Without a chunk under way, wait here for new chunks, for the end of reductions, or for an idle link.
                while not (in_flight or self._closing or self._may_send()):
                    self.changed.wait(LINK_CHECK_INTERVAL if self._chunks else None)
                if self._closing and not in_flight and not self._chunks:
                    return
                chosen: list[tuple[int, int, int, Tensor, int, int, ThreadedWaiter]] = []
                while self._may_send() and len(in_flight) + len(chosen) < WINDOW:
                    chosen.append(heapq.heappop(self._chunks))
            # Without the lock, which the main thread needs to post: a send copies its bytes before it returns.
            for _, _, _, tensor, peer, tag, waiter in chosen:
                waiter.transfer.started = waiter.transfer.started or time.perf_counter()
                try:
                    work = self._engine.post(waiter.transfer.label, dist.isend, tensor, peer, self._engine.gathers, tag)
                except Exception as error:
                    waiter.settle(error)
                else:
                    in_flight.append((work, waiter))
            if in_flight:
                self._wait_for_chunk(*in_flight.pop(0))

    def _wait_for_chunk(self, work: PostedWork, waiter: ThreadedWaiter) -> None:
        try:
            self._engine.block_for(waiter.transfer.label, [work])
        except Exception as error:
            waiter.unsent -= 1
            waiter.settle(error)
            return
        waiter.unsent -= 1
        if waiter.unsent == 0 and waiter.release is not None:
            waiter.transfer.done = time.perf_counter()
            waiter.release()
            waiter.release = None


def _chunks(x: Tensor) -> Sequence[Tensor]:
    """Splits ``x`` into chunks of CHUNK_BYTES, or larger ones where there would be more than _MAX_CHUNKS."""
    step = max(CHUNK_BYTES // x.element_size(), -(-x.numel() // _MAX_CHUNKS))
    return x.split(step) if x.numel() else ()
