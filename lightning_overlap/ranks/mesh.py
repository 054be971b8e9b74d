"""The ranks as a mesh with five axes (pp, dp, ep, cp, tp), outermost first."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_overlap.config import Degrees


class ParallelMesh:
    """Arithmetic over the mesh; needs no process group.

    Args:
        degrees: ranks along each axis.
        rank: this process's global rank.
    """

    def __init__(self, degrees: Degrees, rank: int) -> None:
        self.sizes: dict[str, int] = asdict(degrees)
        self.rank = rank

    def coordinates(self, rank: int | None = None) -> dict[str, int]:
        """Place of a rank (this one's) along each axis."""
        left, place = self.rank if rank is None else rank, {}
        for axis in reversed(self.sizes):
            left, place[axis] = divmod(left, self.sizes[axis])
        return place

    def groups(self, *axes: str) -> list[list[int]]:
        """All sets of ranks that differ along ``axes`` only, each in rank order."""
        sets: dict[tuple[int, ...], list[int]] = {}
        for rank in range(math.prod(self.sizes.values())):
            place = self.coordinates(rank)
            sets.setdefault(tuple(place[a] for a in self.sizes if a not in axes), []).append(rank)
        return list(sets.values())
