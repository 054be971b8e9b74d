"""The backend ``userbuffers``: Transformer Engine's linear layers, which multiply piece by piece over its userbuffers (CUDA, NVLink).

    region's input   one module for all column layers: gather and product; backward: the input is gathered again while its gradient is
                     computed, and that gradient is summed over the ranks while the weights' gradients are computed
    row layer        one module: product and reduce-scatter; backward: gather and product

The modules compute with the user's parameters and have none of their own. A process has one set of userbuffers, of one shape: that of
the activations in the first training step. With another shape :mod:`lightning_overlap.modes.tensor.linear` computes. Written from
Transformer Engine's signatures of August 2026 and its documentation.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightning_overlap.modes.tensor.gemm import Exchange, Gathered, Reduced
from lightning_overlap.modes.tensor.linear import InputState, PendingInput, RegionInput, cast, matrix

NAMES = (("qkv", "proj"), ("fc1", "fc2"))
"""Transformer Engine's names for the buffers of column and row layers. Regions that run one after the other can share them."""


@dataclass(frozen=True)
class Library:
    """The parts of Transformer Engine that are used: ``pytorch.Linear``, ``initialize_ub`` and ``destroy_ub``."""

    linear: Callable[..., nn.Module]
    initialize: Callable[..., None]
    destroy: Callable[[], None]


def library() -> Library:
    """The Transformer Engine that is installed."""
    from transformer_engine.pytorch import Linear
    from transformer_engine.pytorch.module.base import destroy_ub, initialize_ub

    return Library(Linear, initialize_ub, destroy_ub)


