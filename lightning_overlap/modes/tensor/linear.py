"""Column layers as autograd functions, created in the order that hides their transfers. The row layers' are in :mod:`.row`.

A region (attention, mlp) gathers its input and reduces its output over the ranks. Its column layers (q, k, v; gate, up) read one
gathered input, piece by piece as it is received; a row layer makes its output. Of the nodes that are ready, autograd runs the one
that was created last. So the order of creation (downwards) decides the order of backward (the numbers):

    row layer        _RemoteRowGrad      6. gradients of input and weight from the other ranks' tokens, as these are received
                     _RemoteWeightGrad   5. of the next region (below): adds the other ranks' tokens to its weights' gradients
                     _RowProduct         4. posts the gather of the output's gradient; computes with this rank's part of it
    region's input   _RemoteWeightGrad   5. as above; created here if no row layer comes before
                     _WaitForInputGrad   3. waits for the sum over the ranks of the input's gradient
                     _LocalWeightGrad    2. the weights' gradients from this rank's tokens, while that sum is in transfer
                     _PostInputGrad      1. the input's gradient from all column layers; posts its sum, piece by piece
    column layers    _ColumnProduct      0. keep the gradient of their output

Step 4 belongs to the region above, whose row layer it is: it also posts the gather of that region's input, which the steps 2 and 5
that follow need again. Nodes ending in Grad are named for what their backward does, the others for their forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lightning_overlap.model.stand_in import METADATA, StandIn, View
from lightning_overlap.modes.tensor.gemm import (
    Exchange,
    Gathered,
    Reduced,
    add_remote_weight_gradient,
    gathered_product,
    local_weight_gradient,
)
from lightning_overlap.torch_seams import WithoutSubclasses, is_node_of


class RegionInput(Function):
    """Base of nodes where a region begins: a gradient that reaches one is summed over the ranks."""


class RowOutput(Function):
    """Base of nodes that make a row layer's output: its gradient needs no sum, see :func:`scale_gradient`."""


@dataclass
class InputState:
    """State that the nodes of one region's input share in backward.

    No tensor in it may have a graph. The nodes hold this state, so such a tensor would close a reference cycle through C++, which
    Python's garbage collector does not see: the graph of every step would stay in memory. :class:`PreparedInput` and
    :class:`PendingInput` hold those tensors.

    Attributes:
        exchange: the ranks.
        name: of the region, for its transfers.
        shape: of all tokens, ``(..., tokens, features)``.
        output_grads: by id of a weight, gradients of its layer's outputs, from which the weight's gradient is to be computed.
        factors: pairs of an output's gradient and a weight; the sum of their products is the input's gradient.
        gathered: the input, gathered for the weights' gradients.
        input_grad: the sum over the ranks of the input's gradient.
    """

    exchange: Exchange
    name: str
    shape: tuple[int, ...] = ()
    output_grads: dict[int, list[Tensor]] = field(default_factory=dict)
    factors: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    gathered: Gathered | None = None
    input_grad: Reduced | None = None

    def gather(self, local: Tensor) -> None:
        """Posts the gather of the input for the weights' gradients, unless it is gathered already.

        Args:
            local: this rank's tokens, ``(n, features)``.
        """
        if self.gathered is None:
            self.gathered = Gathered(
                local.view(*self.shape[:-2], -1, self.shape[-1]),
                self.shape[-2],
                self.exchange,
                f"tensor.input[{self.name}]",
                "column_wgrad",
            )


@dataclass
class PreparedInput:
    """The nodes of a region's input that are created before the input is known.

    Attributes:
        state: the nodes' state.
        weights: by id of a weight, the output of its :class:`_RemoteWeightGrad`.
    """

    state: InputState
    weights: dict[int, Tensor]


class _WaitForInputGrad(RegionInput):
    """Waits in backward for the sum over the ranks of the input's gradient, which :class:`_PostInputGrad` has posted.

    Forward: ``x``, this rank's tokens ``(..., local tokens, features)``, floating -> ``x``.
    Backward: the gradient of ``x``, in its shape and dtype; autograd passes None.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, state: InputState) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.state = state
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: None) -> Any:
        input_grad, ctx.state.input_grad = ctx.state.input_grad, None
        return input_grad.wait() if input_grad is not None else None, None


class _RemoteWeightGrad(Function):
    """Adds to the gradient of a column layer's weight what the other ranks' tokens give.

    Forward: ``weight`` ``(local out, features)`` -> ``weight``.
    Backward: ``total`` ``(local out, features)``, the gradient from this rank's tokens -> from all tokens, summed in place.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, state: InputState, weight_id: int) -> Any:
        ctx.set_materialize_grads(False)
        ctx.state, ctx.weight_id = state, weight_id
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, total: Tensor | None) -> Any:
        state: InputState = ctx.state
        for grad in state.output_grads.pop(ctx.weight_id, []):
            assert state.gathered is not None, "the row layer, or else the column layer, has posted the gather"
            assert total is not None, "_LocalWeightGrad runs first"
            add_remote_weight_gradient(total, grad, state.gathered, state.exchange)
        if not state.output_grads:
            state.gathered = None
        return total, None, None


