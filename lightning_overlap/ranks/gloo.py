"""gloo: reduce-scatter, all-gather and all-to-all are made of point-to-point transfers.

gloo's own collectives move about twice the necessary bytes. Receives are posted before sends, so that both directions of a link run at
once. What is needed next goes first: background data is sent in chunks, while the link carries no more urgent data (see ``link.py``).
Gathers have their own process group, that is, their own connections, so a delayed gather cannot block a reduction. A rank posts the
receives of all gathers of a step before it waits for one of them, so a chunk always finds its receiver.
"""

from __future__ import annotations

import queue
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor

from lightning_overlap.ranks.chunks import Chunk, ChunkSender, chunks_of
from lightning_overlap.ranks.engine import Engine, Piece, PostedWork
from lightning_overlap.ranks.link import Link, Urgency
from lightning_overlap.ranks.members import Members
from lightning_overlap.ranks.pool import BufferPool
from lightning_overlap.ranks.sockets import Sockets
from lightning_overlap.ranks.transfer import Transfer, Waiter

SEND_BUFFER = 128 << 10
"""Size of the kernel's send buffer for a background connection. A chunk counts as sent once it is in the buffer. The kernel would let
the buffer grow to megabytes, which would then share the link with more urgent data."""
CLOSED_CONNECTION_GRACE = 4.0
"""Seconds of waiting after which a closed connection counts as a failure: the peer may have sent everything before it ended."""
THREAD_EXIT_TIMEOUT = 2.0
"""Seconds in which threads must end after their connections were closed."""
CLOSE_TIMEOUT = 300.0
"""Seconds without a byte on its connections after which a group ends though transfers are incomplete. Another rank may be late: in a
long step, or in code of the user."""
CHECKS = 8
"""How often in these times the threads are looked at."""
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
        link: of this process.
    """

    def __init__(
        self,
        members: Members,
        process_group: Any,
        gathers: Any = None,
        sockets: Sockets | None = None,
        gather_sockets: Sockets | None = None,
        link: Link | None = None,
    ) -> None:
        super().__init__(members, process_group, gathers)
        self.sockets = sockets or Sockets()
        self.gather_sockets = gather_sockets or Sockets()
        self.link = link or Link()

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

        Turns on keep-alive.

        Args:
            ends_of_peers: :meth:`ends` of every other member.
        """
        for i, sockets in enumerate((self.sockets, self.gather_sockets)):
            sockets.keep([(mine, other) for ends in ends_of_peers for other, mine in ends[i]])
            sockets.keep_alive()

    def bytes_moved(self) -> int | None:
        """Returns the bytes that its connections have sent and received; None where that is not known."""
        moved = [sockets.bytes_moved() for sockets in (self.sockets, self.gather_sockets) if sockets.known]
        return None if not moved or None in moved else sum(filter(None, moved))

    def stop(self) -> None:
        self.link.close(self.sockets)
        self.link.close(self.gather_sockets)

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
    """Posts and waits on threads; once stopped, on the caller's (a checkpoint after a fit).

    Args:
        arguments: see :class:`GlooEngine`.
        background: as in :func:`lightning_overlap.ranks.world.make_group`.
    """

    def __init__(self, *arguments: Any, background: Urgency | None = None) -> None:
        super().__init__(*arguments)
        self._background = background
        self.threads: Threads | None = Threads(self)

    def keep_connections(self, ends_of_peers: Sequence[tuple[list[Any], list[Any]]]) -> None:
        super().keep_connections(ends_of_peers)
        for sockets, urgency in ((self.sockets, Urgency.REDUCTION), (self.gather_sockets, Urgency.GATHER)):
            self.link.add(sockets, urgency if self.yields(urgency) else Urgency.FOREGROUND)
            if self.yields(urgency):
                sockets.bound_send_buffers(SEND_BUFFER)

    def yields(self, urgency: Urgency) -> bool:
        """Whether data of that urgency is sent in chunks, and waits for more urgent data."""
        return self._background is not None and urgency >= self._background

    def all_reduce(self, x: Tensor, op: Any, transfer: Transfer) -> Waiter:
        if self.threads is None:
            return super().all_reduce(x, op, transfer)
        # Posted by the caller, as all collectives, which are matched by the order of posting.
        work = dist.all_reduce(x, op, self.connected, async_op=True)
        return self._posted(transfer, [], works=[(work, -1)], reduction=True)

    def exchange(self, receives: Sequence[Piece], sends: Sequence[Piece], key: int, transfer: Transfer) -> Waiter:
        if self.threads is None:
            return super().exchange(receives, sends, key, transfer)
        operations = self._operations(dist.irecv, receives, key)
        if not self.yields(Urgency.REDUCTION):
            return self._posted(transfer, operations + self._operations(dist.isend, sends, key), reduction=True)
        return self._posted(transfer, operations, reduction=True, chunks=self._parts(sends, key, Urgency.REDUCTION))

    def send(self, x: Tensor, peer: int, key: int, transfer: Transfer) -> Waiter:
        return self.exchange([], [(peer, x)], key, transfer) if self.threads is not None else super().send(x, peer, key, transfer)

    def receive(self, x: Tensor, peer: int, key: int, transfer: Transfer) -> Waiter:
        if self.threads is None:
            return super().receive(x, peer, key, transfer)
        return self._posted(transfer, self._operations(dist.irecv, [(peer, x)], key), reduction=False)

    def all_gather(self, x: Tensor, pieces: Sequence[Tensor], key: int, priority: int, pool: BufferPool, transfer: Transfer) -> Waiter:
        if self.threads is None:
            return super().all_gather(x, pieces, key, priority, pool, transfer)
        rank, size = self.members.rank, self.members.size
        peers = [(rank + i) % size for i in range(1, size)]
        receives = self._operations(dist.irecv, [(peer, pieces[peer]) for peer in peers], key, gathers=True)
        # Sent from a copy: the weights may be written before the last peer has received them.
        shard = pieces[rank]
        buffer = pool.take(shard.numel(), shard.dtype, shard.device)
        copy = buffer[: shard.numel()].copy_(shard)
        chunks = self._parts([(peer, copy) for peer in peers], key, Urgency.GATHER)
        release = partial(pool.give_back, buffer)
        return self._posted(transfer, receives, reduction=False, chunks=chunks, priority=priority, release=release)

    def start_step(self) -> None:
        if self.threads is not None:
            self.threads.start_step()

    def stop(self) -> None:
        if self.threads is not None:
            if not self.threads.close():
                self._break_off(self.threads)
            self.threads = None
        super().stop()

    def _break_off(self, threads: Threads) -> None:
        """Ends transfers in which other ranks have not taken part in time, so that the threads that wait for them end."""
        warnings.warn(
            f"rank {self.members.ranks[self.members.rank]} ends group {self.members.name!r} without the transfers "
            f"{self.members.incomplete()}: nobody waits for them on this rank, other ranks have not taken part in them, and no data "
            f"came or went for {CLOSE_TIMEOUT:.0f} s. Look for an error before that only some ranks have met",
            stacklevel=2,
        )
        for sockets in (self.sockets, self.gather_sockets):
            sockets.shut_down()
        if not threads.abandon():  # its sockets are not known: destroying the process groups could block
            Engine.abandon(self)

    def stop_threads(self, closed: bool) -> None:
        # A thread that returns from a wait of gloo's while the process ends would abort it: Python then ends the thread inside C++.
        # A thread that gloo does not wake waits until the timeout, without harm.
        if self.threads is not None and closed:
            self.threads.abandon()
        self.threads = None

    def _parts(self, pieces: Sequence[Piece], key: int, urgency: Urgency) -> list[Chunk]:
        """What is posted of some tensors: both ends of a transfer split it alike."""
        return chunks_of(pieces, key) if self.yields(urgency) else [Chunk(x, peer, key) for peer, x in pieces if x.numel()]

    def _operations(
        self, function: Callable[..., Any], pieces: Sequence[Piece], key: int, *, gathers: bool = False
    ) -> list[_Operation]:
        process_group, urgency = (self.gathers, Urgency.GATHER) if gathers else (self.process_group, Urgency.REDUCTION)
        parts = self._parts(pieces, key, urgency)
        return [(function, part.tensor, part.peer, process_group, part.tag) for part in parts]

    def _posted(
        self,
        transfer: Transfer,
        operations: list[_Operation],
        *,
        reduction: bool,
        works: Sequence[PostedWork] = (),
        chunks: Sequence[Chunk] = (),
        priority: int = 0,
        release: Callable[[], None] | None = None,
    ) -> ThreadedWaiter:
        if self.threads is None:
            raise self.failure(transfer.label, -1, ConnectionError("the group has ended"))
        waiter = ThreadedWaiter(self, transfer, list(works), len(chunks), release)
        self.threads.post(waiter, operations, reduction=reduction)
        self.threads.send(waiter, chunks, priority, reduction=reduction)
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
        unsent: number of chunks that are not sent.
        release: called after the last chunk.
        settled: set when a thread has waited for a reduction, or has posted a receive or a gather.
        sent: set when no chunk is unsent.
        error: the error of a thread; None without one.
    """

    engine: ThreadedGlooEngine
    transfer: Transfer
    works: list[PostedWork]
    unsent: int = 0
    release: Callable[[], None] | None = None
    settled: threading.Event = field(default_factory=threading.Event)
    sent: threading.Event = field(default_factory=threading.Event)
    error: Exception | None = None

    def __post_init__(self) -> None:
        if not self.unsent:
            self.sent.set()

    def __del__(self) -> None:
        # Nobody waits for the transfer any more (a backward has failed, or not all of its results were needed). gloo would cancel the
        # receives, and a later receive with this key would then get their data. So a thread waits for them.
        threads = self.engine.threads
        if self.works and self.error is None and threads is not None:
            threads.take_over(self)

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

    def chunk_done(self, error: Exception | None) -> None:
        if error is not None:
            self.settle(error)
        self.unsent -= 1
        if self.unsent == 0:
            self.transfer.done = time.perf_counter()
            if self.release is not None:
                self.release()
            self.release = None
            self.sent.set()

    def _wait_until_settled(self, start: float) -> None:
        # If the peer ends in the middle of a transfer, gloo never wakes the thread that waits for it.
        while not self.settled.wait(self.engine.members.announcements.interval):
            self.engine.check_others(self.transfer.label, start)
        if self.error is not None:
            raise self.error


class Threads:
    """Threads for work that would block the main thread.

    One posts, one waits for reductions, one waits in the place of the main thread, one waits for transfers that were dropped, and one
    or two send chunks.

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
        self._dropped: queue.SimpleQueue[ThreadedWaiter | None] = queue.SimpleQueue()
        name = engine.members.name
        work = [self._post, self._wait_for_reductions, self._wait_for_requests, self._wait_for_dropped]
        self._threads = [threading.Thread(target=target, name=f"{name}.{target.__name__}", daemon=True) for target in work]
        for thread in self._threads:
            thread.start()
        # Each kind has its own, since a chunk whose receiver is late holds up the next ones.
        self._senders: dict[bool, ChunkSender[ThreadedWaiter]] = {}  # by whether it sends reductions
        if engine.gathers is not None:
            self._senders[False] = self._sender(engine.gathers, Urgency.GATHER)
        if engine.yields(Urgency.REDUCTION):
            self._senders[True] = self._sender(engine.process_group, Urgency.REDUCTION)

    def _sender(self, process_group: Any, urgency: Urgency) -> ChunkSender[ThreadedWaiter]:
        engine = self._engine

        def post(waiter: ThreadedWaiter, chunk: Chunk) -> Callable[[], None]:
            label = waiter.transfer.label
            work = engine.post(label, dist.isend, chunk.tensor, chunk.peer, process_group, chunk.tag)
            return lambda: engine.block_for(label, [work])

        limit = urgency if engine.yields(urgency) else Urgency.FOREGROUND
        return ChunkSender(f"{engine.members.name}.send_{urgency.name.lower()}s", lambda: engine.link.is_free(limit), post)

    def post(self, waiter: ThreadedWaiter, operations: list[_Operation], *, reduction: bool) -> None:
        """Posts operations in the order of the calls. A thread then waits for a reduction."""
        self._posts.put((waiter, operations, reduction))

    def send(self, waiter: ThreadedWaiter, chunks: Sequence[Chunk], priority: int, *, reduction: bool) -> None:
        """Queues chunks of a reduction or of a gather; see :meth:`ChunkSender.send`."""
        if chunks:
            self._senders[reduction].send(waiter, chunks, priority)

    def wait_for(self, waiter: ThreadedWaiter) -> None:
        """Lets a thread wait for posted operations; the caller then waits for the waiter's ``settled``."""
        waiter.settled.clear()
        self._requests.put(waiter)

    def take_over(self, waiter: ThreadedWaiter) -> None:
        """Lets a thread wait for operations that nobody else waits for. Their peers may never come, so no other work waits behind."""
        self._dropped.put(waiter)

    def start_step(self) -> None:
        """Starts a step: chunks of earlier steps are then sent before the new ones."""
        for sender in self._senders.values():
            sender.start_step()

    def close(self) -> bool:
        """Ends the threads after their last work. Returns whether they have ended before no byte moved for CLOSE_TIMEOUT."""
        self._end(drop=False)
        return self._join(CLOSE_TIMEOUT, self._engine.bytes_moved)

    def abandon(self) -> bool:
        """Ends the threads, whose connections were shut down, without unsent chunks. Returns whether all have ended in time."""
        self._end(drop=True)
        return self._join(THREAD_EXIT_TIMEOUT)

    def _join(self, limit: float, progress: Callable[[], int | None] = lambda: 0) -> bool:
        """Returns whether all threads have ended before ``progress`` gave the same number for ``limit`` seconds; None is no number."""
        latest, until = progress(), time.monotonic() + limit
        for thread in [*self._threads, *(sender.thread for sender in self._senders.values())]:
            while thread.is_alive():
                thread.join(limit / CHECKS)
                if (number := progress()) is None or number != latest:
                    latest, until = number, time.monotonic() + limit
                elif time.monotonic() > until:
                    return False
        return True

    def _end(self, *, drop: bool) -> None:
        for work in (self._posts, self._requests):
            work.put(None)
        for sender in self._senders.values():
            sender.close(drop=drop)

    def _post(self) -> None:
        while (item := self._posts.get()) is not None:
            self._start(*item)
            del item  # an idle thread must not keep tensors alive
        self._reductions.put(None)
        self._dropped.put(None)  # not before, since this thread may have dropped one

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
                waiter.sent.wait()
                transfer.complete = True
            except Exception as error:
                waiter.settle(error)
            waiter.works.clear()
            transfer.started = transfer.started or max(transfer.posted, last)
            transfer.done = last = time.perf_counter()
            waiter.settle()
            del waiter, transfer

    def _wait_for_dropped(self) -> None:
        while (waiter := self._dropped.get()) is not None:
            with suppress(Exception):  # nobody reads the data, and a later transfer with this peer fails too
                self._engine.block_for(waiter.transfer.label, waiter.works)
                waiter.transfer.complete = True
            waiter.works.clear()
            del waiter

    def _wait_for_requests(self) -> None:
        while (waiter := self._requests.get()) is not None:
            try:
                self._engine.block_for(waiter.transfer.label, waiter.works)
            except Exception as error:
                waiter.settle(error)
            waiter.settle()
            del waiter
