"""When things happened on this rank: on the host's clock, or on the device that runs behind it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch


class Clock:
    """Of what the main thread does. A stamp is taken where something happens and read later."""

    def start(self) -> None:
        """To be called at the beginning of what is measured."""

    def now(self) -> Any:
        """A stamp."""
        return time.perf_counter()

    def read(self, stamp: Any) -> float:
        """The stamp in seconds of :func:`time.perf_counter`."""
        return float(stamp)

    def ran(self) -> float | None:
        """Seconds for which the main thread has had a core; None where it does not compute itself."""
        return time.thread_time()


class DeviceClock(Clock):
    """Of what the current CUDA stream does, to which the main thread gives work long before it is done. Stamps are events."""

    def start(self) -> None:
        # Both clocks are read when nothing is on the device. From then on events count from here: single precision
        # milliseconds are exact enough for seconds, not for a whole run.
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
    """A CUDA transfer: when the stream came to it, when it was complete, and when the stream waited for it.

    Args:
        clock: gives the stamps.
        works: what has been posted.
        beside: a stream that has nothing to do but to wait for transfers, which tells when they are complete.
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
        """A stamp."""
        return self._clock.now()

    def waited(self, start: Any) -> None:
        """From ``start``, a stamp, until now the stream waited for it."""
        self._waited = start, self._clock.now()

    def read(self) -> tuple[float, float, tuple[float, float] | None]:
        """Posted, done, and waited from and to, in seconds of :func:`time.perf_counter`."""
        waited = self._waited and (self._clock.read(self._waited[0]), self._clock.read(self._waited[1]))
        return self._clock.read(self._posted), self._clock.read(self._done), waited


class Timeline:
    """Spans of what this rank does.

    Attributes:
        spans: name, and the stamps of its start and end.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.spans: list[tuple[str, Any, Any]] = []

    def add(self, name: str, start: Any) -> Any:
        """A span from ``start`` until now, whose stamp it gives."""
        end = self.clock.now()
        self.spans.append((name, start, end))
        return end

    @contextmanager
    def during(self, name: str) -> Iterator[None]:
        """A span of what is done inside."""
        start = self.clock.now()
        yield
        self.add(name, start)

    def take(self) -> list[tuple[str, float, float]]:
        """All spans in seconds; it is empty afterwards."""
        spans, self.spans = self.spans, []
        return [(name, self.clock.read(start), self.clock.read(end)) for name, start, end in spans]
