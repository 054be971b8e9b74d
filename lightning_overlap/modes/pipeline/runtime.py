"""Runs a rank's part of a schedule, with the transfers between stages beside it.

    rank 0   F0.0   F0.1   F0.2 | B0.0 ...
    send          0.0    0.1    0.2
    receive                   0.0 (gradient)
    rank 1          ....   F1.0   B1.0   F1.1 ...

Both ends know the whole schedule, so that a receive is posted before it is needed, in the order in which its peer sends, and
a send is never waited for: its tensor is let go of when it has gone. No transfer stands behind one of the other direction, see
:func:`lane`.

The plain twin posts transfers between two actions, those that :func:`in_turn` has there, and waits for all of them at once:
nothing is on its way while either end computes. On CUDA the first batch of a kind goes that way, too: see ``Group.in_one_order``.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from lightning_overlap.decision import ConfigError
from lightning_overlap.ranks.clock import Timeline
from lightning_overlap.ranks.group import Group, Pending
from lightning_overlap.steps.schedule import Action, Schedule
from lightning_overlap.steps.simulate import Handover, in_turn

DTYPES = (
    *(torch.float32, torch.bfloat16, torch.float16, torch.float64),
    *(torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool),
)
Direction = tuple[str, bool, int]
"""What is sent ("F" or "B"), whether to a higher rank, and whether from an odd one."""
_HEADER = 11
"""Numbers that announce the form of a tensor: dims, dtype, whether it has a gradient, the shape."""


@dataclass(frozen=True)
class Form:
    """What a tensor looks like that goes from stage to stage."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    trained: bool
    """Whether it has a gradient: nothing that is trained lies before it otherwise."""

    @classmethod
    def of(cls, x: Tensor) -> Form:
        return cls(tuple(x.shape), x.dtype, x.requires_grad)

    def pack(self) -> list[int]:
        numbers = [len(self.shape), DTYPES.index(self.dtype), int(self.trained), *self.shape]
        return numbers + [0] * (_HEADER - len(numbers))

    @classmethod
    def unpack(cls, numbers: list[int]) -> Form:
        dims, dtype, trained, *shape = numbers
        return cls(tuple(shape[:dims]), DTYPES[dtype], bool(trained))


Tensors = Sequence[Tensor]
"""What one stage hands on to the next one for a microbatch."""
Forms = tuple[Form, ...]


class Compute(Protocol):
    """What an action does."""

    def forward(self, stage: int, microbatch: int, received: Tensors, forms: Forms) -> tuple[Tensors, Forms] | None:
        """What the next stage gets; None from the last one."""

    def backward(self, action: Action, gradients: Tensors) -> Tensors:
        """The gradients for the stage before, of what has one."""

    def weights(self, stage: int, microbatch: int) -> None:
        """The weights' gradients that a backward has left."""


@dataclass
class Channel:
    """One direction between two neighbours, as this rank receives from it.

    Attributes:
        group: whose transfers they are.
        source: the sender's rank in it.
        items: what is sent, in the sender's order.
        posted: how many of them have a receive.
        taken: how many of them have been taken.
    """

    group: Group
    source: int
    items: list[Action]
    posted: int = 0
    taken: int = 0
    pending: dict[Action, tuple[list[Pending], Forms]] = field(default_factory=dict)


