"""Runs the attention and mlp regions of a sharded model: gathers their inputs, reduces their outputs, and shards tokens in between.

A :class:`RegionState` passes facts from one region to the next (the last row layer, a prepared input). Each forward has its own, see
:class:`lightning_overlap.steps.forward.Forward`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_overlap.decision import ConfigError
from lightning_overlap.model.boundary import Boundary, Nesting, TokenCut
from lightning_overlap.model.hidden_states import find_hidden, replace_hidden
from lightning_overlap.model.trees import leaves
from lightning_overlap.modes.tensor import symm_mem
from lightning_overlap.modes.tensor.gemm import Exchange
from lightning_overlap.modes.tensor.linear import (
    InputState,
    PreparedInput,
    gather_input,
    matrix,
    prepare_input,
    scale_gradient,
)
from lightning_overlap.modes.tensor.random_state import CommonNumbers
from lightning_overlap.modes.tensor.row import row_product
from lightning_overlap.modes.tensor.sequence import gather_tokens, scatter_tokens
from lightning_overlap.modes.tensor.userbuffers import UserbuffersLayers


@dataclass
class RegionState:
    """State of one forward that its regions share.

    Attributes:
        tokens: the number of all tokens of the sequence that has entered the blocks.
        row: name of the last row layer; empty before the first one.
        region: name of the last region that has gathered its input.
        prepared: a region and its prepared input; None: nothing is prepared.
        inputs: by region, the state of its input and this rank's tokens of it, until its row layer runs.
    """

    tokens: int = 0
    row: str = ""
    region: str = ""
    prepared: tuple[str, PreparedInput] | None = None
    inputs: dict[str, tuple[InputState, Tensor]] = field(default_factory=dict)


class Regions:
    """Runs the regions of one model.

    Args:
        exchange: the ranks, and how they exchange tokens.
        boundary: of the block stack.
        numbers: random numbers that the ranks share.
        fused: the operators of the backend ``symm_mem``; None: another backend.
        engine: the layers of the backend ``userbuffers``; None: another backend.

    Attributes:
        columns: by name of a region, its column layers.
        has_trained: whether a training step has started.
    """

    def __init__(
        self,
        exchange: Exchange,
        boundary: Boundary,
        numbers: CommonNumbers,
        fused: symm_mem.Operators | None,
        engine: UserbuffersLayers | None,
    ) -> None:
        self.columns: Mapping[str, Sequence[nn.Module]] = {}
        self.has_trained = False
        self.exchange = exchange
        self.boundary = boundary
        self._numbers = numbers
        self._fused = fused
        self._engine = engine
        self._next: dict[str, str] = {}
        """By row layer, the region after it: learnt from earlier forwards."""

    @property
    def state(self) -> RegionState:
        """The state of the forward that this thread computes."""
        return self.boundary.forwards.current.of(RegionState)

    def tokens_of(self, x: Tensor, name: str) -> int:
        """The number of all tokens, if ``x`` has this rank's.

        Args:
            x: hidden states, ``(..., local tokens, features)``.
            name: of the region or block that is called with them, for errors.

        Raises:
            ConfigError: ``x`` has another number of tokens than this rank's part of the sequence that has entered the blocks.
        """
        group = self.exchange.group
        if not self.exchange.sharded:
            return x.shape[-2]
        if self.boundary.has_remote_blocks:  # a stage receives hidden states that are sharded already
            return x.shape[-2] * group.size
        tokens = self.state.tokens
        low, high = self.exchange.bounds(tokens)[group.rank : group.rank + 2]
        if x.shape[-2] != high - low:
            raise ConfigError(
                f"{name} got {x.shape[-2]} tokens, but rank {group.rank} should have {high - low} of {tokens}: with sequence_parallel "
                "the blocks must run one after the other, from the first one, on the same sequence. Or set "
                "tensor_parallel.sequence_parallel: false"
            )
        return tokens

    # -- inputs ------------------------------------------------------------------------------------------------------

    def before_region(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Gathers the hidden states in a region's arguments. A forward pre-hook."""
        position, x = find_hidden(args, kwargs, name)
        refuse_second_input(x, (args, kwargs), name, "leave it out of the parallel_plan")
        tokens = self.tokens_of(x, name)
        self.state.region = name
        return replace_hidden(args, kwargs, position, self._gather(name, x, tokens, module))

    def _gather(self, name: str, x: Tensor, tokens: int, module: nn.Module) -> Tensor:
        """A region's input of all tokens, by the first backend that can gather it."""
        columns = self.columns[name]
        if self._fused is not None and symm_mem.fits(tokens, self.exchange):
            return symm_mem.gather_input(x, columns, self._fused, self.exchange, name)
        if self._engine is not None and self.has_trained:  # a validation before the first step may have batches of another size
            self._engine.start(x, tokens)
        if self._engine is not None and self._engine.fits((*x.shape[:-2], tokens), x.shape[-1], x, columns):
            return self._engine.gather_input(x, columns, tokens, name)
        pending = gather_input(x, columns, self._prepared(name), tokens)
        gathers_again = self.exchange.sharded and not self.exchange.keep_gathered and torch.is_grad_enabled()
        if gathers_again and any(layer.weight.requires_grad for layer in columns):
            self.state.inputs[name] = (pending.state, pending.gathered.local)
        if not self.exchange.sharded and module.training:
            self._numbers.start()
        return pending

    def _prepared(self, region: str) -> PreparedInput:
        state = self.state
        self._next[state.row] = region
        prepared, state.prepared = state.prepared, None
        if prepared is not None and prepared[0] == region and torch.is_grad_enabled():
            return prepared[1]
        return prepare_input(self.columns[region], self.exchange, region)

    def prepare_next(self, row: str) -> None:
        """Prepares the input of the region after a row layer (empty name: the first region), if an earlier forward has shown it."""
        state = self.state
        state.row = row
        region = self._next.get(row)
        if region is not None and self.exchange.sharded and self.exchange.overlapped and torch.is_grad_enabled():
            state.prepared = region, prepare_input(self.columns[region], self.exchange, region)

    def after_region(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Scales the gradients of a region's outputs that are not a row layer's, see :func:`scale_gradient`. A forward hook."""
        if not torch.is_grad_enabled():
            return output
        size = self.exchange.group.size
        for part in module.modules():
            tensors = {name: value for name, value in vars(part).items() if isinstance(value, Tensor)}
            vars(part).update({name: scale_gradient(value, size) for name, value in tensors.items()})
        return (output[0], *(scale_gradient(x, size) for x in output[1:])) if isinstance(output, tuple) else output

    # -- row layers --------------------------------------------------------------------------------------------------

    def row_forward(self, layer: nn.Module, name: str) -> Callable[[Tensor], Tensor]:
        """Makes the forward of a row layer."""
        parent = max((region for region in self.columns if name.startswith(f"{region}.")), key=len, default="")

        def forward(x: Tensor) -> Tensor:
            state = self.state
            region = parent or state.region
            input_state, local_input = state.inputs.pop(region, None) or (None, None)
            if self._fused is not None and symm_mem.fits(x.shape[-2], self.exchange):
                return symm_mem.row_product(x, layer, self._fused)
            if self._engine is not None and self._engine.fits(x.shape[:-1], matrix(layer).shape[0], x, [layer]):
                return self._engine.row_product(x, layer, name, region)
            between = partial(self.prepare_next, name)
            y = row_product(x, layer, self.exchange, name, input_state=input_state, local_input=local_input, between=between)
            if not self.exchange.sharded:
                self._numbers.stop()  # from here on all ranks have the same activations again
            return y

        return forward


class SequenceCut(TokenCut):
    """Shards the tokens between the first and the last block. See :mod:`lightning_overlap.modes.tensor.sequence`.

    Args:
        regions: the regions in the blocks.
        numbers: random numbers that the ranks share.
    """

    nesting = Nesting.LAYERS
    remedy = "set tensor_parallel.sequence_parallel: false"

    def __init__(self, regions: Regions, numbers: CommonNumbers) -> None:
        self._regions, self._numbers = regions, numbers
        self._exchange, self._boundary = regions.exchange, regions.boundary

    def enter(self, x: Tensor) -> Tensor:
        tokens = self._regions.state.tokens = x.shape[-2]
        if self._boundary.has_remote_blocks and tokens % self._exchange.group.size:
            raise ConfigError(
                f"a sequence of {tokens} tokens is not divisible by tensor_parallel.size={self._exchange.group.size}. In a pipeline "
                "sequence_parallel needs that: pad the sequence, or set tensor_parallel.sequence_parallel: false"
            )
        return scatter_tokens(x, self._exchange, partial(self._regions.prepare_next, ""))

    def leave(self, x: Tensor) -> Tensor:
        tokens = x.shape[-2] * self._exchange.group.size if self._boundary.has_remote_blocks else self._regions.state.tokens
        return gather_tokens(x, tokens, self._exchange)

    def start_block(self, block: nn.Module, x: Tensor, inputs: Any) -> None:
        if block.training:
            self._numbers.start()
        refuse_second_input(x, inputs, "a block", self.remedy)


def refuse_second_input(x: Tensor, inputs: Any, who: str, remedy: str) -> None:
    """Refuses a second tensor that needs a gradient.

    Args:
        x: the hidden states.
        inputs: all arguments.
        who: the name of what is called with them.
        remedy: what to do, for the error.

    Raises:
        ConfigError: a tensor other than ``x`` needs a gradient.
    """
    for other in leaves(inputs):
        if isinstance(other, Tensor) and other is not x and other.requires_grad:
            raise ConfigError(
                f"{who} is called with a second tensor that needs a gradient (cross-attention, a learned bias or condition, say). "
                f"Each rank would have only a part of that gradient: {remedy}"
            )
