"""A training step that a mode runs in parts: what that needs of Lightning.

Each rank runs the user's ``training_step`` on each part, and the rank that comes to the loss is the one whose logs count. They are
told to all ranks after the last part, and logged there as one step's: callbacks, schedulers and loggers see no difference.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torchmetrics import Metric

from lightning_overlap.decision import ConfigError
from lightning_overlap.model.snapshots import unchanged, within_reach
from lightning_overlap.ranks.announcements import TransferError
from lightning_overlap.steps.generators import pin_generators
from lightning_overlap.strategy.seams import held, logs_go_to

if TYPE_CHECKING:
    from lightning_overlap.modes.base import OverlapMode
    from lightning_overlap.strategy.strategy import OverlapStrategy


class DrivenStep:
    """One step. See :class:`lightning_overlap.modes.base.Step`.

    Args:
        strategy: whose modes take part.
        trainer: its trainer.
        module: the user's.
        batch: the whole batch.
        rest: the other arguments of ``training_step``.
        place: see :class:`lightning_overlap.modes.base.Step`.

    Attributes:
        output: what the step gives to Lightning, after :meth:`log`.
    """

    def __init__(
        self, strategy: OverlapStrategy, trainer: Trainer, module: LightningModule, batch: Any, rest: Any, place: tuple[int, ...]
    ) -> None:
        self.batch = batch
        self.place = place
        self.output: Any = None
        self._strategy = strategy
        self._trainer = trainer
        self._module = module
        self._rest = rest
        self._outputs: dict[int, Any] = {}
        self._logs: dict[int, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}

    def forward(self, part: Any, number: int) -> Tensor | None:
        logs = self._logs[number] = []
        # Each stage comes by the user's draws, and all are to see the same numbers.
        pin_generators(self._module, random.Random(repr((*self.place, number))).getrandbits(32))

        def keep(fx: str, name: str, value: Any, **how: Any) -> None:
            logs.append(((fx, name, _said(value)), how))

        with logs_go_to(self._trainer, keep), self._strategy.precision_plugin.train_step_context():
            output = self._module.training_step(part, *self._rest)
        loss = output["loss"] if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor):
            return None
        extra = {k: v for k, v in output.items() if k != "loss"} if isinstance(output, Mapping) else {}
        self._outputs[number] = loss.detach(), _numbers(extra, "training_step", "on_train_batch_end"), isinstance(output, Mapping)
        return loss

    def backward(self, loss: Tensor, share: float) -> None:
        scaled = loss * (share / self._trainer.accumulate_grad_batches)
        self._strategy.precision_plugin.backward(scaled, self._module, self._strategy.optimizers[0])

    def hold(self) -> AbstractContextManager[None]:
        return held(self._strategy.modes)

    def start_backward(self) -> None:
        for mode in self._strategy.modes:
            mode.start_backward()

    def finish_backward(self) -> None:
        for mode in self._strategy.modes:
            mode.finish_backward()

    def aside(self, modules: Sequence[torch.nn.Module], *, metrics: bool) -> AbstractContextManager[None]:
        return unchanged([*modules, *(self._metrics if metrics else ())])

    @cached_property
    def _metrics(self) -> list[torch.nn.Module]:
        return [part for part in self._module.modules() if isinstance(part, Metric)]

    @contextmanager
    def trial(self) -> Iterator[None]:
        with unchanged(within_reach(self._module)):
            yield
        self._outputs.clear()
        self._logs.clear()

    @property
    def weight(self) -> Callable[[Any], Any] | None:
        return getattr(self._module, "microbatch_weight", None)

    def logged(self, shares: Sequence[float], weights: Sequence[float] | None = None) -> Any:
        """The mean over the parts, each with its weight, unless ``reduce_fx`` says otherwise.

        Args:
            shares: of the parts in the loss. What is the loss of each part is summed with them.
            weights: of the parts in all other means; by default the shares.
        """
        weights = weights or shares
        counted = [number for number, share in enumerate(shares) if share]
        losses = torch.stack([self._outputs[i][0].double() for i in counted])
        loss = (losses * torch.tensor([shares[i] for i in counted], device=losses.device)).sum()
        extras = [self._outputs[i][1] for i in range(len(shares))]
        extra = {
            key: self._merged([e[key] for e in extras], range(len(shares)), shares, weights, "mean")
            for key in extras[0]
            if all(key in e for e in extras)
        }
        values: dict[tuple[str, str], Any] = {}
        for number in range(len(shares)):
            for (fx, name, value), how in self._logs[number]:
                entry = values.setdefault((fx, name), {"how": how, "values": [], "parts": [], "sizes": []})
                entry["values"].append(value)
                entry["parts"].append(number)
                entry["sizes"].append(how.get("batch_size"))
        logs = []
        for (fx, name), entry in values.items():
            how = _told(entry["how"])
            sizes = entry["sizes"]
            by = [weights[number] for number in entry["parts"]] if None in sizes else sizes
            how["batch_size"] = None if None in sizes else sum(sizes)
            logs.append((fx, name, self._merged(entry["values"], entry["parts"], shares, by, how["reduce_fx"]), how))
        return loss.to(self._outputs[0][0].dtype).cpu(), extra, self._outputs[0][2], logs

    def _merged(
        self, values: Sequence[Any], parts: Sequence[int], shares: Sequence[float], weights: Sequence[float], reduce: str
    ) -> Any:
        """What parts have logged or returned, in one. Parts that are left out of the loss are so here, unless there are no others."""
        rows = list(zip(values, parts, weights, strict=True))
        rows = [row for row in rows if shares[row[1]]] or rows
        values = [value for value, _, _ in rows]
        own = [shares[part] for _, part, _ in rows]
        is_loss = [part for _, part, _ in rows] == [part for part, share in enumerate(shares) if share] and all(
            _is_number(value) and float(value) == float(self._outputs[part][0]) for value, part, _ in rows
        )
        if is_loss and reduce == "mean":
            parts_of_it = [torch.as_tensor(value).double() * share for value, share in zip(values, own, strict=True)]
            return torch.stack(parts_of_it).sum().to(torch.as_tensor(values[0]).dtype)
        return _together(values, [weight for _, _, weight in rows], reduce)

    def log(self, said: Any) -> None:
        loss, extra, as_mapping, logs = said
        loss = loss.to(self._strategy.root_device)
        self.output = {"loss": loss, **extra} if as_mapping else loss
        _log(self._strategy, self._trainer, self._module, logs)


def mirrored_step(
    strategy: OverlapStrategy, trainer: Trainer, module: LightningModule, mode: OverlapMode, step: Callable[[], Any]
) -> Any:
    """A step of evaluation that only the rank with the loss takes to its end: what it logs, and the numbers that it returns.

    Args:
        strategy: the modes'.
        trainer: its trainer.
        module: the user's.
        mode: that the other ranks leave the step for.
        step: calls ``validation_step``.
    """

    def run() -> tuple[Any, list[Any]]:
        logs: list[Any] = []
        output = None

        def keep(fx: str, name: str, value: Any, **how: Any) -> None:
            logs.append((fx, name, _said(value), _told(how)))

        with logs_go_to(trainer, keep), mode.evaluating():
            output = step()
        if isinstance(output, Mapping):
            return _numbers(output, "validation_step", "on_validation_batch_end"), logs
        return _numbers({"output": output}, "validation_step", "on_validation_batch_end").get("output"), logs

    if not mode.has_the_loss:
        run()  # to where it is left; what fails here is no answer that the others wait for
    output, logs = mode.with_the_loss(run)
    _log(strategy, trainer, module, logs)
    return output


class _FailsTogether:
    """``on_validation_epoch_end`` that fails on all ranks where it fails on one that the steps are left on. Copies do without."""

    def __init__(self, module: LightningModule, mode: OverlapMode) -> None:
        self._module, self._mode = module, mode
        self.__wrapped__ = module.on_validation_epoch_end

    def __call__(self) -> None:
        failed: Exception | None = None
        try:
            self.__wrapped__()
        except Exception as error:
            failed = error
        said = self._mode.failed_without_loss(f"{type(failed).__name__}: {failed}" if failed else None)
        if said is not None:
            raise ConfigError(
                f"on_validation_epoch_end fails on the ranks that validation_step is left on ({said}): what it collects on self is on "
                "the last stage only with pipeline_parallel.evaluation='mirror'. Set evaluation='replicate', or collect in a "
                "torchmetrics.Metric"
            ) from failed
        if failed is not None:
            raise failed

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return getattr, (self._module, "on_validation_epoch_end")


@contextmanager
def failing_together(module: LightningModule, mode: OverlapMode) -> Iterator[None]:
    """What ``validation_step`` collects on the module is where the loss is. A hook that fails without it says so, on all ranks.

    Args:
        module: the user's.
        mode: that other ranks leave the steps for.
    """
    module.on_validation_epoch_end = _FailsTogether(module, mode)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.on_validation_epoch_end  # type: ignore[method-assign]


HOOKS = ("on_train_batch_end", "on_train_epoch_end", "on_train_end")
"""Hooks that may read what ``training_step`` has left on the module."""


class _Explained:
    """A hook of the module's that fails on a rank that ``training_step`` is left on says that this may be why. Copies do without."""

    def __init__(self, module: LightningModule, name: str, mode: OverlapMode) -> None:
        self._module, self._name, self._mode = module, name, mode
        self.__wrapped__ = getattr(module, name)  # which Lightning looks at

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self.__wrapped__(*args, **kwargs)
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            if self._mode.has_the_loss or isinstance(error, ConfigError | TransferError):
                raise
            raise ConfigError(
                f"{self._name} fails on a rank that training_step is left on ({type(error).__name__}: {error}): what training_step "
                "leaves on self after the model is called is on the last stage only. Return it, if it is a number, in a dictionary "
                "with the loss, which on_train_batch_end gets as outputs on every rank; log it; or collect it in a torchmetrics.Metric"
            ) from error

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return getattr, (self._module, self._name)


