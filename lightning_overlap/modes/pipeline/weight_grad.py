"""A backward in two halves: gradients of inputs at once, those of linear layers' weights later.

Zero-bubble schedules fill a pipeline's waiting time with the second half (Qi et al., "Zero Bubble Pipeline Parallelism", 2023).

A forward is split when it runs, not when its backward does: a weight that is part of the graph has its hooks called by every
backward, also by one that computes nothing for it, and a hook cannot tell the two apart. So in a split forward linear layers
leave their weights out of the graph, and what is not split is torch's own ``F.linear``.

The products are those of torch's backward of ``F.linear``, operand for operand, hence bit-equal to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_overlap.decision import ConfigError

Deferred = dict[Tensor, list[Tensor]]
"""By weight, in the order of the backward, roots of graphs whose backward computes and accumulates the weight's gradient."""


class WeightGradients:
    """Splits backwards through modules. ::

        with gradients.splitting():
            loss = stage(x)
        with gradients.recording() as deferred:
            loss.backward()
        gradients.run(deferred)

    What is deferred are the weights of modules that are exactly ``nn.Linear``, in eager mode. Everything else has its gradient
    from ``loss.backward()`` as ever: biases, norms, embeddings, weights that other kinds of modules hold too, what is compiled.

    A weight of several uses in one split backward has one gradient, their sum, and its hooks run once. Its bits are those of a
    plain backward for two uses, and for more up to the order of additions; under autocast torch sums uses in the lower
    precision, and this in the parameter's. A weight that the model also reads past its module (``F.linear(x, layer.weight)``) gets
    its gradient in two halves, and its hooks run twice.

    Args:
        modules: those to split, with all that they contain.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._linears = splittable(_inside(modules))
        if any(isinstance(module.forward, _Forward) for module in self._linears):
            raise RuntimeError("the backward of these modules is split already: remove() the one before")
        for module in self._linears:
            vars(module)["forward"] = _Forward(module, self)
        self._splitting = False
        self._recording: Deferred | None = None

    def defers(self, weight: nn.Parameter) -> bool:
        """Whether its gradients come with :meth:`run`."""
        return any(module.weight is weight for module in self._linears)

    def remove(self) -> None:
        """Leaves the modules as they were."""
        for module in self._linears:
            del vars(module)["forward"]
        self._linears.clear()

    @contextmanager
    def splitting(self) -> Iterator[None]:
        """Around a forward whose backward will be recorded."""
        before, self._splitting = self._splitting, True
        try:
            yield
        finally:
            self._splitting = before

    @contextmanager
    def recording(self) -> Iterator[Deferred]:
        """Around the backward of a split forward, which computes all but the weights' gradients. Gives what is left to run.

        Activation checkpoints run their forward again inside: it is split as well.
        """
        assert self._recording is None, "one backward is recorded at a time"
        self._recording = {}
        try:
            yield self._recording
        finally:
            self._recording = None

    def run(self, deferred: Deferred) -> None:
        """Accumulates the weights' gradients as a plain backward does, hooks included, and frees what they are made from."""
        while deferred:
            torch.autograd.backward(deferred.pop(next(iter(deferred))))

    def splits(self, input: Tensor, weight: Tensor) -> bool:
        """Whether a linear layer's forward is to be split now, and can be."""
        return (
            not torch.compiler.is_compiling()
            and (self._splitting or self._recording is not None)
            and torch.is_grad_enabled()
            and type(weight) is nn.Parameter
            and weight.requires_grad
            and type(input) in (Tensor, nn.Parameter)
            and input.layout is torch.strided
            and not input.is_nested
            and input.device.type in ("cpu", "cuda")  # elsewhere F.linear is no matrix product of aten's
        )

    def defer(self, weight: Tensor, x: Tensor, weight_t: Tensor, gradient: Tensor) -> None:
        """Called in the backward of ``x @ weight_t``, with the gradient with respect to it.

        Raises:
            ConfigError: this is no backward that is recorded.
        """
        if self._recording is None or torch.is_grad_enabled():
            raise ConfigError(
                "a training_step that takes gradients itself (torch.autograd.grad, create_graph=True) cannot have its backward split: "
                "choose a pipeline_parallel.schedule that does not split it, 1f1b or interleaved"
            )
        with torch.enable_grad():
            root = _WeightGradient.apply(weight, x.detach(), gradient.detach(), _is_column_major(weight_t))
        self._recording.setdefault(weight, []).append(root)


