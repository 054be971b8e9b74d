"""A transfer: its record, and the handle of one that was posted."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor
from torch.profiler import record_function

from lightning_overlap.ranks.clock import Marks
from lightning_overlap.torch_seams import is_profiled


def span(label: str) -> AbstractContextManager[Any]:
    """A named span of torch's profiler, and of nsys through ``emit_nvtx``.

    Made only while one of them runs: torch's ``record_function`` costs 20 microseconds of the host's time also when none does.
    """
    return record_function(label) if is_profiled() else nullcontext()


@dataclass(slots=True)
class Transfer:
    """Record of a transfer on one rank. Times are seconds of :func:`time.perf_counter`; None: not yet, or not known.

    Attributes:
        label: names what is transferred, such as ``data.grads[3]``; the part before the first dot names the mode.
        number: count of the group's earlier transfers with this label: label and number mean the same transfer on every rank.
        nbytes: bytes that this rank sends.
        ranks: global ranks between which it is.
        posted: when it was posted.
        started: when its first byte could be sent, nothing else being in front of it (gloo).
        done: when all that this rank sends had gone, and, of a reduction, all had come (gloo).
        waited: from when to when this rank did nothing but wait for it.
        marks: on CUDA, stamps of the device, which :meth:`read` puts in place of the host's times: those tell only when the device
            was given work.
        complete: whether nothing of it has still to come or go, as far as anybody has waited for it.
    """

    label: str
    number: int
    nbytes: int
    ranks: tuple[int, ...]
    posted: float
    started: float | None = None
    done: float | None = None
    waited: tuple[float, float] | None = None
    marks: Marks | None = None
    complete: bool = False

    def read(self) -> None:
        """Replaces the host's times by the device's. Blocks until the device has come to the transfer's end."""
        if self.marks is not None:
            self.posted, self.done, waited = self.marks.read()
            self.started = self.posted
            if waited is not None:
                self.waited, self.marks = waited, None


class Waiter(Protocol):
    """Waits for what an engine has posted."""

    def arrived(self) -> bool:
        """Whether :meth:`wait` would return at once; False where that is not known."""

    def wait(self) -> None:
        """Blocks until the transfer is complete; on CUDA makes the current stream wait.

        Raises:
            TransferError: naming the transfer and the peers.
        """


class Arrived:
    """The waiter of a transfer that is complete when it is posted, as in a group of one rank."""

    def arrived(self) -> bool:
        return True

    def wait(self) -> None:
        """Returns at once."""


class Pending:
    """A posted transfer, which owns its buffers until it has been waited for.

    Args:
        transfer: its record.
        waiter: waits for what the engine has posted.
        finish: makes the result once the transfer is complete, such as the sum of the pieces that have come.
    """

    def __init__(self, transfer: Transfer, waiter: Waiter, finish: Callable[[], Tensor]) -> None:
        self.transfer = transfer
        self._waiter = waiter
        self._finish: Callable[[], Tensor] | None = finish
        self._result: Tensor | None = None

    def arrived(self) -> bool:
        """Whether :meth:`wait` would return at once. Of gloo's transfers, known only of reductions and sends."""
        return self._waiter.arrived()

    def wait(self) -> Tensor:
        """Blocks until the result is complete (on CUDA: makes the current stream wait) and returns it. Idempotent.

        Raises:
            TransferError: naming the transfer and the peers.
        """
        if self._finish is not None:
            with span(f"wait for {self.transfer.label}"):
                self._wait()
            finish, self._finish = self._finish, None
            self._result = finish()
        assert self._result is not None, "the finish of a transfer gives its result"
        return self._result

    def _wait(self) -> None:
        start, marks = time.perf_counter(), self.transfer.marks
        stamp = marks and marks.now()
        self._waiter.wait()
        self.transfer.waited = start, time.perf_counter()
        self.transfer.complete = True
        if marks is not None:
            marks.waited(stamp)
