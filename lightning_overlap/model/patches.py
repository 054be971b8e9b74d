"""Replaced forwards and hooks of sharded modules. Copies and pickles of a module have neither: they are ordinary modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class ReplacedForward:
    """Replaces the ``forward`` of a module. It is never compiled, because it communicates.

    Args:
        module: the user's module.
        function: the new forward.
    """

    def __init__(self, module: nn.Module, function: Callable[..., Any]) -> None:
        self._module, self._function = module, function
        self._before = vars(module).get("forward")
        self.__wrapped__ = function  # inspect.signature follows it

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (_identity, (self._before,)) if self._before is not None else (getattr, (self._module, "forward"))


class Hook:
    """A hook of a module. It is never compiled, because it communicates."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _no_hook, ()


def _identity(value: Any) -> Any:
    return value


def _no_hook() -> Callable[..., None]:
    return _do_nothing


def _do_nothing(*_: Any, **__: Any) -> None:
    """The hook of a copy."""
