"""Transfers that take no time: what a step costs without communication, and what communication costs without it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from lightning_overlap.modes.base import OverlapMode
from lightning_overlap.ranks.group import Group, Pending


class Skipped:
    """Takes the place of a group's verbs, on the group itself, which modes hand to their parts.

    Transfers complete at once, with this rank's own numbers, and are kept for a replay.

    Args:
        group: what has to do without transfers.
        announcements: labels of transfers that are made all the same, since they tell a receiver what comes next.

    Attributes:
        calls: the transfers that were asked for, in order. Calling one makes it, and gives its pending.
    """

    def __init__(self, group: Group, announcements: Sequence[str] = ()) -> None:
        self._group = group
        self._announcements = announcements
        self.calls: list[Callable[[], Pending | None]] = []
        self._kept: list[Callable[[], Pending | None]] = []
        for verb in ("start_step", "all_reduce", "reduce_scatter", "all_gather", "all_to_all", "send", "receive"):
            setattr(group, verb, partial(getattr(self, f"_{verb}"), getattr(group, verb)))

    def stop(self) -> None:
        """Keeps no more calls."""
        self._kept, self.calls = self.calls, []

    def post(self) -> list[Pending]:
        """Posts the transfers that were kept until :meth:`stop`, all at once."""
        return [pending for call in self._kept if (pending := call()) is not None]

    def _start_step(self, make: Callable[..., None]) -> None:
        self.calls.append(make)

    def _all_reduce(self, make: Callable[..., Pending], x: Tensor, **how: Any) -> Pending:
        self.calls.append(partial(make, x, **how))
        return self._group.completed(x, label=how["label"])

    def _reduce_scatter(self, make: Callable[..., Pending], x: Tensor, bounds: Any, **how: Any) -> Pending:
        self.calls.append(partial(make, x, bounds, **how))
        return self._group.completed(x[bounds[self._group.rank] : bounds[self._group.rank + 1]], label=how["label"])

    def _all_gather(self, make: Callable[..., Pending], x: Tensor, bounds: Any, **how: Any) -> Pending:
        self.calls.append(partial(make, x, bounds, **how))
        return self._group.completed(x, label=how["label"])

    def _all_to_all(self, make: Callable[..., Pending], x: Tensor, send_sizes: Any, receive_sizes: Any, **how: Any) -> Pending:
        self.calls.append(partial(make, x, send_sizes, receive_sizes, **how))
        return self._group.completed(x.new_zeros(sum(receive_sizes), *x.shape[1:]), label=how["label"])

    def _send(self, make: Callable[..., Pending], x: Tensor, to: int, **how: Any) -> Pending:
        if how["label"] in self._announcements:
            return make(x, to, **how)  # what it announces decides buffers
        self.calls.append(partial(make, x, to, **how))
        return self._group.completed(x, label=how["label"])

    def _receive(self, make: Callable[..., Pending], x: Tensor, source: int, **how: Any) -> Pending:
        if how["label"] in self._announcements:
            return make(x, source, **how)
        self.calls.append(partial(make, x, source, **how))
        return self._group.completed(x.zero_(), label=how["label"])


def skip_transfers(mode: OverlapMode) -> list[Skipped]:
    """Every group of a mode does without its transfers from now on."""
    return [Skipped(group, mode.announcements) for group in mode.groups]