class _Forward:
    """The ``forward`` of a linear layer whose backward can be split. Copies and pickles of the layer do without."""

    def __init__(self, module: nn.Linear, gradients: WeightGradients) -> None:
        self._module = module
        self._gradients = gradients

    def __call__(self, input: Tensor) -> Tensor:
        weight: Tensor = self._module.weight
        bias: Tensor | None = self._module.bias
        if not self._gradients.splits(input, weight):
            return F.linear(input, weight, bias)
        low = weight.detach()
        device = input.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            input, low = _cast(input, dtype), _cast(low, dtype)
            bias = None if bias is None else _cast(bias, dtype)
        # F.linear adds the bias within the product to what it can view as a matrix, and after it to the rest.
        within = bias if input.dim() == 2 or input.is_contiguous() else None
        x = input.flatten(0, -2) if input.dim() > 1 else input.unsqueeze(0)
        trigger = None if x.requires_grad else x.new_empty(0).requires_grad_()
        y = _Linear.apply(x, low.t(), within, trigger, partial(self._gradients.defer, weight))
        if input.dim() != 2:
            y = y.view(*input.shape[:-1], y.shape[-1])
        return y if within is bias else y + bias

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return getattr, (self._module, "forward")


class _Linear(torch.autograd.Function):
    """``x @ weight_t + bias`` of matrices, whose backward hands on what the weight's gradient is made from.

    Forward: ``x`` ``(rows, in)``, ``weight_t`` ``(in, out)``, ``bias`` ``(out)`` or None -> ``(rows, out)``. ``trigger`` is a tensor
    that requires a gradient, and gets none: with it the backward runs where nothing else asks for it.
    Backward: gradients of ``x`` and ``bias``; ``defer`` gets ``x``, ``weight_t`` and the output's gradient ``(rows, out)``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_t: Tensor,
        bias: Tensor | None,
        trigger: Tensor | None,
        defer: Callable[[Tensor, Tensor, Tensor], None],
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight_t)
        ctx.defer = defer
        return x.mm(weight_t) if bias is None else torch.addmm(bias, x, weight_t)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if gradient is None:
            return None, None, None, None, None
        x, weight_t = ctx.saved_tensors
        ctx.defer(x, weight_t, gradient)
        of_x = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = weight_t.mm(gradient.t()).t() if _is_column_major(x) else gradient.mm(weight_t.t())
        if ctx.needs_input_grad[2]:
            of_bias = gradient.sum(0)
        return of_x, None, of_bias, None, None


class _WeightGradient(torch.autograd.Function):
    """A root of a graph of its own, whose backward gives autograd the gradient of a weight.

    Forward: ``weight`` ``(out, in)``, ``x`` ``(rows, in)``, ``gradient`` ``(rows, out)`` -> a scalar without a value.
    Backward: the weight's gradient ``(out, in)``, in its dtype.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, x: Tensor, gradient: Tensor, column_major: bool) -> Tensor:
        ctx.save_for_backward(x, gradient)
        ctx.column_major = column_major
        ctx.dtype = weight.dtype
        return gradient.new_empty(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, gradient = ctx.saved_tensors
        product = gradient.t().mm(x) if ctx.column_major else x.t().mm(gradient).t()
        return product.to(ctx.dtype), None, None, None


def _inside(modules: Iterable[nn.Module]) -> list[nn.Module]:
    return list(dict.fromkeys(inner for module in modules for inner in module.modules()))


def splittable(modules: Sequence[nn.Module]) -> list[nn.Linear]:
    """Those of the modules whose weights' gradients can come later."""
    elsewhere = {
        id(p) for module in modules for name, p in module._parameters.items() if not (name == "weight" and is_plain(module))
    }
    return [module for module in modules if is_plain(module) and id(module.weight) not in elsewhere]


def what_splits(modules: Iterable[nn.Module]) -> tuple[float, tuple[str, ...]]:
    """The part of the trained elements of these modules, and of what they contain, whose gradients can come later; the classes of
    those that hold other matrices."""
    inside = _inside(modules)
    later = {id(module.weight) for module in splittable(inside)}
    trained = {id(p): p for module in inside for p in module._parameters.values() if p is not None and p.requires_grad}
    kinds = {
        type(module).__name__
        for module in inside
        for p in module._parameters.values()
        if p is not None and id(p) in trained and id(p) not in later and p.dim() > 1
    }
    total = sum(p.numel() for p in trained.values())
    return sum(trained[number].numel() for number in later) / max(1, total), tuple(sorted(kinds))


def is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module computes ``F.linear`` with a weight that is trained."""
    return (
        type(module) is nn.Linear
        and (isinstance(module.forward, _Forward) or getattr(module.forward, "__func__", None) is nn.Linear.forward)
        and type(module.weight) is nn.Parameter
        and module.weight.requires_grad
        and module.weight.is_floating_point()
    )


def _is_column_major(matrix: Tensor) -> bool:
    """Torch computes the transposed gradient for such an operand."""
    return matrix.stride(0) == 1 and matrix.stride(1) == matrix.shape[0]


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """What autocast does to an operand."""
    return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor
