"""Sequence parallelism: between the first and the last block, each rank has its part of the tokens only.

Layers that treat each token separately (norms, dropout, residual sums) then take 1/size of the time, and of the memory for backward.
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
class _ScatterState:
    """State that the two autograd nodes of a scatter share.

    Attributes:
        exchange: the ranks.
        grad: the gradient of all tokens, from its post in backward until its wait.
    """

    exchange: Exchange
    grad: Gathered | None = None


class _WaitForGradient(Function):
    """Waits in backward for the gradient of all tokens, whose gather :class:`_KeepLocalTokens` has posted.

    Forward: ``x`` ``(..., tokens, features)`` -> ``x``. Backward: the gradient in that shape; autograd passes None.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, state: _ScatterState) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.state = state
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, _: None) -> Any:
        grad, ctx.state.grad = ctx.state.grad, None
        return None if grad is None else grad.wait(), None


class _KeepLocalTokens(Function):
    """Keeps this rank's tokens. Backward posts the gather of their gradient, for which :class:`_WaitForGradient` waits.

    Forward: ``x`` ``(..., tokens, features)`` -> ``(..., local tokens, features)``, copied. Backward: takes a gradient in the output's
    shape; autograd passes None on.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, state: _ScatterState) -> Tensor:
        ctx.state, ctx.tokens = state, x.shape[-2]
        return local_tokens(x, state.exchange)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        ctx.state.grad = Gathered(grad, ctx.tokens, ctx.state.exchange, "tensor.entry_grad")
        return None, None


class _GatherTokens(Function):
    """Gathers all tokens. All ranks compute the same with them, so backward keeps this rank's part of the gradient.

    Forward: ``x`` ``(..., local tokens, features)`` -> ``(..., tokens, features)``. Backward: the reverse.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, tokens: int, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return Gathered(x, tokens, exchange, "tensor.exit").wait()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return local_tokens(grad, ctx.exchange), None, None


def local_tokens(x: Tensor, exchange: Exchange) -> Tensor:
    """This rank's part of the tokens of ``x`` ``(..., tokens, features)``. It is a copy, so that ``x`` can be freed."""
    low, high = exchange.bounds(x.shape[-2])[exchange.part_index : exchange.part_index + 2]
    return x.narrow(-2, low, high - low).clone(memory_format=torch.contiguous_format)


def scatter_tokens(x: Tensor, exchange: Exchange, between: Callable[[], None]) -> Tensor:
    """Keeps this rank's tokens of ``x``, which is the same on all ranks. Backward gathers the gradient of all tokens.

    Args:
        x: ``(..., tokens, features)``, floating.
        exchange: the ranks.
        between: called between the nodes that wait for and post the gradient's gather. Backward computes the nodes that it makes
            while that gather is in transfer.

    Returns:
        ``(..., local tokens, features)``, dtype as ``x``.
    """
    state = _ScatterState(exchange)
    x = _WaitForGradient.apply(x, state)
    between()
    return _KeepLocalTokens.apply(x, state)


def gather_tokens(x: Tensor, tokens: int, exchange: Exchange) -> Tensor:
    """Gathers all ranks' tokens. All ranks must compute the same with them: backward keeps this rank's part of the gradient.

    Args:
        x: this rank's tokens, ``(..., local tokens, features)``.
        tokens: the number of all tokens.
        exchange: the ranks.

    Returns:
        ``(..., tokens, features)``, dtype as ``x``.
    """
    return _GatherTokens.apply(x, tokens, exchange)
