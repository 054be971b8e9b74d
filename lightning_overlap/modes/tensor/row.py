"""Row layers as autograd functions. In what order they and those of column layers compute: see :mod:`.linear`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lightning_overlap.modes.tensor.gemm import Exchange, Gathered, Reduced, add_remote_product, local_product, part
from lightning_overlap.modes.tensor.linear import InputState, RowOutput, cast, matrix


@dataclass
class _RowState:
    """State that the two nodes of a row layer's product share.

    Attributes:
        exchange: the ranks.
        name: of the layer, for its transfers.
        input_state: of the layer's region, whose input is gathered again in backward; None: it is not.
        gathered: the output's gradient.
        grad_x: the gradient of the layer's input, so far from this rank's tokens.
        grad_weight: the gradient of its weight, so far from this rank's tokens.
    """

    exchange: Exchange
    name: str
    input_state: InputState | None
    gathered: Gathered | None = None
    grad_x: Tensor | None = None
    grad_weight: Tensor | None = None


class _RemoteRowGrad(Function):
    """Completes the gradients of a row layer's input and weight from the other ranks' tokens, as these are received.

    Forward: ``x`` ``(..., tokens, local features)``, ``weight`` ``(out, local features)`` -> the same.
    Backward: gradients in these shapes. What this rank's tokens give is in the state; autograd passes None.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, state: _RowState) -> Any:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight)
        ctx.state = state
        return x.view_as(x), weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_: None) -> Any:
        x, weight = ctx.saved_tensors
        state: _RowState = ctx.state
        gathered, grad_x, grad_weight = state.gathered, state.grad_x, state.grad_weight
        state.gathered = state.grad_x = state.grad_weight = None
        if gathered is not None and grad_x is not None:
            add_remote_product(grad_x, gathered, weight.t(), None, state.exchange)
        if gathered is not None and grad_weight is not None:
            bounds = state.exchange.bounds(x.shape[-2])
            for index in range(len(bounds) - 1):
                if index != state.exchange.part_index:
                    grad_weight.addmm_(gathered.rows(index).t(), part(x, bounds, index))
        return grad_x, grad_weight, None


class _RowProduct(RowOutput):
    """A row layer's product, summed over the ranks.

    Forward: ``x`` ``(..., tokens, local features)``, ``weight`` ``(out, local features)``; ``local_input`` ``(n, features)`` or None,
    this rank's tokens of the region's input -> ``(..., local tokens, out)``, or all tokens if they are not sharded.
    Backward: takes a gradient in the output's shape. It posts the gathers of this gradient and of ``local_input``, and computes the
    gradients from this rank's tokens; autograd passes None on.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, state: _RowState, local_input: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, local_input)
        ctx.state = state
        return Reduced([(x, weight.t())], state.exchange, f"tensor.output[{state.name}]", "row_fprop").wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, local_input = ctx.saved_tensors
        state: _RowState = ctx.state
        tokens = x.shape[-2]
        gathered = state.gathered = Gathered(grad, tokens, state.exchange, f"tensor.output_grad[{state.name}]", "row_dgrad")
        if state.input_state is not None and local_input is not None:
            # The region's column layers need it next. Posted now, it keeps the link busy after the gather above.
            state.input_state.gather(local_input)
        if ctx.needs_input_grad[0]:
            state.grad_x = local_product(gathered, weight.t(), None, state.exchange)
        if ctx.needs_input_grad[1]:
            state.grad_weight = gathered.local.t() @ part(x, state.exchange.bounds(tokens), state.exchange.part_index)
        return None, None, None, None


def row_product(
    x: Tensor,
    layer: nn.Module,
    exchange: Exchange,
    name: str,
    *,
    input_state: InputState | None = None,
    local_input: Tensor | None = None,
    between: Callable[[], None] = lambda: None,
) -> Tensor:
    """Computes a row layer's output.

    Args:
        x: ``(..., tokens, local features)``.
        layer: the layer.
        exchange: the ranks.
        name: of the layer, for its transfers.
        input_state: of the layer's region, whose input is to be gathered again in backward.
        local_input: this rank's tokens of that input, ``(n, features)``.
        between: called where the next region's input can be prepared.

    Returns:
        ``(..., local tokens, out)``; all tokens if they are not sharded.
    """
    state = _RowState(exchange, name, input_state)
    x, weight = _RemoteRowGrad.apply(cast(x), cast(matrix(layer)), state)
    between()
    y: Tensor = _RowProduct.apply(x, weight, state, local_input)
    return y if layer.bias is None else y + cast(layer.bias)  # type: ignore[arg-type]
