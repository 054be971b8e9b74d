"""Replaces transfers by nothing, to time a step without communication, and repeats them, to time communication alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_overlap.modes.base import OverlapMode
from lightning_overlap.ranks.group import Group, Pending


class Skipped:
    """Replaces the verbs of a group, on the object itself, since modes pass it to their parts.

    Transfers complete at once, with this rank's values, and are recorded for :meth:`post`.

    Args:
        group: whose transfers are skipped.
        announcements: labels of transfers that are still made, since their content decides the receiver's buffers.

    Attributes:
        calls: the skipped transfers, in order. A call of one posts it and returns its pending.
    """

    def __init__(self, group: Group, announcements: Sequence[str] = ()) -> None:
        self._group = group
        self._announcements = announcements
        self.calls: list[Callable[[], Pending | None]] = []
        self._recorded: list[Callable[[], Pending | None]] = []
        for verb in ("start_step", "all_reduce", "reduce_scatter", "all_gather", "all_to_all", "send", "receive"):
            setattr(group, verb, partial(getattr(self, f"_{verb}"), getattr(group, verb)))

    def stop(self) -> None:
        """Ends the recording."""
        self._recorded, self.calls = self.calls, []

    @torch.no_grad()  # recorded tensors may require gradients
    def post(self) -> list[Pending]:
        """Posts all transfers that were recorded until :meth:`stop`."""
        return [pending for call in self._recorded if (pending := call()) is not None]

    def _start_step(self, make: Callable[..., None]) -> None:
        self.calls.append(make)

    def _all_reduce(self, make: Callable[..., Pending], x: Tensor, **options: Any) -> Pending:
        self.calls.append(partial(make, x, **options))
        return self._group.completed(x, label=options["label"])

    def _reduce_scatter(self, make: Callable[..., Pending], x: Tensor, bounds: Any, **options: Any) -> Pending:
        self.calls.append(partial(make, x, bounds, **options))
        return self._group.completed(x[bounds[self._group.rank] : bounds[self._group.rank + 1]], label=options["label"])

    def _all_gather(self, make: Callable[..., Pending], x: Tensor, bounds: Any, **options: Any) -> Pending:
        self.calls.append(partial(make, x, bounds, **options))
        return self._group.completed(x, label=options["label"])

    def _all_to_all(self, make: Callable[..., Pending], x: Tensor, send_sizes: Any, receive_sizes: Any, **options: Any) -> Pending:
        if options["label"] in self._announcements:
            return make(x, send_sizes, receive_sizes, **options)
        self.calls.append(partial(make, x, send_sizes, receive_sizes, **options))
        return self._group.completed(x.new_zeros(sum(receive_sizes), *x.shape[1:]), label=options["label"])

    def _send(self, make: Callable[..., Pending], x: Tensor, to: int, **options: Any) -> Pending:
        if options["label"] in self._announcements:
            return make(x, to, **options)
        self.calls.append(partial(make, x, to, **options))
        return self._group.completed(x, label=options["label"])

    def _receive(self, make: Callable[..., Pending], x: Tensor, source: int, **options: Any) -> Pending:
        if options["label"] in self._announcements:
            return make(x, source, **options)
        self.calls.append(partial(make, x, source, **options))
        return self._group.completed(x.zero_(), label=options["label"])


def skip_transfers(mode: OverlapMode) -> list[Skipped]:
    """Skips the transfers of all groups of a mode from now on."""
    return [Skipped(group, mode.announcements) for group in mode.groups]
