"""The stack of blocks: makes the user's loop over a list of blocks run some of the blocks, without a change of the user's code.

:class:`BlockStack` replaces the class of the user's list. While a :class:`~lightning_overlap.model.block_pass.Pass` is active, the
list returns stand-ins, which run their block, or return the output of the block on another stage.

The forward ends when the loop asks for the next block, not inside of a block's call: this call may be inside an activation checkpoint,
which must return.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_overlap.decision import ConfigError
from lightning_overlap.model.block_pass import ARGUMENTS, PLAIN, Pass, RemoteTensor, Slot, structure, tensors_of
from lightning_overlap.model.blocks import is_from_transformers
from lightning_overlap.model.hidden_states import find_hidden
from lightning_overlap.model.trees import leaves, replaced
from lightning_overlap.torch_seams import children_of


class StopForward(BaseException):
    """Ends the user's forward on this rank. Not an ``Exception``, which the user's code may catch."""


def fill_cache(block: nn.Module, number: int, hidden: Tensor, arguments: Iterable[Any]) -> None:
    """Adds zeros for a remote block to Hugging Face's cache of keys and values: masks and positions depend on the cache's length.

    Args:
        block: the block.
        number: its number, which is its index in the cache, unless one of its modules has a ``layer_idx``.
        hidden: its hidden states, ``(batch, tokens, features)``.
        arguments: all arguments of its call.
    """
    for cache in arguments:
        if callable(getattr(cache, "get_seq_length", None)) and callable(getattr(cache, "update", None)):
            indices = [module.layer_idx for module in block.modules() if isinstance(getattr(module, "layer_idx", None), int)]
            index: Any = indices[0] if indices else number
            if not all(hasattr(layer, "update") for layer in getattr(cache, "layers", [])[index : index + 1]):
                continue  # the state of linear attention, which has no length
            zeros = torch.zeros(hidden.shape[0], 1, hidden.shape[1], 1, dtype=hidden.dtype, device=hidden.device)
            cache.update(zeros, zeros, index)


class BlockStack:
    """Replaces the class of a list of blocks, so that it returns stand-ins while a pass is active.

    Args:
        blocks: the user's list. Its class is replaced until :meth:`remove`; its children and their names stay.
        name: its name in the model, for errors.
        start: called with the hidden states and all arguments of block 0 when a pass calls it, whichever rank runs it.
        finish: called after the last block, where another rank runs it.

    Attributes:
        start: the argument.
        finish: the argument.
        size: the number of blocks.
        may_record: whether the blocks may be a model's of transformers, see :mod:`lightning_overlap.model.recorded`.
    """

    def __init__(
        self,
        blocks: nn.ModuleList | nn.Sequential,
        name: str,
        start: Callable[[Tensor, Any], None] | None = None,
        finish: Callable[[], None] | None = None,
    ) -> None:
        self.blocks = blocks
        self.start, self.finish = start, finish
        self.name = name
        self.size = len(blocks)
        self.may_record = any(is_from_transformers(block) for block in blocks if block is not None)
        self._threads = threading.local()
        self._class = type(blocks)
        stack = self

        def numbers_of(blocks: Any) -> range:
            return range(len(children_of(blocks)))

        class StandInList(self._class):  # type: ignore[name-defined]
            def __iter__(self) -> Iterator[Any]:
                return super().__iter__() if stack.active is None else stack._iterate(numbers_of(self))

            def __getitem__(self, index: int | slice) -> Any:
                if stack.active is None:
                    return super().__getitem__(index)
                numbers = numbers_of(self)[index]
                return _Slice(stack, numbers) if isinstance(numbers, range) else stack._stand_in(numbers)

        StandInList.__name__ = StandInList.__qualname__ = self._class.__name__
        blocks.__class__ = StandInList

    @property
    def active(self) -> Pass | None:
        """The pass of this thread's forward. Stand-ins keep their pass, for activation checkpoints that call them in backward."""
        return getattr(self._threads, "active", None)

    def remove(self) -> None:
        """Restores the list's class."""
        self.blocks.__class__ = self._class

    @contextmanager
    def running(self, current_pass: Pass) -> Iterator[None]:
        """Inside, the user's forward runs with a pass. The block of the ``with`` statement ends where the pass ends the forward.

        Raises:
            ConfigError: the forward did not call the blocks as a pipeline needs it.
        """
        assert self.active is None, "a forward inside a forward"
        self._threads.active = current_pass
        try:
            yield
        except StopForward:
            pass
        else:
            self._refuse_if_unfinished(current_pass)
        finally:
            self._threads.active = None

    @contextmanager
    def unsharded(self, before_block: Callable[[int], None]) -> Iterator[None]:
        """Inside, the user's forward runs all blocks on this rank, without stand-ins.

        Args:
            before_block: as in :class:`~lightning_overlap.model.block_pass.Pass`.

        Raises:
            ConfigError: the forward did not call the blocks as a pipeline needs it.
        """
        blocks = list(children_of(self.blocks).values())
        numbers = {id(block): [n for n, other in enumerate(blocks) if other is block] for block in blocks}
        calls: dict[int, int] = defaultdict(int)
        order: list[int] = []

        def record(block: nn.Module, _: Any) -> None:
            # A list may contain one block several times. An activation checkpoint calls blocks again in backward: the count of calls
            # then starts over.
            candidates = numbers[id(block)]
            number = candidates[calls[id(block)] % len(candidates)]
            calls[id(block)] += 1
            order.append(number)
            before_block(number)

        hooks = [block.register_forward_pre_hook(record) for block in dict.fromkeys(blocks) if block is not None]
        # The code after the last block draws its random numbers from a seed of its own.
        hooks += [blocks[-1].register_forward_hook(lambda *_: before_block(self.size))] if blocks[-1] is not None else []
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        if order[: self.size] != list(range(self.size)):
            raise ConfigError(
                f"training_step called the blocks {order[: self.size]} of {self.name}, which has {self.size} blocks. {_ONE_CALL_EACH}"
            )

    def _refuse_if_unfinished(self, current_pass: Pass) -> None:
        called = current_pass.progress.next_block
        if current_pass.restart is not None and called == 0:
            return  # an evaluation step need not call the model
        if current_pass.end_block < self.size:
            raise ConfigError(
                f"this stage ends the forward before block {current_pass.end_block} of {self.name}, but the forward returned after "
                f"{called} blocks. If its code catches every exception (a bare `except:`), catch `Exception` instead. If its loop "
                "ends early, call all blocks in every step"
            )
        if called < self.size:
            raise ConfigError(f"the step called {called} of the {self.size} blocks of {self.name}. {_ONE_CALL_EACH}")

    def _iterate(self, numbers: range) -> Iterator[Any]:
        for number in numbers:
            yield self._stand_in(number)

    def _stand_in(self, number: int) -> Any:
        current_pass = self.active
        assert current_pass is not None, "only a pass has stand-ins"
        if current_pass.end_block == number == current_pass.progress.next_block and number > 0:
            raise StopForward
        return _StandIn(self, current_pass, number, list(children_of(self.blocks).values())[number])


