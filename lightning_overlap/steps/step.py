"""The interface to the user's training step for a mode that runs it in parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor, nn


class Step(Protocol):
    """The user's ``training_step`` on one batch. A new object for each batch."""

    batch: Any
    """The unsharded batch, the same on all ranks that share it."""
    batch_size: int | None
    """The data loader's batch size; None if it is unknown."""
    key: tuple[int, ...]
    """Identifies the step in the run: the seed, the rank in the ``samples`` group, the epoch, the number of the batch."""

    @property
    def forward_spans_samples(self) -> bool:
        """Whether a forward waits for that of ranks which see other samples. All of these must run as many forwards."""

    def forward(self, part: Any, number: int) -> Tensor | None:
        """Calls ``training_step`` on one microbatch, and stores its logs under the microbatch's number.

        Args:
            part: the microbatch.
            number: its position in the batch.

        Returns:
            The loss with its graph; None if ``training_step`` returns no loss, or ended before it.
        """

    def backward(self, loss: Tensor, share: float) -> None:
        """Runs the backward of a microbatch's loss times ``share``, the microbatch's share of the batch's loss."""

    def hold(self) -> AbstractContextManager[None]:
        """Inside, the other modes accumulate gradients and do not reduce them, because they are not complete."""

    def start_backward(self) -> None:
        """Starts the backward of the batch. Call it before the first microbatch's backward."""

    def finish_backward(self) -> None:
        """Completes the backward of the batch. Call it after the last microbatch's backward."""

    def preserve(self, modules: Sequence[nn.Module], *, metrics: bool) -> AbstractContextManager[None]:
        """Restores the modules' buffers and attributes at the end, and the metrics if ``metrics``."""

    def trial(self) -> AbstractContextManager[None]:
        """Restores buffers, metrics and attributes of the module and its logs at the end."""

    @property
    def weight(self) -> Callable[[Any], Any] | None:
        """The module's method ``microbatch_weight(batch)``, or None."""

    def merge_logs(self, shares: Sequence[float], weights: Sequence[float] | None = None) -> Any:
        """Merges the losses, outputs and logs of all microbatches. Call it on a rank that has the losses.

        Args:
            shares: the share of each microbatch in the batch's loss.
            weights: the weight of each microbatch in means of other values; the shares by default.

        Returns:
            The argument of :meth:`log`, which can be pickled.
        """

    def log(self, merged: Any) -> None:
        """Logs the result of :meth:`merge_logs` from the rank with the loss. Call it on every rank."""
