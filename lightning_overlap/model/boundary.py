"""The boundary of the block stack: tokens are sharded before the first block. After the last one they are gathered, or handed on as a
tensor that has the shape of all tokens and the values of this rank's (:mod:`~lightning_overlap.model.sharded_tokens`).

A mode that shards tokens registers a :class:`TokenCut`, which declares its nesting. The outer cut enters first and leaves last, in
whatever order the modes register:

    all tokens  ->  context  ->  sequence  ->  blocks  ->  sequence  ->  context  ->  all tokens

Cuts are hooks of the blocks. The pipeline is outside of them: it replaces the list of blocks
(:class:`~lightning_overlap.model.block_stack.BlockStack`). Embeddings see all tokens, unless what they give is sharded already.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_overlap.decision import ConfigError
from lightning_overlap.model.block_stack import BlockStack
from lightning_overlap.model.blocks import Blocks, is_from_transformers
from lightning_overlap.model.hidden_states import find_hidden, hidden_of, replace_hidden, with_hidden
from lightning_overlap.model.patches import Hook
from lightning_overlap.model.trees import replaced
from lightning_overlap.steps.forward import Forward, Forwards


class Nesting(IntEnum):
    """What a mode shards, from the outside to the inside. Modes shard the model in this order and restore it in the reverse order."""

    STAGES = 1
    """The list of blocks (pipeline parallelism). Inner modes see only the blocks of this rank."""
    TOKENS = 2
    """The tokens of a sequence (context parallelism)."""
    LAYERS = 3
    """The layers inside a block, and the tokens between these layers (tensor and sequence parallelism)."""
    EXPERTS = 4
    """The experts of the layers that have several (expert parallelism)."""
    PARAMETERS = 5
    """The flattened parameters that this rank holds after all outer modes (data parallelism)."""


class TokenCut(ABC):
    """Shards the tokens of hidden states, ``(..., tokens, features)``, between the first and the last block.

    Attributes:
        nesting: the position among several cuts; outer cuts have smaller numbers.
        remedy: the setting that turns this cut off, for errors: "set ...".
    """

    nesting: ClassVar[Nesting]
    remedy: ClassVar[str]

    @abstractmethod
    def enter(self, x: Tensor) -> Tensor:
        """Takes this rank's tokens from ``x``. Called before the first block.

        Args:
            x: hidden states with the tokens that the outer cuts gave this rank, ``(..., tokens, features)``.

        Returns:
            Hidden states with this rank's share of these tokens. The dtype and the other dims stay.
        """

    @abstractmethod
    def leave(self, x: Tensor) -> Tensor:
        """Hidden states in the shape of all tokens of this cut: gathered, or a stand-in. Called after the last block."""

    def shard_argument(self, x: Tensor) -> Tensor:
        """Takes this rank's part of another argument of a block (positions, rotary tables, a mask). Called before each block for each
        tensor except the hidden states; a tensor that does not depend on tokens is returned as it is."""
        return x

    def start_stack(self, x: Tensor, inputs: Any) -> None:  # noqa: B027  # optional
        """Prepares the way through the blocks. Called when the first block is called, on each rank: also where another one runs it.
        An activation checkpoint that calls the block again does not count.

        Args:
            x: the hidden states of the first block, which no cut has sharded. Where another rank runs it, they have no values.
            inputs: all arguments of the first block.
        """

    def start_block(self, block: nn.Module, x: Tensor, inputs: Any) -> None:  # noqa: B027  # optional
        """Checks the arguments of a block, and prepares its call. Called before each block, before this cut shards anything.

        Args:
            block: the block.
            x: its hidden states. At the first block, :meth:`enter` has not been called yet.
            inputs: all arguments, which the outer cuts have sharded.

        Raises:
            ConfigError: this cut does not support such arguments.
        """


@dataclass
class _Position:
    """How far one forward is in the stack of blocks."""

    is_inside: bool = False
    """The first block was called, and the last one has not returned yet."""
    is_in_block: bool = False
    """A block was called and has not returned yet."""
    shape: torch.Size | None = None
    """Of the hidden states of the last block so far, with this rank's tokens and without features; None before the first one."""


