"""Changes to a user's modules that can be undone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from lightning_overlap.model.patches import Hook, ReplacedForward


class Patches:
    """Changes modules and parameters, and undoes all changes at once."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], object]] = []

    def __bool__(self) -> bool:
        """Whether anything is changed."""
        return bool(self._undo)

    def add(self, *undo: Callable[[], object]) -> None:
        """Adds functions that undo changes made elsewhere."""
        self._undo += undo

    def replace(self, module: nn.Module, name: str, value: Any) -> None:
        """Sets an attribute of a module."""
        before = vars(module).get(name, self)
        setattr(module, name, ReplacedForward(module, value) if name == "forward" else value)
        self.add(lambda: delattr(module, name) if before is self else setattr(module, name, before))

    def hook(self, register: Callable[..., Any], function: Callable[..., Any], **options: bool) -> None:
        """Registers a hook.

        Args:
            register: the module's method (``register_forward_hook``).
            function: the hook.
            options: of ``register``.
        """
        self.add(register(Hook(function), **options).remove)

    def mark(self, parameter: nn.Parameter, marker: str) -> None:
        """Sets a marker on a parameter, see :mod:`lightning_overlap.model.markers`."""
        setattr(parameter, marker, True)
        self.add(lambda: vars(parameter).pop(marker, None))

    def undo(self) -> None:
        """Undoes all changes, the last one first."""
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()
