"""Compares a sharded block with its unsharded copy: a wrong layout changes numbers, and raises no error by itself."""

from __future__ import annotations

import contextlib
import copy
import warnings
from abc import ABC
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lightning_overlap.decision import ConfigError
from lightning_overlap.model.boundary import Nesting
from lightning_overlap.model.copies import hooks_of
from lightning_overlap.model.hidden_states import find_hidden, hidden_of, replace_hidden
from lightning_overlap.model.patches import Hook
from lightning_overlap.model.stand_in import StandIn
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


@dataclass(frozen=True)
class Advice:
    """What a user is told whose block computes something else when a mode shards it.

    Attributes:
        sharded: what the mode shards of the block.
        failure: after an error of the block.
        output: causes of another output.
        gradients: causes of other gradients.
        switch: the setting that turns the check off.
    """

    sharded: str
    failure: str
    output: str
    gradients: str
    switch: str


class BlockShards(ABC):
    """How the ranks of one mode hold a block's input, output and parameters.

    Attributes:
        nesting: the mode's; outer modes have smaller numbers.
        advice: for the errors.
        group: the ranks.
    """

    nesting: ClassVar[Nesting]
    advice: ClassVar[Advice]
    group: Group

    def start(self, check: BlockCheck, inputs: tuple[Any, Any]) -> None:  # noqa: B027  # optional
        """Prepares the forward of the check, before the block runs in it with ``inputs``, its arguments."""

    def complete(self, check: BlockCheck, twin: nn.Module, inputs: tuple[Any, Any]) -> None:  # noqa: B027  # optional
        """Makes ``twin``, a copy of the block, compute with all tokens and unsharded weights. Collective."""

    def gather_input(self, check: BlockCheck, x: Tensor) -> Tensor:
        """Gathers all tokens of the block's input. Collective."""
        return x

    def gather_output(self, check: BlockCheck, y: Tensor) -> Tensor:
        """Gathers all tokens of the block's output. Collective, also in backward."""
        return y

    def shard_input_grad(self, check: BlockCheck, grad: Tensor) -> Tensor:
        """The gradient that this rank has for its input, if ``grad`` is that of the complete input."""
        return grad

    def shard_grad(self, parameter: nn.Parameter, grad: Tensor) -> Tensor:
        """This rank's part of a parameter's unsharded gradient."""
        return grad

    def sum_grad(self, parameter: nn.Parameter, grad: Tensor) -> Tensor:
        """The gradient of a parameter, or of this rank's part of it, if this rank has computed ``grad``. Collective."""
        return grad


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
        self, unsharded: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], modes: Sequence[BlockShards], *, backward: bool
    ) -> None:
        """Runs the block and its copy with the block's arguments. Collective over the ranks that hold a part of the block.

        Where the copy does not fit into memory it is not compared, which is said in a warning.

        Args:
            unsharded: a copy of the block with complete weights.
            args: the block's positional arguments.
            kwargs: its keyword arguments. Caches in them are not changed.
            modes: how the ranks hold the block's tensors, from the outermost mode on.
            backward: whether gradients are compared.

        Raises:
            ConfigError: outputs or gradients differ, or the sharded block fails; on every rank.
        """
        x = find_hidden(args, kwargs, self.name)[1].detach()
        x = x.complete(self.name) if isinstance(x, StandIn) else x
        sharded = " and ".join(mode.advice.sharded for mode in modes)
        # Hidden from an activation checkpoint around the block, which counts the saved tensors and expects the same count later.
        with torch.set_grad_enabled(backward), saved_tensors_hooks(lambda x: x, lambda x: x), _unchanged(self.block):
            complete_x = x
            with torch.no_grad():
                for mode in reversed(modes):
                    complete_x = mode.gather_input(self, complete_x)
            results = self._run_unsharded(unsharded, args, kwargs, complete_x, modes)
            if results is None:
                warnings.warn(f"{self.name} was not compared with an unsharded copy, which does not fit into memory", stacklevel=2)
                return
            expected, expected_grads = results
            try:
                output, grads = self._run(
                    self.block, args, kwargs, x, partial(self._gather_output, modes), backward=bool(expected_grads)
                )
            except (ConfigError, TransferError):
                raise
            except Exception as error:
                advice = " ".join(mode.advice.failure for mode in modes)
                raise ConfigError(f"{self.name} fails when {sharded} are sharded: {error}. {advice}") from error
        tolerance = Tolerance.of(self.block, x)
        change = (expected - complete_x).float().norm().item()
        difference = (output - expected).float().norm().item()
        if difference > max(tolerance.output * change, tolerance.of_input * complete_x.float().norm().item()):
            raise ConfigError(
                f"{self.name} computes another output when {sharded} are sharded: the difference is {difference:.2g}, and the block "
                f"adds {change:.2g} to its input. Possible causes: {_joined(modes, lambda advice: advice.output)}"
            )
        self._compare_gradients(unsharded, expected_grads, grads, modes, tolerance)

    def _gather_output(self, modes: Sequence[BlockShards], y: Tensor) -> Tensor:
        for mode in reversed(modes):
            y = mode.gather_output(self, y)
        return y

    def _run_unsharded(
        self, unsharded: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor, modes: Sequence[BlockShards]
    ) -> tuple[Tensor, dict[str, Tensor | None]] | None:
        """What :meth:`_run` gives of the copy; None on all ranks, if one has too little memory for it."""
        results = None
        with contextlib.suppress(torch.OutOfMemoryError):
            results = self._run(unsharded, args, kwargs, x, lambda y: y)
        fits = results is not None
        for mode in modes:
            fits = all(mode.group.all_gather_objects(fits))
        return results if fits else None

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
        modes: Sequence[BlockShards],
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
                total, part = torch.zeros_like(parameter) if grad is None else grad, unsharded
                for mode in reversed(modes):
                    total = mode.sum_grad(parameter, total)
                for mode in modes:
                    part = mode.shard_grad(parameter, part)
                allowed = tolerance.gradient * unsharded.float().norm() + tolerance.nothing * largest
                if (total.float() - part.float()).norm() > allowed:
                    wrong.append(f"{self.name}.{name}")
        if (input_grad := expected.get("")) is not None:
            part, grad = input_grad, grads.get("")
            for mode in modes:
                part = mode.shard_input_grad(self, part)
            if grad is None or (grad - part).norm() > tolerance.gradient * input_grad.norm():
                wrong.append("its input")
        for mode in modes:
            wrong = list(dict.fromkeys(name for names in mode.group.all_gather_objects(wrong) for name in names))
        if wrong:
            sharded = " and ".join(mode.advice.sharded for mode in modes)
            raise ConfigError(
                f"{self.name} computes other gradients when {sharded} are sharded, of {', '.join(wrong[:4])} ({len(wrong)} in all). "
                f"Possible causes: {_joined(modes, lambda advice: advice.gradients)}"
            )


def _joined(modes: Sequence[BlockShards], causes: Callable[[Advice], str]) -> str:
    """What each mode advises, and the settings that turn the check off."""
    switches = " and ".join(mode.advice.switch for mode in modes)
    return f"{' '.join(causes(mode.advice) for mode in modes)} {switches} turns this check off"


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