class _LocalWeightGrad(Function):
    """Computes the gradient of a column layer's weight from this rank's tokens, and the gradient of its bias from all tokens.

    Forward: ``weight`` ``(local out, features)``, ``bias`` ``(local out)`` or None -> the same.
    Backward: gradients in these shapes. The outputs' gradients ``(..., tokens, local out)`` are in the state; autograd passes None.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Tensor | None, state: InputState, weight_id: int) -> Any:
        ctx.set_materialize_grads(False)
        ctx.state, ctx.weight_id = state, weight_id
        return weight.view_as(weight), None if bias is None else bias.view_as(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_: None) -> Any:
        state: InputState = ctx.state
        grad_weight = grad_bias = None
        for grad in state.output_grads.get(ctx.weight_id, []):
            if ctx.needs_input_grad[0]:
                assert state.gathered is not None, "the row layer, or else the column layer, has posted the gather"
                product = local_weight_gradient(grad, state.gathered, state.exchange)
                grad_weight = product if grad_weight is None else grad_weight.add_(product)
            if ctx.needs_input_grad[1]:
                summed = grad.flatten(0, -2).sum(0)
                grad_bias = summed if grad_bias is None else grad_bias.add_(summed)
        if not ctx.needs_input_grad[0]:
            state.output_grads.pop(ctx.weight_id, None)
        return grad_weight, grad_bias, None, None


class _PostInputGrad(RegionInput):
    """Makes the placeholder of the gathered input. Backward posts the sum over the ranks of the input's gradient.

    Forward: ``x`` ``(..., local tokens, features)`` -> ``(..., tokens, features)`` of the same dtype, with the memory of one element.
    Backward: ``direct`` ``(..., tokens, features)`` or None, the gradient from readers other than the column layers. It posts the sum
    of ``direct`` and of the column layers' ``grad @ weight``; autograd passes None on.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, state: InputState) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.state = state
        return x.new_empty(1).expand(state.shape)  # only its shape is read

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, direct: Tensor | None) -> Any:
        state: InputState = ctx.state
        factors, state.factors = state.factors, []
        if factors or direct is not None:
            state.input_grad = Reduced(factors, state.exchange, f"tensor.input_grad[{state.name}]", "column_dgrad", direct)
        return None, None


