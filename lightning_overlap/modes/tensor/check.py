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
from lightning_overlap.comm import Group, TransferError
from lightning_overlap.decision import ConfigError

CLOSE = 0.05
"""Relative difference that rounding may make in what a block adds to its input, in half precision too. A wrong cut makes about 1."""
CLOSE_GRADIENT = 0.25
"""The same of a gradient. One that is summed over the ranks where it should not be is off by 1 or more."""
NOTHING = 0.02
"""A gradient that is smaller than that, against the largest, may be rounding alone (a key's bias has none)."""


class FirstBlock:
    """Compares one block's output and gradients with those before it was cut, once.

    Args:
        block: the first block, which is to be cut afterwards.
        name: of the block.
    """

    def __init__(self, block: nn.Module, name: str) -> None:
        self._block, self._name = block, name
        self._before: nn.Module | None = copy.deepcopy(block)
        self.running = False

    def check(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        whole: Callable[[Tensor, int], Tensor],
        backward: tuple[Callable[[nn.Parameter, Tensor], Tensor], Callable[[nn.Parameter, Tensor], Tensor]] | None,
        group: Group,
    ) -> None:
        """To be called with what the block is called with, on all ranks that have a part of it. Collective.

        Args:
            args: positional arguments.
            kwargs: the others. Caches in them stay as they are.
            whole: makes all tokens of those that the cut block gives.
            backward: what of a whole gradient is this rank's, by parameter, and how what a rank has becomes that; None: gradients are
                not compared.
            group: the ranks.

        Raises:
            ConfigError: outputs or gradients differ, or the block fails when it is cut; on every rank.
        """
        before, self._before = self._before, None
        if before is None:
            return
        modes = {module: module.training for module in self._block.modules()}
        self.running = True
        try:
            # An activation checkpoint around the block counts what is saved, and would not find it again.
            with torch.set_grad_enabled(backward is not None), saved_tensors_hooks(lambda x: x, lambda x: x):
                expected, of_expected = self._run(before, args, kwargs, lambda x, _: x)
                try:
                    found, of_found = self._run(self._block, args, kwargs, whole, backward=bool(of_expected))
                except (ConfigError, TransferError):
                    raise
                except Exception as error:
                    raise ConfigError(
                        f"{self._name} fails when its layers are cut over the ranks: {error}. Code in attention and mlp must take the "
                        "number of heads and features from what is there (view as many heads as there are: -1), must not add to, or "
                        "multiply with, what went in what comes out (residuals belong into the block's own forward)"
                    ) from error
        finally:
            self.running = False
            for module, training in modes.items():
                module.training = training
        x = find_hidden(args, kwargs, self._name)[1].detach()
        change = (expected - x).float().norm().item()
        difference = (found - expected).float().norm().item()
        if difference > CLOSE * max(change, 1e-3 * x.float().norm().item()):
            raise ConfigError(
                f"{self._name} gives another output when its layers are cut over the ranks: the difference is {difference:.2g}, and "
                f"the block adds {change:.2g} to its input. A fused layer may need its parts ('column[3]', or 'column[1]' if it is "
                "not fused), or the block counts on sizes that are cut (view as many heads as there are: -1). Mend the roles or the "
                "module; tensor_parallel.verify_blocks: false leaves this check out"
            )
        if backward is not None:
            self._compare_gradients(dict(before.named_parameters()), of_expected, of_found, *backward, group)

    def _run(
        self,
        block: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        whole: Callable[[Tensor, int], Tensor],
        *,
        backward: bool = True,
    ) -> tuple[Tensor, dict[str, Tensor | None]]:
        """The output, and gradients by name of a parameter; the empty name: of the hidden states."""
        args, kwargs = _copied(args), _copied(kwargs)
        x = find_hidden(args, kwargs, self._name)[1].requires_grad_(torch.is_grad_enabled())
        y = whole(_hidden(block.eval()(*args, **kwargs)), x.shape[-2])
        if not y.requires_grad or not backward:
            return y.detach(), {}
        of = {"": x, **{name: p for name, p in block.named_parameters() if p.requires_grad}}
        # Any numbers, the same on every rank.
        of_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y)
        try:
            found = torch.autograd.grad(y, list(of.values()), of_y, allow_unused=True)
        except RuntimeError as error:
            if "use_reentrant" not in str(error):
                raise
            return y.detach(), {}  # such a checkpoint in the block knows no gradients but those of a whole backward
        return y.detach(), dict(zip(of, found, strict=True))

    def _compare_gradients(
        self,
        names: dict[str, nn.Parameter],
        expected: dict[str, Tensor | None],
        found: dict[str, Tensor | None],
        piece: Callable[[nn.Parameter, Tensor], Tensor],
        complete: Callable[[nn.Parameter, Tensor], Tensor],
        group: Group,
    ) -> None:
        own = dict(self._block.named_parameters())
        largest = max((grad.float().norm().item() for name, grad in expected.items() if name and grad is not None), default=0.0)
        wrong: list[str] = []
        for name in names if expected else ():
            if (whole := expected.get(name)) is not None:
                there = found.get(name)
                here = complete(own[name], torch.zeros_like(own[name]) if there is None else there).float()
                if (here - piece(own[name], whole).float()).norm() > CLOSE_GRADIENT * whole.float().norm() + NOTHING * largest:
                    wrong.append(f"{self._name}.{name}")
        inputs = expected.get(""), found.get("")
        if inputs[0] is not None and (inputs[1] is None or (inputs[1] - inputs[0]).norm() > CLOSE_GRADIENT * inputs[0].norm()):
            wrong.append("its input")
        wrong = list(dict.fromkeys(name for said in group.all_gather_objects(wrong) for name in said))
        if wrong:
            raise ConfigError(
                f"{self._name} gives other gradients when its layers are cut over the ranks, of {', '.join(wrong[:4])} ({len(wrong)} "
                "in all): what goes into attention or mlp may reach what comes out on a way around its column and row layers (a "
                "residual, a gate), or a row layer's output is changed in there (a norm, a scale). Move that into the block's own "
                "forward, or set tensor_parallel.sequence_parallel: true; tensor_parallel.verify_blocks: false leaves this check out"
            )


def _copied(value: Any) -> Any:
    return tree_map(lambda x: x.detach() if isinstance(x, Tensor) else copy.deepcopy(x), value)


def _hidden(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result  # type: ignore[no-any-return]
