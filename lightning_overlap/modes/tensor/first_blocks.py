"""The first block of each kind is compared with itself whole, in the first training step: the tensor mode's part of that check."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_overlap.model.hidden_states import find_hidden
from lightning_overlap.model.patches import ReplacedForward
from lightning_overlap.modes.tensor.check import BlockCheck, Cutting, structure, whole_copy
from lightning_overlap.modes.tensor.partition import Partition
from lightning_overlap.modes.tensor.regions import Regions, RegionState
from lightning_overlap.modes.tensor.replicated import ReplicatedGradients
from lightning_overlap.modes.tensor.sequence import gather_tokens, local_tokens
from lightning_overlap.state.shards import is_absent


def first_of_each_kind(blocks: Sequence[nn.Module], name: str) -> list[BlockCheck]:
    """Checks of the first block of each kind that is on this rank.

    Args:
        blocks: all blocks.
        name: of their list in the model.
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
        checks: of the blocks.
        regions: of the model.
        partition: the cut parameters.
        replicated: parameters of whose gradients each rank has a summand.
        counts: by module and attribute, a number in the whole model that is cut (of heads, say).

    Attributes:
        waiting: the checks that have not run.
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
        """Runs a check when its block is called first in a training step, whatever mode the block is in. A forward pre-hook.

        Raises:
            ConfigError: see :meth:`BlockCheck.check`.
        """
        regions, boundary = self._regions, self._regions.boundary
        if check not in self.waiting or not regions.has_trained:
            return
        self.waiting.remove(check)
        # In a pipeline gradients of weights may be deferred, by a forward that is not ours.
        forwards = [vars(module).get("forward") for module in block.modules()]
        defers = boundary.is_spread and any(forward is not None and type(forward) is not ReplacedForward for forward in forwards)
        cutting = self._cutting(check, find_hidden(args, kwargs, check.name)[1])
        forward = boundary.forwards.current.branch()
        state = forward.of(RegionState)
        state.prepared, state.inputs = None, {}
        with boundary.forwards.backward(forward):  # an activation checkpoint in the block runs again in a thread of autograd's
            check.check(self._whole_block(check), args, kwargs, cutting, backward=not defers)

    def _cutting(self, check: BlockCheck, x: Tensor) -> Cutting:
        """How the ranks have what the block reads and gives, for hidden states ``x``."""
        exchange, group = self._regions.exchange, self._regions.exchange.group
        parted = exchange.sharded and not check.enters
        tokens = self._regions.tokens_of(x, check.name) if parted else x.shape[-2]

        def piece(parameter: nn.Parameter, grad: Tensor) -> Tensor:
            cut = self._partition.pieces.get(id(parameter))
            return grad if cut is None else cut.of(grad, group.rank, group.size)

        def complete(parameter: nn.Parameter, grad: Tensor) -> Tensor:
            is_summand = id(parameter) in self._replicated.parameters
            return group.all_reduce(grad.clone(), label="tensor.check").wait() if is_summand else grad

        return Cutting(
            group,
            lambda x: gather_tokens(x, tokens, exchange) if parted else x,
            lambda y: gather_tokens(y, tokens, exchange) if exchange.sharded and not check.leaves else y,
            lambda grad: local_tokens(grad, exchange) if parted else grad,
            piece,
            complete,
        )

    def _whole_block(self, check: BlockCheck) -> nn.Module:
        """A copy of a block as it would be without tensor parallelism, with present weights. Collective."""
        twin = whole_copy(check.block)
        for (owner, name), count in self._counts.items():
            if f"{owner}.".startswith(f"{check.name}."):
                setattr(twin.get_submodule(owner[len(check.name) + 1 :]), name, count)
        whole: dict[int, Tensor] = {}
        for own, copied in zip(check.block.parameters(), twin.parameters(), strict=True):
            if (piece := self._partition.pieces.get(id(own))) is not None:
                copied.data = whole.setdefault(id(own), self._partition.whole(piece, own.data))
        return twin
