"""Transformer Engine's linear layers as a backend: products in pieces over its userbuffers, which NVLink and its like offer (CUDA).

    a region's input   all column layers in one of its modules: gather and product; backward: the input is gathered again beside the
                       product that gives its gradient, whose sum over the ranks travels beside the weights' gradients
    a row layer        another one: product and reduce-scatter; backward: gather and product

The modules compute with the user's parameters and have none of their own, so that nobody else sees them. A process has one set of
userbuffers, of one shape: that of the activations in the first training step. What does not fit goes the way of
:mod:`lightning_overlap.modes.tensor.linear`. Written to Transformer Engine's signatures of August 2026 and to its description.
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
from lightning_overlap.modes.tensor.linear import Arriving, Reading, RegionInput, cast, matrix

NAMES = (("qkv", "proj"), ("fc1", "fc2"))
"""What Transformer Engine calls the buffers of column and row layers. Layers that run one after the other can have the same."""


@dataclass(frozen=True)
class Library:
    """What is used of Transformer Engine: ``pytorch.Linear``, ``initialize_ub`` and ``destroy_ub``."""

    linear: Callable[..., nn.Module]
    initialize: Callable[..., None]
    destroy: Callable[[], None]


def library() -> Library:
    """The one that is installed."""
    from transformer_engine.pytorch import Linear
    from transformer_engine.pytorch.module.base import destroy_ub, initialize_ub

    return Library(Linear, initialize_ub, destroy_ub)


class _Sum(RegionInput):
    """Stands for all tokens of ``x``; backward sums their gradient over the ranks.

    Forward: ``x`` ``(..., own tokens, features)`` -> ``(..., tokens, features)`` of the same dtype, with the memory of one element.
    Backward: the gradient of all tokens -> that of this rank's, in ``x``'s shape.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, reading: Reading) -> Tensor:
        ctx.reading = reading
        return x.new_empty(1).expand(reading.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return Reduced([], ctx.reading.exchange, f"tensor.input_grad[{ctx.reading.name}]", "column_dgrad", grad).wait(), None


class Multiplied(Arriving):
    """The input of a region, whose column layers' products are there. For what else reads it, it is gathered, by our own exchange."""

    own: Tensor
    products: dict[int, Tensor]

    def times(self, weight: int) -> Tensor:
        return self.products[weight]

    @cached_property
    def gathered(self) -> Gathered:  # type: ignore[override]
        with torch.no_grad():
            return Gathered(self.own, self.reading.shape[-2], self.reading.exchange, f"tensor.input[{self.reading.name}]")


class UserbuffersLayers:
    """Transformer Engine's modules for a model's layers, and the process's userbuffers.

    Args:
        library: Transformer Engine.
        exchange: the ranks.
    """

    def __init__(self, library: Library, exchange: Exchange) -> None:
        self._library, self._exchange = library, exchange
        self._buffers: tuple[int, int, torch.dtype] | None = None  # tokens of a whole batch, features
        self._made: dict[str, nn.Module] = {}
        self._names: dict[str, tuple[str, str]] = {}  # by region
        self._said = False

    def start(self, x: Tensor, tokens: int) -> None:
        """Sets the userbuffers up, if they are not yet. Collective over the world, blocking.

        Args:
            x: the first activations, ``(..., own tokens, features)``.
            tokens: number of all. If the ranks do not divide it, the buffers are of the next number that they do: other ranks, with
                other sequences, may be waiting here.
        """
        if self._buffers is not None:
            return
        size, dtype = self._exchange.group.size, _dtype(x)
        shape = [math.prod(x.shape[:-2]) * -(-tokens // size) * size, x.shape[-1]]
        self._library.destroy()  # what a training that failed may have left
        self._library.initialize(shape, size, dtype=dtype, bootstrap_backend="nccl")
        self._buffers = shape[0], shape[1], dtype

    def fits(self, shape: Sequence[int], features: int, x: Tensor, layers: Sequence[nn.Module]) -> bool:
        """Whether the modules can be used: the same on all ranks.

        Args:
            shape: of the tokens of all ranks, ``(..., tokens)``.
            features: of what is transferred: a region's input, a row layer's output.
            x: the layers' input.
            layers: column layers of one region, or a row layer.
        """
        if self._buffers is None:
            return False
        backward = torch.is_grad_enabled()
        trained = x.requires_grad and all(layer.weight.requires_grad for layer in layers)
        found = math.prod(shape), features, _dtype(x)
        if found == self._buffers and shape[-1] % self._exchange.group.size == 0 and (trained or not backward):
            return True
        if backward and not self._said:
            self._said = True
            has, comes = ("{} tokens x {} features in {}".format(*what) for what in (self._buffers, found))
            frozen = "" if trained else ", with weights that are frozen or an input that needs no gradient"
            warnings.warn(
                f"tensor_parallel.backend: userbuffers has buffers for {has}; {comes}{frozen}, in sequences of {shape[-1]}, go by p2p "
                "(said once)",
                stacklevel=2,
            )
        return False

    def read(self, x: Tensor, layers: Sequence[nn.Module], tokens: int, name: str) -> Multiplied:
        """As :func:`lightning_overlap.modes.tensor.linear.read`, of what :meth:`fits`."""
        x = cast(x)
        module = self._made.get(name) or self._column(layers, name)
        sizes = [matrix(layer).shape[0] for layer in layers]
        products = _last(module(_first(x))).split(sizes, -1)
        reading = Reading(self._exchange, name, (*x.shape[:-2], tokens, x.shape[-1]))
        handle: Multiplied = _Sum.apply(x, reading).as_subclass(Multiplied)
        handle.reading, handle.own, handle.products, handle.ports = reading, x, {}, {}
        for layer, product in zip(layers, products, strict=True):
            number = id(layer.weight)
            handle.ports[number] = (product, None)
            handle.products[number] = _add_bias(product, layer)
        return handle

    def row_product(self, x: Tensor, layer: nn.Module, name: str, region: str) -> Tensor:
        """As :func:`lightning_overlap.modes.tensor.linear.row_product`, of what :meth:`fits`."""
        module = self._made.get(name) or self._row(layer, name, region)
        return _add_bias(_last(module(_first(cast(x)))), layer)

    def close(self) -> None:
        """Gives the userbuffers back."""
        if self._buffers is not None:
            self._library.destroy()
        self._buffers = None
        self._made.clear()

    # The userbuffers must be there first.

    def _column(self, layers: Sequence[nn.Module], name: str) -> nn.Module:
        weights = {f"part{number}": matrix(layer) for number, layer in enumerate(layers)}
        whole = {part: weight.shape[0] * self._exchange.group.size for part, weight in weights.items()}
        ways = {"ub_overlap_ag": True, "ub_bulk_dgrad": True, "ub_bulk_wgrad": True}
        features = matrix(layers[0]).shape[1]
        module = self._make(features, sum(whole.values()), "column", self._named(name)[0], parameters_split=whole, **ways)
        for part, weight in weights.items():
            setattr(module, f"{part}_weight", weight)
        self._made[name] = module
        return module

    def _row(self, layer: nn.Module, name: str, region: str) -> nn.Module:
        out, own = matrix(layer).shape
        ways = {"ub_overlap_rs": True, "ub_overlap_ag": True}
        module = self._make(own * self._exchange.group.size, out, "row", self._named(region)[1], **ways)
        module.weight = layer.weight
        self._made[name] = module
        return module

    def _named(self, region: str) -> tuple[str, str]:
        return self._names.setdefault(region, NAMES[len(self._names) % len(NAMES)])

    def _make(self, features: int, out: int, mode: str, buffers: str, **ways: Any) -> nn.Module:
        group = self._exchange.group
        return self._library.linear(
            features,
            out,
            bias=False,  # a row layer's is added after the sum, and not by every rank
            sequence_parallel=True,
            tp_group=group.process_group,
            tp_size=group.size,
            parallel_mode=mode,
            device="meta",  # neither memory nor random numbers: the user's parameters take their place
            ub_name=buffers,
            **ways,
        )


def _dtype(x: Tensor) -> torch.dtype:
    return cast(x.new_empty(0)).dtype


def _first(x: Tensor) -> Tensor:
    """Tokens first, as Transformer Engine gathers them."""
    return x.movedim(-2, 0).contiguous()


def _last(x: Tensor) -> Tensor:
    return x.movedim(0, -2)


def _add_bias(x: Tensor, layer: nn.Module) -> Tensor:
    return x if layer.bias is None else x + cast(layer.bias)  # type: ignore[arg-type]
