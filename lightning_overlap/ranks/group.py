"""Groups of ranks and the transfers between them: the only door to collectives.

A transfer is *posted* and gives a :class:`Pending`, which owns its buffers until it is *waited* for.

gloo: reduce-scatter and all-gather are built from point-to-point transfers, because the stock ones move about twice the
bytes that the link has to carry. Receives are posted before sends, so that both directions of a link run at once.
Reduce and gather have a process group, that is a set of connections, each. Whatever holds back on one cannot hold up the
other, which is what makes an order of priority safe: a gather is sent in chunks, the most urgent first, and only while
nothing of a reduce is on its way from this rank. Gathers of an earlier step are not held back: a rank that is behind waits
for them before it comes to the reduce that this rank waits for. A rank never waits for a gather before it has posted the
receives of all of that step, so a chunk in flight always finds its receiver.

NCCL: the native asynchronous collectives, in the order of their posting; never a host synchronisation.
"""

from __future__ import annotations

import heapq
import itertools
import json
import pickle
import queue
import threading
import time
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C import _distributed_c10d

from lightning_overlap.ranks.announcements import TransferError, announced, gather, in_words, look, raise_from_words, wait_until_heard
from lightning_overlap.ranks.clock import Clock, Marks
from lightning_overlap.ranks.sockets import Sockets

__all__ = ["Group", "Pending", "Transfer", "TransferError", "in_words", "make_group", "raise_from_words"]

CHUNK_BYTES = 1 << 20
"""A gather is cut into chunks of this size: what a more urgent transfer waits for at most is the window of chunks."""
WINDOW = 2
"""Chunks in flight on the gather connections: one on the link and one ready behind it."""
SEND_BUFFER = 128 << 10
"""Bytes that the kernel may hold of a gather connection. A chunk counts as sent once the kernel has it, and the kernel grows a
busy connection's buffer to megabytes, which would share the link with the more urgent reduces that follow."""
LOOK_AGAIN = 0.003
"""Seconds after which a held gather looks again whether the link has nothing of a reduce to send."""
ASK_FOR_PEERS = 1.0
"""Seconds of waiting after which announced errors and connections are looked at, and again after so many more."""
GONE_FOR = 4.0
"""Seconds of waiting after which a connection that is closed counts as a failure: the peer may have ended after it has sent all."""
LONGEST_NAP = 0.002
"""Seconds between two looks at a collective that the main thread waits for."""
HUNG_UP = 2.0
"""Seconds that threads have to end once their connections are closed."""
_MAX_CHUNKS = 1 << 14
_REMEMBERED = 256
"""Transfers among which an error looks for those that are not complete."""
_TOLD = 8
"""Transfers that an error tells of."""
_ASKED = 8
"""Times that a rank asks another one's clock."""
T = TypeVar("T")
_Transfer = tuple[Callable[..., Any], Tensor, int, Any, int]
"""What to call, a tensor, the peer's rank in the group, the process group, a tag."""


@dataclass(slots=True)
class Transfer:
    """What is known of a transfer on one rank. Times are seconds of :func:`time.perf_counter`; None: not yet, or not known.

    Attributes:
        label: what is transferred, such as ``data.grads[3]``; up to the first dot it names the mode.
        number: how many of that label the group had before: label and number mean the same transfer on every rank.
        nbytes: bytes that this rank sends.
        ranks: between which it is.
        posted: when it was asked for.
        started: when its first byte could be sent, nothing else being in front of it (gloo).
        done: when all that this rank sends had gone, and, of a reduce, all had come (gloo).
        waited: from when to when this rank did nothing but wait for it.
        marks: on CUDA, what :meth:`read` puts in their place: the host's times tell when the device was given work.
        complete: whether nothing of it has still to come or go, as far as anybody has waited for it.
    """

    label: str
    number: int
    nbytes: int
    ranks: tuple[int, ...]
    posted: float
    started: float | None = None
    done: float | None = None
    waited: tuple[float, float] | None = None
    marks: Marks | None = None
    complete: bool = False

    def read(self) -> None:
        """Times become those of the device. Blocks until it has come to the transfer's end."""
        if self.marks is not None:
            self.posted, self.done, waited = self.marks.read()
            self.started = self.posted
            if waited is not None:
                self.waited, self.marks = waited, None


