"""Peers of tensor parallelism: Lightning's ModelParallel with torch's DTensor."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from lightning_overlap.bench.peers import Peer, sharded_when_configured
from lightning_overlap.config import OverlapConfig
from lightning_overlap.modes.tensor.plan import find_plan
from lightning_overlap.state.pieces import Piece


def peers(config: OverlapConfig, ranks: int, backend: str) -> dict[str, Peer]:
    """See :func:`lightning_overlap.bench.peers.find_peers`."""

    def strategy() -> ModelParallelStrategy:
        return ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=ranks, process_group_backend=backend)

    return {"Lightning ModelParallel (DTensor)": (strategy, partial(_shard_layers, config.parallel_plan, ranks))}


def _shard_layers(plan: Mapping[str, str], size: int, module: LightningModule) -> LightningModule:
    """Returns a module whose ``configure_model`` lets torch shard the same layers, and the tokens; the vocabulary stays unsharded."""

    def shard(copied: Any) -> None:
        found = find_plan(copied, plan, size)
        blocks = copied.get_submodule(found.blocks)
        styles: dict[str, Any] = {}
        for name, block in blocks.named_modules(prefix=found.blocks):
            if "Norm" in type(block).__name__ and not any(name.startswith(f"{region.name}.") for region in found.regions):
                styles[name] = SequenceParallel(use_local_output=True)
        for region in found.regions:
            styles[region.name] = PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate())
        for layer in found.layers:
            if layer.role == "column":
                # torch shards a fused weight as one matrix: in this order of rows each rank gets its part of each fused weight.
                weight: Any = layer.module.weight
                piece = Piece(weight.shape, layer.dim, layer.parts)
                weight.data = torch.cat([piece.of(weight.data, rank, size) for rank in range(size)])
                styles[layer.name] = ColwiseParallel()
            elif layer.role == "row":
                styles[layer.name] = RowwiseParallel(output_layouts=Shard(1))
        mesh = copied.device_mesh["tensor_parallel"]
        parallelize_module(copied, mesh, styles)
        entry = PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Shard(1), use_local_output=True)
        parallelize_module(blocks[0], mesh, entry)
        parallelize_module(blocks[-1], mesh, PrepareModuleOutput(output_layouts=Shard(1), desired_output_layouts=Replicate()))

    return sharded_when_configured(module, shard)
