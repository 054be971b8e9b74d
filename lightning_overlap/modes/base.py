"""The contracts between the strategy and the modes.

Every mode is an :class:`OverlapMode`. What only some modes do is in contracts of its own, which a mode inherits beside it:

    Driver            runs the training step in parts, backward included     pipeline
    Sharder           a rank computes a part of each forward                 pipeline, context, tensor
    Holder            a Sharder under which it holds a part of the model      pipeline, tensor
    OptimizerHolder   a rank holds a part of the optimizer's state           data
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_overlap.decision import Choices
from lightning_overlap.model.boundary import Boundary, Nesting
from lightning_overlap.ranks.clock import Timeline
from lightning_overlap.ranks.group import Group
from lightning_overlap.ranks.mesh import ParallelMesh
from lightning_overlap.state.shards import Place
from lightning_overlap.steps.step import Step


@dataclass(frozen=True)
class Setup:
    """What every mode is made with, beside its own configuration and choices.

    Attributes:
        mesh: the ranks.
        timeout: how long a transfer may take.
        roles: of the model's parts, by name, as the user gave them (``parallel_plan``).
        first_step_is_verified: the whole first step is compared with that of the unsharded model, so a mode need not check its part.
        boundary: of the model's block stack, where modes register how they cut hidden states.
    """

    mesh: ParallelMesh
    timeout: timedelta
    roles: Mapping[str, str]
    first_step_is_verified: bool
    boundary: Boundary = field(default_factory=Boundary)


class OverlapMode:
    """One way to shard work and to hide the communication that it costs. A mode overrides what it needs.

    Args:
        config: the mode's: what was asked for.
        choices: the mode's: what was decided.
        setup: ranks, timeout, roles.

    Attributes:
        name: prefix of the labels of the mode's transfers.
        nesting: what the mode cuts, which decides the order in which modes are applied.
        timeline: where the mode records what it computes beyond the user's own step; None: nowhere.
    """

    name: str
    nesting: ClassVar[Nesting]
    keeps_bits: ClassVar[bool] = True
    """Whether a step has the same bits as one of the unsharded model, and as one without overlap."""
    announcements: ClassVar[tuple[str, ...]] = ()
    """Labels of transfers that tell a receiver what comes next: a benchmark without transfers still makes them."""
    remark: ClassVar[str] = ""
    """A sentence about its transfers for the profiler's table."""

    def __init__(self, config: Any, choices: Choices, setup: Setup) -> None:
        self.config = config
        self.choices = choices
        self.setup = setup
        self.mesh = setup.mesh
        self.timeout = setup.timeout
        self.timeline: Timeline | None = None
        self._held = False

    @property
    def groups(self) -> tuple[Group, ...]:
        """The groups over which the mode communicates, each once."""
        return ()

    def refuse(self, model: nn.Module) -> None:
        """Checks the model before any mode changes it.

        Raises:
            ConfigError: the mode cannot cut this model. The model is unchanged.
        """

    def parallelize(self, model: nn.Module) -> None:
        """Cuts the model to this rank's part."""

    def prepare_optimizers(self, optimizers: Sequence[Optimizer]) -> None:
        """Prepares what this rank updates. ``param_groups`` stay the user's, except during a step."""

    @contextmanager
    def hold_gradient_sync(self) -> Iterator[None]:
        """Inside, backwards only accumulate gradients (all but the last of an accumulation window): ``_held`` is True."""
        before, self._held = self._held, True
        try:
            yield
        finally:
            self._held = before

    @contextmanager
    def complete_gradients(self) -> Iterator[None]:
        """Inside, backwards complete their gradients, also within :meth:`hold_gradient_sync`."""
        before, self._held = self._held, False
        try:
            yield
        finally:
            self._held = before

    def trial(self) -> AbstractContextManager[None]:
        """Inside, steps are computed for their loss and gradients only: the mode updates nothing and remembers nothing of them."""
        return nullcontext()

    def start_forward(self) -> None:
        """Called before each training step."""

    def explain_failure(self) -> None:
        """Called when a training step has failed.

        Raises:
            ConfigError: the mode knows the cause.
        """

    def start_backward(self) -> None:
        """Called before each backward."""

    def finish_backward(self) -> None:
        """Called after each backward. Gradients are complete afterwards, unless they are held."""

    def reduce_norm(self, sum_of_squares: Tensor) -> Tensor:
        """Sums a scalar over the ranks that hold different parts of the gradients. Collective."""
        return sum_of_squares

    def sync_parameters(self) -> None:
        """Completes the weights, before anything reads them (evaluation, a checkpoint)."""

    def adopt_parameters(self) -> None:
        """Called after weights or optimizer state were loaded: copies that the mode keeps follow them."""

    def release(self, *, complete: bool = True) -> None:
        """Gives the model back as the user made it, with its present weights. The optimizer's state can still be asked for.

        Args:
            complete: wait for transfers under way. After a failure nothing may be waited for, and some weights may be old.
        """

    def close(self) -> None:
        """Ends threads and connections, after :meth:`release`."""
        for group in self.groups:
            group.close()


