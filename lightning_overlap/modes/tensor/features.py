"""All features between a column and a row layer on every rank: for norms over all heads, and code that splits at fixed places.

What is computed in between is computed alike on all ranks, and each one's row layer reads its part of it. So a rank's gradient of the
whole is a summand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from lightning_overlap.modes.tensor.partition import Piece, joined
from lightning_overlap.modes.tensor.plan import Cut
from lightning_overlap.ranks.group import Group


class _Gathered(Function):
    """Gathers the features of all ranks; backward sums the gradient over the ranks and keeps this rank's features.

    Forward: ``own`` ``(..., tokens, own features)`` -> ``(..., tokens, features)``. Backward: the other way.
    """

    @staticmethod
    def forward(ctx: Any, own: Tensor, piece: Piece, group: Group) -> Tensor:
        ctx.piece, ctx.group = piece, group
        return joined(piece, own, group, "tensor.features")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        group: Group = ctx.group
        total = group.all_reduce(grad.clone(memory_format=torch.contiguous_format), label="tensor.features_grad").wait()
        return ctx.piece.of(total, group.rank, group.size), None, None


def _piece(cut: Cut, x: Tensor) -> Piece:
    """How the last dim of activations is cut like a layer's weight."""
    return Piece(torch.Size([*x.shape[:-1], sum(cut.parts)]), x.dim() - 1, cut.parts)


def gathering(forward: Callable[[Tensor], Tensor], cut: Cut, group: Group) -> Callable[[Tensor], Tensor]:
    """A column layer's forward, with the outputs of all ranks."""

    def gathered(x: Tensor) -> Tensor:
        y = forward(x)
        return _Gathered.apply(y, _piece(cut, y), group)  # type: ignore[no-untyped-call, no-any-return]

    return gathered


def splitting(forward: Callable[[Tensor], Tensor], cut: Cut, group: Group) -> Callable[[Tensor], Tensor]:
    """A row layer's forward, of all features."""

    def split(x: Tensor) -> Tensor:
        return forward(_piece(cut, x).of(x, group.rank, group.size).contiguous())

    return split
