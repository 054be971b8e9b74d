"""What the ranks' records of a step say: what was hidden, what was exposed, and who kept the others waiting."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from lightning_overlap.profiling.intervals import Interval, difference, length, union
from lightning_overlap.tables import as_text

if TYPE_CHECKING:
    from lightning_overlap.ranks.group import Transfer


BETWEEN = "between batches"
"""The phase in which the data loader may be waited for."""
BLOCKED = 1e-4
"""Seconds: a wait that is shorter found its transfer complete."""


@dataclass
class Step:
    """One step on one rank; seconds on that rank's clock.

    Attributes:
        index: the optimizer step.
        start: when its first batch began.
        end: when what belongs to it was over.
        phases: name, start and end of what the main thread did.
        transfers: those that were posted, in flight or waited for in it.
        work: name, start and end of what modes computed: a pipeline's actions.
        ran: seconds of the phases, but for those between batches, in which the main thread had a core; None: on a device.
    """

    index: int
    start: float
    end: float
    phases: list[tuple[str, float, float]] = field(default_factory=list)
    transfers: list[Transfer] = field(default_factory=list)
    work: list[tuple[str, float, float]] = field(default_factory=list)
    ran: float | None = None

    @property
    def taken(self) -> float:
        """Seconds in which the main thread waited for nothing and yet stood: others had its core.

        On a CPU these are mostly transfers: the threads that post and wait, and the kernel's part of sending and receiving.
        """
        if self.ran is None:
            return 0.0
        going_on = difference(
            [(a, b) for name, a, b in self.phases if name != BETWEEN], [t.waited for t in self.transfers if t.waited]
        )
        return max(0.0, length(going_on) - self.ran)

    def on_clock(self, offset: float) -> Step:
        """The same on a clock that is ``offset`` seconds behind."""

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
        return Step(self.index, self.start - offset, self.end - offset, phases, transfers, work, self.ran)


@dataclass
class Seen:
    """A transfer as one rank saw it, in the light of what the others say of it.

    Attributes:
        label: the transfer's.
        nbytes: the bytes that this rank sends, if it was posted in this step.
        wire: from when the last participant had begun to when all were done.
        exposed: when this rank did nothing but wait for the wire.
        late: when it waited for a participant that had not asked for the transfer yet.
        last: the rank that asked last.
    """

    label: str
    nbytes: int
    wire: Interval
    exposed: Interval
    late: Interval
    last: int

    @property
    def mode(self) -> str:
        return self.label.split(".")[0]


def compare(ranks: Sequence[Step]) -> list[list[Seen]]:
    """One step's transfers, for each rank; its records have one clock.

    A transfer cannot begin before its last participant has asked for it: what the others waited until then was for that
    rank, not for the wire.
    """
    everywhere: dict[tuple[object, ...], dict[int, Transfer]] = {}
    for rank, step in enumerate(ranks):
        for t in step.transfers:
            everywhere.setdefault((t.ranks, t.label, t.number), {})[rank] = t
    seen: list[list[Seen]] = [[] for _ in ranks]
    for held in everywhere.values():
        last = max(held, key=lambda rank: held[rank].posted)
        posted = held[last].posted
        started = max(posted, *(t.started or t.posted for t in held.values()))
        for rank, t in held.items():
            step = ranks[rank]
            known = [end for r, other in held.items() if (end := _done(other, ranks[r].end)) is not None]
            done = max(known, default=t.waited[1] if t.waited else step.end)
            waited = t.waited or (done, done)
            turn = min(max(posted, waited[0]), waited[1])
            seen[rank].append(
                Seen(
                    t.label,
                    t.nbytes if step.start <= t.posted < step.end else 0,
                    wire=_within(step, started, done),
                    exposed=_within(step, turn, waited[1]),
                    late=_within(step, waited[0], turn),
                    last=last,
                )
            )
    return seen


def _done(t: Transfer, end: float) -> float | None:
    """When it was over, as far as this rank knows: one that did not block when it was waited for had come at some time before."""
    if t.done is not None or t.waited is None:
        return end if t.done is None else t.done
    return t.waited[1] if t.waited[1] - t.waited[0] > BLOCKED else None


def _within(step: Step, start: float, end: float) -> Interval:
    start = min(max(start, step.start), step.end)
    return start, max(start, min(end, step.end))


@dataclass
class Spent:
    """Seconds and bytes, added up or on average.

    Attributes:
        communication: something was on the wire.
        hidden: the part of it under which the rank went on.
        exposed: the rank did nothing but wait for the wire.
        late: the rank did nothing but wait for another rank to come.
        nbytes: sent.
    """

    communication: float = 0.0
    hidden: float = 0.0
    exposed: float = 0.0
    late: float = 0.0
    nbytes: float = 0.0

    @property
    def bandwidth(self) -> float:
        """Bits a second, while something was on the wire."""
        return 8 * self.nbytes / self.communication if self.communication else 0.0

    @property
    def hidden_percent(self) -> float:
        """Of the time of communication."""
        return 100 * self.hidden / self.communication if self.communication else 100.0

    def add(self, other: Spent) -> None:
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))

    def over(self, shares: int) -> Spent:
        """The mean over so many shares."""
        return Spent(*(getattr(self, each.name) / max(1, shares) for each in fields(self)))


def spent(seen: Sequence[Seen]) -> Spent:
    """By transfers that one rank saw in one step."""
    wire = union(s.wire for s in seen)
    late = union(s.late for s in seen)
    exposed = difference([s.exposed for s in seen], late)
    hidden = difference(wire, [*exposed, *late])
    return Spent(length(wire), length(hidden), length(exposed), length(late), sum(s.nbytes for s in seen))


@dataclass
class Summary:
    """Of steps on all ranks. Everything is added up here; the methods give means over ranks and steps.

    Attributes:
        steps: how many.
        ranks: how many.
        seconds: of all steps on all ranks.
        taken: of them, those in which the main thread had no core, as :attr:`Step.taken` says.
        modes: by name, and all together under ``""``.
        blocked: seconds for which a transfer was waited for, by label.
        stragglers: seconds for which others waited, by the rank they waited for.
        remarks: by mode, a sentence that the table adds if the mode has communicated.
    """

    steps: int = 0
    ranks: int = 0
    seconds: float = 0.0
    taken: float = 0.0
    modes: dict[str, Spent] = field(default_factory=lambda: {"": Spent()})
    blocked: dict[str, float] = field(default_factory=dict)
    stragglers: dict[int, float] = field(default_factory=dict)
    remarks: Mapping[str, str] = field(default_factory=dict)

    def add(self, step: Sequence[Step]) -> None:
        """One step more, as all ranks saw it, on one clock."""
        self.steps, self.ranks = self.steps + 1, len(step)
        for own, seen in zip(step, compare(step), strict=True):
            self.seconds += own.end - own.start
            self.taken += own.taken
            self.modes[""].add(spent(seen))
            for mode in sorted({s.mode for s in seen}):
                self.modes.setdefault(mode, Spent()).add(spent([s for s in seen if s.mode == mode]))
            for s in seen:
                _more(self.blocked, s.label, length([s.exposed]))
                _more(self.stragglers, s.last, length([s.late]))

    def merge(self, other: Summary) -> None:
        """The steps of another one."""
        self.steps, self.ranks = self.steps + other.steps, other.ranks
        self.seconds, self.taken = self.seconds + other.seconds, self.taken + other.taken
        for mode, one in other.modes.items():
            self.modes.setdefault(mode, Spent()).add(one)
        for label, seconds in other.blocked.items():
            _more(self.blocked, label, seconds)
        for rank, seconds in other.stragglers.items():
            _more(self.stragglers, rank, seconds)

    def mean(self, mode: str = "") -> Spent:
        """A rank's step, of one mode or of all together."""
        return self.modes[mode].over(self.steps * self.ranks)

    @property
    def names(self) -> list[str]:
        """Of the modes that have communicated."""
        return [mode for mode in self.modes if mode]

    @property
    def step(self) -> float:
        """Seconds of a step."""
        return self.seconds / max(1, self.steps * self.ranks)

    @property
    def core_taken(self) -> float:
        """Seconds of a step in which the main thread had no core."""
        return self.taken / max(1, self.steps * self.ranks)

    @property
    def compute(self) -> float:
        """What is left of it: nothing was waited for."""
        return self.step - self.mean().exposed - self.mean().late - self.core_taken

    def waited_for(self) -> list[tuple[str, float]]:
        """Labels, and the seconds a rank waits for them in a step; the longest first."""
        longest = sorted(self.blocked.items(), key=lambda item: -item[1])
        return [(label, seconds / (self.steps * self.ranks)) for label, seconds in longest if seconds > 0]

    def straggler(self) -> tuple[int, float] | None:
        """The rank for which the others wait longest, and the seconds in a step; None if it is less than a hundredth of it."""
        rank, seconds = max(self.stragglers.items(), key=lambda item: item[1], default=(0, 0.0))
        seconds /= max(1, self.steps)
        return (rank, seconds) if seconds > 0.01 * self.step else None

    def table(self) -> str:
        """As text; times in milliseconds."""
        rows = [self._cells(name) for name in [*self.names, *([""] if len(self.names) > 1 else [])]]
        head = ("ms a step", "communication", "hidden", "exposed", "late peers", "MB sent", "Mbit/s")
        lines = [f"lightning_overlap: {self.steps} steps measured, means over {self.ranks} ranks", as_text(head, rows, numbers=True)]
        all_of = self.mean()
        parts = f"compute {self.compute * 1e3:.1f} + exposed {all_of.exposed * 1e3:.1f} + late peers {all_of.late * 1e3:.1f}"
        parts += f" + core taken {self.core_taken * 1e3:.1f}"
        lines.append(f"a step of {self.step * 1e3:.1f} ms = {parts}; {all_of.hidden_percent:.0f}% of the communication is hidden")
        longest = [f"{label} {seconds * 1e3:.1f}" for label, seconds in self.waited_for()[:5]]
        lines += [remark for name, remark in self.remarks.items() if remark and name in self.names]
        if longest:
            lines.append(f"waited for longest: {', '.join(longest)}")
        if (slow := self.straggler()) is not None:
            lines.append(f"rank {slow[0]} kept the others waiting for {slow[1] * 1e3:.1f} ms a step")
        return "\n".join(lines)

    def _cells(self, name: str) -> tuple[str, ...]:
        s = self.mean(name)
        times = [f"{seconds * 1e3:.1f}" for seconds in (s.communication, s.hidden, s.exposed, s.late)]
        return name or "together", *times, f"{s.nbytes / 1e6:.1f}", f"{s.bandwidth / 1e6:.0f}"