class Pending:
    """A posted transfer."""

    def __init__(
        self, group: Group, label: str, nbytes: int, finish: Callable[[], Tensor], ranks: tuple[int, ...] | None = None
    ) -> None:
        self.transfer = group.note(label, nbytes, ranks)
        self._group = group
        self._finish: Callable[[], Tensor] | None = finish
        self._result: Tensor | None = None
        self._works: list[tuple[Any, int]] = []  # waited for by the waiting thread, or by the one that calls wait()
        self._sends = 0  # chunks that the sending thread has still to send
        self._lent: Tensor | None = None  # what they are sent from, free after the last one
        self._arrived = threading.Event()  # set by the thread that has waited for a reduce or posted a gather
        self._arrived.set()
        self._error: Exception | None = None

    def add(self, works: Sequence[tuple[Any, int]]) -> None:
        """What the main thread has posted for it."""
        self._works += works
        self.transfer.marks = self._group.mark(works)

    def arrived(self) -> bool:
        """Whether :meth:`wait` would return at once. Of gloo's transfers, known only of those that a thread waits for."""
        return self._arrived.is_set() and all(self._group.can_poll and work.is_completed() for work, _ in self._works)

    def wait(self) -> Tensor:
        """Blocks until the result is complete (on CUDA: makes the current stream wait) and returns it. Idempotent.

        Raises:
            TransferError: naming the transfer and the peers.
        """
        if self._finish is not None:
            start, marks = time.perf_counter(), self.transfer.marks
            asked = marks and marks.now()
            self._wait_for_threads(start)
            if self._works:
                if not self._group.wait_elsewhere(self):
                    self._group.wait_for(self.transfer.label, self._works)
                self._wait_for_threads(start)
            self.transfer.waited = start, time.perf_counter()
            self.transfer.complete = True
            if marks is not None:
                marks.waited(asked)
            self._works.clear()
            finish, self._finish = self._finish, None
            self._result = finish()
        assert self._result is not None, "the finish of a transfer gives its result"
        return self._result

    def _wait_for_threads(self, start: float) -> None:
        """Until they have settled it. gloo never wakes who waits for a transfer in the middle of which the peer went away."""
        while not self._arrived.wait(ASK_FOR_PEERS):
            self._group.look_around(self.transfer.label, start)
        if self._error is not None:
            raise self._error

    def _settle(self, error: Exception | None = None) -> None:
        self._error = self._error or error
        self._arrived.set()


class _Threads:
    """What would block in a gloo group, given to threads: one posts, one waits for reduces, one for what the main thread is
    waiting for, one sends chunks of gathers.

    Posting copies what is sent to the socket, and stands behind gloo's own thread while that reads from the same
    connection: about a millisecond a bucket, which the main thread has better use for. Point-to-point transfers can be
    waited for once and not polled, so somebody has to stand and wait; not the main thread, which must notice that a peer is
    gone. The threads hold Python's lock for microseconds; all arithmetic stays on the main thread.
    """

    def __init__(self, group: Group) -> None:
        self._group = group
        self._posts: queue.SimpleQueue[tuple[Pending, list[_Transfer], bool] | None] = queue.SimpleQueue()
        self._reduces: queue.SimpleQueue[Pending | None] = queue.SimpleQueue()
        self._asked: queue.SimpleQueue[Pending | None] = queue.SimpleQueue()
        self._chunks: list[tuple[int, int, int, Tensor, int, int, Pending]] = []
        self._step = 0
        self._number = itertools.count()
        self._reducing = 0
        self._closing = False
        self._changed = threading.Condition()
        work = [self._post, self._wait_for_reduces, self._wait_for_asked, *([self._send_chunks] if group.gathers is not None else [])]
        self._members = [threading.Thread(target=target, name=f"{group.name}.{target.__name__}", daemon=True) for target in work]
        for thread in self._members:
            thread.start()

    def post(self, pending: Pending, transfers: list[_Transfer], *, reduce: bool) -> None:
        """Posts them in the order of the calls. A reduce is then waited for; a gather is by whoever needs it."""
        pending._arrived.clear()
        if reduce:
            with self._changed:
                self._reducing += 1
        self._posts.put((pending, transfers, reduce))

    def send(self, pending: Pending, priority: int, chunks: list[tuple[Tensor, int, int]]) -> None:
        pending._sends = len(chunks)
        with self._changed:
            for tensor, peer, tag in chunks:
                heapq.heappush(self._chunks, (self._step, priority, next(self._number), tensor, peer, tag, pending))
            self._changed.notify()

    def wait_for(self, pending: Pending) -> None:
        """Waits for what is posted already, in the place of the caller."""
        pending._arrived.clear()
        self._asked.put(pending)

    def start_step(self) -> None:
        with self._changed:
            self._step += 1
            self._changed.notify()

    def _may_send(self) -> bool:
        if not self._chunks:
            return False
        # A reduce may wait for a peer that has not come to it, while the link is idle. To hold gathers back for it would keep
        # the peer behind: its forward waits for them.
        return not self._reducing or self._chunks[0][0] < self._step or self._group.of_reduces.at_rest()

    def close(self, limit: float | None = None) -> None:
        """Ends them when they have nothing more to do, or leaves them alone after so many seconds."""
        self._posts.put(None)
        self._asked.put(None)
        with self._changed:
            self._closing = True
            if limit is not None:
                self._chunks.clear()
            self._changed.notify()
        until = None if limit is None else time.monotonic() + limit
        for thread in self._members:
            thread.join(None if until is None else max(0.0, until - time.monotonic()))

    def _post(self) -> None:
        while (item := self._posts.get()) is not None:
            self._start(*item)
            del item  # no thread keeps what has gone until there is more to do
        self._reduces.put(None)

    def _start(self, pending: Pending, transfers: list[_Transfer], reduce: bool) -> None:
        try:
            for transfer in transfers:
                pending._works.append(self._group.post(pending.transfer.label, *transfer))
        except Exception as error:
            pending._settle(error)
        if reduce:
            self._reduces.put(pending)
        else:
            pending._settle()

    def _wait_for_reduces(self) -> None:
        last = 0.0
        while (pending := self._reduces.get()) is not None:
            try:
                self._group.wait_for(pending.transfer.label, pending._works)
                pending.transfer.complete = True
            except Exception as error:
                pending._settle(error)
            pending._works.clear()
            pending.transfer.started = max(pending.transfer.posted, last)
            pending.transfer.done = last = time.perf_counter()
            pending._settle()
            with self._changed:
                self._reducing -= 1
                self._changed.notify()
            del pending

    def _wait_for_asked(self) -> None:
        while (pending := self._asked.get()) is not None:
            try:
                self._group.wait_for(pending.transfer.label, pending._works)
            except Exception as error:
                pending._settle(error)
            pending._settle()
            del pending

    def _send_chunks(self) -> None:
        flying: list[tuple[tuple[Any, int], Pending]] = []
        while True:
            with self._changed:
                # With a chunk in flight there is something to wait for below; without one, for a change or an idle link.
                while not (flying or self._closing or self._may_send()):
                    self._changed.wait(LOOK_AGAIN if self._chunks else None)
                if self._closing and not flying and not self._chunks:
                    return
                chosen: list[tuple[int, int, int, Tensor, int, int, Pending]] = []
                while self._may_send() and len(flying) + len(chosen) < WINDOW:
                    chosen.append(heapq.heappop(self._chunks))
            # Out of the lock, under which the main thread posts: a send copies its bytes before it returns.
            for _, _, _, tensor, peer, tag, pending in chosen:
                pending.transfer.started = pending.transfer.started or time.perf_counter()
                try:
                    work = self._group.post(pending.transfer.label, dist.isend, tensor, peer, self._group.gathers, tag)
                except Exception as failed:
                    pending._settle(failed)
                else:
                    flying.append((work, pending))
            if not flying:
                continue
            work, pending = flying.pop(0)
            error: Exception | None = None
            try:
                self._group.wait_for(pending.transfer.label, [work])
            except Exception as failed:
                error = failed
            pending._sends -= 1
            if error is not None:
                pending._settle(error)
            elif pending._sends == 0 and pending._lent is not None:
                pending.transfer.done = time.perf_counter()
                self._group.give_back(pending._lent)


