"""Splits backward into two halves: it computes gradients of inputs at once, and defers those of linear layers' weights.

Zero-bubble schedules compute the second half while a rank would wait (Qi et al., "Zero Bubble Pipeline Parallelism", 2023).

The decision is taken in forward. A weight in the graph has its hooks called by every backward, even by one that computes no gradient
for it, and a hook cannot tell the two apart. So in a split forward linear layers keep their weights out of the graph. Without
splitting they call torch's ``F.linear``.

The products have the same operands as in torch's backward of ``F.linear``, so they are bit-equal.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_overlap.decision import ConfigError
from lightning_overlap.torch_seams import parameters_of

Deferred = dict[Tensor, list[Tensor]]
"""By weight, in the order of backward: roots of graphs, whose backward computes and accumulates the weight's gradient."""


class WeightGradients:
    """Splits backwards through modules. ::

        with gradients.splitting():
            loss = stage(x)
        with gradients.recording() as deferred:
            loss.backward()
        gradients.run(deferred)

    It defers the weights of modules whose class is ``nn.Linear`` itself, in eager mode. ``loss.backward()`` computes all other
    gradients: of biases, norms, embeddings, weights that a module of another class holds too, and compiled modules.

    A weight with several uses in one split backward gets one gradient, their sum, and its hooks run once. For two uses it is bit-equal
    to that of a plain backward; for more, the order of additions differs. Under autocast torch sums uses in the lower precision, this
    class in the parameter's. A weight that the model also reads without its module (``F.linear(x, layer.weight)``) gets its gradient
    in two parts, and its hooks run twice.

    Args:
        modules: the modules to split, with all modules inside them.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._linears = splittable(_inside(modules))
        if any(isinstance(module.forward, _Forward) for module in self._linears):
            raise RuntimeError("the backward of these modules is split already: call remove() first")
        for module in self._linears:
            vars(module)["forward"] = _Forward(module, self)
        self._threads = threading.local()  # one may run a forward while another one runs a backward
        self._recording: Deferred | None = None

    def defers(self, weight: nn.Parameter) -> bool:
        """Whether :meth:`run` computes a weight's gradient."""
        return any(module.weight is weight for module in self._linears)

    def remove(self) -> None:
        """Restores the modules' forwards."""
        for module in self._linears:
            del vars(module)["forward"]
        self._linears.clear()

    @contextmanager
    def splitting(self, wanted: bool = True) -> Iterator[None]:
        """Inside, this thread's forward is split, so that its backward can be recorded; or it is not, if that is ``wanted``."""
        self._threads.splits = wanted
        try:
            yield
        finally:
            del self._threads.splits

    @contextmanager
    def recording(self) -> Iterator[Deferred]:
        """Inside, the backward of a split forward defers the weights' gradients. Yields them for :meth:`run`.

        Forwards that activation checkpoints run again inside are split too.
        """
        assert self._recording is None, "one backward is recorded at a time"
        self._recording = {}
        try:
            yield self._recording
        finally:
            self._recording = None

    def run(self, deferred: Deferred) -> None:
        """Computes and accumulates deferred gradients as a plain backward does, with hooks, and frees their operands."""
        while deferred:
            torch.autograd.backward(deferred.pop(next(iter(deferred))))

    def splits(self, input: Tensor, weight: Tensor) -> bool:
        """Whether to split the forward of a linear layer with these operands now."""
        return (
            not torch.compiler.is_compiling()
            and getattr(self._threads, "splits", self._recording is not None)
            and torch.is_grad_enabled()
            and type(weight) is nn.Parameter
            and weight.requires_grad
            and type(input) in (Tensor, nn.Parameter)
            and input.layout is torch.strided
            and not input.is_nested
            and input.device.type in ("cpu", "cuda")  # on other devices F.linear may be no matrix product
        )

    def defer(self, weight: Tensor, x: Tensor, weight_t: Tensor, gradient: Tensor) -> None:
        """Defers a weight's gradient. Called in the backward of ``x @ weight_t``.

        Args:
            weight: the parameter, ``(out, in)``.
            x: ``(rows, in)``.
            weight_t: the operand of the product, ``(in, out)``.
            gradient: of the product, ``(rows, out)``.

        Raises:
            ConfigError: no backward is recorded.
        """
        if self._recording is None or torch.is_grad_enabled():
            raise ConfigError(
                "training_step computes gradients itself (torch.autograd.grad, create_graph=True). Its backward cannot be split: set "
                "pipeline_parallel.schedule to 1f1b or interleaved, which do not split it"
            )
        with torch.enable_grad():
            root = _WeightGradient.apply(weight, x.detach(), gradient.detach(), _is_column_major(weight_t))
        self._recording.setdefault(weight, []).append(root)


