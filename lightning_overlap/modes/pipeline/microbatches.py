"""Parts of a batch."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor

from lightning_overlap.batches import leaves
from lightning_overlap.decision import ConfigError


def samples(batch: Any) -> int:
    """The batch's size: the first dim of its first tensor that has one, those inside of lists in it last.

    Raises:
        ConfigError: it has no such tensor, or only ones in lists, and of several lengths.
    """
    for field in batch if isinstance(batch, list | tuple) else [batch]:
        for leaf in _outside_of_lists(field):
            if isinstance(leaf, Tensor) and leaf.dim():
                return len(leaf)
    lengths = {len(leaf) for leaf in leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()}
    if len(lengths) == 1:
        return lengths.pop()
    if not lengths:
        raise ConfigError("a batch without a tensor cannot be cut into microbatches: have the data loader collate tensors")
    raise ConfigError(
        f"a batch of lists, whose tensors have the lengths {sorted(lengths)}, does not tell how many samples it has: have the data "
        "loader put a tensor beside them that has one row for each sample"
    )


def _outside_of_lists(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        for item in value.values():
            yield from _outside_of_lists(item)
    elif not isinstance(value, list | tuple):
        yield from leaves(value)


def cut(batch: Any, parts: int) -> list[Any]:
    """The batch in so many parts along the first dim, of sizes that differ by one at most, the larger ones first.

    Tensors and lists whose length is the batch's are cut, in mappings, sequences and dataclasses; the rest is in every part.
    A sequence of tensors that are all to be cut is not: it is one of columns, as is the batch itself.
    """
    size = samples(batch)
    bounds = [0]
    for i in range(parts):
        bounds.append(bounds[-1] + size // parts + (i < size % parts))
    return [_narrow(batch, size, start, end, whole=True) for start, end in pairwise(bounds)]


def _narrow(value: Any, size: int, start: int, end: int, *, whole: bool = False) -> Any:
    def inner(item: Any) -> Any:
        return _narrow(item, size, start, end)

    if isinstance(value, Tensor):
        return value[start:end] if value.dim() and len(value) == size else value
    if isinstance(value, Mapping):
        items = {key: inner(item) for key, item in value.items()}
        if type(value) is dict:
            return items
        if isinstance(value, defaultdict):
            return defaultdict(value.default_factory, items)
        return type(value)(items)  # type: ignore[call-arg]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(inner, value))
    if isinstance(value, list | tuple):
        one_each = len(value) == size and not whole and not _are_columns(value, size)
        return value[start:end] if one_each else type(value)(map(inner, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **{f.name: inner(getattr(value, f.name)) for f in dataclasses.fields(value)})
    return value


def _are_columns(items: Sequence[Any], size: int) -> bool:
    """Whether a sequence as long as the batch has what is to be cut in each of its items, and not an item for each sample."""

    def is_column(item: Any) -> bool:
        return isinstance(item, Tensor | list | tuple) and any(
            isinstance(x, Tensor) and x.dim() and len(x) == size for x in leaves(item)
        )

    return all(item is None or is_column(item) for item in items) and any(item is not None for item in items)