class Group:
    """Ranks along some axes of the mesh.

    Args:
        ranks: global ranks of the members, in the order of their rank in the group.
        name: names the group in errors.
        reduces: the process group of reduces, and of everything that is not a gather; None of several ranks: the world's.
        gathers: the process group of gathers; None for a group that makes none.
        of_reduces: the connections of ``reduces``, where they are known.
        of_gathers: those of ``gathers``.
        threads: post and wait on threads of the group's own (gloo); without, each transfer is posted and waited for by its caller.

    Attributes:
        log: if it is a list, every transfer is added to it when it is posted.
        clock: on CUDA, what transfers that are logged are marked with.
        keyed: whether reduce-scatters and all-gathers find each other by their key, so that ranks may post them in
            different orders (gloo). NCCL's, and every all-reduce, are matched by the order of posting.
        can_poll: whether a work that has been posted tells when it is complete (NCCL).
        device: where what it transfers must be; None: anywhere.
        in_one_order: whether all ranks must post all of their transfers, of whatever group, in one order, as long as there are
            kernels that have not run yet: CUDA loads one when it is first launched, and may wait for all that runs by then (NCCL).
    """

    def __init__(
        self, ranks: Sequence[int], name: str, reduces: Any, gathers: Any, of_reduces: Sockets, of_gathers: Sockets, *, threads: bool
    ) -> None:
        self.ranks = tuple(ranks)
        self.size = len(self.ranks)
        self.rank = self.ranks.index(dist.get_rank())
        self.name = name
        self.reduces: Any = reduces if reduces is not None or self.size == 1 else dist.group.WORLD
        self.gathers = gathers
        self.of_reduces = of_reduces
        self.of_gathers = of_gathers
        self.log: list[Transfer] | None = None
        self.clock: Clock | None = None
        self._last: deque[Transfer] = deque(maxlen=_REMEMBERED)
        self._numbers: dict[tuple[str, tuple[int, ...]], int] = defaultdict(int)
        self._free: dict[tuple[torch.dtype, torch.device], list[Tensor]] = defaultdict(list)
        self._native = dist.get_backend(reduces) == "nccl"
        self.keyed = not self._native
        self.can_poll = self.in_one_order = self._native
        self.device = torch.device("cuda", torch.cuda.current_device()) if self._native else None
        self._beside = torch.cuda.Stream() if self._native else None  # see Marks
        self._threads = _Threads(self) if threads and self.size > 1 and not self._native else None
        self._end = weakref.finalize(self, _destroy, reduces, gathers)
        self._end.atexit = False
        if reduces is not None:
            _world.groups.add(self)
        if self._native:  # whose connections all ranks end together, and they do not collect garbage together
            self._end.detach()

    def all_reduce(self, x: Tensor, *, label: str, average: bool = False) -> Pending:
        """Sums ``x`` over the group, in place; the mean of the ranks if ``average``. A sparse ``x`` is coalesced."""
        scale = average and not self._native
        nbytes = x.indices().nbytes + x.values().nbytes if x.is_sparse else x.nbytes
        pending = Pending(self, label, 2 * nbytes, lambda: x.div_(self.size) if scale else x)
        if self.size > 1:
            op = dist.ReduceOp.AVG if average and self._native else dist.ReduceOp.SUM
            # By this thread, as all blocking collectives: they find each other by the order of posting.
            pending.add([(dist.all_reduce(x, op, self._connected, async_op=True), -1)])
            if self._threads is not None:
                self._threads.post(pending, [], reduce=True)
        return pending

    def reduce_scatter(
        self, x: Tensor, bounds: Sequence[int], *, key: int, label: str, average: bool = False, wire: torch.dtype | None = None
    ) -> Pending:
        """Sums ``x`` over the group; each rank gets its own piece, in place.

        Args:
            x: 1-d tensor, contiguous; what is outside this rank's piece is undefined afterwards where ``wire`` is set.
            bounds: ``size + 1`` offsets into ``x``; the piece of rank r is ``x[bounds[r]:bounds[r + 1]]``. May be uneven. Where the
                group is keyed, without ``wire``, this rank's own piece may still be written to until the transfer is waited for.
            key: tells this transfer from others in flight; the same on all ranks.
            label: names it in traces and errors.
            average: divide by the size of the group.
            wire: dtype of the transfer. The sum is then made in fp32 (as the reference's
                ``reduce_scatter_with_fp32_accumulation``).

        Returns:
            The pending piece.
        """
        own = x[bounds[self.rank] : bounds[self.rank + 1]]
        dtype = wire or x.dtype
        outgoing = {p: x[bounds[p] : bounds[p + 1]].to(dtype) for p in range(self.size) if p != self.rank}
        nbytes = sum(piece.nbytes for piece in outgoing.values())
        if self.size == 1:
            return Pending(self, label, 0, lambda: own)
        even = len({b - a for a, b in itertools.pairwise(bounds)}) == 1
        if self._native and wire is None and even:
            op = dist.ReduceOp.AVG if average else dist.ReduceOp.SUM
            pending = Pending(self, label, nbytes, lambda: own)
            pending.add([(dist.reduce_scatter_tensor(own, x, op, self.reduces, async_op=True), -1)])
            return pending

        incoming = {p: self._take(own.numel(), dtype, x.device) for p in outgoing}

        def fold() -> Tensor:
            # The order of the sum is fixed: this rank's own, then the others by rank.
            total = own if wire is None or own.dtype == torch.float32 else own.float()
            for buffer in incoming.values():
                total.add_(buffer[: own.numel()])
            if average:
                total.div_(self.size)
            for buffer in incoming.values():
                self.give_back(buffer)
            outgoing.clear()
            return own if total is own else own.copy_(total)

        pending = Pending(self, label, nbytes, fold)
        transfers: list[_Transfer] = []
        if own.numel():
            transfers += [(dist.irecv, incoming[p][: own.numel()], p, self.reduces, key) for p in outgoing]
        transfers += [(dist.isend, piece, p, self.reduces, key) for p, piece in outgoing.items() if piece.numel()]
        self._post_reduce(pending, transfers)
        return pending

    def all_gather(self, x: Tensor, bounds: Sequence[int], *, key: int, label: str, priority: int = 0) -> Pending:
        """Fills ``x`` with every rank's piece, in place. ``bounds``, ``key``, ``label``: as in :meth:`reduce_scatter`.

        Args:
            x: 1-d tensor, contiguous, of which this rank's piece is set.
            bounds: as in :meth:`reduce_scatter`.
            key: as in :meth:`reduce_scatter`.
            label: as in :meth:`reduce_scatter`.
            priority: where gathers compete for the link, the lowest is sent first.
        """
        pieces = [x[a:b] for a, b in itertools.pairwise(bounds)]
        own = pieces[self.rank]
        pending = Pending(self, label, own.nbytes * (self.size - 1), lambda: x)
        if self.size == 1:
            return pending
        assert self.gathers is not None, f"group {self.name!r} was made without gathers"
        if self._threads is None:
            if len({piece.numel() for piece in pieces}) == 1:
                pending.add([(dist.all_gather_into_tensor(x, own, self.gathers, async_op=True), -1)])
            else:
                copies = [dist.broadcast(piece, self.ranks[r], self.gathers, async_op=True) for r, piece in enumerate(pieces)]
                pending.add([(work, source) for source, work in enumerate(copies)])
            return pending
        peers = [(self.rank + i) % self.size for i in range(1, self.size)]
        receives: list[_Transfer] = [
            (dist.irecv, chunk, p, self.gathers, key * _MAX_CHUNKS + i) for p in peers for i, chunk in enumerate(_chunks(pieces[p]))
        ]
        self._threads.post(pending, receives, reduce=False)
        # Sent from a copy: the weights may be updated or written by the user before the last peer has them.
        lent = self._take(own.numel(), own.dtype, own.device)
        copied = lent[: own.numel()].copy_(own)
        pending._lent = lent
        chunks = [(chunk, p, key * _MAX_CHUNKS + i) for i, chunk in enumerate(_chunks(copied)) for p in peers]
        if chunks:
            self._threads.send(pending, priority, chunks)
        return pending

    def send(self, x: Tensor, to: int, *, key: int, label: str) -> Pending:
        """Sends ``x``, contiguous, to a member. Nobody needs to wait for it: once it has gone, ``x`` is let go of.

        Args:
            x: what is sent. It must not be written to until the transfer has :meth:`Pending.arrived`.
            to: the receiver's rank in the group.
            key: tells this transfer from others in flight between the two, on gloo; NCCL's find each other by the order of posting.
            label: names it in traces and errors. Between two members, transfers of one label come in one order.
        """
        # Of gloo's, the work alone holds x, which the thread that waits for it lets go of. NCCL's lets go of it as soon as a stream
        # waits, which may be another one than x's.
        held = x if self._native else None
        pending = Pending(
            self, label, x.nbytes, lambda: torch.empty(0) if held is None else held, (self.ranks[self.rank], self.ranks[to])
        )
        self._post_reduce(pending, [(dist.isend, x, to, self.reduces, key)])
        return pending

    def receive(self, x: Tensor, source: int, *, key: int, label: str) -> Pending:
        """Fills ``x``, contiguous, with what a member sends. To be posted before it is needed; see :meth:`send`."""
        pending = Pending(self, label, 0, lambda: x, (self.ranks[source], self.ranks[self.rank]))
        if self._threads is not None:
            self._threads.post(pending, [(dist.irecv, x, source, self.reduces, key)], reduce=False)
        else:
            pending.add([self.post(label, dist.irecv, x, source, self.reduces, key)])
        return pending

    def connect(self, hops: Collection[tuple[int, int]]) -> None:
        """Makes the connections of point-to-point transfers; all members call it with the same (source, target) ranks of the group.

        NCCL makes one with the first transfer, and both ends' hosts stand still until the other one has come to it: two that send to
        each other first would stay there.
        """
        if not self._native:
            return
        dist.all_reduce(torch.zeros(1, device=self.device), group=self.reduces)  # in which every member takes part
        mine: list[tuple[Callable[..., Any], int]] = [(dist.isend, target) for source, target in sorted(hops) if source == self.rank]
        mine += [(dist.irecv, source) for source, target in sorted(hops) if target == self.rank]
        ops = [dist.P2POp(what, torch.zeros(1, device=self.device), self.ranks[peer], self.reduces) for what, peer in mine]
        for work in dist.batch_isend_irecv(ops) if ops else ():
            work.wait()
        torch.cuda.synchronize()

    # Blocking ones: posted, and looked at until they are complete. What stands in a wait of gloo's hears of nothing but its own
    # connections, and a wait that is given up after a time breaks them; of collectives, unlike point-to-point transfers, gloo tells
    # whether they are complete.

    def barrier(self) -> None:
        """Until all members have come to it. Blocking."""
        self.sum(torch.zeros(1, device=self.device))

    def sum(self, x: Tensor, op: Any = "sum") -> Tensor:
        """Reduces ``x`` over the group, in place: a sum, or what torch's ``ReduceOp`` has. Blocking; :meth:`all_reduce` is not."""
        if self.size > 1:
            op = getattr(dist.ReduceOp, op.upper()) if isinstance(op, str) else op
            self._stand("a sum", dist.all_reduce(x, op, self._connected, async_op=True))
        return x

    def broadcast(self, x: Tensor, source: int = 0, *, on_host: bool = True) -> Tensor:
        """A member's ``x``, in place. Blocking; on NCCL, unless ``on_host``, the stream waits and the host does not."""
        if self.size > 1:
            work = dist.broadcast(x, self.ranks[source], self._connected, async_op=True)
            if self._native and not on_host:
                work.wait()
            else:
                self._stand("a broadcast", work)
        return x

    def all_gather_alike(self, x: Tensor) -> list[Tensor]:
        """Every member's ``x``, all of one shape. Blocking."""
        everyone = [x] if self.size == 1 else [torch.empty_like(x) for _ in self.ranks]
        if self.size > 1:
            self._stand("a gather", dist.all_gather(everyone, x.contiguous(), self._connected, async_op=True))
        return everyone

    def share_object(self, mine: T, source: int = 0) -> T:
        """A member's object, the first one's by default. Blocking."""
        if self.size == 1:
            return mine
        own = self.rank == source
        data = self._pickled(mine) if own else torch.empty(0, dtype=torch.uint8, device=self.device)
        length = int(self.broadcast(torch.tensor([data.numel()], device=self.device), source))
        sent = self.broadcast(data if own else data.new_empty(length), source)
        return mine if own else _unpickled(sent)

    def all_gather_objects(self, mine: T) -> list[T]:
        """Every member's object, by rank in the group. Blocking."""
        if self.size == 1:
            return [mine]
        padded, lengths = self._padded(mine)
        return [_unpickled(data[:length]) for data, length in zip(self.all_gather_alike(padded), lengths, strict=True)]

    def gather_objects(self, mine: T) -> list[T]:
        """Every member's object on the first one, by rank in the group; nothing on the others. Blocking."""
        if self.size == 1:
            return [mine]
        padded, lengths = self._padded(mine)
        everyone = [torch.empty_like(padded) for _ in self.ranks] if self.rank == 0 else None
        self._stand("a gather", dist.gather(padded, everyone, self.ranks[0], self._connected, async_op=True))
        return [_unpickled(data[:length]) for data, length in zip(everyone or [], lengths, strict=False)]

    def _pickled(self, value: Any) -> Tensor:
        return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8).to(self.device)

    def _padded(self, mine: Any) -> tuple[Tensor, list[int]]:
        """A member's object, as long as the longest one, and the lengths of all."""
        data = self._pickled(mine)
        lengths = [int(length) for length in self.all_gather_alike(torch.tensor([data.numel()], device=self.device))]
        return torch.cat([data, data.new_zeros(max(lengths) - data.numel())]), lengths

    def _stand(self, what: str, work: Any, peer: int = -1) -> None:
        """Blocks until a collective is complete, and looks around meanwhile.

        Raises:
            TransferError: as :meth:`wait_for`.
        """
        start = looked = time.perf_counter()
        nap = 0.0
        while not work.is_completed():
            time.sleep(nap)
            now = time.perf_counter()
            nap = min((now - start) / 8, LONGEST_NAP)
            if now - looked > ASK_FOR_PEERS:
                looked = now
                self.look_around(what, start)
        try:
            work.wait()
        except RuntimeError as error:
            raise self.failure(what, peer, error) from error

    @property
    def _connected(self) -> Any:
        """The process group of what is no gather; torch would take None for the world's."""
        if self.reduces is None:
            raise TransferError(f"group {self.name!r} has ended: another error came before this one")
        return self.reduces

    def clock_offset(self) -> float:
        """How far this rank's :func:`time.perf_counter` is ahead of the first member's, in seconds. Blocking, collective.

        Cristian's algorithm: of several answers of the first member's clock, the one with the shortest round trip counts
        (F. Cristian, Probabilistic clock synchronization, 1989).
        """
        answer = torch.zeros(1, dtype=torch.float64)
        if self.rank == 0:
            for peer in self.ranks[1:]:
                for _ in range(_ASKED):
                    dist.recv(answer, peer, self.reduces)
                    answer[0] = time.perf_counter()
                    dist.send(answer, peer, self.reduces)
            return 0.0
        trips = []
        for _ in range(_ASKED):
            asked = time.perf_counter()
            dist.send(answer, self.ranks[0], self.reduces)
            dist.recv(answer, self.ranks[0], self.reduces)
            answered = time.perf_counter()
            trips.append((answered - asked, (asked + answered) / 2 - answer.item()))
        return min(trips)[1]

    def look_around(self, label: str, start: float) -> None:
        """To be called now and then by whoever has waited for a transfer since ``start``.

        gloo does not wake who waits for a point-to-point transfer in the middle of which the peer went away.

        Raises:
            ConfigError: a rank has announced one.
            TransferError: a rank has announced another error, or a peer is gone.
        """
        look()
        if self.is_left() and time.perf_counter() - start > GONE_FOR:
            raise self.failure(label, -1, ConnectionError("a peer's connection is closed"))

    def is_left(self) -> bool:
        """Whether a member has closed its connection, or cannot be reached."""
        return self.of_reduces.hung_up() or self.of_gathers.hung_up()

    def start_step(self) -> None:
        """To be called before the first reduce of a step: gathers posted earlier are then sent whatever there is to reduce."""
        if self._threads is not None:
            self._threads.start_step()

    def rest(self) -> None:
        """Ends the group's threads and frees its buffers. All its transfers must have been waited for."""
        if self._threads is not None:
            self._threads.close()
            self._threads = None
        self.of_reduces.close()
        self.of_gathers.close()
        self._free.clear()

    def close(self) -> None:
        """As :meth:`rest`, and ends its connections."""
        self.rest()
        self._end.detach()
        _destroy(self.reduces, self.gathers)
        self.reduces = self.gathers = None

    def know_connections(self) -> None:
        """Of the sockets that were made while the groups were, keeps those between members: another thread may have made others.
        Collective.

        The kernel is to ask after a silent peer, and to bound what it holds of gathers.
        """
        if self.size == 1 or self._native:
            self.of_reduces.close()  # NCCL's own, and other threads': nothing is known of them
            self.of_gathers.close()
            return
        everyone = self.all_gather_objects((self.of_reduces.ends(), self.of_gathers.ends()))
        theirs = everyone[: self.rank] + everyone[self.rank + 1 :]
        for i, connections in enumerate((self.of_reduces, self.of_gathers)):
            connections.keep([(mine, other) for ends in theirs for other, mine in ends[i]])
            connections.keep_alive()
        self.of_gathers.bound_send_buffers(SEND_BUFFER)

    def abandon(self) -> None:
        """As :meth:`close`, after a failure: whatever is under way ends with an error, here and on the other members.

        A thread that stood in a wait at the end of the process would abort it: Python ends threads that come back to it by then, and
        C++ does not have it. One that gloo does not wake stands there until the timeout, and harms nobody.
        """
        known = self.of_reduces.known
        for connections in (self.of_reduces, self.of_gathers):
            connections.hang_up()
        if self._threads is not None and known:
            self._threads.close(HUNG_UP)
        self._threads = None
        if known or self.size == 1:
            self.close()
        else:  # to end them would wait for what is under way
            self._end.detach()
            self.reduces = self.gathers = None

    def note(self, label: str, nbytes: int, ranks: tuple[int, ...] | None = None) -> Transfer:
        """Puts down that a transfer has been asked for, between all members or those that are named."""
        between = ranks or self.ranks
        transfer = Transfer(label, self._numbers[label, between], nbytes, between, time.perf_counter())
        self._numbers[label, between] += 1
        self._last.append(transfer)
        if self.log is not None:
            self.log.append(transfer)
        return transfer

    def mark(self, works: Sequence[tuple[Any, int]]) -> Marks | None:
        """Stamps of a transfer that is logged, where the host's clock does not know of it."""
        if self.log is None or self.clock is None or self._beside is None:
            return None
        return Marks(self.clock, works, self._beside)

    def wait_elsewhere(self, pending: Pending) -> bool:
        """Has a thread wait for it, if there are threads; it is then settled."""
        if self._threads is None:
            return False
        self._threads.wait_for(pending)
        return True

    def wait_for(self, label: str, works: Sequence[tuple[Any, int]]) -> None:
        """Blocks until all works are complete.

        Raises:
            TransferError: naming the transfer and the first peer that failed.
        """
        for work, peer in works:
            if self._threads is None and not self._native and peer < 0:
                self._stand(label, work)
                continue
            try:
                work.wait()
            except RuntimeError as error:
                raise self.failure(label, peer, error) from error

    def failure(self, label: str, peer: int, error: Exception) -> Exception:
        """The error of a failed transfer: what a rank has announced, or which it was, with whom, and what the backend said."""
        if (told := announced()) is not None:
            return told
        others = [r for r in self.ranks if r != self.ranks[self.rank]]
        who = f"rank {self.ranks[peer] if 0 <= peer < self.size else others[0] if len(others) == 1 else others}"
        now = time.perf_counter()
        unread = [f"{t.label} ({now - t.posted:.1f} s ago)" for t in list(self._last) if not t.complete]
        more = f" and {len(unread) - _TOLD} more" if unread[_TOLD:] else ""
        return TransferError(
            f"transfer {label!r} of group {self.name!r} between rank {self.ranks[self.rank]} and {who} failed: {error}. "
            "The peer has ended or cannot be reached; see its log. Resume from the last checkpoint. "
            f"Posted here and not complete: {', '.join(unread[:_TOLD])}{more}.{_flight_record(self._native)}"
        )

    def post(self, label: str, transfer: Callable[..., Any], x: Tensor, peer: int, group: Any, tag: int) -> tuple[Any, int]:
        """Starts one transfer with a peer (its rank in the group) and gives what :meth:`wait_for` takes.

        Raises:
            TransferError: the connection is down already, or torch refuses the transfer.
        """
        try:
            if group is None:  # torch would take the world's
                raise ConnectionError("the group has ended")
            return transfer(x, self.ranks[peer], group, tag), peer
        except Exception as error:  # of any kind: in a thread it would be lost, and the rank would wait for ever
            raise self.failure(label, peer, error) from error

    def _post_reduce(self, pending: Pending, transfers: list[_Transfer]) -> None:
        if self._threads is not None:
            self._threads.post(pending, transfers, reduce=True)
        elif self._native and len(transfers) > 1:
            # All at once: NCCL runs those of a group one after the other, and each rank's first would wait for its peer's second.
            together = [dist.P2POp(transfer, x, self.ranks[peer], group) for transfer, x, peer, group, _ in transfers]
            pending.add([(work, -1) for work in dist.batch_isend_irecv(together)])
        else:
            pending.add([self.post(pending.transfer.label, *transfer) for transfer in transfers])

    def _take(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The smallest buffer that is free and large enough, since fresh memory costs a page fault for every 4 KiB."""
        free = self._free[dtype, device]
        fitting = [(buffer.numel(), i) for i, buffer in enumerate(free) if buffer.numel() >= numel > 0]
        return free.pop(min(fitting)[1]) if fitting else torch.empty(numel, dtype=dtype, device=device)

    def give_back(self, buffer: Tensor) -> None:
        """The buffer is free again."""
        if buffer.numel():
            self._free[buffer.dtype, buffer.device].append(buffer)


def _destroy(*groups: Any) -> None:
    """Ends connections, which live on otherwise, with threads of gloo's that wake a hundred times a second."""
    for group in groups:
        if group is not None:
            with suppress(ValueError):  # the world has ended, and they with it
                dist.destroy_process_group(group)


def _flight_record(native: bool) -> str:
    """The last collectives that torch's Flight Recorder knows of, which has any only if TORCH_FR_BUFFER_SIZE asks for it."""
    recorder = getattr(_distributed_c10d, "_dump_nccl_trace_json" if native else "_dump_fr_trace_json")
    entries = json.loads(recorder(includeCollectives=True, onlyActive=False)).get("entries", [])
    said = [f"{e['profiling_name']} {e['input_sizes']} of {e['process_group'][1]} ({e['state']})" for e in entries[-_TOLD:]]
    return f" Last in torch's Flight Recorder: {', '.join(said)}." if said else ""


def _unpickled(data: Tensor) -> Any:
    return pickle.loads(data.cpu().numpy().tobytes())


def _chunks(x: Tensor) -> Sequence[Tensor]:
    """``x`` in pieces of CHUNK_BYTES; of more, where that would be too many to number."""
    step = max(CHUNK_BYTES // x.element_size(), -(-x.numel() // _MAX_CHUNKS))
    return x.split(step) if x.numel() else ()


def make_group(
    rank_sets: Sequence[Sequence[int]],
    name: str,
    timeout: timedelta,
    backend: str | None = None,
    *,
    gathers: bool = True,
    threads: bool = True,
) -> Group:
    """The group of this rank among disjoint ``rank_sets``. Collective over the world: all ranks name the same sets.

    Args:
        rank_sets: global ranks of each group.
        name: as in :class:`Group`.
        timeout: how long a transfer may take.
        backend: ``gloo`` or ``nccl``; by default the world's.
        gathers: whether all-gathers are asked for, which have connections of their own.
        threads: as in :class:`Group`.

    Raises:
        ConfigError: another rank has announced one.
        TransferError: another rank has announced another error, or the members have not met in time.
    """
    mine: Group | None = None
    for ranks in rank_sets:
        pair: list[Any] = [None, None]
        sockets = [Sockets(), Sockets()]
        for i in range(0 if len(ranks) == 1 else 2 if gathers else 1):
            with Sockets.made_inside() as sockets[i]:
                pair[i] = _meet(ranks, name, timeout, backend)
        if dist.get_rank() in ranks:
            mine = Group(ranks, name, *pair, *sockets, threads=threads)
    assert mine is not None, f"rank {dist.get_rank()} is in none of {rank_sets}"
    mine.know_connections()
    return mine


def _meet(ranks: Sequence[int], name: str, timeout: timedelta, backend: str | None) -> Any:
    """A process group. Its members wait for each other in the store, on a thread, while this one looks around."""
    # The group keeps the timeout that it is made with, so the limit of the meeting is this rank's own.
    return patiently(
        lambda: dist.new_group(ranks, timeout=timeout, backend=backend),
        _world.meeting_timeout,
        f"ranks {list(ranks)} have not all come to make group {name!r}",
    )


def patiently(do: Callable[[], T], limit: timedelta, failed: str) -> T:
    """What ``do`` gives, which stands in a wait that nobody can end, such as torch's for the store.

    Args:
        do: runs on a thread.
        limit: seconds after which it is left there.
        failed: the beginning of the error.

    Raises:
        ConfigError: another rank has announced one.
        TransferError: another rank has announced another error, or the time is over.
    """
    done: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def run() -> None:
        try:
            if device is not None:
                torch.cuda.set_device(device)
            done.put((True, do()))
        except Exception as error:
            done.put((False, error))

    threading.Thread(target=run, name="meeting", daemon=True).start()
    until = time.monotonic() + limit.total_seconds()
    advice = "Look for the error of the rank that is missing, and start all of them; meeting_timeout is how long they wait"
    while True:
        try:
            fine, result = done.get(timeout=ASK_FOR_PEERS)
        except queue.Empty:
            look()
            if time.monotonic() > until:
                raise TransferError(f"{failed} within {limit}. {advice}") from None
            continue
        if fine:
            return result
        if not isinstance(result, dist.DistError | RuntimeError):
            raise result
        raise announced() or TransferError(f"{failed}: {result}. {advice}") from result


class _World:
    """All ranks, as long as this process lives.

    Attributes:
        everyone: their group, on the CPU; made when an attempt starts.
        of: the world that it is of.
        meeting_timeout: how long ranks wait for each other to make a group.
        groups: of this process.
    """

    def __init__(self) -> None:
        self.everyone: Group | None = None
        self.of: Any = None
        self.meeting_timeout = timedelta(minutes=5)
        self.groups: weakref.WeakSet[Group] = weakref.WeakSet()


_world = _World()


def assemble(timeout: timedelta, meeting_timeout: timedelta) -> None:
    """Makes the group of all ranks anew, in which they then agree. Collective over the world."""
    if _world.everyone is not None:
        _world.everyone.close()
        _world.everyone = None
    _world.meeting_timeout = meeting_timeout
    if world_size() > 1:
        # Groups find their members by a number that each rank counts, and an attempt that failed may have left them at different ones.
        torchs = dist.distributed_c10d._world
        counts = gather("groups", str(torchs.group_count), meeting_timeout.total_seconds())
        if len(counts) < world_size():
            raise TransferError(
                f"of {world_size()} ranks only {list(counts)} have come within {meeting_timeout}: look for the errors of the others. "
                "meeting_timeout is how long ranks wait for each other"
            )
        torchs.group_count = max(map(int, counts.values()))
        _world.everyone = make_group([range(world_size())], "world", timeout, backend="gloo", gathers=False, threads=False)
        _world.of = dist.group.WORLD


def everyone() -> Group:
    """All ranks; on the world's own connections before they are assembled, and if the world is another one by now."""
    if _world.everyone is not None and _world.of is dist.group.WORLD:
        return _world.everyone
    return Group(range(world_size()), "world", None, None, Sockets(), Sockets(), threads=False)


def abandon_groups() -> None:
    """After a failure: the connections of all groups end, so that no rank stands in a wait for another one's transfers."""
    for group in list(_world.groups):
        group.abandon()
    _world.everyone = None  # what follows in this attempt is agreed on the world's own connections, which are in step


def end_world() -> None:
    """Ends all connections, at the end of the process. A thread of gloo's that lets go of the last collective's tensors after
    Python has ended aborts it (torch 2.13)."""
    if dist.is_initialized():
        wait_until_heard()
        dist.destroy_process_group()


def is_everyone(group: Any) -> bool:
    """Whether a process group is that of all ranks; None is."""
    return group is None or group is dist.group.WORLD


def world_size() -> int:
    """Ranks that have met; 1 before there are process groups."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Of this process; 0 before there are process groups."""
    return dist.get_rank() if dist.is_initialized() else 0


def has_nccl() -> bool:
    """Whether this torch was built with NCCL."""
    return dist.is_nccl_available()


def backend() -> str:
    """Of the world: ``gloo``, ``nccl``; ``none`` before there are process groups."""
    return str(dist.get_backend()) if dist.is_initialized() else "none"


def agree(flag: bool, *, by_all: bool) -> bool:
    """Whether all ranks say so, or any. Collective over the world, blocking."""
    if world_size() == 1:
        return flag
    group = everyone()
    said = torch.tensor([int(flag)], device=group.device)
    return bool(group.sum(said, dist.ReduceOp.MIN if by_all else dist.ReduceOp.MAX))


def all_gather_objects(mine: T) -> list[T]:
    """Every rank's object, by rank. Collective over the world, blocking."""
    return everyone().all_gather_objects(mine) if world_size() > 1 else [mine]


def broadcast_object(mine: T, source: int = 0) -> T:
    """A rank's object, rank 0's by default. Collective over the world, blocking."""
    return everyone().share_object(mine, source) if world_size() > 1 else mine
