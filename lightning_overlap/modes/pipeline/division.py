"""Divides a model's blocks into stages, and finds the facts on which the pipeline's choices depend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from lightning_overlap.model.blocks import Blocks, blocks_by_role
from lightning_overlap.modes.pipeline import layout
from lightning_overlap.modes.pipeline.config import PipelineFacts, PipelineParallel
from lightning_overlap.modes.pipeline.partition import Partition, heads, work
from lightning_overlap.modes.pipeline.weight_grad import what_splits
from lightning_overlap.torch_seams import parameters_of


def look(model: nn.Module, config: PipelineParallel, roles: Mapping[str, str]) -> PipelineFacts | None:
    """See :class:`lightning_overlap.modes.descriptor.Look`."""
    if config.size == 1:
        return None
    name, blocks, stages = divide(model, config, roles)
    costs = [work(block) for block in blocks]
    head = sum(layer.weight.numel() for layer in heads(model, name, blocks))
    by_stage = [sum(costs[number] for number in numbers) for numbers in stages]
    counts = tuple(map(len, stages))
    return PipelineFacts(name, counts, (*by_stage[:-1], by_stage[-1] + head), head, *what_splits(blocks))


def make_partition(model: nn.Module, config: PipelineParallel, roles: Mapping[str, str]) -> tuple[str, Blocks, Partition]:
    """Divides a model.

    Returns:
        The name of the list of blocks, the list, and the partition.

    Raises:
        ConfigError: the model cannot be divided as configured.
    """
    name, blocks, stages = divide(model, config, roles)
    return name, blocks, Partition(model, name, blocks, stages, config.plan(config.count).placement, config.held_by_all)


def divide(model: nn.Module, config: PipelineParallel, roles: Mapping[str, str]) -> tuple[str, Blocks, layout.Layout]:
    """The name of the list of blocks, the list, and the numbers of each stage's blocks."""
    is_configured = config.layout is not None or config.layers_per_stage is not None  # stages may then have no blocks
    name, blocks = blocks_by_role(model, roles, 1 if is_configured else config.stages)
    return name, blocks, _stages(config, model, name, list(blocks))


def _stages(config: PipelineParallel, model: nn.Module, name: str, blocks: Sequence[nn.Module]) -> layout.Layout:
    if config.layout is not None:
        return layout.parse(config.layout, len(blocks), config.stages)
    if config.layers_per_stage is not None:
        return layout.counted(config.layers_per_stage, len(blocks), config.stages)
    costs = [sum(p.numel() for p in block.parameters()) for block in blocks]
    before, after, is_before = 0, 0, True
    for path, module in model.named_modules():
        is_inside = path == name or path.startswith(f"{name}.")
        is_before = is_before and not is_inside
        if not is_inside:
            elements = sum(p.numel() for p in parameters_of(module).values() if p is not None)
            before, after = (before + elements, after) if is_before else (before, after + elements)
    return layout.balanced(costs, config.stages, first=before, last=after)