class Runtime:
    """One rank's part of one schedule.

    Args:
        schedule: the whole of it.
        rank: this one, in the pipeline.
        groups: the pipeline's ranks, for each direction, as :func:`channel_kinds` has them.
        forms: what is known of what a stage hands on, by stage and kind of microbatch; it grows, and other runtimes share it.
        announced: what of it this rank has told its receiver; shared as well.
        device: where tensors are.
        prefetch: receives that are posted ahead for each channel; None for the plain twin.
        handed: by stage, how many tensors it hands on for a microbatch; one each by default.
    """

    def __init__(
        self,
        schedule: Schedule,
        rank: int,
        groups: Mapping[Direction, Group],
        forms: dict[tuple[int, Hashable], Forms],
        announced: set[tuple[int, Hashable]],
        device: torch.device,
        prefetch: int | None,
        handed: Sequence[int] | None = None,
    ) -> None:
        self._schedule = schedule
        self._rank = rank
        self._groups = groups
        self._forms = forms
        self._announced = announced
        self._device = device
        self._prefetch = prefetch
        self._handed = handed or [1] * schedule.stages
        self._sends: list[Pending] = []
        self._here: dict[Action, tuple[Tensors, Forms]] = {}  # from one stage of this rank to another
        self._careful = any(group.in_one_order for group in groups.values())
        self._in_turn = between(schedule, rank) if prefetch is None or self._careful else None
        self._between: list[list[Action]] | None = None
        self._seen: set[Hashable] = set()

    @property
    def actions(self) -> tuple[Action, ...]:
        """This rank's."""
        return self._schedule.actions[self._rank]

    def run(self, compute: Compute, kinds: Sequence[Hashable], timeline: Timeline | None = None) -> None:
        """Runs all of this rank's actions.

        Args:
            compute: what they do.
            kinds: by microbatch, what decides the form of its hidden states, the same on all ranks.
            timeline: is told when each of them ran, without what it waited for.
        """
        # Where a kernel that is new may wait for a receive that was posted ahead, the first batch of a kind goes in turn.
        is_new = self._careful and not self._seen.issuperset(kinds)
        self._between = self._in_turn if self._prefetch is None or is_new else None
        self._seen.update(kinds)
        self._channels = self._incoming()
        self._kinds = kinds
        self._made: dict[Action, tuple[Tensors, Forms | None]] = {}
        last = self._schedule.stages - 1
        for place, action in enumerate(self.actions):
            stage, microbatch = action.stage, action.microbatch
            if self._between is not None:
                self._exchange(self._between[place])
            running = nullcontext() if timeline is None else timeline.during(str(action))
            if action.kind == "F":
                received, forms = ((), ()) if stage == 0 else self._take(Action("F", stage - 1, microbatch))
                with running:
                    made = compute.forward(stage, microbatch, received, forms)
                if made is not None:
                    self._remember(stage, microbatch, made[1])
                    self._give(Action("F", stage, microbatch), made[0], made[1])
            elif action.kind == "W":
                with running:
                    compute.weights(stage, microbatch)
            else:
                gradients: Tensors = ()
                if stage < last and any(form.trained for form in self._forms[stage, kinds[microbatch]]):
                    gradients, _ = self._take(Action("B", stage, microbatch))
                with running:
                    before = compute.backward(action, gradients)
                if before:
                    self._give(Action("B", stage - 1, microbatch), before, None)
        if self._between is not None:
            self._exchange(self._between[-1])

    def forget_kinds(self) -> None:
        """The next batch of each kind runs kernels that have not run yet."""
        self._seen.clear()

    def finish(self) -> None:
        """Waits until everything has been sent."""
        for pending in self._sends:
            pending.wait()
        self._sends.clear()

    def _remember(self, stage: int, microbatch: int, forms: Forms) -> None:
        """Refuses what the receiver, which knows the forms of the same input, could not take.

        Raises:
            ConfigError: a form is another one than before, or cannot be announced.
        """
        for form in forms:
            if len(form.shape) > _HEADER - 3 or form.dtype not in DTYPES:
                raise ConfigError(
                    f"a tensor of shape {form.shape} and {form.dtype} cannot go from stage to stage: at most {_HEADER - 3} dims of "
                    f"{', '.join(map(str, DTYPES))} can"
                )
        known = self._forms.setdefault((stage, self._kinds[microbatch]), forms)
        for form, before in zip(forms, known, strict=True):
            if form != before:
                raise ConfigError(
                    f"the hidden states after stage {stage}, or what goes with them, are {form}, and were {before} for an input of "
                    "the same shapes: what decides their shape must be in the batch's shapes; pad or cut in the data loader, not in "
                    "training_step"
                )

    # -- who sends what to whom --------------------------------------------------------------------------------------

    def _ends(self, item: Action) -> tuple[int, int]:
        """The ranks between which a forward's hidden states, or a gradient with respect to them, go."""
        here, there = self._schedule.placement[item.stage], self._schedule.placement[item.stage + 1]
        return (here, there) if item.kind == "F" else (there, here)

    def _group(self, item: Action) -> Group:
        return self._groups[direction(item.kind, *self._ends(item))]

    def _incoming(self) -> dict[tuple[str, int], Channel]:
        channels: dict[tuple[str, int], Channel] = {}
        for actions in self._schedule.actions:
            for item in sent_after(actions, self._schedule.stages):
                source, target = self._ends(item)
                if target == self._rank != source:
                    new = Channel(self._group(item), source, [])
                    channels.setdefault((item.kind, source), new).items.append(item)
        return channels

    def _key(self, item: Action) -> int:
        """The first of the keys of an item's transfers: its tensors, and what announces them."""
        return (max(self._handed) + 1) * (item.stage * self._schedule.microbatches + item.microbatch)

    def _key_of_forms(self, item: Action) -> int:
        return self._key(item) + max(self._handed)

    @staticmethod
    def _label(item: Action) -> str:
        return f"pipeline.{'forward' if item.kind == 'F' else 'backward'}[{item.stage}]"

    # -- transfers ---------------------------------------------------------------------------------------------------

    def _give(self, item: Action, tensors: Tensors, forms: Forms | None) -> None:
        source, target = self._ends(item)
        if source == target:
            self._here[item] = tensors, forms or ()
        elif self._between is not None:
            self._made[item] = tensors, forms
        else:
            self._sends = [pending for pending in self._sends if not pending.arrived()]
            self._send(item, target, tensors, forms)
            self._post_ahead()

    def _send(self, item: Action, target: int, tensors: Tensors, forms: Forms | None) -> None:
        group, label = self._group(item), self._label(item)
        known = (item.stage, self._kinds[item.microbatch])
        if forms and known not in self._announced:
            self._announced.add(known)
            header = torch.tensor([form.pack() for form in forms], device=self._device)
            self._sends.append(group.send(header, target, key=self._key_of_forms(item), label="pipeline.form"))
        for number, x in enumerate(tensors):
            self._sends.append(group.send(x.contiguous(), target, key=self._key(item) + number, label=label))

    def _take(self, item: Action) -> tuple[Tensors, Forms]:
        source, target = self._ends(item)
        if source == target:
            return self._here.pop(item)
        channel = self._channels[item.kind, source]
        if self._between is None:
            while item not in channel.pending:
                self._post(channel, wait=True)
            channel.taken += 1
            self._post_ahead()
        several, forms = channel.pending.pop(item)
        return [pending.wait() for pending in several], forms

    def _exchange(self, items: Sequence[Action]) -> None:
        """The plain twin's transfers before an action, and after the last one: all posted, then all waited for."""
        for item in items:
            source, target = self._ends(item)
            if source == self._rank and item in self._made:  # not if it is the gradient of what is not trained
                self._send(item, target, *self._made.pop(item))
        posted = []
        for item in items:
            source, target = self._ends(item)
            if target == self._rank:
                channel = self._channels[item.kind, source]
                self._post(channel, wait=True)
                posted += channel.pending[item][0] if item in channel.pending else []
        for pending in posted:
            pending.wait()
        self.finish()

    def _post_ahead(self) -> None:
        for channel in self._channels.values():
            ahead = min(len(channel.items), channel.taken + (self._prefetch or 0))
            while channel.posted < ahead and self._post(channel, wait=False):
                pass

    def _post(self, channel: Channel, *, wait: bool) -> bool:
        """Posts the next receive of a channel; not if its form is unknown and nobody is to ``wait`` for that."""
        item = channel.items[channel.posted]
        known = (item.stage, self._kinds[item.microbatch])
        if known not in self._forms:
            if not wait:
                return False
            room = torch.empty(self._handed[item.stage], _HEADER, dtype=torch.int64, device=self._device)
            announced = channel.group.receive(room, channel.source, key=self._key_of_forms(item), label="pipeline.form")
            self._forms[known] = tuple(map(Form.unpack, announced.wait().tolist()))
        channel.posted += 1
        forms = self._forms[known]
        comes = [form for form in forms if item.kind == "F" or form.trained]
        if not comes:
            return True  # the sender has nothing to send
        buffers = [torch.empty(form.shape, dtype=form.dtype, device=self._device) for form in comes]
        posted = [
            channel.group.receive(buffer, channel.source, key=self._key(item) + number, label=self._label(item))
            for number, buffer in enumerate(buffers)
        ]
        channel.pending[item] = posted, forms
        return True


