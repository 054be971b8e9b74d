"""Parameters that a stage computes with, and that other stages hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_overlap.decision import ConfigError
from lightning_overlap.model.block_pass import METADATA, Pass
from lightning_overlap.model.trees import leaves


class Misplaced(TorchFunctionMode):
    """Around a stage's forward: sees which parameters of other ranks what the stage makes is computed with.

    Args:
        absent: parameters that other ranks hold, by name.
        current_pass: the stage's pass.
    """

    def __init__(self, absent: Mapping[str, Tensor], current_pass: Pass) -> None:
        super().__init__()
        self._names = {id(parameter): name for name, parameter in absent.items()}
        self._pass = current_pass
        self._used: dict[str, None] = {}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._pass.progress.needs_parameters and function not in METADATA:
            self._used |= {self._names[id(leaf)]: None for leaf in leaves((args, kwargs or {})) if id(leaf) in self._names}
        return function(*args, **(kwargs or {}))

    def refuse(self, made: Iterable[Tensor], stage: int, blocks: str) -> None:
        """Refuses what is not a number for want of a parameter.

        Args:
            made: what the stage hands on, or the loss.
            stage: its number.
            blocks: the name of the list of blocks.

        Raises:
            ConfigError: it is so.
        """
        if self._used and any(bool(x.isnan().any()) for x in made if x.is_floating_point()):
            names = list(self._used)
            more = f" and {len(names) - 4} more" if names[4:] else ""
            raise ConfigError(
                f"stage {stage} computes with {', '.join(names[:4])}{more}, of another stage: what is registered before {blocks} is "
                "held by the first stage, what is registered after it by the last. Register modules in the order of their use, tie a "
                "head by `head.weight = tokens.weight`, or have every stage that does not hold it do so: "
                f"pipeline_parallel.held_by_all: [{names[0]}]"
            )
