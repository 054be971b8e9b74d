"""Lets the user's optimizer update this rank's shards of the buckets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_overlap.decision import ConfigError
from lightning_overlap.model.markers import COUNTED_ELSEWHERE, EXPERT, is_counted_elsewhere, is_expert
from lightning_overlap.modes.data import state
from lightning_overlap.modes.data.buffers import HALF, LiveBucket, Phase, Segment, groups_of
from lightning_overlap.modes.data.gathers import Gathers

OWNER = "_lightning_overlap_owner"
"""Attribute of an optimizer: the :class:`ShardedOptimizer` that holds its state in shards."""


class ShardedOptimizer:
    """Lets an optimizer hold the state of this rank's shards only.

    ``param_groups`` hold the user's parameters, and this rank's shards while ``step()`` runs, whoever calls it (hooks of the step).
    The update is elementwise, or shards are whole parameters, so the numbers are those of the unsharded optimizer.

    Args:
        optimizer: the user's.
        buckets: the mode's; the list is the same object as long as the mode lives.
        gathers: of the updated buckets.
        whole_parameters: a shard ends where a parameter ends.
        by_bucket: whether it may update one bucket at a time.
        gather_at_once: whether parameters are complete at the end of ``step()``.
        scattered: whether this rank has the reduced gradients of its shards only.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        buckets: list[LiveBucket],
        gathers: Gathers,
        *,
        whole_parameters: bool,
        by_bucket: bool,
        gather_at_once: bool,
        scattered: bool,
    ) -> None:
        self._optimizer = optimizer
        self._buckets = buckets
        self._gathers = gathers
        self._whole_parameters = whole_parameters
        self._by_bucket = by_bucket
        self._gather_at_once = gather_at_once
        self._scattered = scattered
        self._users: list[list[nn.Parameter]] = []  # of the user's param_groups, while these hold shards
        self._stepping = self._released = False
        self._names = state.original_names(optimizer, buckets)
        earlier: ShardedOptimizer | None = getattr(optimizer, OWNER, None)  # an optimizer may be used in several fits
        initial: dict[str, Any] | None = optimizer.state_dict() if earlier is None and optimizer.state else None
        if earlier is not None:
            initial = earlier.disown()
            names = [name for part in self._names for name in part]
            for group in groups_of(buckets):  # the first rank of a group has the states of the group's parameters
                # No others: a parameter of experts has one number on all ranks, and each rank has other experts.
                shared = {name for bucket in buckets if bucket.group is group for name in bucket.names}
                states = {number: values for number, values in initial["state"].items() if names[number] in shared}
                initial["state"] = {**initial["state"], **group.share_object(states)}
        setattr(optimizer, OWNER, self)
        self._make_shards()
        if initial is not None:
            optimizer.state.clear()
            self.load(initial)
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_state_dict_pre_hook(self._before_state_dict),
        ]

    def owns(self, optimizer: Optimizer) -> bool:
        return optimizer is self._optimizer

    # -- shards ------------------------------------------------------------------------------------------------------

    def _make_shards(self) -> None:
        group_of = {id(p): g for g, group in enumerate(self._optimizer.param_groups) for p in group["params"]}
        self._shards: list[list[nn.Parameter]] = [[] for _ in self._optimizer.param_groups]
        for bucket in self._buckets:
            self._segment(bucket, group_of)
            for segment in bucket.segments:
                self._shards[segment.group].append(segment.parameter)

    def _segment(self, bucket: LiveBucket, group_of: Mapping[int, int]) -> None:
        """Divides this rank's shard of a bucket where the optimizer's group changes; whole parameters also at each parameter."""
        shard = bucket.shard
        if bucket.data.dtype in HALF:
            bucket.main = bucket.data[shard].float()
        runs: list[tuple[int, int, int, nn.Parameter]] = []  # group, start, end, first parameter
        for slot, parameter in zip(bucket.layout.slots, bucket.parameters, strict=True):
            start = max(slot.start - bucket.layout.start, shard.start)
            end = min(slot.end - bucket.layout.start, shard.stop)
            group = group_of.get(id(parameter))
            if start >= end or group is None:
                continue
            if runs and runs[-1][0] == group and not self._whole_parameters and _only_padding(bucket, runs[-1][2], start):
                runs[-1] = (group, runs[-1][1], end, runs[-1][3])
            else:
                runs.append((group, start, end, parameter))
        for group, start, end, first in runs:
            flat = bucket.data[start:end] if bucket.main is None else bucket.main[start - shard.start : end - shard.start]
            parameter = nn.Parameter(flat.view(first.shape) if self._whole_parameters else flat)
            setattr(parameter, COUNTED_ELSEWHERE, is_counted_elsewhere(first))  # equal in a bucket, as the next one
            setattr(parameter, EXPERT, is_expert(first))
            bucket.segments.append(Segment(parameter, group, start, end))

    def move(self, old: Sequence[LiveBucket]) -> None:
        """Makes shards of the new buckets, and moves the state there from the ``old`` ones. Collective."""
        self._make_shards()
        state.move(self._optimizer, old, self._buckets)

    # -- step --------------------------------------------------------------------------------------------------------

    def parameters(self) -> list[nn.Parameter]:
        """Returns this rank's shards, with their part of the reduced gradients."""
        for bucket in self._reduced():
            self._take_gradients(bucket)
        return [parameter for group in self._shards for parameter in group]

    def update(self, bucket: LiveBucket) -> None:
        """Updates this rank's shard of one reduced bucket, and schedules the gather of the bucket."""
        self._take_gradients(bucket)
        self._gathers.finish(bucket)
        self.adopt(bucket)  # hooks may have written weights since the last step
        users = self._put([[s.parameter for s in bucket.segments if s.group == index] for index in range(len(self._shards))])
        self._stepping = True
        try:
            type(self._optimizer).step(self._optimizer)
        finally:
            self._stepping = False
            self._put(users)
        self._publish(bucket)

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Puts the shards into ``param_groups`` before ``optimizer.step()``, whoever calls it."""
        if self._stepping:
            return None
        if self._released:
            raise ConfigError("the optimizer's state stays sharded after fit, so it cannot step. Make a new optimizer")
        result = None
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is not None:
            # The closure runs backward, which must end before the shards are updated.
            with torch.enable_grad():
                loss = closure()
            result = (args[0], lambda: loss), {key: value for key, value in kwargs.items() if key != "closure"}
        for bucket in self._reduced():
            self._take_gradients(bucket)
            if self._by_bucket and bucket.has_new_gradients:
                self.update(bucket)
        for bucket in self._reduced():
            self._gathers.finish(bucket)
            self.adopt(bucket)
        self._users = self._put(self._shards)
        return result

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._stepping:
            return
        self._put(self._users)
        for bucket in self._reduced():
            self._publish(bucket)
        self._gathers.end_step()
        if self._gather_at_once:
            self._gathers.finish_all()

    def _before_state_dict(self, optimizer: Optimizer) -> None:
        raise ConfigError(
            "the optimizer's state is sharded over the ranks. trainer.save_checkpoint() saves it complete. "
            "trainer.strategy.optimizer_state(optimizer), called on every rank, returns it complete on the first rank"
        )

    def _put(self, parameters: Sequence[list[nn.Parameter]]) -> list[list[nn.Parameter]]:
        """Replaces the parameters of ``param_groups``, and returns the former ones."""
        before = [group["params"] for group in self._optimizer.param_groups]
        for group, new in zip(self._optimizer.param_groups, parameters, strict=True):
            group["params"] = new
        return before

    def _reduced(self) -> list[LiveBucket]:
        """Returns the buckets with new gradients, the same on all ranks, in the order in which forward reads them."""
        return sorted((b for b in self._buckets if b.has_new_gradients), key=lambda b: b.order)

    def _take_gradients(self, bucket: LiveBucket) -> None:
        """Gives the segments their part of the reduced gradients, once a step."""
        if bucket.phase is Phase.TAKEN:
            return
        bucket.phase = Phase.TAKEN
        if not self._scattered:
            # Every rank has all gradients, and the user's hooks may have replaced or removed them.
            if all(parameter.grad is None for parameter in bucket.parameters):
                bucket.phase = Phase.IDLE
                return
            for parameter, view in zip(bucket.parameters, bucket.views(bucket.grads), strict=True):
                if parameter.grad is None:
                    view.zero_()
                elif parameter.grad is not view:
                    view.copy_(parameter.grad)
        for segment in bucket.segments:
            grad = bucket.grads[segment.start : segment.end]
            segment.parameter.grad = grad.to(segment.parameter.dtype).view(segment.parameter.shape)

    def _publish(self, bucket: LiveBucket) -> None:
        bucket.phase = Phase.IDLE
        for segment in bucket.segments:
            segment.parameter.grad = None
        self._gathers.publish(bucket)

    # -- state -------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Returns the unsharded state on the first rank of each bucket's group; see :func:`state.gather`. Collective."""
        return state.gather(self._optimizer, self._buckets, self._names)

    def load(self, state_dict: dict[str, Any]) -> None:
        """Loads this rank's part of an unsharded state."""
        state.load(self._optimizer, self._buckets, self._names, state_dict)
        self.adopt_parameters()

    def shards(self, saved: Mapping[str, Mapping[str, Any]] | None) -> dict[str, dict[str, Any]]:
        """Returns this rank's part of the state; see :func:`state.shards`."""
        return state.shards(self._optimizer, self._buckets, saved)

    def adopt_parameters(self) -> None:
        """Sets main parameters to the weights, after these were written."""
        for bucket in self._buckets:
            self.adopt(bucket)

    def adopt(self, bucket: LiveBucket) -> None:
        """Sets a main parameter to its weight, unless it rounds to the weight: the weight was then not written."""
        if bucket.main is not None and not self._released:
            weights = bucket.data[bucket.shard]
            torch.where(bucket.main.to(weights.dtype) == weights, bucket.main, weights, out=bucket.main)

    def release(self) -> None:
        """Ends the updates after a fit. The state stays, for checkpoints and for the next fit."""
        self._released = True

    def disown(self) -> dict[str, Any]:
        """Returns the state as :meth:`state`, and leaves the optimizer without state, hooks and owner. Collective."""
        released = self.state()
        for hook in self._hooks:
            hook.remove()
        delattr(self._optimizer, OWNER)
        self._optimizer.state.clear()
        return released


def _only_padding(bucket: LiveBucket, start: int, end: int) -> bool:
    """Whether no parameter lies between two offsets. Padding is zeros with zero gradients, which no optimizer changes."""
    return not any(start < s.end - bucket.layout.start and s.start - bucket.layout.start < end for s in bucket.layout.slots)
