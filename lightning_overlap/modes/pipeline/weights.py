"""What each microbatch counts for in the batch's loss. It is known before the first one runs."""

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
    """What microbatches count for.

    Attributes:
        loss: what each loss is multiplied by. 0: the microbatch is left out of the loss.
        logs: the same of a value that is logged and is not the loss: they add up to 1.
    """

    loss: tuple[float, ...]
    logs: tuple[float, ...]


def weigh(parts: Sequence[Any], sizes: Sequence[int], by: str, own: Callable[[Any], Any] | None) -> Weights:
    """Weighs microbatches.

    Args:
        parts: the microbatches.
        sizes: samples of each.
        by: ``pipeline_parallel.microbatch_weight``.
        own: the module's method of that name.

    Raises:
        ConfigError: nothing counts, or the labels are not found.
    """
    samples = tuple(size / sum(sizes) for size in sizes)
    if own is not None:
        found = [torch.as_tensor(own(part)) for part in parts]
    elif by in ("labels", "causal_labels"):
        found = [_counted(part, causal=by == "causal_labels") for part in parts]
    else:
        return Weights((1.0,) * len(parts) if by == "sum" else samples, samples)
    numbers = torch.stack(found).double().tolist()  # one wait for the device
    if min(numbers) < 0 or sum(numbers) <= 0:
        raise ConfigError(f"microbatches count for {numbers} in the loss: at least one must have a weight above 0, and none below")
    shares = tuple(number / sum(numbers) for number in numbers)
    return Weights(shares, shares)


def _counted(part: Any, *, causal: bool) -> Tensor:
    labels = _find_labels(part)
    if labels is None:
        raise ConfigError(
            "pipeline_parallel.microbatch_weight counts labels, and the batch has no tensor named 'labels': name it so, or give the "
            "module a method microbatch_weight(batch)"
        )
    return ((labels[..., 1:] if causal else labels) != IGNORED).sum()


def _find_labels(value: Any) -> Tensor | None:
    if isinstance(value, Mapping) and isinstance(value.get("labels"), Tensor):
        return value["labels"]
    inner = items(value) if is_container(value) else []
    return next((found for _, item in inner if (found := _find_labels(item)) is not None), None)
