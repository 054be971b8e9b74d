"""What else can train the same module, with the settings that suit it best."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from lightning_overlap.bench.pipelining import SCHEDULES, TorchPipelining
from lightning_overlap.config import OverlapConfig
from lightning_overlap.decision import ConfigError
from lightning_overlap.modes.tensor.partition import Piece
from lightning_overlap.modes.tensor.plan import find


def peers(
    backend: str, ranks: int, config: OverlapConfig
) -> dict[str, tuple[Callable[[], Strategy], Callable[[LightningModule], LightningModule]]]:
    """By name: a maker of the strategy, and what has to be done to the module first.

    Args:
        backend: of the process group, the same for all.
        ranks: in all.
        config: ours. Those that only have data parallelism are no peers of other kinds: they would train on another batch a step.
    """
    size = config.tensor_parallel.size

    def ddp(megabytes: int) -> Callable[[], Strategy]:
        return lambda: DDPStrategy(bucket_cap_mb=megabytes, gradient_as_bucket_view=True, process_group_backend=backend)

    def fsdp2() -> Strategy:
        return ModelParallelStrategy(data_parallel_size=ranks, tensor_parallel_size=1, process_group_backend=backend)

    def cut() -> Strategy:
        return ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=size, process_group_backend=backend)

    pipeline = config.pipeline_parallel
    if ranks == pipeline.size > 1:
        asked = {field.name: getattr(config, field.name) for field in fields(config)}
        known: dict[str, Any] = {
            "torch.distributed.pipelining": (partial(TorchPipelining, **asked, process_group_backend=backend), lambda m: m)
        }
        return known if pipeline.chosen in SCHEDULES else {}
    if pipeline.size > 1:
        return {}
    if ranks == size > 1:
        return {"Lightning ModelParallel (DTensor)": (cut, partial(_cut_layers, config.parallel_plan, size))}
    return {
        "Lightning DDP, 4 MB buckets": (ddp(4), lambda module: module),
        "Lightning DDP, 25 MB buckets": (ddp(25), lambda module: module),
        "Lightning ModelParallel (FSDP2)": (fsdp2, _shard_blocks),
    }


def _shard_blocks(module: LightningModule) -> LightningModule:
    """A module whose ``configure_model`` shards each block and the rest, and keeps weights gathered until backward has used them."""

    if any(True for _ in module.parameters(recurse=False)):
        raise ConfigError("parameters of the LightningModule itself would be in no sharded part")

    def configure_model(self: Any) -> None:
        type(module).configure_model(self)
        mesh = self.device_mesh["data_parallel"]
        lists = [m for m in self.modules() if isinstance(m, nn.ModuleList)]
        for block in max(lists, key=len, default=()):
            fully_shard(block, mesh=mesh, reshard_after_forward=False)
        for child in self.children():
            fully_shard(child, mesh=mesh, reshard_after_forward=False)

    sharded = copy.copy(module)
    sharded.__class__ = type(type(module).__name__, (type(module),), {"configure_model": configure_model})
    return sharded


def _cut_layers(plan: Mapping[str, str], size: int, module: LightningModule) -> LightningModule:
    """A module whose ``configure_model`` has torch cut the layers that we cut, and the tokens; the vocabulary is left whole."""

    def configure_model(self: Any) -> None:
        type(module).configure_model(self)
        found = find(self, plan, size)
        blocks = self.get_submodule(found.blocks)
        styles: dict[str, Any] = {}
        for name, block in blocks.named_modules(prefix=found.blocks):
            if "Norm" in type(block).__name__ and not any(name.startswith(f"{region.name}.") for region in found.regions):
                styles[name] = SequenceParallel(use_local_output=True)
        for region in found.regions:
            styles[region.name] = PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate())
        for cut in found.cuts:
            if cut.role == "column":
                # Torch cuts what is fused as if it were one: in this order of the rows each rank gets its part of each.
                weight: Any = cut.module.weight
                piece = Piece(weight.shape, cut.dim, cut.parts)
                weight.data = torch.cat([piece.of(weight.data, rank, size) for rank in range(size)])
                styles[cut.name] = ColwiseParallel()
            elif cut.role == "row":
                styles[cut.name] = RowwiseParallel(output_layouts=Shard(1))
        mesh = self.device_mesh["tensor_parallel"]
        parallelize_module(self, mesh, styles)
        entry = PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Shard(1), use_local_output=True)
        parallelize_module(blocks[0], mesh, entry)
        parallelize_module(blocks[-1], mesh, PrepareModuleOutput(output_layouts=Shard(1), desired_output_layouts=Replicate()))

    sharded = copy.copy(module)
    sharded.__class__ = type(type(module).__name__, (type(module),), {"configure_model": configure_model})
    return sharded
