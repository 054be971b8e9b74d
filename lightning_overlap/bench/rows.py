"""One row of a benchmark: the seconds of a step under one strategy, one figure for each repeat."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field


@dataclass
class Row:
    """Seconds a step under one strategy: one figure for each repeat."""

    name: str
    seconds: list[float] = field(default_factory=list)
    exposed: list[dict[str, float]] = field(default_factory=list)
    """Seconds a step of this rank's waits, by kind of transfer, such as ``data.grads`` (rows overlapped and plain only)."""
    memory: list[int] = field(default_factory=list)
    """Bytes in use after the last step: the process's resident size, on CUDA torch's peak allocation."""

    def add(self, seconds: float, memory: int, waits: dict[str, float] | None) -> None:
        """Adds a run.

        Args:
            seconds: of a step.
            memory: bytes in use after the last step.
            waits: seconds a step of the waits, by kind of transfer; None if they are not known.
        """
        self.seconds.append(seconds)
        self.memory.append(memory)
        if waits is not None:
            self.exposed.append(waits)

    def waited(self, mode: str = "") -> float:
        """Returns seconds a step of the waits for a mode's transfers, by default all modes'; the median of the runs."""
        return statistics.median(sum(s for kind, s in run.items() if kind.startswith(mode)) for run in self.exposed)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """(slowest - fastest) / median."""
        return (max(self.seconds) - min(self.seconds)) / self.median
