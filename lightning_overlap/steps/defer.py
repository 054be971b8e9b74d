"""Defers a part of the last stage's weight gradients in a schedule, so that gradients leave it sooner. Standard library only."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from lightning_overlap.steps.schedule import Action, Schedule
from lightning_overlap.steps.simulate import simulate

_EQUAL = 1e-9
"""Simulated times that differ by less, relatively, are the same."""


def defer(schedule: Schedule, forward: Sequence[float], backward: Sequence[float], weight: float, limit: int = 0) -> Schedule:
    """The same, with a part of the last stage's weights' gradients, its head's say, computed later: what it sends goes out sooner.

    They are computed where the stage's rank stands idle, and after its last action, when ranks in front are still busy. As few
    microbatches' are left at once as win the most on paper.

    Args:
        schedule: with whole backwards of its last stage.
        forward: by stage, time of a forward.
        backward: by stage, time of a whole backward.
        weight: the time of what is put off, of the last stage's ``backward``.
        limit: the most microbatches of which it may be left at once; 0: any number.
    """
    weights = [*[0.0] * (schedule.stages - 1), weight]
    most = min(limit or schedule.microbatches, schedule.microbatches)
    limits = [*(n for n in (0, *(2**k for k in range(most.bit_length()))) if n < most), most]
    made = [_put_off(schedule, forward, backward, weight, limit) for limit in limits]
    seconds = [simulate(one, forward=forward, backward=backward, weight=weights).seconds for one in made]
    return next(one for one, time in zip(made, seconds, strict=True) if time <= min(seconds) * (1 + _EQUAL))


def _put_off(schedule: Schedule, forward: Sequence[float], backward: Sequence[float], weight: float, limit: int) -> Schedule:
    """:func:`defer`, with at most ``limit`` of them left after an action.

    The oldest that is left is computed where it is over before the rank's next action can start. In a shorter gap it would hold up
    that action and all behind it, which on paper loses about all that is to be won.
    """
    last = schedule.stages - 1
    rank = schedule.placement[last]
    free = [0.0] * schedule.ranks
    over: dict[Action, float] = {}
    left: deque[Action] = deque()
    row: list[Action] = []
    for action in schedule.order():
        here, stage = schedule.placement[action.stage], action.stage
        start = max([free[here], *(over[need] for need in schedule.needs(action))])
        seconds = forward[stage] if action.kind == "F" else backward[stage]
        if here == rank:
            while left and free[rank] + weight <= start * (1 + _EQUAL):
                row.append(left.popleft())
                free[rank] += weight
            if stage == last and action.kind == "B":
                left.append(action._replace(kind="W"))
                action, seconds = action._replace(kind="I"), seconds - weight
            row.append(action)
        over[action.gives] = free[here] = start + seconds
        if len(left) > limit:
            row.append(left.popleft())
            free[rank] += weight
    rows = list(schedule.actions)
    rows[rank] = (*row, *left)
    return replace(schedule, actions=tuple(rows))
