"""Trains a model of token sequences as one rank of a world, or alone, on the same batches."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from lightning_overlap import OverlapStrategy
from lightning_overlap.ranks.mesh import ParallelMesh

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
BATCH = 4
REFERENCES: dict[Any, tuple[Any, Any]] = {}
"""By the arguments of :func:`train`, what fits in one process have told, which nobody changes; and the arguments, whose addresses then
belong to nothing else."""


class Losses(Callback):
    """Keeps each step's loss."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, index: int) -> None:
        self.values.append(float(outputs["loss"]))


def token_samples(tokens: int = 16, vocabulary: int = 64) -> list[Tensor]:
    """40 samples of ``tokens`` + 1 token ids."""
    return list(torch.randint(0, vocabulary, (40, tokens + 1), generator=torch.Generator().manual_seed(3)))


def train(
    strategy: dict[str, Any] | None,
    make: Callable[..., LightningModule],
    model: dict[str, Any],
    data: dict[str, Any],
    *,
    samples: Callable[..., list[Any]] = token_samples,
    collate: Callable[..., Any] | None = None,
    callbacks: Sequence[Callback] = (),
    resume: str | None = None,
    save: str | None = None,
    **trainer: Any,
) -> Any:
    """Trains as one rank of the world, or alone, once for the same arguments: many tests compare with the same fit.

    Args:
        strategy: arguments of OverlapStrategy; None: one process.
        make: of the module.
        model: its arguments.
        data: arguments of ``samples``.
        samples: makes the samples.
        collate: of the data loader.
        callbacks: of the Trainer.
        resume: a checkpoint.
        save: where to write one.
        trainer: arguments of the Trainer.
    """
    once = strategy is None and not (callbacks or resume or save)
    key = (make, samples, collate, repr((model, data, trainer)))
    if once and key in REFERENCES:
        return REFERENCES[key][0]
    warnings.simplefilter("ignore")
    seed_everything(5, verbose=False)
    chosen: Any = SingleDeviceStrategy(torch.device("cpu"))
    devices, replicas, rank = 1, 1, 0
    module = make(**model)
    if strategy is not None:
        devices = dist.get_world_size()
        chosen = OverlapStrategy(**strategy, cluster_environment=TorchElasticEnvironment(), process_group_backend="gloo")
        mesh = ParallelMesh(chosen.config.degrees(devices), dist.get_rank())
        replicas, rank = mesh.size("samples"), mesh.index("samples")
    everything: Any = samples(**data)
    sampler: DistributedSampler[Any] = DistributedSampler(everything, replicas, rank, shuffle=False)
    loader = DataLoader(everything, batch_size=BATCH // replicas, sampler=sampler, collate_fn=collate)
    length = {"max_steps": 5, "limit_val_batches": 1, "num_sanity_val_steps": 0, "val_check_interval": 2}
    length["use_distributed_sampler"] = False  # it shuffles
    losses = Losses()
    environment = {"accelerator": "cpu", "devices": devices, "strategy": chosen, "callbacks": [losses, *callbacks]}
    run = Trainer(**{**environment, **QUIET, **length, **trainer})  # type: ignore[arg-type]
    run.fit(module, loader, loader, ckpt_path=resume)
    if save is not None:
        run.save_checkpoint(save)
    told = {
        "losses": losses.values,
        "weights": {name: p.detach().clone() for name, p in module.named_parameters()},
        "val_loss": float(run.callback_metrics["val_loss"]),
        "plan": " ".join(chosen.plan.explain().split()) if strategy is not None else "",
    }
    if once:
        REFERENCES[key] = told, (model, data, trainer)
    return told


def compare(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """Losses, validation loss and weights are those expected."""
    torch.testing.assert_close(found["losses"], expected["losses"], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found["val_loss"], expected["val_loss"], rtol=tolerance, atol=tolerance)
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