class Boundary:
    """Applies all cuts at the block stack of one model, during one fit.

    Attributes:
        forwards: the forwards under way, each with its state.
        has_remote_blocks: whether other ranks run some of the blocks. Then this rank may call neither the first nor the last block.
    """

    def __init__(self) -> None:
        self.forwards = Forwards()
        self.has_remote_blocks = False
        self._cuts: list[TokenCut] = []
        self._blocks: Sequence[nn.Module] = ()
        self._may_record = False
        self._hooks: list[Any] = []

    def make_stack(self, blocks: Blocks, name: str, *, has_remote_blocks: bool) -> BlockStack:
        """Replaces the list of blocks, for a pipeline.

        Args:
            blocks: the user's list.
            name: its name in the model.
            has_remote_blocks: whether other ranks run some of the blocks.
        """
        self.has_remote_blocks = has_remote_blocks
        return BlockStack(blocks, name, self._start_stack, self._finish_stack) if has_remote_blocks else BlockStack(blocks, name)

    def register(self, blocks: Sequence[nn.Module], cut: TokenCut) -> Callable[[], None]:
        """Adds a cut.

        Args:
            blocks: the blocks of the model, the same for every cut.
            cut: the cut.

        Returns:
            A function that removes the cut.
        """
        assert not self._cuts or list(blocks) == list(self._blocks), "the model has one stack of blocks"
        self._cuts = sorted([*self._cuts, cut], key=lambda cut: cut.nesting)
        if not self._hooks:
            self._install(blocks)

        def remove() -> None:
            self._cuts.remove(cut)
            if not self._cuts:
                for hook in self._hooks:
                    hook.remove()
                self._hooks.clear()

        return remove

    def _install(self, blocks: Sequence[nn.Module]) -> None:
        self._blocks = blocks
        self._may_record = any(map(is_from_transformers, blocks))
        for block in dict.fromkeys(blocks):
            self._hooks.append(block.register_forward_pre_hook(Hook(self._before_block), with_kwargs=True))
            self._hooks.append(block.register_forward_hook(Hook(self._after_block)))
        self._hooks.append(blocks[-1].register_forward_hook(Hook(self._after_last_block)))

    def _before_block(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        is_first = block is self._blocks[0]
        position, x = find_hidden(args, kwargs, "the first block" if is_first else "a block")
        # An activation checkpoint calls blocks during backward, after the forward has left the stack.
        if not is_first and not (self.has_remote_blocks or self.forwards.current.in_backward or self._position.is_inside):
            raise self._not_called("first", "each rank takes its part of the tokens before it")
        if is_first:
            self._position.is_inside = True
            if not (self.has_remote_blocks or self.forwards.current.in_backward):
                self._start_stack(x, (args, kwargs))
        for cut in self._cuts:
            cut.start_block(block, x, (args, kwargs))
            if type(cut).shard_argument is not TokenCut.shard_argument:
                args, kwargs = replaced((args, kwargs), partial(_shard_argument, cut, x))
            if is_first:
                x = cut.enter(x)
                args, kwargs = replace_hidden(args, kwargs, position, x)
        self._position.is_in_block = True
        return args, kwargs

    def _start_stack(self, x: Tensor, inputs: Any) -> None:
        for cut in self._cuts:
            cut.start_stack(x, inputs)

    def _finish_stack(self) -> None:
        """Another rank runs the last block: its hidden states come with all tokens, and what this rank's blocks have recorded not."""
        if self._cuts and self._position.shape is not None:
            self._leave_recorded(self._position.shape)

    def _after_block(self, block: nn.Module, args: Any, output: Any) -> None:
        self._position.is_in_block = False
        if self.has_remote_blocks:
            self._position.shape = hidden_of(output).shape[:-1]

    def _after_last_block(self, block: nn.Module, args: Any, output: Any) -> Any:
        x = self._leave(hidden_of(output))
        self._position.is_inside = False
        return with_hidden(output, x)

    def _leave(self, x: Tensor) -> Tensor:
        """All tokens of the last block's hidden states ``x``, and of what a model of transformers has recorded in the blocks."""
        left = self._leave_cuts(x)
        if left is not x:
            self._leave_recorded(x.shape[:-1])
        return left

    def _leave_cuts(self, x: Tensor) -> Tensor:
        for cut in reversed(self._cuts):
            x = cut.leave(x)
        return x

    def _leave_recorded(self, shape: torch.Size) -> None:
        if self._may_record:
            from lightning_overlap.model.recorded import leave_recorded  # which needs transformers

            leave_recorded(shape, self._leave_cuts, " and ".join(cut.remedy for cut in self._cuts))

    def is_cut(self, nesting: Nesting) -> bool:
        """Whether tokens are sharded at this position."""
        return any(cut.nesting == nesting for cut in self._cuts)

    # -- one forward -------------------------------------------------------------------------------------------------

    @property
    def _position(self) -> _Position:
        return self.forwards.current.of(_Position)

    def start_forward(self) -> Forward:
        """Starts the state of a new forward in this thread. Each mode with a cut may call it before the forward."""
        return self.forwards.start()

    def start_backward(self) -> None:
        """Marks the start of the backward of this thread's forward. Each mode with a cut calls it.

        Raises:
            ConfigError: the last block was not called.
        """
        self.require_outside()
        self.forwards.start_backward()

    def finish_backward(self) -> None:
        """Marks the end of the backward. Each mode with a cut calls it."""
        self._position.is_inside = False  # an activation checkpoint may have called the first block again
        self.forwards.finish_backward()

    def require_outside(self) -> None:
        """Checks that the forward is not between the first and the last block. Call it where code needs all tokens.

        Raises:
            ConfigError: the first block was called, and the last one was not.
        """
        if self._cuts and self._position.is_inside and not self.has_remote_blocks:
            raise self._not_called("last", "the ranks gather all tokens after it")

    def raise_if_between_blocks(self, error: Exception) -> None:
        """Call it when a forward has failed.

        Raises:
            ConfigError: it has failed outside of a block, after the first one was called and before the last one.
        """
        position = self._position
        if self._cuts and position.is_inside and not position.is_in_block and not self.has_remote_blocks:
            remedies = " and ".join(cut.remedy for cut in self._cuts)
            raise ConfigError(
                f"training_step failed after the first block and before the last one: {type(error).__name__}: {error}. There hidden "
                "states have this rank's tokens only, which do not fit tensors of all tokens (embeddings, labels). Use such tensors "
                f"before or after all blocks, call the last block in every step, or {remedies}"
            ) from error

    def _not_called(self, which: str, reason: str) -> ConfigError:
        remedies = " and ".join(cut.remedy for cut in self._cuts)
        return ConfigError(
            f"the {which} block was not called in this step, but {reason}. Call the {which} block in every step, or {remedies}"
        )


def _shard_argument(cut: TokenCut, hidden: Tensor, leaf: Any) -> Any:
    return cut.shard_argument(leaf) if isinstance(leaf, Tensor) and leaf is not hidden else leaf
