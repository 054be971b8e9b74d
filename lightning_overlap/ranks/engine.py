"""An engine runs the transfers of a group on torch's process groups. This one is the base of gloo's and NCCL's.

The caller posts each transfer, and waits for it himself.
"""

from __future__ import annotations

import itertools
import json
import time
import weakref
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from typing import Any, ClassVar, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_overlap.ranks.announcements import TransferError
from lightning_overlap.ranks.clock import Clock, Marks
from lightning_overlap.ranks.members import LISTED_TRANSFERS, Members
from lightning_overlap.ranks.pool import BufferPool
from lightning_overlap.ranks.transfer import Transfer, Waiter
from lightning_overlap.torch_seams import c10d

LONGEST_NAP = 0.002
"""Seconds between two looks at a collective that the main thread waits for."""
CLOCK_READINGS = 8
"""Times that a rank reads another rank's clock."""


class Work(Protocol):
    """What torch returns for a posted operation."""

    def is_completed(self) -> bool: ...

    def wait(self) -> Any: ...


PostedWork = tuple[Work, int]
"""A posted operation, and the peer's rank in the group; -1: all members."""
Piece = tuple[int, Tensor]
"""A peer's rank in the group, and the contiguous tensor that it gets or sends."""


class Posted:
    """The waiter of operations that their caller has posted.

    Args:
        engine: waits for them.
        label: names the transfer.
        works: the operations.
        sent: a tensor that must live as long as the waiter.
    """

    def __init__(self, engine: Engine, label: str, works: list[PostedWork], sent: Tensor | None = None) -> None:
        self._engine = engine
        self._label = label
        self.works = works
        self._sent = sent

    def arrived(self) -> bool:
        return all(peer < 0 or self._engine.can_poll for _, peer in self.works) and all(work.is_completed() for work, _ in self.works)

    def wait(self) -> None:
        self._engine.wait_for(self._label, self.works)
        self.works.clear()


