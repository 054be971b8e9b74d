"""A rank that has a part of the model gives nobody that part for the whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from lightning_overlap.decision import ConfigError


class WholeStateOnly:
    """Refuses ``state_dict()`` of a module and of what is in it, and so ``save_pretrained()``, but inside :meth:`allowed`.

    Args:
        module: of which this rank has a part, until :meth:`remove`.
    """

    def __init__(self, module: nn.Module) -> None:
        self._allowed = False
        self._hooks = [part.register_state_dict_pre_hook(self._refuse) for part in module.modules()]

    @contextmanager
    def allowed(self) -> Iterator[None]:
        """Around what puts the parts together."""
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
                f"state_dict() of {type(module).__name__} is asked for in the middle of a fit, or of a copy that was made in one, and "
                "this rank has its part of the model only: call trainer.save_checkpoint(path), or "
                "trainer.strategy.lightning_module_state_dict(), on all ranks: it gives rank 0 the whole; or do it in on_fit_end, "
                "when every rank has the whole model"
            )
