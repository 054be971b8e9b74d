"""The context's cut at the boundary of the block stack: takes this rank's tokens before the first block; after the last one gathers
all tokens (``boundary: blocks``), or hands on :class:`~lightning_overlap.model.sharded_tokens.ShardedTokens` (``boundary: loss``)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from lightning_overlap.decision import ConfigError
from lightning_overlap.model.blocks import is_from_transformers
from lightning_overlap.model.boundary import Boundary, Nesting, TokenCut
from lightning_overlap.model.sharded_tokens import ShardedTokens
from lightning_overlap.model.token_shards import TokenShards
from lightning_overlap.model.trees import leaves
from lightning_overlap.modes.context.arguments import shard_argument
from lightning_overlap.modes.context.layout import TokenLayout
from lightning_overlap.modes.context.local_tokens import LocalTokens
from lightning_overlap.modes.context.mask import Mask
from lightning_overlap.ranks.group import Group


@dataclass
class ContextState:
    """What one forward knows of its tokens.

    Attributes:
        layout: which tokens each rank has; None before the first block.
        local: the tokens of this rank; None before the first block, and in a forward that is not sharded.
        shards: the same as ``layout``, as an object that takes and gathers this rank's tokens.
        gathers: tokens are gathered after the last block.
        batch: number of samples.
    """

    layout: TokenLayout | None = None
    local: LocalTokens | None = None
    shards: TokenShards | None = None
    gathers: bool = False
    batch: int | None = None


class ContextCut(TokenCut):
    """Each rank has some tokens between the first and the last block.

    Args:
        group: the ranks.
        boundary: of the blocks.
        order: ``by mask``, ``balanced`` or ``contiguous``; see :class:`~lightning_overlap.modes.context.config.ContextParallel`.
        exit: ``loss`` or ``blocks``: where tokens are joined again.
        is_unsharded: whether the present forward runs with all tokens on every rank.
    """

    nesting = Nesting.TOKENS
    remedy = "set context_parallel: 1"

    def __init__(self, group: Group, boundary: Boundary, order: str, exit: str, is_unsharded: Callable[[], bool]) -> None:
        self.ranks = group.size
        self._group, self._boundary, self._order, self._exit = group, boundary, order, exit
        self._is_unsharded = is_unsharded

    @property
    def state(self) -> ContextState:
        """Of the forward that this thread computes."""
        return self._boundary.forwards.current.of(ContextState)

    def start_block(self, block: nn.Module, x: Tensor, inputs: Any) -> None:
        state = self.state
        if self._is_unsharded():
            state.local = None
            return
        if state.local is not None and not self._boundary.is_first(block):
            return
        tokens = self._boundary.count_tokens(self, x)
        if self._boundary.has_remote_blocks and tokens % (2 * self.ranks):
            raise ConfigError(
                f"a sequence of {tokens} tokens is not divisible by 2 x context_parallel.size={self.ranks}, which it must be in a "
                "pipeline: pad it"
            )
        state.layout = self._lay_out(tokens, next((x for x in leaves(inputs) if isinstance(x, Mask)), None))
        if tokens < self.ranks and is_from_transformers(block):
            raise ConfigError(
                f"a sequence of {tokens} tokens has none for some of the context_parallel.size={self.ranks} ranks, and models of "
                f"transformers cannot compute without tokens. Pad the batch to {self.ranks} tokens, or {self.remedy}"
            )
        positions = tuple(state.layout.positions(rank) for rank in range(self.ranks))
        state.shards = TokenShards(self._group, positions, tokens)
        state.local = LocalTokens(tokens, state.shards.local)
        state.batch = x.shape[0] if x.dim() > 2 else None
        if not self._boundary.forwards.current.in_backward:
            # A reentrant checkpoint, which alone trains without gradients, takes ordinary tensors from a block.
            state.gathers = self._exit == "blocks" or (block.training and not torch.is_grad_enabled())

    def _lay_out(self, tokens: int, mask: Mask | None) -> TokenLayout:
        order = self._order
        if order == "by mask" and mask is not None:
            if mask.documents is not None and not self._boundary.has_remote_blocks:
                return TokenLayout.for_documents(mask, self.ranks)
            order = "balanced" if mask.causal and mask.window is None else "contiguous"
        make = TokenLayout.contiguous if order == "contiguous" else TokenLayout.balanced
        return make(tokens, self.ranks)

    def enter(self, x: Tensor) -> Tensor:
        state = self.state
        if state.local is None:
            return x
        if isinstance(x, ShardedTokens):  # a model that goes through its blocks again
            return x.local
        return _Enter.apply(x, state.shards)

    def leave(self, x: Tensor) -> Tensor:
        state = self.state
        if state.local is None or state.shards is None:
            return x
        return state.shards.gather(x, -2) if state.gathers else ShardedTokens.of(x, -2, state.shards)

    def shard_argument(self, x: Tensor) -> Tensor:
        state = self.state
        if state.local is None:
            return x
        if isinstance(x, ShardedTokens):
            return x.local
        return shard_argument(x, state.local.tokens, state.local.positions, state.batch)


class _Enter(Function):
    """Takes this rank's tokens. ``x`` is the same on all ranks.

    Forward: ``x`` ``(..., tokens, features)`` -> ``(..., local tokens, features)``.
    Backward: the gradient of the local tokens, and zeros for the others, whose gradients other ranks have.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, shards: TokenShards) -> Tensor:
        ctx.shards = shards
        return shards.take(x, -2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        shards = ctx.shards
        whole = grad.new_zeros(*grad.shape[:-2], shards.size, grad.shape[-1])
        return whole.index_copy_(-2, shards.local.to(grad.device), grad), None