_ONE_CALL_EACH = (
    "A pipeline needs one call of each block in each step, in the order of the list: do not omit blocks at random, call the model "
    "once in a training_step, and if this is the wrong list, name the right one in parallel_plan"
)
"""The end of errors about the order of blocks."""


@contextmanager
def without_nested_tensors(model: nn.Module) -> Iterator[None]:
    """Inside, torch's own encoders pass padded tensors to their blocks, as they do in training.

    In evaluation they make nested tensors of padded ones, whose tokens cannot be counted or sharded, and whose padding becomes zeros.
    """
    encoders = [(m, m.use_nested_tensor) for m in model.modules() if isinstance(m, nn.TransformerEncoder)]
    for encoder, _ in encoders:
        encoder.use_nested_tensor = False
    try:
        yield
    finally:
        for encoder, setting in encoders:
            encoder.use_nested_tensor = setting


class _Slice:
    """A slice of the list, of stand-ins."""

    def __init__(self, stack: BlockStack, numbers: range) -> None:
        self._stack, self._numbers = stack, numbers

    def __iter__(self) -> Iterator[Any]:
        return self._stack._iterate(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int | slice) -> Any:
        numbers = self._numbers[index]
        return _Slice(self._stack, numbers) if isinstance(numbers, range) else self._stack._stand_in(numbers)


