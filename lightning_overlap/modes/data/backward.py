"""Gradients of one backward: collected in the buckets, each of which is reduced when its last gradient has come."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

from torch import nn

from lightning_overlap.decision import ConfigError
from lightning_overlap.model.markers import has_late_gradient
from lightning_overlap.modes.data.buckets import Buckets
from lightning_overlap.modes.data.buffers import LiveBucket, Phase, groups_of
from lightning_overlap.modes.data.config import DataChoices
from lightning_overlap.modes.data.reductions import Reductions
from lightning_overlap.torch_seams import after_backward


class Backward:
    """Collects the gradients of backwards, of which the last one of an accumulation window is *open*: its gradients are reduced.

    Args:
        choices: sharding; whether buckets are reduced in backward or after it.
        buckets: the mode's.
        reductions: of the buckets.
        sparse: names and parameters with sparse gradients, which have no bucket.
        prepare: called before a backward opens.

    Attributes:
        is_open: whether a backward is open.
        order: ids of parameters in the order of their first gradients, as long as the mode may use it; then None.
        has_run: whether a backward has been open before.
    """

    def __init__(
        self,
        choices: DataChoices,
        buckets: Buckets,
        reductions: Reductions,
        sparse: Sequence[tuple[str, nn.Parameter]],
        prepare: Callable[[], None],
    ) -> None:
        self.is_open = self.has_run = False
        self.order: dict[int, None] | None = {}
        self._sharded = choices.is_sharded
        self._overlapped = choices.overlap_grad_reduce.value
        self._buckets = buckets
        self._reductions = reductions
        self._sparse = sparse
        self._prepare = prepare
        self._announced = False  # by Lightning
        self._warned = False

    def start(self, *, held: bool) -> None:
        """Called before a backward of a training step; ``held``: it only accumulates gradients."""
        self._announced = True
        if not held:
            self._open()

    def _open(self) -> None:
        self._prepare()
        self.is_open = True
        for group in groups_of(self._buckets.live):
            group.start_step()
        for bucket in self._buckets.live:
            collects = self._sharded or any(p.requires_grad for p in bucket.parameters)
            bucket.phase = Phase.COLLECTING if collects else Phase.IDLE
            bucket.missing = {id(p) for p in bucket.parameters} if collects else set()

    def collect(self, parameter: nn.Parameter, *, held: bool) -> None:
        """Puts the new gradient of a parameter into its bucket, and reduces the bucket if it is the last one.

        Raises:
            ConfigError: the bucket has been reduced in this backward.
        """
        if self._sharded and not self._announced:
            return  # the user's own backward, in validation for example: no training step uses its gradients
        bucket, view, _ = self._buckets.homes[id(parameter)]
        gradient = parameter.grad
        assert gradient is not None, "the hook runs after the gradient is accumulated"
        if not held and not self.is_open:
            self._open()  # loss.backward() without Lightning
            after_backward(self.finish)
        if self.order is not None:
            self.order.setdefault(id(parameter))
        if bucket.phase is not Phase.COLLECTING and not held:
            raise used_twice(bucket, parameter, "got a second gradient in one backward, after the first one was sent")
        if gradient is not view:
            view.copy_(gradient.to_dense() if gradient.is_sparse else gradient)
            parameter.grad = view
        if held:
            return
        if not has_late_gradient(parameter):
            bucket.missing.discard(id(parameter))
        if self._overlapped:
            for ready in [bucket] if self._reductions.any_order else self._buckets.live:
                if ready.missing:
                    break
                if ready.phase is Phase.COLLECTING:
                    self._reductions.post(ready)
            self._reductions.progress()

    def finish(self, *, held: bool = False) -> None:
        """Called after a backward. If it was open, all gradients are reduced afterwards."""
        self._announced = False
        if held or not self.is_open:
            return
        self.is_open, self.has_run = False, True
        unused: list[str] = []
        for bucket in self._buckets.live:
            if bucket.phase is Phase.COLLECTING:
                unused += self._fill(bucket)
                self._reductions.post(bucket)
                self._reductions.progress()
        self._reductions.finish()
        self._reductions.reduce_sparse(self._sparse)
        if self._buckets.live:
            self._reductions.refuse_not_finite(self._buckets.live[0].grads.device)
        if unused and not self._warned:
            self._warned = True
            warnings.warn(
                f"{len(unused)} parameters got no gradient on this rank; zeros are used (warned once): {', '.join(unused[:8])}",
                stacklevel=2,
            )
        if self._reductions.scatter:
            for bucket in self._buckets.live:
                for parameter in bucket.parameters:
                    parameter.grad = None  # only this rank's shard is reduced: nobody may take it for the gradient

    @staticmethod
    def _fill(bucket: LiveBucket) -> list[str]:
        """Completes a bucket's gradients, and returns the names of the trained parameters that had none."""
        unused = []
        for name, parameter, view in zip(bucket.names, bucket.parameters, bucket.views(bucket.grads), strict=True):
            if parameter.grad is None:
                view.zero_()
                if parameter.requires_grad:
                    parameter.grad = view
                    unused.append(name)
            elif parameter.grad is not view:  # from the user's own backward
                parameter.grad = view.copy_(parameter.grad)
        return unused


def used_twice(bucket: LiveBucket, parameter: nn.Parameter, event: str) -> ConfigError:
    """The error of a parameter that is used after its bucket was reduced in the same backward; ``event`` says how."""
    name = bucket.names[next(i for i, p in enumerate(bucket.parameters) if p is parameter)]
    return ConfigError(
        f"{name} {event}. Reentrant activation checkpoints do this to shared parameters: pass use_reentrant=False, or set "
        "data_parallel.overlap_grad_reduce: false."
    )
