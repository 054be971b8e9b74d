"""Sends activations and gradients between the pipeline's ranks, beside the computation.

    rank 0   F0.0   F0.1   F0.2 | B0.0 ...
    send          0.0    0.1    0.2
    receive                   0.0 (gradient)
    rank 1          ....   F1.0   B1.0   F1.1 ...

Both ends know the whole schedule. So a receive is posted before it is needed, in the order in which its peer sends; and a send is
never waited for: its tensor is freed when it has been sent. No transfer queues behind one of the other direction, see :func:`lane`.

The plain twin posts transfers between two actions (as in :func:`blocking_order`), and waits for all of them at once: nothing
is under way while either end computes. On CUDA the first batch of a kind goes that way, too: see ``Group.in_one_order``.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from lightning_overlap.decision import ConfigError
from lightning_overlap.ranks.group import Group, Pending
from lightning_overlap.steps.runner import Tensors
from lightning_overlap.steps.schedule import Action, Schedule
from lightning_overlap.steps.simulate import Transfer, blocking_order

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
    """What a receiver must know of a tensor before it arrives.

    Attributes:
        shape: at most 8 dims.
        dtype: one of :data:`DTYPES`.
        trained: whether the tensor has a gradient. It has none if nothing before it is trained.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    trained: bool

    @classmethod
    def of(cls, x: Tensor) -> Form:
        return cls(tuple(x.shape), x.dtype, x.requires_grad)

    def pack(self) -> list[int]:
        """The form as a fixed number of integers."""
        numbers = [len(self.shape), DTYPES.index(self.dtype), int(self.trained), *self.shape]
        return numbers + [0] * (_HEADER - len(numbers))

    @classmethod
    def unpack(cls, numbers: list[int]) -> Form:
        """The inverse of :meth:`pack`."""
        dims, dtype, trained, *shape = numbers
        return cls(tuple(shape[:dims]), DTYPES[dtype], bool(trained))


Forms = tuple[Form, ...]
Known = tuple[int, Hashable]
"""A stage, and a kind of microbatch: these decide the forms of what the stage hands on."""


@dataclass
class KnownForms:
    """The forms that this rank has learnt. One for all schedules of a fit.

    Attributes:
        forms: of what a stage hands on.
        announced: those that this rank has announced to its receiver.
    """

    forms: dict[Known, Forms] = field(default_factory=dict)
    announced: set[Known] = field(default_factory=set)

    @contextmanager
    def preserved(self) -> Iterator[None]:
        """What is learnt inside is forgotten."""
        forms, announced = dict(self.forms), set(self.announced)
        try:
            yield
        finally:
            self.forms, self.announced = forms, announced


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


