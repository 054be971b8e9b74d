"""Sums gradients of replicated parameters (norms, biases of row layers) over the ranks, each of which computes a summand."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from lightning_overlap.decision import ConfigError
from lightning_overlap.ranks.group import Group


class ReplicatedGradients:
    """Sums the gradients after each backward, those of one dtype in one transfer.

    Args:
        parameters: the parameters, by id.
        group: the ranks.
        in_backward: whether a backward of the strategy runs.

    Attributes:
        parameters: the parameters, by id.
    """

    def __init__(self, parameters: Mapping[int, nn.Parameter], group: Group, in_backward: Callable[[], bool]) -> None:
        self.parameters = parameters
        self._group = group
        self._in_backward = in_backward
        self._are_summed = False
        """Whether gradients from before this backward are sums over the ranks already."""
        self._sums: dict[int, Tensor] = {}
        """By id of a parameter, such a sum, during a backward that adds to it."""

    def guard(self) -> list[Callable[[], None]]:
        """Refuses backwards that are not the strategy's. Returns functions that end this."""
        trained = [p for p in self.parameters.values() if p.requires_grad]
        return [p.register_post_accumulate_grad_hook(self._refuse_unknown_backward).remove for p in trained]

    def _refuse_unknown_backward(self, parameter: nn.Parameter) -> None:
        if not self._in_backward():
            raise ConfigError(
                "loss.backward() computes only this rank's summand of some gradients, and does not sum them over the ranks of "
                "tensor_parallel: call self.manual_backward(loss)"
            )

    def start_backward(self) -> None:
        """Keeps sums of an earlier backward out of the next sum. (With manual optimization there are some.)"""
        for number, parameter in self.parameters.items() if self._are_summed else ():
            if parameter.grad is not None:
                self._sums[number] = parameter.grad.clone()  # a copy: it may be a view of a bucket, which is overwritten
                parameter.grad = None

    def finish_backward(self, *, held: bool) -> None:
        """Sums the gradients, unless they are ``held``. Collective."""
        self._are_summed = not held
        if held:
            return
        trained = [p for p in self.parameters.values() if p.requires_grad]
        for dtype in sorted({p.dtype for p in trained}, key=str):
            self._sum([p for p in trained if p.dtype == dtype])

    def _sum(self, parameters: list[nn.Parameter]) -> None:
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        sizes = [*(grad.numel() for grad in grads), len(grads)]
        counts = grads[0].new_ones(len(parameters))  # by parameter, the number of ranks that have a gradient
        for number, p in enumerate(parameters):
            if p.grad is None:
                counts[number] = 0  # a fill: a copy from the host would synchronize
        flat = self._group.all_reduce(torch.cat([*(grad.flatten() for grad in grads), counts]), label="tensor.replicated").wait()
        *totals, counts = flat.split(sizes)
        for number, (parameter, grad, total) in enumerate(zip(parameters, grads, totals, strict=True)):
            before = self._sums.pop(id(parameter), None)
            if parameter.grad is None and not counts[number]:  # no rank has a gradient
                parameter.grad = before
                continue
            grad.copy_(total.view(grad.shape))
            parameter.grad = grad if before is None else grad.add_(before)
