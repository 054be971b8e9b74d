"""Predicts a layout's step: rehearses a rank of each pipeline stage, and simulates them on the machine's links."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_overlap.config import OverlapConfig
from lightning_overlap.tune.network import Network
from lightning_overlap.tune.rehearsal import Rehearsal
from lightning_overlap.tune.simulate import Simulation, simulate

NEGLIGIBLE = 0.03
"""Part of a step below which waits are not worth a word."""
SATURATED = 0.9
"""Part of the time from which a link that carries data is the limit."""


@dataclass(frozen=True)
class Prediction:
    """What a layout's step will take.

    Attributes:
        overlapped: with transfers under way while ranks compute.
        plain: with transfers that begin when they are waited for.
        memory: bytes of the rank that needs most.
        limit: bytes that a rank has.
    """

    overlapped: Simulation
    plain: Simulation
    memory: int
    limit: int

    @property
    def fits(self) -> bool:
        """Whether a rank has the memory that it needs."""
        return self.memory <= self.limit

    @property
    def cost(self) -> tuple[float, ...]:
        """Seconds of a step. What does not fit costs more than what fits, and the more the larger it is."""
        return (0.0, self.overlapped.seconds) if self.fits else (1.0, float(self.memory))

    def exposed_in_words(self) -> str:
        """The exposed milliseconds of each mode: ``data 120, tensor 5``."""
        modes = {mode: f"{seconds * 1e3:.0f}" for mode, seconds in self.overlapped.exposed_by_mode().items()}
        late = f"{self.overlapped.late * 1e3:.0f}"
        words = [f"{mode} {ms}" for mode, ms in modes.items() if ms != "0"] + ([f"late peers {late}"] if late != "0" else [])
        return ", ".join(words) or "0"

    def reason(self, config: OverlapConfig) -> str:
        """One sentence on where the time of a step goes, with what may help.

        Args:
            config: of the layout.
        """
        run = self.overlapped
        kind, waited = max(run.exposed.items(), key=lambda item: item[1], default=("", 0.0))
        if max(waited, run.late) < NEGLIGIBLE * run.seconds:
            return "next to nothing is waited for: compute is the limit"
        if run.late > waited:
            return f"ranks wait {run.late * 1e3:.0f} ms for each other: the pipeline's bubble, and uneven stages"
        sentence = f"transfers of {kind} wait {waited * 1e3:.0f} ms"
        if run.busy > SATURATED:
            return f"{sentence}: the link is the limit, busy {run.busy:.0%} of the time"
        name, _, transfer = kind.partition(".")
        advice = next((mode.advise(transfer) for mode in config.modes if mode.name == name), "")
        return f"{sentence}; {advice} may help" if advice else sentence


def predict(rehearsals: Sequence[Rehearsal], network: Network, limit: int) -> Prediction:
    """Predicts a step.

    Args:
        rehearsals: of one rank of each pipeline stage.
        network: the machine's links.
        limit: bytes of memory that a rank has.
    """
    overlapped, plain = (simulate(rehearsals, network, overlapped=overlapped) for overlapped in (True, False))
    return Prediction(overlapped, plain, max(rehearsal.memory.peak for rehearsal in rehearsals), limit)
