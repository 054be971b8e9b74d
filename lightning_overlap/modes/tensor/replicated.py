"""Gradients of replicated parameters (norms, biases of row layers) of which each rank has a summand: their sum over the ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from lightning_overlap.decision import ConfigError
from lightning_overlap.ranks.group import Group


class ReplicatedGradients:
    """Sums the gradients over the ranks after backward, all of one dtype in one transfer.

    Args:
        parameters: those of which each rank has a summand of the gradient, by id.
        group: the ranks.
        in_backward: whether a backward runs that the mode was told of.

    Attributes:
        parameters: as above.
    """

    def __init__(self, parameters: Mapping[int, nn.Parameter], group: Group, in_backward: Callable[[], bool]) -> None:
        self.parameters = parameters
        self._group = group
        self._in_backward = in_backward
        self._are_summed = False
        """Gradients that are there before a backward are sums over the ranks already."""
        self._sums: dict[int, Tensor] = {}
        """By parameter, such a sum, during a backward that adds to it."""

    def guard(self) -> list[Callable[[], None]]:
        """Refuses backwards that the mode was not told of. Returns functions that end this."""
        trained = [p for p in self.parameters.values() if p.requires_grad]
        return [p.register_post_accumulate_grad_hook(self._refuse_unknown_backward).remove for p in trained]

    def _refuse_unknown_backward(self, parameter: nn.Parameter) -> None:
        if not self._in_backward():
            raise ConfigError(
                "loss.backward() gives a rank its part of some gradients, which nobody would sum with those of the other ranks of "
                "tensor_parallel: call self.manual_backward(loss)"
            )

    def start_backward(self) -> None:
        """Sets sums of an earlier backward apart (manual optimization leaves some), so that they are not summed once more."""
        for number, parameter in self.parameters.items() if self._are_summed else ():
            if parameter.grad is not None:
                self._sums[number] = parameter.grad.clone()  # it may be a view of a bucket, which is written over
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
        counts = grads[0].new_ones(len(parameters))  # by parameter, of the ranks that have a gradient
        for number, p in enumerate(parameters):
            if p.grad is None:
                counts[number] = 0  # a fill, which waits for nothing, as a copy from the host would
        flat = self._group.all_reduce(torch.cat([*(grad.flatten() for grad in grads), counts]), label="tensor.replicated").wait()
        *totals, counts = flat.split(sizes)
        for number, (parameter, grad, total) in enumerate(zip(parameters, grads, totals, strict=True)):
            before = self._sums.pop(id(parameter), None)
            if parameter.grad is None and not counts[number]:  # nobody has one
                parameter.grad = before
                continue
            grad.copy_(total.view(grad.shape))
            parameter.grad = grad if before is None else grad.add_(before)
