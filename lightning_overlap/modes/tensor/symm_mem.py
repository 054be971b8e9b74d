"""The backend ``symm_mem``: torch's fused operators, which multiply piece by piece over symmetric memory (CUDA with NVLink).

    region's input   one operator gathers it and multiplies it by all column layers; backward: one product and reduce-scatter for all
                     of them, while the input is gathered again for the weights' gradients
    row layer        product and reduce-scatter; backward: gather and product

The number of tokens must be divisible by the number of ranks; otherwise :mod:`lightning_overlap.modes.tensor.linear` computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightning_overlap.modes.tensor.gemm import Exchange, Gathered, Reduced
from lightning_overlap.modes.tensor.linear import InputState, PendingInput, RegionInput, RowOutput, cast, matrix
from lightning_overlap.ranks.group import Group
from lightning_overlap.torch_seams import WithoutSubclasses, register_symmetric_memory


@dataclass(frozen=True)
class Operators:
    """The two operators of ``torch.ops.symm_mem``, and the name by which they know the group."""

    all_gather_matmul: Callable[..., Any]
    matmul_reduce_scatter: Callable[..., Any]
    group: str

    def gather(self, x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Gathers all tokens of ``x`` ``(..., local tokens, in)``, and multiplies them by each of the weights ``(in, out)``."""
        with torch.autocast(x.device.type, enabled=False):  # operands are cast already, and autocast would change the dtype of results
            gathered, products = self.all_gather_matmul(x.contiguous(), list(weights), x.dim() - 2, self.group, return_A=True)
        return gathered, products

    def reduce(self, x: Tensor, weight: Tensor) -> Tensor:
        """This rank's tokens ``(..., local tokens, out)`` of the sum over the ranks of ``x`` ``(..., tokens, in)`` @ ``weight``."""
        with torch.autocast(x.device.type, enabled=False):
            summed: Tensor = self.matmul_reduce_scatter(x, weight, "sum", x.dim() - 2, self.group)
        return summed


def operators(group: Group) -> Operators:
    """torch's operators for a group."""
    register_symmetric_memory()
    fused = torch.ops.symm_mem
    return Operators(fused.fused_all_gather_matmul, fused.fused_matmul_reduce_scatter, group.process_group.group_name)


def fits(tokens: int, exchange: Exchange) -> bool:
    """Whether the operators take a sequence of that many tokens. The answer is the same on all ranks."""
    return tokens % exchange.group.size == 0


class _GatherProducts(RegionInput):
    """Gathers a region's input and computes its column layers' products in one operator.

    Forward: ``x`` ``(..., local tokens, features)``, weights ``(local out, features)`` -> all tokens ``(..., tokens, features)``, and
    a product ``(..., tokens, local out)`` for each weight.
    Backward: takes a gradient or None for each output; gives the gradients of ``x`` and the weights, in their shapes.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, fused: Operators, exchange: Exchange, name: str, *weights: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        ctx.fused, ctx.exchange, ctx.name = fused, exchange, name
        ctx.save_for_backward(x, *weights)
        gathered, products = fused.gather(x, [weight.t() for weight in weights])
        return (gathered, *products)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, direct: Tensor | None, *grads: Tensor | None) -> Any:
        x, *weights = ctx.saved_tensors
        factors = [(grad, weight) for grad, weight in zip(grads, weights, strict=True) if grad is not None]
        pending = None
        if any(ctx.needs_input_grad[4:]) and factors:
            tokens = x.shape[-2] * ctx.exchange.group.size
            pending = Gathered(x, tokens, ctx.exchange, f"tensor.input[{ctx.name}]", "column_wgrad")
        grad_x = None
        if ctx.needs_input_grad[0]:
            if direct is not None:  # the gradient from readers other than the column layers
                grad_x = Reduced(factors, ctx.exchange, f"tensor.input_grad[{ctx.name}]", "column_dgrad", direct).wait()
            elif factors:
                grad_x = ctx.fused.reduce(torch.cat([grad for grad, _ in factors], -1), torch.cat([weight for _, weight in factors]))
        rows = None if pending is None else pending.wait().flatten(0, -2)
        grad_weights = [
            grad.flatten(0, -2).t() @ rows if rows is not None and grad is not None and needed else None
            for grad, needed in zip(grads, ctx.needs_input_grad[4:], strict=True)
        ]
        return grad_x, None, None, None, *grad_weights


class FusedInput(PendingInput):
    """A region's complete input, with its column layers' products.

    Attributes:
        products: by id of a weight, the product ``(..., tokens, local out)``.
    """

    products: dict[int, Tensor]

    def product(self, weight_id: int) -> Tensor:
        return self.products[weight_id]

    def complete(self, reader: Any = None) -> Tensor:
        with WithoutSubclasses():
            return self.as_subclass(Tensor)


def gather_input(x: Tensor, layers: Sequence[nn.Module], fused: Operators, exchange: Exchange, name: str) -> FusedInput:
    """Gathers a region's input, as :func:`lightning_overlap.modes.tensor.linear.gather_input`, and computes its products."""
    gathered, *products = _GatherProducts.apply(cast(x), fused, exchange, name, *[cast(matrix(layer)) for layer in layers])
    pending: FusedInput = gathered.as_subclass(FusedInput)
    pending.state = InputState(exchange, name)
    pending.products, pending.parameters = {}, {}
    for layer, product in zip(layers, products, strict=True):
        weight_id = id(layer.weight)
        pending.parameters[weight_id] = (product, None)
        pending.products[weight_id] = product if layer.bias is None else product + cast(layer.bias)  # type: ignore[arg-type]
    return pending


class _ProductReduce(RowOutput):
    """Computes a row layer's product and its sum over the ranks in one operator.

    Forward: ``x`` ``(..., tokens, local features)``, ``weight`` ``(out, local features)`` -> ``(..., local tokens, out)``.
    Backward: takes a gradient in the output's shape; gives the gradients of ``x`` and ``weight``, in their shapes.
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
        gathered, (grad_x,) = ctx.fused.gather(grad, [weight])
        grad_weight = gathered.flatten(0, -2).t() @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, None


def row_product(x: Tensor, layer: nn.Module, fused: Operators) -> Tensor:
    """Computes a row layer's output, as :func:`lightning_overlap.modes.tensor.row.row_product`."""
    y: Tensor = _ProductReduce.apply(cast(x), cast(matrix(layer)), fused)
    return y if layer.bias is None else y + cast(layer.bias)  # type: ignore[arg-type]
