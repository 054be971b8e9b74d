"""Gradients of parameters that several stages hold (tied embeddings, say), summed over these stages."""

from __future__ import annotations

from collections import deque
from datetime import timedelta

import torch

from lightning_overlap.model.markers import COUNTED_ELSEWHERE, LATE_GRADIENT
from lightning_overlap.modes.pipeline.partition import Partition
from lightning_overlap.modes.pipeline.weight_grad import WeightGradients
from lightning_overlap.ranks.group import Group, Pending
from lightning_overlap.ranks.shared_state import share
from lightning_overlap.ranks.world import make_group


class TiedGradients:
    """Sums the gradients of tied parameters, as soon as this rank's are complete.

    Args:
        partition: which stages hold which parameters.
        pipelines: the ranks of each pipeline of the world.
        rank: this one, in its pipeline.
        timeout: the longest that a transfer may take.

    Attributes:
        groups: by the pipeline's ranks that hold the same parameters, those of which this rank is one.
    """

    def __init__(self, partition: Partition, pipelines: list[list[int]], rank: int, timeout: timedelta) -> None:
        self.groups: dict[tuple[int, ...], Group] = {}
        self._names = partition.shared()
        self._partition = partition
        self._waiting: deque[tuple[int, ...]] = deque()
        """Of ``groups``, those whose gradients are still to be posted in this step."""
        self._sums: list[Pending] = []
        for holders in sorted(self._names):  # the same groups on all ranks, in one order
            sets = [[row[r] for r in holders] for row in pipelines]
            rest = [[other] for row in pipelines for r, other in enumerate(row) if r not in holders]
            # No named group: only the partition knows which ranks of a pipeline hold the parameter.
            group = make_group([*sets, *rest], "pipeline.tied", timeout, gathers=False, threads=False)
            if rank in holders:
                self.groups[holders] = group
                for name in self._names[holders]:
                    parameter = partition.parameter(name)
                    setattr(parameter, LATE_GRADIENT, True)
                    setattr(parameter, COUNTED_ELSEWHERE, rank != holders[0])

    def share_values(self) -> None:
        """All stages get the values of the first one that holds a parameter, where each has initialised its own. Collective."""
        for holders, group in self.groups.items():
            share(map(self._partition.parameter, self._names[holders]), group)

    def start_step(self) -> None:
        """Call it before a step's first backward."""
        self._waiting = deque(self.groups)

    def post(self, weight_gradients: WeightGradients | None) -> None:
        """Posts the sums, in one order on all ranks, up to the first gradient that is not complete on this rank.

        Args:
            weight_gradients: of weights that were deferred, which are not complete; None if all are complete.
        """
        while self._waiting:
            parameters = {name: self._partition.parameter(name) for name in self._names[self._waiting[0]]}
            if weight_gradients is not None and any(map(weight_gradients.defers, parameters.values())):
                return
            group = self.groups[self._waiting.popleft()]
            for name, parameter in parameters.items():
                if parameter.requires_grad:
                    if parameter.grad is None:
                        parameter.grad = torch.zeros_like(parameter)
                    self._sums.append(group.all_reduce(parameter.grad, label=f"pipeline.tied[{name}]"))

    def finish(self) -> None:
        """Posts what is left, and waits for all sums."""
        self.post(None)
        for pending in self._sums:
            pending.wait()
        self._sums.clear()
