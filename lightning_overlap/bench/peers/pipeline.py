"""The peer of pipeline parallelism, torch.distributed.pipelining: the same stages with torch's schedules and transfers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B

from lightning_overlap.bench.peers import Peer
from lightning_overlap.config import OverlapConfig
from lightning_overlap.model.block_pass import Pass, Slot
from lightning_overlap.model.block_stack import BlockStack
from lightning_overlap.modes import MODES
from lightning_overlap.modes.pipeline import PIPELINE
from lightning_overlap.modes.pipeline.mode import PipelineMode
from lightning_overlap.steps import microbatches
from lightning_overlap.steps.random_state import block_seeder, preserve_random_state, seed_all
from lightning_overlap.steps.step import Step
from lightning_overlap.strategy.strategy import OverlapStrategy

SCHEDULES: dict[str, Any] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "eager_1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
}
"""torch's schedule for each schedule of this package that torch has."""


class _Stage(nn.Module):
    """One stage of training_step, from hidden states to hidden states or the loss. Blocks must return only hidden states."""

    def __init__(self, stack: BlockStack, blocks: range, *, first: bool, last: bool) -> None:
        super().__init__()
        self._stack, self._blocks, self._first, self._last = stack, blocks, first, last
        self.number = 0
        self.step: Step | None = None
        self.parts: Sequence[Any] = ()

    def forward(self, x: Tensor) -> Tensor:
        assert self.step is not None, "run_step sets the step"
        # torch runs each stage once before the first batch, to learn the shapes: microbatches are then numbered in a rotated order.
        number, self.number = self.number % len(self.parts), self.number + 1
        before, end = (self._blocks.start - 1, 0), (self._blocks.stop - 1, 0)
        current_pass = Pass(
            local_blocks=frozenset(self._blocks),
            end_block=self._stack.size if self._last else self._blocks.stop,
            received={} if self._first else {before: x},
            structures={block: (Slot(0), {}) for block in range(self._stack.size)},
            is_kept=lambda leaf: leaf == end,
            before_block=block_seeder(self.step.key, number),
        )
        seed_all(*self.step.key, number)
        with self._stack.running(current_pass):
            loss = self.step.forward(self.parts[number], number)
        if not self._last:
            return current_pass.kept[end]
        assert loss is not None, "training_step returns a loss"
        return loss.reshape(1)


class _TorchPipelining(PipelineMode):
    """The pipeline mode with torch's schedule instead of its own."""

    def run_step(self, step: Step) -> None:
        assert self._stack is not None, "the model is parallelized before it is trained"
        count = self.config.count
        parts = microbatches.split_batch(step.batch, count)
        if not hasattr(self, "_torch_stages"):
            partition = self.partition
            stages = len(partition.stages)
            mine = [stage for stage, rank in enumerate(partition.placement) if rank == self.group.rank]
            self._torch_stages = [
                _Stage(self._stack, partition.stages[stage], first=stage == 0, last=stage == stages - 1) for stage in mine
            ]
            made = [
                PipelineStage(module, stage, stages, self._device, group=self.group.process_group)
                for module, stage in zip(self._torch_stages, mine, strict=True)
            ]
            schedule = SCHEDULES[self.config.schedule_name]
            of_rank = made if self.config.schedule_name == "interleaved" else made[0]
            self._schedule = schedule(of_rank, count, loss_fn=lambda out, _: out.sum() / count)
        for stage in self._torch_stages:
            stage.step, stage.parts, stage.number = step, parts, 0
        numbers = torch.zeros(count)  # torch splits these; the stages have the user's microbatches
        inputs = (numbers,) if self.group.rank == self.partition.placement[0] else ()
        target = {"target": numbers} if self.has_the_loss else {}
        step.start_backward()
        with preserve_random_state(self._device):
            self._schedule.step(*inputs, **target)
        step.finish_backward()
        step.log(self.with_the_loss(lambda: step.merge_logs([1 / count] * count)))


class TorchPipelining(OverlapConfig):
    """The user's configuration, with that mode instead of the pipeline mode."""

    modes = tuple(replace(mode, mode_type=_TorchPipelining) if mode is PIPELINE else mode for mode in MODES)


def peers(config: OverlapConfig, ranks: int, backend: str) -> dict[str, Peer]:
    """See :func:`lightning_overlap.bench.peers.find_peers`; none for schedules that torch does not have."""
    if config.pipeline_parallel.schedule_name not in SCHEDULES:
        return {}

    def strategy() -> OverlapStrategy:
        made = OverlapStrategy(process_group_backend=backend)
        made.config = TorchPipelining(**{field.name: getattr(config, field.name) for field in fields(config)})
        return made

    return {"torch.distributed.pipelining": (strategy, lambda module: module)}
