"""Simulates a schedule: how long it takes, how long ranks are idle, how many activations they hold. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lightning_overlap.decision import ConfigError
from lightning_overlap.steps.schedule import Action, Schedule


@dataclass(frozen=True)
class Simulation:
    """The result of a simulation.

    Attributes:
        seconds: the time from the start of the first action to the end of the last.
        spans: rank, action, start and end in seconds; the actions of a rank are in order.
        busy: the seconds in which each rank computes.
        peak: the most stage activations that each rank holds at once: from ``F`` until the end of ``B``, or of ``W``.
        exposed: the seconds that transfers add.
    """

    seconds: float
    spans: tuple[tuple[int, Action, float, float], ...]
    busy: tuple[float, ...]
    peak: tuple[int, ...]
    exposed: float

    @property
    def bubble(self) -> float:
        """The share of the ranks' time in which they do not compute, 0 to 1."""
        return 1 - sum(self.busy) / (len(self.busy) * self.seconds)


class Transfer(NamedTuple):
    """A transfer of an action's result between two ranks.

    Attributes:
        action: the action.
        source: the rank that ran it.
        target: the rank that needs the result.
    """

    action: Action
    source: int
    target: int


def simulate(
    schedule: Schedule,
    *,
    forward: float | Sequence[float] = 1.0,
    backward: float | Sequence[float] = 2.0,
    weight: float | Sequence[float] | None = None,
    transfer: float = 0.0,
    overlapped: bool = True,
    waits: tuple[float, float] = (0.0, 0.0),
) -> Simulation:
    """Simulates a schedule: an action starts when its rank is free and the results that it needs have arrived.

    A pair starts when both of its actions can, and its waits lie under the compute of both.

    Times are for one microbatch, the same for all stages or one for each.

    Args:
        schedule: a valid schedule.
        forward: seconds of a forward.
        backward: seconds of a complete backward.
        weight: seconds of the part of a backward for the gradients of weights; half of it by default.
        transfer: seconds of a transfer between two ranks. A rank sends one result at a time, in the order of its actions: sends to the
            next and to the previous stage share its link.
        overlapped: whether transfers run during compute. In the plain twin they do not: sender and receiver both wait for each
            transfer, in the order of :func:`blocking_order`.
        waits: seconds in which a forward, and a backward, waits for transfers inside its stage (of tensor parallelism, say).

    Raises:
        ConfigError: the number of times is not the number of stages, or the schedule deadlocks.
    """
    forwards, backwards = _by_stage("forward", forward, schedule), _by_stage("backward", backward, schedule)
    weights = [b / 2 for b in backwards] if weight is None else _by_stage("weight", weight, schedule)
    inputs = [b - w for b, w in zip(backwards, weights, strict=True)]
    costs = {"F": forwards, "B": backwards, "I": inputs, "W": weights}
    clock = _Clock(schedule, costs, transfer, dict(zip("FB", waits, strict=True)), overlapped=overlapped)
    for event in schedule.order() if overlapped else blocking_order(schedule):
        if isinstance(event, Transfer):
            clock.send(event)
        else:
            clock.compute(event)
    seconds = max(clock.free)
    has_transfers = transfer or any(waits) or not overlapped
    ideal = simulate(schedule, forward=forwards, backward=backwards, weight=weights).seconds if has_transfers else seconds
    return Simulation(seconds, tuple(clock.spans), tuple(clock.busy), tuple(clock.peak), seconds - ideal)