def sent_after(actions: Sequence[Action], stages: int) -> Iterator[Action]:
    """What a rank sends, in its order: hidden states of a stage ("F") and gradients with respect to them ("B")."""
    for action in actions:
        if action.kind == "F" and action.stage < stages - 1:
            yield Action("F", action.stage, action.microbatch)
        elif action.kind in "BI" and action.stage > 0:
            yield Action("B", action.stage - 1, action.microbatch)


def between(schedule: Schedule, rank: int) -> list[list[Action]]:
    """What the plain twin sends and receives before each of a rank's actions, and after the last one, as :func:`sent_after` has it."""
    places: list[list[Action]] = [[]]
    for event in in_turn(schedule):
        if not isinstance(event, Handover):
            if schedule.placement[event.stage] == rank:
                places.append([])
        elif rank in (event.source, event.target):
            places[-1] += sent_after([event.after], schedule.stages)
    return places


def direction(what: str, source: int, target: int) -> Direction:
    """The direction in which a rank sends."""
    return what, source < target, source % 2


def channel_kinds(placement: Sequence[int]) -> list[Direction]:
    """The directions in which the stages of a placement send."""
    neighbours = [(here, there) for here, there in pairwise(placement) if here != there]
    return sorted(
        {direction("F", here, there) for here, there in neighbours} | {direction("B", there, here) for here, there in neighbours}
    )


def hops(placement: Sequence[int], way: Direction) -> set[tuple[int, int]]:
    """The ranks between which something is sent in a direction: source, target."""
    sent = [(a, b) if way[0] == "F" else (b, a) for a, b in pairwise(placement) if a != b]
    return {(source, target) for source, target in sent if direction(way[0], source, target) == way}


def lane(kind: Direction, backend: str) -> str:
    """The group that a direction uses.

    NCCL runs a rank's transfers of a group one after the other, in the order of their posting: each direction has its own, and
    another one from odd ranks than from even ones. A rank would otherwise have what it sends on stand behind a receive that was
    posted ahead, which may come only after that. Of gloo's, forwards and the backwards over the same hops share one: a
    connection carries both ways at once, and one that is used one way only has its acknowledgements stand behind the data of
    another one (8% of a 50 Mbit/s link, the median of 7 paired runs).
    """
    what, up, odd = kind
    if backend == "nccl":
        return f"{what}.{'up' if up else 'down'}.{'odd' if odd else 'even'}"
    return "hops.up" if (what == "F") == up else "hops.down"
