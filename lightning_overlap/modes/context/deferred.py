"""Delays the projection that makes the values of an attention until its output is read, so that queries and keys travel meanwhile.

Only attentions of transformers delay theirs: what they do between the projection and the attention is known. (They keep a cache first,
if they have one: with it nothing is delayed.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_overlap.decision import ConfigError
from lightning_overlap.model.stand_in import AUTOGRAD, METADATA
from lightning_overlap.torch_seams import (
    WithoutSubclasses,
    reads_output,
    saved_tensor_hooks,
    tree_map,
    version_of,
    without_memory,
)

_ORDERED_VIEWS = {Tensor.view, Tensor.unflatten, Tensor.reshape, torch.reshape, torch.unflatten}
"""Functions that give another view of a tensor whose numbers lie in order."""
_VIEWS = {Tensor.transpose, Tensor.permute, torch.transpose, torch.permute}
_REMEDY = "copy them before (v = v.clone()), or set context_parallel.method: p2p"


def value_layers(block: nn.Module) -> Iterator[nn.Linear]:
    """The layers of a block that make the values of an attention of transformers."""
    for module in block.modules():
        layer = getattr(module, "v_proj", None)
        if type(module).__module__.startswith("transformers.") and type(layer) is nn.Linear and hasattr(module, "q_proj"):
            yield layer


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
        if layer is None or layer.weight is not weight or type(input) is not Tensor or torch.compiler.is_compiling():
            return False
        is_right = input.shape[-1] == weight.shape[1] and (input.dtype == weight.dtype or torch.is_autocast_enabled(input.device.type))
        return is_right and torch.is_grad_enabled() and not reads_output(layer)


class Projection:
    """A call of ``F.linear`` that is made when its output is read, under the autocast of now.

    Args:
        x: the input, ``(..., features)``.
        weight: as of ``F.linear``; so is ``bias``.
    """

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        self._arguments: tuple[Tensor, Tensor, Tensor | None] | None = (x, weight, bias)
        self._versions, self._hooks, self._device = _versions(x, weight, bias), saved_tensor_hooks(), x.device.type
        self._autocast = torch.is_autocast_enabled(self._device), torch.get_autocast_dtype(self._device)
        self.shape = torch.Size((*x.shape[:-1], weight.shape[0]))
        self.dtype = self._autocast[1] if self._autocast[0] and x.dtype != torch.float64 else x.dtype

    def output(self) -> Tensor:
        """Computes the output, ``(..., outputs)``. To be called once, where gradients are on.

        Raises:
            ConfigError: an argument was changed in place since, or a checkpoint of a function reads the output first.
        """
        arguments, self._arguments = self._arguments, None
        assert arguments is not None, "computed once"
        if _versions(*arguments) != self._versions:
            raise ConfigError(
                "the input or a weight of an attention's value projection was changed in place between the projection and the "
                f"attention, which computes it later: {_REMEDY}"
            )
        if saved_tensor_hooks() != self._hooks:
            raise ConfigError(f"a checkpoint of a function is called with the values of an attention: {_REMEDY}")
        enabled, dtype = self._autocast
        with torch.autocast(self._device, dtype, enabled):
            return F.linear(*arguments)


def _versions(*tensors: Tensor | None) -> list[int]:
    return [version_of(x) for x in tensors if x is not None]


class DeferredValues(Tensor):
    """The output of a projection that is computed when it is read, or a view of it. It has no memory."""

    _compute: Callable[[], Tensor]
    _complete: Tensor | None
    _is_in_order: bool

    @staticmethod
    def of(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> DeferredValues:
        """In place of what ``F.linear`` returns."""
        projection = Projection(x, weight, bias)
        return DeferredValues._make(projection.output, projection.shape, projection.dtype, x.device, is_in_order=True)

    @staticmethod
    def _make(
        compute: Callable[[], Tensor], shape: Sequence[int], dtype: torch.dtype, device: torch.device, *, is_in_order: bool
    ) -> DeferredValues:
        x = without_memory(DeferredValues, shape, dtype, device)
        x._compute, x._complete, x._is_in_order = compute, None, is_in_order
        with WithoutSubclasses():
            x.register_hook(_refuse_gradient)
        return x

    def complete(self) -> Tensor:
        """The ordinary tensor, always the same one: what is done to it (a hook, a change in place) stays."""
        if self._complete is None:
            with torch.inference_mode(False), torch.enable_grad():
                self._complete = self._compute()
        return self._complete

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in METADATA and func not in AUTOGRAD:
            with WithoutSubclasses():
                return func(*args, **kwargs)
        x = args[0] if args else None
        if isinstance(x, cls) and (func in _VIEWS or (func in _ORDERED_VIEWS and x._is_in_order)):
            others = args[1:]
            if not any(isinstance(each, torch.dtype) for each in (*others, *kwargs.values())):
                shape = func(torch.empty(x.shape, device="meta"), *others, **kwargs).shape
                is_in_order = x._is_in_order and func in _ORDERED_VIEWS
                return cls._make(lambda: func(x.complete(), *others, **kwargs), shape, x.dtype, x.device, is_in_order=is_in_order)
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
        "a function of autograd, a compiled function or a kernel is called with the values of an attention, which are computed when a "
        f"function of torch reads them: {_REMEDY}"
    )
