"""Arithmetic of time intervals. Overlapping intervals count once: durations are lengths of unions, never sums."""

from __future__ import annotations

from collections.abc import Iterable

Interval = tuple[float, float]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Returns disjoint intervals, in order and not empty, that cover the same instants."""
    merged: list[Interval] = []
    for start, end in sorted(i for i in intervals if i[0] < i[1]):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def intersection(first: Iterable[Interval], second: Iterable[Interval]) -> list[Interval]:
    """Returns the instants in both, as :func:`union` does."""
    a, b = union(first), union(second)
    common: list[Interval] = []
    i = j = 0
    while i < len(a) and j < len(b):
        start, end = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if start < end:
            common.append((start, end))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return common


def difference(first: Iterable[Interval], second: Iterable[Interval]) -> list[Interval]:
    """Returns the instants of the first that are not in the second, as :func:`union` does."""
    remaining: list[Interval] = []
    holes = union(second)
    for start, end in union(first):
        for a, b in holes:
            if b <= start or a >= end:
                continue
            if a > start:
                remaining.append((start, a))
            start = min(b, end)
        if start < end:
            remaining.append((start, end))
    return remaining


def length(intervals: Iterable[Interval]) -> float:
    """Returns the length of the union."""
    return sum(end - start for start, end in union(intervals))
