"""Proof of the first step: loss, gradients and buffers of the model as it is cut, against those of the model whole.

What passes between two blocks, or from a block to the loss, on a way that a mode does not know of, is lost where the model is cut, and
nothing else would say so. So the first batch of a fit is computed twice more before it is trained on: by the model whole, which every
rank puts together for that time, and by the ranks' parts of it. Both leave nothing behind: no gradient, buffer, metric, log, attribute
or random number. (What a step writes elsewhere stays: parameters that it writes itself, files, a logger's own calls.) Dropout is off
in both, since its masks differ where activations are cut; mixed precision is too, so that what differs is not rounding.
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
from lightning_overlap.modes.base import Driver, Holder, OverlapMode
from lightning_overlap.ranks.announcements import TransferError
from lightning_overlap.ranks.world import all_gather_objects, world_size
from lightning_overlap.steps.random_state import preserve_random_state, seed_generators
from lightning_overlap.strategy.seams import logs_go_to
from lightning_overlap.strategy.step import DrivenStep


@dataclass(frozen=True)
class Tolerance:
    """Differences that rounding may make.

    Attributes:
        loss: relative.
        gradient: of a parameter's gradient, relative to its norm.
        noise: of a parameter's gradient, relative to the largest norm of a gradient in the model: a gradient that should be zero
            (of a key's bias, say) is rounding alone.
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
"""By the lowest precision of the parameters, where the modes multiply matrices of other shapes than the model whole does."""
SAME_PRODUCTS = Tolerance(1e-6, 1e-5, 1e-7)
"""In fp32 and better, where they multiply the same ones: only the order of some sums differs (of a tied weight's gradient)."""
NAMED = 4
"""Parameters or buffers that an error names."""


@contextmanager
def _without_dropout() -> Iterator[None]:
    """Inside, torch's dropout drops nothing: modules' and attention's, too, and in what an activation checkpoint runs again.

    The functions are replaced, since a mode of torch's is not on while backward runs a checkpoint again.
    """
    attention = F.scaled_dot_product_attention

    def attend(query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, *args: Any, **how: Any) -> Any:
        return attention(query, key, value, attn_mask, 0.0, *args, **how)

    def keep(input: Tensor, *_: Any, **__: Any) -> Tensor:
        return input

    before = [(owner, name, getattr(owner, name)) for owner, name in _DROPOUTS]
    for owner, name, _ in before:
        setattr(owner, name, keep)
    F.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        F.scaled_dot_product_attention = attention
        for owner, name, function in before:
            setattr(owner, name, function)


_DROPOUTS = (
    *((F, name) for name in ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout")),
    (torch, "dropout"),
)


class _Trial(DrivenStep):
    """A step that is computed for its loss and gradients only."""

    total: Tensor | None = None
    """The batch's loss, where this rank knows it."""

    def forward(self, part: Any, number: int) -> Tensor | None:
        seed_generators(self._module, *self.key, number)
        with logs_go_to(self._module.trainer, None), self._precision():
            # A copy: a step may change its batch, take something out of it, and is run on it again.
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

    def logged(self, shares: Sequence[float], weights: Sequence[float] | None = None) -> Any:
        return torch.stack([self._outputs[number].double() * share for number, share in enumerate(shares) if share]).sum().cpu()

    def log(self, merged: Any) -> None:
        self.total = merged


@dataclass
class _Result:
    """What one way of computing the step gives."""

    loss: float | None = None
    at_once: float | None = None
    """Of the batch in one piece, where the step is computed in several."""
    gradients: dict[str, Tensor] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    """As the step leaves them."""


class FirstStep:
    """The proof, for one batch.

    Args:
        step: the user's, not run yet.
        module: the user's.
        modes: in their order.
        device: this rank's.
    """

    def __init__(self, step: _Trial, module: nn.Module, modes: Sequence[OverlapMode], device: torch.device) -> None:
        self._step = step
        self._module = module
        self._modes = modes
        self._driver = next((mode for mode in modes if isinstance(mode, Driver)), None)
        self._holders = [mode for mode in modes if isinstance(mode, Holder)]
        self._device = device
        self._parameters = dict(module.named_parameters())
        self._known_buffers = frozenset(name for name, _ in module.named_buffers())  # a step may register others

    def prove(self) -> bool:
        """Computes and compares. Collective over the world.

        Returns:
            Whether there was something to compare: a batch of which ``training_step`` makes no loss proves nothing.

        Raises:
            ConfigError: loss, gradients or buffers differ; on every rank.
        """
        with self._apart():
            expected, obstacle = self._whole()
            everyone = all_gather_objects(obstacle) if world_size() > 1 else [obstacle]
            if any(everyone):
                told = next(filter(None, everyone))
                rank_zero_warn(f"the first step was not compared with the model whole (verify_first_step): {told}")
                return told != NO_LOSS
            found = self._run_cut()
        self._compare(expected, found)
        self._tell_of_objective(expected)
        return True

    # -- two ways to compute it ------------------------------------------------------------------------------------------

    @contextmanager
    def _apart(self) -> Iterator[None]:
        """Inside, gradients and random numbers are others than outside, and data parallelism looks at neither."""
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

    def _whole(self) -> tuple[_Result, str | None]:
        """By the model whole; and what stood in the way."""
        result = _Result()
        with ExitStack() as stack:
            for mode in reversed(self._holders):
                stack.enter_context(mode.whole())
            self._forget_gradients()
            stack.enter_context(preserve_random_state(self._device))
            stack.enter_context(_without_dropout())
            try:
                shares = self._run_whole(result)
            except torch.OutOfMemoryError:
                return result, "a rank has no memory for the model whole. Set verify_first_step: false to leave it out"
            except (RuntimeError, TypeError, ValueError) as error:  # if it is the user's, the step itself will say it
                if isinstance(error, ConfigError | TransferError):
                    raise
                return result, f"the model whole fails in the parameters' own precision: {type(error).__name__}: {error}"
            finally:
                gradients = {name: p.grad for name, p in self._parameters.items() if p.grad is not None}
                self._forget_gradients()
        if shares is None:
            return result, NO_LOSS
        result.gradients = self._own_parts(gradients)
        result.buffers = self._own_parts(result.buffers)
        return result, None

    def _own_parts(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        parts = {}
        for name, tensor in whole.items():
            own: Tensor | None = tensor
            for mode in self._holders:
                own = own if own is None else mode.local_part(name, own)
            if own is not None:
                parts[name] = own.clone()  # not a view, which would keep all of it
        return parts

    def _buffers(self) -> dict[str, Tensor]:
        return {name: buffer.detach().clone() for name, buffer in self._module.named_buffers() if name in self._known_buffers}

    def _run_whole(self, result: _Result) -> list[float] | None:
        parts = self._driver.whole_parts(self._step) if self._driver is not None else iter([(self._step.batch, 0, 1.0)])
        shares = []
        with self._step.trial():
            for part, number, share in parts:
                loss = self._step.forward(part, number)
                if loss is None:
                    return None
                shares.append(share)
                if loss.requires_grad and share:  # a loss that is not a number stays so if it counts for 0
                    self._step.backward(loss, share)
                del loss
            result.loss = float(self._step.merge_logs(shares))
            result.buffers = self._buffers()
        if len(shares) > 1:
            result.at_once = self._run_at_once()
        return shares

    def _run_at_once(self) -> float | None:
        """The loss of the batch in one piece; None where it cannot be compared, since random numbers are in it or memory is short."""
        before = torch.get_rng_state(), random.getstate()
        try:
            with self._step.trial(), torch.no_grad():
                loss = self._step.forward(self._step.batch, 0)
        except torch.OutOfMemoryError:
            return None
        is_random = not torch.equal(before[0], torch.get_rng_state()) or before[1] != random.getstate()
        return None if loss is None or is_random else float(loss)

    def _run_cut(self) -> _Result:
        """By the ranks' parts of it, as they train.

        Raises:
            ConfigError: they fail where the model whole does not.
        """
        try:
            return self._cut()
        except (ConfigError, TransferError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise ConfigError(
                f"the model whole computes the first batch, and the model as it is cut over the ranks fails: {type(error).__name__}: "
                f"{error}. {_CAUSES}"
            ) from error

    def _cut(self) -> _Result:
        result = _Result()
        self._forget_gradients()
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

    def _forget_gradients(self) -> None:
        for parameter in self._parameters.values():
            parameter.grad = None

    # -- what differs --------------------------------------------------------------------------------------------------

    @property
    def _lowest(self) -> torch.dtype:
        """The lowest precision of the parameters."""
        return max((p.dtype for p in self._parameters.values() if p.dtype in TOLERANCES), key=_coarseness, default=torch.float32)

    def _tolerance(self) -> Tolerance:
        exact = all(mode.keeps_bits for mode in self._holders)
        return SAME_PRODUCTS if exact and torch.finfo(self._lowest).bits >= 32 else TOLERANCES[self._lowest]

    def _compare(self, expected: _Result, found: _Result) -> None:
        within = self._tolerance()
        wrong: list[tuple[str, float, float]] = []
        norms = {name: _norm(gradient) for name, gradient in expected.gradients.items()}
        largest = max(norms.values(), default=0.0)
        largest = max(all_gather_objects(largest)) if world_size() > 1 else largest
        for name in {**expected.gradients, **found.gradients}:
            want, have = expected.gradients.get(name), found.gradients.get(name)
            difference = _norm(_difference(have, want))
            if not difference <= within.gradient * norms.get(name, 0.0) + within.noise * largest and not _both_not_finite(want, have):
                wrong.append((name, difference, norms.get(name, 0.0)))
        for name, buffer in expected.buffers.items():
            difference, norm = _norm(_difference(found.buffers.get(name), buffer)), _norm(buffer)
            if not difference <= within.gradient * norm and not _both_not_finite(buffer, found.buffers.get(name)):
                wrong.append((name, difference, norm))
        other_loss = not _is_close(found.loss, expected.loss, within.loss)
        mine = (expected.loss, found.loss, other_loss, wrong)
        everyone = all_gather_objects(mine) if world_size() > 1 else [mine]
        losses = next(((want, have) for want, have, other, _ in everyone if other), None)
        names = list(dict.fromkeys(entry for *_, entries in everyone for entry in entries))
        if losses is None and not names:
            return
        told = []
        if losses is not None:
            told.append(f"the loss is {losses[1]!r} and should be {losses[0]!r}")
        if names:
            first = ", ".join(f"{name} (off by {difference:.2g}, of {norm:.2g})" for name, difference, norm in names[:NAMED])
            kind = "gradients" if any(name in self._parameters for name, *_ in names) else "buffers"
            told.append(f"{kind} differ, the first of {len({name for name, *_ in names})}: {first}")
        raise ConfigError(
            f"the first step of the model as it is cut over the ranks differs from that of the model whole: {'; '.join(told)}. "
            f"{_CAUSES} verify_first_step: false leaves this comparison out."
        )

    def _tell_of_objective(self, expected: _Result) -> None:
        """Says that the objective is another one in microbatches.

        Raises:
            ConfigError: it is none.
        """
        if expected.loss is None or expected.at_once is None:
            return
        if math.isnan(expected.loss) and math.isfinite(expected.at_once):
            raise ConfigError(
                f"the loss of the first batch is {expected.at_once:.6g} in one piece, and not a number in microbatches: a mean over "
                "labels is none where a microbatch has no label that counts: set pipeline_parallel.microbatch_weight to labels or "
                "causal_labels"
            )
        if not _is_close(expected.loss, expected.at_once, TOLERANCES[self._lowest].loss):
            rank_zero_warn(
                f"the loss of the first batch is {expected.at_once:.6g} in one piece, and {expected.loss:.6g} in microbatches: it "
                "is no mean over the samples. pipeline_parallel.microbatch_weight (labels, causal_labels, sum) makes sums and means "
                "over counted labels exact, and so does a method microbatch_weight(batch) of the module; what compares samples with "
                "each other (a contrastive loss, batch norm) has another objective in microbatches. If the loss is a mean over "
                "samples, something in the batch is cut that has no row for each of them: pipeline_parallel.batch_dims"
            )


NO_LOSS = "training_step gave no loss for the batch"
_CAUSES = (
    "Something passes between blocks, or from a block to the loss, on a way that the cut does not follow: a value that a block leaves "
    "on itself or in a list for another one or for the loss (auxiliary losses, hooks, deep supervision, skip connections), a sum over "
    "parameters (a regulariser), a layer whose role is wrong ('column[3]' for fused q, k and v), code that counts heads, features or "
    "tokens of which a rank has a part, or a random decision that differs between ranks. Hand it from block to block through their "
    "arguments, compute it from the output, mend the roles, or leave this mode out."
)


def first_step(
    strategy: Strategy, modes: Sequence[OverlapMode], module: LightningModule, batch: Any, rest: Any, key: tuple[int, ...]
) -> FirstStep:
    """The proof of a fit's first batch.

    Args:
        strategy: Lightning's: its precision plugin and device.
        modes: that cut the model, in their order.
        module: the user's.
        batch: the whole batch.
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


def _is_close(found: float | None, expected: float | None, relative: float) -> bool:
    if found is None or expected is None:
        return found is expected
    if found != found or expected != expected:
        return found != found and expected != expected
    return found == expected or abs(found - expected) <= relative * max(abs(found), abs(expected))
