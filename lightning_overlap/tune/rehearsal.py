"""The record of a rehearsal: one rank's step as computation, posts and waits, and the memory that the rank holds.

A rank of a world that does not exist is rehearsed by a process that runs the user's training step through Trainer with the real modes,
whose transfers take no time. So the record holds for every mode and mixture of modes, and no formula describes what a mode does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from lightning_overlap.tables import as_text, in_megabytes
from lightning_overlap.tune.memory import Memory

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
        nbytes: bytes that this rank sends.
        ranks: global ranks of all members; of ``send`` and ``receive`` the sender and the receiver; of ``broadcast`` the source first.
        verb: what the members do.
        background: on gloo its data yields to that of other groups, see :func:`lightning_overlap.ranks.world.make_group`.
        received: bytes that this rank receives; in an all-to-all others than it sends.
    """

    transfer: int
    label: str
    number: int
    nbytes: int
    ranks: tuple[int, ...]
    verb: Verb
    background: bool
    received: int = 0


class Wait(NamedTuple):
    """The rank waits for a transfer. A transfer without a wait is not waited for (a pipeline's send).

    Attributes:
        transfer: number of the :class:`Post`.
        previous: the wait is for the transfer that the step before has posted under this number.
    """

    transfer: int
    previous: bool = False


@dataclass(frozen=True)
class Rehearsal:
    """One rank's step, rehearsed.

    Attributes:
        rank: global rank.
        stage: of the pipeline; of its first virtual stage, the number among ranks.
        world_size: number of ranks.
        events: one step, once the steps are all alike: each event's median over a few of them. A rank repeats it: a transfer that
            is posted in a step may be waited for in the next one.
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


def memory_table(rehearsals: Sequence[Rehearsal]) -> str:
    """Formats the memory of each rehearsed rank."""
    head = ("a rank of stage", "weights", "gradients", "optimizer", "activations", "(largest one)", "buffers", "together")
    rows = []
    for each in rehearsals:
        memory = each.memory
        sizes = (memory.weights, memory.gradients, memory.optimizer, memory.activations, memory.largest, memory.buffers, memory.peak)
        rows.append((str(each.stage), *map(in_megabytes, sizes)))
    return as_text(head, rows, numbers=True)
