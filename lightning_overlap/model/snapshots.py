"""Preserves the user's objects around a step that is only tried: modules, metrics, counters, lists."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
from torch import Tensor, nn

from lightning_overlap.torch_seams import buffers_of, version_of

_MODULE_ATTRIBUTES = frozenset(name for name in vars(nn.Module()) if "hooks" not in name)
"""Attributes of every module: its dictionaries of parameters, buffers and modules, and ``training``. Not those of its hooks: a model
of transformers adds hooks in its first forward and notes that on itself, so both are preserved or neither."""
_LIBRARIES = frozenset({"torch", "lightning", "pytorch_lightning", "transformers", "tokenizers", "numpy", "builtins", "functools"})
"""Packages whose objects, except modules, are not preserved: a step does not write to their attributes."""


@contextmanager
def preserve_attributes(objects: Sequence[Any]) -> Iterator[None]:
    """Restores the attributes and buffers of modules and objects at the end, and the contents of tensors and containers in them."""
    saved: list[tuple[dict[str, Any], str, Any, Any]] = []
    before: list[tuple[dict[str, Any], set[str]]] = []
    for item in objects:
        is_module = isinstance(item, nn.Module)
        for store in (vars(item), buffers_of(item)) if is_module else (vars(item),):
            before.append((store, set(store)))
            values = {name: value for name, value in store.items() if not is_module or name not in _MODULE_ATTRIBUTES}
            saved += [(store, name, value, _content(value)) for name, value in values.items()]
    try:
        yield
    finally:
        for store, names in before:
            for name in set(store) - names:
                del store[name]
        for store, name, value, content in saved:
            store[name] = value
            _restore(value, content)


@contextmanager
def written_attributes(objects: Sequence[Any]) -> Iterator[set[str]]:
    """Yields a set, which at the end has the names of the attributes and buffers of the objects that were written inside."""
    before = [_attributes(item) for item in objects]
    written: set[str] = set()
    yield written
    for item, old in zip(objects, before, strict=True):
        new = _attributes(item)
        for name in {**old, **new}:
            values = [values.get(name, (old, 0)) for values in (old, new)]  # old itself: it is no value of an attribute
            if values[0][0] is not values[1][0] or values[0][1] != values[1][1]:
                written.add(f"{type(item).__name__}.{name}")


def _attributes(item: Any) -> dict[str, tuple[Any, int]]:
    """The attributes of an object, and the buffers of a module, each with its count of writes, or of entries if it is a container."""
    is_module = isinstance(item, nn.Module)
    values = {name: value for name, value in vars(item).items() if not is_module or name not in _MODULE_ATTRIBUTES}
    if is_module:
        values |= buffers_of(item)

    def count(value: Any) -> int:
        if isinstance(value, Tensor):
            return version_of(value)
        return len(value) if isinstance(value, list | dict | set | deque) else 0

    return {name: (value, count(value)) for name, value in values.items()}


def reachable_objects(module: nn.Module) -> list[Any]:
    """Returns the module, its modules, and the modules (metrics in a list) and objects of the user's classes in their attributes."""
    objects: list[Any] = []
    seen: set[int] = set()
    waiting: list[Any] = [module]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list | tuple | set | deque):
            waiting += value
        elif isinstance(value, nn.Module) or _has_user_class(value):
            objects.append(value)
            waiting += value.children() if isinstance(value, nn.Module) else ()
            # Attributes with an underscore are Lightning's: above all the trainer.
            waiting += [attribute for name, attribute in vars(value).items() if not name.startswith("_")]
    return objects


def _has_user_class(value: Any) -> bool:
    if isinstance(value, type | ModuleType | FunctionType | MethodType | Tensor) or not hasattr(value, "__dict__"):
        return False
    package = type(value).__module__.partition(".")[0]
    return package not in _LIBRARIES and package not in sys.stdlib_module_names


def _content(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, np.ndarray) and (isinstance(value, np.memmap) or not value.flags.writeable):
        return None  # an array of a data set, which steps only read
    return copy(value) if isinstance(value, list | dict | set | deque | np.ndarray) else None


def _restore(value: Any, content: Any) -> None:
    if content is None:
        return
    if isinstance(value, Tensor):
        value.data.copy_(content)  # through .data, which leaves the version: changed buffers are found by it
    elif isinstance(value, list):
        value[:] = content
    elif isinstance(value, np.ndarray):
        value[...] = content
    else:
        value.clear()
        value.extend(content) if isinstance(value, deque) else value.update(content)