class _StandIn:
    """Is called in place of a block during a pass. Its attributes are the block's.

    An activation checkpoint may call it a second time, in backward: it then computes the same, and changes nothing in the pass.
    """

    def __init__(self, stack: BlockStack, current_pass: Pass, number: int, block: nn.Module) -> None:
        self._stack, self._pass, self._number, self._block = stack, current_pass, number, block
        self._was_called = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._block, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        current_pass, number = self._pass, self._number
        in_backward, self._was_called = self._was_called, True
        _, hidden = find_hidden(args, kwargs, f"a block of {self._stack.name}")
        if not in_backward:
            self._check_order(hidden)
            if number == 0:
                if self._stack.start is not None:
                    self._stack.start(hidden, (args, kwargs))
                self._enter(tensors_of((args, kwargs)))
        # Usually the lookup of block `end_block` has ended the forward already. It cannot if the stage sends the arguments of block 0
        # and has no blocks (end_block is 0), nor if the loop looked all blocks up before it called the first one.
        if number == current_pass.end_block:
            raise StopForward
        if number not in current_pass.local_blocks:
            if current_pass.restart is not None and not in_backward:
                fill_cache(self._block, number, hidden, (*args, *kwargs.values()))
            return self._return_received(hidden)
        if number == 0 and current_pass.fetch is not None:  # the stage starts with block 0, and another one computes its arguments
            arguments = current_pass.progress.arguments
            current_pass.resolve((ARGUMENTS, next(n for n, argument in enumerate(arguments) if argument is hidden)))
        return self._run(args, kwargs, in_backward=in_backward)

    def _enter(self, arguments: list[Tensor]) -> None:
        """Block 0 is called for the first time: its arguments are kept, sent and received."""
        current_pass = self._pass
        current_pass.progress.arguments = [*arguments]
        if current_pass.is_first:
            current_pass.keep(ARGUMENTS, arguments)
        if ARGUMENTS in current_pass.after_block:
            current_pass.after_block[ARGUMENTS]()
        if current_pass.receive is not None:
            current_pass.receive(ARGUMENTS)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, in_backward: bool) -> Any:
        current_pass, number = self._pass, self._number
        if any(current_pass.resolve_argument(leaf) is not leaf for leaf in leaves((args, kwargs))):
            args, kwargs = replaced((args, kwargs), current_pass.resolve_argument)
        if current_pass.before_block is not None:
            current_pass.before_block(number)
        current_pass.progress.needs_parameters = True
        result, recorded = self._run_block(args, kwargs)
        if in_backward:
            return result
        current_pass.progress.output = tensors_of(result)
        if number not in current_pass.structures:
            current_pass.structures[number] = structure(number, (result, recorded))
        elif current_pass.restart is None:
            self._refuse_other_constants(current_pass.structures[number], (result, recorded))
        current_pass.keep(number, tensors_of((result, recorded)))
        if number in current_pass.after_block:
            current_pass.after_block[number]()
        self._start_code_after_block()
        return result

    def _run_block(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, list[Any]]]:
        """The block's result, and what the model has recorded in it, by kind: its further outputs."""
        if not self._stack.may_record:
            return self._block(*args, **kwargs), {}
        from lightning_overlap.model.recorded import count_recorded, recorded_since  # which needs transformers

        counts = count_recorded()
        return self._block(*args, **kwargs), recorded_since(counts)

    def _refuse_other_constants(self, before: Any, result: Any) -> None:
        """Other stages use the constants of the first step."""
        for first, latest in zip(leaves(before), leaves(result), strict=False):
            if isinstance(first, PLAIN) and isinstance(latest, PLAIN) and first != latest and latest == latest:
                raise ConfigError(
                    f"block {self._number} of {self._stack.name} returned {latest!r}, but {first!r} in the first step, whose value "
                    "other stages use. Return a tensor, or compute the value where it is needed"
                )

    def _return_received(self, hidden: Tensor) -> Any:
        """Returns the output of a remote block: received tensors, and remote tensors in place of the others."""
        current_pass, number = self._pass, self._number
        if current_pass.receive is not None:
            current_pass.receive(number)

        def fill(slot: Any) -> Any:
            if not isinstance(slot, Slot):
                return slot
            leaf = number, slot.number
            return current_pass.received[leaf] if leaf in current_pass.received else RemoteTensor.make(leaf, current_pass, hidden)

        result, recorded = replaced(current_pass.structures[number], fill)
        if recorded:
            from lightning_overlap.model.recorded import add_recorded  # which needs transformers

            add_recorded(recorded)
        if number == self._stack.size - 1 and self._stack.finish is not None:
            self._stack.finish()
        current_pass.progress.output = tensors_of(result)
        self._start_code_after_block()
        return result

    def _start_code_after_block(self) -> None:
        """Prepares for the user's code after this block. Between blocks it runs on every stage, and only for shapes; after the last
        block it computes the loss, with this rank's parameters and a seed of its own."""
        is_last = self._number == self._stack.size - 1
        self._pass.progress.needs_parameters = is_last
        if is_last and self._pass.before_block is not None:
            self._pass.before_block(self._stack.size)

    def _check_order(self, hidden: Tensor) -> None:
        current_pass, progress, stack, number = self._pass, self._pass.progress, self._stack, self._number
        if progress.next_block == stack.size and number == 0 and current_pass.restart is not None:
            current_pass.restart()
            progress.next_block = 0
        if progress.next_block != number:
            raise ConfigError(
                f"block {number} of {stack.name} was called after {progress.next_block} of {stack.size} blocks. {_ONE_CALL_EACH}"
            )
        index = next((index for index, tensor in enumerate(progress.output) if hidden is tensor), None)
        if number > 0 and index is None:
            raise ConfigError(
                f"the code between block {number - 1} and block {number} of {stack.name} changes the hidden states (an addition, a "
                "norm, a reentrant checkpoint), and a stage that ends there would lose this change. Move it into a block; for "
                "checkpoints set use_reentrant=False"
            )
        progress.next_block, progress.hidden_index = number + 1, index or 0
