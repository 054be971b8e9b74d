"""The stack of blocks: the one place where hidden states can be cut without touching the user's code.

The user's forward goes over a list of alike blocks. While a :class:`Pass` is active, iteration and indexing give stand-ins:

    the loop sees      | block 0 | block 1 | block 2 | block 3 | ...
    a pass with 2, 3   |  skip   |  skip   |  run 2  |  run 3  | left when block 4 is asked for

A block that is skipped returns what it returned where it was run: the tensors of it that have been carried here (the hidden states
that block 2 is to get, a position bias that all blocks share, a loss), and a :class:`Missing` for each of the others. The forward is
left when the loop asks for the next block, not inside a block: there it could stand in an activation checkpoint, which must end as
it began.
"""

from __future__ import annotations

import itertools
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_overlap.decision import ConfigError
from lightning_overlap.model.hidden_states import find_hidden
from lightning_overlap.model.trees import leaves, replaced
from lightning_overlap.torch_seams import children_of

Leaf = tuple[int, int]
"""A tensor that a block returns: the block's number, and the tensor's among the tensors of what the block returns. Block -1 are the
arguments of block 0."""
ARGUMENTS = -1
"""The number of the block that stands for what comes before the blocks, in a :data:`Leaf`."""
PLAIN = (type(None), bool, int, float, str)
"""Types of values beside tensors that a skipped block returns as the block itself has."""
METADATA = frozenset(
    [getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda", "is_nested")]
    + [Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.is_complex, Tensor.__len__]
)
"""What the hidden states of a skipped block can be asked for: they look like those before block 0."""


class LeaveForward(BaseException):
    """Ends a forward whose rest belongs to another rank. Not an ``Exception``, which a module may catch."""


class Slot:
    """Stands for a tensor in the structure of what a block returns."""

    def __init__(self, number: int) -> None:
        self.number = number


class Elsewhere:
    """Stands for what is neither a tensor nor a plain value, and that a skipped block would have returned."""

    def __init__(self, block: int, kind: str) -> None:
        self._block, self._kind = block, kind

    def _refuse(self, *_: Any) -> Any:
        raise ConfigError(
            f"block {self._block} returns a {self._kind}, which another stage reads: between stages go tensors only. Return its "
            "tensors beside the hidden states"
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._refuse()

    __bool__ = __iter__ = __len__ = __getitem__ = __call__ = _refuse


class Missing(Tensor):
    """Stands for a tensor that a skipped block would have returned. Whoever computes with it gets it fetched, or an error.

    Its values are not a number.
    """

    leaf: Leaf
    how: Pass

    @staticmethod
    def make(leaf: Leaf, how: Pass, like: Tensor) -> Missing:
        base = how.blank
        if base is None or (type(like) is not Missing and (base.shape != like.shape or base.dtype != like.dtype)):
            dtype = like.dtype if like.is_floating_point() else torch.float32
            base = how.blank = torch.full((), float("nan"), dtype=dtype, device=like.device).expand(like.shape)
        made = base.as_subclass(Missing)
        made.leaf, made.how = leaf, how
        return made

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in METADATA and args[0].leaf[1] == 0:
            return super().__torch_function__(function, types, args, kwargs)
        args, kwargs = replaced((args, kwargs or {}), lambda x: x.how.find(x.leaf) if isinstance(x, Missing) else x)
        return function(*args, **kwargs)


@dataclass
class Pass:
    """What one forward does with the stack.

    Attributes:
        run: numbers of the blocks that are run; the others are skipped.
        stop: the forward is left when the loop asks for this block; the number of blocks for one that is not left.
        carried: what has come here of what skipped blocks return, and of the arguments of block 0 that are not computed here.
        outputs: by skipped block, what it returns, with a :class:`Slot` for each tensor.
        first: whether what comes before the blocks is computed here, and not for its shapes alone.
        wanted: whether a tensor is kept that a block returns that is run, or that block 0 is called with.
        fetch: gets what is not in ``carried``; None: that is an error.
        arrive: told the number of each block before it is skipped, and -1 at block 0: ``carried`` and ``outputs`` may grow.
        leave: by block that is run: called after it. -1: before block 0.
        before: told the number of each block before it is run, and the number of blocks after the last.
        again: told that the stack is gone through once more; None: that is an error.
    """

    run: frozenset[int]
    stop: int
    carried: dict[Leaf, Tensor] = field(default_factory=dict)
    outputs: dict[int, Any] = field(default_factory=dict)
    first: bool = False
    wanted: Callable[[Leaf], bool] = lambda leaf: False
    fetch: Callable[[Leaf], Tensor] | None = None
    arrive: Callable[[int], None] | None = None
    leave: dict[int, Callable[[], None]] = field(default_factory=dict)
    before: Callable[[int], None] | None = None
    again: Callable[[], None] | None = None
    next: int = 0
    """The block that is to be called next."""
    kept: MutableMapping[Leaf, Tensor] = field(default_factory=dict)
    """What was wanted, once it is there."""
    passed: list[Tensor] = field(default_factory=list)
    """The tensors that the loop has got from the last block."""
    arguments: list[Tensor | None] = field(default_factory=list)
    """The tensors that block 0 was called with."""
    matters: bool = False
    """Whether what is computed now is of what the pass is for: of the blocks that are run, or of what comes after all blocks."""
    blank: Tensor | None = None
    """Values of what is missing, made once."""
    hidden: int = 0
    """Which of the tensors that a block returns are the hidden states, as far as is known."""

    def find(self, leaf: Leaf) -> Tensor:
        """What a block that is skipped, or one that was run, has returned.

        Raises:
            ConfigError: it is not here.
        """
        if leaf in self.carried or leaf in self.kept:
            return self.carried[leaf] if leaf in self.carried else self.kept[leaf]
        if self.fetch is None:
            raise ConfigError(
                f"tensor {leaf[1]} of what block {leaf[0]} returns is used on another stage, and was not in the first training_step "
                "of this fit, which decides what goes from stage to stage: have each step use the same outputs of the blocks"
            )
        self.carried[leaf] = self.fetch(leaf)
        return self.carried[leaf]

    def let_go(self) -> None:
        """Keeps no tensors any more, but what an activation checkpoint that runs again will ask for: what has been carried here."""
        self.kept.clear()
        self.passed.clear()
        self.arguments = [x if (ARGUMENTS, number) in self.carried else None for number, x in enumerate(self.arguments)]

    def keep(self, block: int, tensors: list[Tensor]) -> None:
        """What a block returns that was run, as far as it is wanted."""
        for number, tensor in enumerate(tensors):
            if self.wanted((block, number)):
                self.kept[block, number] = tensor

    def arrived(self, x: Any) -> Any:
        """An argument of a block, or what has been carried here in its place."""
        if isinstance(x, Missing):
            return self.find(x.leaf)
        if not isinstance(x, Tensor):
            return x
        number = next((number for number, argument in enumerate(self.arguments) if argument is x), None)
        if number is None:
            return x
        # What parameters of another rank were used for is not a number.
        # Nor may one that has a gradient have it in two stages.
        if self.fetch is not None and x.is_floating_point() and (x.requires_grad or bool(x.isnan().any())):
            return self.find((ARGUMENTS, number))
        return self.carried.get((ARGUMENTS, number), x)


def structure(block: int, output: Any) -> Any:
    """What a block returns, with a :class:`Slot` for each tensor. It can be pickled."""
    number = itertools.count()

    def describe(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return Slot(next(number))
        return leaf if isinstance(leaf, PLAIN) else Elsewhere(block, type(leaf).__name__)

    return replaced(output, describe)


def count_slots(output: Any) -> int:
    """The number of tensors in what a block returns, from its :func:`structure`."""
    return sum(isinstance(leaf, Slot) for leaf in leaves(output))


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in what a block takes or returns."""
    return [leaf for leaf in leaves(value) if isinstance(leaf, Tensor)]


def fill_cache(block: nn.Module, number: int, hidden: Tensor, arguments: Iterable[Any]) -> None:
    """A skipped block's part of Hugging Face's cache of keys and values gets as many tokens: masks and positions go by its length.

    Args:
        block: the block.
        number: its number, which is its place in the cache unless it says another one.
        hidden: its hidden states, (batch, tokens, features).
        arguments: what it is called with.
    """
    for cache in arguments:
        if callable(getattr(cache, "get_seq_length", None)) and callable(getattr(cache, "update", None)):
            places = [module.layer_idx for module in block.modules() if isinstance(getattr(module, "layer_idx", None), int)]
            place: Any = places[0] if places else number
            if not all(hasattr(layer, "update") for layer in getattr(cache, "layers", [])[place : place + 1]):
                continue  # of linear attention, whose state has no length
            nothing = torch.zeros(hidden.shape[0], 1, hidden.shape[1], 1, dtype=hidden.dtype, device=hidden.device)
            cache.update(nothing, nothing, place)


class BlockStack:
    """Lends a list of blocks its stand-ins.

    Args:
        blocks: the user's list. Its class is replaced until :meth:`remove`; its children and their names stay.
        name: its name in the model, for errors.
    """

    def __init__(self, blocks: nn.ModuleList | nn.Sequential, name: str) -> None:
        self.blocks = blocks
        self.name = name
        self.size = len(blocks)
        self._threads = threading.local()
        self._class = type(blocks)
        stack = self

        def everything(own: Any) -> range:
            return range(len(children_of(own)))

        class Seen(self._class):  # type: ignore[name-defined]
            def __iter__(self) -> Iterator[Any]:
                return super().__iter__() if stack.active is None else stack._visit(everything(self))

            def __getitem__(self, index: int | slice) -> Any:
                if stack.active is None:
                    return super().__getitem__(index)
                numbers = everything(self)[index]
                return _Part(stack, numbers) if isinstance(numbers, range) else stack._at(numbers)

        Seen.__name__ = Seen.__qualname__ = self._class.__name__
        blocks.__class__ = Seen

    @property
    def active(self) -> Pass | None:
        """The pass of this thread's forward. Stand-ins hold it, so that an activation checkpoint finds it again in backward."""
        return getattr(self._threads, "active", None)

    def remove(self) -> None:
        """The list is the user's again."""
        self.blocks.__class__ = self._class

    @contextmanager
    def passing(self, how: Pass) -> Iterator[None]:
        """One forward of the user's. It may be left here.

        Raises:
            ConfigError: the forward went past the stack in a way that a pass cannot follow.
        """
        assert self.active is None, "a forward inside a forward"
        self._threads.active = how
        try:
            yield
        except LeaveForward:
            pass
        else:
            self._refuse_if_unfinished(how)
        finally:
            self._threads.active = None

    @contextmanager
    def unsplit(self, before: Callable[[int], None]) -> Iterator[None]:
        """One forward over all blocks, without stand-ins; ``before``: as in :class:`Pass`.

        Raises:
            ConfigError: a block is left out or called out of its order, which no pass could follow.
        """
        blocks = list(children_of(self.blocks).values())
        numbers = {id(block): [n for n, other in enumerate(blocks) if other is block] for block in blocks}
        calls: dict[int, int] = defaultdict(int)
        order: list[int] = []

        def tell(block: nn.Module, _: Any) -> None:
            # An activation checkpoint calls it again in backward: then it is one of the blocks that it was.
            places = numbers[id(block)]
            number = places[calls[id(block)] % len(places)]
            calls[id(block)] += 1
            order.append(number)
            before(number)

        hooks = [block.register_forward_pre_hook(tell) for block in dict.fromkeys(blocks) if block is not None]
        # What comes after the last block draws random numbers of its own.
        hooks += [blocks[-1].register_forward_hook(lambda *_: before(self.size))] if blocks[-1] is not None else []
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        if order[: self.size] != list(range(self.size)):
            raise ConfigError(
                f"training_step calls the blocks {order[: self.size]} of {self.name}, which has {self.size}: each block must be "
                "called once in a step, in the order of the list. Blocks that are left out at random, another list of blocks, or a "
                "model that is called twice in one training_step cannot be cut into stages"
            )

    def _refuse_if_unfinished(self, how: Pass) -> None:
        if how.stop < self.size and (how.again is None or how.next > 0):
            raise ConfigError(
                f"the forward should have been left at block {how.stop} of {self.name}, and went on: something in it catches every "
                f"exception (a bare `except:`), or the loop ended at block {how.next}. Catch `Exception` instead, and run all blocks."
            )
        if how.next < self.size and (how.again is None or how.next > 0):
            raise ConfigError(
                f"training_step ended with {how.next} of the {self.size} blocks of {self.name} called: blocks that are left out "
                "at random, or another list of blocks, cannot be cut into stages"
            )

    def _visit(self, numbers: range) -> Iterator[Any]:
        for number in numbers:
            yield self._at(number)

    def _at(self, number: int) -> Any:
        how = self.active
        assert how is not None, "only a pass has stand-ins"
        if how.stop == number == how.next and number > 0:
            raise LeaveForward
        return _StandIn(self, how, number, list(children_of(self.blocks).values())[number])


@contextmanager
def without_nested_tensors(model: nn.Module) -> Iterator[None]:
    """Torch's own encoders give their blocks padded tensors inside, as they do in training: a nested one, which they make of padding
    in evaluation, has no tokens that could be counted or cut. (Its padding would come out as zeros.)"""
    encoders = [(m, m.use_nested_tensor) for m in model.modules() if isinstance(m, nn.TransformerEncoder)]
    for encoder, _ in encoders:
        encoder.use_nested_tensor = False
    try:
        yield
    finally:
        for encoder, used in encoders:
            encoder.use_nested_tensor = used


class _Part:
    """A slice of the list."""

    def __init__(self, stack: BlockStack, numbers: range) -> None:
        self._stack, self._numbers = stack, numbers

    def __iter__(self) -> Iterator[Any]:
        return self._stack._visit(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int | slice) -> Any:
        numbers = self._numbers[index]
        return _Part(self._stack, numbers) if isinstance(numbers, range) else self._stack._at(numbers)


class _StandIn:
    """Is called in the place of a block. Its attributes are the block's.

    An activation checkpoint may call it again in backward: then it does what it did, and tells nobody.
    """

    def __init__(self, stack: BlockStack, how: Pass, number: int, block: nn.Module) -> None:
        self._stack, self._how, self._number, self._block = stack, how, number, block
        self._called = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._block, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        how, number = self._how, self._number
        again, self._called = self._called, True
        _, hidden = find_hidden(args, kwargs, f"a block of {self._stack.name}")
        if not again:
            self._check_order(hidden)
            if number == 0:
                arguments = tensors_of((args, kwargs))
                how.arguments = [*arguments]
                if how.first:
                    how.keep(ARGUMENTS, arguments)
                if ARGUMENTS in how.leave:
                    how.leave[ARGUMENTS]()
                if how.arrive is not None:
                    how.arrive(ARGUMENTS)
        if number == how.stop:  # no block is run, and the loop's first one is the first to see the hidden states
            raise LeaveForward
        if number not in how.run:
            if how.again is not None and not again:
                fill_cache(self._block, number, hidden, (*args, *kwargs.values()))
            return self._skip(hidden)
        if number == 0 and how.fetch is not None:  # the stage begins with it, and what comes before it is on another one
            how.find((ARGUMENTS, next(n for n, argument in enumerate(how.arguments) if argument is hidden)))
        return self._run(args, kwargs, again=again)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, again: bool) -> Any:
        how, number = self._how, self._number
        if any(how.arrived(leaf) is not leaf for leaf in leaves((args, kwargs))):
            args, kwargs = replaced((args, kwargs), how.arrived)
        if how.before is not None:
            how.before(number)
        how.matters = True
        result = self._block(*args, **kwargs)
        if again:
            return result
        how.passed = tensors_of(result)
        if number not in how.outputs:
            how.outputs[number] = structure(number, result)
        elif how.again is None:
            self._refuse_other_values(how.outputs[number], result)
        how.keep(number, how.passed)
        if number in how.leave:
            how.leave[number]()
        self._finish()
        return result

    def _refuse_other_values(self, before: Any, result: Any) -> None:
        """Other stages go on with the plain values of the first step."""
        for was, now in zip(leaves(before), leaves(result), strict=False):
            if isinstance(was, PLAIN) and isinstance(now, PLAIN) and was != now and now == now:
                raise ConfigError(
                    f"block {self._number} of {self._stack.name} returns {now!r}, and returned {was!r} in the first step, which other "
                    "stages go on with: return a tensor, or compute the value from shapes where it is read"
                )

    def _skip(self, hidden: Tensor) -> Any:
        how, number = self._how, self._number
        if how.arrive is not None:
            how.arrive(number)

        def fill(leaf: Any) -> Any:
            if not isinstance(leaf, Slot):
                return leaf
            place = number, leaf.number
            return how.carried[place] if place in how.carried else Missing.make(place, how, hidden)

        result = replaced(how.outputs[number], fill)
        how.passed = tensors_of(result)
        self._finish()
        return result

    def _finish(self) -> None:
        self._how.matters = self._number == self._stack.size - 1
        if self._how.before is not None and self._number == self._stack.size - 1:
            self._how.before(self._stack.size)

    def _check_order(self, hidden: Tensor) -> None:
        how, stack = self._how, self._stack
        if how.next == stack.size and self._number == 0 and how.again is not None:
            how.again()
            how.next = 0
        if how.next != self._number:
            raise ConfigError(
                f"block {self._number} of {stack.name} is called where block {how.next} is next: each block must be called once in a "
                "step, in the order of the list. A model that is called twice in one training_step cannot be cut into stages."
            )
        found = next((number for number, tensor in enumerate(how.passed) if hidden is tensor), None)
        if self._number > 0 and found is None:
            raise ConfigError(
                f"between block {self._number - 1} and block {self._number} of {stack.name} the loop does something with the hidden "
                "states (adds, norms, a reentrant checkpoint), which a stage would lose: move it into the block, and use "
                "use_reentrant=False for checkpoints"
            )
        how.next, how.hidden = self._number + 1, found or 0
