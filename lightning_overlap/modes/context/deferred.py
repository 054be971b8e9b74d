"""The projection that makes the values of an attention, computed when its output is read: a transfer of queries and keys travels under
it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_overlap.decision import ConfigError
from lightning_overlap.model.stand_in import AUTOGRAD, METADATA
from lightning_overlap.torch_seams import (
    WithoutSubclasses,
    has_backward_hooks,
    saved_tensor_hooks,
    tree_map,
    version_of,
    without_memory,
)

VALUE_NAMES = frozenset({"v_proj", "value", "values", "v", "to_v", "wv", "v_lin"})
"""Names of a layer that makes the values of an attention. A wrong guess costs nothing: what reads the output first computes it."""
_ORDERED_VIEWS = {Tensor.view, Tensor.unflatten, Tensor.reshape, torch.reshape, torch.unflatten}
"""Functions that give another view of a tensor whose numbers lie in order."""
_VIEWS = {Tensor.transpose, Tensor.permute, torch.transpose, torch.permute}
Views = tuple[tuple[Any, tuple[Any, ...], dict[str, Any]], ...]
_REMEDY = "put it into a module of its own that is called with an ordinary tensor (v.clone()), or set context_parallel.method: p2p"


def value_layers(block: nn.Module) -> Iterator[nn.Linear]:
    """The layers in a block that make values of an attention."""
    for path, module in block.named_modules():
        if type(module) is nn.Linear and path.rpartition(".")[2] in VALUE_NAMES:
            yield module


class Deferring:
    """Which calls of ``F.linear`` can be made later.

    Args:
        layers: those that make values.
    """

    def __init__(self, layers: Iterable[nn.Linear]) -> None:
        self._layers = {id(layer.weight): layer for layer in layers}

    def takes(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
        """Whether a call can: that of one of the layers, if nothing of its own reads the output. Arguments: as of ``F.linear``."""
        layer = self._layers.get(id(weight))
        if layer is None or layer.weight is not weight or type(input) is not Tensor or not torch.is_grad_enabled():
            return False
        return not has_backward_hooks(layer)


class Projection:
    """A call of ``F.linear`` that is made when its output is read, under the autocast of now.

    Args:
        x: the input, ``(..., features)``.
        weight: as of ``F.linear``; so is ``bias``.
    """

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        self._arguments: tuple[Tensor, Tensor, Tensor | None] | None = (x, weight, bias)
        self._version, self._hooks, self._device = version_of(x), saved_tensor_hooks(), x.device.type
        self._autocast = torch.is_autocast_enabled(self._device), torch.get_autocast_dtype(self._device)
        self._output: Tensor | None = None
        self.shape = torch.Size((*x.shape[:-1], weight.shape[0]))
        self.dtype = self._autocast[1] if self._autocast[0] and x.dtype != torch.float64 else x.dtype

    def output(self) -> Tensor:
        """The output, ``(..., outputs)``. The first call computes it.

        Raises:
            ConfigError: the input was changed in place since, or a checkpoint of a function reads the output first.
        """
        if self._arguments is not None:
            x, weight, bias = self._arguments
            if version_of(x) != self._version:
                raise ConfigError(
                    "the input of an attention's value projection was changed in place after the call of the projection, and autograd "
                    "needs it unchanged: use an out-of-place function (x = x + y)"
                )
            if saved_tensor_hooks() != self._hooks:
                raise ConfigError(
                    "a checkpoint of a function reads the output of an attention's value projection, which was called outside of it: "
                    f"{_REMEDY}"
                )
            enabled, dtype = self._autocast
            with torch.enable_grad(), torch.autocast(self._device, dtype, enabled):
                self._output = F.linear(x, weight, bias)
            self._arguments = None
        assert self._output is not None, "it was computed"
        return self._output


class DeferredValues(Tensor):
    """The output of a projection that is computed when it is read, or a view of it. It has no memory.

    Attributes:
        projection: what makes it.
    """

    projection: Projection
    _views: Views

    @staticmethod
    def of(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> DeferredValues:
        """In place of what ``F.linear`` returns."""
        projection = Projection(x, weight, bias)
        return DeferredValues._make(projection.shape, x.device, projection, ())

    @staticmethod
    def _make(
        shape: torch.Size, device: torch.device, projection: Projection, views: tuple[tuple[Any, Any, Any], ...]
    ) -> DeferredValues:
        x = without_memory(DeferredValues, shape, projection.dtype, device)
        x.projection, x._views = projection, views
        with WithoutSubclasses():
            x.register_hook(_refuse_gradient)
        return x

    def complete(self) -> Tensor:
        """The ordinary tensor."""
        x = self.projection.output()
        with torch.enable_grad():
            for func, args, kwargs in self._views:
                x = func(x, *args, **kwargs)
        return x

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in METADATA and func not in AUTOGRAD:
            with WithoutSubclasses():
                return func(*args, **kwargs)
        x = args[0] if args else None
        if isinstance(x, cls) and (func in _VIEWS or (func in _ORDERED_VIEWS and all(one in _ORDERED_VIEWS for one, *_ in x._views))):
            shape = func(torch.empty(x.shape, device="meta"), *args[1:], **kwargs).shape
            return cls._make(shape, x.device, x.projection, (*x._views, (func, args[1:], kwargs)))
        args, kwargs = tree_map(completed, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        _refuse()


def completed(x: Any) -> Any:
    """The ordinary tensor in place of a deferred one."""
    return x.complete() if isinstance(x, DeferredValues) else x


def _refuse_gradient(grad: Tensor) -> None:
    """Of a function that was not seen to read the tensor."""
    _refuse()


def _refuse() -> NoReturn:
    raise ConfigError(
        "a function that torch does not know (of autograd, or a kernel) reads the output of an attention's value projection before it "
        f"is computed: {_REMEDY}"
    )
