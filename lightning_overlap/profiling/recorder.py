"""Records the steps of one rank: phases of the main thread, transfers, and work of modes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from lightning_overlap.modes.base import OverlapMode
from lightning_overlap.profiling.trace import BETWEEN, Step
from lightning_overlap.ranks.clock import Clock, Timeline
from lightning_overlap.ranks.group import Group, Transfer


class StepRecorder:
    """Records chosen steps. It makes the groups log their transfers until :meth:`detach`.

    Args:
        modes: the modes that run.
        groups: the groups over which they communicate.
        clock: of the main thread, or of the device that computes.
    """

    def __init__(self, modes: Sequence[OverlapMode], groups: Sequence[Group], clock: Clock) -> None:
        self._modes, self._groups, self._clock = modes, groups, clock
        self._log: list[Transfer] = []
        self._phases, self._work = Timeline(clock), Timeline(clock)
        self._open: tuple[int, Any] | None = None  # the number of the step under way, if it is recorded, and the stamp of its start
        self._phase: tuple[str, Any] = ("", None)
        self._cpu_seconds: float | None = None  # see Step.cpu_seconds
        self._samples = self._tokens = 0  # of the step under way
        self._counted_at: float | None = None  # the thread's CPU time at the last count
        self._previous_start = 0.0  # of the step before
        self._steps: list[Step] = []
        clock.start()
        for group in groups:
            group.log, group.clock = self._log, clock

    def start_step(self, index: int, *, record: bool) -> None:
        """Begins a step, and ends the one before.

        Args:
            index: number of the step.
            record: whether the step is recorded.
        """
        self.end_step()
        self._samples = self._tokens = 0
        if record:
            self._clock.start()
            self._open = index, self._clock.now()
            self._cpu_seconds = 0.0
            for mode in self._modes:
                mode.timeline = self._work
        self._drop_transfers(self._previous_start)
        self._previous_start = time.perf_counter()

    def start_batch(self, samples: int, tokens: int) -> None:
        """Begins the forward of a batch of the step.

        Args:
            samples: of the batch.
            tokens: of the batch.
        """
        self._samples += samples
        self._tokens += tokens
        self._phase, self._counted_at = ("forward", self._clock.now()), self._clock.ran()

    def next_phase(self, name: str) -> None:
        """Ends the phase under way, and begins another."""
        self._count()
        self._phase = (name, self._clock.now() if self._open is None else self._phases.add(*self._phase))

    def end_step(self) -> None:
        """Ends the step under way, if it is recorded."""
        if self._open is None:
            return
        self._count()
        (index, start), self._open = self._open, None
        end = self._phases.add(*self._phase)
        for transfer in self._log:
            transfer.read()
        read = self._clock.read
        spans = self._phases.take(), list(self._log), self._work.take()
        self._steps.append(Step(index, read(start), read(end), *spans, self._cpu_seconds, self._samples, self._tokens))
        for mode in self._modes:
            mode.timeline = None

    def take(self) -> list[Step]:
        """Returns the steps recorded since the last call."""
        steps, self._steps = self._steps, []
        return steps

    def detach(self) -> None:
        """Ends the recording: groups log no more."""
        self.end_step()
        for group in self._groups:
            group.log = group.clock = None

    def _count(self) -> None:
        """Adds the CPU time of the main thread in the phase under way."""
        now = self._clock.ran()
        if now is None or self._counted_at is None:
            self._cpu_seconds = None
        elif self._phase[0] != BETWEEN and self._cpu_seconds is not None:
            self._cpu_seconds += now - self._counted_at
        self._counted_at = now

    def _drop_transfers(self, before: float) -> None:
        """Drops the transfers that ended before a time, which belong to no later step.

        A transfer without a recorded end ended before its wait; a pipeline does not wait for its sends.
        """
        self._log[:] = [t for t in self._log if (t.posted if t.waited is None else t.waited[1] if t.done is None else 0.0) >= before]
