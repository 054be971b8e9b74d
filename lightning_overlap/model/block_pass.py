"""A pass: one forward of the user's model on one rank, which runs some of the blocks and stands in for the others.

In a pipeline every rank calls the user's forward, but runs only the blocks of its stage. The others are *remote* blocks: another
stage runs them. A pass receives their outputs before it needs them, and keeps those of its own outputs that it has to send::

    the user's loop calls         | block 0 | block 1 | block 2 | block 3 | block 4 ...
    the pass of blocks 2 and 3    | remote  | remote  | run     | run     | the forward ends
                                            receives ^                   ^ keeps, to send

A remote block returns the tensors that were received (the hidden states that block 2 needs, a position bias that all blocks share, a
loss), and a :class:`RemoteTensor` for each other tensor.

The code around the blocks runs on every stage, because it alone knows how blocks are called. Its parameters may be absent, and so
NaN, see :mod:`lightning_overlap.state.absent`: a value that a stage should have received, and did not, shows as NaN.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_overlap.decision import ConfigError
from lightning_overlap.model.trees import leaves, replaced

Leaf = tuple[int, int]
"""Names a tensor of a block's output: the block's number, and the tensor's number in the output. Block -1 means the arguments of
block 0."""
ARGUMENTS = -1
"""The block number of the arguments of block 0, in a :data:`Leaf`."""
PLAIN = (type(None), bool, int, float, str)
"""Types of constants: a remote block returns the constant that the block returned in the first step."""
METADATA = frozenset(
    [getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda", "is_nested")]
    + [Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.is_complex, Tensor.__len__]
)
"""Functions that need no values. Remote hidden states answer them: they have the shape and dtype of those before block 0."""


class Slot:
    """Stands for a tensor in the structure of a block's output."""

    def __init__(self, number: int) -> None:
        self.number = number