K = TypeVar("K")


def _more(counts: dict[K, float], key: K, seconds: float) -> None:
    counts[key] = counts.get(key, 0.0) + seconds


def spans(steps: Sequence[Step]) -> Iterator[tuple[int, str, str, Interval, int]]:
    """One step of all ranks as what can be drawn: rank, lane, name, interval, bytes."""
    for rank, (step, seen) in enumerate(zip(steps, compare(steps), strict=True)):
        for name, start, end in step.phases:
            yield rank, "compute", name, (start, end), 0
        for name, start, end in step.work:
            yield rank, "compute, stages", name, (start, end), 0
        for s in seen:
            yield rank, s.label.split("[")[0], s.label, s.wire, s.nbytes
            for what, waited in (("waited", s.exposed), ("late peer", s.late)):
                if waited[0] < waited[1]:
                    yield rank, "waits", f"{what}: {s.label}", waited, 0


def write_chrome_trace(steps: Sequence[Sequence[Step]], path: Path) -> None:
    """Writes steps of all ranks in Chrome's trace event format, which Perfetto opens: a process a rank, a thread a lane."""
    events: list[dict[str, object]] = []
    lanes: dict[str, int] = {}
    origin = min((s.start for step in steps for s in step), default=0.0)
    for step in steps:
        for rank, lane, name, (start, end), nbytes in spans(step):
            track = lanes.setdefault(lane, len(lanes))
            times = {"ts": (start - origin) * 1e6, "dur": (end - start) * 1e6}
            events.append({"ph": "X", "pid": rank, "tid": track, "name": name, **times, "args": {"bytes": nbytes}})
    for rank in range(len(steps[0]) if steps else 0):
        events.append({"ph": "M", "pid": rank, "name": "process_name", "args": {"name": f"rank {rank}"}})
        for lane, track in lanes.items():
            events.append({"ph": "M", "pid": rank, "tid": track, "name": "thread_name", "args": {"name": lane}})
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