class Driver(OverlapMode, ABC):
    """A mode that runs the user's steps in parts, backward included. On some ranks a step may end before the loss."""

    @abstractmethod
    def run_step(self, step: Step) -> None:
        """Runs a training step: the forward and backward of all its microbatches."""

    @abstractmethod
    def whole_parts(self, step: Step) -> Iterator[tuple[Any, int, float]]:
        """Yields the microbatches of a step for the whole model: microbatch, number, share of the batch's loss.

        Until the next one is taken, random numbers are those that the microbatch has in :meth:`run_step`.
        """

    @property
    @abstractmethod
    def has_the_loss(self) -> bool:
        """Whether this rank computes the loss."""

    @abstractmethod
    def with_the_loss(self, compute: Callable[[], Any]) -> Any:
        """Runs ``compute`` on the rank that has the loss and broadcasts its result. Collective.

        Raises:
            Exception: the error of ``compute``; on the other ranks a ``ConfigError`` or ``TransferError`` with its message.
        """

    @property
    @abstractmethod
    def mirrors_evaluation(self) -> bool:
        """Whether validation steps inside a fit end before the loss on the ranks that do not compute it."""

    @abstractmethod
    def failed_without_loss(self, message: str | None) -> str | None:
        """Finds an error of a rank without the loss, if the rank with the loss has none. Collective.

        Args:
            message: of this rank's error; None if it has none.

        Returns:
            The message of the first such error; None if there is none.
        """

    @abstractmethod
    def start_evaluation(self) -> None:
        """Called before a validation inside a fit."""

    @abstractmethod
    def evaluating(self) -> AbstractContextManager[None]:
        """Around each step of a validation inside a fit."""

    @abstractmethod
    def finish_evaluation(self) -> None:
        """Called after a validation inside a fit."""


class Sharder(OverlapMode, ABC):
    """A mode under which a rank computes a part of each forward."""

    @abstractmethod
    def whole(self) -> AbstractContextManager[None]:
        """Inside, this rank has the model as the user wrote it, with the present weights of all ranks. Collective."""


class Holder(Sharder, ABC):
    """A mode under which a rank holds a part of the model."""

    @classmethod
    def holds(cls, model: nn.Module, config: Any, roles: Mapping[str, str], mesh: ParallelMesh) -> Callable[[str], bool]:
        """Tells which parameters and buffers, by name, this rank will hold any part of.

        Args:
            model: without memory (on the meta device).
            config: the mode's.
            roles: of the model's parts, by name, as the user gave them.
            mesh: the ranks.

        Raises:
            ConfigError: the mode cannot cut such a model.
        """
        return lambda name: True

    @abstractmethod
    def local_part(self, name: str, tensor: Tensor) -> Tensor | None:
        """This rank's part of a tensor that belongs to a parameter (its gradient) or is a buffer; None if it holds no part.

        Args:
            name: of the parameter or buffer.
            tensor: whole, in the parameter's shape.
        """

    @abstractmethod
    def whole_model(self, state: dict[str, Any]) -> dict[str, Any]:
        """Adds the other ranks' parts to the module's ``state_dict``, on the first rank. Collective."""

    @abstractmethod
    def whole_optimizer(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        """Adds the other ranks' parts to an optimizer's ``state_dict()``, on the first rank. Collective."""

    @abstractmethod
    def local_optimizer(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        """This rank's part of an optimizer's whole ``state_dict()``."""

    @abstractmethod
    def layout_of(self, name: str) -> Hashable:
        """Identifies how this mode cuts a parameter or buffer: those with the same layout are cut over the ranks alike."""

    @abstractmethod
    def part_of(self, layout: Hashable, rank: int) -> Hashable:
        """Identifies the part that a rank holds of a tensor: equal for equal values; None if it holds no part.

        Args:
            layout: of the tensor, from :meth:`layout_of`.
            rank: the global rank.
        """

    def place_of(self, name: str) -> Place | None:
        """Where this rank's part lies in what the modes before this one have left of a tensor; None if it is all of that."""
        return None


class OptimizerHolder(OverlapMode, ABC):
    """A mode under which a rank holds a part of the optimizer's state. An answer of None (or False): not of this optimizer."""

    @abstractmethod
    def stepped_parameters(self, optimizer: Optimizer) -> list[nn.Parameter] | None:
        """The shards, with their gradients, that are stepped in the place of the optimizer's parameters."""

    @abstractmethod
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any] | None:
        """The state for a checkpoint, in the form of the unsharded optimizer's ``state_dict()``. Collective."""

    @abstractmethod
    def load_optimizer_state(self, optimizer: Optimizer, state: dict[str, Any]) -> bool:
        """Loads such a state. Returns whether it did."""

    @abstractmethod
    def optimizer_shards(
        self, optimizer: Optimizer, saved: Mapping[str, Mapping[str, Any]] | None = None
    ) -> dict[str, dict[str, Any]] | None:
        """This rank's part of the state by parameter and key, without copies. Not collective.

        A value in its parameter's shape is a :class:`~lightning_overlap.state.shards.Run` of the parameter.

        Args:
            optimizer: whose state it is.
            saved: for loading: a state by parameter and key, whose tensors may be on the meta device. Memory for a state like it is
                made first, and the caller writes into what is returned.
        """


@contextmanager
def hold_gradient_syncs(modes: Sequence[OverlapMode]) -> Iterator[None]:
    """Every mode holds its gradient synchronisation inside."""
    with ExitStack() as stack:
        for mode in modes:
            stack.enter_context(mode.hold_gradient_sync())
        yield
