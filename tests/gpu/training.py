"""Fits of the GPU tests, which workers call."""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import SingleDeviceStrategy

from lightning_overlap import OverlapStrategy
from tests.helpers.models import Transformer, token_loader

BATCH = 8
"""Samples over all ranks."""
EPOCHS, BATCHES = 2, 3
QUIET = {
    **{"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False},
    "use_distributed_sampler": False,  # Lightning's shuffles
}


def fit(
    device: str,
    layout: dict[str, Any],
    model: dict[str, Any],
    trainer: dict[str, Any],
    resume: str | None = None,
    save: str | None = None,
) -> dict[str, Any]:
    """One rank's fit of two epochs of three batches.

    Args:
        device: ``cuda`` or ``cpu``.
        layout: arguments of OverlapStrategy.
        model: arguments of the model.
        trainer: arguments of Trainer.
        resume: a checkpoint to go on from.
        save: where to save one at the end.

    Returns:
        ``weights``: all of them, in fp32 on the CPU, one after the other; ``metrics``.
    """
    warnings.simplefilter("ignore")
    torch.backends.cuda.matmul.allow_tf32 = False
    seed_everything(1 + int(os.environ["RANK"]), verbose=False)  # rank 0's weights count
    module = Transformer(**model)
    size = int(os.environ["WORLD_SIZE"])
    strategy = OverlapStrategy(**layout, cluster_environment=TorchElasticEnvironment())
    run = _trainer(device, strategy, size, trainer)
    samples = strategy.distributed_sampler_kwargs
    data = token_loader(BATCH // samples["num_replicas"], samples["rank"], samples["num_replicas"])
    run.fit(module, data, data, ckpt_path=resume)
    if save:
        run.save_checkpoint(save)
    return _answer(run, module)


def fit_alone(device: str, model: dict[str, Any], trainer: dict[str, Any]) -> dict[str, Any]:
    """The same on one device, by Lightning alone."""
    warnings.simplefilter("ignore")
    torch.backends.cuda.matmul.allow_tf32 = False
    seed_everything(1, verbose=False)
    module = Transformer(**model)
    run = _trainer(device, SingleDeviceStrategy(torch.device(device, 0)), 1, trainer)
    run.fit(module, token_loader(BATCH), token_loader(BATCH))
    return _answer(run, module)


def fit_by_hand(device: str, model: dict[str, Any], microbatches: int) -> torch.Tensor:
    """The weights of one process that goes through the same microbatches, with nothing of Lightning or this package."""
    torch.backends.cuda.matmul.allow_tf32 = False
    seed_everything(1, verbose=False)
    module = Transformer(**model).to(device)
    optimizer = module.configure_optimizers()
    for _ in range(EPOCHS):
        for batch, _ in zip(token_loader(BATCH), range(BATCHES), strict=False):
            optimizer.zero_grad()
            for part in batch.to(device).tensor_split(microbatches):
                (module.loss(part) * (len(part) / len(batch))).backward()
            optimizer.step()
    return _weights(module)


def _trainer(device: str, strategy: Any, size: int, settings: dict[str, Any]) -> Trainer:
    length = {"max_epochs": EPOCHS, "limit_train_batches": BATCHES, "limit_val_batches": 2}
    accelerator = "gpu" if device == "cuda" else "cpu"
    return Trainer(**{**QUIET, **length, **settings}, accelerator=accelerator, devices=1, num_nodes=size, strategy=strategy)


def _answer(trainer: Trainer, module: Transformer) -> dict[str, Any]:
    return {"weights": _weights(module), "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()}}


def _weights(module: Transformer) -> torch.Tensor:
    return torch.cat([p.detach().flatten().float().cpu() for p in module.parameters()])
