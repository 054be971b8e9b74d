"""Refuses ``state_dict()`` during a fit on a rank that has only a part of the model, so that no part is saved as the whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from lightning_overlap.decision import ConfigError


class StateGuard:
    """Refuses ``state_dict()`` of a module and its submodules, and so ``save_pretrained()``, outside of :meth:`allowed`.

    Args:
        module: the user's module, of which this rank has a part until :meth:`remove`.
    """

    def __init__(self, module: nn.Module) -> None:
        self._allowed = False
        self._hooks = [part.register_state_dict_pre_hook(self._refuse) for part in module.modules()]

    @contextmanager
    def allowed(self) -> Iterator[None]:
        """Encloses calls that assemble the unsharded state."""
        before, self._allowed = self._allowed, True
        try:
            yield
        finally:
            self._allowed = before

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _refuse(self, module: nn.Module, *_: Any) -> None:
        if not self._allowed:
            raise ConfigError(
                f"state_dict() of {type(module).__name__} was called during a fit, or of a copy made in one, and this rank has only "
                "its part of the model. Call trainer.save_checkpoint(path) or trainer.strategy.lightning_module_state_dict() on all "
                "ranks: rank 0 gets the unsharded state. Or call it in on_fit_end, when every rank has the unsharded model"
            )
