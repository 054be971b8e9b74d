"""The contracts between the strategy and the modes.

Every mode is an :class:`OverlapMode`. Three more contracts are for some modes only:

    Driver            runs the training step in parts, backward included     pipeline
    Sharder           a rank computes a part of each forward                 pipeline, context, tensor, expert
    Holder            a Sharder under which it holds a part of the model      pipeline, tensor, expert (by PieceHolder the last two)
    OptimizerHolder   a rank holds a part of the optimizer's state           data
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_overlap.decision import Choices
from lightning_overlap.model.boundary import Boundary, Nesting
from lightning_overlap.model.first_blocks import FirstBlocks
from lightning_overlap.ranks.clock import Timeline
from lightning_overlap.ranks.group import Group
from lightning_overlap.ranks.mesh import GroupName, ParallelMesh
from lightning_overlap.state.shards import Place
from lightning_overlap.steps.lanes import Lanes
from lightning_overlap.steps.step import Step

IMBALANCE = "_max_over_mean"
"""The end of a measurement's name, before it the part of the model, ``/`` and the kind of load: the largest load over the mean."""


class Squares(NamedTuple):
    """Sums of the squares of gradients, fp64 scalars. Ranks share the gradients of experts in another way than all others."""

    dense: Tensor
    experts: Tensor


@dataclass(frozen=True)
class Setup:
    """The arguments that all modes have in common.

    Attributes:
        mesh: the ranks.
        timeout: the longest that a transfer may take.
        roles: by name of a part of the model, its role, from the user's ``parallel_plan``.
        first_step_is_verified: the whole first step is compared with that of the unsharded model, so a mode need not check its part.
        boundary: of the model's block stack, where modes register their :class:`~lightning_overlap.model.boundary.TokenCut`.
        lanes: where the forward of one microbatch and the backward of another run beside each other. A mode whose ranks all wait at
            the same points hands over at each wait: it sets :attr:`~lightning_overlap.ranks.group.Group.before_wait`.
        first_blocks: compares blocks that modes shard with unsharded copies, unless the whole first step is compared.
    """

    mesh: ParallelMesh
    timeout: timedelta
    roles: Mapping[str, str]
    first_step_is_verified: bool
    boundary: Boundary = field(default_factory=Boundary)
    lanes: Lanes = field(default_factory=Lanes)
    first_blocks: FirstBlocks = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "first_blocks", FirstBlocks(self.boundary))


