"""Compares a sharded block with its unsharded copy: a wrong layout changes numbers, and raises no error by itself."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lightning_overlap.decision import ConfigError
from lightning_overlap.model.copies import hooks_of
from lightning_overlap.model.hidden_states import find_hidden, hidden_of, replace_hidden
from lightning_overlap.model.patches import Hook
from lightning_overlap.ranks.announcements import TransferError
from lightning_overlap.ranks.group import Group
from lightning_overlap.torch_seams import tree_map


@dataclass(frozen=True)
class Tolerance:
    """Relative differences that rounding may cause.

    Attributes:
        output: of the output, relative to what the block adds to its input.
        of_input: of the output, relative to the input.
        gradient: of a gradient, relative to that gradient.
        nothing: of a gradient, relative to the largest one: a smaller gradient may be rounding only (that of a key's bias is 0).
    """

    output: float
    of_input: float
    gradient: float
    nothing: float

    @staticmethod
    def of(block: nn.Module, x: Tensor) -> Tolerance:
        """The tolerance for a block's present precision."""
        kind = x.device.type
        dtypes = {x.dtype, *(p.dtype for p in block.parameters())}
        low = torch.is_autocast_enabled(kind) or any(dtype.itemsize < 4 for dtype in dtypes)
        # TF32 has no more bits than fp16.
        return HALF if low or torch.get_float32_matmul_precision() != "highest" or torch.backends.cuda.matmul.allow_tf32 else FULL


HALF = Tolerance(output=0.05, of_input=5e-5, gradient=0.25, nothing=0.02)
"""A wrong layout makes a difference of about 1. Another head's constants make some hundredths: only full precision shows those."""
FULL = Tolerance(output=1e-3, of_input=2e-6, gradient=0.02, nothing=1e-3)


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """How the ranks hold a block's input, output and parameters.

    Attributes:
        group: the ranks.
        gather_input: gathers all tokens of the block's input. Collective.
        gather_output: gathers all tokens of its output. Collective.
        shard_input_grad: takes this rank's part of the gradient of the complete input.
        shard_grad: takes this rank's part of a parameter's unsharded gradient.
        sum_grad: sums a parameter's gradient over the ranks if each rank has a summand of it. Collective.
    """

    group: Group
    gather_input: Callable[[Tensor], Tensor]
    gather_output: Callable[[Tensor], Tensor]
    shard_input_grad: Callable[[Tensor], Tensor]
    shard_grad: Callable[[nn.Parameter, Tensor], Tensor]
    sum_grad: Callable[[nn.Parameter, Tensor], Tensor]


class BlockCheck:
    """Compares the output and gradients of a sharded block with those of an unsharded copy.

    Args:
        block: the sharded block.
        name: of the block.
        enters: whether its input has all tokens even if tokens are sharded: the first block of the list.
        leaves: whether its output has all tokens even if tokens are sharded: the last block.
    """

    def __init__(self, block: nn.Module, name: str, *, enters: bool, leaves: bool) -> None:
        self.block, self.name, self.enters, self.leaves = block, name, enters, leaves

    def check(
        self, unsharded: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], layout: BlockLayout, *, backward: bool
    ) -> None:
        """Runs the block and its copy with the block's arguments. Collective over the ranks that hold a part of the block.

        Args:
            unsharded: a copy of the block with complete weights.
            args: the block's positional arguments.
            kwargs: its keyword arguments. Caches in them are not changed.
            layout: how the ranks hold the block's tensors.
            backward: whether gradients are compared.

        Raises:
            ConfigError: outputs or gradients differ, or the sharded block fails; on every rank.
        """
        x = find_hidden(args, kwargs, self.name)[1].detach()
        # Hidden from an activation checkpoint around the block, which counts the saved tensors and expects the same count later.
        with torch.set_grad_enabled(backward), saved_tensors_hooks(lambda x: x, lambda x: x), _unchanged(self.block):
            with torch.no_grad():
                complete_x = layout.gather_input(x)
            expected, expected_grads = self._run(unsharded, args, kwargs, complete_x, lambda y: y)
            try:
                output, grads = self._run(self.block, args, kwargs, x, layout.gather_output, backward=bool(expected_grads))
            except (ConfigError, TransferError):
                raise
            except Exception as error:
                raise ConfigError(
                    f"{self.name} fails when its layers are sharded: {error}. Code in attention and mlp must take the number of "
                    "heads and features from its tensors (view with -1 heads), and must not add its input to its output, or multiply "
                    "the two (a residual belongs into the block's own forward)"
                ) from error
        tolerance = Tolerance.of(self.block, x)
        change = (expected - complete_x).float().norm().item()
        difference = (output - expected).float().norm().item()
        if difference > max(tolerance.output * change, tolerance.of_input * complete_x.float().norm().item()):
            raise ConfigError(
                f"{self.name} computes another output when its layers are sharded: the difference is {difference:.2g}, and the "
                f"block adds {change:.2g} to its input. Possible causes: (1) a fused layer needs its parts: 'column[3]', or "
                "'column[1]' if it is not fused; (2) attention uses the unsharded number of heads: view with -1 heads, and take this "
                "rank's part of a table by head (ALiBi's slopes); (3) the block's own forward counts tokens or uses their positions, "
                "but sees only a part of them: do that in attention or mlp, or set tensor_parallel.sequence_parallel: false. Correct "
                "the roles or the module. tensor_parallel.verify_blocks: false turns this check off"
            )
        self._compare_gradients(unsharded, expected_grads, grads, layout, tolerance)

    def _run(
        self,
        block: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        x: Tensor,
        gather_output: Callable[[Tensor], Tensor],
        *,
        backward: bool = True,
    ) -> tuple[Tensor, dict[str, Tensor | None]]:
        """The complete output for the hidden states ``x``, and gradients by name of a parameter (empty name: of ``x``)."""
        position = find_hidden(args, kwargs, self.name)[0]
        args, kwargs = _copied(args), _copied(kwargs)
        x = x.detach().requires_grad_(torch.is_grad_enabled())
        args, kwargs = replace_hidden(args, kwargs, position, x)
        with torch.random.fork_rng([x.device] if x.is_cuda else []):
            torch.manual_seed(0)  # both runs draw the same random numbers
            y = gather_output(hidden_of(block.eval()(*args, **kwargs)))
        if not y.requires_grad or not backward:
            return y.detach(), {}
        inputs = {"": x, **{name: p for name, p in block.named_parameters() if p.requires_grad}}
        # Arbitrary, and the same on every rank.
        grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y)
        try:
            grads = torch.autograd.grad(y, list(inputs.values()), grad_y, allow_unused=True)
        except RuntimeError as error:
            if "use_reentrant" not in str(error):
                raise
            return y.detach(), {}  # a reentrant checkpoint in the block supports no torch.autograd.grad
        return y.detach(), dict(zip(inputs, grads, strict=True))

    def _compare_gradients(
        self,
        reference: nn.Module,
        expected: dict[str, Tensor | None],
        grads: dict[str, Tensor | None],
        layout: BlockLayout,
        tolerance: Tolerance,
    ) -> None:
        if not expected:
            return
        parameters = dict(self.block.named_parameters())
        largest = max((grad.float().norm().item() for name, grad in expected.items() if name and grad is not None), default=0.0)
        wrong: list[str] = []
        for name, _ in reference.named_parameters():
            if (unsharded := expected.get(name)) is not None:
                parameter, grad = parameters[name], grads.get(name)
                total = layout.sum_grad(parameter, torch.zeros_like(parameter) if grad is None else grad).float()
                allowed = tolerance.gradient * unsharded.float().norm() + tolerance.nothing * largest
                if (total - layout.shard_grad(parameter, unsharded).float()).norm() > allowed:
                    wrong.append(f"{self.name}.{name}")
        if (input_grad := expected.get("")) is not None:
            part, grad = layout.shard_input_grad(input_grad), grads.get("")
            if grad is None or (grad - part).norm() > tolerance.gradient * input_grad.norm():
                wrong.append("its input")
        wrong = list(dict.fromkeys(name for names in layout.group.all_gather_objects(wrong) for name in names))
        if wrong:
            raise ConfigError(
                f"{self.name} computes other gradients when its layers are sharded, of {', '.join(wrong[:4])} ({len(wrong)} in all). "
                "Possible causes: (1) attention or mlp has a path from its input to its output around its column and row layers (a "
                "residual, a gate), or changes a row layer's output (a norm, a scale): move that into the block's own forward, or "
                "set tensor_parallel.sequence_parallel: true; (2) the block's own forward reads more than one token (a table of "
                "positions, a count): set tensor_parallel.sequence_parallel: false. tensor_parallel.verify_blocks: false turns this "
                "check off"
            )


def structure(block: nn.Module) -> tuple[Any, ...]:
    """The modules in a block and the shapes of their parameters: equal for blocks of one kind."""
    return tuple(
        (name, type(module), tuple((key, p.shape) for key, p in module.named_parameters(recurse=False)))
        for name, module in block.named_modules()
    )


@contextmanager
def _unchanged(block: nn.Module) -> Iterator[None]:
    """Restores the block's modules afterwards. Inside, hooks of others are off: they may collect tensors, or count calls."""
    modules = list(block.modules())
    training = [module.training for module in modules]
    buffers = [(buffer, buffer.clone()) for buffer in block.buffers()]
    hooks = [(store, dict(store)) for module in modules for store in hooks_of(module)]
    attributes = [(vars(module), dict(vars(module))) for module in modules]
    contents = [(x, copy.copy(x)) for _, values in attributes for x in values.values() if type(x) in (list, dict, set)]
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
        for buffer, value in buffers:
            buffer.data.copy_(value)
        for module, mode in zip(modules, training, strict=True):
            module.training = mode


def _copied(value: Any) -> Any:
    return tree_map(lambda x: x.detach() if isinstance(x, Tensor) else copy.deepcopy(x), value)
