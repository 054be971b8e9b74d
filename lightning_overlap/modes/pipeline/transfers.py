"""Sends activations and gradients between the ranks of a pipeline, during computation.

    rank 0   F0.0   F0.1   F0.2 | B0.0 ...
    send          0.0    0.1    0.2
    receive                   0.0 (gradient)
    rank 1          ....   F1.0   B1.0   F1.1 ...

Both ends know the complete schedule. So each receive is posted before it is needed, in the order in which its peer sends. No rank
waits for a send: its tensor is freed when it is sent. No transfer waits behind one of the other direction, see :func:`channel_name`.

Without overlap, transfers are posted between two actions (see :func:`blocking_order`), and waited for at once: none is in transfer
while either end computes. On CUDA the first batch of each kind runs like that too, see ``Group.in_one_order``.
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
"""Activations ("F") or gradients ("B"); whether they are sent to a higher rank; whether from an odd rank."""
_HEADER = 11
"""The number of integers that announce a tensor's form: number of dims, dtype, whether it has a gradient, the shape."""


@dataclass(frozen=True)
class Form:
    """The properties of a tensor that a receiver must know before it posts the receive.

    Attributes:
        shape: at most 8 dims.
        dtype: one of :data:`DTYPES`.
        has_gradient: whether the sender needs its gradient: not if no parameter before it is trained.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    has_gradient: bool

    @classmethod
    def of(cls, x: Tensor) -> Form:
        return cls(tuple(x.shape), x.dtype, x.requires_grad)

    def pack(self) -> list[int]:
        """The form as a fixed number of integers."""
        numbers = [len(self.shape), DTYPES.index(self.dtype), int(self.has_gradient), *self.shape]
        return numbers + [0] * (_HEADER - len(numbers))

    @classmethod
    def unpack(cls, numbers: list[int]) -> Form:
        """The inverse of :meth:`pack`."""
        dims, dtype, has_gradient, *shape = numbers
        return cls(tuple(shape[:dims]), DTYPES[dtype], bool(has_gradient))


Forms = tuple[Form, ...]
Known = tuple[int, Hashable]
"""A stage, and the kind of a microbatch (its shapes): these decide the forms of the tensors that the stage sends."""


@dataclass
class KnownForms:
    """The forms that this rank knows. All schedules of a fit share them.

    Attributes:
        forms: by stage and kind, the forms of the tensors that the stage sends.
        announced: the stages and kinds whose forms this rank has sent to the receiver.
    """

    forms: dict[Known, Forms] = field(default_factory=dict)
    announced: set[Known] = field(default_factory=set)

    @contextmanager
    def preserved(self) -> Iterator[None]:
        """Forgets afterwards the forms that become known inside."""
        forms, announced = dict(self.forms), set(self.announced)
        try:
            yield
        finally:
            self.forms, self.announced = forms, announced


@dataclass
class Channel:
    """The receives of this rank from one neighbour in one direction.

    Attributes:
        group: carries the transfers.
        source: the sender's rank in the group.
        items: the actions whose tensors are received, in the sender's order.
        posted: the number of items whose receives are posted.
        taken: the number of items that the runner has taken.
        pending: by item, its posted receives and their forms.
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
        schedule: the actions of all ranks.
        rank: this rank in the pipeline.
        groups: by direction (see :func:`channel_kinds`), the group that carries its transfers.
        known: the forms that are known.
        device: this rank's.
        prefetch: the number of receives that are posted early on each channel; None: no overlap.
        counts: by stage, the number of tensors that it sends for a microbatch.
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
        """Without overlap: the tensors that are sent before the next action."""
        self._in_one_order = any(group.in_one_order for group in groups.values())
        self._in_turn = between(schedule, rank) if prefetch is None or self._in_one_order else None
        self._between: list[list[Action]] | None = None
        """While a batch runs without overlap: by action, the transfers before it."""
        self._warm: set[Hashable] = set()
        """The kinds of microbatches whose kernels have run."""

    def start_batch(self, kinds: Sequence[Hashable]) -> None:
        """Prepares the transfers of one batch.

        Args:
            kinds: by microbatch, a value that decides the forms of its activations; the same on all ranks.
        """
        # New kernels may have to wait for receives that were posted early (NCCL): the first batch of each kind runs without overlap.
        is_new = self._in_one_order and not self._warm.issuperset(kinds)
        self._between = self._in_turn if self._prefetch is None or is_new else None
        self._warm.update(kinds)
        self._channels = self._incoming()
        self._kinds = kinds
        self._outbox.clear()

    def forget_kinds(self) -> None:
        """Declares that the next batch of each kind will run new kernels."""
        self._warm.clear()

    def finish(self) -> None:
        """Waits for all sends."""
        for pending in self._sends:
            pending.wait()
        self._sends.clear()

    def start_action(self, index: int) -> None:
        """Without overlap: posts all transfers before an action, then waits for all of them."""
        if self._between is None:
            return
        items = self._between[index]
        for item in items:
            source, target = self._ends(item)
            if source == self._rank and item in self._outbox:  # a tensor without a gradient sends none back
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
            ConfigError: the receiver expects other forms, or the forms cannot be announced.
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
        receives, forms = channel.pending.pop(item)
        tensors = [pending.wait() for pending in receives]
        if item.kind == "B":
            return tensors
        return [x.detach().requires_grad_(form.has_gradient) for x, form in zip(tensors, forms, strict=True)]

    def _check_forms(self, item: Action, forms: Forms) -> None:
        """Refuses tensors whose forms differ from those that the receiver knows for an input of the same shapes."""
        for form in forms:
            if len(form.shape) > _HEADER - 3 or form.dtype not in DTYPES:
                raise ConfigError(
                    f"a tensor of shape {form.shape} and {form.dtype} cannot be sent to another stage: stages send tensors of at most "
                    f"{_HEADER - 3} dims of {', '.join(map(str, DTYPES))}"
                )
        known = self._known.forms.setdefault((item.stage, self._kinds[item.microbatch]), forms)
        for form, before in zip(forms, known, strict=True):
            if form != before:
                raise ConfigError(
                    f"stage {item.stage} sends a tensor of {form}, but for an earlier input of the same shapes it was {before}. The "
                    "shapes in the batch must decide the shapes of hidden states: pad or truncate in the data loader, not in "
                    "training_step"
                )

    # -- directions --------------------------------------------------------------------------------------------------

    def _ends(self, item: Action) -> tuple[int, int]:
        """The sender and the receiver of a stage's activations ("F"), or of the gradients with respect to them ("B")."""
        rank, next_rank = self._schedule.placement[item.stage], self._schedule.placement[item.stage + 1]
        return (rank, next_rank) if item.kind == "F" else (next_rank, rank)

    def _group(self, item: Action) -> Group:
        return self._groups[direction(item.kind, *self._ends(item))]

    def _incoming(self) -> dict[tuple[str, int], Channel]:
        channels: dict[tuple[str, int], Channel] = {}
        for actions in self._schedule.actions:
            for item in sent_after(actions, self._schedule.stages):
                source, target = self._ends(item)
                if target == self._rank != source:
                    channel = Channel(self._group(item), source, [])
                    channels.setdefault((item.kind, source), channel).items.append(item)
        return channels

    def _key(self, item: Action) -> int:
        """The first key of an item's transfers: of its tensors, then of their forms."""
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
        """Posts a channel's next receives, and returns whether it did. Unless ``wait``, it does not wait for unknown forms."""
        item = channel.items[channel.posted]
        known = (item.stage, self._kinds[item.microbatch])
        if known not in self._known.forms:
            if not wait:
                return False
            buffer = torch.empty(self._counts[item.stage], _HEADER, dtype=torch.int64, device=self._device)
            announced = channel.group.receive(buffer, channel.source, key=self._key_of_forms(item), label="pipeline.form")
            self._known.forms[known] = tuple(map(Form.unpack, announced.wait().tolist()))
        channel.posted += 1
        forms = self._known.forms[known]
        expected = [form for form in forms if item.kind == "F" or form.has_gradient]
        if not expected:
            return True  # the sender sends nothing
        buffers = [torch.empty(form.shape, dtype=form.dtype, device=self._device) for form in expected]
        posted = [
            channel.group.receive(buffer, channel.source, key=self._key(item) + number, label=self._label(item))
            for number, buffer in enumerate(buffers)
        ]
        channel.pending[item] = posted, forms
        return True


