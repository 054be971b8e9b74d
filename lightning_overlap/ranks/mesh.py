"""The ranks as a mesh, and named groups of ranks. Only this file knows the axes of the mesh."""

from __future__ import annotations

import math
from datetime import timedelta
from typing import Literal

from lightning_overlap.ranks.degrees import Degrees
from lightning_overlap.ranks.group import Group
from lightning_overlap.ranks.link import Urgency
from lightning_overlap.ranks.world import make_group

GroupName = Literal[
    "samples", "gradients", "experts", "expert_gradients", "tensor", "context", "pipeline", "batch", "sequence", "stage", "world"
]
"""The ranks of each named group:

    samples           ranks that hold the same part of the model and see different samples: sampler, metrics, ``reduce``
    gradients         ranks whose gradients of the same parameters are summed: they see different samples or tokens
    experts           ranks over which the experts of a layer are spread
    expert_gradients  ranks of a stage that hold the same experts
    tensor            ranks that hold different parts of a layer
    context           ranks that see different tokens of the same sequences
    pipeline          ranks that hold different stages
    batch             ranks that share a batch
    sequence          ranks of a stage that share a batch
    stage             ranks that hold the same stage
    world             all ranks
"""
_AXES: dict[str, tuple[str, ...]] = {
    "samples": ("dp",),
    "gradients": ("dp", "cp"),
    "tensor": ("tp",),
    "context": ("cp",),
    "pipeline": ("pp",),
    "batch": ("pp", "cp", "tp"),
    "sequence": ("cp", "tp"),
    "stage": ("dp", "cp", "tp"),
    "world": ("pp", "dp", "cp", "tp"),
}


class ParallelMesh:
    """Ranks along four axes (pp, dp, cp, tp), outermost first: neighbours in a node are tensor ranks.

    Experts are a second view of the same ranks: the ranks of a pipeline stage, which are consecutive, are divided into groups of
    ``degrees.expert`` consecutive ranks. So experts spread over tensor ranks first, then over context ranks, then over data ranks.

    The arithmetic needs no process group: Lightning asks for samplers before there is one.

    Args:
        degrees: sizes of the kinds of parallelism.
        rank: this process's global rank.
    """

    def __init__(self, degrees: Degrees, rank: int) -> None:
        self.degrees = degrees
        self.rank = rank
        self._sizes = {"pp": degrees.pipeline, "dp": degrees.data, "cp": degrees.context, "tp": degrees.tensor}
        self._groups: dict[tuple[tuple[tuple[int, ...], ...], str], Group] = {}

    def size(self, name: GroupName) -> int:
        """Returns the number of ranks in a group of that name."""
        if name in ("experts", "expert_gradients"):
            return self.degrees.expert if name == "experts" else self.degrees.stage // self.degrees.expert
        return math.prod(self._sizes[axis] for axis in _AXES[name])

    def index(self, name: GroupName, rank: int | None = None) -> int:
        """Returns a rank's index in its group of that name, in ascending order of ranks; by default this rank's."""
        return self._position(name, self.rank if rank is None else rank)[1]

    def sets(self, name: GroupName) -> list[list[int]]:
        """Returns the global ranks of all groups of that name, each in ascending order. Every rank is in exactly one."""
        sets: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.degrees.world):
            sets.setdefault(self._position(name, rank)[0], []).append(rank)
        return list(sets.values())

    def group(
        self,
        name: GroupName,
        timeout: timedelta,
        traffic: str | None = None,
        *,
        gathers: bool = True,
        background: Urgency | None = None,
    ) -> Group:
        """Returns this rank's group of that name. Collective over the world: all ranks make the same calls in one order.

        A set of ranks is connected once for each kind of traffic, under any name: transfers of different traffic must not wait for
        each other. Each caller closes the group, which ends with the last one.

        Args:
            name: of the ranks.
            timeout: how long a transfer may take.
            traffic: kind of its transfers, such as ``data``, also its name in errors; None: blocking collectives and objects only.
            gathers: whether its traffic has all-gathers.
            background: as in :func:`make_group`.

        Raises:
            ConfigError: another rank has announced one.
            TransferError: another rank has announced another error, or the members have not met in time.
        """
        sets = self.sets(name)
        key = tuple(map(tuple, sets)), traffic or "collectives"
        group = self._groups.get(key)
        if group is not None and group.users:
            group.users += 1
            return group
        transfers = traffic is not None
        group = make_group(sets, traffic or name, timeout, gathers=gathers and transfers, threads=transfers, background=background)
        self._groups[key] = group
        return group

    def _position(self, name: GroupName, rank: int) -> tuple[tuple[int, ...], int]:
        """Returns an identifier of the rank's group among those of that name, and the rank's index in it."""
        if name in ("experts", "expert_gradients"):
            stage, of_stage = divmod(rank, self.degrees.stage)
            block, expert = divmod(of_stage, self.degrees.expert)
            return ((stage, block), expert) if name == "experts" else ((stage, expert), block)
        others, index, step, remaining = [], 0, 1, rank
        for axis, size in reversed(self._sizes.items()):
            remaining, coordinate = divmod(remaining, size)
            if axis in _AXES[name]:
                index += step * coordinate
                step *= size
            else:
                others.append(coordinate)
        return tuple(others), index