class OverlapMode:
    """One way to shard work, with the overlap that hides its communication. A mode overrides the methods that it needs.

    The class has more than 20 methods, since it has one for each thing that the core asks of a mode.

    Args:
        config: the mode's settings.
        choices: the mode's decisions.
        setup: arguments that all modes have in common.

    Attributes:
        name: the first part of the labels of the mode's transfers.
        nesting: what the mode shards. It decides the order in which modes are applied.
        timeline: records the mode's own computations; None: they are not recorded.
    """

    name: str
    nesting: ClassVar[Nesting]
    keeps_bits: ClassVar[bool] = True
    """Whether a step is bit-equal to a step of the unsharded model, and to one without overlap."""
    overlap_keeps_bits: ClassVar[bool] = False
    """Whether a step is bit-equal to one without overlap, though not to one of the unsharded model."""
    announcements: ClassVar[tuple[str, ...]] = ()
    """Labels of transfers that a receiver needs to post its next receives: a benchmark without transfers still makes these."""
    remark: ClassVar[str] = ""
    """A sentence about the mode's transfers for the profiler's table."""

    def __init__(self, config: Any, choices: Choices, setup: Setup) -> None:
        self.config = config
        self.choices = choices
        self.setup = setup
        self.mesh = setup.mesh
        self.timeout = setup.timeout
        self.timeline: Timeline | None = None
        self._holds_gradients = False

    @property
    def groups(self) -> tuple[Group, ...]:
        """The groups over which the mode communicates, each once."""
        return ()

    @property
    def forward_spans_samples(self) -> bool:
        """Whether a forward waits for that of ranks which see other samples. All of these must run as many forwards."""
        return False

    @property
    def uncounted_products(self) -> str:
        """Why torch does not see some of the products of matrices that the mode runs; empty if it sees all."""
        return ""

    @property
    def uncounted_transfers(self) -> str:
        """Why some of the mode's transfers are no verbs of its groups, and with which setting all are; empty if all are."""
        return ""

    def refuse(self, model: nn.Module) -> None:
        """Checks the model before any mode changes it.

        Raises:
            ConfigError: the mode cannot shard this model. The model is unchanged.
        """

    def parallelize(self, model: nn.Module) -> None:
        """Shards the model: this rank keeps its part."""

    def prepare_optimizers(self, optimizers: Sequence[Optimizer]) -> None:
        """Prepares the optimizers for this rank's part. ``param_groups`` stay the user's, except during a step."""

    @contextmanager
    def hold_gradient_sync(self) -> Iterator[None]:
        """Inside, backwards accumulate gradients without communication, as before the last microbatch of an accumulation window."""
        before, self._holds_gradients = self._holds_gradients, True
        try:
            yield
        finally:
            self._holds_gradients = before

    @contextmanager
    def complete_gradients(self) -> Iterator[None]:
        """Inside, backwards complete their gradients, even within :meth:`hold_gradient_sync`."""
        before, self._holds_gradients = self._holds_gradients, False
        try:
            yield
        finally:
            self._holds_gradients = before

    def trial(self) -> AbstractContextManager[None]:
        """Inside, steps compute loss and gradients only: the mode updates nothing, and keeps no state of them."""
        return nullcontext()

    def start_forward(self) -> None:
        """Called before each training step."""

    def raise_cause(self, error: Exception) -> None:
        """Called when a training step has failed by ``error``.

        Raises:
            ConfigError: the mode knows the cause.
        """

    def start_backward(self) -> None:
        """Called before each backward."""

    def finish_backward(self) -> None:
        """Called after each backward. Gradients are complete afterwards, unless they are held."""

    def reduce_norm(self, squares: Squares) -> Squares:
        """Sums each value over the ranks that hold different parts of these gradients. Collective."""
        return squares

    def measurements(self) -> dict[str, float]:
        """Values of a recent step for the profiler's log, by name. Not collective. Ranks may have values with other names."""
        return {}

    def sync_parameters(self) -> None:
        """Completes the weights before they are read (evaluation, a checkpoint)."""

    def adopt_parameters(self) -> None:
        """Called after weights or optimizer state were loaded. The mode updates its copies of them."""

    def release(self, *, complete: bool = True) -> None:
        """Restores the user's model, with its present weights. The optimizer's state stays available.

        Args:
            complete: wait for pending transfers. After a failure, nothing may be waited for, and weights may be old or NaN.
        """

    def close(self) -> None:
        """Ends threads and connections. Called after :meth:`release`."""
        for group in self.groups:
            group.close()


class Driver(OverlapMode, ABC):
    """A mode that runs the user's steps in parts, with their backward. On some ranks a step may end before the loss."""

    @abstractmethod
    def run_step(self, step: Step) -> None:
        """Runs a training step: the forward and backward of all its microbatches."""

    @abstractmethod
    def unsharded_microbatches(self, step: Step) -> Iterator[tuple[Any, int, float]]:
        """Yields the microbatches of a step for the unsharded model: microbatch, number, share of the batch's loss.

        Until the next microbatch is requested, random numbers are the same as in the microbatch's forward in :meth:`run_step`.
        """

    @property
    @abstractmethod
    def has_the_loss(self) -> bool:
        """Whether this rank computes the loss."""

    @abstractmethod
    def with_the_loss(self, compute: Callable[[], Any]) -> Any:
        """Runs ``compute`` on the rank that has the loss and broadcasts its result. Collective.

        Raises:
            Exception: the error of ``compute``; on other ranks a ``ConfigError`` or ``TransferError`` with its message.
        """

    @property
    @abstractmethod
    def evaluates_loss_on_one_rank(self) -> bool:
        """Whether validation steps inside a fit end before the loss on ranks that do not compute it."""

    @abstractmethod
    def error_without_loss(self, message: str | None) -> str | None:
        """Finds an error of a rank without the loss, if the rank with the loss has no error. Collective.

        Args:
            message: the message of this rank's error; None if it has no error.

        Returns:
            The message of the first such error; None if there is no such error.
        """

    @abstractmethod
    def start_evaluation(self) -> None:
        """Called before a validation inside a fit."""

    @abstractmethod
    def evaluating(self) -> AbstractContextManager[None]:
        """Inside, a step of a validation inside a fit runs this rank's part."""

    @abstractmethod
    def finish_evaluation(self) -> None:
        """Called after a validation inside a fit."""


