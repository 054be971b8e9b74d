"""The stack of blocks: the one place where hidden states can be cut without touching the user's code.

The user's forward goes over a list of alike blocks. While a :class:`Pass` is active, iteration and indexing give stand-ins:

    the loop sees      | block 0 | block 1 | block 2 | block 3 | ...
    a pass with 2, 3   |  skip   |  skip   | enter 2 | 3 leave | left when block 4 is asked for

A block that is not run passes the hidden states on as they are, so that the loop's numbers stay those of the model; the
first of the blocks that are run gets what the pass has received instead. The forward is left when the loop asks for the next
block, not inside a block: there it could stand in an activation checkpoint, which must end as it began.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lightning_overlap.decision import ConfigError

HIDDEN_ARGUMENTS = ("hidden_states", "hidden_state", "x", "hidden", "inputs", "input", "inputs_embeds")
"""Names under which blocks take the hidden states, where they are not the first positional argument."""


class LeaveForward(BaseException):
    """Ends a forward whose rest belongs to another rank. Not an ``Exception``, which a module may catch."""


@dataclass
class Pass:
    """What one forward does with the stack.

    Attributes:
        run: numbers of the blocks that are run; the others are skipped.
        enter: by block that is run: what it gets in the place of the hidden states it is called with.
        leave: by block that is run: told its hidden states. -1: those before block 0.
        stop: the forward is left when the loop asks for this block; the number of blocks for one that is not left.
        last: what the last block gives, where it is skipped.
        before: told the number of each block before it is run, and the number of blocks after the last.
        items: what blocks return: 0 for the hidden states alone, n for a tuple of n with the hidden states first; None: not
            known yet.
        learn: sets ``items``, where a block is skipped before one is run.
        again: told that the stack is gone through once more; None: that is an error.
    """

    run: frozenset[int]
    stop: int
    enter: dict[int, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    leave: dict[int, Callable[[Tensor], None]] = field(default_factory=dict)
    last: Callable[[Tensor], Tensor] | None = None
    before: Callable[[int], None] | None = None
    items: int | None = None
    learn: Callable[[], Any] | None = None
    again: Callable[[], None] | None = None
    next: int = 0
    """The block that is to be called next."""
    passed: Tensor | None = None
    """The hidden states as the loop has last got them."""


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
        self._active: Pass | None = None
        self._class = type(blocks)
        stack = self

        def everything(own: Any) -> range:
            return range(len(own._modules))

        class Seen(self._class):  # type: ignore[misc, name-defined]
            def __iter__(self) -> Iterator[Any]:
                return super().__iter__() if stack._active is None else stack._visit(everything(self))

            def __getitem__(self, index: int | slice) -> Any:
                if stack._active is None:
                    return super().__getitem__(index)
                numbers = everything(self)[index]
                return _Part(stack, numbers) if isinstance(numbers, range) else stack._at(numbers)

        Seen.__name__ = Seen.__qualname__ = self._class.__name__
        blocks.__class__ = Seen

    def remove(self) -> None:
        """The list is the user's again."""
        self.blocks.__class__ = self._class

    @contextmanager
    def passing(self, how: Pass) -> Iterator[None]:
        """One forward of the user's. It may be left here.

        Raises:
            ConfigError: the forward went past the stack in a way that a pass cannot follow.
        """
        assert self._active is None, "a forward inside a forward"
        self._active = how
        try:
            yield
        except LeaveForward:
            pass
        else:
            self._refuse_if_unfinished(how)
        finally:
            self._active = None

    @contextmanager
    def unsplit(self, before: Callable[[int], None]) -> Iterator[None]:
        """One forward over all blocks, without stand-ins; ``before``: as in :class:`Pass`."""
        blocks = list(self.blocks._modules.values())
        numbers = {id(block): [n for n, other in enumerate(blocks) if other is block] for block in blocks}
        calls: dict[int, int] = defaultdict(int)

        def tell(block: nn.Module, _: Any) -> None:
            # An activation checkpoint calls it again in backward: then it is one of the blocks that it was.
            places = numbers[id(block)]
            before(places[calls[id(block)] % len(places)])
            calls[id(block)] += 1

        hooks = [block.register_forward_pre_hook(tell) for block in dict.fromkeys(blocks) if block is not None]
        # What comes after the last block draws random numbers of its own.
        hooks += [blocks[-1].register_forward_hook(lambda *_: before(self.size))] if blocks[-1] is not None else []
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

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
        how = self._active
        assert how is not None, "only a pass has stand-ins"
        if how.stop == number == how.next and number > 0:
            raise LeaveForward
        return _StandIn(self, how, number, list(self.blocks._modules.values())[number])


def find_hidden(args: tuple[Any, ...], kwargs: Mapping[str, Any], who: str) -> tuple[int | str, Tensor]:
    """Where the hidden states stand in a module's arguments, and what they are.

    Raises:
        ConfigError: there are none that could be told.
    """
    if args and isinstance(args[0], Tensor):
        return 0, args[0]
    for name in HIDDEN_ARGUMENTS:
        if isinstance(kwargs.get(name), Tensor):
            return name, kwargs[name]
    raise ConfigError(
        f"{who} is called without hidden states that can be found: pass them as the first argument, or as one of "
        f"{', '.join(HIDDEN_ARGUMENTS)}"
    )


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
        self._entered: Tensor | None = None
        self._called = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._block, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        stack, how, number = self._stack, self._how, self._number
        again, self._called = self._called, True
        place, hidden = find_hidden(args, kwargs, f"a block of {stack.name}")
        if not again:
            self._check_order(hidden)
        if number == 0 and -1 in how.leave and not again:
            how.leave[-1](hidden)
        if number == how.stop:  # no block is run, and the loop's first one is the first to see the hidden states
            raise LeaveForward
        if number not in how.run:
            result = how.last(hidden) if how.last is not None and number == stack.size - 1 else hidden
            how.passed = result
            if result is not hidden and how.before is not None:
                how.before(stack.size)
            return self._as_the_blocks_do(result)
        if number in how.enter:
            self._entered = how.enter[number](hidden) if not again else self._entered
            assert self._entered is not None, "a block is entered before it is run again"
            if isinstance(place, str):
                kwargs = {**kwargs, place: self._entered}
            else:
                args = (self._entered, *args[1:])
        if how.before is not None:
            how.before(number)
        result = self._block(*args, **kwargs)
        if again:
            return result
        out = result[0] if isinstance(result, tuple) else result
        how.items = len(result) if isinstance(result, tuple) else 0
        how.passed = out
        if number in how.leave:
            how.leave[number](out)
        if how.before is not None and number == stack.size - 1:
            how.before(stack.size)
        return result

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
        if self._number > 0 and hidden is not how.passed:
            raise ConfigError(
                f"between block {self._number - 1} and block {self._number} of {stack.name} the loop does something with the hidden "
                "states (adds, norms, a reentrant checkpoint), which a stage would lose: move it into the block, and use "
                "use_reentrant=False for checkpoints"
            )
        how.next = self._number + 1

    def _as_the_blocks_do(self, hidden: Tensor) -> Any:
        how = self._how
        if how.items is None and how.learn is not None:
            how.learn()
        items = how.items
        assert items is not None, "nobody skips a block before it is known what blocks return"
        return (hidden, *[None] * (items - 1)) if items else hidden
