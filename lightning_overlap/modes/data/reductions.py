"""Gradients on their way to the ranks that use them: reductions of buckets under backward, and of sparse gradients after it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import nn

from lightning_overlap.modes.data.buffers import LiveBucket, Phase
from lightning_overlap.modes.data.config import DataChoices, DataParallel
from lightning_overlap.ranks.group import Group, Pending


class Reductions:
    """Posts the reductions of buckets and waits for them in the order of posting.

    Args:
        config: dtype of the transfer, division, check of the values.
        choices: reduce-scatter or all-reduce.
        groups: the ranks over which the optimizer is sharded. With several optimizer instances also the ranks of all instances that
            have the same shard, over which shards are then all-reduced.
        on_reduced: called with each bucket, once this rank has its part of the sum.

    Attributes:
        scatter: whether each rank gets the sum of its shard only.
        any_order: whether ranks may post buckets in different orders, since keys tell the transfers apart.
    """

    def __init__(
        self, config: DataParallel, choices: DataChoices, groups: Sequence[Group], on_reduced: Callable[[LiveBucket], None]
    ) -> None:
        self._config = config
        self._groups = groups
        self._instances = groups[1] if len(groups) > 1 else None
        self._on_reduced = on_reduced
        self._wire = torch.bfloat16 if config.reduce_scatter_with_fp32_accumulation else None
        self._posted: deque[tuple[LiveBucket, Pending]] = deque()
        self._posted_across: deque[tuple[LiveBucket, Pending]] = deque()  # over the instances
        self._not_finite: list[str] = []
        self.scatter = choices.gradients.value == "reduce-scatter"
        self.any_order = groups[0].keyed and self.scatter and self._instances is None

    def post(self, bucket: LiveBucket) -> None:
        """Posts the reduction of a bucket, in which all gradients are."""
        bucket.phase = Phase.REDUCING
        if self._config.check_for_nan_in_grad:
            self._check_finite(bucket)
        label = f"data.grads[{bucket.key}]"
        divisor: float | None = None
        if self._config.average_in_collective:
            divisor = bucket.divisor if self._instances is None else bucket.divisor / self._instances.size
        else:
            bucket.grads.div_(bucket.divisor)
        if self.scatter:
            pending = bucket.group.reduce_scatter(
                bucket.grads, bucket.bounds, key=bucket.key, label=label, divisor=divisor, wire=self._wire
            )
        else:
            pending = bucket.group.all_reduce(bucket.grads, label=label, divisor=divisor)
        self._posted.append((bucket, pending))

    def progress(self) -> None:
        """Finishes the reductions that are complete, without waiting."""
        if self._instances is None or not self._groups[0].in_one_order:
            self._finish(block=False)

    def finish(self) -> None:
        """Waits for all reductions."""
        self._finish(block=True)

    def _finish(self, *, block: bool) -> None:
        while self._posted and (block or self._posted[0][1].arrived()):
            bucket, pending = self._posted.popleft()
            shard = pending.wait()
            if self._instances is None:
                self._on_reduced(bucket)
                continue
            divisor = self._instances.size if self._config.average_in_collective else None
            across = self._instances.all_reduce(shard, label=f"data.grads[{bucket.key}].instances", divisor=divisor)
            self._posted_across.append((bucket, across))
        while self._posted_across and (block or self._posted_across[0][1].arrived()):
            bucket, pending = self._posted_across.popleft()
            pending.wait()
            self._on_reduced(bucket)

    def reduce_sparse(self, named: Sequence[tuple[str, nn.Parameter]]) -> None:
        """Averages sparse gradients over all ranks, as DDP does. Collective, blocking.

        Args:
            named: names and parameters, in the same order on all ranks. A parameter without a gradient counts as zeros.
        """
        for name, parameter in named:
            if not parameter.requires_grad:
                continue
            empty = torch.zeros_like(parameter, layout=torch.sparse_coo)
            grad = empty if parameter.grad is None else parameter.grad
            grad = grad.coalesce() if grad.is_sparse else grad  # dense where it is also the weight of a head
            for group in self._groups:
                dense = grad.is_sparse and not group.sums_sparse
                summed = grad.to_dense() if dense else grad
                summed = group.all_reduce(summed, label=f"data.sparse[{name}]", divisor=group.size).wait()
                grad = summed.to_sparse(1) if dense else summed
            parameter.grad = grad

    def _check_finite(self, bucket: LiveBucket) -> None:
        for name, view in zip(bucket.names, bucket.views(bucket.grads), strict=True):
            if not torch.isfinite(view).all():
                rank = bucket.group.ranks[bucket.group.rank]
                self._not_finite.append(f"rank {rank}: the gradient of {name} (bucket {bucket.key}) is NaN or infinite")

    def refuse_not_finite(self, device: torch.device) -> None:
        """Checks the reduced gradients of all ranks, if the configuration asks for it, before anything is updated. Collective.

        Args:
            device: of the gradients.

        Raises:
            FloatingPointError: on all ranks, with the names of the parameters whose gradient is NaN or infinite on any rank.
        """
        if not self._config.check_for_nan_in_grad:
            return
        count = torch.tensor(float(len(self._not_finite)), device=device)
        for group in self._groups:
            count = group.all_reduce(count, label="data.not_finite").wait()
        if count.item():
            messages, self._not_finite = self._not_finite, []
            for group in self._groups:
                messages = [message for of_rank in group.all_gather_objects(messages) for message in of_rank]
            raise FloatingPointError("\n".join(messages))
