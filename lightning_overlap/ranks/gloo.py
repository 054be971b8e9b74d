"""gloo: reduce-scatter, all-gather and all-to-all are made of point-to-point transfers.

The stock ones move about twice the bytes that the link has to carry. Receives are posted before sends, so that both directions of a
link run at once. Gathers have a process group, that is a set of connections, of their own. A transfer that is held back on one set
cannot hold up the other, which makes an order of priority safe: a gather is sent in chunks, the most urgent first, and only while this
rank has nothing of a reduction on its way. Gathers of an earlier step are not held back: a rank that is behind waits for them before
it comes to the reduction that this rank waits for. A rank never waits for a gather before it has posted the receives of all of that
step, so a chunk in flight always finds its receiver.
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
"""A gather is cut into chunks of this size: a more urgent transfer waits at most for the window of chunks."""
WINDOW = 2
"""Chunks in flight on the gather connections: one on the link and one ready behind it."""
SEND_BUFFER = 128 << 10
"""Bytes that the kernel may hold of a gather connection. A chunk counts as sent once the kernel has it, and the kernel grows a
busy connection's buffer to megabytes, which would share the link with the more urgent reductions that follow."""
LOOK_AGAIN = 0.003
"""Seconds after which a held gather looks again whether the link has nothing of a reduction to send."""
GONE_FOR = 4.0
"""Seconds of waiting after which a closed connection counts as a failure: the peer may have ended after it has sent all."""
THREAD_EXIT_TIMEOUT = 2.0
"""Seconds that threads have to end once their connections are closed."""
_MAX_CHUNKS = 1 << 14
_Operation = tuple[Callable[..., Any], Tensor, int, Any, int]
"""What to call, a tensor, the peer's rank in the group, the process group, a tag."""


class GlooEngine(Engine):
    """Collectives and point-to-point transfers that the caller posts and waits for.

    Args:
        members: as in :class:`Engine`.
        process_group: as in :class:`Engine`.
        gathers: as in :class:`Engine`.
        sockets: connections of ``process_group``, as far as they are known.
        gather_sockets: those of ``gathers``.
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

    def look_around(self, label: str, start: float) -> None:
        # gloo does not wake a rank that waits for a point-to-point transfer in the middle of which the peer went away.
        super().look_around(label, start)
        if (self.sockets.hung_up() or self.gather_sockets.hung_up()) and time.perf_counter() - start > GONE_FOR:
            raise self.failure(label, -1, ConnectionError("a peer's connection is closed"))

    def ends(self) -> tuple[list[Any], list[Any]]:
        """Both ends of each socket that was made together with the process groups, whoever has made it."""
        return self.sockets.ends(), self.gather_sockets.ends()

    def keep_connections(self, ends_of_peers: Sequence[tuple[list[Any], list[Any]]]) -> None:
        """Keeps the sockets between members: another thread may have made others meanwhile.

        The kernel is to ask after a silent peer, and to bound what it holds of gathers.

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
        """As :meth:`close`, after a failure: what is under way ends with an error, on this rank and on the others."""
        known = self.sockets.known
        for sockets in (self.sockets, self.gather_sockets):
            sockets.hang_up()
        self.stop_threads(known)
        if known or self.members.size == 1:
            self.close()
        else:
            super().abandon()

    def stop_threads(self, hung_up: bool) -> None:
        """Ends the engine's threads, if it has any and their connections are closed; otherwise leaves them alone."""


class ThreadedGlooEngine(GlooEngine):
    """Posts and waits on threads; once stopped, on the caller's (a checkpoint after a fit). Arguments: see :class:`GlooEngine`."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.threads: Threads | None = Threads(self)

    def all_reduce(self, x: Tensor, op: Any, transfer: Transfer) -> Waiter:
        if self.threads is None:
            return super().all_reduce(x, op, transfer)
        # Posted by the caller, as all collectives: they find each other by the order of posting.
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
        # Sent from a copy: the weights may be updated or written by the user before the last peer has them.
        mine = pieces[rank]
        lent = pool.take(mine.numel(), mine.dtype, mine.device)
        copy = lent[: mine.numel()].copy_(mine)
        chunks = [(chunk, peer, first + i) for i, chunk in enumerate(_chunks(copy)) for peer in peers]
        if chunks and self.threads is not None:
            waiter.unsent, waiter.release = len(chunks), lambda: pool.give_back(lent)
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

    def stop_threads(self, hung_up: bool) -> None:
        # A thread that stood in a wait at the end of the process would abort it: Python ends threads that come back to it by then, and
        # C++ does not have it. One that gloo does not wake stands there until the timeout, and harms nobody.
        if self.threads is not None and hung_up:
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
        """Waits in a thread of this engine's, which does not look for errors of other ranks: the main thread does."""
        for work, peer in works:
            self.wait_for_one(label, work, peer)


