"""Runs a step and leaves the user's objects as they were: modules, metrics, counters, lists, whatever a step may write to."""

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

from lightning_overlap.torch_seams import buffers_of

_OF_MODULES = frozenset(vars(nn.Module()))
_LIBRARIES = frozenset({"torch", "lightning", "pytorch_lightning", "transformers", "tokenizers", "numpy", "builtins", "functools"})
"""Packages whose objects, modules aside, are not gone into: a step does not write to their attributes."""


@contextmanager
def unchanged(parts: Sequence[Any]) -> Iterator[None]:
    """Buffers and attributes of these modules and objects are afterwards what they were; tensors and containers by their content."""
    kept: list[tuple[dict[str, Any], str, Any, Any]] = []
    for part in parts:
        own = {name: value for name, value in vars(part).items() if name not in _OF_MODULES or not isinstance(part, nn.Module)}
        values = [(vars(part), own)]
        if isinstance(part, nn.Module):
            values.append((buffers_of(part), dict(buffers_of(part))))
        kept += [(store, name, value, _content(value)) for store, named in values for name, value in named.items()]
    stores = [store for part in parts for store in (vars(part), *([buffers_of(part)] if isinstance(part, nn.Module) else ()))]
    before = [(store, set(store)) for store in stores]
    try:
        yield
    finally:
        for store, names in before:
            for name in set(store) - names:
                del store[name]
        for store, name, value, content in kept:
            store[name] = value
            _restore(value, content)


def within_reach(module: nn.Module) -> list[Any]:
    """The module's modules, and modules (metrics in a list) and objects of the user's own classes that their attributes hold."""
    parts: list[Any] = []
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
        elif isinstance(value, nn.Module) or _is_the_users(value):
            parts.append(value)
            waiting += value.children() if isinstance(value, nn.Module) else ()
            # Names with an underscore hold what belongs to Lightning: the trainer, above all.
            waiting += [held for name, held in vars(value).items() if not name.startswith("_")]
    return parts


def _is_the_users(value: Any) -> bool:
    if isinstance(value, type | ModuleType | FunctionType | MethodType | Tensor) or not hasattr(value, "__dict__"):
        return False
    package = type(value).__module__.partition(".")[0]
    return package not in _LIBRARIES and package not in sys.stdlib_module_names


def _content(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, np.ndarray) and (isinstance(value, np.memmap) or not value.flags.writeable):
        return None  # a data set's, which is read
    return copy(value) if isinstance(value, list | dict | set | deque | np.ndarray) else None


def _restore(value: Any, content: Any) -> None:
    if content is None:
        return
    if isinstance(value, Tensor):
        value.data.copy_(content)  # not counted as a change: buffers that steps change are found by that
    elif isinstance(value, list):
        value[:] = content
    elif isinstance(value, np.ndarray):
        value[...] = content
    else:
        value.clear()
        value.extend(content) if isinstance(value, deque) else value.update(content)
