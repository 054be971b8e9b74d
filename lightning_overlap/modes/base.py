"""What a mode may do."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_overlap.decision import Choices
from lightning_overlap.ranks.clock import Timeline
from lightning_overlap.ranks.group import Group
from lightning_overlap.ranks.mesh import ParallelMesh
from lightning_overlap.state.shards import Place

LATE_GRADIENT = "_lightning_overlap_late"
"""Attribute of a parameter: a mode completes its gradient in ``finish_backward``, and nobody may send it before."""
STAGE = "_lightning_overlap_stage"
"""Attribute of a parameter: its stage in the model. A later one's gradients are complete first, and its weights are read last."""
COUNTED_ELSEWHERE = "_lightning_overlap_counted_elsewhere"
"""Attribute of a parameter, and of a shard of it: another rank has it too, and its gradient is in that one's norm."""


class Step(Protocol):
    """The user's training step, for a mode that runs it in parts. One for each batch."""

    batch: Any
    """The whole batch, the same on all ranks that share it."""
    place: tuple[int, ...]
    """Tells this step from others: the run's seed, the data rank, the epoch, the batch."""

    def forward(self, part: Any, number: int) -> Tensor | None:
        """``training_step`` on one part; the loss, with its graph, if it gives one. Its logs are kept under the part's number."""

    def backward(self, loss: Tensor, share: float) -> None:
        """Backward of a part's loss, which counts for ``share`` of the batch's."""

    def hold(self) -> AbstractContextManager[None]:
        """Other modes take gradients inside for incomplete."""

    def start_backward(self) -> None:
        """Before the first part's backward."""

    def finish_backward(self) -> None:
        """After the last one's: gradients are complete."""

    def aside(self, modules: Sequence[nn.Module], *, metrics: bool) -> AbstractContextManager[None]:
        """Forwards inside leave these modules as they were, their parameters aside, and the module's metrics too, if ``metrics``."""

    def trial(self) -> AbstractContextManager[None]:
        """Forwards inside leave nothing behind: the module's buffers, metrics and attributes, what it logs."""

    @property
    def weight(self) -> Callable[[Any], Any] | None:
        """The module's method that says what a part counts for, if it has one."""

    def logged(self, shares: Sequence[float], weights: Sequence[float] | None = None) -> Any:
        """What all parts together have logged and returned, on the rank that has losses; can be pickled.

        Args:
            shares: of the parts in the loss.
            weights: of the parts in means of anything else; by default the shares.
        """

    def log(self, said: Any) -> None:
        """Logs it, on every rank."""


@dataclass(frozen=True)
class Setup:
    """What every mode is made with, beside its own configuration and choices.

    Attributes:
        mesh: the ranks.
        timeout: how long a transfer may take.
        roles: of the model's parts, by name, as the user gave them (``parallel_plan``).
        first_step_is_verified: the whole first step is compared with that of the unsharded model, so a mode need not check its part.
    """

    mesh: ParallelMesh
    timeout: timedelta
    roles: Mapping[str, str]
    first_step_is_verified: bool