class Sharder(OverlapMode, ABC):
    """A mode under which a rank computes a part of each forward."""

    @abstractmethod
    def unsharded(self) -> AbstractContextManager[None]:
        """Inside, this rank has the user's unsharded model, with the present weights of all ranks. Collective."""


class Holder(Sharder, ABC):
    """A mode under which a rank holds a part of the model."""

    @classmethod
    def holds(cls, model: nn.Module, config: Any, roles: Mapping[str, str], mesh: ParallelMesh) -> Callable[[str], bool]:
        """Returns a function that tells whether this rank will hold a part of the parameter or buffer with a name.

        Args:
            model: on the meta device, without memory.
            config: the mode's.
            roles: by name of a part of the model, its role, from the user's ``parallel_plan``.
            mesh: the ranks.

        Raises:
            ConfigError: the mode cannot shard this model.
        """
        return lambda name: True

    @abstractmethod
    def local_part(self, name: str, tensor: Tensor) -> Tensor | None:
        """This rank's part of a tensor that has a parameter's or buffer's shape (a gradient); None if this rank holds no part.

        Args:
            name: of the parameter or buffer.
            tensor: unsharded.
        """

    def local_gradients(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's part of unsharded gradients of its batch, by name of a parameter, as a step in a trial computes them.

        All ranks of a stage call it for the same names.
        """
        parts = {name: self.local_part(name, gradient) for name, gradient in gradients.items()}
        return {name: part for name, part in parts.items() if part is not None}

    @abstractmethod
    def gather_model_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """Adds the other ranks' parts to the module's ``state_dict()``, on the first rank. Collective."""

    @abstractmethod
    def gather_optimizer_state(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        """Adds the other ranks' parts to an optimizer's ``state_dict()``, on the first rank. Collective."""

    @abstractmethod
    def local_optimizer_state(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        """This rank's part of an unsharded optimizer's ``state_dict()``."""

    @abstractmethod
    def layout_of(self, name: str) -> Hashable:
        """Identifies how this mode shards a parameter or buffer: equal for all that are sharded in the same way."""

    @abstractmethod
    def part_of(self, layout: Hashable, rank: int) -> Hashable:
        """Identifies the part that a rank holds of a tensor: equal for ranks with the same part; None if the rank holds no part.

        Args:
            layout: the tensor's, from :meth:`layout_of`.
            rank: the global rank.
        """

    def sharers_of(self, layout: Hashable) -> GroupName | None:
        """Names the group over which the optimizer's state of a tensor is sharded, if it is another one than that of most tensors.

        Args:
            layout: the tensor's, from :meth:`layout_of`.
        """
        return None

    def place_of(self, name: str) -> Place | None:
        """Where this rank's part lies in the part that outer modes give this rank; None if it is all of that part."""
        return None


class OptimizerHolder(OverlapMode, ABC):
    """A mode under which a rank holds a part of the state of some optimizers. For other optimizers a method returns None or False."""

    @abstractmethod
    def stepped_parameters(self, optimizer: Optimizer) -> list[nn.Parameter] | None:
        """The shards, with their gradients, that the optimizer steps in place of its parameters."""

    @abstractmethod
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any] | None:
        """The state for a checkpoint, in the form of the unsharded optimizer's ``state_dict()``. Collective."""

    @abstractmethod
    def load_optimizer_state(self, optimizer: Optimizer, state: dict[str, Any]) -> bool:
        """Loads a state of :meth:`optimizer_state`. Returns whether it did."""

    @abstractmethod
    def optimizer_shards(
        self, optimizer: Optimizer, saved: Mapping[str, Mapping[str, Any]] | None = None
    ) -> dict[str, dict[str, Any]] | None:
        """This rank's part of the state by parameter and key, without copies. Not collective.

        A value in its parameter's shape is a :class:`~lightning_overlap.state.shards.Run` of the parameter.

        Args:
            optimizer: whose state it is.
            saved: for loading: a state by parameter and key, whose tensors may be on the meta device. The method first allocates a
                state like it, and the caller writes into the returned tensors.
        """


@contextmanager
def hold_gradient_syncs(modes: Sequence[OverlapMode]) -> Iterator[None]:
    """Inside, every mode holds its gradient synchronization, see :meth:`OverlapMode.hold_gradient_sync`."""
    with ExitStack() as stack:
        for mode in modes:
            stack.enter_context(mode.hold_gradient_sync())
        yield
