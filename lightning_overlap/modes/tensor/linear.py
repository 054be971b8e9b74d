"""Column and row linear layers in autograd: what waits for what.

A region (attention, mlp) reads its input through a gather and gives its output through a row layer's reduction. Its column layers
(q, k, v; gate, up) read the same gather, as it arrives. Backward goes the way back in the order in which autograd runs nodes that
are ready: the latest made first. Hence the order in which nodes are made:

    of a row layer    input    5. the gradients of input and weight, with the others' parts of the output's as they arrive
                      rest     4. of what reads the output (below): the weights' gradients from the others' tokens
                      output   3. posts the gather of the output's gradient, and computes what can be had from this rank's part
    of a reading      rest     as above, if there is a row layer before it; else here
                      finish   2. waits for the sum over the ranks of the input's gradient
                      own      1. the weights' gradients from this rank's tokens, under which that sum travels
                      gather   0. the input's gradient of all column layers together, sent piece by piece as it is computed
                      columns  leave the gradient of their output

What the weights' gradients need of the input is gathered again when the row layer's output gradient is.
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
    add_remote_product,
    add_remote_weight_gradient,
    gathered_product,
    local_product,
    local_weight_gradient,
    part,
)
from lightning_overlap.torch_seams import WithoutSubclasses, is_node_of


class RegionInput(Function):
    """A node where a region begins: what is computed from it sums its gradients over the ranks."""


class RowOutput(Function):
    """A node that gives a row layer's output, whose gradient is the same on all ranks, or of this rank's tokens."""


@dataclass
class Reading:
    """What the nodes of one reading share, for its backward.

    It holds no tensor that has a graph. The nodes hold it, and a tensor of theirs in it would close a circle through C++, which
    Python's garbage collector does not see: every step's graph would stay in memory. Who reads holds such tensors: see
    :class:`Prepared` and :class:`PendingInput`.
    """

    exchange: Exchange
    name: str
    shape: tuple[int, ...] = ()
    """Of all tokens, ``(..., tokens, features)``."""
    left: dict[int, list[Tensor]] = field(default_factory=dict)
    """By id of a weight, gradients of outputs whose weight's gradient is still to be computed."""
    factors: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Gradients of outputs and weights, whose products are the input's gradient."""
    again: Gathered | None = None
    reduced: Reduced | None = None

    def gather_again(self, own: Tensor) -> None:
        """Has the input gathered for the weights' gradients, if it is not yet.

        Args:
            own: this rank's tokens, ``(n, features)``.
        """
        if self.again is None:
            self.again = Gathered(
                own.view(*self.shape[:-2], -1, self.shape[-1]),
                self.shape[-2],
                self.exchange,
                f"tensor.input[{self.name}]",
                "column_wgrad",
            )


@dataclass
class Prepared:
    """A reading before what is read is known."""

    reading: Reading
    weights: dict[int, Tensor]
    """By id of a weight, the output of the node that adds the rest of its gradient."""


class _Finish(RegionInput):
    """Waits in backward for the sum over the ranks of the input's gradient. Its own input needs no gradient but that.

    Forward: ``x`` -> ``x``, this rank's tokens, ``(..., own tokens, features)``, floating.
    Backward: the gradient of ``x``, in its shape and dtype: the sum over column layers and ranks of ``grad @ weight``, which
    ``_Gather`` has posted.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, reading: Reading) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.reading = reading
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: None) -> Any:
        reduced, ctx.reading.reduced = ctx.reading.reduced, None
        return reduced.wait() if reduced is not None else None, None


class _Rest(Function):
    """Adds the other ranks' tokens to the gradient of a column layer's weight.

    Forward: ``weight`` ``(own out, features)`` -> itself.
    Backward: ``total``, the gradient from this rank's tokens ``(own out, features)`` -> that of all tokens, summed in place.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, reading: Reading, number: int) -> Any:
        ctx.set_materialize_grads(False)
        ctx.reading, ctx.number = reading, number
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, total: Tensor | None) -> Any:
        reading: Reading = ctx.reading
        for grad in reading.left.pop(ctx.number, []):
            assert reading.again is not None, "the column layer has had it gathered"
            assert total is not None, "this rank's part comes first"
            add_remote_weight_gradient(total, grad, reading.again, reading.exchange)
        if not reading.left:
            reading.again = None
        return total, None, None