class _ColumnProduct(Function):
    """A column layer's product of the gathered input, piece by piece as it is received.

    Forward: ``placeholder`` ``(..., tokens, features)`` from :class:`_PostInputGrad`; ``weight`` ``(local out, features)``; ``bias``
    ``(local out)`` or None; ``gathered``, the tokens -> ``(..., tokens, local out)`` in the tokens' dtype.
    Backward: keeps the output's gradient, in its shape, in the state; autograd passes None on.
    """

    @staticmethod
    def forward(
        ctx: Any, placeholder: Tensor, weight: Tensor, bias: Tensor | None, gathered: Gathered, state: InputState, weight_id: int
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.state, ctx.weight_id = state, weight_id
        ctx.gathered = gathered if state.exchange.keep_gathered else None
        ctx.save_for_backward(gathered.local, weight)
        return gathered_product(gathered, weight, bias, state.exchange)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        if grad is not None:
            state: InputState = ctx.state
            local, weight = ctx.saved_tensors
            if ctx.needs_input_grad[0]:
                state.factors.append((grad, weight.detach()))
            if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
                state.output_grads.setdefault(ctx.weight_id, []).append(grad)
            if ctx.needs_input_grad[1]:
                state.gathered = state.gathered or ctx.gathered
                state.gather(local)
        return None, None, None, None, None, None


class _CompleteInput(Function):
    """Waits for all tokens, for a reader that is no column layer.

    Forward: ``placeholder`` ``(..., tokens, features)``, ``gathered``, the tokens -> ``(..., tokens, features)``.
    Backward: the gradient, in that shape, goes to :class:`_PostInputGrad`.
    """

    @staticmethod
    def forward(ctx: Any, placeholder: Tensor, gathered: Gathered) -> Tensor:
        return gathered.wait()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None


class _ScaleGradient(Function):
    """Divides a gradient by the number of ranks. Forward: ``x``, any shape and floating dtype -> ``x``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: int) -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad / ctx.ranks, None


def scale_gradient(x: Any, ranks: int) -> Any:
    """Divides the gradient of a further output of a region (a router's loss) by the number of ranks.

    All ranks compute this output from the region's input, whose gradient is summed over the ranks: without the division it would
    count ``ranks`` times. An output that is computed from a row layer's output is returned as it is, because a row layer's gradient
    gives each rank a different summand.

    Args:
        x: the output. An object that is no tensor with a graph is returned as it is.
        ranks: their number.
    """
    if type(x) not in (Tensor, View) or x.grad_fn is None:
        return x
    visited: set[Any] = set()
    pending: list[Any] = [x.grad_fn]
    while pending:
        node = pending.pop()
        if node is None or node in visited or is_node_of(node, RegionInput):
            continue
        if is_node_of(node, RowOutput):
            return x
        visited.add(node)
        pending += [before for before, _ in node.next_functions]
    return _ScaleGradient.apply(x, ranks)


class PendingInput(StandIn):
    """A region's input ``(..., tokens, features)``, some of whose tokens are in transfer.

    A column layer of the region multiplies each piece when it is received. Every other function waits for the complete tensor.

    Attributes:
        state: the state of its nodes.
        gathered: the tokens.
        parameters: by id of a weight, the outputs of the nodes of that weight and its layer's bias.
    """

    state: InputState
    gathered: Gathered
    parameters: dict[int, tuple[Tensor, Tensor | None]]

    description = "the input of an attention or mlp, whose tokens are sharded over the ranks of tensor_parallel,"

    @classmethod
    def compute(cls, func: Any, args: Any, kwargs: Any) -> Any:
        if func in METADATA:
            with WithoutSubclasses():
                return func(*args, **kwargs)
        if func is F.linear:
            x, weight = _linear_arguments(*args, **kwargs)
            if isinstance(x, PendingInput) and id(weight) in x.parameters:
                return x.product(id(weight))
        return super().compute(func, args, kwargs)

    def product(self, weight_id: int) -> Tensor:
        """The output ``(..., tokens, local out)`` of the column layer whose weight has that id."""
        weight, bias = self.parameters[weight_id]
        with WithoutSubclasses():
            return _ColumnProduct.apply(self, weight, bias, self.gathered, self.state, weight_id)

    def complete(self, reader: Any = None) -> Tensor:
        with WithoutSubclasses():
            return _CompleteInput.apply(self, self.gathered)


def _linear_arguments(input: Any, weight: Any, bias: Any = None) -> tuple[Any, Any]:
    return input, weight


def cast(x: Tensor) -> Tensor:
    """Converts ``x`` to the dtype in which autocast computes linear layers; without autocast returns it as it is."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def matrix(layer: nn.Module) -> Tensor:
    """A layer's weight as ``(out, in)``. (In transformers' Conv1D it is ``(in, out)``.)"""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return weight if isinstance(layer, nn.Linear) else weight.t()


def prepare_input(layers: Sequence[nn.Module], exchange: Exchange, name: str) -> PreparedInput:
    """Creates the nodes that backward runs last of a region's input. See the order at the top.

    Args:
        layers: the region's column layers.
        exchange: the ranks.
        name: of the region, for its transfers.
    """
    prepared = PreparedInput(InputState(exchange, name), {})
    for layer in layers:
        weight_id = id(layer.weight)
        prepared.weights[weight_id] = _RemoteWeightGrad.apply(cast(matrix(layer)), prepared.state, weight_id)
    return prepared


def gather_input(x: Tensor, layers: Sequence[nn.Module], prepared: PreparedInput, tokens: int) -> PendingInput:
    """Posts the gather of a region's input.

    Args:
        x: this rank's tokens, ``(..., local tokens, features)``; all tokens if they are not sharded.
        layers: the region's column layers.
        prepared: from :func:`prepare_input`.
        tokens: the number of all tokens.

    Returns:
        The input ``(..., tokens, features)``.
    """
    state, parameters = prepared.state, {}
    state.shape = (*x.shape[:-2], tokens, x.shape[-1])
    x = cast(_WaitForInputGrad.apply(x, state))
    for layer in layers:
        weight_id, bias = id(layer.weight), layer.bias
        of_layer = (prepared.weights[weight_id], None if bias is None else cast(bias))  # type: ignore[arg-type]
        parameters[weight_id] = _LocalWeightGrad.apply(*of_layer, state, weight_id)
    # Detached: backward keeps what is gathered in the state, and a view of x would keep the graph of x there.
    gathered = Gathered(x.detach(), tokens, state.exchange, f"tensor.input[{state.name}]", "column_fprop")
    pending = _PostInputGrad.apply(x, state).as_subclass(PendingInput)
    pending.state, pending.gathered, pending.parameters = state, gathered, parameters
    return pending


def column_forward(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    """Makes the forward of a column layer whose own forward does not call ``F.linear`` with its weight."""

    def forward(x: Tensor) -> Tensor:
        if isinstance(x, PendingInput) and id(layer.weight) in x.parameters:
            return x.product(id(layer.weight))
        return F.linear(x, matrix(layer), layer.bias)  # type: ignore[arg-type]

    return forward
