"""Tokens that are the same on all ranks of a group: each rank takes a part of them, so that an expert gets each token once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lightning_overlap.ranks.group import Group
from lightning_overlap.state.pieces import shares


def take_part(x: Tensor, group: Group) -> Tensor:
    """Takes this rank's part of the tokens ``(T, ...)``, which are the same on all ranks. Backward gathers the gradient of all."""
    part: Tensor = _TakePart.apply(x, group)
    return part


def gather_parts(x: Tensor, tokens: int, group: Group) -> Tensor:
    """Gathers the ``tokens`` of which each rank has a part ``(t, ...)``.

    All ranks must compute the same with them: backward takes this rank's part of the gradient.
    """
    gathered: Tensor = _GatherParts.apply(x, tokens, group)
    return gathered


class _TakePart(Function):
    """Forward: ``(T, ...)`` -> ``(t, ...)``. Backward: the reverse."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group, ctx.tokens = group, len(x)
        return _part(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _gather(gradient, ctx.tokens, ctx.group, "expert.token_grads"), None


class _GatherParts(Function):
    """Forward: ``(t, ...)`` -> ``(T, ...)``. Backward: the reverse."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tokens: int, group: Group) -> Tensor:
        ctx.group = group
        return _gather(x, tokens, group, "expert.tokens")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _part(gradient, ctx.group), None, None


def _part(x: Tensor, group: Group) -> Tensor:
    """A copy of this rank's tokens, so that ``x`` can be freed."""
    low, high = shares(len(x), group.size)[group.rank : group.rank + 2]
    return x[low:high].clone(memory_format=torch.contiguous_format)


def _gather(x: Tensor, tokens: int, group: Group, label: str) -> Tensor:
    """All ranks' tokens. Collective."""
    width = x.shape[1:].numel()
    bounds = [token * width for token in shares(tokens, group.size)]
    gathered = x.new_empty(tokens, *x.shape[1:])
    gathered.view(-1)[bounds[group.rank] : bounds[group.rank + 1]] = x.flatten()
    group.all_gather(gathered.view(-1), bounds, key=0, label=label).wait()
    return gathered