class RemoteValue:
    """Stands for a value of a remote block that is neither a tensor nor a constant. Each use is an error."""

    def __init__(self, block: int, kind: str) -> None:
        self._block, self._kind = block, kind

    def _refuse(self, *_: Any) -> Any:
        raise ConfigError(
            f"another stage reads the {self._kind} that block {self._block} returns, but stages send only tensors. Return its tensors "
            "beside the hidden states"
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._refuse()

    __bool__ = __iter__ = __len__ = __getitem__ = __call__ = _refuse


class RemoteTensor(Tensor):
    """Stands for a tensor of a remote block that was not received. Its values are NaN, without memory.

    A function that computes with it gets the tensor that :meth:`Pass.resolve` returns.
    """

    leaf: Leaf
    current_pass: Pass

    @staticmethod
    def make(leaf: Leaf, current_pass: Pass, like: Tensor) -> RemoteTensor:
        """Makes one with the shape and device of ``like``, and its dtype if that is floating."""
        values = current_pass.placeholder
        if values is None or (type(like) is not RemoteTensor and (values.shape != like.shape or values.dtype != like.dtype)):
            dtype = like.dtype if like.is_floating_point() else torch.float32
            values = current_pass.placeholder = torch.full((), float("nan"), dtype=dtype, device=like.device).expand(like.shape)
        tensor = values.as_subclass(RemoteTensor)
        tensor.leaf, tensor.current_pass = leaf, current_pass
        return tensor

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in METADATA and args[0].leaf[1] == args[0].current_pass.progress.hidden_index:
            return super().__torch_function__(function, types, args, kwargs)
        args, kwargs = replaced((args, kwargs or {}), lambda x: x.current_pass.resolve(x.leaf) if isinstance(x, RemoteTensor) else x)
        return function(*args, **kwargs)


@dataclass
class Progress:
    """How far the forward of a pass has come.

    Attributes:
        needs_parameters: whether the code that runs now computes a result of this rank, so that its parameters must be here. True
            inside blocks that are run, after the last block, and, on the first stage, before block 0. False elsewhere: there only
            shapes count, and parameters may be NaN.
        next_block: the number of the block that the user's code has to call next.
        arguments: the tensors that block 0 was called with.
        output: the tensors that the latest block returned, run or remote.
        hidden_index: the number of the hidden states among these tensors, as far as the user's loop has shown it.
    """

    needs_parameters: bool
    next_block: int = 0
    arguments: list[Tensor | None] = field(default_factory=list)
    output: list[Tensor] = field(default_factory=list)
    hidden_index: int = 0


@dataclass
class Pass:
    """What one forward runs, receives and keeps to send. See the module's docstring.

    Attributes:
        local_blocks: the numbers of the blocks that the pass runs. All others are remote.
        end_block: the number of the block before which the forward ends; the number of blocks for a pass that goes on to the loss.
        received: tensors of remote blocks, and arguments of block 0, that came from other stages.
        structures: by block, the structure of its output: its containers and constants, with a :class:`Slot` for each tensor. Beside
            its result, a block's output has what its model has recorded in it, see :mod:`lightning_overlap.model.recorded`.
        is_first: whether this rank holds the modules before block 0, so that the arguments of block 0 are computed here.
        is_kept: whether to keep a tensor of a block that is run, or of the arguments of block 0, in ``kept``.
        fetch: returns a tensor that is not in ``received``. Without it such a tensor is an error.
        receive: called with :data:`ARGUMENTS` when block 0 is called, and with the number of each remote block before it returns; may
            add to ``received`` and ``structures``.
        before_block: called with the number of each block before it is run, and with the number of blocks after the last block, run
            or remote.
        after_block: by number of a block that is run: called after it; by :data:`ARGUMENTS`: called before block 0.
        restart: called when the user's code calls block 0 again after the last block. None in training, where this is an error.
        kept: the tensors that ``is_kept`` chose.
        placeholder: the NaN values that remote tensors share.
        progress: how far the forward has come.
    """

    local_blocks: frozenset[int]
    end_block: int
    received: dict[Leaf, Tensor] = field(default_factory=dict)
    structures: dict[int, Any] = field(default_factory=dict)
    is_first: bool = False
    is_kept: Callable[[Leaf], bool] = lambda leaf: False
    fetch: Callable[[Leaf], Tensor] | None = None
    receive: Callable[[int], None] | None = None
    before_block: Callable[[int], None] | None = None
    after_block: dict[int, Callable[[], None]] = field(default_factory=dict)
    restart: Callable[[], None] | None = None
    kept: MutableMapping[Leaf, Tensor] = field(default_factory=dict)
    placeholder: Tensor | None = None
    progress: Progress = field(init=False)

    def __post_init__(self) -> None:
        self.progress = Progress(needs_parameters=self.is_first)

    def resolve(self, leaf: Leaf) -> Tensor:
        """Returns a tensor that was received, kept, or can be fetched.

        Raises:
            ConfigError: the stage that has the tensor does not send it.
        """
        if leaf in self.received or leaf in self.kept:
            return self.received[leaf] if leaf in self.received else self.kept[leaf]
        if self.fetch is None:
            block, number = leaf
            source = "the arguments of block 0" if block == ARGUMENTS else f"the output of block {block}"
            raise ConfigError(
                f"this stage uses tensor {number} of {source}, which no other stage sends: the first training_step of this fit did "
                "not use it, and decides what stages send. Use the same outputs of the blocks in every step"
            )
        self.received[leaf] = self.fetch(leaf)
        return self.received[leaf]

    def resolve_argument(self, x: Any) -> Any:
        """Returns the value with which a block is run in place of ``x``, an argument of its call on this rank."""
        if isinstance(x, RemoteTensor):
            return self.resolve(x.leaf)
        if not isinstance(x, Tensor):
            return x
        number = next((number for number, argument in enumerate(self.progress.arguments) if argument is x), None)
        if number is None:
            return x
        # An argument of block 0 has to be fetched if parameters of another rank made it NaN, or if it has a gradient: only the first
        # stage continues its backward.
        if self.fetch is not None and x.is_floating_point() and (x.requires_grad or bool(x.isnan().any())):
            return self.resolve((ARGUMENTS, number))
        return self.received.get((ARGUMENTS, number), x)

    def keep(self, block: int, tensors: list[Tensor]) -> None:
        """Keeps those tensors of a block that ``is_kept`` chooses."""
        for number, tensor in enumerate(tensors):
            if self.is_kept((block, number)):
                self.kept[block, number] = tensor

    def release(self) -> None:
        """Releases all tensors that backward does not need. Activation checkpoints, which run blocks again, need ``received``, and
        compare arguments with those of block 0."""
        self.kept.clear()
        self.progress.output.clear()
        arguments = self.progress.arguments
        self.progress.arguments = [x if (ARGUMENTS, number) in self.received else None for number, x in enumerate(arguments)]


def structure(block: int, output: Any) -> Any:
    """Returns a block's output with a :class:`Slot` in place of each tensor. It can be pickled."""
    number = itertools.count()

    def describe(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return Slot(next(number))
        return leaf if isinstance(leaf, PLAIN) else RemoteValue(block, type(leaf).__name__)

    return replaced(output, describe)


def count_slots(output: Any) -> int:
    """Returns the number of tensors in a block's output, given its :func:`structure`."""
    return sum(isinstance(leaf, Slot) for leaf in leaves(output))


def tensors_of(value: Any) -> list[Tensor]:
    """Returns the tensors in the arguments or the output of a block."""
    return [leaf for leaf in leaves(value) if isinstance(leaf, Tensor)]
