"""A group of ranks and the transfers between them.

A verb *posts* a transfer and returns a :class:`Pending`, which owns the buffers until it has been *waited* for.
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
    """Ranks that transfer tensors to each other, by whichever engine.

    Args:
        members: the ranks.
        engine: runs the transfers.

    Attributes:
        keyed: as in :class:`Engine`.
        in_one_order: as in :class:`Engine`.
        sums_sparse: as in :class:`Engine`.
        log: if it is a list, every transfer is added to it when it is posted.
        clock: on CUDA, marks the transfers that are logged.
        users: how many share it, each of whom closes it once; 0: it has ended.
    """

    def __init__(self, members: Members, engine: Engine) -> None:
        super().__init__(members, engine)
        self.keyed = engine.keyed
        self.in_one_order = engine.in_one_order
        self.sums_sparse = engine.sums_sparse
        self.log: list[Transfer] | None = None
        self.clock: Clock | None = None
        self.users = 1
        self._numbers: dict[tuple[str, tuple[int, ...]], int] = defaultdict(int)
        self._pool = BufferPool()

    @property
    def process_group(self) -> Any:
        """torch's process group, for libraries that communicate themselves; None in a group of one rank."""
        return self._engine.process_group

    def can_transfer(self, x: Tensor) -> bool:
        """Whether the engine itself transfers tensors of the device of ``x``: gloo only the CPU's, NCCL only CUDA's."""
        return x.device.type == ("cpu" if self._engine.device is None else self._engine.device.type)

    def device_of(self, x: Tensor) -> torch.device:
        """Where ``x`` must be to be transferred: its device on gloo, this rank's CUDA device on NCCL."""
        return self._engine.device or x.device

    # -- verbs -------------------------------------------------------------------------------------------------------

    def all_reduce(self, x: Tensor, *, label: str, divisor: float | None = None) -> Pending:
        """Sums ``x`` over the group, in place.

        Args:
            x: any shape, the same on every member. A sparse one is coalesced.
            label: names the transfer in traces and errors; its part before the first dot is the mode's name.
            divisor: the sum is divided by it; None: by nothing.

        Returns:
            The pending ``x``.
        """
        nbytes = x.indices().nbytes + x.values().nbytes if x.is_sparse else x.nbytes
        op, rest = self._operation(divisor)

        def finish() -> Tensor:
            return x if rest is None else x.div_(rest)

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
        """Sums ``x`` over the group; each rank gets its piece, in place.

        Args:
            x: 1-d tensor, contiguous; outside this rank's piece it is undefined afterwards where ``wire`` is set.
            bounds: ``size + 1`` offsets into ``x``; the piece of rank r is ``x[bounds[r]:bounds[r + 1]]``. May be uneven. Where the
                group is keyed, without ``wire``, this rank's piece may still be written to until the transfer is waited for.
            key: tells this transfer from others in flight; the same on all ranks.
            label: as in :meth:`all_reduce`.
            divisor: as in :meth:`all_reduce`.
            wire: dtype of the transfer. The sum is then made in fp32 (as the reference's
                ``reduce_scatter_with_fp32_accumulation``).

        Returns:
            The pending piece.
        """
        own = x[bounds[self.rank] : bounds[self.rank + 1]]
        dtype = wire or x.dtype
        outgoing = {p: x[bounds[p] : bounds[p + 1]].to(dtype) for p in range(self.size) if p != self.rank}
        nbytes = sum(piece.nbytes for piece in outgoing.values())
        if self._engine.scatters and wire is None and len({b - a for a, b in itertools.pairwise(bounds)}) == 1:
            op, rest = self._operation(divisor)
            outgoing.clear()

            def finish() -> Tensor:
                return own if rest is None else own.div_(rest)

            return self._post(label, nbytes, lambda transfer: self._engine.reduce_scatter(x, own, op, transfer), finish)
        incoming = {p: self._pool.take(own.numel(), dtype, x.device) for p in outgoing}

        def fold() -> Tensor:
            # The order of the sum is fixed: this rank's piece, then the others by rank.
            total = own if wire is None or own.dtype == torch.float32 else own.float()
            for buffer in incoming.values():
                total.add_(buffer[: own.numel()])
            if divisor is not None:
                total.div_(divisor)
            for buffer in incoming.values():
                self._pool.give_back(buffer)
            outgoing.clear()
            return own if total is own else own.copy_(total)

        receives = [(p, buffer[: own.numel()]) for p, buffer in incoming.items() if own.numel()]
        sends = [(p, piece) for p, piece in outgoing.items() if piece.numel()]
        return self._post(label, nbytes, lambda transfer: self._engine.exchange(receives, sends, key, transfer), fold)

    def all_gather(self, x: Tensor, bounds: Sequence[int], *, key: int, label: str, priority: int = 0) -> Pending:
        """Fills ``x`` with every rank's piece, in place.

        Args:
            x: 1-d tensor, contiguous, of which this rank's piece is set.
            bounds: as in :meth:`reduce_scatter`.
            key: as in :meth:`reduce_scatter`.
            label: as in :meth:`all_reduce`.
            priority: where gathers compete for the link, the lowest is sent first.

        Returns:
            The pending ``x``.
        """
        pieces = [x[a:b] for a, b in itertools.pairwise(bounds)]
        nbytes = pieces[self.rank].nbytes * (self.size - 1)
        assert self.size == 1 or self._engine.gathers is not None, f"group {self.name!r} was made without gathers"
        return self._post(
            label, nbytes, lambda transfer: self._engine.all_gather(x, pieces, key, priority, self._pool, transfer), lambda: x
        )

    def all_to_all(self, x: Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int], *, key: int, label: str) -> Pending:
        """Sends rows of ``x`` to every member and receives rows from every member.

        Args:
            x: contiguous; its dim 0 is cut into ``send_sizes``. It must not be written to until the transfer is waited for.
            send_sizes: rows for each member, by rank in the group; any may be 0.
            receive_sizes: rows from each member: what that member has in ``send_sizes`` for this one.
            key: as in :meth:`reduce_scatter`.
            label: as in :meth:`all_reduce`.

        Returns:
            The pending rows, in the order of the members: ``(sum(receive_sizes), *x.shape[1:])``, dtype and device as ``x``.

        Raises:
            ValueError: there is not one size a member, or ``send_sizes`` do not sum to the rows of ``x``.
        """
        if len(send_sizes) != self.size or len(receive_sizes) != self.size or sum(send_sizes) != x.shape[0]:
            raise ValueError(
                f"all_to_all {label!r} over {self.size} ranks: send_sizes {list(send_sizes)} of {x.shape[0]} rows, receive_sizes "
                f"{list(receive_sizes)}: give one size a rank, which sum to the rows"
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
        """Sends ``x`` to a member. Nobody needs to wait for it: once it has gone, ``x`` is let go of.

        Args:
            x: contiguous. It must not be written to until the transfer has :meth:`Pending.arrived`.
            to: the receiver's rank in the group.
            key: tells this transfer from others in flight between the two, on gloo; NCCL's find each other by the order of posting.
            label: as in :meth:`all_reduce`. Between two members, transfers of one label come in one order.

        Returns:
            The pending transfer, whose result is empty: it keeps no reference to ``x``.
        """
        ends = (self.ranks[self.rank], self.ranks[to])
        return self._post(label, x.nbytes, lambda transfer: self._engine.send(x, to, key, transfer), lambda: torch.empty(0), ends)

    def receive(self, x: Tensor, source: int, *, key: int, label: str) -> Pending:
        """Fills ``x``, contiguous, with what a member sends. To be posted before it is needed; see :meth:`send`."""
        ends = (self.ranks[source], self.ranks[self.rank])
        return self._post(label, 0, lambda transfer: self._engine.receive(x, source, key, transfer), lambda: x, ends)

    def completed(self, x: Tensor, *, label: str) -> Pending:
        """A transfer that has nothing to transfer: complete at once, with ``x`` as its result."""
        return Pending(self.note(label, 0), Arrived(), lambda: x)

    def start_step(self) -> None:
        """To be called before the first reduction of a step: gathers posted earlier are then sent whatever there is to reduce."""
        self._engine.start_step()

    def connect(self, hops: Collection[tuple[int, int]]) -> None:
        """Makes the connections of point-to-point transfers. Collective: all members pass the same (source, target) ranks."""
        self._engine.connect(hops)

    def clock_offset(self) -> float:
        """As :meth:`Engine.clock_offset`."""
        return self._engine.clock_offset()

    # -- bookkeeping -------------------------------------------------------------------------------------------------

    def note(self, label: str, nbytes: int, ranks: tuple[int, ...] | None = None) -> Transfer:
        """Records that a transfer is posted, between all members or ``ranks``, in global ranks."""
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
        return Pending(transfer, waiter, finish)

    def _operation(self, divisor: float | None) -> tuple[Any, float | None]:
        """torch's reduction, and the divisor that is left for afterwards."""
        if divisor == self.size and self._engine.averages:
            return dist.ReduceOp.AVG, None
        return dist.ReduceOp.SUM, divisor

    # -- end ---------------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Ends the group's threads and frees its buffers, unless others use it. All its transfers must have been waited for."""
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
        """Ends the group after a failure: what is under way ends with an error, on this rank and on the others."""
        self.users = 0
        self._engine.abandon()
        self._pool.clear()
