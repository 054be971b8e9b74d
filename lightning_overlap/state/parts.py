"""Which part of the model each rank holds, and which of the ranks that hold the same part writes it to a checkpoint."""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from lightning_overlap.ranks.mesh import ParallelMesh
from lightning_overlap.state.shards import Place


class PartHolder(Protocol):
    """A mode under which a rank holds a part of the model, as far as a checkpoint knows it."""

    def layout_of(self, name: str) -> Hashable:
        """Identifies how a parameter or buffer is cut: those with the same layout are cut over the ranks alike."""

    def part_of(self, layout: Hashable, rank: int) -> Hashable:
        """Identifies the part that a rank holds of a tensor with this layout; None if it holds no part."""

    def place_of(self, name: str) -> Place | None:
        """Where this rank's part lies in what the modes before this one have left of a tensor; None if it is all of that."""


@dataclass
class _Layout:
    """How all modes together cut a tensor.

    Attributes:
        parts: the part of each rank, one item a mode; None: the rank holds no part.
        sharers: by part, the ranks that hold it, in ascending order.
        first: ranks before which no rank holds the same part and the same shard of the optimizer's state of it.
    """

    parts: list[tuple[Hashable, ...] | None]
    sharers: list[list[int]]
    first: set[int] = field(default_factory=set)


class Parts:
    """The parts of a model that modes have cut. Arithmetic, with the same results on all ranks.

    How a tensor is cut is worked out once for each layout: a model has few of them, and many names.

    Args:
        holders: the modes that have cut the model, in their order; none: every rank has all of it.
        mesh: the ranks.
    """

    def __init__(self, holders: Sequence[PartHolder], mesh: ParallelMesh) -> None:
        self._holders = holders
        self._mesh = mesh
        self._layouts: dict[tuple[Hashable, ...], _Layout] = {}

    def _layout(self, name: str) -> _Layout:
        key = tuple(holder.layout_of(name) for holder in self._holders)
        if key not in self._layouts:
            self._layouts[key] = self._new_layout(key)
        return self._layouts[key]

    def _new_layout(self, key: tuple[Hashable, ...]) -> _Layout:
        parts: list[tuple[Hashable, ...] | None] = []
        sharers: dict[tuple[Hashable, ...], list[int]] = {}
        first: dict[tuple[tuple[Hashable, ...], int], int] = {}
        for rank in range(self._mesh.size("world")):
            part = tuple(holder.part_of(layout, rank) for holder, layout in zip(self._holders, key, strict=True))
            if None in part:
                parts.append(None)
                continue
            parts.append(part)
            sharers.setdefault(part, []).append(rank)
            first.setdefault((part, self._mesh.index("gradients", rank)), rank)
        return _Layout(parts, list(sharers.values()), set(first.values()))

    def holds(self, name: str) -> bool:
        """Whether this rank has any part of a parameter or buffer."""
        return self._layout(name).parts[self._mesh.rank] is not None

    def place(self, name: str) -> Place | None:
        """Where this rank's piece lies in a parameter or buffer; None if no mode cuts it."""
        place: Place | None = None
        for holder in self._holders:
            if (inner := holder.place_of(name)) is not None:
                place = inner if place is None else place.cut(inner)
        return place

    def deal(self, tensors: Mapping[str, Tensor]) -> set[str]:
        """The names of what this rank writes: the largest first, each part by the rank of its holders that has least to write so far.

        Args:
            tensors: those of this rank, by name: all names, on every rank.
        """
        places = {name: self.place(name) for name in tensors}
        sizes = {name: (tensors[name] if place is None else place).shape.numel() for name, place in places.items()}
        load = [0] * self._mesh.size("world")
        waiting: dict[int, list[list[tuple[int, int]]]] = {}
        mine = set()
        for name in sorted(sizes, key=lambda name: -sizes[name]):
            layout = self._layout(name)
            heaps = waiting.setdefault(id(layout), [[(0, rank) for rank in ranks] for ranks in layout.sharers])
            for heap in heaps:
                # Another layout may have given a rank more to write since: its entry is brought up to date when it comes to the top.
                while heap[0][0] != load[heap[0][1]]:
                    heapq.heapreplace(heap, (load[heap[0][1]], heap[0][1]))
                writer = heap[0][1]
                load[writer] += max(sizes[name] // len(heaps), 1)
                if writer == self._mesh.rank:
                    mine.add(name)
        return mine

    def is_first(self, name: str) -> bool:
        """Whether no rank before this one holds the same part, and the same shard of the optimizer's state of it."""
        return self._mesh.rank in self._layout(name).first
