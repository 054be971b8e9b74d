"""Absent parameters: another rank holds them, and this rank keeps their shape without their memory.

The values of an absent parameter are NaN on purpose (0 for integers, which have no NaN). A rank must not compute with a parameter
that it does not hold. If the user's code does, the result becomes NaN, and checks in the first step report the parameter; otherwise
training would run on wrong numbers. NaN is also the marker of values that have not arrived: in parameters that have memory but no
values (:mod:`lightning_overlap.model.materialize`, and a part that a mode allocates to assemble the unsharded model), and in hidden
states of blocks that another rank runs (:mod:`lightning_overlap.model.block_pass`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_overlap.torch_seams import WithoutSubclasses

_WRITES = frozenset(["__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__", "__imod__", "__ipow__"])
_NO_WRITES = frozenset(["requires_grad_", "share_memory_"])


def absent_like(tensor: Tensor, device: torch.device | None = None) -> Tensor:
    """Returns an absent tensor: the shape and dtype of ``tensor``, the memory of one element, and NaN as its values.

    Args:
        tensor: gives shape and dtype.
        device: of the result; the tensor's by default.
    """
    value = float("nan") if tensor.is_floating_point() else 0
    return torch.full((), value, dtype=tensor.dtype, device=device or tensor.device).expand(tensor.shape)


def is_absent(tensor: Tensor) -> bool:
    """Whether a tensor has the memory of one element only, as :func:`absent_like` makes it."""
    return tensor.numel() > 1 and all(stride == 0 for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if n > 1)


def make_absent(parameter: nn.Parameter) -> None:
    """Frees a parameter's memory, because other ranks hold it from now on."""
    parameter.data = absent_like(parameter)
    if type(parameter) is nn.Parameter:
        parameter.__class__ = AbsentParameter


def make_present(parameter: nn.Parameter, *, allocate: bool) -> None:
    """Makes an absent parameter an ordinary one.

    Args:
        parameter: keeps its values, NaN, until the caller fills it.
        allocate: give it memory of its own; otherwise the caller replaces its data.
    """
    if isinstance(parameter, AbsentParameter):
        parameter.__class__ = nn.Parameter  # type: ignore[assignment]
    if allocate:
        parameter.data = parameter.data.contiguous()


class _Absent:
    """A tensor on which in-place functions do nothing, because the rank that holds the values applies them."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(function, "__name__", "")
        target = args[0] if args else next(iter(kwargs.values()), None)
        if name in _WRITES or (name.endswith("_") and not name.endswith("__") and name not in _NO_WRITES):
            if isinstance(target, _Absent):
                return target
            if name.startswith("_foreach") and isinstance(target, list | tuple):
                present = [index for index, tensor in enumerate(target) if not isinstance(tensor, _Absent)]
                if not present:
                    return target  # torch refuses an empty list
                args = [[x[i] for i in present] if isinstance(x, list | tuple) and len(x) == len(target) else x for x in args]
        with WithoutSubclasses():
            result = function(*args, **kwargs)
            is_view = isinstance(target, _Absent) and isinstance(result, Tensor) and _share_memory(target, result)
            return result.as_subclass(AbsentTensor) if is_view else result


def _share_memory(one: Any, other: Tensor) -> bool:
    return bool(one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr())


class AbsentTensor(_Absent, Tensor):
    """A view of an :class:`AbsentParameter`: its data, or a slice."""


class AbsentParameter(_Absent, nn.Parameter):
    """The class of a parameter while it is absent. Its copies are absent too; pickled, it becomes an ordinary parameter."""

    def __deepcopy__(self, memo: dict[int, Any]) -> AbsentParameter:
        if id(self) not in memo:
            memo[id(self)] = AbsentParameter(absent_like(self), self.requires_grad)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return nn.Parameter(absent_like(self), self.requires_grad).__reduce_ex__(protocol)
