"""Runs the experts of a layer that are spread over ranks.

Rows travel to the ranks of their experts, and back (:class:`ExpertDispatch`); or tokens travel to all ranks
(:class:`~lightning_overlap.modes.expert.gather.GatherDispatch`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_overlap.modes.expert.exchange import AllToAll, Combine, Passage, Post, PostDispatch, Wait
from lightning_overlap.modes.expert.grouped import ExpertsForward, LocalExperts
from lightning_overlap.modes.expert.layout import Layout, Source
from lightning_overlap.modes.expert.routing import PartRouting, Routing, count_rows
from lightning_overlap.ranks.group import Group

COUNTS_KEY = 0
"""Key of the exchange of counts. Those of parts follow."""


@dataclass(frozen=True)
class Dispatch(ABC):
    """Runs the experts of one layer.

    Attributes:
        group: the ranks over which the experts are spread.
        layout: of experts and parts. Its ranks are those of the group.
        overlap: transfers run under the products; otherwise each is waited for where it is posted.
        delay_wgrad: products of weight gradients run under the last transfers of the backward.
    """

    group: Group
    layout: Layout
    overlap: bool = True
    delay_wgrad: bool = False

    @abstractmethod
    def __call__(
        self, hidden: Tensor, indices: Tensor, weights: Tensor, experts: LocalExperts, shared: Callable[[], object] | None = None
    ) -> Tensor:
        """Sends each token to its experts and sums what these return. Collective over the group.

        Args:
            hidden: this rank's tokens, ``(T, H)``. T may differ by rank, and be 0.
            indices: by token, its experts, ``(T, k)``; ``layout.experts`` for a pair that is dropped.
            weights: by token, the weights of its experts, ``(T, k)``.
            experts: this rank's experts.
            shared: called while the dispatch is in transfer: runs the shared experts, of which the caller keeps the output.

        Returns:
            ``(T, H)``, in the dtype of ``hidden``.
        """


class ExpertDispatch(Dispatch):
    """Sends a token once for each of its experts.

    The rows of an expert are in one order, by rank and token, and products are those of ``layout`` with and without overlap: the
    results are the same, bit for bit.
    """

    def __call__(
        self, hidden: Tensor, indices: Tensor, weights: Tensor, experts: LocalExperts, shared: Callable[[], object] | None = None
    ) -> Tensor:
        routing = self._route(indices)
        parts = len(routing.parts)
        dispatches, combines = (
            [Passage(self._transfer(name, i, part), self.overlap) for i, part in enumerate(routing.parts)]
            for name in ("dispatch", "combine")
        )
        posted = PostDispatch.apply(hidden.to(experts.dtype), routing, dispatches)
        tokens, local = list(posted[:parts]), list(posted[parts:])
        if shared is not None:
            shared()
        forward = experts.start(delay_wgrad=self.delay_wgrad)
        for number, source in self.layout.products():
            part = routing.parts[number]
            if source == "local":
                local[number] = forward(local[number], part.experts, part.sizes(source))
                continue
            rows = _compute(forward, Wait.apply(tokens[number], dispatches[number]), part, source)
            tokens[number] = Post.apply(rows, combines[number])
        return Combine.apply(weights, routing, combines, *tokens, *local).to(hidden.dtype)

    def _route(self, indices: Tensor) -> Routing:
        layout, group = self.layout, self.group
        mine = len(layout.experts_of(group.rank))
        counts = count_rows(indices, layout.experts)
        sizes = [len(layout.experts_of(rank)) for rank in range(group.size)]
        pending = group.all_to_all(counts, sizes, [mine] * group.size, key=COUNTS_KEY, label="expert.counts")
        received = pending.wait().view(group.size, mine).tolist()
        return Routing.of(indices, counts.tolist(), received, layout, group.rank)

    def _transfer(self, name: str, number: int, part: PartRouting) -> AllToAll:
        sizes = part.send_sizes, part.receive_sizes
        send, receive = sizes if name == "dispatch" else sizes[::-1]
        first = COUNTS_KEY + 1 + 4 * number + 2 * (name == "combine")
        return AllToAll(self.group, send, receive, first, first + 1, f"expert.{name}", number)


def _compute(forward: ExpertsForward, rows: Tensor, part: PartRouting, source: Source) -> Tensor:
    """Computes rows that come by rank and expert; the products need them by expert and rank."""
    table = part.received
    if len(part.experts) <= 1 or sum(map(any, table)) <= 1:
        return forward(rows, part.experts, part.sizes(source))
    by_rank = rows.split([count for counts in table for count in counts])
    experts = len(part.experts)
    by_expert = torch.cat([by_rank[rank * experts + i] for i in range(experts) for rank in range(len(table))])
    computed = forward(by_expert, part.experts, part.sizes(source)).split([counts[i] for i in range(experts) for counts in table])
    return torch.cat([computed[i * len(table) + rank] for rank in range(len(table)) for i in range(experts)])
