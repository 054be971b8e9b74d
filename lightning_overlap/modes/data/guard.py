"""Reading a parameter completes it, wherever the reader stands.

While a bucket is gathered under the next forward, its weights are partly old. Waiting in a forward pre-hook of the module
that owns them is not enough: ``nn.MultiheadAttention`` reads its child's weight without calling the child, tied heads read
``embedding.weight``, callbacks copy weights for averages. All of them go through ``module._parameters``, so that is where
the wait is. (DeepSpeed's ZeRO-3 intercepts the same place for parameters that are used outside their module.)
"""

from __future__ import annotations

from collections.abc import Callable, Sized
from typing import Any

from torch import nn
from torch.compiler import is_compiling


class GuardedParameters(dict[str, "nn.Parameter | None"]):
    """``module._parameters`` that calls ``complete(parameter)`` before it gives one away, while ``incomplete`` is not empty."""

    def __init__(self, plain: dict[str, nn.Parameter | None], incomplete: Sized, complete: Callable[[nn.Parameter], None]) -> None:
        super().__init__(plain)
        self._incomplete = incomplete
        self._complete = complete

    def _checked(self, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is not None and not is_compiling() and self._incomplete:
            self._complete(parameter)
        return parameter

    def __getitem__(self, name: str) -> nn.Parameter | None:
        return self._checked(super().__getitem__(name))

    def get(self, name: str, default: Any = None) -> Any:
        return self._checked(super().get(name, default))

    def values(self) -> Any:
        if is_compiling():  # what was compiled begins with complete weights
            return super().values()
        for parameter in super().values():
            self._checked(parameter)
        return super().values()

    def items(self) -> Any:
        self.values()
        return super().items()

    def __reduce__(self) -> Any:
        # A copy or a pickle of the module is an ordinary module.
        return dict, (dict(self.items()),)


class CompleteBefore:
    """A forward pre-hook that completes all of a module's parameters. Copies and pickles of the module do without."""

    def __init__(self, parameters: GuardedParameters) -> None:
        self._parameters = parameters

    def __call__(self, module: nn.Module, args: Any) -> None:
        self._parameters.values()

    def __reduce__(self) -> Any:
        return CompleteBefore, (GuardedParameters({}, (), _nothing),)


def _nothing(parameter: nn.Parameter) -> None:
    """What completes nothing."""