class _Own(Function):
    """Computes the gradient of a column layer's weight from this rank's tokens, and that of its bias from all.

    Forward: ``weight`` ``(own out, features)`` and ``bias`` ``(own out)`` or None -> themselves.
    Backward: gradients of these shapes. Those of outputs, ``(..., tokens, own out)``, are in the reading: autograd passes None.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Tensor | None, reading: Reading, number: int) -> Any:
        ctx.set_materialize_grads(False)
        ctx.reading, ctx.number = reading, number
        return weight.view_as(weight), None if bias is None else bias.view_as(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_: None) -> Any:
        reading: Reading = ctx.reading
        of_weight = of_bias = None
        for grad in reading.left.get(ctx.number, []):
            if ctx.needs_input_grad[0]:
                assert reading.again is not None, "the column layer has had it gathered"
                found = local_weight_gradient(grad, reading.again, reading.exchange)
                of_weight = found if of_weight is None else of_weight.add_(found)
            if ctx.needs_input_grad[1]:
                summed = grad.flatten(0, -2).sum(0)
                of_bias = summed if of_bias is None else of_bias.add_(summed)
        if not ctx.needs_input_grad[0]:
            reading.left.pop(ctx.number, None)
        return of_weight, of_bias, None, None


class _Gather(RegionInput):
    """Stands for the gathered input; sends the input's gradient to the ranks that have its tokens.

    Forward: ``x`` ``(..., own tokens, features)`` -> ``(..., tokens, features)`` of the same dtype, with the memory of one element.
    Backward: ``others``, the gradient of all tokens from readers beside the column layers, or None. It posts the sum over the ranks of
    that and of the column layers' ``grad @ weight``, for which ``_Finish`` waits.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, reading: Reading) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.reading = reading
        # All that is asked of it is its shape. The storage of one element has nothing to be read.
        return x.new_empty(1).expand(reading.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, others: Tensor | None) -> Any:
        reading: Reading = ctx.reading
        factors, reading.factors = reading.factors, []
        if factors or others is not None:
            reading.reduced = Reduced(factors, reading.exchange, f"tensor.input_grad[{reading.name}]", "column_dgrad", others)
        return None, None


