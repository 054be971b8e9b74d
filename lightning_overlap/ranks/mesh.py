"""The ranks as a mesh with five axes (pp, dp, ep, cp, tp), outermost first."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Degrees:
    """Ranks along each axis of the mesh, outermost first."""

    pp: int = 1
    dp: int = 1
    ep: int = 1
    cp: int = 1
    tp: int = 1


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
