"""NCCL: its asynchronous collectives, in the order of posting. The host never waits for the device during a step."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_overlap.ranks.clock import Clock, Marks
from lightning_overlap.ranks.engine import Engine, Piece, PostedWork, WorkWaiter
from lightning_overlap.ranks.members import Members
from lightning_overlap.ranks.transfer import Transfer, Waiter


class NcclEngine(Engine):
    """Posts gathers on one communicator and other transfers on another. Arguments: as in :class:`Engine`."""

    keyed = False
    in_one_order = True
    averages = True
    scatters = True
    sums_sparse = False
    can_poll = True
    _recorder = "_dump_nccl_trace_json"

    def __init__(self, members: Members, process_group: Any, gathers: Any = None) -> None:
        super().__init__(members, process_group, gathers)
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._observer = torch.cuda.Stream()  # only waits for transfers, and so shows their ends
        # Ranks must end a communicator together, and garbage collection is not synchronised.
        self._end.detach()

    def exchange(self, receives: Sequence[Piece], sends: Sequence[Piece], key: int, transfer: Transfer) -> Waiter:
        # In one batch: NCCL runs the operations of a communicator one after the other, so each rank's first receive would wait for
        # a send that comes after the peer's first receive.
        ops = [dist.P2POp(dist.irecv, x, self.members.ranks[peer], self.connected) for peer, x in receives]
        ops += [dist.P2POp(dist.isend, x, self.members.ranks[peer], self.connected) for peer, x in sends]
        return WorkWaiter(self, transfer.label, [(work, -1) for work in dist.batch_isend_irecv(ops)] if ops else [])

    def all_to_all(
        self, received: Tensor, x: Tensor, receive_sizes: Sequence[int], send_sizes: Sequence[int], key: int, transfer: Transfer
    ) -> Waiter:
        work = dist.all_to_all_single(received, x, list(receive_sizes), list(send_sizes), self.connected, async_op=True)
        return WorkWaiter(self, transfer.label, [(work, -1)], x)  # as in send

    def send(self, x: Tensor, peer: int, key: int, transfer: Transfer) -> Waiter:
        work = self.post(transfer.label, dist.isend, x, peer, self.process_group, key)
        # NCCL frees x as soon as a stream waits, which may be another stream than that of x.
        return WorkWaiter(self, transfer.label, [work], x)

    def mark(self, waiter: Waiter, clock: Clock) -> Marks | None:
        return Marks(clock, waiter.works, self._observer) if isinstance(waiter, WorkWaiter) else None

    def wait_for(self, label: str, works: Sequence[PostedWork]) -> None:
        for work, peer in works:
            self.wait_for_one(label, work, peer)  # the current stream waits, the host does not

    def broadcast(self, x: Tensor, source: int, *, on_host: bool) -> None:
        if on_host:
            super().broadcast(x, source, on_host=True)
        else:
            dist.broadcast(x, self.members.ranks[source], self.connected, async_op=True).wait()

    def connect(self, hops: Collection[tuple[int, int]]) -> None:
        # NCCL makes a connection at the first transfer, for which the hosts of both ends wait. Two ranks whose first transfers are
        # sends to each other would wait for ever.
        dist.all_reduce(torch.zeros(1, device=self.device), group=self.connected)  # in which every member takes part
        mine: list[tuple[Callable[..., Any], int]] = [
            (dist.isend, target) for source, target in sorted(hops) if source == self.members.rank
        ]
        mine += [(dist.irecv, source) for source, target in sorted(hops) if target == self.members.rank]
        ops = [dist.P2POp(what, torch.zeros(1, device=self.device), self.members.ranks[peer], self.connected) for what, peer in mine]
        for work in dist.batch_isend_irecv(ops) if ops else ():
            work.wait()
        torch.cuda.synchronize()
