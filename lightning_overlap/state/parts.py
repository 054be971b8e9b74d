"""Which part of the model each rank holds, as the modes have cut it; and which of those that hold the same one writes it."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from lightning_overlap.modes.base import Holder
from lightning_overlap.ranks.mesh import ParallelMesh
from lightning_overlap.state.shards import Place


@dataclass
class Parts:
    """See the module's docstring. Arithmetic that comes to the same on all ranks.

    Attributes:
        modes: those that have cut the model; none: every rank has all of it.
        mesh: the ranks.
    """

    modes: Sequence[Holder]
    mesh: ParallelMesh

    def _of(self, name: str, rank: int) -> tuple[Hashable, ...] | None:
        found = tuple(mode.part_of(name, rank) for mode in self.modes)
        return None if None in found else found

    def holds(self, name: str) -> bool:
        """Whether this rank has any part of a parameter or buffer."""
        return self._of(name, self.mesh.rank) is not None

    def place(self, name: str) -> Place | None:
        """Where this rank's piece lies in it; None if it is whole."""
        return next((place for mode in self.modes if (place := mode.place_of(name)) is not None), None)

    def deal(self, tensors: Mapping[str, Tensor]) -> set[str]:
        """Whose part this rank writes: the largest first, each by the rank that has least to write of those that hold it.

        Args:
            tensors: as they are here, by name: all that there are, on every rank.
        """
        places = {name: self.place(name) for name in tensors}
        sizes = {name: (tensors[name] if place is None else place).shape.numel() for name, place in places.items()}
        load = [0] * self.mesh.size("world")
        mine = set()
        for name in sorted(sizes, key=lambda name: -sizes[name]):
            holders: dict[tuple[Hashable, ...], list[int]] = {}
            for rank in range(len(load)):
                if (part := self._of(name, rank)) is not None:
                    holders.setdefault(part, []).append(rank)
            for ranks in holders.values():
                writer = min(ranks, key=load.__getitem__)
                load[writer] += max(sizes[name] // len(holders), 1)
                if writer == self.mesh.rank:
                    mine.add(name)
        return mine

    def is_first(self, name: str) -> bool:
        """Whether no rank before this one holds the same part, and the same shard of the optimizer's state of it."""
        part, shard = self._of(name, self.mesh.rank), self.mesh.index("gradients")
        earlier = range(self.mesh.rank)
        return not any(self.mesh.index("gradients", rank) == shard and self._of(name, rank) == part for rank in earlier)