class PipelineTransfers:
    """One rank's transfers in one schedule: the :class:`~lightning_overlap.steps.runner.Transfers` of a pipeline.

    Args:
        schedule: of all ranks.
        rank: this one, in the pipeline.
        groups: the pipeline's ranks, for each direction, as :func:`channel_kinds` has them.
        known: the forms that are known already.
        device: of this rank's tensors.
        prefetch: receives that are posted ahead for each channel; None for the plain twin.
        counts: by stage, how many tensors it hands on for a microbatch.
    """

    def __init__(
        self,
        schedule: Schedule,
        rank: int,
        groups: Mapping[Direction, Group],
        known: KnownForms,
        device: torch.device,
        prefetch: int | None,
        counts: Sequence[int],
    ) -> None:
        self._schedule = schedule
        self._rank = rank
        self._groups = groups
        self._known = known
        self._device = device
        self._prefetch = prefetch
        self._counts = counts
        self._kinds: Sequence[Hashable] = ()
        self._channels: dict[tuple[str, int], Channel] = {}
        self._sends: list[Pending] = []
        self._outbox: dict[Action, Tensors] = {}
        """Items of the plain twin that are sent before the next action."""
        self._careful = any(group.in_one_order for group in groups.values())
        self._in_turn = between(schedule, rank) if prefetch is None or self._careful else None
        self._between: list[list[Action]] | None = None
        """The plain twin's transfers, while it runs a batch."""
        self._warm: set[Hashable] = set()
        """Kinds of microbatches whose kernels have run."""

    def start_batch(self, kinds: Sequence[Hashable]) -> None:
        """Prepares the transfers of one batch.

        Args:
            kinds: by microbatch, what decides the forms of its activations, the same on all ranks.
        """
        # Where a kernel that is new may wait for a receive that was posted ahead, the first batch of a kind goes in turn.
        is_new = self._careful and not self._warm.issuperset(kinds)
        self._between = self._in_turn if self._prefetch is None or is_new else None
        self._warm.update(kinds)
        self._channels = self._incoming()
        self._kinds = kinds
        self._outbox.clear()

    def forget_kinds(self) -> None:
        """The next batch of each kind runs kernels that have not run yet."""
        self._warm.clear()

    def finish(self) -> None:
        """Waits until everything has been sent."""
        for pending in self._sends:
            pending.wait()
        self._sends.clear()

    def start_action(self, index: int) -> None:
        """Makes the plain twin's transfers before an action: all are posted, then all are waited for."""
        if self._between is None:
            return
        items = self._between[index]
        for item in items:
            source, target = self._ends(item)
            if source == self._rank and item in self._outbox:  # not if it is the gradient of what is not trained
                self._post_send(item, target, self._outbox.pop(item))
        receives = []
        for item in items:
            source, target = self._ends(item)
            if target == self._rank:
                channel = self._channels[item.kind, source]
                self._post_receive(channel, wait=True)
                receives += channel.pending[item][0] if item in channel.pending else []
        for pending in receives:
            pending.wait()
        self.finish()

    def send(self, item: Action, tensors: Tensors) -> None:
        """See :class:`lightning_overlap.steps.runner.Transfers`.

        Raises:
            ConfigError: the receiver could not take the tensors: it expects other forms, or they cannot be announced.
        """
        if item.kind == "F":
            self._check_forms(item, tuple(map(Form.of, tensors)))
        if self._between is not None:
            self._outbox[item] = tensors
        else:
            self._sends = [pending for pending in self._sends if not pending.arrived()]
            self._post_send(item, self._ends(item)[1], tensors)
            self._post_ahead()

    def receive(self, item: Action) -> Tensors:
        """See :class:`lightning_overlap.steps.runner.Transfers`."""
        channel = self._channels[item.kind, self._ends(item)[0]]
        if self._between is None:
            while item not in channel.pending:
                self._post_receive(channel, wait=True)
            channel.taken += 1
            self._post_ahead()
        several, forms = channel.pending.pop(item)
        tensors = [pending.wait() for pending in several]
        if item.kind == "B":
            return tensors
        return [x.detach().requires_grad_(form.trained) for x, form in zip(tensors, forms, strict=True)]

    def _check_forms(self, item: Action, forms: Forms) -> None:
        """Refuses what the receiver, which knows the forms of the same input, could not take."""
        for form in forms:
            if len(form.shape) > _HEADER - 3 or form.dtype not in DTYPES:
                raise ConfigError(
                    f"a tensor of shape {form.shape} and {form.dtype} cannot go from stage to stage: at most {_HEADER - 3} dims of "
                    f"{', '.join(map(str, DTYPES))} can"
                )
        known = self._known.forms.setdefault((item.stage, self._kinds[item.microbatch]), forms)
        for form, before in zip(forms, known, strict=True):
            if form != before:
                raise ConfigError(
                    f"the hidden states after stage {item.stage}, or what goes with them, are {form}, and were {before} for an input "
                    "of the same shapes: what decides their shape must be in the batch's shapes; pad or cut in the data loader, not "
                    "in training_step"
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
        """The first of the keys of an item's transfers: its tensors, and the announcement of their forms."""
        return (max(self._counts) + 1) * (item.stage * self._schedule.microbatches + item.microbatch)

    def _key_of_forms(self, item: Action) -> int:
        return self._key(item) + max(self._counts)

    @staticmethod
    def _label(item: Action) -> str:
        return f"pipeline.{'forward' if item.kind == 'F' else 'backward'}[{item.stage}]"

    # -- posting -----------------------------------------------------------------------------------------------------

    def _post_send(self, item: Action, target: int, tensors: Tensors) -> None:
        group, label = self._group(item), self._label(item)
        known = (item.stage, self._kinds[item.microbatch])
        if item.kind == "F" and tensors and known not in self._known.announced:
            self._known.announced.add(known)
            header = torch.tensor([Form.of(x).pack() for x in tensors], device=self._device)
            self._sends.append(group.send(header, target, key=self._key_of_forms(item), label="pipeline.form"))
        for number, x in enumerate(tensors):
            self._sends.append(group.send(x.detach().contiguous(), target, key=self._key(item) + number, label=label))

    def _post_ahead(self) -> None:
        for channel in self._channels.values():
            ahead = min(len(channel.items), channel.taken + (self._prefetch or 0))
            while channel.posted < ahead and self._post_receive(channel, wait=False):
                pass

    def _post_receive(self, channel: Channel, *, wait: bool) -> bool:
        """Posts the next receive of a channel, and tells whether it did. If its form is unknown, only with ``wait``: for the form."""
        item = channel.items[channel.posted]
        known = (item.stage, self._kinds[item.microbatch])
        if known not in self._known.forms:
            if not wait:
                return False
            room = torch.empty(self._counts[item.stage], _HEADER, dtype=torch.int64, device=self._device)
            announced = channel.group.receive(room, channel.source, key=self._key_of_forms(item), label="pipeline.form")
            self._known.forms[known] = tuple(map(Form.unpack, announced.wait().tolist()))
        channel.posted += 1
        forms = self._known.forms[known]
        expected = [form for form in forms if item.kind == "F" or form.trained]
        if not expected:
            return True  # the sender has nothing to send
        buffers = [torch.empty(form.shape, dtype=form.dtype, device=self._device) for form in expected]
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
    for event in blocking_order(schedule):
        if not isinstance(event, Transfer):
            if schedule.placement[event.stage] == rank:
                places.append([])
        elif rank in (event.source, event.target):
            places[-1] += sent_after([event.action], schedule.stages)
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
