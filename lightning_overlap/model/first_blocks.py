"""Compares the first block of each kind with an unsharded copy, in the first training step, under all modes that shard blocks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_overlap.model.block_check import BlockCheck, BlockShards, structure
from lightning_overlap.model.boundary import Boundary
from lightning_overlap.model.copies import copy_without_hooks
from lightning_overlap.model.hidden_states import find_hidden
from lightning_overlap.model.markers import is_expert
from lightning_overlap.model.patches import Hook, ReplacedForward
from lightning_overlap.model.stand_in import StandIn
from lightning_overlap.state.absent import is_absent


class FirstBlocks:
    """The checks of one fit. Modes register how they shard the blocks.

    Args:
        boundary: of the block stack.

    Attributes:
        waiting: the checks that have not run yet.
    """

    def __init__(self, boundary: Boundary) -> None:
        self.waiting: list[BlockCheck] = []
        self._boundary = boundary
        self._modes: list[BlockShards] = []
        self._hooks: list[RemovableHandle] = []
        self._is_found = False
        self._is_training = False

    def register(self, blocks: Sequence[nn.Module], name: str, mode: BlockShards, *, verify: bool) -> Callable[[], None]:
        """Adds a mode to the checks. Each mode that shards blocks does so: a copy is unsharded by all of them.

        Args:
            blocks: all blocks of the model, the same for every mode.
            name: of the list of blocks in the model.
            mode: how it shards them.
            verify: False: blocks are not compared.

        Returns:
            A function that removes the mode.
        """
        self._modes = sorted([*self._modes, mode], key=lambda mode: mode.nesting)
        if not self._is_found:
            self.waiting, self._is_found = _first_of_each_kind(blocks, name), True
        if not verify:
            self.waiting.clear()
        if not self._hooks:
            # First of all hooks: the check gets the block's arguments as the user passes them.
            self._hooks = [
                check.block.register_forward_pre_hook(Hook(partial(self._check, check)), prepend=True, with_kwargs=True)
                for check in self.waiting
            ]

        def remove() -> None:
            self._modes.remove(mode)
            if not self._modes:
                for hook in self._hooks:
                    hook.remove()
                self._hooks.clear()

        return remove

    def start_training(self) -> None:
        """From now on blocks are checked when they run: a training step starts, which is not only tried."""
        self._is_training = True

    def _check(self, check: BlockCheck, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Runs a check at the first call of its block in a training step, in train or eval mode. A forward pre-hook.

        Raises:
            ConfigError: see :meth:`BlockCheck.check`.
        """
        if check not in self.waiting or not self._is_training:
            return
        self.waiting.remove(check)
        if any(map(is_expert, block.parameters())):  # no rank has the unsharded copy, and ranks with other samples run with it
            return
        if isinstance(find_hidden(args, kwargs, check.name)[1], StandIn):  # of embeddings whose tokens are sharded
            warnings.warn(f"{check.name} was not compared with an unsharded copy, since no rank has its whole input", stacklevel=2)
            return
        # A pipeline may defer gradients of weights: it replaces the forward of their layers.
        forwards = [vars(module)["forward"] for module in block.modules() if "forward" in vars(module)]
        defers = self._boundary.has_remote_blocks and any(type(forward) is not ReplacedForward for forward in forwards)
        forward, inputs = self._boundary.forwards.current.branch(), (args, kwargs)
        # Autograd's threads find the forward too: checkpoints in the block run again there.
        with self._boundary.forwards.backward(forward):
            twin = copy_without_hooks(block)
            for mode in self._modes:
                mode.start(check, inputs)
                mode.complete(check, twin, inputs)
            check.check(twin, args, kwargs, self._modes, backward=not defers)


def _first_of_each_kind(blocks: Sequence[nn.Module], name: str) -> list[BlockCheck]:
    """A check for the first block of each kind on this rank."""
    first: dict[Any, BlockCheck] = {}
    for number, block in enumerate(blocks):
        if not any(map(is_absent, block.parameters())):  # on another stage of a pipeline
            last = number == len(blocks) - 1
            first.setdefault(structure(block), BlockCheck(block, f"{name}.{number}", enters=number == 0, leaves=last))
    return list(first.values())
