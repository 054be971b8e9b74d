"""Time stamps of events on this rank, by the host's clock or by the device, which runs behind the host."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch


class Clock:
    """The clock of the main thread. A stamp is taken at an event and read later.

    Attributes:
        lane_seconds: CPU time of the threads that compute in the place of the main thread, see :mod:`lightning_overlap.steps.lanes`.
    """

    def __init__(self) -> None:
        self.lane_seconds = 0.0

    def start(self) -> None:
        """Called at the start of a measurement."""

    def now(self) -> Any:
        """Takes a stamp."""
        return time.perf_counter()

    def read(self, stamp: Any) -> float:
        """Returns a stamp in seconds of :func:`time.perf_counter`."""
        return float(stamp)

    def ran(self) -> float | None:
        """Returns the CPU time of the main thread, and of those in its place, in seconds; None where it does not compute."""
        return time.thread_time() + self.lane_seconds


class DeviceClock(Clock):
    """The clock of the current CUDA stream, which runs behind the main thread. Stamps are CUDA events."""

    def start(self) -> None:
        # Reads both clocks while the device is idle. Later events count from here: milliseconds in single precision are exact enough
        # for some seconds, but not for a run.
        torch.cuda.synchronize()
        self._zero = self.now()
        self._zero.synchronize()
        self._at = time.perf_counter()

    def now(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read(self, stamp: Any) -> float:
        stamp.synchronize()
        return self._at + float(self._zero.elapsed_time(stamp)) / 1e3

    def ran(self) -> float | None:
        return None


class Marks:
    """Time stamps of a CUDA transfer: its start, its end, and the wait of the stream for it.

    Args:
        clock: gives the stamps.
        works: the posted operations.
        beside: a stream that only waits for transfers, and so shows their ends.
    """

    def __init__(self, clock: Clock, works: Sequence[tuple[Any, int]], beside: Any) -> None:
        self._clock = clock
        self._posted = clock.now()
        with torch.cuda.stream(beside):
            for work, _ in works:
                work.wait()
            self._done = clock.now()
        self._waited: tuple[Any, Any] | None = None

    def now(self) -> Any:
        """Takes a stamp."""
        return self._clock.now()

    def waited(self, start: Any) -> None:
        """Records that the stream has waited for the transfer since the stamp ``start``."""
        self._waited = start, self._clock.now()

    def read(self) -> tuple[float, float, tuple[float, float] | None]:
        """Returns start, end, and (start, end) of the wait, None without one; in seconds of :func:`time.perf_counter`."""
        waited = self._waited and (self._clock.read(self._waited[0]), self._clock.read(self._waited[1]))
        return self._clock.read(self._posted), self._clock.read(self._done), waited


class Timeline:
    """Named spans of this rank's work.

    Attributes:
        spans: name, stamp of the start, stamp of the end.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.spans: list[tuple[str, Any, Any]] = []

    def add(self, name: str, start: Any) -> Any:
        """Adds a span from ``start`` until now, and returns the stamp of now."""
        end = self.clock.now()
        self.spans.append((name, start, end))
        return end

    @contextmanager
    def during(self, name: str) -> Iterator[None]:
        """Adds a span of the code inside."""
        start = self.clock.now()
        yield
        self.add(name, start)

    def take(self) -> list[tuple[str, float, float]]:
        """Returns all spans, in seconds of :func:`time.perf_counter`, and forgets them."""
        spans, self.spans = self.spans, []
        return [(name, self.clock.read(start), self.clock.read(end)) for name, start, end in spans]
