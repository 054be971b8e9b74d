"""Rehearses ranks of a world that does not exist: the order of their computation and transfers, and their memory.

A process plays one rank of each pipeline stage. It runs the user's training step through Trainer with the real modes, whose transfers
take no time. So the result holds for every mode and mixture of modes, and no formula describes what a mode does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

Verb = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all", "send", "receive", "broadcast", "gather"]
"""The verbs of :class:`~lightning_overlap.ranks.group.Group`, and two that only its blocking verbs use: ``broadcast``, ``gather``."""


class Compute(NamedTuple):
    """Work of the rank between two events: computation, and everything else that occupies its main thread (the data loader).

    Attributes:
        seconds: duration, without transfers.
    """

    seconds: float


class Post(NamedTuple):
    """A transfer that the rank posts.

    Attributes:
        transfer: number of the post in the step, from 0: its :class:`Wait` has the same number.
        label: name of the data, such as ``data.grads[3]``; the part before the first dot names the mode.
        number: how many transfers of this label between these ranks the rank has posted before in this step.
        nbytes: bytes that this rank sends. 0 where it only receives, which it then does as the peer's post says.
        ranks: global ranks of all members; of ``send`` and ``receive`` the sender and the receiver; of ``broadcast`` the source first.
        verb: what the members do.
        background: on gloo its data yields to that of other groups, see :func:`lightning_overlap.ranks.world.make_group`.
    """

    transfer: int
    label: str
    number: int
    nbytes: int
    ranks: tuple[int, ...]
    verb: Verb
    background: bool


class Wait(NamedTuple):
    """The rank waits for a transfer. Label, number and ranks of a transfer identify it on all its ranks.

    Attributes:
        transfer: number of the :class:`Post`. If that post comes later in the step, the wait is for the transfer that the step
            before has posted under this number. A transfer without a wait is not waited for (a pipeline's send).
    """

    transfer: int


@dataclass(frozen=True)
class Memory:
    """Bytes that a rank holds.

    Attributes:
        weights: parameters and buffers, as tensors or in flat buckets.
        gradients: the largest sum of all gradients at one time, as tensors or in flat buckets.
        optimizer: the optimizer's state, and fp32 copies of weights that it updates.
        activations: everything else at the peak of a step: what autograd keeps, results under way, buffers of transfers, the batch.
        largest: the largest tensor in ``activations``: the logits, where the vocabulary is large.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    largest: int

    @property
    def peak(self) -> int:
        """The sum: the most that the rank holds at one time."""
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class Rehearsal:
    """One rank's step, rehearsed.

    Attributes:
        rank: global rank.
        stage: of the pipeline; of its first virtual stage, the number among ranks.
        world_size: number of ranks.
        events: one step, once the steps are all alike: each event's median over a few of them. A rank repeats it: a transfer posted
            near the end of a step may be waited for in the next one.
        memory: of the rank.
    """

    rank: int
    stage: int
    world_size: int
    events: tuple[Compute | Post | Wait, ...]
    memory: Memory

    @property
    def seconds(self) -> float:
        """Duration of the step without transfers."""
        return sum(event.seconds for event in self.events if isinstance(event, Compute))
