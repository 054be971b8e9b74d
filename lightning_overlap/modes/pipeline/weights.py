"""Weighs the microbatches in the batch's loss, before the first one runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_overlap.decision import ConfigError
from lightning_overlap.model.trees import is_container, items

IGNORED = -100
"""The label that does not count, torch's and Hugging Face's default."""


@dataclass(frozen=True)
class Weights:
    """The weights of microbatches.

    Attributes:
        loss: by microbatch, the factor of its loss. 0: the loss is not added, so that it may be NaN.
        logs: by microbatch, the weight of its logged values other than the loss. These weights sum to 1.
    """

    loss: tuple[float, ...]
    logs: tuple[float, ...]


def weigh(parts: Sequence[Any], sizes: Sequence[int], by: str, method: Callable[[Any], Any] | None) -> Weights:
    """Weighs microbatches.

    Args:
        parts: the microbatches.
        sizes: by microbatch, the number of samples.
        by: ``pipeline_parallel.microbatch_weight``.
        method: the module's method ``microbatch_weight``, if it has one.

    Raises:
        ConfigError: a weight is negative, all are 0, or the batch has no labels to count.
    """
    samples = tuple(size / sum(sizes) for size in sizes)
    if method is not None:
        weights = [torch.as_tensor(method(part)) for part in parts]
    elif by in ("labels", "causal_labels"):
        weights = [_count_labels(part, causal=by == "causal_labels") for part in parts]
    else:
        return Weights((1.0,) * len(parts) if by == "sum" else samples, samples)
    numbers = torch.stack(weights).double().tolist()  # one synchronization with the device
    if min(numbers) < 0 or sum(numbers) <= 0:
        raise ConfigError(
            f"the weights of the microbatches are {numbers}: no weight may be negative, and at least one must be positive; check "
            "that the batch has labels that are not ignored"
        )
    shares = tuple(number / sum(numbers) for number in numbers)
    return Weights(shares, shares)


def _count_labels(part: Any, *, causal: bool) -> Tensor:
    labels = _find_labels(part)
    if labels is None:
        raise ConfigError(
            "pipeline_parallel.microbatch_weight counts labels, but the batch has no tensor with the key 'labels'. Give it that key, "
            "or give the module a method microbatch_weight(batch)"
        )
    return ((labels[..., 1:] if causal else labels) != IGNORED).sum()


def _find_labels(value: Any) -> Tensor | None:
    if isinstance(value, Mapping) and isinstance(value.get("labels"), Tensor):
        return value["labels"]
    inner = items(value) if is_container(value) else []
    return next((labels for _, item in inner if (labels := _find_labels(item)) is not None), None)
