"""Tensors that stand for what is elsewhere (on its way, or on other ranks), and get it when they are read.

What is read is a copy, so that a change in place would be lost: it is an error. ``logits /= 2`` is none, since Python puts the result
in the place of the old tensor; the old one, and what was viewed of it, cannot be read any more. (``logits.div_(2)`` is the same call:
there the error comes when ``logits`` is read.)
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_overlap.decision import ConfigError
from lightning_overlap.torch_seams import WithoutSubclasses, tree_leaves, tree_map

ASKED = {
    getattr(torch.Tensor, name).__get__
    for name in ("shape", "dtype", "device", "ndim", "requires_grad", "is_cuda", "layout", "grad_fn", "is_leaf", "is_sparse")
} | {torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.__len__, torch.Tensor.is_floating_point}
"""What is known of a tensor whose numbers are not here."""
TRACED = {getattr(Tensor, name).__get__ for name in ("requires_grad", "grad_fn", "is_leaf")}
"""What is known of it from the part that is here."""
_ARITHMETIC = ("add", "sub", "mul", "div", "true_divide", "floor_divide", "remainder", "pow")
_ASSIGNMENTS = {getattr(Tensor, f"{name}_"): getattr(Tensor, name) for name in _ARITHMETIC}
"""By the function of ``x += y``, that of ``x + y``."""


class StandIn(Tensor):
    """The base of them.

    Attributes:
        what: it stands for, in the words of errors.
    """

    what: ClassVar[str]

    @property
    def written(self) -> list[str]:
        """The function that has changed it in place, if one has. The same list for all that is viewed of it."""
        found: list[str] = vars(self).setdefault("_written", [])
        return found

    def is_view_of(self, x: StandIn) -> None:
        """A change of one is a change of both."""
        vars(self)["_written"] = x.written

    def whole(self, reader: Any) -> Tensor:
        """The ordinary tensor, for a function that reads it."""
        raise NotImplementedError

    @classmethod
    def compute(cls, func: Any, args: Any, kwargs: Any) -> Any:
        """What a function gives that changes nothing in place."""
        return read(func, args, kwargs)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in ASKED:
            return cls.compute(func, args, kwargs)
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, StandIn) and x.written:
                raise _refused(x, x.written[0])
        target = args[0] if args and isinstance(args[0], StandIn) else None
        if isinstance(out := kwargs.get("out"), StandIn):
            raise _refused(out, f"{func.__name__}(out=...)")
        if target is None:
            return cls.compute(func, args, kwargs)
        assigned = func in _ASSIGNMENTS
        if not assigned and _writes(func):
            raise _refused(target, func.__name__)
        if not assigned and not kwargs.get("inplace"):
            return cls.compute(func, args, kwargs)
        kwargs = {name: value for name, value in kwargs.items() if name != "inplace"}
        result = cls.compute(_ASSIGNMENTS.get(func, func), args, kwargs)
        target.written.append(func.__name__)
        return result.to(target.dtype) if assigned else result


class View(StandIn):
    """A view of the copy that was read."""

    def whole(self, reader: Any) -> Tensor:
        with WithoutSubclasses():
            return self.as_subclass(Tensor)


def read(func: Any, args: Any, kwargs: Any) -> Any:
    """What a function gives of whole tensors. What is a view of one cannot be written to, either."""
    copies: dict[int, StandIn] = {}

    def whole(x: Any) -> Any:
        if not isinstance(x, StandIn):
            return x
        copy = x.whole(func)
        copies[copy.untyped_storage().data_ptr()] = x
        return copy

    def seen(y: Any) -> Any:
        x = copies.get(y.untyped_storage().data_ptr()) if type(y) is Tensor and y.layout is torch.strided else None
        if x is None or y.numel() == 0:
            return y
        view = y.as_subclass(View)
        vars(view)["what"] = x.what
        view.is_view_of(x)
        return view

    args, kwargs = tree_map(whole, (args, kwargs))
    return tree_map(seen, func(*args, **kwargs))


def _writes(func: Any) -> bool:
    name = func.__name__
    return name in ("__setitem__", "__set__", "__delitem__") or (
        name.endswith("_") and not name.endswith("__") and name not in ("requires_grad_", "share_memory_")
    )


def _refused(x: StandIn, name: str) -> ConfigError:
    return ConfigError(
        f"{name} changes {x.what} in place, where the change would be lost: this rank has a part of it, and the rest is copied when "
        "it is read. Use the result of a function that changes nothing (x = x.masked_fill(...), x = x / y, torch.where), or write "
        "into a copy (x = x.clone())"
    )
