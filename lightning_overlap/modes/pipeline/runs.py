"""Keeps a runner for each number of microbatches: the last batch of an epoch may have fewer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch

from lightning_overlap.modes.pipeline.config import PipelineChoices, PipelineParallel, build_schedule
from lightning_overlap.modes.pipeline.flow import Flow
from lightning_overlap.modes.pipeline.transfers import KnownForms, PipelineTransfers, channel_kinds, channel_name, hops
from lightning_overlap.ranks.mesh import ParallelMesh
from lightning_overlap.ranks.world import backend
from lightning_overlap.steps.runner import Runner


class Runs:
    """The runners of a fit, and the groups that carry their transfers.

    Args:
        config: the pipeline's.
        choices: the pipeline's.
        mesh: the ranks.
        timeout: the longest that a transfer may take.

    Attributes:
        channels: by direction, the group that carries its transfers.
        by_count: by number of microbatches, the runner and its transfers.
    """

    def __init__(self, config: PipelineParallel, choices: PipelineChoices, mesh: ParallelMesh, timeout: timedelta) -> None:
        self._config, self._choices = config, choices
        self._rank = mesh.index("pipeline")
        placement = config.plan(config.count).placement
        names = {direction: channel_name(direction, backend()) for direction in channel_kinds(placement)}
        groups = {name: mesh.group("pipeline", timeout, f"pipeline.{name}", gathers=False) for name in sorted(set(names.values()))}
        self.channels = {direction: groups[name] for direction, name in names.items()}
        for direction in sorted(self.channels):
            self.channels[direction].connect(hops(placement, direction))
        self._known = KnownForms()
        self.by_count: dict[int, tuple[Runner, PipelineTransfers]] = {}

    def of(self, count: int, flow: Flow, device: torch.device) -> tuple[Runner, PipelineTransfers]:
        """The runner for batches of ``count`` microbatches, and its transfers."""
        if count not in self.by_count:
            schedule = build_schedule(self._config, self._choices, count)
            prefetch = self._config.p2p_prefetch if self._choices.overlap_p2p.value else None
            counts = [len(flow.sent_after(stage)) for stage in range(schedule.stages)]
            transfers = PipelineTransfers(schedule, self._rank, self.channels, self._known, device, prefetch, counts)
            self.by_count[count] = Runner(schedule, self._rank, transfers), transfers
        return self.by_count[count]

    @contextmanager
    def trial(self) -> Iterator[None]:
        """Inside, steps may run in another precision: their forms and kernels are forgotten afterwards."""
        try:
            with self._known.preserved():
                yield
        finally:
            for _, transfers in self.by_count.values():
                transfers.forget_kinds()

    def finish(self) -> None:
        """Waits for all sends."""
        for _, transfers in self.by_count.values():
            transfers.finish()