class Engine:
    """Posts the transfers of a group and waits for them.

    It has more than 20 methods, because it is the one surface of torch.distributed that both backends fill.

    Args:
        members: the ranks.
        process_group: of reductions, point-to-point transfers and blocking collectives; None for a group of one rank.
        gathers: the process group of all-gathers; None for a group that makes none.

    Attributes:
        keyed: whether reduce-scatters and all-gathers find each other by their key, so that ranks may post them in different orders.
            Otherwise, as every all-reduce, they find each other by the order of posting.
        in_one_order: whether all ranks must post all of their transfers, of whatever group, in one order, as long as there are
            kernels that have not run yet: CUDA loads one when it is first launched, and may wait for all that runs by then.
        averages: whether a reduction can divide its sum by the number of ranks.
        scatters: whether it has a reduce-scatter of its own, for even pieces.
        sums_sparse: whether it sums sparse tensors.
        can_poll: whether a point-to-point operation tells when it is complete, as collectives do.
        device: where the engine transfers tensors; None: on the CPU.
    """

    keyed: ClassVar[bool] = True
    in_one_order: ClassVar[bool] = False
    averages: ClassVar[bool] = False
    scatters: ClassVar[bool] = False
    sums_sparse: ClassVar[bool] = True
    can_poll: ClassVar[bool] = False
    _recorder: ClassVar[str] = "_dump_fr_trace_json"

    def __init__(self, members: Members, process_group: Any, gathers: Any = None) -> None:
        self.members = members
        self.process_group = process_group
        self.gathers = gathers
        self.device: torch.device | None = None
        self._end = weakref.finalize(self, destroy, process_group, gathers)
        self._end.atexit = False

    @property
    def connected(self) -> Any:
        """The process group of all but gathers.

        Raises:
            TransferError: it has ended. (torch would take None for the world's.)
        """
        if self.process_group is None:
            raise TransferError(f"group {self.members.name!r} has ended: another error came before this one")
        return self.process_group

    # -- transfers ---------------------------------------------------------------------------------------------------

    def all_reduce(self, x: Tensor, op: Any, transfer: Transfer) -> Waiter:
        """Posts a reduction of ``x``, in place."""
        return Posted(self, transfer.label, [(dist.all_reduce(x, op, self.connected, async_op=True), -1)])

    def reduce_scatter(self, x: Tensor, piece: Tensor, op: Any, transfer: Transfer) -> Waiter:
        """Posts the reduction of each rank's piece of ``x``, all of one size, if the engine :attr:`scatters`."""
        return Posted(self, transfer.label, [(dist.reduce_scatter_tensor(piece, x, op, self.connected, async_op=True), -1)])

    def exchange(self, receives: Sequence[Piece], sends: Sequence[Piece], key: int, transfer: Transfer) -> Waiter:
        """Posts point-to-point transfers with several peers, receives first."""
        works = [self.post(transfer.label, dist.irecv, x, peer, self.process_group, key) for peer, x in receives]
        works += [self.post(transfer.label, dist.isend, x, peer, self.process_group, key) for peer, x in sends]
        return Posted(self, transfer.label, works)

    def all_to_all(
        self, received: Tensor, x: Tensor, receive_sizes: Sequence[int], send_sizes: Sequence[int], key: int, transfer: Transfer
    ) -> Waiter:
        """Posts the transfer of rows ``x`` to all members, and of theirs into ``received``."""
        mine = self.members.rank
        incoming, outgoing = received.split(list(receive_sizes)), x.split(list(send_sizes))
        incoming[mine].copy_(outgoing[mine])
        peers = [(mine + i) % self.members.size for i in range(1, self.members.size)]
        receives = [(p, incoming[p]) for p in peers if incoming[p].numel()]
        # The next rank first: otherwise all ranks would send to rank 0 at once.
        return self.exchange(receives, [(p, outgoing[p]) for p in peers if outgoing[p].numel()], key, transfer)

    def all_gather(self, x: Tensor, pieces: Sequence[Tensor], key: int, priority: int, pool: BufferPool, transfer: Transfer) -> Waiter:
        """Posts the transfer of this rank's piece of ``x`` to all members, and of theirs into ``x``."""
        mine = pieces[self.members.rank]
        if len({piece.numel() for piece in pieces}) == 1:
            return Posted(self, transfer.label, [(dist.all_gather_into_tensor(x, mine, self.gathers, async_op=True), -1)])
        ranks = self.members.ranks
        works = [(dist.broadcast(piece, ranks[r], self.gathers, async_op=True), -1) for r, piece in enumerate(pieces)]
        return Posted(self, transfer.label, works)

    def send(self, x: Tensor, peer: int, key: int, transfer: Transfer) -> Waiter:
        """Posts the transfer of ``x`` to a member."""
        return Posted(self, transfer.label, [self.post(transfer.label, dist.isend, x, peer, self.process_group, key)])

    def receive(self, x: Tensor, peer: int, key: int, transfer: Transfer) -> Waiter:
        """Posts the transfer of a member's tensor into ``x``."""
        return Posted(self, transfer.label, [self.post(transfer.label, dist.irecv, x, peer, self.process_group, key)])

    def post(self, label: str, operation: Callable[..., Any], x: Tensor, peer: int, process_group: Any, tag: int) -> PostedWork:
        """Posts one point-to-point operation.

        Raises:
            TransferError: the connection has ended, or torch refuses the operation.
        """
        try:
            if process_group is None:  # torch would take the world's
                raise ConnectionError("the group has ended")
            return operation(x, self.members.ranks[peer], process_group, tag), peer
        except Exception as error:  # of any kind: on a thread it would be lost, and the rank would wait for ever
            raise self.failure(label, peer, error) from error

    def mark(self, waiter: Waiter, clock: Clock) -> Marks | None:
        """Stamps of a posted transfer on the device's clock; None where the host's clock knows."""
        return None

    def start_step(self) -> None:
        """Before the first reduction of a step: earlier gathers are then sent, whatever there is to reduce."""

    # -- waiting -----------------------------------------------------------------------------------------------------

    def wait_for(self, label: str, works: Sequence[PostedWork]) -> None:
        """Blocks until all works are complete.

        Raises:
            TransferError: naming the transfer and the first peer that failed.
        """
        for work, peer in works:
            if peer < 0:
                self.complete(label, work)
            else:
                self.wait_for_one(label, work, peer)

    def wait_for_one(self, label: str, work: Work, peer: int) -> None:
        """As :meth:`wait_for`. Hears of no other rank's error meanwhile."""
        try:
            work.wait()
        except RuntimeError as error:
            raise self.failure(label, peer, error) from error

    def complete(self, label: str, work: Work) -> None:
        """Blocks until a collective is complete, and looks around meanwhile.

        Polled: a rank in a wait of gloo's hears of its own connections only, and a wait that is given up breaks them.

        Raises:
            TransferError: as :meth:`wait_for`, and as :meth:`look_around`.
        """
        start = looked = time.perf_counter()
        nap = 0.0
        while not work.is_completed():
            time.sleep(nap)
            now = time.perf_counter()
            nap = min((now - start) / 8, LONGEST_NAP)
            if now - looked > self.members.announcements.interval:
                looked = now
                self.look_around(label, start)
        self.wait_for_one(label, work, -1)

    def look_around(self, label: str, start: float) -> None:
        """Raises what has gone wrong elsewhere. Whoever waits, since ``start``, calls it now and then.

        Raises:
            ConfigError: a rank has announced one.
            TransferError: a rank has announced another error, or a peer has gone.
        """
        self.members.announcements.look()

    def failure(self, label: str, peer: int, error: Exception) -> Exception:
        """As :meth:`Members.failure`, with the last collectives of torch's Flight Recorder, if TORCH_FR_BUFFER_SIZE asks for it."""
        recorder = getattr(c10d, self._recorder)
        entries = json.loads(recorder(includeCollectives=True, onlyActive=False)).get("entries", [])[-LISTED_TRANSFERS:]
        last = [f"{e['profiling_name']} {e['input_sizes']} of {e['process_group'][1]} ({e['state']})" for e in entries]
        record = f" Last in torch's Flight Recorder: {', '.join(last)}." if last else ""
        return self.members.failure(label, peer, error, record)

    # -- blocking ----------------------------------------------------------------------------------------------------

    def broadcast(self, x: Tensor, source: int, *, on_host: bool) -> None:
        """A member's ``x``, in place. The host waits; on CUDA, unless ``on_host``, the stream alone does."""
        self.complete("a broadcast", dist.broadcast(x, self.members.ranks[source], self.connected, async_op=True))

    def gather_alike(self, x: Tensor, received: list[Tensor]) -> None:
        """Fills ``received`` with every member's ``x``, all of one shape."""
        self.complete("a gather", dist.all_gather(received, x.contiguous(), self.connected, async_op=True))

    def gather_first(self, x: Tensor, received: list[Tensor] | None) -> None:
        """As :meth:`gather_alike`, on the first member only; ``received`` is None on the others."""
        self.complete("a gather", dist.gather(x, received, self.members.ranks[0], self.connected, async_op=True))

    def clock_offset(self) -> float:
        """How far this rank's :func:`time.perf_counter` is ahead of the first member's, in seconds. Blocking, collective.

        Cristian's algorithm: of several readings of the first member's clock, the one with the shortest round trip counts
        (F. Cristian, Probabilistic clock synchronization, 1989).
        """
        answer = torch.zeros(1, dtype=torch.float64)
        ranks = self.members.ranks
        if self.members.rank == 0:
            for peer, _ in itertools.product(ranks[1:], range(CLOCK_READINGS)):
                dist.recv(answer, peer, self.connected)
                answer[0] = time.perf_counter()
                dist.send(answer, peer, self.connected)
            return 0.0
        trips = []
        for _ in range(CLOCK_READINGS):
            sent = time.perf_counter()
            dist.send(answer, ranks[0], self.connected)
            dist.recv(answer, ranks[0], self.connected)
            received = time.perf_counter()
            trips.append((received - sent, (sent + received) / 2 - answer.item()))
        return min(trips)[1]

    # -- start and end -----------------------------------------------------------------------------------------------

    def connect(self, hops: Collection[tuple[int, int]]) -> None:
        """Makes the connections of point-to-point transfers between (source, target) members, where they are made on first use."""

    def stop(self) -> None:
        """Ends threads. All transfers must have been waited for."""

    def borrow(self) -> None:
        """The process groups are another's, which outlive the engine."""
        self._end.detach()

    def close(self) -> None:
        """As :meth:`stop`, and ends the connections."""
        self.stop()
        self._end.detach()
        destroy(self.process_group, self.gathers)
        self.process_group = self.gathers = None

    def abandon(self) -> None:
        """After a failure: lets go of the connections, whose end would wait for the transfers that are under way."""
        self._end.detach()
        self.process_group = self.gathers = None


def destroy(*process_groups: Any) -> None:
    """Ends connections, which live on otherwise, with threads of gloo's that wake a hundred times a second."""
    for process_group in process_groups:
        if process_group is not None:
            with suppress(ValueError):  # the world has ended, and they with it
                dist.destroy_process_group(process_group)
