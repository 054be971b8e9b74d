"""A block, cut, against itself as it is whole: a wrong cut changes numbers, and nothing else would say so."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_map

from lightning_overlap.decision import ConfigError
from lightning_overlap.model.hidden_states import find_hidden, hidden_of, replace_hidden
from lightning_overlap.model.patches import Hook
from lightning_overlap.ranks.announcements import TransferError
from lightning_overlap.ranks.group import Group


@dataclass(frozen=True)
class Tolerance:
    """Relative differences that rounding may make.

    Attributes:
        output: in what a block adds to its input.
        of_input: the same, in parts of the input that it is added to.
        gradient: in a gradient.
        nothing: a gradient that is smaller than that, against the largest, may be rounding alone (a key's bias has none).
    """

    output: float
    of_input: float
    gradient: float
    nothing: float

    @staticmethod
    def of(block: nn.Module, x: Tensor) -> Tolerance:
        """For what a block computes now."""
        kind = x.device.type
        dtypes = {x.dtype, *(p.dtype for p in block.parameters())}
        low = torch.is_autocast_enabled(kind) or any(dtype.itemsize < 4 for dtype in dtypes)
        # TF32 has no more bits than fp16.
        return HALF if low or torch.get_float32_matmul_precision() != "highest" or torch.backends.cuda.matmul.allow_tf32 else FULL


HALF = Tolerance(output=0.05, of_input=5e-5, gradient=0.25, nothing=0.02)
"""A wrong cut makes about 1; constants of another head make some hundredths, and are seen in full precision only."""
FULL = Tolerance(output=1e-3, of_input=2e-6, gradient=0.02, nothing=1e-3)


@dataclass(frozen=True, eq=False)
class Cutting:
    """How the ranks have what a block reads and gives.

    Attributes:
        group: the ranks.
        whole_input: all tokens of what the block is called with.
        whole_output: all tokens of what it gives.
        input_part: this rank's part of the gradient of the whole input.
        piece: this rank's part of a parameter's whole gradient.
        complete: a parameter's gradient as that is, of what this rank has of it.
    """

    group: Group
    whole_input: Callable[[Tensor], Tensor]
    whole_output: Callable[[Tensor], Tensor]
    input_part: Callable[[Tensor], Tensor]
    piece: Callable[[nn.Parameter, Tensor], Tensor]
    complete: Callable[[nn.Parameter, Tensor], Tensor]


class BlockCheck:
    """Compares a block's output and gradients with those of the whole block.

    Args:
        block: it, cut.
        name: of the block.
        enters: whether it is called with all tokens, where tokens are cut: the first one of the list.
        leaves: whether it gives all tokens: the last one.
    """

    def __init__(self, block: nn.Module, name: str, *, enters: bool, leaves: bool) -> None:
        self.block, self.name, self.enters, self.leaves = block, name, enters, leaves

    def check(self, whole: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], cutting: Cutting, *, backward: bool) -> None:
        """To be called with what the block is called with, on all ranks that have a part of it. Collective.

        Args:
            whole: a copy of the block with whole weights.
            args: positional arguments.
            kwargs: the others. Caches in them stay as they are.
            cutting: how the ranks have these.
            backward: whether gradients are compared.

        Raises:
            ConfigError: outputs or gradients differ, or the block fails when it is cut; on every rank.
        """
        x = find_hidden(args, kwargs, self.name)[1].detach()
        # An activation checkpoint around the block counts what is saved, and would not find it again.
        with torch.set_grad_enabled(backward), saved_tensors_hooks(lambda x: x, lambda x: x), _unchanged(self.block):
            with torch.no_grad():
                all_of_x = cutting.whole_input(x)
            expected, of_expected = self._run(whole, args, kwargs, all_of_x, lambda y: y)
            try:
                found, of_found = self._run(self.block, args, kwargs, x, cutting.whole_output, backward=bool(of_expected))
            except (ConfigError, TransferError):
                raise
            except Exception as error:
                raise ConfigError(
                    f"{self.name} fails when its layers are cut over the ranks: {error}. Code in attention and mlp must take the "
                    "number of heads and features from what is there (view as many heads as there are: -1), must not add to, or "
                    "multiply with, what went in what comes out (residuals belong into the block's own forward)"
                ) from error
        tolerance = Tolerance.of(self.block, x)
        change = (expected - all_of_x).float().norm().item()
        difference = (found - expected).float().norm().item()
        if difference > max(tolerance.output * change, tolerance.of_input * all_of_x.float().norm().item()):
            raise ConfigError(
                f"{self.name} gives another output when its layers are cut over the ranks: the difference is {difference:.2g}, and "
                f"the block adds {change:.2g} to its input. A fused layer may need its parts ('column[3]', or 'column[1]' if it is "
                "not fused), or attention counts on sizes that are cut (view as many heads as there are: -1; of a table by head, as "
                "ALiBi's slopes, a rank needs its part), or the block's own forward counts tokens or looks at their places, where it "
                "sees a part of them (do that in attention or mlp, or set tensor_parallel.sequence_parallel: false). Mend the roles "
                "or the module; tensor_parallel.verify_blocks: false leaves this check out"
            )
        self._compare_gradients(whole, of_expected, of_found, cutting, tolerance)

    def _run(
        self,
        block: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        x: Tensor,
        whole: Callable[[Tensor], Tensor],
        *,
        backward: bool = True,
    ) -> tuple[Tensor, dict[str, Tensor | None]]:
        """The output for the hidden states ``x``, and gradients by name of a parameter; the empty name: of the hidden states."""
        position = find_hidden(args, kwargs, self.name)[0]
        args, kwargs = _copied(args), _copied(kwargs)
        x = x.detach().requires_grad_(torch.is_grad_enabled())
        args, kwargs = replace_hidden(args, kwargs, position, x)
        with torch.random.fork_rng([x.device] if x.is_cuda else []):
            torch.manual_seed(0)  # what is drawn is the same in both runs
            y = whole(hidden_of(block.eval()(*args, **kwargs)))
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
        reference: nn.Module,
        expected: dict[str, Tensor | None],
        found: dict[str, Tensor | None],
        cutting: Cutting,
        tolerance: Tolerance,
    ) -> None:
        if not expected:
            return
        own = dict(self.block.named_parameters())
        largest = max((grad.float().norm().item() for name, grad in expected.items() if name and grad is not None), default=0.0)
        wrong: list[str] = []
        for name, _ in reference.named_parameters():
            if (whole := expected.get(name)) is not None:
                there = found.get(name)
                here = cutting.complete(own[name], torch.zeros_like(own[name]) if there is None else there).float()
                allowed = tolerance.gradient * whole.float().norm() + tolerance.nothing * largest
                if (here - cutting.piece(own[name], whole).float()).norm() > allowed:
                    wrong.append(f"{self.name}.{name}")
        if (of_input := expected.get("")) is not None:
            part, there = cutting.input_part(of_input), found.get("")
            if there is None or (there - part).norm() > tolerance.gradient * of_input.norm():
                wrong.append("its input")
        wrong = list(dict.fromkeys(name for said in cutting.group.all_gather_objects(wrong) for name in said))
        if wrong:
            raise ConfigError(
                f"{self.name} gives other gradients when its layers are cut over the ranks, of {', '.join(wrong[:4])} ({len(wrong)} "
                "in all): what goes into attention or mlp may reach what comes out on a way around its column and row layers (a "
                "residual, a gate), or a row layer's output is changed in there (a norm, a scale): move that into the block's own "
                "forward, or set tensor_parallel.sequence_parallel: true. Or the block's own forward looks at more than one token (a "
                "table of positions, a count): set tensor_parallel.sequence_parallel: false. tensor_parallel.verify_blocks: false "
                "leaves this check out"
            )


def structure(block: nn.Module) -> tuple[Any, ...]:
    """What tells kinds of blocks apart: the modules in them, and the shapes of their parameters."""
    return tuple(
        (name, type(module), tuple((key, p.shape) for key, p in module.named_parameters(recurse=False)))
        for name, module in block.named_modules()
    )


def whole_copy(block: nn.Module) -> nn.Module:
    """A copy of a cut block without anybody's hooks."""
    twin = copy.deepcopy(block)
    for module in twin.modules():
        for hooks in _hooks(module):
            hooks.clear()
    return twin


def _hooks(module: nn.Module) -> list[Any]:
    names = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    return [getattr(module, name) for name in names]


@contextmanager
def _unchanged(block: nn.Module) -> Iterator[None]:
    """Forwards inside leave nothing on the block's modules, and the hooks that are not ours aside: they may collect, or count."""
    modules = list(block.modules())
    training = [module.training for module in modules]
    buffers = [(buffer, buffer.clone()) for buffer in block.buffers()]
    hooks = [(store, dict(store)) for module in modules for store in _hooks(module)]
    attributes = [(vars(module), dict(vars(module))) for module in modules]
    contents = [(x, copy.copy(x)) for _, own in attributes for x in own.values() if type(x) in (list, dict, set)]
    for store, before in hooks:
        for key, hook in before.items():
            if not isinstance(hook, Hook):
                del store[key]
    try:
        yield
    finally:
        for store, before in attributes:
            for name in set(store) - set(before):
                del store[name]
            store.update(before)
        for value, content in contents:
            if isinstance(value, list):
                value[:] = content
            else:
                value.clear()
                value.update(content)
        for store, before in hooks:
            store.clear()
            store.update(before)
        for buffer, kept in buffers:
            buffer.data.copy_(kept)
        for module, was in zip(modules, training, strict=True):
            module.training = was


def _copied(value: Any) -> Any:
    return tree_map(lambda x: x.detach() if isinstance(x, Tensor) else copy.deepcopy(x), value)
