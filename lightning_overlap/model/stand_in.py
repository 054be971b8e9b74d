"""Placeholder tensors: they have the shape of a complete tensor, most of which is in transfer or on other ranks.

A function that reads one gets the complete tensor, as a copy. A change in place would be lost with that copy, so it is an error.
``logits /= 2`` is allowed, because Python binds its result to the name; the old placeholder and its views then cannot be read any
more. (``logits.div_(2)`` is the same call. Its error therefore comes later, when ``logits`` is read.)
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_overlap.decision import ConfigError
from lightning_overlap.torch_seams import WithoutSubclasses, tree_leaves, tree_map

METADATA = {
    getattr(torch.Tensor, name).__get__
    for name in ("shape", "dtype", "device", "ndim", "requires_grad", "is_cuda", "layout", "grad_fn", "is_leaf", "is_sparse")
} | {torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.__len__, torch.Tensor.is_floating_point}
"""Functions that read no values: a placeholder answers them by itself."""
AUTOGRAD = {getattr(Tensor, name).__get__ for name in ("requires_grad", "grad_fn", "is_leaf")}
"""Those of them that are answered by the part that this rank holds."""
_ARITHMETIC = ("add", "sub", "mul", "div", "true_divide", "floor_divide", "remainder", "pow")
_ASSIGNMENTS = {getattr(Tensor, f"{name}_"): getattr(Tensor, name) for name in _ARITHMETIC}
"""The function of ``x += y`` -> the function of ``x + y``."""


class StandIn(Tensor):
    """The base class of placeholders.

    Attributes:
        description: names the complete tensor in errors.
    """

    description: ClassVar[str]
    has_memory: ClassVar[bool] = False
    """Whether the placeholder's own memory has all values."""

    @property
    def writers(self) -> list[str]:
        """Names of functions that have changed the tensor in place. A tensor shares this list with its views."""
        writers: list[str] = vars(self).setdefault("_writers", [])
        return writers

    def is_view_of(self, x: StandIn) -> None:
        """Declares that the two share memory: a change of one is a change of both."""
        vars(self)["_writers"] = x.writers

    def complete(self, reader: Any) -> Tensor:
        """The complete, ordinary tensor, for the function ``reader``."""
        raise NotImplementedError

    @classmethod
    def compute(cls, func: Any, args: Any, kwargs: Any) -> Any:
        """The result of a function that changes nothing in place."""
        return apply_to_complete(func, args, kwargs)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in METADATA:
            return cls.compute(func, args, kwargs)
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, StandIn) and x.writers:
                raise _in_place_error(x, x.writers[0])
        target = args[0] if args and isinstance(args[0], StandIn) else None
        if isinstance(out := kwargs.get("out"), StandIn):
            raise _in_place_error(out, f"{func.__name__}(out=...)")
        if target is not None and func is Tensor.data_ptr and not target.has_memory:
            raise ConfigError(
                f"a kernel outside of torch reads the memory of {target.description}, of which this rank has a part or nothing. Use "
                "torch's functions, which get the complete tensor"
            )
        if target is None:
            return cls.compute(func, args, kwargs)
        is_assignment = func in _ASSIGNMENTS
        if not is_assignment and _writes(func):
            raise _in_place_error(target, func.__name__)
        if not is_assignment and not kwargs.get("inplace"):
            return cls.compute(func, args, kwargs)
        kwargs = {name: value for name, value in kwargs.items() if name != "inplace"}
        result = cls.compute(_ASSIGNMENTS.get(func, func), args, kwargs)
        target.writers.append(func.__name__)
        return result.to(target.dtype) if is_assignment else result


class View(StandIn):
    """A view of a complete copy: it has values, but a change in place would be lost with the copy."""

    has_memory = True

    def complete(self, reader: Any) -> Tensor:
        with WithoutSubclasses():
            return self.as_subclass(Tensor)


def apply_to_complete(func: Any, args: Any, kwargs: Any) -> Any:
    """Calls a function with complete tensors in place of placeholders. Results that are views of these become :class:`View`."""
    copies: dict[int, StandIn] = {}

    def completed(x: Any) -> Any:
        if not isinstance(x, StandIn):
            return x
        copy = x.complete(func)
        copies[copy.untyped_storage().data_ptr()] = x
        return copy

    def as_view(y: Any) -> Any:
        x = copies.get(y.untyped_storage().data_ptr()) if type(y) is Tensor and y.layout is torch.strided else None
        if x is None or y.numel() == 0:
            return y
        view = y.as_subclass(View)
        vars(view)["description"] = x.description
        view.is_view_of(x)
        return view

    args, kwargs = tree_map(completed, (args, kwargs))
    return tree_map(as_view, func(*args, **kwargs))


def _writes(func: Any) -> bool:
    """Whether a function changes its first argument, judged by its name."""
    name = func.__name__
    return name in ("__setitem__", "__set__", "__delitem__") or (
        name.endswith("_") and not name.endswith("__") and name not in ("requires_grad_", "share_memory_")
    )


def _in_place_error(x: StandIn, name: str) -> ConfigError:
    return ConfigError(
        f"{name} changes {x.description} in place, where the change would be lost: this rank holds only a part, and a function that "
        "reads the complete tensor gets a copy. Use an out-of-place function (x = x.masked_fill(...), x = x / y, torch.where), or "
        "change a copy (x = x.clone()). A checkpoint that is called with it needs use_reentrant=False"
    )