def sent_after(actions: Sequence[Action], stages: int) -> Iterator[Action]:
    """Yields what a rank sends, in its order: activations of a stage ("F"), or gradients with respect to them ("B")."""
    for action in actions:
        if action.kind == "F" and action.stage < stages - 1:
            yield Action("F", action.stage, action.microbatch)
        elif action.kind in "BI" and action.stage > 0:
            yield Action("B", action.stage - 1, action.microbatch)


def between(schedule: Schedule, rank: int) -> list[list[Action]]:
    """Without overlap: what is sent or received before each of a rank's actions, and after the last one. See :func:`sent_after`."""
    transfers: list[list[Action]] = [[]]
    for event in blocking_order(schedule):
        if not isinstance(event, Transfer):
            if schedule.placement[event[0].stage] == rank:
                transfers.append([])
        elif rank in (event.source, event.target):
            transfers[-1] += sent_after([event.action], schedule.stages)
    return transfers


def direction(kind: str, source: int, target: int) -> Direction:
    """The direction of a transfer of activations ("F") or gradients ("B") between two ranks."""
    return kind, source < target, source % 2


def channel_kinds(placement: Sequence[int]) -> list[Direction]:
    """The directions in which the stages of a placement send."""
    neighbours = [(rank, next_rank) for rank, next_rank in pairwise(placement) if rank != next_rank]
    return sorted(
        {direction("F", rank, next_rank) for rank, next_rank in neighbours}
        | {direction("B", next_rank, rank) for rank, next_rank in neighbours}
    )


def hops(placement: Sequence[int], way: Direction) -> set[tuple[int, int]]:
    """The pairs of ranks (source, target) that send in a direction."""
    sent = [(a, b) if way[0] == "F" else (b, a) for a, b in pairwise(placement) if a != b]
    return {(source, target) for source, target in sent if direction(way[0], source, target) == way}


def channel_name(kind: Direction, backend: str) -> str:
    """The group that a direction uses.

    NCCL runs a rank's transfers in one group one after the other, in the order of their posting. So each direction has a group, and
    even and odd ranks have different ones: otherwise a rank's send would wait behind a receive that was posted early, which may
    complete only after that send. With gloo, forwards and the backwards between the same ranks share a group: a connection carries
    both ways at once. With two connections, the acknowledgements of one wait behind the data of the other (8% of a 50 Mbit/s link,
    the median of 7 paired runs).
    """
    content, up, odd = kind
    if backend == "nccl":
        return f"{content}.{'up' if up else 'down'}.{'odd' if odd else 'even'}"
    return "hops.up" if (content == "F") == up else "hops.down"
