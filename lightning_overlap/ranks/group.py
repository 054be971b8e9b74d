"""A group of ranks and the transfers between them.

A verb *posts* a transfer and returns a :class:`Pending`, which owns the buffers until a *wait* for it has returned.
"""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_overlap.ranks.blocking import BlockingVerbs
from lightning_overlap.ranks.clock import Clock
from lightning_overlap.ranks.engine import Engine
from lightning_overlap.ranks.members import Members
from lightning_overlap.ranks.pool import BufferPool
from lightning_overlap.ranks.transfer import Arrived, Pending, Transfer, Waiter, span

__all__ = ["Group", "Pending", "Transfer"]


class Group(BlockingVerbs):
    """Ranks that transfer tensors to each other, by gloo or by NCCL.

    It has more than 20 methods, since it is the one interface of all transfers.

    Args:
        members: the ranks.
        engine: runs the transfers.

    Attributes:
        keyed: as in :class:`Engine`.
        in_one_order: as in :class:`Engine`.
        sums_sparse: as in :class:`Engine`.
        log: gets every transfer when it is posted; None: no log.
        clock: on CUDA, gives time stamps to logged transfers.
        before_wait: called before each wait for a transfer; None: nothing is. A mode sets it if all ranks wait at the same points,
            whatever has arrived.
        users: number of users, each of which closes the group once; 0: it has ended.
    """

    def __init__(self, members: Members, engine: Engine) -> None:
        super().__init__(members, engine)
        self.keyed = engine.keyed
        self.in_one_order = engine.in_one_order
        self.sums_sparse = engine.sums_sparse
        self.log: list[Transfer] | None = None
        self.clock: Clock | None = None
        self.before_wait: Callable[[], None] | None = None
        self.users = 1
        self._numbers: dict[tuple[str, tuple[int, ...]], int] = defaultdict(int)
        self._pool = BufferPool()

    @property
    def process_group(self) -> Any:
        """torch's process group, for libraries that communicate themselves; None in a group of one rank."""
        return self._engine.process_group

    @property
    def pooled_bytes(self) -> int:
        """Bytes of its buffers, which one transfer after the other uses."""
        return self._pool.nbytes

    def can_transfer(self, x: Tensor) -> bool:
        """Whether the engine can transfer ``x``: gloo transfers tensors on the CPU, NCCL tensors on CUDA."""
        return x.device.type == ("cpu" if self._engine.device is None else self._engine.device.type)

    def device_of(self, x: Tensor) -> torch.device:
        """Returns the device on which the engine can transfer ``x``: with gloo its own, with NCCL this rank's CUDA device."""
        return self._engine.device or x.device

    # -- verbs -------------------------------------------------------------------------------------------------------

    def all_reduce(self, x: Tensor, *, label: str, divisor: float | None = None) -> Pending:
        """Sums ``x`` over the group, in place.

        Args:
            x: any shape and dtype, the same on all members; if sparse, coalesced.
            label: name of the transfer in traces and errors; the part before the first dot is the mode's name.
            divisor: of the sum; None: no division.

        Returns:
            The pending ``x``.
        """
        nbytes = x.indices().nbytes + x.values().nbytes if x.is_sparse else x.nbytes
        op, remaining = self._operation(divisor)

        def finish() -> Tensor:
            return x if remaining is None else x.div_(remaining)

        return self._post(label, 2 * nbytes, lambda transfer: self._engine.all_reduce(x, op, transfer), finish)

    def reduce_scatter(
        self,
        x: Tensor,
        bounds: Sequence[int],
        *,
        key: int,
        label: str,
        divisor: float | None = None,
        wire: torch.dtype | None = None,
    ) -> Pending:
        """Sums ``x`` over the group; each rank gets its shard of the sum, in place.

        Args:
            x: 1-d tensor, contiguous. With ``wire``, its values outside this rank's shard are undefined afterwards.
            bounds: ``size + 1`` offsets into ``x``; the shard of rank r is ``x[bounds[r]:bounds[r + 1]]``. Sizes may differ. Where the
                group is keyed, without ``wire``, this rank's shard may be written to until the wait.
            key: identifies the transfer among those under way; the same on all ranks.
            label: as in :meth:`all_reduce`.
            divisor: as in :meth:`all_reduce`.
            wire: dtype of the transfer; sums are then computed in fp32 (as Megatron-Core's
                ``reduce_scatter_with_fp32_accumulation``). None: the dtype of ``x``.

        Returns:
            The pending shard.
        """
        shard = x[bounds[self.rank] : bounds[self.rank + 1]]
        dtype = wire or x.dtype
        outgoing = {p: x[bounds[p] : bounds[p + 1]].to(dtype) for p in range(self.size) if p != self.rank}
        nbytes = sum(piece.nbytes for piece in outgoing.values())
        if self._engine.scatters and wire is None and len({b - a for a, b in itertools.pairwise(bounds)}) == 1:
            op, remaining = self._operation(divisor)
            outgoing.clear()

            def finish() -> Tensor:
                return shard if remaining is None else shard.div_(remaining)

            return self._post(label, nbytes, lambda transfer: self._engine.reduce_scatter(x, shard, op, transfer), finish)
        incoming = {p: self._pool.take(shard.numel(), dtype, x.device) for p in outgoing}

        def fold() -> Tensor:
            # The order of the sum is fixed: this rank's shard, then the received ones by rank.
            total = shard if wire is None or shard.dtype == torch.float32 else shard.float()
            for buffer in incoming.values():
                total.add_(buffer[: shard.numel()])
            if divisor is not None:
                total.div_(divisor)
            for buffer in incoming.values():
                self._pool.give_back(buffer)
            outgoing.clear()
            return shard if total is shard else shard.copy_(total)

        receives = [(p, buffer[: shard.numel()]) for p, buffer in incoming.items() if shard.numel()]
        sends = [(p, piece) for p, piece in outgoing.items() if piece.numel()]
        return self._post(label, nbytes, lambda transfer: self._engine.exchange(receives, sends, key, transfer), fold)

    def all_gather(self, x: Tensor, bounds: Sequence[int], *, key: int, label: str, priority: int = 0) -> Pending:
        """Fills ``x`` with every rank's shard, in place.

        Args:
            x: 1-d tensor, contiguous, in which this rank's shard is set.
            bounds: as in :meth:`reduce_scatter`.
            key: as in :meth:`reduce_scatter`.
            label: as in :meth:`all_reduce`.
            priority: on gloo, gathers with a lower number are sent first.

        Returns:
            The pending ``x``.
        """
        pieces = [x[a:b] for a, b in itertools.pairwise(bounds)]
        nbytes = pieces[self.rank].nbytes * (self.size - 1)
        assert self.size == 1 or self._engine.gathers is not None, f"make group {self.name!r} with gathers=True"
        return self._post(
            label, nbytes, lambda transfer: self._engine.all_gather(x, pieces, key, priority, self._pool, transfer), lambda: x
        )

    def all_to_all(self, x: Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int], *, key: int, label: str) -> Pending:
        """Sends rows of ``x`` to every member and receives rows from every member.

        Args:
            x: contiguous; dim 0 is split into ``send_sizes``. It must not be written to before the wait.
            send_sizes: rows for each member, by rank in the group; any may be 0.
            receive_sizes: rows from each member: its ``send_sizes`` for this rank.
            key: as in :meth:`reduce_scatter`.
            label: as in :meth:`all_reduce`.

        Returns:
            The pending rows, in the order of the members: ``(sum(receive_sizes), *x.shape[1:])``, dtype and device as ``x``.

        Raises:
            ValueError: the number of sizes is not that of the members, or ``send_sizes`` do not sum to the rows of ``x``.
        """
        if len(send_sizes) != self.size or len(receive_sizes) != self.size or sum(send_sizes) != x.shape[0]:
            raise ValueError(
                f"all_to_all {label!r} over {self.size} ranks of {x.shape[0]} rows got send_sizes {list(send_sizes)} and "
                f"receive_sizes {list(receive_sizes)}. Pass one size for each rank; send_sizes must sum to the rows"
            )
        received = x.new_empty(sum(receive_sizes), *x.shape[1:])
        if self.size == 1:
            received.copy_(x)
        nbytes = (x.shape[0] - send_sizes[self.rank]) * x[:1].numel() * x.element_size()
        return self._post(
            label,
            nbytes,
            lambda transfer: self._engine.all_to_all(received, x, receive_sizes, send_sizes, key, transfer),
            lambda: received,
        )

    def send(self, x: Tensor, to: int, *, key: int, label: str) -> Pending:
        """Sends ``x`` to a member. Nobody needs to wait for it: the transfer frees ``x`` once it is sent.

        Args:
            x: contiguous. It must not be written to before :meth:`Pending.arrived` is True.
            to: the receiver's rank in the group.
            key: on gloo, identifies the transfer among those under way between the two; NCCL matches by the order of posting.
            label: as in :meth:`all_reduce`. Two members post transfers of one label in the same order.

        Returns:
            The pending transfer; its result is an empty tensor, so that it does not keep ``x``.
        """
        ends = (self.ranks[self.rank], self.ranks[to])
        return self._post(label, x.nbytes, lambda transfer: self._engine.send(x, to, key, transfer), lambda: torch.empty(0), ends)

    def receive(self, x: Tensor, source: int, *, key: int, label: str) -> Pending:
        """Receives ``x``, contiguous, in place, from the member ``source``. For the arguments see :meth:`send`."""
        ends = (self.ranks[source], self.ranks[self.rank])
        return self._post(label, 0, lambda transfer: self._engine.receive(x, source, key, transfer), lambda: x, ends)

    def completed(self, x: Tensor, *, label: str) -> Pending:
        """Returns a transfer that is complete without any communication, with the result ``x``."""
        return Pending(self.note(label, 0), Arrived(), lambda: x)

    def start_step(self) -> None:
        """Called before the first reduction of a step: earlier gathers are then sent before later ones, whatever their priority."""
        self._engine.start_step()

    def connect(self, hops: Collection[tuple[int, int]]) -> None:
        """Makes the connections of point-to-point transfers. Collective: all members pass the same (source, target) ranks."""
        self._engine.connect(hops)

    def clock_offset(self) -> float:
        """As :meth:`Engine.clock_offset`."""
        return self._engine.clock_offset()

    # -- bookkeeping -------------------------------------------------------------------------------------------------

    def note(self, label: str, nbytes: int, ranks: tuple[int, ...] | None = None) -> Transfer:
        """Records a posted transfer between all members, or between the global ranks ``ranks``."""
        between = ranks or self.ranks
        transfer = Transfer(label, self._numbers[label, between], nbytes, between, time.perf_counter())
        self._numbers[label, between] += 1
        self._members.recent.append(transfer)
        if self.log is not None:
            self.log.append(transfer)
        return transfer

    def _post(
        self,
        label: str,
        nbytes: int,
        post: Callable[[Transfer], Waiter],
        finish: Callable[[], Tensor],
        ranks: tuple[int, ...] | None = None,
    ) -> Pending:
        transfer = self.note(label, nbytes, ranks)
        if self.size == 1:
            return Pending(transfer, Arrived(), finish)
        with span(f"post {label}"):
            waiter = post(transfer)
        if self.log is not None and self.clock is not None:
            transfer.marks = self._engine.mark(waiter, self.clock)
        return Pending(transfer, waiter, finish, self.before_wait)

    def _operation(self, divisor: float | None) -> tuple[Any, float | None]:
        """Returns torch's reduction, and the divisor to apply afterwards."""
        if divisor == self.size and self._engine.averages:
            return dist.ReduceOp.AVG, None
        return dist.ReduceOp.SUM, divisor

    # -- end ---------------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Ends the group's threads and frees its buffers, unless it has other users. No transfer may be under way."""
        if self.users > 1:
            return
        self._engine.stop()
        self._pool.clear()

    def close(self) -> None:
        """Ends the use by one of its users; the last one stops it and ends its connections."""
        self.users = max(self.users - 1, 0)
        if self.users:
            return
        self._engine.close()
        self._pool.clear()

    def abandon(self) -> None:
        """Ends the group after a failure: transfers under way end with an error, on this rank and on the others."""
        self.users = 0
        self._engine.abandon()
        self._pool.clear()
