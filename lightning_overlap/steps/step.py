"""The user's training step, as a mode sees it that runs the step in parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor, nn


class Step(Protocol):
    """The user's ``training_step`` on one batch. A new object for each batch."""

    batch: Any
    """The whole batch, the same on all ranks that share it."""
    batch_size: int | None
    """The data loader's; None if it does not tell."""
    key: tuple[int, ...]
    """Identifies the step in the run: the seed, the rank among those with other samples, the epoch, the batch's number."""

    def forward(self, part: Any, number: int) -> Tensor | None:
        """Calls ``training_step`` on one microbatch, and keeps what it logs under the microbatch's number.

        Args:
            part: the microbatch.
            number: its position in the batch.

        Returns:
            The loss with its graph; None if ``training_step`` returns no loss, or is left before it.
        """

    def backward(self, loss: Tensor, share: float) -> None:
        """Runs the backward of a microbatch's loss, multiplied by ``share``, its part of the batch's loss."""

    def hold(self) -> AbstractContextManager[None]:
        """Inside, the other modes accumulate gradients and do not reduce them: they are not complete."""

    def start_backward(self) -> None:
        """Call it before the first microbatch's backward."""

    def finish_backward(self) -> None:
        """Call it after the last microbatch's backward, when gradients are complete."""

    def aside(self, modules: Sequence[nn.Module], *, metrics: bool) -> AbstractContextManager[None]:
        """Inside, forwards leave no trace on these modules (parameters excepted), nor on the metrics, if ``metrics``."""

    def trial(self) -> AbstractContextManager[None]:
        """Inside, forwards leave no trace: on buffers, metrics and attributes of the module, or in its logs."""

    @property
    def weight(self) -> Callable[[Any], Any] | None:
        """The module's method ``microbatch_weight(batch)``, if it has one."""

    def logged(self, shares: Sequence[float], weights: Sequence[float] | None = None) -> Any:
        """Merges the losses, outputs and logs of all microbatches. Call it on a rank that has the losses.

        Args:
            shares: of each microbatch in the batch's loss.
            weights: of each microbatch in means of other values; the shares by default.

        Returns:
            An object that can be pickled, for :meth:`log`.
        """

    def log(self, merged: Any) -> None:
        """Logs what :meth:`logged` has returned on the rank with the loss. Call it on every rank."""
