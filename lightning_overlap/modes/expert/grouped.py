"""The experts of a layer that this rank has, and their products: one for each expert, over its rows.

The modules are those of Hugging Face's ``use_experts_implementation`` and those of :mod:`lightning_overlap.nn`: all experts of a layer
in one module, with three-dimensional parameters ``gate_up_proj`` (``up_proj`` without a gate) and ``down_proj``, their biases
``*_bias``, and attributes that tell the form: ``has_gate``; ``has_bias``; ``is_transposed``: weights are ``(in, out)``;
``is_concatenated``: gate and up are one after the other, which only the module's gate needs to know; ``has_post_expert_norm``: the
module's ``post_expert_norm`` follows the last product.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lightning_overlap.nn.moe import apply_gate


@dataclass
class WeightGradients:
    """The gradients of a module's parameters in one backward, to which each product adds its part.

    There is one gradient of a parameter for all products: autograd would make one of the parameter's size for each.

    Attributes:
        parameters: for each parameter, a tensor of its shape and dtype on the meta device; None: it needs no gradient.
        device: of the gradients.
        delayed: products of weight gradients wait until the last product of the rows' gradients has run.
    """

    parameters: list[Tensor | None]
    device: torch.device
    delayed: bool
    _waiting: list[Callable[[], None]] = field(default_factory=list, init=False)
    _sums: dict[int, Tensor] = field(default_factory=dict, init=False)
    _present: set[tuple[int, int]] = field(default_factory=set, init=False)

    def add(self, compute: Callable[[], None]) -> None:
        """Computes a part of the gradients by a function that calls :meth:`into`, now or at the end."""
        if self.delayed:
            self._waiting.append(compute)
        else:
            compute()

    def into(self, number: int, experts: range) -> tuple[Tensor, bool] | None:
        """Returns the gradient of some experts' parameter, and whether it has a value yet; None if it needs no gradient.

        The caller writes to it or adds to it. Of these experts, all have a value or none.
        """
        parameter = self.parameters[number]
        if parameter is None:
            return None
        if number not in self._sums:
            self._sums[number] = torch.empty_like(parameter, device=self.device)
        has_value = (number, experts.start) in self._present
        self._present.update((number, expert) for expert in experts)
        return self._sums[number][experts.start : experts.stop], has_value

    def finish(self) -> list[Tensor | None]:
        """Returns the gradients, zero for experts without rows. Another backward may follow."""
        for compute in self._waiting:
            compute()
        for number, parameter in enumerate(self.parameters):
            for expert in range(0 if parameter is None else len(parameter)):
                if (number, expert) not in self._present:
                    gradient, _ = self.into(number, range(expert, expert + 1)) or (None, False)
                    assert gradient is not None
                    gradient.zero_()
        gradients = [self._sums.get(number) for number in range(len(self.parameters))]
        self._waiting.clear()
        self._sums.clear()
        self._present.clear()
        return gradients


class Parameters(Function):
    """Joins the parameters to the products in the graph, since a product gives its weight's gradient to :class:`WeightGradients`.

    Forward: parameters -> a token (an empty tensor), which each product takes. Backward: runs after that of all products.
    """

    @staticmethod
    def forward(ctx: Any, gradients: WeightGradients, *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return parameters[0].new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> Any:
        return None, *ctx.gradients.finish()


@dataclass(frozen=True)
class Weights:
    """The parameters of a product, as :class:`WeightGradients` numbers them.

    Attributes:
        number: of the weight.
        bias_number: of the bias; None: the product has none.
        transposed: the weight is ``(E, in, out)``; otherwise ``(E, out, in)``.
        gradients: of the parameters.
    """

    number: int
    bias_number: int | None
    transposed: bool
    gradients: WeightGradients

    def matrices(self, weight: Tensor) -> Tensor:
        """Returns the weight as ``(E, in, out)``."""
        return weight if self.transposed else weight.mT

    def add_gradients(self, rows: Tensor, gradient: Tensor, experts: range, sizes: Sequence[int]) -> None:
        """Adds what some experts' rows and the gradient of their products give to the parameters' gradients."""
        left, right = (rows, gradient) if self.transposed else (gradient, rows)
        grouped = can_group(left, right)
        if grouped:
            _add(self.gradients.into(self.number, experts), lambda: _grouped_gradient(left, right, sizes))
        parts = zip(experts, left.split(list(sizes)), right.split(list(sizes)), gradient.split(list(sizes)), strict=True)
        for expert, of_left, of_right, of_expert in parts:
            one = range(expert, expert + 1)
            if len(of_left) and not grouped:
                _add_product(self.gradients.into(self.number, one), of_left.t(), of_right)
            if len(of_left) and self.bias_number is not None:
                _add(self.gradients.into(self.bias_number, one), partial(of_expert.sum, 0))


class Product(Function):
    """Multiplies rows by the weight of their expert and adds its bias.

    Forward: rows ``(N, in)``, sorted by expert; token of :class:`Parameters`; weight and bias of all experts, without a graph, in the
    rows' dtype -> ``(N, out)``. Backward: the gradient of the rows.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        token: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        weights: Weights,
        experts: range,
        sizes: Sequence[int],
    ) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.weights, ctx.experts, ctx.sizes = weights, experts, sizes
        product = _by_expert(rows, weights.matrices(weight)[_slice(experts)], sizes)
        if bias is not None:
            for part, of_expert in zip(product.split(list(sizes)), bias[_slice(experts)], strict=True):
                part += of_expert
        return product

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        rows, weight = ctx.saved_tensors
        weights: Weights = ctx.weights
        of_rows = of_token = None
        if ctx.needs_input_grad[0]:
            of_rows = _by_expert(gradient, weights.matrices(weight)[_slice(ctx.experts)].mT, ctx.sizes)
        if ctx.needs_input_grad[1]:
            # Detached, since the gradients wait in an object that a node holds.
            weights.gradients.add(partial(weights.add_gradients, rows.detach(), gradient, ctx.experts, ctx.sizes))
            of_token = gradient.new_empty(0)
        return of_rows, of_token, None, None, None, None, None


