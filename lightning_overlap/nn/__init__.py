"""Layers that say themselves how they are sharded over the ranks of ``tensor_parallel``.

They are torch's layers, unsharded, until a strategy with ``tensor_parallel`` shards them; a model made of them needs no
``parallel_plan``, and trains anywhere. Norms need no layer of their own: between attention and mlp they get a part of the tokens,
and their gradients are summed up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from lightning_overlap.nn.moe import Experts, MoELayer, TopKRouter, update_router_biases


class ColumnParallelLinear(nn.Linear):
    """``nn.Linear`` whose outputs are sharded over the ranks.

    Args:
        in_features: as in ``nn.Linear``.
        out_features: as in ``nn.Linear``; of all ranks.
        parts: proportions of what is fused in the outputs, each of which is sharded: ``(1, 1, 1)`` for q, k and v of equal size,
            ``(4, 1, 1)`` for four query heads to a key head, ``(1, 1)`` for gate and up.
        **kwargs: as in ``nn.Linear``.
    """

    def __init__(self, in_features: int, out_features: int, parts: Sequence[int] = (1,), **kwargs: Any) -> None:
        super().__init__(in_features, out_features, **kwargs)
        equal = len(set(parts)) == 1
        self.parallel_role = f"column[{len(parts) if equal else ','.join(map(str, parts))}]"


class RowParallelLinear(nn.Linear):
    """``nn.Linear`` whose inputs are sharded over the ranks: those that a column layer of the same attention or mlp gives."""

    parallel_role = "row"


class VocabParallelEmbedding(nn.Embedding):
    """``nn.Embedding`` whose entries are sharded over the ranks."""

    parallel_role = "vocab_embedding"


class VocabParallelHead(nn.Linear):
    """``nn.Linear`` from features to logits, which stay sharded until ``F.cross_entropy`` takes them."""

    parallel_role = "vocab_head"


__all__ = [
    "ColumnParallelLinear",
    "Experts",
    "MoELayer",
    "RowParallelLinear",
    "TopKRouter",
    "VocabParallelEmbedding",
    "VocabParallelHead",
    "update_router_biases",
]
