"""Lightning's side of a training step that a mode runs in microbatches.

Each rank runs the user's ``training_step`` on each microbatch. The logs of the rank with the loss are merged, sent to all ranks
after the last microbatch, and logged there as those of one step: callbacks, schedulers and loggers see no difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import Strategy
from torch import Tensor
from torchmetrics import Metric

from lightning_overlap.model.snapshots import preserve_attributes, reachable_objects
from lightning_overlap.modes.base import OverlapMode, hold_gradient_syncs
from lightning_overlap.steps.random_state import seed_generators
from lightning_overlap.strategy.logs import LogRecord, combine, current_value, is_number, numbers_of, sendable_options, write_logs
from lightning_overlap.strategy.seams import logs_go_to, plain_backward


class DrivenStep:
    """One training step. See :class:`lightning_overlap.steps.step.Step`.

    Args:
        strategy: Lightning's strategy, with its precision plugin, optimizers and device.
        modes: the modes that run, in the order in which they were applied.
        module: the user's module.
        batch: the batch.
        rest: the other arguments of ``training_step``.
        key: see :class:`lightning_overlap.steps.step.Step`.

    Attributes:
        output: after :meth:`log`, the output of the step for Lightning.
    """

    def __init__(
        self,
        strategy: Strategy,
        modes: Sequence[OverlapMode],
        module: LightningModule,
        batch: Any,
        rest: Any,
        key: tuple[int, ...],
    ) -> None:
        self.batch = batch
        size = getattr(module.trainer.train_dataloader, "batch_size", None)
        self.batch_size = size if isinstance(size, int) else None
        self.key = key
        self.output: Any = None
        self._strategy = strategy
        self._modes = modes
        self._module = module
        self._rest = rest
        self._outputs: dict[int, Any] = {}
        self._logs: dict[int, list[LogRecord]] = {}

    @property
    def forward_spans_samples(self) -> bool:
        return any(mode.forward_spans_samples for mode in self._modes)

    def forward(self, part: Any, number: int) -> Tensor | None:
        logs = self._logs[number] = []
        seed_generators(self._module, *self.key, number)  # all stages run the user's code, and must draw the same numbers

        def keep(hook: str, name: str, value: Any, **options: Any) -> None:
            logs.append(LogRecord(hook, name, current_value(value), options))

        with logs_go_to(self._module.trainer, keep), self._strategy.precision_plugin.train_step_context():
            output = self._module.training_step(part, *self._rest)
        loss = output["loss"] if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor):
            return None
        extra = {k: v for k, v in output.items() if k != "loss"} if isinstance(output, Mapping) else {}
        self._outputs[number] = loss.detach(), numbers_of(extra, "training_step", "on_train_batch_end"), isinstance(output, Mapping)
        return loss

    def backward(self, loss: Tensor, share: float) -> None:
        scaled = loss * (share / self._module.trainer.accumulate_grad_batches)
        plain_backward(self._strategy.precision_plugin, scaled, self._module, self._strategy.optimizers[0])

    def hold(self) -> AbstractContextManager[None]:
        return hold_gradient_syncs(self._modes)

    def start_backward(self) -> None:
        for mode in self._modes:
            mode.start_backward()

    def finish_backward(self) -> None:
        for mode in self._modes:
            mode.finish_backward()

    def preserve(self, modules: Sequence[torch.nn.Module], *, metrics: bool) -> AbstractContextManager[None]:
        return preserve_attributes([*modules, *(self._metrics if metrics else ())])

    @cached_property
    def _metrics(self) -> list[torch.nn.Module]:
        return [part for part in self._module.modules() if isinstance(part, Metric)]

    @contextmanager
    def trial(self) -> Iterator[None]:
        with preserve_attributes(reachable_objects(self._module)):
            yield
        self._outputs.clear()
        self._logs.clear()

    @property
    def weight(self) -> Callable[[Any], Any] | None:
        return getattr(self._module, "microbatch_weight", None)

    def merge_logs(self, shares: Sequence[float], weights: Sequence[float] | None = None) -> Any:
        """Merges losses, outputs and logs of the microbatches: a weighted mean, or the reduction that ``reduce_fx`` names.

        Args:
            shares: of the microbatches in the batch's loss. Logged values that equal the loss are weighted by them too.
            weights: of the microbatches in all other means; by default the shares.
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
        return loss.to(self._outputs[0][0].dtype).cpu(), extra, self._outputs[0][2], self._merged_logs(shares, weights)

    def _merged_logs(self, shares: Sequence[float], weights: Sequence[float]) -> list[LogRecord]:
        """Merges the microbatches' logs: one record for each name in each hook."""
        calls: dict[tuple[str, str], list[tuple[int, LogRecord]]] = {}
        for number in range(len(shares)):
            for record in self._logs[number]:
                calls.setdefault((record.hook, record.name), []).append((number, record))
        merged = []
        for (hook, name), numbered in calls.items():
            numbers, records = [number for number, _ in numbered], [record for _, record in numbered]
            options = sendable_options(records[0].options)
            sizes = [record.options.get("batch_size") for record in records]
            known = [size for size in sizes if size is not None]
            complete = len(known) == len(sizes)
            options["batch_size"] = sum(known) if complete else None
            by = known if complete else [weights[number] for number in numbers]
            value = self._merged([record.value for record in records], numbers, shares, by, options["reduce_fx"])
            merged.append(LogRecord(hook, name, value, options))
        return merged

    def _merged(
        self, values: Sequence[Any], parts: Sequence[int], shares: Sequence[float], weights: Sequence[float], reduce: str
    ) -> Any:
        """Merges logged or returned values. Microbatches with a share of 0 do not count, unless all have it."""
        rows = list(zip(values, parts, weights, strict=True))
        rows = [row for row in rows if shares[row[1]]] or rows
        values = [value for value, _, _ in rows]
        row_shares = [shares[part] for _, part, _ in rows]
        is_loss = [part for _, part, _ in rows] == [part for part, share in enumerate(shares) if share] and all(
            is_number(value) and float(value) == float(self._outputs[part][0]) for value, part, _ in rows
        )
        if is_loss and reduce == "mean":
            terms = [torch.as_tensor(value).double() * share for value, share in zip(values, row_shares, strict=True)]
            return torch.stack(terms).sum().to(torch.as_tensor(values[0]).dtype)
        return combine(values, [weight for _, _, weight in rows], reduce)

    def log(self, merged: Any) -> None:
        loss, extra, as_mapping, logs = merged
        loss = loss.to(self._strategy.root_device)
        self.output = {"loss": loss, **extra} if as_mapping else loss
        write_logs(self._strategy, self._module, logs)
