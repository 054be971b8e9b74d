"""Decides which rank writes each part of a sharded model to a checkpoint, so that no part is written twice."""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from lightning_overlap.ranks.mesh import GroupName, ParallelMesh
from lightning_overlap.state.shards import Place


class PartHolder(Protocol):
    """The part of :class:`~lightning_overlap.modes.base.Holder` that checkpoints use."""

    def layout_of(self, name: str) -> Hashable:
        """Identifies how a parameter or buffer is sharded: those with the same layout are sharded over the ranks alike."""

    def part_of(self, layout: Hashable, rank: int) -> Hashable:
        """Identifies the part that a rank holds of a tensor with this layout; None if it holds no part."""

    def sharers_of(self, layout: Hashable) -> GroupName | None:
        """Name of the group over which the optimizer's state of a tensor with this layout is sharded; None: the usual one."""

    def place_of(self, name: str) -> Place | None:
        """Position of this rank's part in the shard that the modes before this one made; None if this mode does not shard it."""


@dataclass
class _Layout:
    """How all modes together shard a tensor.

    Attributes:
        parts: by rank, its part, with an item for each mode; None if the rank holds no part.
        sharers: by part, the ranks that hold it, in ascending order.
        first: the first rank of each set that holds the same part and the same shard of its optimizer state.
    """

    parts: list[tuple[Hashable, ...] | None]
    sharers: list[list[int]]
    first: set[int] = field(default_factory=set)


class Parts:
    """The parts of a sharded model. Every rank computes the same results, without communication.

    The work is done once for each layout, because a model has few layouts and many names.

    Args:
        holders: the modes that shard the model, in the order in which they were applied; empty if every rank has the unsharded model.
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
        asked = [holder.sharers_of(layout) for holder, layout in zip(self._holders, key, strict=True)]
        group: GroupName = next(filter(None, asked), "gradients")
        for rank in range(self._mesh.size("world")):
            part = tuple(holder.part_of(layout, rank) for holder, layout in zip(self._holders, key, strict=True))
            if None in part:
                parts.append(None)
                continue
            parts.append(part)
            sharers.setdefault(part, []).append(rank)
            first.setdefault((part, self._mesh.index(group, rank)), rank)
        return _Layout(parts, list(sharers.values()), set(first.values()))

    def holds(self, name: str) -> bool:
        """Whether this rank has any part of a parameter or buffer."""
        return self._layout(name).parts[self._mesh.rank] is not None

    def place(self, name: str) -> Place | None:
        """Position of this rank's shard of a parameter or buffer; None if no mode shards it."""
        place: Place | None = None
        for holder in self._holders:
            if (inner := holder.place_of(name)) is not None:
                place = inner if place is None else place.cut(inner)
        return place

    def names_to_write(self, tensors: Mapping[str, Tensor]) -> set[str]:
        """Returns the names of the tensors that this rank writes.

        The largest come first. Each part goes to the rank that has least to write so far, among those that hold it.

        Args:
            tensors: of this rank, by name. Every rank passes all names.
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
                # Another layout may have given this rank more to write: its entry is corrected when it reaches the top.
                while heap[0][0] != load[heap[0][1]]:
                    heapq.heapreplace(heap, (load[heap[0][1]], heap[0][1]))
                writer = heap[0][1]
                load[writer] += max(sizes[name] // len(heaps), 1)
                if writer == self._mesh.rank:
                    mine.add(name)
        return mine

    def is_first(self, name: str) -> bool:
        """Whether this is the first rank with the same part and the same shard of its optimizer state."""
        return self._mesh.rank in self._layout(name).first
