"""Sums the gradients of parameters that several stages hold (tied embeddings, for example) over these stages."""

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
    """Sums the gradients of tied parameters, each as soon as it is complete on this rank.

    Args:
        partition: the parameters, and the ranks that hold them.
        pipelines: the ranks of each pipeline of the world.
        rank: this rank in its pipeline.
        timeout: the longest that a transfer may take.

    Attributes:
        groups: by a set of ranks that hold the same parameters and contain this rank, their group.
    """

    def __init__(self, partition: Partition, pipelines: list[list[int]], rank: int, timeout: timedelta) -> None:
        self.groups: dict[tuple[int, ...], Group] = {}
        self._names = partition.tied()
        self._partition = partition
        self._waiting: deque[tuple[int, ...]] = deque()
        """Keys of ``groups`` whose gradients are not posted yet in this step."""
        self._sums: list[Pending] = []
        for holders in sorted(self._names):  # all ranks make the same groups in the same order
            sets = [[row[r] for r in holders] for row in pipelines]
            singles = [[other] for row in pipelines for r, other in enumerate(row) if r not in holders]
            # No named group: only the partition knows which ranks of a pipeline hold the parameter.
            group = make_group([*sets, *singles], "pipeline.tied", timeout, gathers=False, threads=False)
            if rank in holders:
                self.groups[holders] = group
                for name in self._names[holders]:
                    parameter = partition.parameter(name)
                    setattr(parameter, LATE_GRADIENT, True)
                    setattr(parameter, COUNTED_ELSEWHERE, rank != holders[0])

    def share_values(self) -> None:
        """Sends the values of tied parameters from the first stage that holds them to the others. Collective.

        Needed if each stage has initialised its own parameters.
        """
        for holders, group in self.groups.items():
            share(map(self._partition.parameter, self._names[holders]), group)

    def start_step(self) -> None:
        """Call it before a step's first backward."""
        self._waiting = deque(self.groups)

    def post(self, weight_gradients: WeightGradients | None) -> None:
        """Posts the sums, in one order on all ranks, up to the first gradient that is not complete on this rank.

        Args:
            weight_gradients: the deferred weight gradients, which are not complete yet; None: all gradients are complete.
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
        """Posts the remaining sums, and waits for all sums."""
        self.post(None)
        for pending in self._sums:
            pending.wait()
        self._sums.clear()
