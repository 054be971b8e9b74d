"""Parts of a batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from torch import Tensor

from lightning_overlap.batches import leaves
from lightning_overlap.decision import ConfigError


def samples(batch: Any) -> int:
    """The batch's size: the first dim of its first tensor that has one.

    Raises:
        ConfigError: it has no such tensor.
    """
    for leaf in leaves(batch):
        if isinstance(leaf, Tensor) and leaf.dim():
            return len(leaf)
    raise ConfigError("a batch without a tensor cannot be cut into microbatches: have the data loader collate tensors")


def cut(batch: Any, parts: int) -> list[Any]:
    """The batch in so many parts along the first dim, of sizes that differ by one at most, the larger ones first.

    Tensors and lists whose length is the batch's are cut, in mappings, sequences and dataclasses; the rest is in every part.
    """
    size = samples(batch)
    bounds = [0]
    for i in range(parts):
        bounds.append(bounds[-1] + size // parts + (i < size % parts))
    return [_narrow(batch, size, start, end) for start, end in pairwise(bounds)]


def _narrow(value: Any, size: int, start: int, end: int) -> Any:
    def inner(item: Any) -> Any:
        return _narrow(item, size, start, end)

    if isinstance(value, Tensor):
        return value[start:end] if value.dim() and len(value) == size else value
    if isinstance(value, Mapping):
        items = {key: inner(item) for key, item in value.items()}
        return items if type(value) is dict else type(value)(items)  # type: ignore[call-arg]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(inner, value))
    if isinstance(value, list | tuple):
        one_each = len(value) == size and not any(isinstance(item, Tensor | Mapping | list | tuple) for item in value)
        return value[start:end] if one_each else type(value)(map(inner, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **{f.name: inner(getattr(value, f.name)) for f in dataclasses.fields(value)})
    return value
