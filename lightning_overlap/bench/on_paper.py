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
    """Seconds a step.

    Attributes:
        ideal: compute and the schedule's bubble, with transfers that take no time.
        simulated: with transfers that take as long as they do, beside compute.
        outside: of both, what is not the schedule's: the optimizer, the data loader. That of the rank that computes longest: the
            others wait for it there.
        forward: of a stage's forward of a microbatch, the mean of the stages.
        backward: of its backward.
        transfer: of one transfer.
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
            f"on paper, with {parts}, outside the schedule {self.outside * 1e3:.0f}: {self.simulated * 1e3:.0f} "
            f"(measured: {measured / self.simulated:.2f} x), with transfers that take no time {self.ideal * 1e3:.0f} "
            f"(measured: {measured / self.ideal:.2f} x)"
        )


def on_paper(schedule: Schedule, work: Sequence[tuple[str, float, float]], step: float, alone: Sequence[float], steps: int) -> OnPaper:
    """Simulates the schedule that was measured. Collective over the world.

    Args:
        schedule: of the run that was measured.
        work: of this rank, its actions of all steps without transfers: name, start and end.
        step: seconds of such a step.
        alone: seconds of a step's transfers by themselves, of each repeat.
        steps: how many there were.
    """
    spans: dict[tuple[str, int], list[float]] = defaultdict(list)
    longest = rest = 0.0
    for of_rank, seconds in all_gather_objects((list(work), step)):
        for name, start, end in of_rank:
            spans[name[0], int(name[1:].split(".")[0])].append(end - start)
        computed = sum(end - start for _, start, end in of_rank) / steps
        if computed > longest:
            longest, rest = computed, seconds - computed
    cost = {key: statistics.median(seconds) for key, seconds in spans.items()}
    stages = range(schedule.stages)
    weight = [cost.get(("W", s), 0.0) for s in stages]
    backward = [cost[("B", s)] if ("B", s) in cost else cost[("I", s)] + weight[s] for s in stages]
    forward = [cost["F", s] for s in stages]
    transfer = statistics.median(alone) / busiest(schedule)
    free = simulate(schedule, forward=forward, backward=backward, weight=weight)
    run = simulate(schedule, forward=forward, backward=backward, weight=weight, transfer=transfer)
    return OnPaper(free.seconds + rest, run.seconds + rest, rest, statistics.mean(forward), statistics.mean(backward), transfer)


def busiest(schedule: Schedule) -> int:
    """Transfers of a batch that a rank sends, to whomever, where they are most."""
    sources = [rank for first, second in pairwise(schedule.placement) if first != second for rank in (first, second)]
    return schedule.microbatches * max(Counter(sources).values())


def describe_times(schedule: Schedule, times: str) -> str:
    """Simulates a schedule with given times, and formats the result.

    Args:
        schedule: of one batch.
        times: milliseconds of a stage's forward of a microbatch, of its backward and of a transfer, between commas.

    Raises:
        ConfigError: they are not three numbers.
    """
    try:
        forward, backward, transfer = map(float, times.split(","))
    except ValueError as error:
        raise ConfigError(f"--times {times}: it is FORWARD,BACKWARD,TRANSFER in milliseconds, such as 30,60,8") from error
    hidden, plain = (
        simulate(schedule, forward=forward, backward=backward, transfer=transfer, overlapped=overlapped)
        for overlapped in (True, False)
    )
    free = hidden.seconds - hidden.exposed
    bubble = 1 - sum(hidden.busy) / len(hidden.busy) / free
    return (
        f"on paper a batch takes {hidden.seconds:.0f} ms, {hidden.exposed:.0f} of them for transfers ({plain.seconds:.0f} ms if sends "
        f"are waited for); without transfers {free:.0f}, of which the bubble is {bubble:.0%}"
    )
