"""Compares the first step of the sharded model with that of the unsharded one: loss, gradients and buffers.

A value that passes between blocks, or from a block to the loss, by a way that no mode follows is lost where the model is sharded, and
no other check sees it. So the first batch of a fit is computed twice before it is trained on: by the unsharded model, which every rank
assembles for that time, and by the sharded one. Neither run changes a gradient, buffer, metric, log, attribute or random state. (The
comparison cannot undo a step that writes parameters or files, or calls a logger itself.) Dropout is off in both runs, because its
masks differ where activations are sharded. Mixed precision is off, so that rounding stays within the tolerances below.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_overlap.decision import ConfigError
from lightning_overlap.model.trees import copied
from lightning_overlap.modes.base import Driver, Holder, OverlapMode, Sharder
from lightning_overlap.ranks.announcements import TransferError
from lightning_overlap.ranks.world import all_gather_objects
from lightning_overlap.steps.dropout import DROPOUTS
from lightning_overlap.steps.random_state import preserve_random_state, seed_generators
from lightning_overlap.strategy.seams import logs_go_to
from lightning_overlap.strategy.step import DrivenStep


@dataclass(frozen=True)
class Tolerance:
    """Differences that rounding may make.

    Attributes:
        loss: relative difference of the loss.
        gradient: norm of the difference of a parameter's gradients, relative to the gradient's norm.
        noise: the same, relative to the largest norm of a gradient in the model: a gradient that should be zero (that of a key's bias,
            for example) consists of rounding only.
    """

    loss: float
    gradient: float
    noise: float


TOLERANCES = {
    torch.float64: Tolerance(1e-9, 1e-6, 1e-9),
    torch.float32: Tolerance(2e-5, 2e-3, 2e-5),
    torch.bfloat16: Tolerance(2e-2, 0.25, 2e-2),
    torch.float16: Tolerance(5e-3, 0.1, 5e-3),
}
"""By the lowest precision of the parameters, where the sharded model multiplies matrices of other shapes than the unsharded one."""
SAME_PRODUCTS = Tolerance(1e-6, 1e-5, 1e-7)
"""In fp32 and better, where both multiply the same matrices: only the order of some sums differs (a tied weight's gradient)."""
NAMED = 4
"""How many parameters or buffers an error names."""


@contextmanager
def _without_dropout() -> Iterator[None]:
    """Inside, torch's dropout drops nothing: in modules, in attention, and where an activation checkpoint is recomputed.

    The functions are replaced, because a ``TorchFunctionMode`` is not active while backward recomputes a checkpoint.
    """
    attention = F.scaled_dot_product_attention

    def attend(query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, *args: Any, **kwargs: Any) -> Any:
        return attention(query, key, value, attn_mask, 0.0, *args, **kwargs)

    def keep(input: Tensor, *_: Any, **__: Any) -> Tensor:
        return input

    def keep_with_mask(input: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return input, torch.ones_like(input, dtype=torch.bool)

    before = [(owner, name, getattr(owner, name)) for owner, name in DROPOUTS]
    for owner, name, _ in before:
        setattr(owner, name, keep_with_mask if name == "native_dropout" else keep)
    F.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        F.scaled_dot_product_attention = attention
        for owner, name, function in before:
            setattr(owner, name, function)


class _Trial(DrivenStep):
    """A step that computes its loss and gradients, and logs nothing."""

    total: Tensor | None = None
    """The batch's loss, on ranks that know it."""

    def forward(self, part: Any, number: int) -> Tensor | None:
        seed_generators(self._module, *self.key, number)
        with logs_go_to(self._module.trainer, None), self._precision():
            # A copy, because training_step may change its batch and runs on it again.
            output = self._module.training_step(copied(part), *self._rest)
        loss = output["loss"] if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor):
            return None
        self._outputs[number] = loss.detach()
        return loss

    def _precision(self) -> AbstractContextManager[Any]:
        plugin = self._strategy.precision_plugin
        return nullcontext() if str(plugin.precision).endswith("-mixed") else plugin.train_step_context()

    def backward(self, loss: Tensor, share: float) -> None:
        (loss * share).backward()

    def merge_logs(self, shares: Sequence[float], weights: Sequence[float] | None = None) -> Any:
        return torch.stack([self._outputs[number].double() * share for number, share in enumerate(shares) if share]).sum().cpu()

    def log(self, merged: Any) -> None:
        self.total = merged


@dataclass
class _Result:
    """The results of one run of the step.

    Attributes:
        loss: of the batch; None on a rank without the loss.
        batch_loss: where the step runs in microbatches, the loss without them; None if it is not comparable.
        gradients: by parameter.
        buffers: by name, after the step.
    """

    loss: float | None = None
    batch_loss: float | None = None
    gradients: dict[str, Tensor] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)


