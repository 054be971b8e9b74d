"""Defers a part of the last stage's weight gradients, so that it sends gradients of inputs sooner. Standard library only."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from lightning_overlap.steps.schedule import Action, Schedule
from lightning_overlap.steps.simulate import simulate

_EQUAL = 1e-9
"""Simulated times with a smaller relative difference count as equal."""


def defer(schedule: Schedule, forward: Sequence[float], backward: Sequence[float], weight: float, limit: int = 0) -> Schedule:
    """Splits the backwards of the last stage and defers the ``W``, the gradients of its head's weights, for example.

    The rank computes each ``W`` while it is idle, or after its last action, while earlier ranks are still busy. Of all numbers of
    ``W`` pending at once that are simulated, the smallest with the shortest step is used.

    Args:
        schedule: a schedule whose last stage has no split backwards.
        forward: seconds of a forward, by stage.
        backward: seconds of a complete backward, by stage.
        weight: seconds of a ``W`` of the last stage, a part of its ``backward``.
        limit: the most microbatches whose ``W`` may be pending at once; 0: any number.
    """
    weights = [*[0.0] * (schedule.stages - 1), weight]
    most = min(limit or schedule.microbatches, schedule.microbatches)
    limits = [*(n for n in (0, *(2**k for k in range(most.bit_length()))) if n < most), most]
    candidates = [_defer_up_to(schedule, forward, backward, weight, limit) for limit in limits]
    seconds = [simulate(candidate, forward=forward, backward=backward, weight=weights).seconds for candidate in candidates]
    return next(candidate for candidate, time in zip(candidates, seconds, strict=True) if time <= min(seconds) * (1 + _EQUAL))


def _defer_up_to(schedule: Schedule, forward: Sequence[float], backward: Sequence[float], weight: float, limit: int) -> Schedule:
    """Like :func:`defer`, with at most ``limit`` pending ``W`` after an action.

    The oldest pending ``W`` runs in a gap that is long enough for it. In a shorter gap it would delay the rank's next action and all
    that depend on it, which in simulations loses about as much as deferral gains.
    """
    last = schedule.stages - 1
    rank = schedule.placement[last]
    free = [0.0] * schedule.ranks
    ends: dict[Action, float] = {}
    pending: deque[Action] = deque()
    row: list[Action] = []
    for action in itertools.chain(*schedule.order()):
        holder, stage = schedule.placement[action.stage], action.stage
        start = max([free[holder], *(ends[need] for need in schedule.needs(action))])
        seconds = forward[stage] if action.kind == "F" else backward[stage]
        if holder == rank:
            while pending and free[rank] + weight <= start * (1 + _EQUAL):
                row.append(pending.popleft())
                free[rank] += weight
            if stage == last and action.kind == "B":
                pending.append(action._replace(kind="W"))
                action, seconds = action._replace(kind="I"), seconds - weight
            row.append(action)
        ends[action.result] = free[holder] = start + seconds
        if len(pending) > limit:
            row.append(pending.popleft())
            free[rank] += weight
    rows = list(schedule.actions)
    rows[rank] = (*row, *pending)
    return replace(schedule, actions=tuple(rows))
