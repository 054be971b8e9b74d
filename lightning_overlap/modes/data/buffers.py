"""Flat buffers for parameters and gradients of one dtype, divided into buckets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor, nn

from lightning_overlap.modes.data.layout import Bucket
from lightning_overlap.ranks.group import Group

HALF = (torch.bfloat16, torch.float16)
"""Dtypes of parameters that are updated as fp32 main parameters."""


@dataclass(eq=False)
class Segment:
    """A contiguous part of a bucket that this rank updates as one parameter of one optimizer group.

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
    """The state of a bucket's gradients in a step.

        IDLE -> COLLECTING -> REDUCING -> REDUCED -> TAKEN -> IDLE

    Without a distributed optimizer a bucket returns from REDUCING to IDLE: its gradients are then the user's.
    """

    IDLE = "idle"
    """The bucket has no gradients to use: the optimizer has stepped, or no parameter in the bucket is trained."""
    COLLECTING = "collecting"
    """A backward is open, and gradients arrive. Entered when it opens."""
    REDUCING = "reducing"
    """The reduction is posted, so a further gradient in this backward would be lost. Entered with the last gradient."""
    REDUCED = "reduced"
    """This rank has its shard of the sum, and the optimizer has not used it. Entered when the reduction is complete."""
    TAKEN = "taken"
    """The segments have their part of the sum, which hooks and clipping may change. Entered by a step or by clipping."""


@dataclass(eq=False)
class LiveBucket:
    """A bucket with its tensors and its state in the step.

    Attributes:
        layout: offsets of the bucket in the flat buffers and of its parameters in the bucket.
        key: number of the bucket among all buckets of the mode, the same on all ranks of its group.
        names: of the parameters.
        parameters: views of ``data``.
        shapes: of the parameters during training; other modes may give them their unsharded shapes afterwards.
        data: flat parameters, 1-d.
        grads: flat gradients, 1-d.
        bounds: offsets in the bucket of the ranks' shards, ``group.size + 1`` of them.
        group: the ranks over which its gradients are summed, each of which updates a shard.
        divisor: of the sum: the number of ranks that see other samples or tokens, whatever the size of the group.
        order: rank of the bucket in the order in which forward reads buckets.
        segments: what this rank updates.
        main: fp32 main parameters of this rank's shard; None where the parameters are fp32.
        missing: while collecting, ids of the parameters without a gradient in this backward.
        phase: see :class:`Phase`.
    """

    layout: Bucket
    key: int
    names: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]
    shapes: tuple[torch.Size, ...]
    data: Tensor
    grads: Tensor
    bounds: tuple[int, ...]
    group: Group
    divisor: float
    order: int
    segments: list[Segment] = field(default_factory=list)
    main: Tensor | None = None
    missing: set[int] = field(default_factory=set)
    phase: Phase = Phase.IDLE

    @property
    def has_new_gradients(self) -> bool:
        """Whether its gradients are reduced and not used by a step."""
        return self.phase in (Phase.REDUCED, Phase.TAKEN)

    @property
    def shard(self) -> slice:
        """The elements that this rank updates."""
        return slice(self.bounds[self.group.rank], self.bounds[self.group.rank + 1])

    def views(self, flat: Tensor) -> list[Tensor]:
        """Returns each parameter's part of ``flat`` (``data`` or ``grads``), in the parameter's shape."""
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
    whole_parameters: bool,
    first_key: int,
) -> list[LiveBucket]:
    """Copies parameters into one flat buffer, makes them views of it, and makes a flat buffer for their gradients.

    Args:
        named: names and parameters, of one dtype and device.
        layout: the buckets, whose slots count the parameters.
        grad_dtype: dtype of the gradients.
        group: as in :class:`LiveBucket`.
        divisor: as in :class:`LiveBucket`.
        whole_parameters: a shard ends where a parameter ends.
        first_key: key of the first bucket.
    """
    size, first = layout[-1].end, named[0][1]
    data = torch.zeros(size, dtype=first.dtype, device=first.device)
    grads = torch.zeros(size, dtype=grad_dtype, device=first.device)
    buckets = []
    for bucket in layout:
        chosen = [named[slot.parameter] for slot in bucket.slots]
        live = LiveBucket(
            layout=bucket,
            key=first_key + bucket.index,
            names=tuple(name for name, _ in chosen),
            parameters=tuple(p for _, p in chosen),
            shapes=tuple(p.shape for _, p in chosen),
            data=data[bucket.start : bucket.end],
            grads=grads[bucket.start : bucket.end],
            bounds=bucket.bounds(group.size, whole_parameters=whole_parameters),
            group=group,
            divisor=divisor,
            # Registered last, used last: before the first forward, the last bucket is expected to be read first.
            order=len(layout) - bucket.index,
        )
        for parameter, view in zip(live.parameters, live.views(live.data), strict=True):
            view.copy_(parameter.data)
            parameter.data = view
        buckets.append(live)
    return buckets


def groups_of(buckets: Sequence[LiveBucket]) -> list[Group]:
    """Returns the groups of the buckets, each once, in the same order on all ranks."""
    return list(dict.fromkeys(bucket.group for bucket in buckets))


def unflatten(buckets: Sequence[LiveBucket]) -> None:
    """Copies parameters and segments out of the flat buffers and frees the buffers."""
    for bucket in buckets:
        for parameter in bucket.parameters:
            parameter.data = parameter.data.clone()
            parameter.grad = None
            parameter.grad_dtype = parameter.dtype
        for segment in bucket.segments:
            segment.parameter.data = segment.parameter.data.clone()
        bucket.data = bucket.grads = bucket.data.new_empty(0)
        bucket.main = None if bucket.main is None else bucket.main.new_empty(0)
