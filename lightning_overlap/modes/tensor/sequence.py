"""Sequence parallelism: between the entry and the exit of the block stack each rank has its part of the tokens only.

What works on each token by itself (norms, dropout, residual sums) then costs, and keeps for backward, 1/size of it.
(V. Korthikanti et al., Reducing Activation Recomputation in Large Transformer Models, 2022.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from lightning_overlap.modes.tensor.gemm import Exchange, Gathered


class _Enter(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange, ctx.tokens = exchange, x.shape[-2]
        return own_tokens(x, exchange)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return Gathered(grad, ctx.tokens, ctx.exchange, "tensor.entry_grad").whole(), None


class _Leave(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tokens: int, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return Gathered(x, tokens, exchange, "tensor.exit").whole()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return own_tokens(grad, ctx.exchange), None, None


def own_tokens(x: Tensor, exchange: Exchange) -> Tensor:
    """This rank's part of all tokens, copied: the rest can be freed."""
    low, high = exchange.parts(x.shape[-2])[exchange.own : exchange.own + 2]
    return x.narrow(-2, low, high - low).clone(memory_format=torch.contiguous_format)


def enter(x: Tensor, exchange: Exchange) -> Tensor:
    """``(..., tokens, features)``, the same on all ranks, to this rank's tokens. Backward gathers the gradient."""
    return _Enter.apply(x, exchange)  # type: ignore[no-untyped-call, no-any-return]


def leave(x: Tensor, tokens: int, exchange: Exchange) -> Tensor:
    """This rank's tokens to all ``tokens``. What follows is computed alike on all ranks, so backward is this rank's part."""
    return _Leave.apply(x, tokens, exchange)  # type: ignore[no-untyped-call, no-any-return]
