"""Peers of expert parallelism: that of transformers, whose other parameters FSDP2 shards."""

from __future__ import annotations

import copy
import tempfile
from functools import partial
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy

from lightning_overlap.bench.peers import Peer
from lightning_overlap.config import OverlapConfig
from lightning_overlap.decision import ConfigError


def peers(config: OverlapConfig, ranks: int, backend: str) -> dict[str, Peer]:
    """See :func:`lightning_overlap.bench.peers.find_peers`."""

    def strategy() -> ModelParallelStrategy:
        return ModelParallelStrategy(data_parallel_size=ranks, tensor_parallel_size=1, process_group_backend=backend)

    return {"transformers EP + FSDP2": (strategy, partial(_spread_experts, config.expert_parallel.size, ranks))}


def _spread_experts(size: int, ranks: int, module: LightningModule) -> LightningModule:
    """Returns a module whose ``configure_model`` loads its models of transformers again, spread over the ranks."""
    parts: dict[str, Any] = {name: part for name, part in module.named_children() if getattr(part, "ep_plan", None)}
    if len(parts) != len(list(module.children())) or any(True for _ in module.parameters(recurse=False)):
        raise ConfigError("only models of transformers with a plan for experts can be spread, and the module has others")

    def configure_model(self: Any) -> None:
        from transformers.distributed.configuration_utils import DistributedConfig

        type(module).configure_model(self)
        for name, part in parts.items():
            with tempfile.TemporaryDirectory() as folder:
                part.save_pretrained(folder)
                layout = DistributedConfig(fsdp_size=ranks, ep_size=size)
                loaded: Any = type(part).from_pretrained(folder, distributed_config=layout)
            setattr(self, name, loaded.train(part.training))

    copied = copy.copy(module)
    copied.__class__ = type(type(module).__name__, (type(module),), {"configure_model": configure_model})
    return copied
