"""A schedule run on paper: how long it takes, who stands idle, what is held. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lightning_overlap.decision import ConfigError
from lightning_overlap.steps.schedule import Action, Schedule


@dataclass(frozen=True)
class Simulation:
    """How a schedule would run.

    Attributes:
        seconds: from the first action to the end of the last.
        spans: rank, action, start and end in seconds, each rank's in its order.
        busy: by rank, the seconds in which it computes.
        peak: by rank, the most stage activations held at once: from F until the end of B, or of W where backward is split.
        exposed: seconds more than with transfers that take no time.
    """

    seconds: float
    spans: tuple[tuple[int, Action, float, float], ...]
    busy: tuple[float, ...]
    peak: tuple[int, ...]
    exposed: float

    @property
    def bubble(self) -> float:
        """The part of the ranks' time in which they do not compute, 0 to 1."""
        return 1 - sum(self.busy) / (len(self.busy) * self.seconds)


def simulate(
    schedule: Schedule,
    *,
    forward: float | Sequence[float] = 1.0,
    backward: float | Sequence[float] = 2.0,
    weight: float | Sequence[float] | None = None,
    transfer: float = 0.0,
    overlapped: bool = True,
) -> Simulation:
    """Runs a schedule on paper: an action starts when its rank is free and what it needs has arrived.

    Times are for one microbatch, the same for all stages or one for each.

    Args:
        schedule: a valid one.
        forward: seconds of a forward.
        backward: seconds of a whole backward.
        weight: seconds of the weights' part of it; by default half of it.
        transfer: seconds of a transfer between two ranks. A rank sends one at a time, in the order of its actions: what goes to the
            next stage and what goes back share its link.
        overlapped: transfers run beside compute. Otherwise sender and receiver both stand still for it, at its place in
            :func:`in_turn`: the plain twin.

    Raises:
        ConfigError: as many times are given as there are not stages; or the schedule stands still.
    """
    stages = range(schedule.stages)
    forwards, backwards = _by_stage("forward", forward, schedule), _by_stage("backward", backward, schedule)
    weights = [b / 2 for b in backwards] if weight is None else _by_stage("weight", weight, schedule)
    cost = {"F": forwards, "B": backwards, "I": [backwards[s] - weights[s] for s in stages], "W": weights}

    free, busy = [0.0] * schedule.ranks, [0.0] * schedule.ranks
    held, peak = [0] * schedule.ranks, [0] * schedule.ranks
    computed = [0.0] * schedule.ranks  # until when a rank's last action ran, after which its transfers can begin
    link_free = [0.0] * schedule.ranks
    here: dict[Action, float] = {}  # when its own stage can go on from it
    there: dict[Action, float] = {}  # when the next or previous stage can
    spans = []

    def send(action: Action, source: int, target: int) -> None:
        begin = max(here[action.gives], link_free[source], 0.0 if overlapped else computed[target])
        there[action.gives] = link_free[source] = arrival = begin + transfer
        if not overlapped:
            free[source], free[target] = max(free[source], arrival), max(free[target], arrival)

    for event in schedule.order() if overlapped else in_turn(schedule):
        if isinstance(event, Handover):
            send(event.after, event.source, event.target)
            continue
        action = event
        rank, seconds = schedule.placement[action.stage], cost[action.kind][action.stage]
        arrived = [(here if need.stage == action.stage else there)[need] for need in schedule.needs(action)]
        start = max(free[rank], *arrived, 0.0)
        busy[rank] += seconds
        held[rank] += {"F": 1, "I": 0, "B": -1, "W": -1}[action.kind]
        peak[rank] = max(peak[rank], held[rank])
        free[rank] = computed[rank] = here[action.gives] = there[action.gives] = start + seconds
        if overlapped and (target := schedule.receiver(action)) is not None:
            send(action, rank, target)
        spans.append((rank, action, start, start + seconds))
    seconds = max(free)
    hindered = transfer or not overlapped
    unhindered = simulate(schedule, forward=forwards, backward=backwards, weight=weights).seconds if hindered else seconds
    return Simulation(seconds, tuple(spans), tuple(busy), tuple(peak), seconds - unhindered)


class Handover(NamedTuple):
    """What an action gives to another rank.

    Attributes:
        after: the action.
        source: its rank.
        target: the rank that needs it.
    """

    after: Action
    source: int
    target: int


def in_turn(schedule: Schedule) -> list[Action | Handover]:
    """All ranks' actions and transfers in one order, for the plain twin, in which both ends stand still for a transfer.

    It is that of a run with transfers that take no time and backwards of two forwards: each transfer comes when its action is over,
    before whatever either end has not begun by then. A rank that does its part of one order for all can wait for no other for
    ever: of what is not over yet, the first in the order has both its ends ready.
    """
    events: list[tuple[float, bool, int, Action | Handover]] = []
    for rank, action, start, end in simulate(schedule).spans:
        events.append((start, True, rank, action))
        if (target := schedule.receiver(action)) is not None:
            events.append((end, False, rank, Handover(action, rank, target)))
    return [event for *_, event in sorted(events, key=lambda event: event[:3])]


def _by_stage(name: str, seconds: float | Sequence[float], schedule: Schedule) -> list[float]:
    times = list(seconds) if isinstance(seconds, Sequence) else [seconds] * schedule.stages
    if len(times) != schedule.stages:
        raise ConfigError(f"{name} has {len(times)} times, and schedule {schedule.name} {schedule.stages} stages: give one for each")
    return times


def draw(schedule: Schedule) -> str:
    """The schedule over time, if transfers are hidden and a backward takes twice as long as a forward; dots are the bubble."""
    width = max(len(str(action)) for row in schedule.actions for action in row) + 1
    lines = [""] * schedule.ranks
    for rank, action, start, end in simulate(schedule).spans:
        lines[rank] = lines[rank].ljust(round(start) * width, ".") + str(action).ljust(round(end - start) * width)
    return "\n".join(f"rank {rank}  {line.rstrip()}" for rank, line in enumerate(lines)) + "\n"
