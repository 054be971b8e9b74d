"""Logged and returned values of a step as data that one rank sends to the others, which write it to Lightning's results."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import Strategy
from torch import Tensor
from torchmetrics import Metric

from lightning_overlap.strategy.seams import last_value, set_last_value, write_log


class LogRecord(NamedTuple):
    """One call of ``self.log``.

    Attributes:
        hook: the LightningModule's hook in which it was called.
        name: of the value.
        value: a number, or a scalar tensor in the CPU's memory.
        options: the other arguments of ``self.log``. See :func:`sendable_options`.
    """

    hook: str
    name: str
    value: Any
    options: dict[str, Any]


def write_logs(strategy: Strategy, module: LightningModule, records: Sequence[LogRecord]) -> None:
    """Writes records to Lightning's results as ``self.log`` does. Call it on every rank with the records."""
    for record in records:
        metric_name = record.options.get("metric_attribute")
        if metric_name:
            value: Any = module.get_submodule(metric_name)
            set_last_value(value, record.value)
        else:
            value = record.value.to(strategy.root_device)
        write_log(module.trainer, record.hook, record.name, value, sync_dist_fn=strategy.reduce, **record.options)


def sendable_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of ``self.log`` that can be sent to another rank, ``reduce_fx`` by its name."""
    kept = {key: value for key, value in options.items() if key not in ("sync_dist_fn", "sync_dist_group")}
    reduce = options.get("reduce_fx", torch.mean)
    return {**kept, "reduce_fx": "mean" if reduce == "avg" else reduce if isinstance(reduce, str) else reduce.__name__}


def numbers_of(output: Mapping[str, Any], step: str, reader: str) -> dict[str, Any]:
    """Returns the numbers in a step's output, which are sent to the other ranks. Warns of other values.

    Args:
        output: of the step.
        step: the step's name, for the warning.
        reader: the hook that receives the output from Lightning, for the warning.
    """
    if others := [key for key, value in output.items() if value is not None and not is_number(value)]:
        warnings.warn(
            f"{step} returns {', '.join(map(str, others))}. With a pipeline, {reader} receives numbers only. Return them as numbers "
            "or scalar tensors (warned once)",
            stacklevel=3,
        )
    return {key: current_value(value) for key, value in output.items() if is_number(value)}


def is_number(value: Any) -> bool:
    """Whether a value is a number or a scalar tensor."""
    return isinstance(value, int | float) or (isinstance(value, Tensor) and value.dim() == 0)


def current_value(value: Any) -> Any:
    """Returns a copy of a logged value on the CPU; of a metric, its value for the last batch."""
    if isinstance(value, Metric):
        value = last_value(value)
    return value.detach().cpu().clone() if isinstance(value, Tensor) else value


def combine(values: Sequence[Any], weights: Sequence[float], reduce: str) -> Any:
    """Reduces the values of several microbatches to one.

    Args:
        values: numbers or tensors of one shape; None if one of them is missing.
        weights: of the values, for a mean.
        reduce: ``mean``, ``sum``, ``min`` or ``max``, or the name of another function of torch over a dim.
    """
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
