"""Sequence parallelism: between the entry and the exit of the block stack each rank has its part of the tokens only.

What works on each token by itself (norms, dropout, residual sums) then costs, and keeps for backward, 1/size of it.
(V. Korthikanti et al., Reducing Activation Recomputation in Large Transformer Models, 2022.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from lightning_overlap.modes.tensor.gemm import Exchange, Gathered


@dataclass
class _Entry:
    """What the two nodes of an entry share."""

    exchange: Exchange
    gathered: Gathered | None = None


class _Wait(Function):
    """Waits in backward for the gradient of all tokens, whose gather :class:`_Cut` has posted.

    Forward: ``x`` ``(..., tokens, features)`` -> ``x``. Backward: the gradient in that shape; autograd passes None.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, entry: _Entry) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.entry = entry
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, _: None) -> Any:
        gathered, ctx.entry.gathered = ctx.entry.gathered, None
        return None if gathered is None else gathered.whole(), None


class _Cut(Function):
    """Keeps this rank's tokens. Backward posts the gather of their gradient.

    Forward: ``x`` ``(..., tokens, features)`` -> ``(..., own tokens, features)``, copied. Backward: a gradient in the output's shape.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, entry: _Entry) -> Tensor:
        ctx.entry, ctx.tokens = entry, x.shape[-2]
        return own_tokens(x, entry.exchange)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        ctx.entry.gathered = Gathered(grad, ctx.tokens, ctx.entry.exchange, "tensor.entry_grad")
        return None, None


class _Leave(Function):
    """Gathers all tokens. What follows is computed alike on all ranks, so backward keeps this rank's part of the gradient.

    Forward: ``x`` ``(..., own tokens, features)`` -> ``(..., tokens, features)``. Backward: the other way.
    """

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


def enter(x: Tensor, exchange: Exchange, between: Callable[[], None]) -> Tensor:
    """``(..., tokens, features)``, the same on all ranks, to this rank's tokens. Backward gathers the gradient.

    Args:
        x: all tokens.
        exchange: the ranks.
        between: called where a reading to come can be prepared, whose rest then runs beside that gather.
    """
    entry = _Entry(exchange)
    x = _Wait.apply(x, entry)  # type: ignore[no-untyped-call]
    between()
    return _Cut.apply(x, entry)  # type: ignore[no-untyped-call, no-any-return]


def leave(x: Tensor, tokens: int, exchange: Exchange) -> Tensor:
    """This rank's tokens to all ``tokens``. What follows is computed alike on all ranks, so backward is this rank's part."""
    return _Leave.apply(x, tokens, exchange)  # type: ignore[no-untyped-call, no-any-return]
