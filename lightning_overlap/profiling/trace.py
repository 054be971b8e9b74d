"""Evaluates the ranks' records of steps: hidden and exposed transfer time, and the ranks that others waited for."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, TypeVar

from lightning_overlap.profiling.intervals import Interval, difference, length, union
from lightning_overlap.profiling.usage import Usage
from lightning_overlap.tables import WIDTH, as_text

if TYPE_CHECKING:
    from lightning_overlap.ranks.group import Transfer


BETWEEN = "between batches"
"""The phase in which the main thread may wait for the data loader."""
BLOCKED = 1e-4
"""Seconds. A shorter wait means that the transfer was complete before it."""


@dataclass
class Step:
    """One step on one rank; seconds on that rank's clock.

    Attributes:
        index: the optimizer step.
        start: of its first batch.
        end: of its last phase.
        phases: name, start and end of the main thread's phases.
        transfers: the transfers that were posted, under way or waited for in the step.
        work: name, start and end of computations of modes, such as a pipeline's actions.
        cpu_seconds: time in which the main thread had a core, without the phases between batches; None on a device.
        samples: of its batches. Ranks that share a batch have the same.
        tokens: of its batches; 0 if they are not known.
    """

    index: int
    start: float
    end: float
    phases: list[tuple[str, float, float]] = field(default_factory=list)
    transfers: list[Transfer] = field(default_factory=list)
    work: list[tuple[str, float, float]] = field(default_factory=list)
    cpu_seconds: float | None = None
    samples: int = 0
    tokens: int = 0

    @property
    def core_taken(self) -> float:
        """Seconds in which the main thread waited for no transfer and had no core, because other threads or programs used it.

        On a CPU these are mostly the threads that carry out transfers, and the kernel's part of sending and receiving.
        """
        if self.cpu_seconds is None:
            return 0.0
        runnable = difference(
            [(a, b) for name, a, b in self.phases if name != BETWEEN], [t.waited for t in self.transfers if t.waited]
        )
        return max(0.0, length(runnable) - self.cpu_seconds)

    def on_clock(self, offset: float) -> Step:
        """Returns the same step on a clock that is ``offset`` seconds behind."""

        def moved(t: float | None) -> float | None:
            return None if t is None else t - offset

        transfers = [
            replace(
                t,
                posted=t.posted - offset,
                started=moved(t.started),
                done=moved(t.done),
                waited=None if t.waited is None else (t.waited[0] - offset, t.waited[1] - offset),
                marks=None,
            )
            for t in self.transfers
        ]
        phases, work = ([(name, a - offset, b - offset) for name, a, b in spans] for spans in (self.phases, self.work))
        start, end = self.start - offset, self.end - offset
        return replace(self, start=start, end=end, phases=phases, transfers=transfers, work=work)


@dataclass
class ObservedTransfer:
    """A transfer on one rank, evaluated with the records of all its ranks.

    Attributes:
        label: of the transfer.
        nbytes: bytes that this rank sends, if it posted the transfer in this step.
        wire: from the start of the last rank to the end of all.
        exposed: when this rank only waited for the wire.
        late: when this rank waited for a rank that had not posted the transfer yet.
        last: the rank that posted last.
        posted: when this rank posted it; None: in another step.
        wait: when this rank began to wait for it; None: in another step, or never.
    """

    label: str
    nbytes: int
    wire: Interval
    exposed: Interval
    late: Interval
    last: int
    posted: float | None
    wait: float | None

    @property
    def mode(self) -> str:
        return self.label.split(".")[0]


def observe_transfers(ranks: Sequence[Step]) -> list[list[ObservedTransfer]]:
    """Evaluates the transfers of one step, and returns a list for each rank. The records have one clock.

    A transfer cannot start before its last rank has posted it. Until then the others wait for that rank, not for the wire.
    """
    by_rank: dict[tuple[object, ...], dict[int, Transfer]] = {}
    for rank, step in enumerate(ranks):
        for t in step.transfers:
            by_rank.setdefault((t.ranks, t.label, t.number), {})[rank] = t
    observed: list[list[ObservedTransfer]] = [[] for _ in ranks]
    for records in by_rank.values():
        last = max(records, key=lambda rank: records[rank].posted)
        posted = records[last].posted
        started = max(posted, *(t.started or t.posted for t in records.values()))
        for rank, t in records.items():
            step = ranks[rank]
            known = [end for r, other in records.items() if (end := _done(other, ranks[r].end)) is not None]
            done = max(known, default=t.waited[1] if t.waited else step.end)
            waited = t.waited or (done, done)
            turn = min(max(posted, waited[0]), waited[1])
            posted_inside = step.start <= t.posted < step.end
            observed[rank].append(
                ObservedTransfer(
                    t.label,
                    t.nbytes if posted_inside else 0,
                    wire=_within(step, started, done),
                    exposed=_within(step, turn, waited[1]),
                    late=_within(step, waited[0], turn),
                    last=last,
                    posted=t.posted if posted_inside else None,
                    wait=t.waited[0] if t.waited and step.start <= t.waited[0] < step.end else None,
                )
            )
    return observed


def _done(t: Transfer, end: float) -> float | None:
    """Returns the end of a transfer as this rank knows it; None if the wait did not block, so that it ended at some earlier time."""
    if t.done is not None or t.waited is None:
        return end if t.done is None else t.done
    return t.waited[1] if t.waited[1] - t.waited[0] > BLOCKED else None


def _within(step: Step, start: float, end: float) -> Interval:
    start = min(max(start, step.start), step.end)
    return start, max(start, min(end, step.end))


@dataclass
class TransferTime:
    """Seconds and bytes of transfers: a sum or a mean.

    Attributes:
        communication: time with a transfer on the wire.
        hidden: the part of it in which the rank waited for no transfer.
        exposed: time in which the rank only waited for the wire.
        late: time in which the rank only waited for another rank to post.
        nbytes: bytes sent.
    """

    communication: float = 0.0
    hidden: float = 0.0
    exposed: float = 0.0
    late: float = 0.0
    nbytes: float = 0.0

    @property
    def bandwidth(self) -> float:
        """Bits a second, while a transfer was on the wire."""
        return 8 * self.nbytes / self.communication if self.communication else 0.0

    @property
    def hidden_percent(self) -> float:
        """The hidden part of the communication, in percent."""
        return 100 * self.hidden / self.communication if self.communication else 100.0

    def add(self, other: TransferTime) -> None:
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))

    def over(self, count: int) -> TransferTime:
        """Divides by a count."""
        return TransferTime(*(getattr(self, each.name) / max(1, count) for each in fields(self)))


def transfer_time(observed: Sequence[ObservedTransfer]) -> TransferTime:
    """Sums the transfers of one rank in one step. Time with several transfers counts once."""
    wire = union(t.wire for t in observed)
    late = union(t.late for t in observed)
    exposed = difference([t.exposed for t in observed], late)
    hidden = difference(wire, [*exposed, *late])
    return TransferTime(length(wire), length(hidden), length(exposed), length(late), sum(t.nbytes for t in observed))


@dataclass
class Summary:
    """Sums over steps on all ranks. The methods return means over ranks and steps.

    Attributes:
        steps: number of steps.
        ranks: number of ranks.
        seconds: of all steps on all ranks.
        seconds_core_taken: the part of them that :attr:`Step.core_taken` describes.
        modes: transfer times by mode, and of all modes together under ``""``.
        blocked: exposed seconds by the transfer's label.
        stragglers: seconds for which ranks waited for another rank, by that rank.
        remarks: by mode, a sentence that the table adds if the mode has communicated.
        sharers: number of ranks that share a batch.
        samples: of all batches, each counted once.
        tokens: the same; 0 if they are not known.
        usage: of the devices.
        imbalances: by mode and kind of load, the largest load over the mean, and the part of the model that has it.
    """

    steps: int = 0
    ranks: int = 0
    seconds: float = 0.0
    seconds_core_taken: float = 0.0
    modes: dict[str, TransferTime] = field(default_factory=lambda: {"": TransferTime()})
    blocked: dict[str, float] = field(default_factory=dict)
    stragglers: dict[int, float] = field(default_factory=dict)
    remarks: Mapping[str, str] = field(default_factory=dict)
    sharers: int = 1
    samples: float = 0.0
    tokens: float = 0.0
    usage: Usage = field(default_factory=Usage)
    imbalances: Mapping[tuple[str, str], tuple[float, str]] = field(default_factory=dict)

    def add(self, step: Sequence[Step]) -> None:
        """Adds a step: the records of all ranks, on one clock."""
        self.steps, self.ranks = self.steps + 1, len(step)
        for record, observed in zip(step, observe_transfers(step), strict=True):
            self.seconds += record.end - record.start
            self.seconds_core_taken += record.core_taken
            self.samples += record.samples / self.sharers
            self.tokens += record.tokens / self.sharers
            self.modes[""].add(transfer_time(observed))
            for mode in sorted({t.mode for t in observed}):
                self.modes.setdefault(mode, TransferTime()).add(transfer_time([t for t in observed if t.mode == mode]))
            for t in observed:
                _add(self.blocked, t.label, length([t.exposed]))
                _add(self.stragglers, t.last, length([t.late]))

    def merge(self, other: Summary) -> None:
        """Adds the steps of another, later summary."""
        self.samples, self.tokens = self.samples + other.samples, self.tokens + other.tokens
        self.usage, self.imbalances = other.usage, other.imbalances
        self.steps, self.ranks = self.steps + other.steps, other.ranks
        self.seconds, self.seconds_core_taken = self.seconds + other.seconds, self.seconds_core_taken + other.seconds_core_taken
        for mode, one in other.modes.items():
            self.modes.setdefault(mode, TransferTime()).add(one)
        for label, seconds in other.blocked.items():
            _add(self.blocked, label, seconds)
        for rank, seconds in other.stragglers.items():
            _add(self.stragglers, rank, seconds)

    def mean(self, mode: str = "") -> TransferTime:
        """Transfer time of a rank in a step, of one mode or of all together."""
        return self.modes[mode].over(self.steps * self.ranks)

    @property
    def names(self) -> list[str]:
        """Names of the modes that have communicated."""
        return [mode for mode in self.modes if mode]

    @property
    def step(self) -> float:
        """Seconds of a step, a mean."""
        return self.seconds / max(1, self.steps * self.ranks)

    def per_second(self, count: float) -> float:
        """Divides a count of all steps, such as :attr:`samples`, by their seconds."""
        return count * self.ranks / self.seconds if self.seconds else 0.0

    @property
    def flops_per_second(self) -> float | None:
        """Floating-point operations a second of all ranks; None if they are not counted."""
        return None if self.usage.flops is None else self.per_second(self.usage.flops * self.steps)

    @property
    def utilisation(self) -> float | None:
        """Model FLOPs utilisation (MFU) in percent of what the devices can do at most; None if one of both is not known."""
        if self.flops_per_second is None or not self.usage.peak:
            return None
        return 100 * self.flops_per_second / self.usage.peak

    @property
    def core_taken(self) -> float:
        """Seconds of a step in which the main thread had no core."""
        return self.seconds_core_taken / max(1, self.steps * self.ranks)

    @property
    def compute(self) -> float:
        """Seconds of a step in which the main thread computed."""
        return self.step - self.mean().exposed - self.mean().late - self.core_taken

    def waited_for(self) -> list[tuple[str, float]]:
        """Returns labels of transfers with the exposed seconds of a rank in a step; the longest first."""
        longest = sorted(self.blocked.items(), key=lambda item: -item[1])
        return [(label, seconds / (self.steps * self.ranks)) for label, seconds in longest if seconds > 0]

    def straggler(self) -> tuple[int, float] | None:
        """Returns the rank that others wait for longest, and the seconds in a step; None if they are below 1% of it."""
        rank, seconds = max(self.stragglers.items(), key=lambda item: item[1], default=(0, 0.0))
        seconds /= max(1, self.steps)
        return (rank, seconds) if seconds > 0.01 * self.step else None

    def table(self) -> str:
        """Formats the summary as text, times in milliseconds."""
        cells = [self._cells(name) for name in [*self.names, *([""] if len(self.names) > 1 else [])]]
        titles = ("ms a step", "communication", "hidden", "exposed", "late peers", "MB sent", "Mbit/s")
        head = f"lightning_overlap: {self.steps} steps measured, means over {self.ranks} ranks"
        lines = []
        all_of = self.mean()
        parts = f"compute {self.compute * 1e3:.1f} + exposed {all_of.exposed * 1e3:.1f} + late peers {all_of.late * 1e3:.1f}"
        parts += f" + core taken {self.core_taken * 1e3:.1f}"
        lines.append(f"a step of {self.step * 1e3:.1f} ms = {parts}; {all_of.hidden_percent:.0f}% of the communication is hidden")
        lines.append(self._rates())
        if self.usage.obstacle:
            lines.append(f"floating-point operations are not counted: {self.usage.obstacle}")
        for (mode, load), (ratio, part) in self.imbalances.items():
            lines.append(f"{mode}: the largest load of {load} is {ratio:.2f} x the mean ({part})")
        longest = [f"{label} {seconds * 1e3:.1f}" for label, seconds in self.waited_for()[:5]]
        lines += [remark for name, remark in self.remarks.items() if remark and name in self.names]
        if longest:
            lines.append(f"waited for longest: {', '.join(longest)}")
        if (slow := self.straggler()) is not None:
            lines.append(f"rank {slow[0]} kept the others waiting for {slow[1] * 1e3:.1f} ms a step")
        wrapped = [textwrap.wrap(line, WIDTH, break_on_hyphens=False) for line in lines]
        return "\n".join([head, as_text(titles, cells, numbers=True), *(line for lines in wrapped for line in lines)])

    def _rates(self) -> str:
        """Samples, tokens and operations a second, and memory, as a line of text."""
        rates = [f"{self.per_second(self.samples):,.1f} samples/s"] if self.samples else []
        if self.tokens:
            rates.append(f"{self.per_second(self.tokens):,.0f} tokens/s")
        if self.flops_per_second is not None:
            share = "" if self.utilisation is None else f" ({self.utilisation:.1f}% of the devices' peak)"
            rates.append(f"{self.flops_per_second / 1e12:.3g} TFLOP/s on all ranks{share}")
        if self.usage.memory:
            rates.append(f"up to {self.usage.memory / 1e6:,.0f} MB a rank")
        return ", ".join(rates)

    def _cells(self, name: str) -> tuple[str, ...]:
        s = self.mean(name)
        times = [f"{seconds * 1e3:.1f}" for seconds in (s.communication, s.hidden, s.exposed, s.late)]
        return name or "together", *times, f"{s.nbytes / 1e6:.1f}", f"{s.bandwidth / 1e6:.0f}"


K = TypeVar("K")


def _add(counts: dict[K, float], key: K, seconds: float) -> None:
    counts[key] = counts.get(key, 0.0) + seconds


def spans(steps: Sequence[Step]) -> Iterator[tuple[int, str, str, Interval, int]]:
    """Yields the bars of a drawing of one step of all ranks: rank, row, name, interval, bytes."""
    for rank, (step, observed) in enumerate(zip(steps, observe_transfers(steps), strict=True)):
        for name, start, end in step.phases:
            yield rank, "compute", name, (start, end), 0
        for name, start, end in step.work:
            yield rank, "compute, stages", name, (start, end), 0
        for t in observed:
            yield rank, t.label.split("[")[0], t.label, t.wire, t.nbytes
            for kind, wait in (("waited", t.exposed), ("late peer", t.late)):
                if wait[0] < wait[1]:
                    yield rank, "waits", f"{kind}: {t.label}", wait, 0
