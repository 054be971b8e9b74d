"""Peers of expert parallelism: that of the library transformers, with torch's FSDP2 for all other weights."""

from __future__ import annotations

from functools import partial
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy

from lightning_overlap.bench.peers import Peer, sharded_when_configured
from lightning_overlap.config import OverlapConfig
from lightning_overlap.decision import ConfigError


def peers(config: OverlapConfig, ranks: int, backend: str) -> dict[str, Peer]:
    """See :func:`lightning_overlap.bench.peers.find_peers`; none where some ranks share a batch, since FSDP2's ranks share none."""
    if config.degrees(ranks).data < ranks:
        return {}

    def strategy() -> ModelParallelStrategy:
        return ModelParallelStrategy(data_parallel_size=ranks, tensor_parallel_size=1, process_group_backend=backend)

    return {"Hugging Face EP + FSDP2": (strategy, partial(_spread_experts, ranks))}


def _spread_experts(ranks: int, module: LightningModule) -> LightningModule:
    """Returns a module whose ``configure_model`` has transformers spread the experts of its models, as ``from_pretrained`` does.

    (``from_pretrained(..., distributed_config=...)`` itself reads weights from a file, and needs the library accelerate.)
    """
    names = [name for name, part in module.named_modules() if getattr(part, "ep_plan", None)]
    outermost = [name for name in names if not any(name.startswith(f"{other}.") for other in names)]
    if not outermost:
        raise ConfigError("the module has no model of transformers with a plan for experts (base_model_ep_plan)")
    from transformers.distributed.configuration_utils import DistributedConfig

    def shard(copied: Any) -> None:
        for name in outermost:
            model = copied.get_submodule(name)
            config, _, mesh = model.prepare_distribute_model(DistributedConfig(fsdp_size=ranks, ep_size=ranks))
            model.maybe_distribute_model(model, config, mesh)

    return sharded_when_configured(module, shard)
