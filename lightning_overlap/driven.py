"""A training step that a mode runs in parts: what that needs of Lightning.

Each rank runs the user's ``training_step`` on each part, and the rank that comes to the loss is the one whose logs count. They are
told to all ranks after the last part, and logged there as one step's: callbacks, schedulers and loggers see no difference.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torchmetrics import Metric

from lightning_overlap.optimization import held, logs_go_to

if TYPE_CHECKING:
    from lightning_overlap.comm import Group
    from lightning_overlap.modes.base import OverlapMode
    from lightning_overlap.strategy import OverlapStrategy


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

        def keep(fx: str, name: str, value: Any, **how: Any) -> None:
            logs.append(((fx, name, _said(value)), how))

        with logs_go_to(self._trainer, keep), self._strategy.precision_plugin.train_step_context():
            output = self._module.training_step(part, *self._rest)
        loss = output["loss"] if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor):
            return None
        extra = {k: v for k, v in output.items() if k != "loss"} if isinstance(output, Mapping) else {}
        if left_out := [key for key, value in extra.items() if not _is_number(value)]:
            warnings.warn(
                f"training_step returns {', '.join(map(str, left_out))}, which are no numbers: with a pipeline, on_train_batch_end "
                "does not get them (said once)",
                stacklevel=2,
            )
        self._outputs[number] = loss.detach(), {k: _said(v) for k, v in extra.items() if _is_number(v)}, isinstance(output, Mapping)
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

    def logged(self, shares: Sequence[float]) -> Any:
        """The mean over the parts, each with its share, unless ``reduce_fx`` says otherwise."""
        losses = torch.stack([self._outputs[i][0].double() for i in range(len(shares))])
        loss = (losses * torch.tensor(shares, device=losses.device)).sum()
        extras = [self._outputs[i][1] for i in range(len(shares))]
        extra = {key: _together([e[key] for e in extras], shares, "mean") for key in extras[0] if all(key in e for e in extras)}
        values: dict[tuple[str, str], Any] = {}
        for number in range(len(shares)):
            for (fx, name, value), how in self._logs[number]:
                entry = values.setdefault((fx, name), {"how": how, "values": [], "shares": [], "sizes": []})
                entry["values"].append(value)
                entry["shares"].append(shares[number])
                entry["sizes"].append(how.get("batch_size"))
        logs = []
        for (fx, name), entry in values.items():
            how = {key: value for key, value in entry["how"].items() if key not in ("batch_size", "sync_dist_fn", "sync_dist_group")}
            sizes = entry["sizes"]
            weights = entry["shares"] if None in sizes else sizes
            how["reduce_fx"] = reduce = _name(entry["how"].get("reduce_fx", torch.mean))
            how["batch_size"] = None if None in sizes else sum(sizes)
            logs.append((fx, name, _together(entry["values"], weights, reduce), how))
        return loss.to(self._outputs[0][0].dtype).cpu(), extra, self._outputs[0][2], logs

    def log(self, said: Any) -> None:
        loss, extra, as_mapping, logs = said
        loss = loss.to(self._strategy.root_device)
        self.output = {"loss": loss, **extra} if as_mapping else loss
        results = self._trainer._results
        if results is None:
            return
        for fx, name, value, how in logs:
            metric = self._module.get_submodule(how["metric_attribute"]) if how.get("metric_attribute") else None
            if metric is not None:
                metric._forward_cache = value
            shown = metric if metric is not None else value.to(self._strategy.root_device)
            if self._trainer._logger_connector.should_reset_tensors(fx):
                results.reset(metrics=False, fx=fx)
            self._trainer._logger_connector._current_fx = fx
            results.log(fx, name, shown, sync_dist_fn=self._strategy.reduce, **how)


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


@contextmanager
def mirrored_metrics(module: LightningModule, mode: OverlapMode, alike: Group, in_step: Callable[[], bool]) -> Iterator[None]:
    """Metrics compute, on all ranks, what they compute on the rank with the loss, which alone has updated them.

    Args:
        module: the user's.
        mode: that runs its steps.
        alike: the ranks over which metrics are summed.
        in_step: whether a training step runs: a metric that is computed there has no other rank to tell it to.
    """
    metrics = [m for m in module.modules() if isinstance(m, Metric)]
    before = [(m.compute, m.process_group, m.distributed_available_fn) for m in metrics]

    def mirrored(plain: Callable[..., Any]) -> Callable[..., Any]:
        def compute(*args: Any, **kwargs: Any) -> Any:
            return plain(*args, **kwargs) if in_step() else mode.with_the_loss(lambda: plain(*args, **kwargs))

        return compute

    for metric in metrics:
        metric.compute = mirrored(metric.compute)  # type: ignore[method-assign]
        metric.process_group = alike.reduces
        if alike.size == 1:
            metric.distributed_available_fn = lambda: False
    try:
        yield
    finally:
        for metric, (compute, group, available) in zip(metrics, before, strict=True):
            metric.compute, metric.process_group, metric.distributed_available_fn = compute, group, available  # type: ignore[method-assign]