@dataclass(eq=False)
class ThreadedWaiter:
    """The waiter of a transfer that threads post and wait for.

    Attributes:
        works: posted operations that no thread has waited for yet.
        unsent: chunks of a gather that the sending thread has still to send.
        release: called after the last chunk.
        settled: set by the thread that has waited for a reduction or posted a gather.
        error: of a thread.
    """

    engine: ThreadedGlooEngine
    transfer: Transfer
    works: list[PostedWork]
    unsent: int = 0
    release: Callable[[], None] | None = None
    settled: threading.Event = field(default_factory=threading.Event)
    error: Exception | None = None

    def arrived(self) -> bool:
        """Known only of a transfer that a thread waits for: gloo cannot be asked about point-to-point operations."""
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
        """A thread is through with it."""
        self.error = self.error or error
        self.settled.set()

    def _wait_until_settled(self, start: float) -> None:
        # gloo never wakes a thread that waits for a transfer in the middle of which the peer went away.
        while not self.settled.wait(self.engine.members.announcements.interval):
            self.engine.look_around(self.transfer.label, start)
        if self.error is not None:
            raise self.error


class Threads:
    """Threads that do what would block the main thread: one posts, one waits for reductions, one waits for what the main thread waits
    for, one sends chunks of gathers.

    Posting copies what is sent to the socket, and waits for gloo's own thread while that reads from the same connection: about a
    millisecond a bucket, which the main thread has better use for. gloo tells of no point-to-point operation whether it is complete,
    so a thread has to block; not the main thread, which must notice that a peer has gone. The threads hold Python's lock for
    microseconds; all arithmetic stays on the main thread.
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
        """Posts operations in the order of the calls. A thread then waits for a reduction; for a gather, only if it is asked to."""
        if reduction:
            with self.changed:
                self._reducing += 1
        self._posts.put((waiter, operations, reduction))

    def send(self, waiter: ThreadedWaiter, priority: int, chunks: list[tuple[Tensor, int, int]]) -> None:
        """Sends chunks (a tensor, the peer, a tag) when it is their turn."""
        with self.changed:
            for tensor, peer, tag in chunks:
                heapq.heappush(self._chunks, (self._step, priority, next(self._number), tensor, peer, tag, waiter))
            self.changed.notify()

    def wait_for(self, waiter: ThreadedWaiter) -> None:
        """Waits, in the place of the caller, for operations that are posted."""
        waiter.settled.clear()
        self._requests.put(waiter)

    def start_step(self) -> None:
        """Chunks of earlier steps go before those that follow, whatever there is to reduce."""
        with self.changed:
            self._step += 1
            self.changed.notify()

    def close(self, limit: float | None = None) -> None:
        """Ends the threads when they have nothing more to do, or leaves them alone after ``limit`` seconds."""
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
            del item  # no thread keeps tensors that have gone until it has more to do
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
        # A reduction may wait for a peer that has not come to it, while the link is idle. To hold gathers back for it would keep the
        # peer behind: its forward waits for them.
        return not self._reducing or self._chunks[0][0] < self._step or self._engine.sockets.at_rest()

    def _send_chunks(self) -> None:
        in_flight: list[tuple[PostedWork, ThreadedWaiter]] = []
        while True:
            with self.changed:
                # With a chunk in flight there is something to wait for below; without one, for a change or an idle link.
                while not (in_flight or self._closing or self._may_send()):
                    self.changed.wait(LOOK_AGAIN if self._chunks else None)
                if self._closing and not in_flight and not self._chunks:
                    return
                chosen: list[tuple[int, int, int, Tensor, int, int, ThreadedWaiter]] = []
                while self._may_send() and len(in_flight) + len(chosen) < WINDOW:
                    chosen.append(heapq.heappop(self._chunks))
            # Out of the lock, under which the main thread posts: a send copies its bytes before it returns.
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
    """``x`` in pieces of CHUNK_BYTES; of more, where that would be too many to number."""
    step = max(CHUNK_BYTES // x.element_size(), -(-x.numel() // _MAX_CHUNKS))
    return x.split(step) if x.numel() else ()
