"""Offsets of parameters and buckets in the flat buffers. Arithmetic only.

The rules are Megatron-Core's, since they decide the bytes of sharded states: parameters in reverse order of registration
(close to the order of their gradients); a bucket closes once it holds at least ``bucket_size`` elements, and never splits
a parameter. Ours is that buckets may grow towards the middle. With sharding, each parameter starts at a multiple of 64 elements
and each bucket ends at a multiple of ``lcm(shards, 128)``, or ``lcm(shards, 128, 2**16)`` for NCCL's bus bandwidth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

PARAMETER_ALIGNMENT = 64


def pad(offset: int, multiple: int) -> int:
    """``offset`` rounded up to a multiple."""
    return -(-offset // multiple) * multiple


def bucket_multiple(shards: int, high_busbw: bool = False) -> int:
    """Returns the number of elements of which the end of a sharded bucket is a multiple."""
    return math.lcm(shards, 128, 2**16 if high_busbw else 1)


@dataclass(frozen=True)
class Slot:
    """Offsets of a parameter in the flat buffer, in elements."""

    parameter: int
    start: int
    end: int


@dataclass(frozen=True)
class Bucket:
    """Offsets of a bucket in the flat buffer, in elements; ``end`` includes padding."""

    index: int
    start: int
    end: int
    slots: tuple[Slot, ...]

    def bounds(self, shards: int, *, whole_parameters: bool) -> tuple[int, ...]:
        """Returns the ``shards + 1`` offsets from ``start`` between which the ranks' shards lie.

        Shards are equal, or hold whole parameters: each parameter then belongs to the rank in whose equal shard its middle lies. So
        a shard's size is far from an equal share only if a single parameter's is.
        """
        size = self.end - self.start
        equal = [size * r // shards for r in range(shards + 1)]
        if not whole_parameters:
            return tuple(equal)
        cuts = [0] * shards + [size]
        for rank in range(1, shards):
            starts = [s.start - self.start for s in self.slots if (s.start + s.end) / 2 - self.start >= equal[rank]]
            cuts[rank] = min(starts, default=size)
        return tuple(cuts)


def lay_out(
    sizes: Sequence[int],
    *,
    bucket_size: int | None,
    largest: int = 0,
    shards: int = 1,
    sharded: bool,
    high_busbw: bool = False,
) -> tuple[Bucket, ...]:
    """Divides parameters into buckets, from the last parameter to the first.

    Each transfer takes CPU time, whatever its size, so few are better. But nothing hides the last reduction of a backward and the
    first gather of a forward, and a link waits for the first bucket of a backward. So only the buckets at both ends must be small:
    with ``largest``, a bucket may have half as many elements as there are before it, or after it if these are fewer. The link is
    then still busy with those before it when its gradients are complete.

    Args:
        sizes: elements of each parameter, in the order of registration (or in reverse of the order of their gradients).
        bucket_size: a bucket closes at this number of elements; None: one bucket.
        largest: elements at which the largest bucket closes; without it, or if it is not larger than ``bucket_size``, all are alike.
        shards: ranks over which a bucket is sharded.
        sharded: whether the optimizer is distributed. If not, buckets are not padded.
        high_busbw: pad buckets to multiples of 2**16 elements.
    """
    buckets: list[Bucket] = []
    slots: list[Slot] = []
    start = offset = 0
    total = sum(sizes)

    def close() -> None:
        nonlocal start, offset, slots
        if slots:
            end = pad(offset, bucket_multiple(shards, high_busbw)) if sharded else offset
            buckets.append(Bucket(len(buckets), start, end, tuple(slots)))
            start, offset, slots = end, end, []

    for parameter in reversed(range(len(sizes))):
        if sharded:
            offset = pad(offset, PARAMETER_ALIGNMENT)
        slots.append(Slot(parameter, offset, offset + sizes[parameter]))
        offset += sizes[parameter]
        if bucket_size is not None and offset - start >= max(bucket_size, min(largest, start // 2, (total - offset) // 2)):
            close()
    close()
    return tuple(buckets)


def lateness(layout: Sequence[Bucket], sizes: Sequence[int], order: Sequence[int]) -> float:
    """Returns how late buckets can be sent, from 0 to 1: the part of all gradients that exists when a bucket is complete.

    The mean over the buckets, weighted by their sizes.

    Args:
        layout: the buckets.
        sizes: elements of each parameter.
        order: the parameters in the order of their gradients.
    """
    elements_until, total = {}, 0
    for parameter in order:
        total += sizes[parameter]
        elements_until[parameter] = total
    ready = sum(sum(sizes[s.parameter] for s in b.slots) * max(elements_until[s.parameter] for s in b.slots) for b in layout)
    return ready / total**2 if total else 0.0