class _Placeholder(RegionInput):
    """Makes a placeholder of all tokens of ``x``. Backward sums their gradient over the ranks.

    Forward: ``x`` ``(..., local tokens, features)`` -> ``(..., tokens, features)`` of the same dtype, with the memory of one element.
    Backward: takes the gradient of all tokens; gives the gradient of this rank's, in the shape of ``x``.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, state: InputState) -> Tensor:
        ctx.state = state
        return x.new_empty(1).expand(state.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return Reduced([], ctx.state.exchange, f"tensor.input_grad[{ctx.state.name}]", "column_dgrad", grad).wait(), None


class UserbuffersInput(PendingInput):
    """A region's input whose column layers' products are computed. For other readers it is gathered by point-to-point transfers.

    Attributes:
        local: this rank's tokens, ``(..., local tokens, features)``.
        products: by id of a weight, the product ``(..., tokens, local out)``.
    """

    local: Tensor
    products: dict[int, Tensor]

    def product(self, weight_id: int) -> Tensor:
        return self.products[weight_id]

    @cached_property
    def gathered(self) -> Gathered:  # type: ignore[override]
        with torch.no_grad():
            return Gathered(self.local, self.state.shape[-2], self.state.exchange, f"tensor.input[{self.state.name}]")


class UserbuffersLayers:
    """Holds Transformer Engine's modules for a model's layers, and the process's userbuffers.

    Args:
        library: Transformer Engine.
        exchange: the ranks.
    """

    def __init__(self, library: Library, exchange: Exchange) -> None:
        self._library, self._exchange = library, exchange
        self._buffers: tuple[int, int, torch.dtype] | None = None  # tokens of a batch, features, dtype
        self._modules: dict[str, nn.Module] = {}
        self._names: dict[str, tuple[str, str]] = {}  # by region
        self._has_warned = False

    def start(self, x: Tensor, tokens: int) -> None:
        """Sets the userbuffers up, unless they exist. Collective over the world, blocking.

        Args:
            x: the first activations, ``(..., local tokens, features)``.
            tokens: the number of all tokens. If it is not divisible by the number of ranks, the buffers are made for the next larger
                one that is: ranks with other sequences may be waiting in this call.
        """
        if self._buffers is not None:
            return
        size, dtype = self._exchange.group.size, _dtype(x)
        shape = [math.prod(x.shape[:-2]) * -(-tokens // size) * size, x.shape[-1]]
        self._library.destroy()  # a failed training may have left some
        self._library.initialize(shape, size, dtype=dtype, bootstrap_backend="nccl")
        self._buffers = shape[0], shape[1], dtype

    def fits(self, shape: Sequence[int], features: int, x: Tensor, layers: Sequence[nn.Module]) -> bool:
        """Whether the modules take these activations. The answer is the same on all ranks.

        Args:
            shape: of the tokens of all ranks, ``(..., tokens)``.
            features: of the tensor that is transferred: a region's input, a row layer's output.
            x: the layers' input.
            layers: column layers of one region, or a row layer.
        """
        if self._buffers is None:
            return False
        backward = torch.is_grad_enabled()
        trained = x.requires_grad and all(layer.weight.requires_grad for layer in layers)
        needed = math.prod(shape), features, _dtype(x)
        if needed == self._buffers and shape[-1] % self._exchange.group.size == 0 and (trained or not backward):
            return True
        if backward and not self._has_warned:
            self._has_warned = True
            has, needs = ("{} tokens x {} features in {}".format(*form) for form in (self._buffers, needed))
            frozen = "" if trained else ", with weights that are frozen or an input that needs no gradient"
            warnings.warn(
                f"tensor_parallel.backend: userbuffers has buffers for {has}; {needs}{frozen}, in sequences of {shape[-1]}, go by p2p "
                "(said once)",
                stacklevel=2,
            )
        return False

    def gather_input(self, x: Tensor, layers: Sequence[nn.Module], tokens: int, name: str) -> UserbuffersInput:
        """As :func:`lightning_overlap.modes.tensor.linear.gather_input`, for an input that :meth:`fits`."""
        x = cast(x)
        module = self._modules.get(name) or self._column(layers, name)
        sizes = [matrix(layer).shape[0] for layer in layers]
        products = _last(module(_first(x))).split(sizes, -1)
        state = InputState(self._exchange, name, (*x.shape[:-2], tokens, x.shape[-1]))
        pending: UserbuffersInput = _Placeholder.apply(x, state).as_subclass(UserbuffersInput)
        pending.state, pending.local, pending.products, pending.parameters = state, x, {}, {}
        for layer, product in zip(layers, products, strict=True):
            weight_id = id(layer.weight)
            pending.parameters[weight_id] = (product, None)
            pending.products[weight_id] = _add_bias(product, layer)
        return pending

    def row_product(self, x: Tensor, layer: nn.Module, name: str, region: str) -> Tensor:
        """As :func:`lightning_overlap.modes.tensor.row.row_product`, for an input that :meth:`fits`."""
        module = self._modules.get(name) or self._row(layer, name, region)
        return _add_bias(_last(module(_first(cast(x)))), layer)

    def close(self) -> None:
        """Frees the userbuffers."""
        if self._buffers is not None:
            self._library.destroy()
        self._buffers = None
        self._modules.clear()

    # Modules are made after the userbuffers.

    def _column(self, layers: Sequence[nn.Module], name: str) -> nn.Module:
        weights = {f"part{number}": matrix(layer) for number, layer in enumerate(layers)}
        sizes = {part: weight.shape[0] * self._exchange.group.size for part, weight in weights.items()}
        overlaps = {"ub_overlap_ag": True, "ub_bulk_dgrad": True, "ub_bulk_wgrad": True}
        features = matrix(layers[0]).shape[1]
        module = self._make(features, sum(sizes.values()), "column", self._named(name)[0], parameters_split=sizes, **overlaps)
        for part, weight in weights.items():
            setattr(module, f"{part}_weight", weight)
        self._modules[name] = module
        return module

    def _row(self, layer: nn.Module, name: str, region: str) -> nn.Module:
        out, local_features = matrix(layer).shape
        overlaps = {"ub_overlap_rs": True, "ub_overlap_ag": True}
        module = self._make(local_features * self._exchange.group.size, out, "row", self._named(region)[1], **overlaps)
        module.weight = layer.weight
        self._modules[name] = module
        return module

    def _named(self, region: str) -> tuple[str, str]:
        return self._names.setdefault(region, NAMES[len(self._names) % len(NAMES)])

    def _make(self, features: int, out: int, mode: str, buffers: str, **overlaps: Any) -> nn.Module:
        group = self._exchange.group
        return self._library.linear(
            features,
            out,
            bias=False,  # a row layer's bias is added once, after the sum
            sequence_parallel=True,
            tp_group=group.process_group,
            tp_size=group.size,
            parallel_mode=mode,
            device="meta",  # neither memory nor random numbers: the user's parameters take their place
            ub_name=buffers,
            **overlaps,
        )


def _dtype(x: Tensor) -> torch.dtype:
    return cast(x.new_empty(0)).dtype


def _first(x: Tensor) -> Tensor:
    """Moves tokens to the first dim, along which Transformer Engine gathers."""
    return x.movedim(-2, 0).contiguous()


def _last(x: Tensor) -> Tensor:
    return x.movedim(0, -2)


def _add_bias(x: Tensor, layer: nn.Module) -> Tensor:
    return x if layer.bias is None else x + cast(layer.bias)  # type: ignore[arg-type]
