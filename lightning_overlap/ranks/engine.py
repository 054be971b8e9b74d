"""The base of the two engines, gloo and NCCL, which run the transfers of a group on torch's process groups."""

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
"""Longest time in seconds between two checks whether a collective is complete."""
CLOCK_READINGS = 8
"""Number of times that a rank reads the first member's clock."""


class Work(Protocol):
    """A posted operation, as torch returns it."""

    def is_completed(self) -> bool: ...

    def wait(self) -> Any: ...


PostedWork = tuple[Work, int]
"""A posted operation, and the peer's rank in the group; -1: all members."""
Piece = tuple[int, Tensor]
"""A peer's rank in the group, and the contiguous tensor that is sent to it or received from it."""


class WorkWaiter:
    """Waits for operations that the caller has posted.

    Args:
        engine: of the operations.
        label: name of the transfer.
        works: the operations.
        sent: a tensor to keep as long as this object exists.
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

    Here the caller posts and waits. It has more than 20 methods, since it is the whole interface of torch.distributed.

    Args:
        members: the ranks.
        process_group: of reductions, point-to-point transfers and blocking collectives; None for a group of one rank.
        gathers: the process group of all-gathers; None for a group that makes none.

    Attributes:
        keyed: whether reduce-scatters and all-gathers are matched by their key, so that ranks may post them in different orders.
            Otherwise, as every all-reduce, they are matched by the order of posting.
        in_one_order: whether all ranks must post the transfers of all groups in one order. CUDA loads a kernel at its first launch,
            and may then wait for all running kernels.
        averages: whether a reduction can divide its sum by the number of ranks.
        scatters: whether it has its own reduce-scatter, for shards of one size.
        sums_sparse: whether it sums sparse tensors.
        can_poll: whether a point-to-point operation tells when it is complete, as collectives do.
        device: device of the tensors; None: the CPU.
    """

    keyed: bool = True
    in_one_order: bool = False
    averages: bool = False
    scatters: bool = False
    sums_sparse: bool = True
    can_poll: bool = False
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
        """The process group of all transfers but gathers.

        Raises:
            TransferError: the group has ended. (torch would use the world's process group for None.)
        """
        if self.process_group is None:
            raise TransferError(f"group {self.members.name!r} has ended after an earlier error. Look for that error")
        return self.process_group

    # -- transfers ---------------------------------------------------------------------------------------------------

    def all_reduce(self, x: Tensor, op: Any, transfer: Transfer) -> Waiter:
        """Posts a reduction of ``x``, in place."""
        return WorkWaiter(self, transfer.label, [(dist.all_reduce(x, op, self.connected, async_op=True), -1)])

    def reduce_scatter(self, x: Tensor, piece: Tensor, op: Any, transfer: Transfer) -> Waiter:
        """Posts the reduction of each rank's shard of ``x``, all of one size, if the engine :attr:`scatters`."""
        return WorkWaiter(self, transfer.label, [(dist.reduce_scatter_tensor(piece, x, op, self.connected, async_op=True), -1)])

    def exchange(self, receives: Sequence[Piece], sends: Sequence[Piece], key: int, transfer: Transfer) -> Waiter:
        """Posts point-to-point transfers with several peers, receives first."""
        works = [self.post(transfer.label, dist.irecv, x, peer, self.process_group, key) for peer, x in receives]
        works += [self.post(transfer.label, dist.isend, x, peer, self.process_group, key) for peer, x in sends]
        return WorkWaiter(self, transfer.label, works)

    def all_to_all(
        self, received: Tensor, x: Tensor, receive_sizes: Sequence[int], send_sizes: Sequence[int], key: int, transfer: Transfer
    ) -> Waiter:
        """Posts the transfer of rows of ``x`` to all members, and of their rows into ``received``."""
        rank = self.members.rank
        incoming, outgoing = received.split(list(receive_sizes)), x.split(list(send_sizes))
        incoming[rank].copy_(outgoing[rank])
        peers = [(rank + i) % self.members.size for i in range(1, self.members.size)]
        receives = [(p, incoming[p]) for p in peers if incoming[p].numel()]
        # The next rank first: otherwise all ranks would send to rank 0 at once.
        return self.exchange(receives, [(p, outgoing[p]) for p in peers if outgoing[p].numel()], key, transfer)

    def all_gather(self, x: Tensor, pieces: Sequence[Tensor], key: int, priority: int, pool: BufferPool, transfer: Transfer) -> Waiter:
        """Posts the transfer of this rank's shard of ``x`` to all members, and of their shards into ``x``."""
        shard = pieces[self.members.rank]
        if len({piece.numel() for piece in pieces}) == 1:
            return WorkWaiter(self, transfer.label, [(dist.all_gather_into_tensor(x, shard, self.gathers, async_op=True), -1)])
        ranks = self.members.ranks
        works = [(dist.broadcast(piece, ranks[r], self.gathers, async_op=True), -1) for r, piece in enumerate(pieces)]
        return WorkWaiter(self, transfer.label, works)

    def send(self, x: Tensor, peer: int, key: int, transfer: Transfer) -> Waiter:
        """Posts the transfer of ``x`` to a member."""
        return WorkWaiter(self, transfer.label, [self.post(transfer.label, dist.isend, x, peer, self.process_group, key)])

    def receive(self, x: Tensor, peer: int, key: int, transfer: Transfer) -> Waiter:
        """Posts the transfer of a member's tensor into ``x``."""
        return WorkWaiter(self, transfer.label, [self.post(transfer.label, dist.irecv, x, peer, self.process_group, key)])

    def post(self, label: str, operation: Callable[..., Any], x: Tensor, peer: int, process_group: Any, tag: int) -> PostedWork:
        """Posts one point-to-point operation.

        Raises:
            TransferError: the connection has ended, or torch refuses the operation.
        """
        try:
            if process_group is None:  # torch would use the world's
                raise ConnectionError("the group has ended")
            return operation(x, self.members.ranks[peer], process_group, tag), peer
        except Exception as error:  # of any kind: a thread would lose it, and the rank would wait for ever
            raise self.failure(label, peer, error) from error

    def mark(self, waiter: Waiter, clock: Clock) -> Marks | None:
        """Returns time stamps of a posted transfer on the device's clock; None where the host's clock has its times."""
        return None

    def start_step(self) -> None:
        """Called before the first reduction of a step: earlier gathers are then sent before later ones, whatever their priority."""

    # -- waiting -----------------------------------------------------------------------------------------------------

    def wait_for(self, label: str, works: Sequence[PostedWork]) -> None:
        """Blocks until all works are complete.

        Raises:
            TransferError: with the transfer and the first peer that failed.
        """
        for work, peer in works:
            if peer < 0:
                self.complete(label, work)
            else:
                self.wait_for_one(label, work, peer)

    def wait_for_one(self, label: str, work: Work, peer: int) -> None:
        """Blocks until one work is complete, without looking for errors of other ranks; see :meth:`wait_for`."""
        try:
            work.wait()
        except RuntimeError as error:
            raise self.failure(label, peer, error) from error

    def complete(self, label: str, work: Work) -> None:
        """Blocks until a collective is complete, and looks for errors of other ranks meanwhile.

        It polls, because a wait of gloo's notices failures of its own connections only, and a wait with a timeout breaks them.

        Raises:
            TransferError: as :meth:`wait_for`, and as :meth:`check_others`.
        """
        start = looked = time.perf_counter()
        nap = 0.0
        while not work.is_completed():
            time.sleep(nap)
            now = time.perf_counter()
            nap = min((now - start) / 8, LONGEST_NAP)
            if now - looked > self.members.announcements.interval:
                looked = now
                self.check_others(label, start)
        self.wait_for_one(label, work, -1)

    def check_others(self, label: str, start: float) -> None:
        """Raises the error of another rank, if there is one. Called repeatedly during a wait that began at ``start``.

        Raises:
            ConfigError: a rank has announced one.
            TransferError: a rank has announced another error, or a peer has ended.
        """
        self.members.announcements.look()

    def failure(self, label: str, peer: int, error: Exception) -> Exception:
        """Returns :meth:`Members.failure` with the last collectives of torch's Flight Recorder, if TORCH_FR_BUFFER_SIZE is set."""
        recorder = getattr(c10d, self._recorder)
        entries = json.loads(recorder(includeCollectives=True, onlyActive=False)).get("entries", [])[-LISTED_TRANSFERS:]
        last = [f"{e['profiling_name']} {e['input_sizes']} of {e['process_group'][1]} ({e['state']})" for e in entries]
        record = f" Last collectives in torch's Flight Recorder: {', '.join(last)}." if last else ""
        return self.members.failure(label, peer, error, record)

    # -- blocking ----------------------------------------------------------------------------------------------------

    def reduce(self, x: Tensor, op: Any) -> None:
        """Reduces ``x`` over the group, in place. The host waits."""
        self.complete("a sum", dist.all_reduce(x, op, self.connected, async_op=True))

    def broadcast(self, x: Tensor, source: int, *, on_host: bool) -> None:
        """Copies ``x`` of the member ``source`` to all, in place. The host waits; on CUDA, unless ``on_host``, only the stream."""
        self.complete("a broadcast", dist.broadcast(x, self.members.ranks[source], self.connected, async_op=True))

    def gather_alike(self, x: Tensor, received: list[Tensor]) -> None:
        """Fills ``received`` with every member's ``x``, all of one shape and dtype."""
        self.complete("a gather", dist.all_gather(received, x.contiguous(), self.connected, async_op=True))

    def gather_first(self, x: Tensor, received: list[Tensor] | None) -> None:
        """Fills ``received`` as :meth:`gather_alike`, on the first member only; it is None on the others."""
        self.complete("a gather", dist.gather(x, received, self.members.ranks[0], self.connected, async_op=True))

    def clock_offset(self) -> float:
        """Returns how far this rank's :func:`time.perf_counter` is ahead of the first member's, in seconds. Blocking, collective.

        Cristian's algorithm: reads the first member's clock several times and uses the reading with the shortest round trip
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
        """Makes the connections between (source, target) members ahead, where the backend makes them at the first transfer."""

    def stop(self) -> None:
        """Ends threads. No transfer may be under way."""

    def borrow(self) -> None:
        """Keeps the process groups alive after the engine, since they belong to another owner."""
        self._end.detach()

    def close(self) -> None:
        """Ends threads and connections. No transfer may be under way."""
        self.stop()
        self._end.detach()
        destroy(self.process_group, self.gathers)
        self.process_group = self.gathers = None

    def abandon(self) -> None:
        """Drops the connections after a failure: to end them would wait for the transfers under way."""
        self._end.detach()
        self.process_group = self.gathers = None


def destroy(*process_groups: Any) -> None:
    """Destroys process groups, which torch would keep, with threads of gloo's that wake a hundred times a second."""
    for process_group in process_groups:
        if process_group is not None:
            with suppress(ValueError):  # they have ended with the world
                dist.destroy_process_group(process_group)
