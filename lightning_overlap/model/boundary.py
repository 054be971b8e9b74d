"""The boundary of the block stack: the one place where hidden states enter and leave the stack.

Modes register what they cut, with a nesting that they declare. Whatever the order of registration, the outer cut enters first and
leaves last:

    whole sequence  ->  pipeline  ->  context  ->  sequence  ->  blocks  ->  sequence  ->  context  ->  pipeline  ->  whole sequence

The pipeline lends the list of blocks stand-ins (:class:`~lightning_overlap.model.block_stack.BlockStack`), which call the blocks; the
other cuts are hooks of the blocks, and so inside the pipeline's. Embeddings and the loss see whole sequences.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

from lightning_overlap.decision import ConfigError
from lightning_overlap.model.block_stack import BlockStack
from lightning_overlap.model.blocks import Blocks
from lightning_overlap.model.hidden_states import find_hidden, hidden_of, replace_hidden, with_hidden
from lightning_overlap.model.patches import Hook
from lightning_overlap.model.trees import replaced
from lightning_overlap.steps.forward import Forward, Forwards


class Nesting(IntEnum):
    """What a mode cuts, from the outside to the inside. Modes are applied in this order, and undone in the reverse order."""

    STAGES = 1
    """The list of blocks: other modes see the blocks of this rank only."""
    TOKENS = 2
    """The tokens of a sequence (context parallelism)."""
    LAYERS = 3
    """The layers inside a block, and the tokens between these layers (tensor and sequence parallelism)."""
    PARAMETERS = 4
    """The parameters that are left, flattened (data parallelism)."""


class TokenCut(ABC):
    """How a mode cuts the tokens of hidden states, ``(..., tokens, features)``, between the first and the last block.

    Attributes:
        nesting: outer cuts have smaller ones.
        remedy: what to set so that tokens are not cut, for errors.
    """

    nesting: ClassVar[Nesting]
    remedy: ClassVar[str]

    @abstractmethod
    def enter(self, x: Tensor) -> Tensor:
        """This rank's tokens of hidden states. Called before the first block."""

    @abstractmethod
    def leave(self, x: Tensor) -> Tensor:
        """All tokens of hidden states of which this rank has its part. Called after the last block."""

    def cut_argument(self, x: Tensor) -> Tensor:
        """This rank's part of another tensor that a block is called with (positions, rotary tables, a mask). Called at every block."""
        return x

    def start_block(self, block: nn.Module, x: Tensor, inputs: Any) -> None:  # noqa: B027  # optional
        """Called before each block, with what the cuts around this one leave of its arguments.

        Args:
            block: the block.
            x: its hidden states; before the first block, before they enter.
            inputs: all arguments.

        Raises:
            ConfigError: tokens cannot be cut with such arguments.
        """


@dataclass
class _Passage:
    """A forward's way through the stack."""

    is_inside: bool = False
    """The first block was called, and the last one has not returned."""


class Boundary:
    """The boundary of one model's block stack, during one fit.

    Attributes:
        forwards: tells hooks which forward they are called for.
        is_spread: whether other ranks run some of the blocks: then this rank may see neither the first nor the last one.
    """

    def __init__(self) -> None:
        self.forwards = Forwards()
        self.is_spread = False
        self._cuts: list[TokenCut] = []
        self._blocks: Sequence[nn.Module] = ()
        self._hooks: list[Any] = []

    def lend_stack(self, blocks: Blocks, name: str, *, spread: bool) -> BlockStack:
        """Stand-ins for the blocks: the outermost cut, a pipeline's.

        Args:
            blocks: the list of blocks.
            name: of the list in the model.
            spread: whether other ranks run some of the blocks.
        """
        self.is_spread = spread
        return BlockStack(blocks, name)

    def register(self, blocks: Sequence[nn.Module], cut: TokenCut) -> Callable[[], None]:
        """Cuts tokens at the blocks from here on.

        Args:
            blocks: of the model, the same for every cut.
            cut: how.

        Returns:
            A function that takes the cut away.
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
        for block in dict.fromkeys(blocks):
            self._hooks.append(block.register_forward_pre_hook(Hook(self._before_block), with_kwargs=True))
        self._hooks.append(blocks[-1].register_forward_hook(Hook(self._after_last_block)))

    def _before_block(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        is_first = block is self._blocks[0]
        position, x = find_hidden(args, kwargs, "the first block" if is_first else "a block")
        # An activation checkpoint calls blocks in backward, when the forward has left them.
        if not is_first and not (self.is_spread or self.forwards.current.in_backward or self._passage.is_inside):
            raise self._left_out("first")
        if is_first:
            self._passage.is_inside = True
        for cut in self._cuts:
            cut.start_block(block, x, (args, kwargs))
            if type(cut).cut_argument is not TokenCut.cut_argument:
                args, kwargs = replaced((args, kwargs), partial(_cut_argument, cut, x))
            if is_first:
                x = cut.enter(x)
                args, kwargs = replace_hidden(args, kwargs, position, x)
        return args, kwargs

    def _after_last_block(self, block: nn.Module, args: Any, output: Any) -> Any:
        x = hidden_of(output)
        for cut in reversed(self._cuts):
            x = cut.leave(x)
        self._passage.is_inside = False
        return with_hidden(output, x)

    # -- one forward -------------------------------------------------------------------------------------------------

    @property
    def _passage(self) -> _Passage:
        return self.forwards.current.of(_Passage)

    def start_forward(self) -> Forward:
        """A new forward starts in this thread. Each mode with a cut may call it, before the forward."""
        return self.forwards.start()

    def start_backward(self) -> None:
        """The backward of this thread's forward starts. Each mode with a cut calls it.

        Raises:
            ConfigError: the forward has not left the blocks.
        """
        self.refuse_inside()
        self.forwards.start_backward()

    def finish_backward(self) -> None:
        """The backward is over. Each mode with a cut calls it."""
        self._passage.is_inside = False  # what activation checkpoints have run again
        self.forwards.finish_backward()

    def refuse_inside(self) -> None:
        """Called where all tokens are read.

        Raises:
            ConfigError: the forward has entered the blocks and not left them.
        """
        if self._cuts and self._passage.is_inside and not self.is_spread:
            raise self._left_out("last")

    def _left_out(self, which: str) -> ConfigError:
        return ConfigError(
            f"the {which} block was left out in this step, and it is where a rank takes, or gives back, its part of the tokens: run "
            f"the {which} block always, or {self._cuts[-1].remedy}"
        )


def _cut_argument(cut: TokenCut, hidden: Tensor, leaf: Any) -> Any:
    return cut.cut_argument(leaf) if isinstance(leaf, Tensor) and leaf is not hidden else leaf
