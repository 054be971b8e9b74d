"""Gathers all features between a column and a row layer: for norms over all heads, and code that splits at fixed features.

All ranks compute the same between the two layers, and each rank's row layer reads its part of the result. So each rank has a summand
of the gradient of the gathered features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from lightning_overlap.modes.tensor.plan import ShardedLayer
from lightning_overlap.ranks.group import Group
from lightning_overlap.state.pieces import Piece, gather_pieces


class _GatherFeatures(Function):
    """Gathers the features of all ranks. Backward sums the gradient over the ranks and keeps this rank's features.

    Forward: ``local`` ``(..., tokens, local features)`` -> ``(..., tokens, features)``. Backward: the reverse.
    """

    @staticmethod
    def forward(ctx: Any, local: Tensor, piece: Piece, group: Group) -> Tensor:
        ctx.piece, ctx.group = piece, group
        return gather_pieces(piece, local, group, "tensor.features")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        group: Group = ctx.group
        total = group.all_reduce(grad.clone(memory_format=torch.contiguous_format), label="tensor.features_grad").wait()
        return ctx.piece.of(total, group.rank, group.size), None, None


def _piece(layer: ShardedLayer, x: Tensor) -> Piece:
    """How the last dim of activations ``x`` is sharded: as the layer's weight."""
    return Piece(torch.Size([*x.shape[:-1], sum(layer.parts)]), x.dim() - 1, layer.parts)


def gathering_forward(forward: Callable[[Tensor], Tensor], layer: ShardedLayer, group: Group) -> Callable[[Tensor], Tensor]:
    """Makes a column layer's forward gather the output features of all ranks."""

    def gathered(x: Tensor) -> Tensor:
        y = forward(x)
        return _GatherFeatures.apply(y, _piece(layer, y), group)

    return gathered


def splitting_forward(forward: Callable[[Tensor], Tensor], layer: ShardedLayer, group: Group) -> Callable[[Tensor], Tensor]:
    """Makes a row layer's forward take all input features, of which it reads this rank's."""

    def split(x: Tensor) -> Tensor:
        return forward(_piece(layer, x).of(x, group.rank, group.size).contiguous())

    return split
