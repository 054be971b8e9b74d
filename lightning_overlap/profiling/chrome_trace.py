"""Writes measured steps in Chrome's trace event format, which Perfetto and ``chrome://tracing`` open.

A rank is a process, a row of the drawing a thread. Bars of a thread may not overlap in this format, so a row with transfers at the
same time has several threads. Arrows (flow events) go from the post of a transfer over its bar to the wait for it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import count
from pathlib import Path

from lightning_overlap.profiling.intervals import Interval
from lightning_overlap.profiling.trace import ObservedTransfer, Step, observe_transfers

THREADS = 1000
"""The most threads of a row."""


class _Trace:
    """Collects events.

    Args:
        origin: the time that is 0 in the trace, in seconds.

    Attributes:
        events: in the format, without the names of processes and threads.
        threads: names of threads by number. Those of a row have numbers that follow each other.
    """

    def __init__(self, origin: float) -> None:
        self.events: list[dict[str, object]] = []
        self.threads: dict[int, str] = {}
        self._origin = origin
        self._rows: dict[str, int] = {}
        self._ends: dict[tuple[int, int], float] = {}  # of the last bar, by rank and thread
        self._flows = count(1)

    def add_bar(self, rank: int, row: str, name: str, category: str, span: Interval, **args: object) -> int:
        """Adds a bar that begins no earlier than the ones of this row before it, and returns the number of its thread."""
        first = THREADS * self._rows.setdefault(row, len(self._rows))
        number = next(n for n in count(first) if self._ends.get((rank, n), span[0]) <= span[0])
        self._ends[rank, number] = span[1]
        self.threads[number] = row if number == first else f"{row} ({number - first + 1})"
        times = {"ts": self._microseconds(span[0]), "dur": self._microseconds(span[1]) - self._microseconds(span[0])}
        self.events.append({"ph": "X", "pid": rank, "tid": number, "name": name, "cat": category, **times, "args": args})
        return number

    def add_arrows(self, rank: int, name: str, ends: Sequence[tuple[int, float]]) -> None:
        """Adds arrows between bars.

        Args:
            rank: of all bars.
            name: of the arrows.
            ends: two or more threads with times at which they have a bar, in order of time.
        """
        flow = {"pid": rank, "id": next(self._flows), "name": name, "cat": "transfer"}
        phases = ["s", *["t"] * (len(ends) - 2), "f"]
        for phase, (thread, time) in zip(phases, ends, strict=True):
            end = {"bp": "e"} if phase == "f" else {}  # the arrow ends at the bar around its time, not at the next one
            self.events.append({"ph": phase, "tid": thread, "ts": self._microseconds(time), **flow, **end})

    def _microseconds(self, time: float) -> float:
        return (time - self._origin) * 1e6


def write_chrome_trace(steps: Sequence[Sequence[Step]], path: Path) -> None:
    """Writes steps of all ranks.

    Args:
        steps: of each the records of all ranks, on one clock.
        path: of the file, whose folder is made.
    """
    trace = _Trace(min((record.start for step in steps for record in step), default=0.0))
    for step in steps:
        for rank, (record, observed) in enumerate(zip(step, observe_transfers(step), strict=True)):
            _add_step(trace, rank, record, observed)
    names: list[dict[str, object]] = []
    for rank in range(len(steps[0]) if steps else 0):
        names.append({"ph": "M", "pid": rank, "name": "process_name", "args": {"name": f"rank {rank}"}})
        names.append({"ph": "M", "pid": rank, "name": "process_sort_index", "args": {"sort_index": rank}})
        for number, thread in sorted(trace.threads.items()):
            names.append({"ph": "M", "pid": rank, "tid": number, "name": "thread_name", "args": {"name": thread}})
            names.append({"ph": "M", "pid": rank, "tid": number, "name": "thread_sort_index", "args": {"sort_index": number}})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"traceEvents": [*names, *trace.events], "displayTimeUnit": "ms"}))


def _add_step(trace: _Trace, rank: int, record: Step, observed: Sequence[ObservedTransfer]) -> None:
    compute = None
    for name, start, end in record.phases:
        compute = trace.add_bar(rank, "compute", name, "compute", (start, end))
    for name, start, end in record.work:
        trace.add_bar(rank, "compute, stages", name, "compute", (start, end))
    waits = sorted(
        (wait, kind, number)
        for number, t in enumerate(observed)
        for kind, wait in (("late peer", t.late), ("waited", t.exposed))
        if wait[0] < wait[1]
    )
    waited: dict[int, tuple[int, float]] = {}  # by transfer, the first bar of its wait
    for wait, kind, number in waits:
        thread = trace.add_bar(rank, "waits", f"{kind}: {observed[number].label}", "wait", wait)
        waited.setdefault(number, (thread, wait[0]))
    for number, t in sorted(enumerate(observed), key=lambda item: item[1].wire):
        if t.wire[0] >= t.wire[1]:
            continue
        row = t.label.split("[")[0]
        ends = [] if compute is None or t.posted is None else [(compute, t.posted)]
        ends.append((trace.add_bar(rank, row, t.label, "transfer", t.wire, bytes=t.nbytes), t.wire[0]))
        if number in waited:
            ends.append(waited[number])
        elif compute is not None and t.wait is not None:
            ends.append((compute, t.wait))
        if len(ends) > 1:
            trace.add_arrows(rank, t.label, sorted(ends, key=lambda end: end[1]))
