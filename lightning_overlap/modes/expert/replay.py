"""Routing is saved, and not computed again, where activation checkpoints compute a forward again.

    forward     logits -> topk -> indices (saved)           -> values at the indices
    recompute   logits -> topk -> indices of the forward    -> values at the indices

A recompute may round otherwise, and a token between two experts would then go to another one: its rows have another shape than those
whose gradient arrives (AutoModel 3325 and 3140, torchtitan 3336). Values and their gradients are computed in both from the indices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_overlap.model.patches import replace_method
from lightning_overlap.steps.forward import Forwards
from lightning_overlap.torch_seams import is_in_backward

Choice = list[Tensor]
"""The indices of one call of a router, in the order in which it has chosen: of groups of experts, say, then of experts."""

_WITH_VALUES: dict[Callable[..., Any], int] = {
    **{torch.topk: 2, Tensor.topk: 2},
    **{torch.sort: 1, Tensor.sort: 1},
    **{torch.max: 1, Tensor.max: 1},
}
"""Functions that choose, and return values and indices: the position of their argument ``dim``, which is -1 by default."""
_INDICES = frozenset([torch.argmax, Tensor.argmax, torch.argsort, Tensor.argsort])
"""Functions that choose, and return indices."""


@dataclass
class _Choices:
    """What the routers have chosen in one forward: by router, of each of its calls."""

    by_router: dict[nn.Module, list[Choice]] = field(default_factory=dict)


class RoutingReplay:
    """Saves what routers choose in a forward, and makes them choose the same in its recompute.

    Args:
        forwards: the forwards under way.
        routers: modules that choose experts with ``torch.topk``, ``max``, ``sort``, ``argmax`` or ``argsort``.
    """

    def __init__(self, forwards: Forwards, routers: Iterable[nn.Module]) -> None:
        self._forwards = forwards
        self._undo = [replace_method(router, "forward", partial(self._route, router, router.forward)) for router in routers]

    def remove(self) -> None:
        """Restores the routers."""
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()

    def _route(self, router: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not router.training:
            return forward(*args, **kwargs)
        calls = self._forwards.current.of(_Choices).by_router.setdefault(router, [])
        if is_in_backward() and calls:
            with _Choosing(calls):
                return forward(*args, **kwargs)
        choice: Choice = []
        calls.append(choice)
        with _Choosing([], choice):
            return forward(*args, **kwargs)


class _Choosing(TorchFunctionMode):
    """Inside, functions that choose are recorded, or return what was recorded.

    Args:
        calls: the choices of the calls of this router in the forward; empty: this is a call of the forward.
        record: gets the indices of this call of the forward.
    """

    def __init__(self, calls: list[Choice], record: Choice | None = None) -> None:
        super().__init__()
        self._calls, self._record = calls, record
        self._number = 0
        """Of the next function that chooses."""
        self._call: Choice | None = None

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function not in _INDICES and not self._chooses_with_values(function, args, kwargs):
            return function(*args, **kwargs)
        x, *rest = args if args else (kwargs.pop("input"),)
        chosen = function(x.detach(), *rest, **kwargs)
        if function in _INDICES:
            return self._indices(chosen)
        indices = self._indices(chosen[1])
        position = _WITH_VALUES[function]
        dim = kwargs.get("dim", args[position] if len(args) > position else -1)
        # The same functions in forward and recompute: a checkpoint matches the tensors that they save by their order.
        if indices.dim() == x.dim():
            return type(chosen)((x.gather(dim, indices), indices))
        return type(chosen)((x.gather(dim, indices.unsqueeze(dim)).squeeze(dim), indices))

    @staticmethod
    def _chooses_with_values(function: Any, args: Any, kwargs: Any) -> bool:
        """Whether a call returns values and indices: ``max`` does with a dim."""
        if function not in _WITH_VALUES or "out" in kwargs:
            return False
        return function not in (torch.max, Tensor.max) or isinstance(kwargs.get("dim", args[1] if len(args) > 1 else None), int)

    def _indices(self, chosen: Tensor) -> Tensor:
        """The indices to use: those chosen now, in the forward; those of the forward, in its recompute."""
        if self._record is not None:
            self._record.append(chosen)
            return chosen
        if self._call is None:
            self._call = self._calls[0] if len(self._calls) == 1 else max(self._calls, key=lambda call: _likeness(call[0], chosen))
        self._number += 1
        return self._call[self._number - 1]


def _likeness(first: Tensor, second: Tensor) -> float:
    """The part of two choices that is equal: 1 for a call and its recompute, but for tokens between two experts."""
    return float((first == second).float().mean()) if first.shape == second.shape else -1.0
