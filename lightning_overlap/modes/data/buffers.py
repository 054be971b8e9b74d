"""Flat buffers: parameters and gradients of one dtype, cut into buckets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor, nn

from lightning_overlap.modes.data.layout import Bucket
from lightning_overlap.ranks.group import Group, Pending

HALF = (torch.bfloat16, torch.float16)
"""Dtypes of parameters that are updated as fp32 main parameters."""


@dataclass(eq=False)
class Segment:
    """A contiguous run of this rank's piece of a bucket that one optimizer group updates: one parameter to the optimizer.

    Attributes:
        parameter: what the user's optimizer holds. fp32: a view of the flat parameters, or of fp32 main parameters.
        group: index of the optimizer's parameter group.
        start: offset in the bucket, in elements.
        end: offset in the bucket, in elements.
    """

    parameter: nn.Parameter
    group: int
    start: int
    end: int


class Phase(Enum):
    """Where the gradients of a bucket stand in a step.

        IDLE -> COLLECTING -> REDUCING -> REDUCED -> TAKEN -> IDLE

    Without a distributed optimizer a bucket is IDLE again once it is reduced: its gradients are the user's.
    """

    IDLE = "idle"
    """There is nothing to do: the step has used the gradients, or nothing in the bucket is trained. Entered by the optimizer."""
    COLLECTING = "collecting"
    """A backward is open, and gradients arrive. Entered when it opens."""
    REDUCING = "reducing"
    """The reduction is posted: a further gradient in this backward would be lost. Entered when the last gradient is there."""
    REDUCED = "reduced"
    """This rank has its piece of the sum, and the optimizer has not used it. Entered when the reduction is over."""
    TAKEN = "taken"
    """The segments have their part of the sum: hooks and clipping may have changed it. Entered when the step or clipping asks."""


@dataclass(eq=False)
class LiveBucket:
    """A bucket with its tensors and where it stands in the step."""

    layout: Bucket
    key: int
    label: str
    names: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]
    shapes: tuple[torch.Size, ...]
    """Of the parameters while they train: other modes may make them whole again."""
    data: Tensor
    grads: Tensor
    bounds: tuple[int, ...]
    group: Group
    """The ranks over which its gradients are summed, each of which owns a piece."""
    divisor: float
    """What the sum is divided by: the number of ranks that see other samples or tokens, whatever the size of the group."""
    order: int
    segments: list[Segment] = field(default_factory=list)
    main: Tensor | None = None
    """fp32 main parameters of this rank's piece, where the parameters are not fp32."""
    missing: set[int] = field(default_factory=set)
    """While collecting: ids of the parameters without a gradient in this backward."""
    places: list[int] = field(default_factory=list)
    """Addresses of the parameters."""
    versions: list[int] = field(default_factory=list)
    """Of the parameters, when their update was sent."""
    phase: Phase = Phase.IDLE
    gather: Pending | None = None

    @property
    def has_new_gradients(self) -> bool:
        """Whether its gradients are reduced, and no step has used them."""
        return self.phase in (Phase.REDUCED, Phase.TAKEN)

    @property
    def own(self) -> slice:
        """This rank's piece."""
        return slice(self.bounds[self.group.rank], self.bounds[self.group.rank + 1])

    def views(self, flat: Tensor) -> list[Tensor]:
        """Each parameter's part of ``flat`` (``data`` or ``grads``), in the parameter's shape."""
        start = self.layout.start
        return [
            flat[slot.start - start : slot.end - start].view(shape) for slot, shape in zip(self.layout.slots, self.shapes, strict=True)
        ]


def flatten(
    named: Sequence[tuple[str, nn.Parameter]],
    layout: Sequence[Bucket],
    *,
    grad_dtype: torch.dtype,
    group: Group,
    divisor: float,
    whole: bool,
    first_key: int,
) -> list[LiveBucket]:
    """Moves parameters into one flat buffer, of which they become views, and makes a flat buffer for their gradients.

    Args:
        named: names and parameters, of one dtype and device.
        layout: the buckets, whose slots count the parameters.
        grad_dtype: in which gradients are kept.
        group: as in :class:`LiveBucket`.
        divisor: as in :class:`LiveBucket`.
        whole: pieces end where parameters end.
        first_key: key of the first bucket.
    """
    size, first = layout[-1].end, named[0][1]
    data = torch.zeros(size, dtype=first.dtype, device=first.device)
    grads = torch.zeros(size, dtype=grad_dtype, device=first.device)
    buckets = []
    for bucket in layout:
        chosen = [named[slot.parameter] for slot in bucket.slots]
        key = first_key + bucket.index
        live = LiveBucket(
            layout=bucket,
            key=key,
            label=f"[{key}]",
            names=tuple(name for name, _ in chosen),
            parameters=tuple(p for _, p in chosen),
            shapes=tuple(p.shape for _, p in chosen),
            data=data[bucket.start : bucket.end],
            grads=grads[bucket.start : bucket.end],
            bounds=bucket.bounds(group.size, whole=whole),
            group=group,
            divisor=divisor,
            # Registered last, used last: until a forward has been seen, the last bucket is the first one needed.
            order=len(layout) - bucket.index,
        )
        for parameter, view in zip(live.parameters, live.views(live.data), strict=True):
            view.copy_(parameter.data)
            parameter.data = view
            live.places.append(parameter.data_ptr())
        buckets.append(live)
    return buckets


def groups_of(buckets: Sequence[LiveBucket]) -> list[Group]:
    """The groups of the buckets, each once, in the same order on all ranks."""
    return list(dict.fromkeys(bucket.group for bucket in buckets))


def unflatten(buckets: Sequence[LiveBucket]) -> None:
    """Gives parameters and segments a storage of their own again, and the flat buffers free."""
    for bucket in buckets:
        for parameter in bucket.parameters:
            parameter.data = parameter.data.clone()
            parameter.grad = None
            parameter.grad_dtype = parameter.dtype
        for segment in bucket.segments:
            segment.parameter.data = segment.parameter.data.clone()
        bucket.data = bucket.grads = bucket.data.new_empty(0)
        bucket.main = None if bucket.main is None else bucket.main.new_empty(0)
