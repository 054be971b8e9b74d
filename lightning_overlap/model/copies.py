"""Copies of a user's module that run apart from it."""

from __future__ import annotations

import copy
from itertools import chain
from typing import Any

from torch import nn


def copy_without_hooks(module: nn.Module) -> nn.Module:
    """A copy of a module without any hooks."""
    return _without_hooks(copy.deepcopy(module))


def copy_to_meta(module: nn.Module) -> nn.Module:
    """A copy of a module without any hooks, whose parameters and buffers are on the meta device. It takes no memory for them."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(p.detach().to("meta"), requires_grad=p.is_floating_point()) for p in module.parameters()
    }
    memo |= {id(buffer): buffer.to("meta") for buffer in module.buffers()}
    return _without_hooks(copy.deepcopy(module, memo))


def hooks_of(module: nn.Module) -> list[Any]:
    """The dictionaries of a module's hooks."""
    names = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    return [getattr(module, name) for name in names]


def _without_hooks(module: nn.Module) -> nn.Module:
    for hooks in chain.from_iterable(map(hooks_of, module.modules())):
        hooks.clear()
    return module
