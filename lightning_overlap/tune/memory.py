"""Counts the memory of a rank by what it is for, in one training step."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_overlap.model.trees import bytes_by_storage, storages
from lightning_overlap.modes.base import OptimizerHolder
from lightning_overlap.ranks.group import Group
from lightning_overlap.strategy.strategy import OverlapStrategy
from lightning_overlap.torch_seams import DispatchMode, WithoutSubclasses, parameters_of, tree_leaves


@dataclass(frozen=True)
class Memory:
    """Bytes that a rank holds in tensors.

    Attributes:
        weights: parameters and buffers, as tensors or in flat buckets.
        gradients: as tensors or in flat buckets.
        optimizer: the optimizer's state, and fp32 copies of weights that it updates.
        activations: what autograd keeps, results under way and the batch, at the peak of a step.
        largest: the largest tensor in ``activations``: the logits, where the vocabulary is large.
        buffers: of transfers. In a rehearsal as many are under way as can be; on a fast link fewer are.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    largest: int
    buffers: int

    @property
    def peak(self) -> int:
        """The sum: the most that the rank holds at one time."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.buffers


class Allocations(DispatchMode):
    """Records when operations allocate the storages of tensors, and when these are freed."""

    def __init__(self) -> None:
        super().__init__()
        self._numbers: dict[int, int] = {}
        """By the id of a live storage, its number."""
        self._sizes: list[int] = []
        """By number, bytes."""
        self._changes: list[tuple[int, bool]] = []
        """In order, the number of a storage and whether it was allocated or freed."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        inputs = {id(storage) for storage in storages(tree_leaves((args, kwargs)))}
        for storage in storages(tree_leaves(result)):
            if id(storage) not in inputs and id(storage) not in self._numbers:  # else it is a view or was written in place
                self._add(storage)
        return result

    def _add(self, storage: Any) -> None:
        number = self._numbers[id(storage)] = len(self._sizes)
        self._sizes.append(storage.nbytes())
        self._changes.append((number, True))
        weakref.finalize(storage, self._free, id(storage), number).atexit = False

    def _free(self, key: int, number: int) -> None:
        self._numbers.pop(key, None)
        self._changes.append((number, False))

    def number_of(self, storage: Any) -> int | None:
        """Returns the number of a live storage; None if it was allocated before."""
        return self._numbers.get(id(storage))

    def peak(self, without: set[int]) -> tuple[int, int]:
        """Returns the largest sum of bytes at one time, and the largest storage at that time.

        Args:
            without: numbers of storages that do not count.
        """
        live: set[int] = set()
        total = most = 0
        at_peak: frozenset[int] = frozenset()
        for number, is_new in list(self._changes):
            if number in without:
                continue
            total += self._sizes[number] if is_new else -self._sizes[number]
            (live.add if is_new else live.discard)(number)
            if total > most:
                most, at_peak = total, frozenset(live)
        return most, max((self._sizes[number] for number in at_peak), default=0)


class StepMemory(Callback):
    """Counts the memory of one step, which takes longer. It waits for no weights, so other steps are as without it.

    It has no hook of Lightning's between backward and the optimizer's step: a plan depends on whether somebody reads gradients.

    Args:
        step: number of the step.

    Attributes:
        memory: after that step.
    """

    def __init__(self, step: int) -> None:
        self.memory: Memory | None = None
        self._step = step
        self._allocations: Allocations | None = None
        self._until_stopped = ExitStack()
        self._gradients: dict[int, tuple[int, int | None]] = {}
        """By the id of a gradient's storage, its bytes and its number in the allocations."""
        self._pooled = 0

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        # From the end of a step to the end of the next one, so that it loads its batch.
        if trainer.global_step == self._step and self._allocations is None and self.memory is None:
            self._start(trainer, module)
        elif trainer.global_step == self._step + 1 and self._allocations is not None:
            self._stop(trainer, module)

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        self._until_stopped.close()  # the process may train again

    def _start(self, trainer: Trainer, module: LightningModule) -> None:
        self._allocations = Allocations()
        trained = [parameter for parameter in _parameters(module) if parameter.requires_grad and not parameter.is_meta]
        for parameter in trained:
            self._until_stopped.callback(parameter.register_post_accumulate_grad_hook(self._see_gradient).remove)
        self._pooled = sum(group.pooled_bytes for group in _groups(trainer))
        self._until_stopped.enter_context(self._allocations)

    def _see_gradient(self, parameter: Tensor) -> None:
        if self._allocations is None or parameter.grad is None:
            return
        for storage in storages([parameter.grad]):
            self._gradients[id(storage)] = storage.nbytes(), self._allocations.number_of(storage)

    def _stop(self, trainer: Trainer, module: LightningModule) -> None:
        assert self._allocations is not None, "started one step before"
        self._until_stopped.close()
        with WithoutSubclasses():  # the values of weights are not needed
            for parameter in _parameters(module):  # the gradients whose accumulation has no hook
                self._see_gradient(parameter)
            held = [*_parameters(module), *module.buffers()], list(_optimizer_tensors(trainer))
            weights, optimizer = map(bytes_by_storage, held)
            # Modes may make buckets anew in this step. Such weights and states are no activations.
            numbers = {self._allocations.number_of(storage) for tensors in held for storage in storages(tensors)}
        numbers |= {number for _, number in self._gradients.values()}
        transient, largest = self._allocations.peak({number for number in numbers if number is not None})
        self.memory = Memory(
            weights=sum(weights.values()),
            gradients=sum(size for size, _ in self._gradients.values()),
            optimizer=sum(size for key, size in optimizer.items() if key not in weights),
            activations=transient,
            largest=largest,
            buffers=self._pooled,
        )
        self._allocations = None


def _parameters(module: LightningModule) -> Collection[Tensor]:
    """Returns the parameters of all modules. A module's own dictionary may wait for the weights that are read from it."""
    held = [parameter for part in module.modules() for parameter in dict.values(parameters_of(part)) if parameter is not None]
    return {id(parameter): parameter for parameter in held}.values()


def _optimizer_tensors(trainer: Trainer) -> Iterator[Tensor]:
    """Yields the optimizers' state, and what they update in place of the parameters."""
    modes = trainer.strategy.modes if isinstance(trainer.strategy, OverlapStrategy) else ()
    for optimizer in trainer.optimizers:
        plain = getattr(optimizer, "optimizer", optimizer)
        for mode in modes:
            if isinstance(mode, OptimizerHolder):
                yield from mode.stepped_parameters(plain) or ()
        yield from (leaf for leaf in tree_leaves(list(plain.state.values())) if isinstance(leaf, Tensor))


def _groups(trainer: Trainer) -> set[Group]:
    modes = trainer.strategy.modes if isinstance(trainer.strategy, OverlapStrategy) else ()
    return {group for mode in modes for group in mode.groups}
