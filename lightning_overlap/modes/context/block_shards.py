"""How context parallelism shards a block, for the comparison of the first block with an unsharded copy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_overlap.model.block_check import Advice, BlockCheck, BlockShards
from lightning_overlap.model.boundary import Nesting
from lightning_overlap.model.hidden_states import find_hidden
from lightning_overlap.model.sharded_tokens import ShardedTokens
from lightning_overlap.model.token_shards import TokenShards
from lightning_overlap.model.trees import leaves
from lightning_overlap.modes.context import seam
from lightning_overlap.modes.context.attention import UnshardedAttention
from lightning_overlap.modes.context.cut import ContextCut
from lightning_overlap.modes.context.local_tokens import LocalTokens
from lightning_overlap.modes.context.mask import Mask
from lightning_overlap.ranks.group import Group


class ContextShards(BlockShards):
    """See the module's docstring.

    Gradients inside the blocks are those of one process times the ranks, of whose tokens each rank has computed some.

    Args:
        group: the ranks.
        cut: of the blocks.
        name_attention: has the attentions of transformers in a module call the seam.
    """

    nesting = Nesting.TOKENS
    advice = Advice(
        sharded="its tokens",
        failure="A block must take the number of tokens from its input, and must not mix tokens outside of attention",
        output="(1) the block mixes tokens, and not by an attention: a convolution, a sum, mean, norm or shift over tokens, a "
        "recurrence; (2) it counts tokens, or makes positions from their number: pass them to the block, or give the module that "
        "makes a table of them the role token_table; (3) it reads a tensor of all tokens that it is not called with: pass it to the "
        "block. Otherwise set context_parallel: 1.",
        gradients="the block mixes tokens in a way that only its gradients show (a sum over tokens that is detached, say): set "
        "context_parallel: 1.",
        switch="context_parallel.verify_blocks: false",
    )

    def __init__(self, group: Group, cut: ContextCut, name_attention: Callable[[nn.Module], None]) -> None:
        self.group = group
        self._cut, self._name_attention = cut, name_attention

    @property
    def _shards(self) -> TokenShards | None:
        """Which tokens each rank has in this forward; None: all of them."""
        sharding = self._cut.state.sharding
        return None if sharding is None else sharding.shards

    def start(self, check: BlockCheck, inputs: tuple[Any, Any]) -> None:
        if check.enters:
            self._cut.start_stack(find_hidden(*inputs, check.name)[1], inputs)

    def complete(self, check: BlockCheck, twin: nn.Module, inputs: tuple[Any, Any]) -> None:
        """A copy whose mask is a description attends by our kernels, since no other takes one."""
        mask = next((leaf for leaf in leaves(inputs) if isinstance(leaf, Mask)), None)
        if mask is not None:
            local = LocalTokens(mask.tokens, torch.arange(mask.tokens))
            self._name_attention(twin)
            seam.install({check.name: twin}, UnshardedAttention(self.group), lambda: local)

    def gather_input(self, check: BlockCheck, x: Tensor) -> Tensor:
        shards = self._shards
        return x if check.enters or shards is None else shards.gather(x, -2)

    def gather_output(self, check: BlockCheck, y: Tensor) -> Tensor:
        if isinstance(y, ShardedTokens):
            return y.shards.gather(y.local, -2)
        shards = self._shards
        return y if shards is None or (check.leaves and self._cut.state.gathers) else shards.gather(y, -2)

    def shard_input_grad(self, check: BlockCheck, grad: Tensor) -> Tensor:
        shards = self._shards
        if shards is None:
            return grad
        local = shards.take(grad, -2) * self.group.size
        return torch.zeros_like(grad).index_copy_(-2, shards.local.to(grad.device), local) if check.enters else local

    def sum_grad(self, parameter: nn.Parameter, grad: Tensor) -> Tensor:
        return self.group.all_reduce(grad.clone(), label="context.check", divisor=self.group.size).wait()