class FirstStep:
    """Compares the sharded with the unsharded model on one batch.

    Args:
        step: the user's ``training_step`` on the batch.
        module: the user's module.
        modes: the modes that run, in the order in which they were applied.
        device: this rank's device.

    Attributes:
        is_compared: whether loss, gradients and buffers were compared, and are equal.
    """

    def __init__(self, step: _Trial, module: nn.Module, modes: Sequence[OverlapMode], device: torch.device) -> None:
        self._step = step
        self._module = module
        self._modes = modes
        self._driver = next((mode for mode in modes if isinstance(mode, Driver)), None)
        self._sharders = [mode for mode in modes if isinstance(mode, Sharder)]
        self._holders = [mode for mode in self._sharders if isinstance(mode, Holder)]
        self._device = device
        self.is_compared = False
        self._parameters = dict(module.named_parameters())
        self._known_buffers = frozenset(name for name, _ in module.named_buffers())  # the step may register others

    def verify(self) -> bool:
        """Runs both models on the batch and compares them. Collective over the world.

        Returns:
            Whether the check is over: False if ``training_step`` returned no loss for this batch, so that the next one is checked.

        Raises:
            ConfigError: on every rank, if loss, gradients or buffers differ.
        """
        with self._isolated():
            expected, obstacle = self._run_unsharded()
            if obstacle is not None:
                rank_zero_warn(f"verify_first_step: the first step was not compared with the unsharded model: {obstacle}")
                return obstacle != NO_LOSS
            actual = self._run_sharded()
        self._compare(expected, actual)
        self.is_compared = True
        self._check_objective(expected)
        return True

    # -- the two runs --------------------------------------------------------------------------------------------------

    @contextmanager
    def _isolated(self) -> Iterator[None]:
        """Inside, gradients and random states are temporary, and no mode keeps anything of the steps."""
        before = {name: parameter.grad for name, parameter in self._parameters.items()}
        matmul = torch.backends.cuda.matmul
        precision = matmul.fp32_precision
        matmul.fp32_precision = "ieee"  # no TF32
        with ExitStack() as stack:
            for mode in self._modes:
                stack.enter_context(mode.trial())
                stack.enter_context(mode.complete_gradients())
            stack.enter_context(preserve_random_state(self._device))
            try:
                yield
            finally:
                matmul.fp32_precision = precision
                for name, parameter in self._parameters.items():
                    parameter.grad = before[name]

    def _run_unsharded(self) -> tuple[_Result, str | None]:
        """Returns the results of the unsharded model, of tensors this rank's part; and why it could not run on some rank, if so."""
        result = _Result()
        with ExitStack() as stack:
            for mode in reversed(self._sharders):
                stack.enter_context(mode.unsharded())
            self._drop_gradients()
            stack.enter_context(preserve_random_state(self._device))
            stack.enter_context(_without_dropout())
            try:
                obstacle = None if self._fill_unsharded(result) else NO_LOSS
            except torch.OutOfMemoryError:
                obstacle = "a rank has too little memory for the unsharded model. Set verify_first_step: false to skip this check"
            except (RuntimeError, TypeError, ValueError) as error:  # an error of the user's code comes again in the step itself
                if isinstance(error, ConfigError | TransferError):
                    raise
                obstacle = f"the unsharded model fails without mixed precision: {type(error).__name__}: {error}"
            finally:
                gradients = {name: p.grad for name, p in self._parameters.items() if p.grad is not None}
                self._drop_gradients()
        # Before the modes sum up gradients over ranks, which waits for all of them.
        if obstacle := next(filter(None, all_gather_objects(obstacle)), None):
            return result, obstacle
        for mode in self._holders:
            gradients = mode.local_gradients(gradients)
        result.gradients = {name: gradient.clone() for name, gradient in gradients.items()}  # a view keeps the unsharded one's memory
        result.buffers = self._local_parts(result.buffers)
        return result, None

    def _local_parts(self, unsharded: Mapping[str, Tensor]) -> dict[str, Tensor]:
        parts = {}
        for name, tensor in unsharded.items():
            part: Tensor | None = tensor
            for mode in self._holders:
                part = part if part is None else mode.local_part(name, part)
            if part is not None:
                parts[name] = part.clone()  # a view would keep the memory of the unsharded tensor
        return parts

    def _buffers(self) -> dict[str, Tensor]:
        return {name: buffer.detach().clone() for name, buffer in self._module.named_buffers() if name in self._known_buffers}

    def _fill_unsharded(self, result: _Result) -> bool:
        """Runs the step on the unsharded model, microbatch by microbatch. Returns whether ``training_step`` returns a loss."""
        parts = self._driver.unsharded_microbatches(self._step) if self._driver is not None else iter([(self._step.batch, 0, 1.0)])
        shares = []
        with self._step.trial():
            for part, number, share in parts:
                loss = self._step.forward(part, number)
                if loss is None:
                    return False
                shares.append(share)
                if loss.requires_grad and share:  # a loss of NaN times 0 is NaN
                    self._step.backward(loss, share)
                del loss
            result.loss = float(self._step.merge_logs(shares))
            result.buffers = self._buffers()
        if len(shares) > 1:
            result.batch_loss = self._batch_loss()
        return True

    def _batch_loss(self) -> float | None:
        """Returns the loss without microbatches; None if it depends on random numbers, or the memory is too small for it."""
        before = torch.get_rng_state(), random.getstate()
        try:
            with self._step.trial(), torch.no_grad():
                loss = self._step.forward(self._step.batch, 0)
        except torch.OutOfMemoryError:
            return None
        is_random = not torch.equal(before[0], torch.get_rng_state()) or before[1] != random.getstate()
        return None if loss is None or is_random else float(loss)

    def _run_sharded(self) -> _Result:
        """Returns this rank's results of the sharded model, run as in training.

        Raises:
            ConfigError: it fails, though the unsharded model did not.
        """
        try:
            return self._train_sharded()
        except (ConfigError, TransferError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            for mode in self._modes:
                mode.raise_cause(error)
            raise ConfigError(
                "verify_first_step: the unsharded model ran the first batch, but the sharded model failed: "
                f"{type(error).__name__}: {error}. {_CAUSES}"
            ) from error

    def _train_sharded(self) -> _Result:
        result = _Result()
        self._drop_gradients()
        with self._step.trial(), preserve_random_state(self._device), _without_dropout():
            for mode in self._modes:
                mode.start_forward()
            if self._driver is not None:
                self._driver.run_step(self._step)
            else:
                loss = self._step.forward(self._step.batch, 0)
                self._step.start_backward()
                if loss is not None and loss.requires_grad:
                    self._step.backward(loss, 1.0)
                self._step.finish_backward()
                self._step.log(None if loss is None else loss.detach())
            result.buffers = self._buffers()
        result.loss = None if self._step.total is None else float(self._step.total)
        result.gradients = {name: p.grad for name, p in self._parameters.items() if p.grad is not None}
        return result

    def _drop_gradients(self) -> None:
        for parameter in self._parameters.values():
            parameter.grad = None

    # -- comparison ----------------------------------------------------------------------------------------------------

    @property
    def _lowest_precision(self) -> torch.dtype:
        """The parameters' dtype with the lowest precision."""
        return max((p.dtype for p in self._parameters.values() if p.dtype in TOLERANCES), key=_coarseness, default=torch.float32)

    def _tolerance(self) -> Tolerance:
        exact = all(mode.keeps_bits for mode in self._sharders)
        dtype = self._lowest_precision
        return SAME_PRODUCTS if exact and torch.finfo(dtype).bits >= 32 else TOLERANCES[dtype]

    def _compare(self, expected: _Result, actual: _Result) -> None:
        """Compares the two runs. Collective.

        Raises:
            ConfigError: on every rank, if loss, gradients or buffers differ on one.
        """
        tolerance = self._tolerance()
        wrong_loss = not _is_close(actual.loss, expected.loss, tolerance.loss)
        differences = self._differences(expected, actual, tolerance)
        mine = (expected.loss, actual.loss, wrong_loss, differences)
        everyone = all_gather_objects(mine)
        losses = next(((want, have) for want, have, wrong, _ in everyone if wrong), None)
        tensors = list(dict.fromkeys(entry for *_, entries in everyone for entry in entries))
        if losses is None and not tensors:
            return
        symptoms = []
        if losses is not None:
            symptoms.append(f"the loss is {losses[1]!r}, expected {losses[0]!r}")
        if tensors:
            first = ", ".join(f"{name} (norm {norm:.2g}, off by {difference:.2g})" for name, difference, norm in tensors[:NAMED])
            kind = "gradients" if any(name in self._parameters for name, *_ in tensors) else "buffers"
            symptoms.append(f"{len({name for name, *_ in tensors})} {kind} differ: {first}")
        raise ConfigError(
            "verify_first_step: the sharded model computes a different first step from the unsharded model: "
            f"{'; '.join(symptoms)}. {_CAUSES}"
        )

    def _differences(self, expected: _Result, actual: _Result, tolerance: Tolerance) -> list[tuple[str, float, float]]:
        """Lists this rank's gradients and buffers that differ: name, norm of the difference, expected norm. Collective."""
        differences: list[tuple[str, float, float]] = []
        norms = {name: _norm(gradient) for name, gradient in expected.gradients.items()}
        largest = max(norms.values(), default=0.0)
        largest = max(all_gather_objects(largest))
        for name in {**expected.gradients, **actual.gradients}:
            want, have = expected.gradients.get(name), actual.gradients.get(name)
            norm, difference = norms.get(name, 0.0), _norm(_difference(have, want))
            # A difference of NaN is no smaller than anything.
            if not difference <= tolerance.gradient * norm + tolerance.noise * largest and not _both_not_finite(want, have):
                differences.append((name, difference, norm))
        for name, buffer in expected.buffers.items():
            have = actual.buffers.get(name)
            norm, difference = _norm(buffer), _norm(_difference(have, buffer))
            if not difference <= tolerance.gradient * norm and not _both_not_finite(buffer, have):
                differences.append((name, difference, norm))
        return differences

    def _check_objective(self, expected: _Result) -> None:
        """Warns if microbatches change the loss.

        Raises:
            ConfigError: the loss is NaN with microbatches, and finite without them.
        """
        if expected.loss is None or expected.batch_loss is None:
            return
        without = f"the loss of the first batch is {expected.batch_loss:.6g} without microbatches"
        if math.isnan(expected.loss) and math.isfinite(expected.batch_loss):
            raise ConfigError(
                f"{without} and NaN with them. A mean over labels is NaN if a microbatch has no counted label. Set "
                "pipeline_parallel.microbatch_weight: labels or causal_labels"
            )
        if not _is_close(expected.loss, expected.batch_loss, TOLERANCES[self._lowest_precision].loss):
            rank_zero_warn(
                f"{without} and {expected.loss:.6g} with them. The loss is not a mean over samples, so microbatches change the "
                "objective. For a sum, or a mean over counted labels, set pipeline_parallel.microbatch_weight (sum, labels or "
                "causal_labels), or give the module a method microbatch_weight(batch). Microbatches always change a loss that "
                "compares samples with each other (a contrastive loss, batch norm). If the loss is a mean over samples, a tensor "
                "without a sample dim was split: set its name to null in pipeline_parallel.batch_dims"
            )


NO_LOSS = "training_step returned no loss for the batch"
_CAUSES = """Possible causes:
1. A block keeps a value on itself or in a list, and another block or the loss reads it (auxiliary loss, hook, deep supervision, \
skip connection). Pass it through the blocks' arguments, or compute it from the output.
2. The loss sums over parameters (a regularizer), and a rank has only its part of them. Use the optimizer's weight_decay.
3. A layer has a wrong role, such as column where q, k and v are fused (column[3]). Correct parallel_plan.
4. The code counts heads, features or tokens, and a rank has only its part of them. Turn off the mode that shards them.
5. A random decision differs between ranks. Draw it from the default generator of torch, NumPy or Python.
verify_first_step: false skips this check."""


def first_step(
    strategy: Strategy, modes: Sequence[OverlapMode], module: LightningModule, batch: Any, rest: Any, key: tuple[int, ...]
) -> FirstStep:
    """Makes the check for a fit's first batch.

    Args:
        strategy: Lightning's strategy, with its precision plugin and device.
        modes: the modes that run, in the order in which they were applied.
        module: the user's module.
        batch: the batch.
        rest: the other arguments of ``training_step``.
        key: see :class:`lightning_overlap.steps.step.Step`.
    """
    return FirstStep(_Trial(strategy, modes, module, batch, rest, key), module, modes, strategy.root_device)


def _coarseness(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def _difference(have: Tensor | None, want: Tensor | None) -> Tensor | None:
    if have is None or want is None:
        return want if have is None else have
    return have.to_dense().to(_wide(have.dtype)) - want.to_dense().to(_wide(want.dtype))


def _norm(x: Tensor | None) -> float:
    return 0.0 if x is None else float(torch.linalg.vector_norm(x.detach().to_dense().flatten().to(_wide(x.dtype))))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.complex128 if dtype.is_complex else torch.float64


def _both_not_finite(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and not bool(one.isfinite().all()) and not bool(other.isfinite().all())


def _is_close(actual: float | None, expected: float | None, relative: float) -> bool:
    if actual is None or expected is None:
        return actual is expected
    if math.isnan(actual) or math.isnan(expected):
        return math.isnan(actual) and math.isnan(expected)
    return actual == expected or abs(actual - expected) <= relative * max(abs(actual), abs(expected))
