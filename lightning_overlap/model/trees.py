"""Containers of batches and of blocks' outputs: their leaves, and copies with other leaves.

``torch.utils._pytree`` would take mappings (a tokenizer's ``BatchEncoding``), subclasses of dict and list, and dataclasses for leaves
unless each class is registered. Here they are containers.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


class Leaf:
    """A base of dataclasses of ours that users' code hands on as one value: they are no containers."""


def is_container(value: Any) -> bool:
    """Whether a value is a mapping, a list, a tuple or a dataclass instance, but no :class:`Leaf`. All other values are leaves."""
    if isinstance(value, Leaf | type):
        return False
    return isinstance(value, Mapping | list | tuple) or dataclasses.is_dataclass(value)


def rebuild(value: Any, make: Callable[[Any], Any]) -> Any:
    """Returns a container of the same type, with ``make(item)`` in place of each item."""
    if isinstance(value, Mapping):
        items = {key: make(item) for key, item in value.items()}
        if type(value) is dict:
            return items
        if isinstance(value, defaultdict):
            return defaultdict(value.default_factory, items)
        return type(value)(items)  # type: ignore[call-arg]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(make, value))
    if isinstance(value, list | tuple):
        return type(value)(map(make, value))
    return dataclasses.replace(value, **{f.name: make(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init})


def items(value: Any) -> list[tuple[str, Any]]:
    """Returns the names and items of a container: keys, indices or fields."""
    if isinstance(value, Mapping):
        return [(str(key), item) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return [(str(number), item) for number, item in enumerate(value)]
    return [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]


def leaves(value: Any) -> Iterator[Any]:
    """Yields the leaves of nested containers, in the order of the items. A value that is no container is its own leaf."""
    if not is_container(value):
        yield value
        return
    for _, item in items(value):
        yield from leaves(item)


def copied(value: Any) -> Any:
    """Returns a copy of nested containers and the tensors in them. Other leaves are shared."""
    return replaced(value, lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf)


def replaced(value: Any, make: Callable[[Any], Any]) -> Any:
    """Returns nested containers of the same types, with ``make(leaf)`` in place of each leaf."""
    return rebuild(value, lambda item: replaced(item, make)) if is_container(value) else make(value)


def bytes_by_storage(values: Iterable[Any]) -> dict[int, int]:
    """Returns the bytes of the tensors among some values, by the id of their storage: views of one storage count once."""
    return {id(storage): storage.nbytes() for storage in storages(values)}


def storages(values: Iterable[Any]) -> Iterator[Any]:
    """Yields the storages of the tensors among some values. Sparse tensors and those on the meta device have none."""
    for tensor in plain_tensors(values):
        if tensor.layout == torch.strided and not tensor.is_meta:
            yield tensor.untyped_storage()


def plain_tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yields the tensors among some values; of a tensor that is made of others, such as quantized ones and their scales, these."""
    for value in values:
        if isinstance(value, Tensor):
            parts = getattr(value, "__tensor_flatten__", None)
            yield from [value] if parts is None else plain_tensors(getattr(value, name) for name in parts()[0])