class _Clock:
    """The time of each rank during a simulation.

    Args:
        schedule: the schedule.
        costs: the seconds of an action, by its kind and stage.
        transfer: the seconds of a transfer.
        waits: the seconds that a forward (``F``) and a backward (``B``) wait inside their stage.
        overlapped: whether transfers run during compute.

    Attributes:
        free: the time from which each rank can start its next action.
        spans, busy, peak: see :class:`Simulation`.
    """

    def __init__(
        self,
        schedule: Schedule,
        costs: Mapping[str, Sequence[float]],
        transfer: float,
        waits: Mapping[str, float],
        *,
        overlapped: bool,
    ) -> None:
        self.free, self.busy = [0.0] * schedule.ranks, [0.0] * schedule.ranks
        self.peak = [0] * schedule.ranks
        self.spans: list[tuple[int, Action, float, float]] = []
        self._schedule, self._costs, self._transfer, self._waits, self._overlapped = schedule, costs, transfer, waits, overlapped
        self._activations = [0] * schedule.ranks
        self._computed = [0.0] * schedule.ranks
        """The end of each rank's latest action, before its transfers."""
        self._link_free = [0.0] * schedule.ranks
        self._local: dict[Action, float] = {}
        """The time at which a result is ready for its own stage."""
        self._arrived: dict[Action, float] = {}
        """The time at which a result is ready for the next or previous stage."""

    def compute(self, unit: Sequence[Action]) -> None:
        """Runs an action, or a pair, as early as its rank and the results that it needs allow, and with overlap sends its result."""
        start = self.free[self._schedule.placement[unit[0].stage]]
        for action in unit:
            for need in self._schedule.needs(action):
                start = max(start, (self._local if need.stage == action.stage else self._arrived)[need])
        costs = [self._costs[action.kind][action.stage] for action in unit]
        compute = sum(costs)
        seconds = max(compute, *(cost + self._waits.get(a.result.kind, 0.0) for a, cost in zip(unit, costs, strict=True)))
        for action, cost in zip(unit, costs, strict=True):
            share = cost / compute if compute else 1 / len(unit)
            self._run(action, start, start := start + seconds * share, cost)

    def _run(self, action: Action, start: float, end: float, cost: float) -> None:
        rank = self._schedule.placement[action.stage]
        self.busy[rank] += cost
        self._activations[rank] += {"F": 1, "I": 0, "B": -1, "W": -1}[action.kind]
        self.peak[rank] = max(self.peak[rank], self._activations[rank])
        self.free[rank] = self._computed[rank] = self._local[action.result] = self._arrived[action.result] = end
        self.spans.append((rank, action, start, end))
        if self._overlapped and (target := self._schedule.receiver(action)) is not None:
            self.send(Transfer(action, rank, target))

    def send(self, transfer: Transfer) -> None:
        """Transfers a result as early as the link allows. Without overlap, both ranks wait for it."""
        (action, source, target), free = transfer, self.free
        start = max(self._local[action.result], self._link_free[source], 0.0 if self._overlapped else self._computed[target])
        self._arrived[action.result] = self._link_free[source] = arrival = start + self._transfer
        if not self._overlapped:
            free[source], free[target] = max(free[source], arrival), max(free[target], arrival)


def blocking_order(schedule: Schedule) -> list[tuple[Action, ...] | Transfer]:
    """Merges the actions and transfers of all ranks into one order for the plain twin, in which both ranks wait for a transfer.

    It is the order of times in a run with transfers that take no time and backwards of two forwards: a transfer comes as soon as its
    action ends, before all actions that either rank has not started by then. Ranks that keep this order never deadlock: the first
    event that is not complete has both its ranks ready.
    """
    events: list[tuple[float, bool, int, tuple[Action, ...] | Transfer]] = []
    for rank, action, start, end in simulate(schedule).spans:
        events.append((start, True, rank, (action,)))
        if (target := schedule.receiver(action)) is not None:
            events.append((end, False, rank, Transfer(action, rank, target)))
    return [event for *_, event in sorted(events, key=lambda event: event[:3])]


def _by_stage(name: str, seconds: float | Sequence[float], schedule: Schedule) -> list[float]:
    times = list(seconds) if isinstance(seconds, Sequence) else [seconds] * schedule.stages
    if len(times) != schedule.stages:
        raise ConfigError(
            f"{name} has {len(times)} times, but schedule {schedule.name} has {schedule.stages} stages: give one for each"
        )
    return times


def draw(schedule: Schedule) -> str:
    """Draws a schedule over time, with hidden transfers and backwards of two forwards. Dots are the bubble."""
    width = max(len(str(action)) for row in schedule.actions for action in row) + 1
    lines = [""] * schedule.ranks
    for rank, action, start, end in simulate(schedule).spans:
        lines[rank] = lines[rank].ljust(round(start) * width, ".") + str(action).ljust(round(end - start) * width)
    return "\n".join(f"rank {rank}  {line.rstrip()}" for rank, line in enumerate(lines)) + "\n"
