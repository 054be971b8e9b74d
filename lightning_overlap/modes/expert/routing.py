"""Where each row goes: the order in which this rank sends its rows, and the numbers of rows that it sends and receives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_overlap.modes.expert.layout import Layout, Source


def count_rows(indices: Tensor, experts: int) -> Tensor:
    """Counts rows by expert.

    Args:
        indices: the experts of each token, ``(T, k)``; ``experts`` stands for none: the pair was dropped.
        experts: number of experts.

    Returns:
        ``(experts)``, int64, on the device of ``indices``.
    """
    return torch.bincount(indices.reshape(-1), minlength=experts + 1)[:experts]


@dataclass(frozen=True)
class PartRouting:
    """The rows of one part.

    Attributes:
        experts: that this rank computes, counted from its first one.
        sent: places in :attr:`Routing.pairs` of the rows that travel.
        local: places of the rows that do not; empty unless the part is divided.
        send_sizes: rows for each rank.
        received: by rank and expert of the part, rows that come.
        local_sizes: by expert of the part, rows of :attr:`local`.
    """

    experts: range
    sent: slice
    local: slice
    send_sizes: list[int]
    received: list[list[int]]
    local_sizes: list[int]

    @property
    def receive_sizes(self) -> list[int]:
        """Rows from each rank."""
        return [sum(counts) for counts in self.received]

    def sizes(self, source: Source) -> list[int]:
        """Rows of a product by expert."""
        return self.local_sizes if source == "local" else [sum(counts) for counts in zip(*self.received, strict=True)]


@dataclass(frozen=True)
class Routing:
    """Where the rows of one forward go. Rows of an expert keep their order: by token, then by choice.

    Attributes:
        pairs: numbers of the pairs of token and choice ``t * k + j``, in the order of sending: by part, rank and expert. ``(rows)``.
        places: the place of each pair in :attr:`pairs`; of a dropped pair, the number of rows. ``(T * k)``.
        choices: k.
        parts: by part.
    """

    pairs: Tensor
    places: Tensor
    choices: int
    parts: list[PartRouting]

    @property
    def tokens(self) -> Tensor:
        """The token of each row, in the order of sending."""
        return self.pairs // self.choices

    @classmethod
    def of(cls, indices: Tensor, counts: Sequence[int], received: Sequence[Sequence[int]], layout: Layout, rank: int) -> Routing:
        """Sorts the rows.

        Args:
            indices: as in :func:`count_rows`.
            counts: this rank's rows by expert.
            received: by rank, its rows for each of this rank's experts.
            layout: of experts and parts.
            rank: of this rank.
        """
        by_expert = torch.argsort(indices.reshape(-1), stable=True)
        starts = [0]
        for count in counts:
            starts.append(starts[-1] + count)
        segments: list[Tensor] = []
        parts: list[PartRouting] = []
        for part in range(layout.parts):
            divided = layout.is_divided(part)
            sizes = []
            for peer in (*(p for p in range(layout.ranks) if p != rank or not divided), *([rank] if divided else ())):
                chosen = [(expert, layout.rows_in(part, counts[expert])) for expert in layout.experts_in(part, peer)]
                segments += [by_expert[starts[expert] + rows.start : starts[expert] + rows.stop] for expert, rows in chosen]
                sizes.append([len(rows) for _, rows in chosen])
            local = sizes.pop() if divided else []
            send_sizes = [sum(each) for each in sizes]
            if divided:
                send_sizes.insert(rank, 0)
            first = layout.experts_of(rank).start
            experts = range(layout.experts_in(part, rank).start - first, layout.experts_in(part, rank).stop - first)
            coming = [[len(layout.rows_in(part, row[expert])) for expert in experts] for row in received]
            if divided:
                coming[rank] = [0] * len(experts)
            start = parts[-1].local.stop if parts else 0
            stop = start + sum(send_sizes)
            parts.append(PartRouting(experts, slice(start, stop), slice(stop, stop + sum(local)), send_sizes, coming, local))
        pairs = torch.cat(segments)
        places = torch.full_like(by_expert, len(pairs))
        places[pairs] = torch.arange(len(pairs), device=pairs.device)
        return cls(pairs, places, indices.shape[1], parts)
