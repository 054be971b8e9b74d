"""A group whose transfers take no time: what a step costs without communication, and what communication costs without it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lightning_overlap.comm import Group, Pending
from lightning_overlap.modes.base import OverlapMode
from lightning_overlap.profiling.callback import groups_of


class Skipped:
    """Stands in for a :class:`Group`. Transfers complete at once, with this rank's own numbers, and are kept for a replay.

    Attributes:
        calls: the transfers that were asked for, in order. Calling one makes it, and gives its pending.
    """

    def __init__(self, group: Group) -> None:
        self._group = group
        self.calls: list[Callable[[], Pending | None]] = []
        self._kept: list[Callable[[], Pending | None]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._group, name)

    def stop(self) -> None:
        """Keeps no more calls."""
        self._kept, self.calls = self.calls, []

    def start_step(self) -> None:
        self.calls.append(self._group.start_step)

    def all_reduce(self, x: Tensor, **how: Any) -> Pending:
        self.calls.append(lambda: self._group.all_reduce(x, **how))
        return self._done(x, how["label"])

    def reduce_scatter(self, x: Tensor, bounds: Any, **how: Any) -> Pending:
        self.calls.append(lambda: self._group.reduce_scatter(x, bounds, **how))
        return self._done(x[bounds[self._group.rank] : bounds[self._group.rank + 1]], how["label"])

    def all_gather(self, x: Tensor, bounds: Any, **how: Any) -> Pending:
        self.calls.append(lambda: self._group.all_gather(x, bounds, **how))
        return self._done(x, how["label"])

    def replay(self) -> None:
        """Makes the transfers that were kept until :meth:`stop`, all posted at once, and waits for them."""
        for pending in [call() for call in self._kept]:
            if pending is not None:
                pending.wait()

    def _done(self, x: Tensor, label: str) -> Pending:
        return Pending(self._group, label, 0, lambda: x)


def skip_transfers(mode: OverlapMode) -> list[Skipped]:
    """Every group of a mode gets a stand-in; gives them."""
    stand_ins = {name: Skipped(group) for name, group in groups_of(mode).items()}
    for name, stand_in in stand_ins.items():
        setattr(mode, name, stand_in)
    return list(stand_ins.values())
