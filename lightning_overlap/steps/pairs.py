"""Pairs the forwards of a schedule with the backwards next to them, to run beside each other in lanes. Standard library only.

    1f1b on one rank      F0.0 B0.0 F0.1 B0.1 F0.2 B0.2 F0.3 B0.3
    in pairs              F0.0 F0.1|B0.0 F0.2|B0.1 F0.3|B0.2 B0.3

Each pair of M microbatches hides what a forward and a backward wait for; the first forward and the last backward have no partner. Two
forwards beside each other (F0.0 F0.1, then F0.2|B0.0 F0.3|B0.1) would leave two backwards without one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

from lightning_overlap.steps.schedule import Action, Schedule, are_a_pair

Unit = tuple[Action, ...]
"""What a rank runs at a time: an action, or a pair."""


def pair(schedule: Schedule) -> Schedule:
    """Pairs each forward with the backward before or after it, where no rank would wait forever.

    Both actions of a pair start when the inputs of both have arrived. If ranks would then wait for each other, the pairs at which they
    wait become two actions again.

    Args:
        schedule: without pairs.
    """
    queues = [_pairs_of(row) for row in schedule.actions]
    rows: list[list[Unit]] = [[] for _ in queues]
    results: set[Action] = set()

    def can_run(unit: Sequence[Action]) -> bool:
        return all(results.issuperset(schedule.needs(action)) for action in unit)

    while any(queues):
        has_run = False
        for row, queue in zip(rows, queues, strict=True):
            while queue and can_run(_forward_first(queue[-1])):
                row.append(_forward_first(queue.pop()))
                results.update(action.result for action in row[-1])
                has_run = True
        if not has_run:
            for queue in queues:
                if queue and len(queue[-1]) > 1 and can_run(queue[-1][:1]):
                    first, second = queue.pop()
                    queue += [(second,), (first,)]
    paired = frozenset(unit[0] for unit in chain(*rows) if len(unit) > 1)
    return replace(schedule, actions=tuple(tuple(chain(*row)) for row in rows), paired=paired)


def _pairs_of(row: Sequence[Action]) -> list[Unit]:
    """Pairs the actions of a rank from its first one on. Returns the last unit first; a pair is in the order of the row."""
    units: list[Unit] = []
    for action in row:
        if units and are_a_pair(*_forward_first((*units[-1], action))):
            units[-1] += (action,)
        else:
            units.append((action,))
    return units[::-1]


def _forward_first(unit: Unit) -> Unit:
    return tuple(sorted(unit, key=lambda action: action.kind != "F"))