class _Column(Function):
    """A column layer's product, of tokens as they arrive.

    Forward: ``handle`` ``(..., tokens, features)``, which ``_Gather`` gives; ``weight`` ``(own out, features)``; ``bias``
    ``(own out)`` or None; ``gathered``, the tokens -> ``(..., tokens, own out)`` in the tokens' dtype.
    Backward: the output's gradient, in its shape, is left in the reading; autograd passes None on.
    """

    @staticmethod
    def forward(
        ctx: Any, handle: Tensor, weight: Tensor, bias: Tensor | None, gathered: Gathered, reading: Reading, number: int
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.reading, ctx.number = reading, number
        ctx.kept = gathered if reading.exchange.keep_gathered else None
        ctx.save_for_backward(gathered.local, weight)
        return gathered_product(gathered, weight, bias, reading.exchange)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        if grad is not None:
            reading: Reading = ctx.reading
            own, weight = ctx.saved_tensors
            if ctx.needs_input_grad[0]:
                reading.factors.append((grad, weight.detach()))
            if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
                reading.left.setdefault(ctx.number, []).append(grad)
            if ctx.needs_input_grad[1]:
                reading.again = reading.again or ctx.kept
                reading.gather_again(own)
        return None, None, None, None, None, None


class _Whole(Function):
    """All tokens, for readers that do not take them as they arrive.

    Forward: ``handle`` ``(..., tokens, features)`` and ``gathered``, the tokens -> ``(..., tokens, features)``, waited for.
    Backward: the gradient, in that shape, goes to ``_Gather``.
    """

    @staticmethod
    def forward(ctx: Any, handle: Tensor, gathered: Gathered) -> Tensor:
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
    """Divides the gradient of a region's further output by the number of ranks: inputs of a region sum their gradients over them.

    All ranks compute such an output alike (a router's loss). What is computed from a row layer's output is exempt: its gradient does
    not come to the region's input on a way that is not summed already.

    Args:
        x: the output; whatever is no tensor with a graph is returned as it is.
        ranks: their number.
    """
    if type(x) not in (Tensor, View) or x.grad_fn is None:
        return x
    visited: set[Any] = set()
    waiting: list[Any] = [x.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in visited or is_node_of(node, RegionInput):
            continue
        if is_node_of(node, RowOutput):
            return x
        visited.add(node)
        waiting += [before for before, _ in node.next_functions]
    return _ScaleGradient.apply(x, ranks)


@dataclass
class _RowState:
    """What the nodes of one row product share."""

    exchange: Exchange
    name: str
    reading: Reading | None
    gathered: Gathered | None = None
    of_x: Tensor | None = None
    of_weight: Tensor | None = None


class _RowInput(Function):
    """Computes the gradients of a row layer's input and weight, from the other ranks' tokens as they arrive.

    Forward: ``x`` ``(..., tokens, own features)`` and ``weight`` ``(out, own features)`` -> themselves.
    Backward: gradients of these shapes, of all tokens. Those from this rank's tokens are in the state: autograd passes None.
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
        gathered, of_x, of_weight = state.gathered, state.of_x, state.of_weight
        state.gathered = state.of_x = state.of_weight = None
        if gathered is not None and of_x is not None:
            add_remote_product(of_x, gathered, weight.t(), None, state.exchange)
        if gathered is not None and of_weight is not None:
            bounds = state.exchange.bounds(x.shape[-2])
            for number in range(len(bounds) - 1):
                if number != state.exchange.part_index:
                    of_weight.addmm_(gathered.rows(number).t(), part(x, bounds, number))
        return of_x, of_weight, None


class _RowProduct(RowOutput):
    """A row layer's product, summed over the ranks.

    Forward: ``x`` ``(..., tokens, own features)``, ``weight`` ``(out, own features)`` -> ``(..., own tokens, out)``; all tokens where
    they are not cut. ``own``: this rank's tokens of the region's input, to be gathered again in backward; None: they are not.
    Backward: posts the gather of the output's gradient, and computes what this rank's part of it gives, see the order above.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, state: _RowState, own: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, own)
        ctx.state = state
        return Reduced([(x, weight.t())], state.exchange, f"tensor.output[{state.name}]", "row_fprop").wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, own = ctx.saved_tensors
        state: _RowState = ctx.state
        tokens = x.shape[-2]
        gathered = state.gathered = Gathered(grad, tokens, state.exchange, f"tensor.output_grad[{state.name}]", "row_dgrad")
        if state.reading is not None and own is not None:
            # What the region's column layers will need, behind what is needed now: the link would be idle until then.
            state.reading.gather_again(own)
        if ctx.needs_input_grad[0]:
            state.of_x = local_product(gathered, weight.t(), None, state.exchange)
        if ctx.needs_input_grad[1]:
            state.of_weight = gathered.local.t() @ part(x, state.exchange.bounds(tokens), state.exchange.part_index)
        return None, None, None, None


class PendingInput(StandIn):
    """Activations of all tokens whose numbers are on their way. A column linear of its reading takes them as they come; for
    everything else it is the whole tensor, which is waited for."""

    reading: Reading
    gathered: Gathered
    ports: dict[int, tuple[Tensor, Tensor | None]]
    """By id of a weight, what stands for it and its bias in the graph."""

    description = "the input of an attention or mlp, whose tokens are sharded over the ranks of tensor_parallel,"

    @classmethod
    def compute(cls, func: Any, args: Any, kwargs: Any) -> Any:
        if func in METADATA:
            with WithoutSubclasses():
                return func(*args, **kwargs)
        if func is F.linear:
            found = _arguments(*args, **kwargs)
            if isinstance(found[0], PendingInput) and id(found[1]) in found[0].ports:
                return found[0].times(id(found[1]))
        return super().compute(func, args, kwargs)

    def times(self, weight: int) -> Tensor:
        """The output of the column linear with the weight of that id."""
        stand_in, bias = self.ports[weight]
        with WithoutSubclasses():
            return _Column.apply(self, stand_in, bias, self.gathered, self.reading, weight)

    def complete(self, reader: Any = None) -> Tensor:
        with WithoutSubclasses():
            return _Whole.apply(self, self.gathered)


def _arguments(input: Any, weight: Any, bias: Any = None) -> tuple[Any, Any, Any]:
    return input, weight, bias


def cast(x: Tensor) -> Tensor:
    """``x`` in the dtype in which autocast computes linear layers."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def matrix(layer: nn.Module) -> Tensor:
    """The weight as ``(out, in)``; transformers' Conv1D has it the other way round."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return weight if isinstance(layer, nn.Linear) else weight.t()


def prepare(layers: Sequence[nn.Module], exchange: Exchange, name: str) -> Prepared:
    """A reading to come: from here on the rest of its weights' gradients is computed, on the way back.

    Args:
        layers: the region's column layers.
        exchange: the ranks.
        name: of the region, for its transfers.
    """
    prepared = Prepared(Reading(exchange, name), {})
    for layer in layers:
        number = id(layer.weight)
        prepared.weights[number] = _Rest.apply(cast(matrix(layer)), prepared.reading, number)
    return prepared


def read(x: Tensor, layers: Sequence[nn.Module], prepared: Prepared, tokens: int) -> PendingInput:
    """Starts a region's reading.

    Args:
        x: this rank's tokens, ``(..., own tokens, features)``; all of them where tokens are not cut.
        layers: its column layers.
        prepared: as :func:`prepare` gives it.
        tokens: number of all.

    Returns:
        ``(..., tokens, features)``.
    """
    reading, ports = prepared.reading, {}
    reading.shape = (*x.shape[:-2], tokens, x.shape[-1])
    x = cast(_Finish.apply(x, reading))
    for layer in layers:
        number, bias = id(layer.weight), layer.bias
        of_layer = (prepared.weights[number], None if bias is None else cast(bias))  # type: ignore[arg-type]
        ports[number] = _Own.apply(*of_layer, reading, number)
    # Detached, since a view would hold what it is a view of, which has the graph: in backward the reading holds what is gathered.
    gathered = Gathered(x.detach(), tokens, reading.exchange, f"tensor.input[{reading.name}]", "column_fprop")
    handle = _Gather.apply(x, reading).as_subclass(PendingInput)
    handle.reading, handle.gathered, handle.ports = reading, gathered, ports
    return handle


def column_forward(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    """The forward of a layer whose own does not call ``F.linear`` on its weight."""

    def forward(x: Tensor) -> Tensor:
        if isinstance(x, PendingInput) and id(layer.weight) in x.ports:
            return x.times(id(layer.weight))
        return F.linear(x, matrix(layer), layer.bias)  # type: ignore[arg-type]

    return forward


def row_product(
    x: Tensor,
    layer: nn.Module,
    exchange: Exchange,
    name: str,
    *,
    reading: Reading | None = None,
    own: Tensor | None = None,
    between: Callable[[], None] = lambda: None,
) -> Tensor:
    """A row layer's output.

    Args:
        x: ``(..., tokens, own features)``.
        layer: the layer.
        exchange: the ranks.
        name: of the layer, for its transfers.
        reading: of the layer's region, whose input is to be gathered again in backward.
        own: this rank's tokens of that.
        between: called where a reading to come can be prepared.

    Returns:
        ``(..., own tokens, out)``; all tokens where they are not cut.
    """
    state = _RowState(exchange, name, reading)
    x, weight = _RowInput.apply(cast(x), cast(matrix(layer)), state)
    between()
    y: Tensor = _RowProduct.apply(x, weight, state, own)
    return y if layer.bias is None else y + cast(layer.bias)  # type: ignore[arg-type]