class OverlapMode:
    """One way to shard work and hide the communication it costs. Override what the mode needs.

    Args:
        config: the mode's: what was asked for.
        choices: the mode's: what was decided.
        setup: ranks, timeout, roles.

    Attributes:
        name: what labels of its transfers begin with.
        timeline: if it is set, what the mode computes is added to it, where that is more than the user's own step.
    """

    name: str
    cuts_the_model: ClassVar[bool] = False
    """Whether a rank holds, or computes, a part of the model only."""
    keeps_bits: ClassVar[bool] = True
    """Whether what it computes has the bits of the model whole, if nothing is wrong."""
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

    @classmethod
    def holds(cls, model: nn.Module, config: Any, roles: Mapping[str, str], mesh: ParallelMesh) -> Callable[[str], bool]:
        """Tells whether this rank will hold a parameter or buffer once the mode is made, by its name.

        Args:
            model: without memory for its parameters.
            config: the mode's.
            roles: of the model's parts, by name, as the user gave them.
            mesh: the ranks.

        Raises:
            ConfigError: the mode cannot shard this model.
        """
        return lambda name: True

    @property
    def groups(self) -> dict[str, Group]:
        """By attribute, and by key where an attribute has several. Each once."""
        found = {value: name for name, value in vars(self).items() if isinstance(value, Group)}
        for name, several in vars(self).items():
            if isinstance(several, dict):
                found |= {value: f"{name}[{key}]" for key, value in several.items() if isinstance(value, Group)}
        return {name: group for group, name in found.items()}

    def refuse(self, model: nn.Module) -> None:
        """Before any mode takes its share of the model, which a refusal leaves as it is.

        Raises:
            ConfigError: the model is none for this mode.
        """

    def parallelize(self, model: nn.Module) -> None:
        """Takes this rank's share of the model."""

    def prepare_optimizers(self, optimizers: Sequence[Optimizer]) -> None:
        """Prepares what this rank updates. The user's ``param_groups`` stay as they are, but for the time of a step."""

    @contextmanager
    def hold_gradient_sync(self) -> Iterator[None]:
        """Backwards in this context only accumulate, all but the last of an accumulation window: ``_held`` is True."""
        before, self._held = self._held, True
        try:
            yield
        finally:
            self._held = before

    @contextmanager
    def complete_gradients(self) -> Iterator[None]:
        """Backwards in this context are whole steps, whatever is held around it."""
        before, self._held = self._held, False
        try:
            yield
        finally:
            self._held = before

    def start_forward(self) -> None:
        """Before each training step of the user's."""

    def trial(self) -> AbstractContextManager[None]:
        """Around steps that are computed for their loss and gradients only: this mode trains nothing with them, and learns nothing."""
        return nullcontext()

    def whole(self) -> AbstractContextManager[None]:
        """Inside, this rank has the model as the user wrote it, with the present weights of all ranks. Entered by all ranks."""
        return nullcontext()

    def own_part(self, name: str, whole: Tensor) -> Tensor | None:
        """What this rank has of a parameter's gradient, or of a buffer, which is whole; None if it has nothing of it."""
        return whole

    @property
    def runs_steps(self) -> bool:
        """Whether this mode runs the user's steps, in parts, backward included."""
        return False

    def run_step(self, step: Step) -> None:
        """Runs one, if it :attr:`runs_steps`."""

    def whole_parts(self, step: Step) -> Iterator[tuple[Any, int, float]]:
        """The parts of a step for the model whole: the part, its number, its share of the batch's loss.

        While one is given, random numbers are those that the part has in :meth:`run_step`.
        """
        yield step.batch, 0, 1.0

    @property
    def has_the_loss(self) -> bool:
        """Whether this rank comes to the loss."""
        return True

    def with_the_loss(self, compute: Callable[[], Any]) -> Any:
        """What ``compute`` gives on the rank that comes to the loss, on every rank, which alone calls it. Collective.

        Raises:
            Exception: what it raises there; elsewhere a :class:`ConfigError` or ``TransferError`` with its words.
        """
        return compute()

    @property
    def mirrors_evaluation(self) -> bool:
        """Whether ranks without the loss leave the steps of a validation in the middle of a fit."""
        return False

    def failed_without_loss(self, said: str | None) -> str | None:
        """What failed on a rank that does not come to the loss where it did not on the one that does. Collective.

        Args:
            said: what failed on this rank; None if nothing did.
        """
        return None

    def start_evaluation(self) -> None:
        """Before a validation in the middle of a fit."""

    def evaluating(self) -> AbstractContextManager[None]:
        """Around each of its steps."""
        return nullcontext()

    def finish_evaluation(self) -> None:
        """After it."""

    def start_backward(self) -> None:
        """Before each backward."""

    def finish_backward(self) -> None:
        """After each backward: gradients are complete then, unless they are held."""

    def stepped_parameters(self, optimizer: Optimizer) -> list[nn.Parameter] | None:
        """What is stepped, with its gradients, in the place of the optimizer's parameters; None if nothing stands in for them."""
        return None

    def reduce_norm(self, sum_of_squares: Tensor) -> Tensor:
        """The sum over the ranks that hold different parts of the gradients."""
        return sum_of_squares

    def sync_parameters(self) -> None:
        """Weights are complete after this: before evaluation, checkpoints, and whatever reads them."""

    def whole_model(self, state: dict[str, Any]) -> dict[str, Any]:
        """The module's ``state_dict`` with what other ranks hold of it, on the first rank. Collective."""
        return state

    def whole_optimizer(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        """An optimizer's ``state_dict()`` with what other ranks hold of it, on the first rank. Collective."""
        return state

    def own_optimizer(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        """What this rank holds of an optimizer's ``state_dict()``, which is whole."""
        return state

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any] | None:
        """The state for a checkpoint, as the unsharded optimizer's ``state_dict()``; None if this mode shards none."""
        return None

    def load_optimizer_state(self, optimizer: Optimizer, state: dict[str, Any]) -> bool:
        """Loads such a state; False if this mode shards none."""
        return False

    def optimizer_shards(
        self, optimizer: Optimizer, saved: Mapping[str, Mapping[str, Any]] | None = None
    ) -> dict[str, dict[str, Any]] | None:
        """This rank's part of the state by parameter and key, nothing copied; None if this mode shards none.

        What has its parameter's shape is a :class:`~lightning_overlap.state.shards.Run` of it. Communicates nothing.

        Args:
            optimizer: whose state it is.
            saved: to load: a state by parameter and key, whose tensors may be on the meta device. Room is made for one like it
                first, and what is returned is to be written into.
        """
        return None

    def part_of(self, name: str, coordinates: Mapping[str, int]) -> Hashable:
        """Which part of a parameter or buffer the rank with these coordinates has; None if it has none.

        The same part is the same values. By default all ranks have the same.
        """
        return ()

    def place_of(self, name: str) -> Place | None:
        """Where this rank's piece of a parameter lies in it; None where this mode does not cut it."""
        return None

    def adopt_parameters(self) -> None:
        """Weights or optimizer state were loaded anew: whatever is kept beside the weights follows them."""

    def release(self, *, complete: bool = True) -> None:
        """Leaves the model as it was found, with its present weights. The optimizer's state can still be asked for.

        Args:
            complete: wait for what is in flight. After a failure nothing may be waited for, and weights may be partly old.
        """

    def close(self) -> None:
        """Gives back threads and connections, after :meth:`release`."""
