"""What models of transformers record in their blocks: hidden states and the logits of routers, which they read after the blocks.

They are recorded by hooks of modules in the blocks, and so with this rank's tokens, and on the stage that runs the block. Import this
module only where a model is one of transformers'.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_overlap.decision import ConfigError
from lightning_overlap.model.block_pass import RemoteTensor
from lightning_overlap.transformers_seams import recorded_outputs


def leave_recorded(shape: torch.Size, leave: Callable[[Tensor], Tensor], remedy: str) -> None:
    """Gives what was recorded in the blocks all tokens, as the hidden states get them. Collective.

    Args:
        shape: of the hidden states in the blocks, with this rank's tokens and without features: ``(..., tokens)``.
        leave: gives hidden states of that shape all tokens.
        remedy: the setting with which tokens are not sharded, for the error.

    Raises:
        ConfigError: the model records attention weights.
    """

    def left(y: Tensor | None) -> Tensor | None:
        if y is None:  # of a layer that was not asked for
            return None
        if isinstance(y, RemoteTensor):
            y = y.current_pass.resolve(y.leaf)
        if y.shape[:-1] == shape:
            return leave(y)
        if y.dim() == 2 and len(y) == shape.numel():  # a router's: samples and tokens in one dim
            return leave(y.unflatten(0, shape)).flatten(0, -2)
        return y  # of a module that has all tokens

    for kind, outputs in recorded_outputs().items():
        if "attentions" in kind:
            raise ConfigError(
                f"the model is asked for output_{kind}, the weights of all pairs of tokens, of which this rank has a part or none. "
                f"Leave output_{kind} out, or {remedy}"
            )
        outputs[:] = map(left, outputs)


def count_recorded() -> dict[str, int]:
    """The number of outputs that are recorded so far, by kind."""
    return {kind: len(outputs) for kind, outputs in recorded_outputs().items()}


def recorded_since(counts: Mapping[str, int]) -> dict[str, list[Any]]:
    """The outputs that were recorded after a :func:`count_recorded`, by kind."""
    return {kind: outputs[counts[kind] :] for kind, outputs in recorded_outputs().items()}


def add_recorded(outputs: Mapping[str, list[Any]]) -> None:
    """Records outputs of a block that another stage runs, by kind."""
    for kind, recorded in recorded_outputs().items():
        recorded += outputs.get(kind, [])
