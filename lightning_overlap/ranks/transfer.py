"""A transfer: its record, and the handle of a posted transfer."""

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
    """Returns a named span of torch's profiler, and of nsys through ``emit_nvtx``.

    Without a running profiler it does nothing, since torch's ``record_function`` costs 20 microseconds even then.
    """
    return record_function(label) if is_profiled() else nullcontext()


@dataclass(slots=True)
class Transfer:
    """Record of a transfer on one rank. Times are seconds of :func:`time.perf_counter`; None: not yet known.

    Attributes:
        label: name of the data, such as ``data.grads[3]``; the part before the first dot names the mode.
        number: count of the group's earlier transfers with this label. Label and number identify a transfer on all ranks.
        nbytes: bytes that this rank sends.
        ranks: global ranks of its members.
        posted: time of posting.
        started: time from which its first byte could be sent, since earlier transfers were done (gloo).
        done: time at which this rank had sent everything and, for a reduction, received everything (gloo).
        waited: start and end of this rank's wait for it.
        marks: on CUDA, time stamps of the device, by which :meth:`read` replaces the host's times: the host only queues work.
        complete: whether a wait has shown that it is complete.
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
        """Replaces the host's times by the device's. Blocks until the device has finished the transfer."""
        if self.marks is not None:
            self.posted, self.done, waited = self.marks.read()
            self.started = self.posted
            if waited is not None:
                self.waited, self.marks = waited, None


class Waiter(Protocol):
    """Waits for operations that an engine has posted."""

    def arrived(self) -> bool:
        """Whether :meth:`wait` would return at once; False where that is not known."""

    def wait(self) -> None:
        """Blocks until the transfer is complete; on CUDA makes the current stream wait.

        Raises:
            TransferError: naming the transfer and the peers.
        """


class Arrived:
    """Waits for a transfer that is complete when it is posted, as in a group of one rank."""

    def arrived(self) -> bool:
        return True

    def wait(self) -> None:
        """Returns at once."""


class Pending:
    """A posted transfer, which owns its buffers until it has been waited for.

    Args:
        transfer: its record.
        waiter: waits for the posted operations.
        finish: makes the result once the transfer is complete, such as the sum of the received shards.
        before_wait: called before the wait.
    """

    def __init__(
        self, transfer: Transfer, waiter: Waiter, finish: Callable[[], Tensor], before_wait: Callable[[], None] | None = None
    ) -> None:
        self.transfer = transfer
        self._waiter = waiter
        self._before_wait = before_wait
        self._finish: Callable[[], Tensor] | None = finish
        self._result: Tensor | None = None

    def arrived(self) -> bool:
        """Whether :meth:`wait` would return at once. On gloo known only for reductions and sends; False otherwise."""
        return self._waiter.arrived()

    def wait(self) -> Tensor:
        """Blocks until the result is complete (on CUDA: makes the current stream wait) and returns it. Idempotent.

        Raises:
            TransferError: naming the transfer and the peers.
        """
        if self._finish is not None:
            if self._before_wait is not None:
                self._before_wait()
            with span(f"wait for {self.transfer.label}"):
                self._wait()
            finish, self._finish = self._finish, None
            self._result = finish()
        assert self._result is not None, "finish returns the result of the transfer"
        return self._result

    def _wait(self) -> None:
        start, marks = time.perf_counter(), self.transfer.marks
        stamp = marks and marks.now()
        self._waiter.wait()
        self.transfer.waited = start, time.perf_counter()
        self.transfer.complete = True
        if marks is not None:
            marks.waited(stamp)
