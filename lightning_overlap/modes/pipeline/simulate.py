"""A schedule run on paper: how long it takes, who stands idle, what is held. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_overlap.decision import ConfigError

if TYPE_CHECKING:
    from lightning_overlap.modes.pipeline.schedule import Action, Schedule


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
        transfer: seconds of a transfer between two ranks. A rank has one on its way to each other rank at a time, in the order of
            its actions.
        overlapped: transfers run beside compute. Otherwise an action that sends ends only when its transfer has: the plain twin,
            whose receives are posted ahead, so that nothing else holds up the receiver than that it has not got what it needs.

    Raises:
        ConfigError: as many times are given as there are not stages; or the schedule stands still.
    """
    stages = range(schedule.stages)
    forwards, backwards = _by_stage("forward", forward, schedule), _by_stage("backward", backward, schedule)
    weights = [b / 2 for b in backwards] if weight is None else _by_stage("weight", weight, schedule)
    cost = {"F": forwards, "B": backwards, "I": [backwards[s] - weights[s] for s in stages], "W": weights}

    free, busy = [0.0] * schedule.ranks, [0.0] * schedule.ranks
    held, peak = [0] * schedule.ranks, [0] * schedule.ranks
    link_free: dict[tuple[int, int], float] = {}
    here: dict[Action, float] = {}  # when its own stage can go on from it
    there: dict[Action, float] = {}  # when the next or previous stage can
    spans = []
    for action in schedule.order():
        rank, seconds = schedule.placement[action.stage], cost[action.kind][action.stage]
        arrived = [(here if need.stage == action.stage else there)[need] for need in schedule.needs(action)]
        start = max(free[rank], *arrived, 0.0)
        end = start + seconds
        busy[rank] += seconds
        held[rank] += {"F": 1, "I": 0, "B": -1, "W": -1}[action.kind]
        peak[rank] = max(peak[rank], held[rank])

        arrival = end
        target = action.stage + (1 if action.kind == "F" else -1)
        if action.kind != "W" and target in stages and schedule.placement[target] != rank:
            link = rank, schedule.placement[target]
            link_free[link] = arrival = max(end, link_free.get(link, 0.0)) + transfer
            if not overlapped:
                end = arrival
        here[action.gives], there[action.gives], free[rank] = end, arrival, end
        spans.append((rank, action, start, end))
    seconds = max(free)
    unhindered = simulate(schedule, forward=forwards, backward=backwards, weight=weights).seconds if transfer else seconds
    return Simulation(seconds, tuple(spans), tuple(busy), tuple(peak), seconds - unhindered)


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
