"""The buckets of a model's parameters, laid out by the order of registration or of the gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_overlap.model.markers import is_expert, stage_of
from lightning_overlap.modes.data.buffers import HALF, LiveBucket, flatten
from lightning_overlap.modes.data.config import DataChoices, DataParallel
from lightning_overlap.modes.data.layout import lateness, lay_out
from lightning_overlap.ranks.group import Group

FIRST_EXPERT_KEY = 1 << 16
"""The key of the first bucket of experts. There are fewer other buckets."""
MIN_GAIN = 0.1
"""Buckets are rebuilt if gradients are then sent, on average, this part of a backward earlier."""


@dataclass(frozen=True)
class Kind:
    """Parameters that can share a bucket.

    Attributes:
        named: names and parameters, of one dtype and device, in the order of registration.
        group: the ranks over which their gradients are summed.
        divisor: of the sum.
    """

    named: tuple[tuple[str, nn.Parameter], ...]
    group: Group
    divisor: float

    @property
    def has_experts(self) -> bool:
        """Whether they belong to experts that are spread over ranks."""
        return is_expert(self.named[0][1])


class Home(NamedTuple):
    """The memory of a parameter in the flat buffers: its bucket, the view of its gradient, the address of its data."""

    bucket: LiveBucket
    gradient: Tensor
    address: int


class Buckets:
    """Builds the buckets and finds the bucket of a parameter.

    Args:
        config: dtype of gradients, padding.
        choices: sharding, bucket size.

    Attributes:
        live: the buckets, in the order in which they are reduced. The list is the same object as long as the mode lives.
        homes: by the id of a parameter.
    """

    def __init__(self, config: DataParallel, choices: DataChoices) -> None:
        self.live: list[LiveBucket] = []
        self.homes: dict[int, Home] = {}
        self._kinds: list[Kind] = []
        # Without a distributed optimizer the gradients are the user's, in the parameters' dtype.
        self._fp32_gradients = choices.is_sharded and config.grad_reduce_dtype == "fp32"
        self._whole_parameters = choices.distributed_optimizer.value == "whole parameters"
        self._lay_out = partial(
            lay_out,
            bucket_size=choices.bucket_size.value,
            largest=choices.largest_bucket,
            sharded=choices.is_sharded,
            high_busbw=config.pad_buckets_for_high_nccl_busbw,
        )

    def build(self, kinds: Sequence[Kind]) -> None:
        """Moves parameters and their gradients into new buckets, each kind from its last parameter to its first."""
        gradients = [(p, p.grad) for bucket in self.live for p in bucket.parameters if p.grad is not None]
        self._kinds = list(kinds)
        self.live.clear()
        self.homes.clear()
        layouts = [self._lay_out([p.numel() for _, p in kind.named], shards=kind.group.size) for kind in self._kinds]
        # Ranks of a group number its buckets alike. Ranks with the same experts may be tensor ranks with other kinds of the rest.
        next_keys = {False: 0, True: FIRST_EXPERT_KEY}
        for kind, layout in zip(self._kinds, layouts, strict=True):
            first_key = next_keys[kind.has_experts]
            next_keys[kind.has_experts] += len(layout)
            dtype = kind.named[0][1].dtype
            self.live += flatten(
                kind.named,
                layout,
                grad_dtype=torch.float32 if self._fp32_gradients and dtype in HALF else dtype,
                group=kind.group,
                divisor=kind.divisor,
                whole_parameters=self._whole_parameters,
                first_key=first_key,
            )
        for order, bucket in enumerate(sorted(self.live, key=lambda bucket: (stage_of(bucket.parameters[0]), bucket.order))):
            bucket.order = order
        for bucket in self.live:
            for parameter, view in zip(bucket.parameters, bucket.views(bucket.grads), strict=True):
                self.homes[id(parameter)] = Home(bucket, view, parameter.data_ptr())
                parameter.grad_dtype = view.dtype  # autograd sums in it, and hooks read gradients in it
        for parameter, gradient in gradients:
            parameter.grad = self.homes[id(parameter)].gradient.copy_(gradient)

    def reordered(self, gradient_order: Sequence[int], groups: Sequence[Group]) -> list[Kind] | None:
        """Sorts each kind by the order of the gradients, if buckets can then be sent earlier. Collective.

        Args:
            gradient_order: ids of parameters, in the order of their gradients. That of the first rank counts on all ranks.
            groups: all ranks that must agree, each group inside a group of the next one.

        Returns:
            The kinds for :meth:`build`; None if the gain is less than MIN_GAIN.
        """
        # By name, since tensor ranks that share experts may have other kinds of the same parameters.
        names = {id(parameter): name for kind in self._kinds for name, parameter in kind.named}
        shared = [names[parameter] for parameter in gradient_order if parameter in names]
        for group in reversed(groups):
            shared = group.share_object(shared)
        index = {name: i for i, name in enumerate(shared)}
        orders = [
            sorted(range(len(kind.named)), key=lambda i, kind=kind: index.get(kind.named[i][0], len(index)))  # type: ignore[misc]
            for kind in self._kinds
        ]
        kinds = [
            replace(kind, named=tuple(kind.named[i] for i in reversed(order))) for kind, order in zip(self._kinds, orders, strict=True)
        ]
        gains = [
            self._lateness(kind, order) - self._lateness(sorted_kind, range(len(order) - 1, -1, -1))
            for kind, order, sorted_kind in zip(self._kinds, orders, kinds, strict=True)
        ]
        gain = max(gains, default=0.0)
        for group in reversed(groups):
            gain = group.share_object(gain)  # ranks with different experts have different buckets
        return kinds if gain >= MIN_GAIN else None

    def _lateness(self, kind: Kind, order: Sequence[int]) -> float:
        sizes = [p.numel() for _, p in kind.named]
        return lateness(self._lay_out(sizes, shards=kind.group.size), sizes, order)

    def move_back(self, incomplete: set[int]) -> list[LiveBucket]:
        """Copies parameters that the user gave other memory (``p.data = ...``) into their buckets, and makes them views again.

        Args:
            incomplete: keys of buckets whose parameters are not complete. None of these can have other memory: to assign ``p.data``
                completes the parameter.

        Returns:
            A bucket for each parameter that was copied.
        """
        changed = []
        for bucket in self.live:
            if bucket.key in incomplete:
                continue
            for index, parameter in enumerate(bucket.parameters):
                if parameter.data_ptr() != self.homes[id(parameter)].address:
                    view = bucket.views(bucket.data)[index]
                    view.copy_(parameter.data)
                    parameter.data = view
                    changed.append(bucket)
        return changed
