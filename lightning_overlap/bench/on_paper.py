"""Simulates the schedule of microbatches, from the measured times of its actions and transfers."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from lightning_overlap.decision import ConfigError
from lightning_overlap.ranks.world import all_gather_objects
from lightning_overlap.steps.schedule import Schedule
from lightning_overlap.steps.simulate import simulate


@dataclass
class OnPaper:
    """Simulated seconds of a step and of its parts.

    Attributes:
        ideal: a step with transfers that take no time: compute and the bubble.
        simulated: a step with transfers of the measured time, which overlap with compute.
        outside: the part of both outside the schedule (optimizer, data loader), on the rank that computes longest.
        forward: a stage's forward of a microbatch, the mean of the stages.
        backward: a stage's backward of a microbatch, the mean of the stages.
        transfer: one transfer.
    """

    ideal: float
    simulated: float
    outside: float
    forward: float
    backward: float
    transfer: float

    def describe(self, measured: float) -> str:
        """Formats the simulation beside the measured step, in milliseconds.

        Args:
            measured: seconds of the measured step.
        """
        parts = f"forward {self.forward * 1e3:.1f}, backward {self.backward * 1e3:.1f}, transfer {self.transfer * 1e3:.1f}"
        return (
            f"simulated, with {parts}, outside the schedule {self.outside * 1e3:.0f}: {self.simulated * 1e3:.0f} "
            f"(measured: {measured / self.simulated:.2f} x), with transfers that take no time {self.ideal * 1e3:.0f} "
            f"(measured: {measured / self.ideal:.2f} x)"
        )


def on_paper(schedule: Schedule, work: Sequence[tuple[str, float, float]], step: float, alone: Sequence[float], steps: int) -> OnPaper:
    """Simulates the schedule of a measured run. Collective over the world.

    Args:
        schedule: of the run.
        work: this rank's actions in all steps without transfers: name, start and end.
        step: seconds of a step without transfers.
        alone: for each repeat, seconds of a step's transfers alone.
        steps: number of steps.
    """
    spans: dict[tuple[str, int], list[float]] = defaultdict(list)
    longest = outside = 0.0
    for of_rank, seconds in all_gather_objects((list(work), step)):
        for name, start, end in of_rank:
            spans[name[0], int(name[1:].split(".")[0])].append(end - start)
        computed = sum(end - start for _, start, end in of_rank) / steps
        if computed > longest:
            longest, outside = computed, seconds - computed
    cost = {key: statistics.median(seconds) for key, seconds in spans.items()}
    stages = range(schedule.stages)
    weight = [cost.get(("W", s), 0.0) for s in stages]
    backward = [cost[("B", s)] if ("B", s) in cost else cost[("I", s)] + weight[s] for s in stages]
    forward = [cost["F", s] for s in stages]
    transfer = statistics.median(alone) / busiest(schedule)
    free = simulate(schedule, forward=forward, backward=backward, weight=weight)
    run = simulate(schedule, forward=forward, backward=backward, weight=weight, transfer=transfer)
    return OnPaper(
        free.seconds + outside, run.seconds + outside, outside, statistics.mean(forward), statistics.mean(backward), transfer
    )


def busiest(schedule: Schedule) -> int:
    """Returns the number of transfers that the busiest rank sends for a batch."""
    sources = [rank for first, second in pairwise(schedule.placement) if first != second for rank in (first, second)]
    return schedule.microbatches * max(Counter(sources).values())


def describe_times(schedule: Schedule, times: str) -> str:
    """Simulates a schedule with given times, and formats the result.

    Args:
        schedule: of one batch.
        times: milliseconds of a stage's forward of a microbatch, of its backward and of a transfer, separated by commas.

    Raises:
        ConfigError: ``times`` is not three numbers.
    """
    try:
        forward, backward, transfer = map(float, times.split(","))
    except ValueError as error:
        raise ConfigError(f"--times {times} is not FORWARD,BACKWARD,TRANSFER in milliseconds, such as 30,60,8") from error
    hidden, plain = (
        simulate(schedule, forward=forward, backward=backward, transfer=transfer, overlapped=overlapped)
        for overlapped in (True, False)
    )
    free = hidden.seconds - hidden.exposed
    bubble = 1 - sum(hidden.busy) / len(hidden.busy) / free
    return (
        f"simulated: a batch takes {hidden.seconds:.0f} ms, of which {hidden.exposed:.0f} ms are exposed transfers "
        f"({plain.seconds:.0f} ms without overlap); without transfers {free:.0f} ms, of which the bubble is {bubble:.0%}"
    )
