"""The user's optimizer, stepping this rank's pieces of the buckets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_overlap.decision import ConfigError
from lightning_overlap.model.markers import COUNTED_ELSEWHERE, is_counted_elsewhere
from lightning_overlap.modes.data import state
from lightning_overlap.modes.data.buffers import HALF, LiveBucket, Phase, Segment, groups_of
from lightning_overlap.modes.data.gathers import Gathers

OWNER = "_lightning_overlap_owner"
"""Attribute of an optimizer: the :class:`ShardedOptimizer` that holds its state in shards."""


class ShardedOptimizer:
    """Lets an optimizer hold the state of this rank's pieces only.

    Its ``param_groups`` are the user's, and the shards stand in their place while ``step()`` runs, whoever calls it
    (optimizer step hooks). Its update is elementwise, or the pieces are whole parameters, so the numbers are the same.

    Args:
        optimizer: the user's.
        buckets: the mode's, the same list for as long as the mode lives.
        gathers: where updated buckets go.
        whole: pieces end where parameters end.
        by_bucket: whether it may step a bucket at a time.
        gather_at_once: whether ``step()`` ends with complete parameters.
        reduced_in_pieces: whether this rank has the reduced gradients of its pieces only.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        buckets: list[LiveBucket],
        gathers: Gathers,
        *,
        whole: bool,
        by_bucket: bool,
        gather_at_once: bool,
        reduced_in_pieces: bool,
    ) -> None:
        self._optimizer = optimizer
        self._buckets = buckets
        self._gathers = gathers
        self._whole = whole
        self._by_bucket = by_bucket
        self._gather_at_once = gather_at_once
        self._reduced_in_pieces = reduced_in_pieces
        self._users: list[list[nn.Parameter]] = []  # the user's param_groups, while the shards stand in their place
        self._stepping = self._released = False
        earlier: ShardedOptimizer | None = getattr(optimizer, OWNER, None)  # the module may give the same object in each fit
        given: dict[str, Any] | None = optimizer.state_dict() if earlier is None and optimizer.state else None
        if earlier is not None:
            given = earlier.disown()
            for group in groups_of(buckets):  # the first rank of each has the states of the group's parameters
                given["state"] = {**given["state"], **group.share_object(given["state"])}
        setattr(optimizer, OWNER, self)
        self._names = state.original_names(optimizer, buckets)
        self._cut()
        if given is not None:
            optimizer.state.clear()
            self.load(given)
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_state_dict_pre_hook(self._before_state_dict),
        ]

    def owns(self, optimizer: Optimizer) -> bool:
        return optimizer is self._optimizer

    # -- shards ------------------------------------------------------------------------------------------------------

    def _cut(self) -> None:
        group_of = {id(p): g for g, group in enumerate(self._optimizer.param_groups) for p in group["params"]}
        self._shards: list[list[nn.Parameter]] = [[] for _ in self._optimizer.param_groups]
        for bucket in self._buckets:
            self._segment(bucket, group_of)
            for segment in bucket.segments:
                self._shards[segment.group].append(segment.parameter)

    def _segment(self, bucket: LiveBucket, group_of: Mapping[int, int]) -> None:
        """Cuts this rank's piece of a bucket where the optimizer's group changes (at every parameter, if they stay whole)."""
        own = bucket.own
        if bucket.data.dtype in HALF:
            bucket.main = bucket.data[own].float()
        runs: list[tuple[int, int, int, nn.Parameter]] = []  # group, start, end, first parameter
        for slot, parameter in zip(bucket.layout.slots, bucket.parameters, strict=True):
            start = max(slot.start - bucket.layout.start, own.start)
            end = min(slot.end - bucket.layout.start, own.stop)
            group = group_of.get(id(parameter))
            if start >= end or group is None:
                continue
            if runs and runs[-1][0] == group and not self._whole and _only_padding(bucket, runs[-1][2], start):
                runs[-1] = (group, runs[-1][1], end, runs[-1][3])
            else:
                runs.append((group, start, end, parameter))
        for group, start, end, first in runs:
            flat = bucket.data[start:end] if bucket.main is None else bucket.main[start - own.start : end - own.start]
            parameter = nn.Parameter(flat.view(first.shape) if self._whole else flat)
            setattr(parameter, COUNTED_ELSEWHERE, is_counted_elsewhere(first))  # as all of a bucket
            bucket.segments.append(Segment(parameter, group, start, end))

    def move(self, old: Sequence[LiveBucket]) -> None:
        """The buckets are new: cuts them, and takes the state along from the old ones."""
        self._cut()
        state.move(self._optimizer, old, self._buckets)

    # -- step --------------------------------------------------------------------------------------------------------

    def parameters(self) -> list[nn.Parameter]:
        """This rank's shards, with their part of the reduced gradients: what clipping looks at."""
        for bucket in self._reduced():
            self._take_gradients(bucket)
        return [parameter for group in self._shards for parameter in group]

    def update(self, bucket: LiveBucket) -> None:
        """Steps the segments of one reduced bucket, and sends them."""
        self._take_gradients(bucket)
        self._gathers.finish(bucket)
        self.adopt(bucket)  # of weights that the user's hooks have written since the last step
        users = self._put([[s.parameter for s in bucket.segments if s.group == index] for index in range(len(self._shards))])
        self._stepping = True
        try:
            type(self._optimizer).step(self._optimizer)
        finally:
            self._stepping = False
            self._put(users)
        self._publish(bucket)

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before ``optimizer.step()``, whoever calls it: the shards take the places of the user's parameters."""
        if self._stepping:
            return None
        if self._released:
            raise ConfigError("after fit the optimizer's state is in the ranks' shards: make a new optimizer to step by hand")
        result = None
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is not None:
            # It runs backward, which must be over before the shards can be stepped.
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
            "the optimizer's state is sharded over the ranks; trainer.save_checkpoint() saves the whole of it, and "
            "trainer.strategy.optimizer_state(optimizer), called on every rank, gives it to the first"
        )

    def _put(self, parameters: Sequence[list[nn.Parameter]]) -> list[list[nn.Parameter]]:
        """Puts parameters into the param_groups and gives those that were there."""
        before = [group["params"] for group in self._optimizer.param_groups]
        for group, mine in zip(self._optimizer.param_groups, parameters, strict=True):
            group["params"] = mine
        return before

    def _reduced(self) -> list[LiveBucket]:
        """Those with fresh gradients, the same on all ranks, in the order in which forward reads them."""
        return sorted((b for b in self._buckets if b.has_new_gradients), key=lambda b: b.order)

    def _take_gradients(self, bucket: LiveBucket) -> None:
        """The segments get their part of the reduced gradients, once."""
        if bucket.phase is Phase.TAKEN:
            return
        bucket.phase = Phase.TAKEN
        if not self._reduced_in_pieces:
            # Everyone has the whole gradients, and the user's hooks may have put others in their place, or none.
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
        """The unsharded state on the first rank of each bucket's group, as :func:`state.gather` gives it. Collective."""
        return state.gather(self._optimizer, self._buckets, self._names)

    def load(self, state_dict: dict[str, Any]) -> None:
        """Takes this rank's share of an unsharded state."""
        state.load(self._optimizer, self._buckets, self._names, state_dict)
        self.adopt_parameters()

    def shards(self, saved: Mapping[str, Mapping[str, Any]] | None) -> dict[str, dict[str, Any]]:
        """This rank's part of the state, as :func:`state.shards` gives it."""
        return state.shards(self._optimizer, self._buckets, saved)

    def adopt_parameters(self) -> None:
        """The weights have been written: the main parameters follow."""
        for bucket in self._buckets:
            self.adopt(bucket)

    def adopt(self, bucket: LiveBucket) -> None:
        """A main parameter that does not round to its weight is of another time: the weight counts."""
        if bucket.main is not None and not self._released:
            weights = bucket.data[bucket.own]
            torch.where(bucket.main.to(weights.dtype) == weights, bucket.main, weights, out=bucket.main)

    def release(self) -> None:
        """The fit is over: the state stays, for checkpoints and for a next fit, and nothing steps any more."""
        self._released = True

    def disown(self) -> dict[str, Any]:
        """Gives the optimizer and its state away. Collective, as :meth:`state`."""
        given = self.state()
        for hook in self._hooks:
            hook.remove()
        delattr(self._optimizer, OWNER)
        self._optimizer.state.clear()
        return given


def _only_padding(bucket: LiveBucket, start: int, end: int) -> bool:
    """Whether no parameter lies between two places: zeros with zero gradients, which every optimizer leaves alone."""
    return not any(start < s.end - bucket.layout.start and s.start - bucket.layout.start < end for s in bucket.layout.slots)
