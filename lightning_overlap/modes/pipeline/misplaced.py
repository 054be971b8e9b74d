"""Finds parameters of other stages that a stage computes with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_overlap.decision import ConfigError
from lightning_overlap.model.block_pass import METADATA, Pass
from lightning_overlap.model.trees import leaves


class Misplaced(TorchFunctionMode):
    """Inside, records the absent parameters that a stage's forward reads where it computes results.

    Args:
        absent: by name, the parameters that only other ranks hold.
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

    def refuse(self, results: Iterable[Tensor], stage: int, blocks: str) -> None:
        """Refuses results that are NaN because a parameter is absent.

        Args:
            results: the tensors that the stage sends, or the loss.
            stage: its number.
            blocks: the name of the list of blocks.

        Raises:
            ConfigError: the stage has read an absent parameter, and a result is NaN.
        """
        if self._used and any(bool(x.isnan().any()) for x in results if x.is_floating_point()):
            names = list(self._used)
            more = f" and {len(names) - 4} more" if names[4:] else ""
            raise ConfigError(
                f"stage {stage} computes with {', '.join(names[:4])}{more}, of another stage: the first stage holds modules that are "
                f"registered before {blocks}, the last stage those after it. Register modules in the order of their use, tie a head "
                f"by `head.weight = tokens.weight`, or set pipeline_parallel.held_by_all: [{names[0]}]"
            )
