"""The first block, cut, against itself as it was: a wrong cut changes numbers, and nothing else would say so."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_map

from lightning_overlap.block_stack import find_hidden
from lightning_overlap.decision import ConfigError

CLOSE = 0.05
"""Relative difference that rounding may make in what a block adds to its input, in half precision too. A wrong cut makes about 1."""


class FirstBlock:
    """Compares one block's output with that before it was cut, once.

    Args:
        block: the first block, which is to be cut afterwards.
        name: of the block.
    """

    def __init__(self, block: nn.Module, name: str) -> None:
        self._block, self._name = block, name
        self._before: nn.Module | None = copy.deepcopy(block)
        self.running = False

    def check(self, args: tuple[Any, ...], kwargs: dict[str, Any], whole: Callable[[Tensor, int], Tensor]) -> None:
        """To be called with what the block is called with, on all ranks that have a part of it. Collective.

        Args:
            args: positional arguments.
            kwargs: the others. Caches in them stay as they are.
            whole: makes all tokens of those that the cut block gives.

        Raises:
            ConfigError: the outputs differ; on every rank.
        """
        before, self._before = self._before, None
        if before is None:
            return
        x = find_hidden(args, kwargs, self._name)[1].detach()
        modes = {module: module.training for module in self._block.modules()}
        self.running = True
        try:
            # An activation checkpoint around the block counts what is saved, and would not find it again.
            with torch.no_grad(), saved_tensors_hooks(lambda x: x, lambda x: x):
                found = whole(_hidden(self._block.eval()(*_copied(args), **_copied(kwargs))), x.shape[-2])
                expected = _hidden(before.eval()(*_copied(args), **_copied(kwargs)))
        finally:
            self.running = False
            for module, training in modes.items():
                module.training = training
        change = (expected - x).float().norm().item()
        difference = (found - expected).float().norm().item()
        if difference > CLOSE * max(change, 1e-3 * x.float().norm().item()):
            raise ConfigError(
                f"{self._name} gives another output when its layers are cut over the ranks: the difference is {difference:.2g}, and "
                f"the block adds {change:.2g} to its input. A fused layer may need its parts ('column[3]', or 'column[1]' if it is "
                "not fused), or the block counts on sizes that are cut (view as many heads as there are: -1). Mend the roles or the "
                "module; tensor_parallel.verify_blocks: false leaves this check out"
            )


def _copied(value: Any) -> Any:
    return tree_map(lambda x: x.detach() if isinstance(x, Tensor) else copy.deepcopy(x), value)


def _hidden(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result  # type: ignore[no-any-return]
