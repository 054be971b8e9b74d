"""Peers of data parallelism: Lightning's DDP and FSDP2."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard

from lightning_overlap.bench.peers import Peer, sharded_when_configured
from lightning_overlap.config import OverlapConfig
from lightning_overlap.decision import ConfigError


def peers(config: OverlapConfig, ranks: int, backend: str) -> dict[str, Peer]:
    """See :func:`lightning_overlap.bench.peers.find_peers`."""

    def ddp(megabytes: int) -> Peer:
        return (
            lambda: DDPStrategy(bucket_cap_mb=megabytes, gradient_as_bucket_view=True, process_group_backend=backend),
            lambda module: module,
        )

    def fsdp2() -> ModelParallelStrategy:
        return ModelParallelStrategy(data_parallel_size=ranks, tensor_parallel_size=1, process_group_backend=backend)

    return {
        "Lightning DDP, 4 MB buckets": ddp(4),
        "Lightning DDP, 25 MB buckets": ddp(25),
        "Lightning ModelParallel (FSDP2)": (fsdp2, _shard_blocks),
    }


def _shard_blocks(module: LightningModule) -> LightningModule:
    """Returns a module whose ``configure_model`` shards blocks and other children, and keeps weights gathered until backward."""

    if any(True for _ in module.parameters(recurse=False)):
        raise ConfigError("a parameter of the LightningModule itself belongs to none of the sharded children")

    def shard(copied: Any) -> None:
        mesh = copied.device_mesh["data_parallel"]
        lists = [m for m in copied.modules() if isinstance(m, nn.ModuleList)]
        for block in max(lists, key=len, default=()):
            fully_shard(block, mesh=mesh, reshard_after_forward=False)
        for child in copied.children():
            fully_shard(child, mesh=mesh, reshard_after_forward=False)

    return sharded_when_configured(module, shard)
