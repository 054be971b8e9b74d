"""Torch's own fused operators as a backend: products in pieces over symmetric memory, which NVLink and its like offer (CUDA).

    a region's input   all column layers in one gather and product; backward: one product and reduce-scatter for all of them, beside
                       which the input is gathered again for the weights' gradients
    a row layer        product and reduce-scatter; backward: gather and product

They need tokens that the ranks divide evenly. What does not fit goes the way of :mod:`lightning_overlap.modes.tensor.linear`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightning_overlap.modes.tensor.gemm import Exchange, Gathered, Reduced
from lightning_overlap.modes.tensor.linear import PendingInput, Reading, RegionInput, RowOutput, cast, matrix
from lightning_overlap.ranks.group import Group
from lightning_overlap.torch_seams import WithoutSubclasses, register_symmetric_memory


@dataclass(frozen=True)
class Operators:
    """The two operators, as ``torch.ops.symm_mem`` has them, and the group's name, by which they know it."""

    all_gather_matmul: Callable[..., Any]
    matmul_reduce_scatter: Callable[..., Any]
    group: str

    def gather(self, x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """All tokens of ``x`` ``(..., own tokens, in)``, and their products with each of the weights ``(in, out)``."""
        with torch.autocast(x.device.type, enabled=False):  # operands are cast, and results go into buffers
            whole, products = self.all_gather_matmul(x.contiguous(), list(weights), x.dim() - 2, self.group, return_A=True)
        return whole, products

    def reduce(self, x: Tensor, weight: Tensor) -> Tensor:
        """This rank's tokens of the sum over the ranks of ``x @ weight``."""
        with torch.autocast(x.device.type, enabled=False):
            summed: Tensor = self.matmul_reduce_scatter(x, weight, "sum", x.dim() - 2, self.group)
        return summed


def operators(group: Group) -> Operators:
    """Those of torch."""
    register_symmetric_memory()
    fused = torch.ops.symm_mem
    return Operators(fused.fused_all_gather_matmul, fused.fused_matmul_reduce_scatter, group.process_group.group_name)


def fits(tokens: int, exchange: Exchange) -> bool:
    """Whether the operators can be used for a sequence of that many tokens: the same on all ranks."""
    return tokens % exchange.group.size == 0


class _Read(RegionInput):
    """Gathers a region's input, and computes its column layers' products, in one operator.

    Forward: ``x`` ``(..., own tokens, features)``, weights ``(own out, features)`` -> all tokens ``(..., tokens, features)``, and a
    product ``(..., tokens, own out)`` for each weight.
    Backward: their gradients, None where there is none -> those of ``x`` and of the weights, in their shapes.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, fused: Operators, exchange: Exchange, name: str, *weights: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        ctx.fused, ctx.exchange, ctx.name = fused, exchange, name
        ctx.save_for_backward(x, *weights)
        whole, products = fused.gather(x, [weight.t() for weight in weights])
        return (whole, *products)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_whole: Tensor | None, *grads: Tensor | None) -> Any:
        x, *weights = ctx.saved_tensors
        known = [(grad, weight) for grad, weight in zip(grads, weights, strict=True) if grad is not None]
        again = None
        if any(ctx.needs_input_grad[4:]) and known:
            tokens = x.shape[-2] * ctx.exchange.group.size
            again = Gathered(x, tokens, ctx.exchange, f"tensor.input[{ctx.name}]", "column_wgrad")
        of_x = None
        if ctx.needs_input_grad[0]:
            if of_whole is not None:  # of what has read the input beside the column layers
                of_x = Reduced(known, ctx.exchange, f"tensor.input_grad[{ctx.name}]", "column_dgrad", of_whole).wait()
            elif known:
                of_x = ctx.fused.reduce(torch.cat([grad for grad, _ in known], -1), torch.cat([weight for _, weight in known]))
        read = None if again is None else again.wait().flatten(0, -2)
        of_weights = [
            grad.flatten(0, -2).t() @ read if read is not None and grad is not None and needed else None
            for grad, needed in zip(grads, ctx.needs_input_grad[4:], strict=True)
        ]
        return of_x, None, None, None, *of_weights


class Ready(PendingInput):
    """The input of a region, whose column layers' products are there already."""

    products: dict[int, Tensor]

    def times(self, weight: int) -> Tensor:
        return self.products[weight]

    def complete(self, reader: Any = None) -> Tensor:
        with WithoutSubclasses():
            return self.as_subclass(Tensor)


def read(x: Tensor, layers: Sequence[nn.Module], fused: Operators, exchange: Exchange, name: str) -> Ready:
    """As :func:`lightning_overlap.modes.tensor.linear.read`."""
    whole, *products = _Read.apply(cast(x), fused, exchange, name, *[cast(matrix(layer)) for layer in layers])
    handle: Ready = whole.as_subclass(Ready)
    handle.reading = Reading(exchange, name)
    handle.products, handle.ports = {}, {}
    for layer, product in zip(layers, products, strict=True):
        number = id(layer.weight)
        handle.ports[number] = (product, None)
        handle.products[number] = product if layer.bias is None else product + cast(layer.bias)  # type: ignore[arg-type]
    return handle


class _Row(RowOutput):
    """A row layer's product, summed over the ranks, in one operator.

    Forward: ``x`` ``(..., tokens, own features)``, ``weight`` ``(out, own features)`` -> ``(..., own tokens, out)``.
    Backward: the output's gradient, in its shape -> those of ``x`` and ``weight``.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, fused: Operators) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.fused = fused
        return fused.reduce(x, weight.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        whole, (of_x,) = ctx.fused.gather(grad, [weight])
        of_weight = whole.flatten(0, -2).t() @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None
        return of_x, of_weight, None


def row_product(x: Tensor, layer: nn.Module, fused: Operators) -> Tensor:
    """As :func:`lightning_overlap.modes.tensor.linear.row_product`."""
    y: Tensor = _Row.apply(cast(x), cast(matrix(layer)), fused)
    return y if layer.bias is None else y + cast(layer.bias)  # type: ignore[arg-type]
