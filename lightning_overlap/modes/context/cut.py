"""The context's cut at the boundary of the block stack: takes this rank's tokens before the first block; after the last one gathers
all tokens (``boundary: blocks``), or hands on :class:`~lightning_overlap.model.sharded_tokens.ShardedTokens` (``boundary: loss``).
Under ``boundary: batch`` embeddings give such tensors already."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd import Function

from lightning_overlap.decision import ConfigError
from lightning_overlap.model.boundary import Boundary, Nesting, TokenCut
from lightning_overlap.model.sharded_tokens import ShardedTokens
from lightning_overlap.model.token_shards import TokenShards
from lightning_overlap.model.trees import leaves
from lightning_overlap.modes.context.arguments import shard_argument
from lightning_overlap.modes.context.layout import TokenLayout
from lightning_overlap.modes.context.local_tokens import LocalTokens
from lightning_overlap.modes.context.mask import Mask
from lightning_overlap.ranks.group import Group


@dataclass(frozen=True, eq=False)
class Sharding:
    """How the ranks share the sequences of one call of the model.

    Attributes:
        layout: which tokens each rank has.
        shards: the same, as an object that takes and gathers this rank's tokens.
        local: the tokens of this rank.
        batch: number of samples; None if the hidden states have none.
    """

    layout: TokenLayout
    shards: TokenShards
    local: LocalTokens
    batch: int | None

    @classmethod
    def of(cls, layout: TokenLayout, group: Group, batch: int | None) -> Sharding:
        positions = tuple(layout.positions(rank) for rank in range(group.size))
        shards = TokenShards(group, positions, layout.tokens)
        return cls(layout, shards, LocalTokens(layout.tokens, shards.local, group.rank), batch)


@dataclass
class ContextState:
    """What one forward knows of its tokens.

    Attributes:
        sharding: of the call of the model that runs; None before the first block, and in a call that is not sharded.
        short: all tokens of a sequence that has fewer than there are ranks, without a sharding: each rank computes them all.
        by_mask: the sharding of each call in which blocks were given a mask: a checkpoint may run a block of an earlier call again.
        by_tokens: under ``boundary: batch`` the sharding of embeddings, by number of tokens.
        gathers: tokens are gathered after the last block.
    """

    sharding: Sharding | None = None
    short: LocalTokens | None = None
    by_mask: MutableMapping[Mask, Sharding | None] = field(default_factory=WeakKeyDictionary)
    by_tokens: dict[int, Sharding] = field(default_factory=dict)
    gathers: bool = False

    @property
    def local(self) -> LocalTokens | None:
        """The tokens of this rank; None: all of them, and attention is what the user wrote."""
        return self.short if self.sharding is None else self.sharding.local


class ContextCut(TokenCut):
    """Each rank has some tokens between the first and the last block.

    Args:
        group: the ranks.
        boundary: of the blocks.
        order: ``by mask``, ``balanced`` or ``contiguous``; see :class:`~lightning_overlap.modes.context.config.ContextParallel`.
        where: ``loss``, ``blocks`` or ``batch``: where tokens are sharded, see
            :class:`~lightning_overlap.modes.context.config.ContextParallel`.
        is_unsharded: whether the present forward runs with all tokens on every rank.
        needs_tokens: whether the blocks cannot compute without tokens, as those of transformers.
    """

    nesting = Nesting.TOKENS
    remedy = "set context_parallel: 1"

    def __init__(
        self,
        group: Group,
        boundary: Boundary,
        order: str,
        where: str,
        *,
        is_unsharded: Callable[[], bool],
        needs_tokens: bool,
    ) -> None:
        self._group, self._boundary, self._order, self._where = group, boundary, order, where
        self._is_unsharded, self._needs_tokens = is_unsharded, needs_tokens

    @property
    def state(self) -> ContextState:
        """Of the forward that this thread computes."""
        return self._boundary.forwards.current.of(ContextState)

    def start_stack(self, x: Tensor, inputs: Any) -> None:
        state, tokens = self.state, x.shape[-2]
        if self._is_unsharded():
            state.sharding = state.short = None
            return
        if self._is_short(tokens):
            state.sharding, state.short = None, LocalTokens(tokens, torch.arange(tokens))
            return
        batch = x.shape[0] if x.dim() > 2 else None
        if isinstance(x, ShardedTokens):  # of embeddings, or of a model that goes through its blocks again
            known = [state.sharding, *state.by_tokens.values()]
            same = next((sharding for sharding in known if sharding is not None and sharding.shards.equal(x.shards)), None)
            if same is not None:
                state.sharding = replace(same, batch=batch)
                return
        if self._where == "batch":
            raise ConfigError(
                "context_parallel.boundary: batch was asked for, and the hidden states that the first block is called with have all "
                "tokens: they are not those of the embeddings, or a function on the way has gathered them (a warning names it). Give "
                "the module that makes them, token by token, the role token_wise in parallel_plan, or set context_parallel.boundary: "
                "loss"
            )
        layout = self._lay_out(tokens, next(_masks(inputs), None))
        state.sharding = Sharding.of(layout, self._group, batch)

    def shards_of_embeddings(self, tokens: int) -> TokenShards | None:
        """Which tokens each rank has of a sequence before the blocks; None: all of them."""
        if self._is_unsharded() or self._is_short(tokens):
            return None
        by_tokens = self.state.by_tokens
        if tokens not in by_tokens:
            by_tokens[tokens] = Sharding.of(self._lay_out(tokens, None), self._group, None)
        return by_tokens[tokens].shards

    def _is_short(self, tokens: int) -> bool:
        """Whether a sequence has no tokens for some ranks, which could not compute without."""
        return self._needs_tokens and tokens < self._group.size

    def _lay_out(self, tokens: int, mask: Mask | None) -> TokenLayout:
        """The layout of a sequence; ``mask`` is that of the first block, which all stages of a pipeline see."""
        order = self._order
        if order == "by mask" and mask is not None:
            # Stages know the shapes of what they receive from those of the batch: a rank then has as many tokens under any mask.
            even = self._boundary.has_remote_blocks
            if mask.documents is not None and not (even and tokens % (2 * self._group.size)):
                return TokenLayout.for_documents(mask, self._group.size, even=even)
            order = "balanced" if mask.causal and mask.window is None else "contiguous"
        make = TokenLayout.contiguous if order == "contiguous" else TokenLayout.balanced
        return make(tokens, self._group.size)

    def start_block(self, block: nn.Module, x: Tensor, inputs: Any) -> None:
        state = self.state
        if self._boundary.forwards.current.in_backward:
            state.sharding = next((state.by_mask[mask] for mask in _masks(inputs) if mask in state.by_mask), state.sharding)
            return
        state.by_mask.update(dict.fromkeys(_masks(inputs), state.sharding))
        if state.sharding is None:
            return
        # A reentrant checkpoint, which alone trains without gradients, takes ordinary tensors from a block, and gives it such.
        is_reentrant = block.training and not torch.is_grad_enabled()
        if is_reentrant and self._where == "batch":
            raise ConfigError(
                "context_parallel.boundary: batch: a block in training mode runs without gradients, as in a checkpoint with "
                "use_reentrant=True, which would lose the gradients of sharded embeddings: set use_reentrant=False, call eval() "
                "before a forward that needs no gradients, or set context_parallel.boundary: loss"
            )
        state.gathers = self._where == "blocks" or is_reentrant

    def enter(self, x: Tensor) -> Tensor:
        sharding = self.state.sharding
        if sharding is None:
            return x
        x, is_local = _tokens_of(x, sharding, "the first block")
        return x if is_local else _Enter.apply(x, sharding.shards)

    def leave(self, x: Tensor) -> Tensor:
        state = self.state
        if state.sharding is None:
            return x
        shards = state.sharding.shards
        return shards.gather(x, -2) if state.gathers else ShardedTokens.of(x, -2, shards)

    def shard_argument(self, x: Tensor) -> Tensor:
        sharding = self.state.sharding
        if sharding is None:
            return x
        x, is_local = _tokens_of(x, sharding, "a block")
        return x if is_local else shard_argument(x, sharding.local.tokens, sharding.local.positions, sharding.batch)


def _tokens_of(x: Tensor, sharding: Sharding, reader: str) -> tuple[Tensor, bool]:
    """Returns this rank's tokens of a tensor that is sharded in the same way, and True; of any other tensor all tokens, and False."""
    if not isinstance(x, ShardedTokens):
        return x, False
    return (x.local, True) if x.shards.equal(sharding.shards) else (x.complete(reader), False)


def _masks(inputs: Any) -> Iterator[Mask]:
    """The masks among the arguments of a block."""
    return (leaf for leaf in leaves(inputs) if isinstance(leaf, Mask))


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