class LocalExperts:
    """The experts of a layer that this rank has.

    Args:
        module: the experts' module. Its parameters have this rank's experts only.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module  # whose attributes have no type
        first = "gate_up_proj" if module.has_gate else "up_proj"
        self.names = (first, "down_proj", f"{first}_bias", "down_proj_bias") if module.has_bias else (first, "down_proj")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the products: autocast's, or that of the weights."""
        weight: Tensor = getattr(self.module, self.names[0])
        kind = weight.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype

    def start(self, *, delay_wgrad: bool) -> ExpertsForward:
        """Starts a forward: the parameters enter the graph here.

        Args:
            delay_wgrad: products of weight gradients run after all products of rows' gradients.
        """
        return ExpertsForward(self, delay_wgrad)


class ExpertsForward:
    """One forward of a rank's experts, in any number of products. It must be kept out of the graph, since it has a part of it.

    Args:
        experts: of the layer.
        delay_wgrad: as in :meth:`LocalExperts.start`.
    """

    def __init__(self, experts: LocalExperts, delay_wgrad: bool) -> None:
        self._module = experts.module
        parameters: list[Tensor] = [getattr(experts.module, name) for name in experts.names]
        shapes = [torch.empty_like(p, device="meta", requires_grad=False) if p.requires_grad else None for p in parameters]
        self._gradients = WeightGradients(shapes, parameters[0].device, delay_wgrad)
        self._token = Parameters.apply(self._gradients, *parameters)
        self._values = [parameter.detach().to(experts.dtype) for parameter in parameters]

    def __call__(self, rows: Tensor, experts: range, sizes: Sequence[int]) -> Tensor:
        """Computes some experts.

        Args:
            rows: ``(N, H)``, sorted by expert, in the dtype :attr:`LocalExperts.dtype`.
            experts: this rank's, counted from its first one.
            sizes: by expert, number of its rows.

        Returns:
            ``(N, H)``.
        """
        module = self._module
        inner = self._product(0, rows, experts, sizes)
        inner = apply_gate(module, inner) if module.has_gate else module.act_fn(inner)
        outer = self._product(1, inner, experts, sizes)
        return module.post_expert_norm(outer) if module.has_post_expert_norm else outer

    def _product(self, number: int, rows: Tensor, experts: range, sizes: Sequence[int]) -> Tensor:
        bias = number + 2 if self._module.has_bias else None
        weights = Weights(number, bias, self._module.is_transposed, self._gradients)
        values = self._values[number], None if bias is None else self._values[bias]
        product: Tensor = Product.apply(rows.to(values[0].dtype), self._token, *values, weights, experts, sizes)
        return product


def can_group(x: Tensor, other: Tensor) -> bool:
    """Whether ``F.grouped_mm`` multiplies these in one kernel: on CUDA, 16-bit, with rows that start at multiples of 16 bytes."""
    if x.device.type != "cuda" or x.dtype != torch.bfloat16 or torch.cuda.get_device_capability(x.device) < (8, 0):
        return False
    return all(tensor.shape[-1] * tensor.element_size() % 16 == 0 for tensor in (x, other)) and len(x) > 0


def _by_expert(rows: Tensor, matrices: Tensor, sizes: Sequence[int]) -> Tensor:
    """Multiplies rows ``(N, in)``, sorted by expert, by the matrix of their expert, of ``(E, in, out)``."""
    if can_group(rows, matrices):
        return F.grouped_mm(rows, matrices, offs=_ends(sizes, rows.device))
    product = rows.new_empty(rows.shape[0], matrices.shape[2])
    for x, matrix, out in zip(rows.split(list(sizes)), matrices, product.split(list(sizes)), strict=True):
        if len(x):
            torch.mm(x, matrix, out=out)
    return product


def _grouped_gradient(left: Tensor, right: Tensor, sizes: Sequence[int]) -> Tensor:
    """Returns by expert ``left.T @ right`` of its rows; zero for experts without rows, which the kernel leaves undefined."""
    products = F.grouped_mm(left.t(), right, offs=_ends(sizes, left.device))
    return products.masked_fill_(torch.tensor([size == 0 for size in sizes], device=left.device)[:, None, None], 0)


def _ends(sizes: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(list(itertools.accumulate(sizes)), dtype=torch.int32, device=device)


def _add(into: tuple[Tensor, bool] | None, compute: Callable[[], Tensor]) -> None:
    if into is not None:
        gradient, has_value = into
        gradient.add_(compute()) if has_value else gradient.copy_(compute())


def _add_product(into: tuple[Tensor, bool] | None, left: Tensor, right: Tensor) -> None:
    if into is None or into[0].dtype != left.dtype:
        _add(into, lambda: left @ right)
    elif into[1]:
        into[0][0].addmm_(left, right)
    else:
        torch.mm(left, right, out=into[0][0])


def _slice(experts: range) -> slice:
    return slice(experts.start, experts.stop)