@contextmanager
def explaining(module: LightningModule, mode: OverlapMode) -> Iterator[None]:
    """Hooks of a fit say where things are that a step has left.

    Args:
        module: the user's.
        mode: that leaves its steps.
    """
    given = [name for name in HOOKS if getattr(type(module), name) is not getattr(LightningModule, name)]
    for name in given:
        setattr(module, name, _Explained(module, name, mode))
    try:
        yield
    finally:
        for name in given:
            delattr(module, name)


def _log(strategy: OverlapStrategy, trainer: Trainer, module: LightningModule, logs: Sequence[Any]) -> None:
    """As ``self.log`` would have, on every rank."""
    results = trainer._results
    if results is None:
        return
    for fx, name, value, how in logs:
        metric = module.get_submodule(how["metric_attribute"]) if how.get("metric_attribute") else None
        if metric is not None:
            metric._forward_cache = value
        shown = metric if metric is not None else value.to(strategy.root_device)
        if trainer._logger_connector.should_reset_tensors(fx):
            results.reset(metrics=False, fx=fx)
        trainer._logger_connector._current_fx = fx
        results.log(fx, name, shown, sync_dist_fn=strategy.reduce, **how)


def _told(how: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a log that other ranks can be told."""
    kept = {key: value for key, value in how.items() if key not in ("sync_dist_fn", "sync_dist_group")}
    return {**kept, "reduce_fx": _name(how.get("reduce_fx", torch.mean))}


def _numbers(output: Mapping[str, Any], step: str, reader: str) -> dict[str, Any]:
    """What other ranks can be told of a step's output."""
    if left_out := [key for key, value in output.items() if value is not None and not _is_number(value)]:
        warnings.warn(
            f"{step} returns {', '.join(map(str, left_out))}, which are no numbers: with a pipeline, {reader} "
            "does not get them (said once)",
            stacklevel=3,
        )
    return {key: _said(value) for key, value in output.items() if _is_number(value)}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, Tensor) and value.dim() == 0)


def _said(value: Any) -> Any:
    """A value as it is now: of a metric, that of the last batch."""
    if isinstance(value, Metric):
        value = value._forward_cache
    return value.detach().cpu().clone() if isinstance(value, Tensor) else value


def _name(reduce_fx: Any) -> str:
    return "mean" if reduce_fx == "avg" else reduce_fx if isinstance(reduce_fx, str) else reduce_fx.__name__


def _together(values: Sequence[Any], weights: Sequence[float], reduce: str) -> Any:
    if any(value is None for value in values):
        return None
    stacked = torch.stack([torch.as_tensor(value).double() for value in values])
    if reduce == "mean":
        share = torch.tensor(weights, dtype=torch.float64)
        reduced = (stacked * (share / share.sum()).view(-1, *[1] * (stacked.dim() - 1))).sum(0)
    else:
        reduced = getattr(torch, f"a{reduce}" if reduce in ("min", "max") else reduce)(stacked, dim=0)
    like = torch.as_tensor(values[0])
    return reduced.to(like.dtype if like.is_floating_point() else torch.float32)
