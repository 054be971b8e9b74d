"""The profiling callback."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_overlap.comm import Group
from lightning_overlap.modes.base import OverlapMode


def groups_of(mode: OverlapMode) -> dict[str, Group]:
    """The groups of a mode, by attribute."""
    return {name: value for name, value in vars(mode).items() if isinstance(value, Group)}


class OverlapProfiler(Callback):
    """Logs how much of this rank's communication was exposed, every ``log_every_n_steps``, and tells it at the end.

    ``overlap/exposed_ms``: milliseconds a step in which training waited for a transfer. ``overlap/hidden_percent``: the part of
    the time with reduces or sends in flight that it did not wait for (gloo only: NCCL's time is the device's).
    """

    def __init__(self) -> None:
        self._before = self._start = (0.0, 0.0, 0)

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._before = self._start = self._so_far(trainer)

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        now = self._so_far(trainer)
        if now[2] - self._before[2] >= trainer.log_every_n_steps:  # type: ignore[attr-defined]
            exposed, hidden = self._between(self._before, now)
            self._before = now
            values = {"overlap/exposed_ms": exposed, "overlap/hidden_percent": hidden}
            module.log_dict({key: value for key, value in values.items() if value is not None}, rank_zero_only=True)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        exposed, hidden = self._between(self._start, self._so_far(trainer))
        of = "" if hidden is None else f", {hidden:.0f}% of the communication hidden"
        rank_zero_info(f"lightning_overlap: {exposed:.1f} ms a step waited for transfers{of}")

    @staticmethod
    def _so_far(trainer: Trainer) -> tuple[float, float, int]:
        """Seconds waited, seconds with transfers in flight, steps."""
        groups = [group for mode in getattr(trainer.strategy, "modes", ()) for group in groups_of(mode).values()]
        return sum(group.exposed for group in groups), sum(group.busy for group in groups), trainer.global_step

    @staticmethod
    def _between(first: tuple[float, float, int], last: tuple[float, float, int]) -> tuple[float, float | None]:
        exposed, busy, steps = (b - a for a, b in zip(first, last, strict=True))
        hidden = 100 * max(0.0, 1 - exposed / busy) if busy else None
        return 1e3 * exposed / max(1, steps), hidden