class _Forward:
    """The ``forward`` of a linear layer whose backward can be split. Copies and pickles of the layer are ordinary layers."""

    def __init__(self, module: nn.Linear, gradients: WeightGradients) -> None:
        self._module = module
        self._gradients = gradients

    def __call__(self, input: Tensor) -> Tensor:
        weight: Tensor = self._module.weight
        bias: Tensor | None = self._module.bias
        if not self._gradients.splits(input, weight):
            return F.linear(input, weight, bias)
        operand = weight.detach()
        device = input.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            input, operand = _cast(input, dtype), _cast(operand, dtype)
            bias = None if bias is None else _cast(bias, dtype)
        # F.linear adds the bias inside the product if it can view the input as a matrix, and after the product otherwise.
        fused_bias = bias if input.dim() == 2 or input.is_contiguous() else None
        x = input.flatten(0, -2) if input.dim() > 1 else input.unsqueeze(0)
        trigger = None if x.requires_grad else x.new_empty(0).requires_grad_()
        y = _Linear.apply(x, operand.t(), fused_bias, trigger, partial(self._gradients.defer, weight))
        if input.dim() != 2:
            y = y.view(*input.shape[:-1], y.shape[-1])
        return y if fused_bias is bias else y + bias

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return getattr, (self._module, "forward")


class _Linear(torch.autograd.Function):
    """``x @ weight_t + bias`` of matrices. Backward passes the operands of the weight's gradient to ``defer``.

    Forward: ``x`` ``(rows, in)``, ``weight_t`` ``(in, out)``, ``bias`` ``(out)`` or None -> ``(rows, out)``. ``trigger`` is a tensor
    that requires a gradient and gets None: it makes backward run even if no other input requires a gradient.
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
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        if gradient is None:
            return None, None, None, None, None
        x, weight_t = ctx.saved_tensors
        ctx.defer(x, weight_t, gradient)
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = weight_t.mm(gradient.t()).t() if _is_column_major(x) else gradient.mm(weight_t.t())
        if ctx.needs_input_grad[2]:
            grad_bias = gradient.sum(0)
        return grad_x, None, grad_bias, None, None


class _WeightGradient(torch.autograd.Function):
    """The root of a separate graph. Its backward computes the gradient of a weight.

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
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        x, gradient = ctx.saved_tensors
        product = gradient.t().mm(x) if ctx.column_major else x.t().mm(gradient).t()
        return product.to(ctx.dtype), None, None, None


def _inside(modules: Iterable[nn.Module]) -> list[nn.Module]:
    return list(dict.fromkeys(inner for module in modules for inner in module.modules()))


def splittable(modules: Sequence[nn.Module]) -> list[nn.Linear]:
    """The linear layers among the modules whose weights' gradients can be deferred."""
    other_uses = {
        id(p) for module in modules for name, p in parameters_of(module).items() if not (name == "weight" and is_plain(module))
    }
    return [module for module in modules if is_plain(module) and id(module.weight) not in other_uses]


def what_splits(modules: Iterable[nn.Module]) -> tuple[float, tuple[str, ...]]:
    """How much of the given modules, with all modules inside them, a split backward can defer.

    Returns:
        The fraction of trained elements whose gradients can be deferred, and the class names of modules with other matrices.
    """
    inside = _inside(modules)
    deferrable = {id(module.weight) for module in splittable(inside)}
    trained = {id(p): p for module in inside for p in parameters_of(module).values() if p is not None and p.requires_grad}
    kinds = {
        type(module).__name__
        for module in inside
        for p in parameters_of(module).values()
        if p is not None and id(p) in trained and id(p) not in deferrable and p.dim() > 1
    }
    total = sum(p.numel() for p in trained.values())
    return sum(trained[number].numel() for number in deferrable) / max(1, total), tuple(sorted(kinds))


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
    """Whether a matrix is stored by columns: torch then computes the transposed gradient."""
    return matrix.stride(0) == 1 and matrix.stride(1) == matrix.shape[0]


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Casts an operand as autocast does."""
    return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor
