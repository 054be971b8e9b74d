"""Compares the first block of each kind with an unsharded copy, in the first training step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_overlap.model.hidden_states import find_hidden
from lightning_overlap.model.patches import ReplacedForward
from lightning_overlap.modes.tensor.check import BlockCheck, BlockLayout, copy_without_hooks, structure
from lightning_overlap.modes.tensor.regions import Regions, RegionState
from lightning_overlap.modes.tensor.replicated import ReplicatedGradients
from lightning_overlap.modes.tensor.sequence import gather_tokens, local_tokens
from lightning_overlap.state.absent import is_absent
from lightning_overlap.state.pieces import Partition


def first_of_each_kind(blocks: Sequence[nn.Module], name: str) -> list[BlockCheck]:
    """Makes a check for the first block of each kind on this rank.

    Args:
        blocks: all blocks.
        name: of the list of blocks in the model.
    """
    first: dict[Any, BlockCheck] = {}
    for number, block in enumerate(blocks):
        if not any(map(is_absent, block.parameters())):  # on another stage of a pipeline
            last = number == len(blocks) - 1
            first.setdefault(structure(block), BlockCheck(block, f"{name}.{number}", enters=number == 0, leaves=last))
    return list(first.values())


class FirstBlocks:
    """Runs the checks.

    Args:
        checks: the checks.
        regions: the model's regions.
        partition: the sharded parameters.
        replicated: the parameters of whose gradient each rank has a summand.
        counts: by module and attribute, the unsharded value of a number that is sharded (the number of heads, for example).

    Attributes:
        waiting: the checks that have not run yet.
    """

    def __init__(
        self,
        checks: Sequence[BlockCheck],
        regions: Regions,
        partition: Partition,
        replicated: ReplicatedGradients,
        counts: Mapping[tuple[str, str], int],
    ) -> None:
        self.waiting = list(checks)
        self._regions = regions
        self._partition = partition
        self._replicated = replicated
        self._counts = counts

    def check(self, check: BlockCheck, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Runs a check at the first call of its block in a training step, in train or eval mode. A forward pre-hook.

        Raises:
            ConfigError: see :meth:`BlockCheck.check`.
        """
        regions, boundary = self._regions, self._regions.boundary
        if check not in self.waiting or not regions.has_trained:
            return
        self.waiting.remove(check)
        # A pipeline may defer gradients of weights: it replaces the forward of their layers.
        forwards = [vars(module)["forward"] for module in block.modules() if "forward" in vars(module)]
        defers = boundary.has_remote_blocks and any(type(forward) is not ReplacedForward for forward in forwards)
        layout = self._layout(check, find_hidden(args, kwargs, check.name)[1])
        forward = boundary.forwards.current.branch()
        state = forward.of(RegionState)
        state.prepared, state.inputs = None, {}
        with boundary.forwards.backward(forward):  # autograd's threads find the forward too: checkpoints in the block run again there
            check.check(self._unsharded_copy(check), args, kwargs, layout, backward=not defers)

    def _layout(self, check: BlockCheck, x: Tensor) -> BlockLayout:
        """How the ranks hold the block's tensors, for hidden states ``x``."""
        exchange, group = self._regions.exchange, self._regions.exchange.group
        input_is_sharded = exchange.sharded and not check.enters
        tokens = self._regions.tokens_of(x, check.name) if input_is_sharded else x.shape[-2]

        def shard_grad(parameter: nn.Parameter, grad: Tensor) -> Tensor:
            piece = self._partition.pieces.get(id(parameter))
            return grad if piece is None else piece.of(grad, group.rank, group.size)

        def sum_grad(parameter: nn.Parameter, grad: Tensor) -> Tensor:
            is_summand = id(parameter) in self._replicated.parameters
            return group.all_reduce(grad.clone(), label="tensor.check").wait() if is_summand else grad

        return BlockLayout(
            group,
            lambda x: gather_tokens(x, tokens, exchange) if input_is_sharded else x,
            lambda y: gather_tokens(y, tokens, exchange) if exchange.sharded and not check.leaves else y,
            lambda grad: local_tokens(grad, exchange) if input_is_sharded else grad,
            shard_grad,
            sum_grad,
        )

    def _unsharded_copy(self, check: BlockCheck) -> nn.Module:
        """A copy of a block without tensor parallelism, with the present weights. Collective."""
        twin = copy_without_hooks(check.block)
        for (owner, name), count in self._counts.items():
            if f"{owner}.".startswith(f"{check.name}."):
                setattr(twin.get_submodule(owner[len(check.name) + 1 :]), name, count)
        gathered: dict[int, Tensor] = {}
        for parameter, copied in zip(check.block.parameters(), twin.parameters(), strict=True):
            if (piece := self._partition.pieces.get(id(parameter))) is not None:
                copied.data = gathered.setdefault(id(parameter), self._partition.gather(piece, parameter.data))
        return twin
