"""Column and row linear layers in autograd: what waits for what.

A region (attention, mlp) reads its input through a gather and gives its output through a row linear's reduction. Its column
linears (q, k, v; gate, up) read the same gather, as it arrives. Backward goes the way back in the order in which autograd runs
nodes that are ready: the latest made first. Hence the order in which :func:`read` makes them:

    finish      4. waits for the sum over the ranks of the input's gradient
    ports       3. the weights' gradients, under which that sum travels
    gather      2. the input's gradient of all linears together, sent piece by piece as it is computed
    linears     1. leave the gradient of their output; the first has the input gathered again, beside what follows
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
from torch.utils._pytree import tree_map

from lightning_overlap.modes.tensor.gemm import Exchange, Gathered, Reduced, gathered_product, part, weight_gradient


@dataclass
class Reading:
    """What the nodes of one reading share, for its backward."""

    exchange: Exchange
    name: str
    shape: torch.Size
    """Of all tokens, ``(..., tokens, features)``."""
    ports: dict[int, tuple[Tensor, Tensor | None]] = field(default_factory=dict)
    """By id of a weight, what stands for it and its bias in the graph."""
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
                own.view(*self.shape[:-2], -1, self.shape[-1]), self.shape[-2], self.exchange, f"tensor.input[{self.name}]", 1
            )


class _Finish(Function):
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


class _Port(Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Tensor | None, reading: Reading, number: int) -> Any:
        ctx.set_materialize_grads(False)
        ctx.reading, ctx.number = reading, number
        return weight.view_as(weight), None if bias is None else bias.view_as(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_: None) -> Any:
        reading: Reading = ctx.reading
        grads = reading.left.pop(ctx.number, [])
        of_weight = of_bias = None
        for grad in grads:
            if ctx.needs_input_grad[0]:
                assert reading.again is not None, "the linear has had it gathered"
                found = weight_gradient(grad, reading.again, reading.exchange)
                of_weight = found if of_weight is None else of_weight.add_(found)
            if ctx.needs_input_grad[1]:
                summed = grad.flatten(0, -2).sum(0)
                of_bias = summed if of_bias is None else of_bias.add_(summed)
        if not reading.left:
            reading.again = None
        return of_weight, of_bias, None, None


class _Gather(Function):
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
            reading.reduced = Reduced(factors, reading.exchange, f"tensor.input_grad[{reading.name}]", others)
        return None, None


class _Column(Function):
    @staticmethod
    def forward(
        ctx: Any, handle: Tensor, weight: Tensor, bias: Tensor | None, gathered: Gathered, reading: Reading, number: int
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.reading, ctx.number = reading, number
        ctx.kept = gathered if reading.exchange.keep_gathered else None
        ctx.save_for_backward(gathered.own, weight)
        return gathered_product(gathered, weight, bias, reading.exchange)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        if grad is not None:
            reading: Reading = ctx.reading
            own, weight = ctx.saved_tensors
            if ctx.needs_input_grad[0]:
                reading.factors.append((grad, weight))
            if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
                reading.left.setdefault(ctx.number, []).append(grad)
            if ctx.needs_input_grad[1]:
                reading.again = reading.again or ctx.kept
                reading.gather_again(own)
        return None, None, None, None, None, None


class _Whole(Function):
    """All tokens, for those that do not read them piece by piece."""

    @staticmethod
    def forward(ctx: Any, handle: Tensor, gathered: Gathered) -> Tensor:
        return gathered.whole()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None


class _Row(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, exchange: Exchange, name: str, reading: Reading | None, own: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight, own)
        ctx.exchange, ctx.name, ctx.reading = exchange, name, reading
        return Reduced([(x, weight.t())], exchange, f"tensor.output[{name}]").wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, own = ctx.saved_tensors
        exchange: Exchange = ctx.exchange
        tokens = x.shape[-2]
        bounds = exchange.parts(tokens)
        gathered = Gathered(grad, tokens, exchange, f"tensor.output_grad[{ctx.name}]")
        if ctx.reading is not None and own is not None:
            # What the region's column layers will need, behind what is needed now: the link would be idle until then.
            ctx.reading.gather_again(own)
        of_x = of_weight = None
        if ctx.needs_input_grad[1]:
            of_weight = gathered.own.t() @ part(x, bounds, exchange.own)
        if ctx.needs_input_grad[0]:
            of_x = gathered_product(gathered, weight.t(), None, exchange)
        if of_weight is not None:
            for number in range(len(bounds) - 1):
                if number != exchange.own:
                    of_weight.addmm_(gathered.rows(number).t(), part(x, bounds, number))
        return of_x, of_weight, None, None, None, None


ASKED = {
    getattr(torch.Tensor, name).__get__
    for name in ("shape", "dtype", "device", "ndim", "requires_grad", "is_cuda", "layout", "grad_fn", "is_leaf", "is_sparse")
} | {torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.__len__, torch.Tensor.is_floating_point}
"""What is known of a tensor whose numbers have not arrived."""


class Arriving(Tensor):
    """Activations of all tokens whose numbers are on their way. A column linear of its reading takes them as they come; for
    everything else it is the whole tensor, which is waited for."""

    reading: Reading
    gathered: Gathered

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in ASKED:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func is F.linear:
            found = _arguments(*args, **kwargs)
            if isinstance(found[0], Arriving) and id(found[1]) in found[0].reading.ports:
                return found[0].times(id(found[1]))
        args, kwargs = tree_map(lambda x: x.whole() if isinstance(x, Arriving) else x, (args, kwargs))
        return func(*args, **kwargs)

    def times(self, weight: int) -> Tensor:
        """The output of the column linear with the weight of that id."""
        stand_in, bias = self.reading.ports[weight]
        with torch._C.DisableTorchFunctionSubclass():
            return _Column.apply(self, stand_in, bias, self.gathered, self.reading, weight)  # type: ignore[no-untyped-call, no-any-return]

    def whole(self) -> Tensor:
        """The ordinary tensor."""
        with torch._C.DisableTorchFunctionSubclass():
            return _Whole.apply(self, self.gathered)  # type: ignore[no-untyped-call, no-any-return]


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


def read(x: Tensor, layers: Sequence[nn.Module], exchange: Exchange, name: str, tokens: int) -> Arriving:
    """Starts a region's reading.

    Args:
        x: this rank's tokens, ``(..., own tokens, features)``; all of them where tokens are not cut.
        layers: its column linears.
        exchange: the ranks.
        name: of the region, for its transfers.
        tokens: number of all.

    Returns:
        ``(..., tokens, features)``.
    """
    reading = Reading(exchange, name, torch.Size([*x.shape[:-2], tokens, x.shape[-1]]))
    x = _Finish.apply(x, reading)  # type: ignore[no-untyped-call]
    x = cast(x)
    for layer in layers:
        weight, bias = cast(matrix(layer)), layer.bias
        number = id(layer.weight)
        reading.ports[number] = _Port.apply(weight, None if bias is None else cast(bias), reading, number)  # type: ignore
    with torch.no_grad():
        gathered = Gathered(x, tokens, exchange, f"tensor.input[{name}]")
    handle = _Gather.apply(x, reading).as_subclass(Arriving)  # type: ignore[no-untyped-call]
    handle.reading, handle.gathered = reading, gathered
    return handle  # type: ignore[no-any-return]


def column_forward(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    """The forward of a layer whose own does not call ``F.linear`` on its weight."""

    def forward(x: Tensor) -> Tensor:
        if isinstance(x, Arriving) and id(layer.weight) in x.reading.ports:
            return x.times(id(layer.weight))
        return F.linear(x, matrix(layer), layer.bias)  # type: ignore[arg-type]

    return forward


def row_forward(
    layer: nn.Module, exchange: Exchange, name: str, take: Callable[[], tuple[Reading, Tensor] | None] = lambda: None
) -> Callable[[Tensor], Tensor]:
    """A row linear's forward: ``(..., tokens, own features)`` to ``(..., own tokens, out)``.

    Args:
        layer: whose forward it is.
        exchange: the ranks.
        name: of the layer, for its transfers.
        take: gives the reading of the layer's region, and this rank's tokens of it, if there is one that will gather them again.
    """

    def forward(x: Tensor) -> Tensor:
        y: Tensor = _Row.apply(cast(x), cast(matrix(layer)), exchange, name, *(take() or (None, None)))  # type: ignore[no-untyped-call]
        return y if layer.bias is None else y + cast(layer.bias)  # type: ignore[arg-type]

    return forward
