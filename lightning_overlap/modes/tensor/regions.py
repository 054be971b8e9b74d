"""Attention and mlp regions of a cut model: what they read, what their row layers give, and how tokens enter and leave the blocks.

What one forward leaves for its next step (which row layer ran, what was prepared) is in a state of that forward, see
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
from lightning_overlap.modes.tensor.linear import Prepared, Reading, alike, matrix, prepare, read, row_product
from lightning_overlap.modes.tensor.random_state import CommonNumbers
from lightning_overlap.modes.tensor.sequence import enter, leave
from lightning_overlap.modes.tensor.userbuffers import UserbuffersLayers


@dataclass
class RegionState:
    """What regions remember in one forward.

    Attributes:
        tokens: of the whole sequence that has entered the blocks.
        row: name of the row layer that ran last; empty after the entry.
        region: name of the region that read last.
        prepared: a region whose reading is prepared, and the reading.
        latest: by region, its reading and this rank's tokens of it, until its row layer runs.
    """

    tokens: int = 0
    row: str = ""
    region: str = ""
    prepared: tuple[str, Prepared] | None = None
    latest: dict[str, tuple[Reading, Tensor]] = field(default_factory=dict)


class Regions:
    """Runs the regions of one model.

    Args:
        exchange: the ranks, and how they exchange tokens.
        boundary: of the blocks.
        numbers: random numbers that the ranks share.
        fused: torch's operators on symmetric memory; None: not that backend.
        engine: Transformer Engine's; None: not that backend.

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
        """By row layer, the region that reads next: learnt from earlier forwards."""

    @property
    def state(self) -> RegionState:
        """Of the forward that this thread computes."""
        return self.boundary.forwards.current.of(RegionState)

    def tokens_of(self, x: Tensor, name: str) -> int:
        """The number of all tokens, of which hidden states ``(..., tokens, features)`` have this rank's.

        Args:
            x: the hidden states.
            name: of the region or block that gets them, for errors.

        Raises:
            ConfigError: they are no part of what has entered the blocks.
        """
        group = self.exchange.group
        if not self.exchange.scattered:
            return x.shape[-2]
        if self.boundary.has_remote_blocks:  # the blocks of a stage get what another stage has sent
            return x.shape[-2] * group.size
        tokens = self.state.tokens
        low, high = self.exchange.parts(tokens)[group.rank : group.rank + 2]
        if x.shape[-2] != high - low:
            raise ConfigError(
                f"{name} is called with {x.shape[-2]} tokens, where rank {group.rank} has {high - low} of the {tokens} that have "
                "entered the blocks: with sequence_parallel blocks run one after the other, from the first one on, on one sequence. "
                "Set tensor_parallel.sequence_parallel: false"
            )
        return tokens

    # -- reading -----------------------------------------------------------------------------------------------------

    def before_region(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """A region's arguments, with hidden states whose tokens of all ranks arrive while they are read. A forward pre-hook."""
        position, x = find_hidden(args, kwargs, name)
        refuse_second_input(x, (args, kwargs), f"{name} is", "leave it out of the parallel_plan")
        tokens = self.tokens_of(x, name)
        self.state.region = name
        return replace_hidden(args, kwargs, position, self._read(name, x, tokens, module))

    def _read(self, name: str, x: Tensor, tokens: int, module: nn.Module) -> Tensor:
        columns = self.columns[name]
        if self._fused is not None and symm_mem.fits(tokens, self.exchange):
            return symm_mem.read(x, columns, self._fused, self.exchange, name)
        if self._engine is not None and self.has_trained:  # a validation before the first step may have batches of another size
            self._engine.start(x, tokens)
        if self._engine is not None and self._engine.fits((*x.shape[:-2], tokens), x.shape[-1], x, columns):
            return self._engine.read(x, columns, tokens, name)
        handle = read(x, columns, self._reading(name), tokens)
        gathers_again = self.exchange.scattered and not self.exchange.keep_gathered and torch.is_grad_enabled()
        if gathers_again and any(layer.weight.requires_grad for layer in columns):
            self.state.latest[name] = (handle.reading, handle.gathered.own)
        if not self.exchange.scattered and module.training:
            self._numbers.start()
        return handle

    def _reading(self, region: str) -> Prepared:
        state = self.state
        self._next[state.row] = region
        prepared, state.prepared = state.prepared, None
        if prepared is not None and prepared[0] == region and torch.is_grad_enabled():
            return prepared[1]
        return prepare(self.columns[region], self.exchange, region)

    def prepare_next(self, row: str) -> None:
        """Prepares the reading that comes after a row layer, or after the entry (an empty name), if an earlier forward tells which."""
        state = self.state
        state.row = row
        region = self._next.get(row)
        if region is not None and self.exchange.scattered and self.exchange.overlapped and torch.is_grad_enabled():
            state.prepared = region, prepare(self.columns[region], self.exchange, region)

    def after_region(self, module: nn.Module, args: Any, output: Any) -> Any:
        """A region's output. What it gives beside its row layers' output gets its share of the gradient. A forward hook."""
        if not torch.is_grad_enabled():
            return output
        size = self.exchange.group.size
        for part in module.modules():
            tensors = {name: value for name, value in vars(part).items() if isinstance(value, Tensor)}
            vars(part).update({name: alike(value, size) for name, value in tensors.items()})
        return (output[0], *(alike(x, size) for x in output[1:])) if isinstance(output, tuple) else output

    # -- row layers --------------------------------------------------------------------------------------------------

    def row_forward(self, layer: nn.Module, name: str) -> Callable[[Tensor], Tensor]:
        """The forward of a row layer."""
        around = max((region for region in self.columns if name.startswith(f"{region}.")), key=len, default="")

        def forward(x: Tensor) -> Tensor:
            state = self.state
            region = around or state.region
            reading, own = state.latest.pop(region, None) or (None, None)
            if self._fused is not None and symm_mem.fits(x.shape[-2], self.exchange):
                return symm_mem.row_product(x, layer, self._fused)
            if self._engine is not None and self._engine.fits(x.shape[:-1], matrix(layer).shape[0], x, [layer]):
                return self._engine.row_product(x, layer, name, region)
            between = partial(self.prepare_next, name)
            y = row_product(x, layer, self.exchange, name, reading=reading, own=own, between=between)
            if not self.exchange.scattered:
                self._numbers.stop()  # from here on all ranks have the same activations again
            return y

        return forward


class SequenceCut(TokenCut):
    """Each rank has its part of the tokens between the first and the last block. See :mod:`lightning_overlap.modes.tensor.sequence`.

    Args:
        regions: inside the blocks.
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
                f"a sequence of {tokens} tokens is not divisible by tensor_parallel.size={self._exchange.group.size}, which it must "
                "be with sequence_parallel in a pipeline: pad it, or set tensor_parallel.sequence_parallel: false"
            )
        return enter(x, self._exchange, partial(self._regions.prepare_next, ""))

    def leave(self, x: Tensor) -> Tensor:
        tokens = x.shape[-2] * self._exchange.group.size if self._boundary.has_remote_blocks else self._regions.state.tokens
        return leave(x, tokens, self._exchange)

    def start_block(self, block: nn.Module, x: Tensor, inputs: Any) -> None:
        if block.training:
            self._numbers.start()
        refuse_second_input(x, inputs, "a block is", self.remedy)


def refuse_second_input(x: Tensor, inputs: Any, who: str, remedy: str) -> None:
    """Refuses tensors beside the hidden states through which gradients flow.

    Args:
        x: the hidden states.
        inputs: all arguments.
        who: is called, with a verb.
        remedy: what to do, for the error.

    Raises:
        ConfigError: there is one.
    """
    for other in leaves(inputs):
        if isinstance(other, Tensor) and other is not x and other.requires_grad:
            raise ConfigError(
                f"{who} called with a second tensor that gradients flow through (cross-attention, a learned bias or condition, "
                f"say), of whose gradient a rank would have a part only: {remedy}"
            )
