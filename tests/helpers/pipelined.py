"""A small model under pipeline parallelism, and the same in one process."""

import itertools
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torchmetrics
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler

from lightning_overlap import ConfigError, DataParallel, OverlapStrategy, PipelineParallel
from lightning_overlap.ranks.announcements import TransferError

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


class Block(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.dropout(self.down(F.gelu(self.up(self.norm(x)))))


class Net(LightningModule):
    """Embedding, blocks, norm and head; logs a loss and a metric; ``checkpoint`` recomputes blocks in backward."""

    def __init__(
        self, blocks: int = 12, tied: bool = False, dropout: float = 0.0, checkpoint: bool = False, optimizer: str = "adamw"
    ) -> None:
        super().__init__()
        self.checkpoint = checkpoint
        self.optimizer = optimizer
        self.tokens = nn.Embedding(32, 16)
        self.blocks = nn.ModuleList(Block(16, dropout) for _ in range(blocks))
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 32, bias=False)
        if tied:
            self.head.weight = self.tokens.weight
        self.seen = torchmetrics.MeanMetric()
        self.val_seen = torchmetrics.MeanMetric()
        self.outputs: list[float] = []
        self.at_epoch_end: list[float] = []

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids)
        for block in self.blocks:
            x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False) if self.checkpoint else block(x)
        return self.head(self.norm(x))

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self(batch[:, :-1]).flatten(0, 1).float(), batch[:, 1:].flatten())

    def training_step(self, batch: torch.Tensor, index: int) -> Any:
        loss = self.loss(batch)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.seen(loss.detach())
        self.log("seen", self.seen, on_step=False, on_epoch=True)
        if index % 2:
            self.log("odd", 2 * loss)
        return {"loss": loss, "twice": 2 * loss.detach()}

    def on_train_batch_end(self, outputs: Any, batch: Any, index: int) -> None:
        self.outputs.append(float(outputs["twice"]))

    def on_train_epoch_end(self) -> None:
        self.at_epoch_end.append(float(self.seen.compute()))

    def validation_step(self, batch: torch.Tensor, index: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)
        self.val_seen.update(self(batch).float().mean())
        self.log("val_seen", self.val_seen)

    def configure_optimizers(self) -> Any:
        sgd = self.optimizer == "sgd"
        optimizer = torch.optim.SGD(self.parameters(), 0.1, momentum=0.9) if sgd else torch.optim.AdamW(self.parameters(), 1e-2)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.9), "interval": "step"}]


def loader(batch: int, samples: int = 40) -> DataLoader:
    data = torch.randint(0, 32, (samples, 9), generator=torch.Generator().manual_seed(3))
    return DataLoader(data, batch_size=batch)  # type: ignore[arg-type]


def told(trainer: Trainer, module: Net) -> dict[str, Any]:
    return {
        "weights": torch.cat([p.detach().flatten() for p in module.parameters()]),
        "metrics": {key: float(value) for key, value in trainer.callback_metrics.items()},
        "outputs": module.outputs,
        "at_epoch_end": module.at_epoch_end,
        "step": trainer.global_step,
    }


def pipelined(
    pipeline: dict[str, Any],
    model: dict[str, Any] | None = None,
    overlap: str = "auto",
    resume: str | None = None,
    proof: bool = True,
    **trainer: Any,
) -> dict[str, Any]:
    """One rank's fit."""
    warnings.simplefilter("ignore")
    seed_everything(1 + dist.get_rank(), verbose=False)  # rank 0's weights count
    module = Net(**(model or {}))
    size = dist.get_world_size()
    strategy = OverlapStrategy(
        DataParallel(bucket_size=1000),
        pipeline_parallel=PipelineParallel(**pipeline),
        overlap=overlap,  # type: ignore[arg-type]
        verify_first_step="auto" if proof else False,
        cluster_environment=TorchElasticEnvironment(),
        process_group_backend="gloo",
        **trainer.pop("strategy_kwargs", {}),
    )
    replicas = size // pipeline["size"]
    given = {"max_epochs": 2, "limit_train_batches": 3, "limit_val_batches": 2, "use_distributed_sampler": False}
    save = trainer.pop("save", None)
    run = Trainer(**{**QUIET, "accelerator": "cpu", "devices": size, "strategy": strategy, **given, **trainer})
    data = loader(8 // replicas)
    if replicas > 1:  # all replicas together see, batch by batch, what one process does
        sampler = DistributedSampler(data.dataset, replicas, dist.get_rank() % replicas, shuffle=False)
        data = DataLoader(data.dataset, batch_size=8 // replicas, sampler=sampler)
    run.fit(module, data, data, ckpt_path=resume)
    if save:
        run.save_checkpoint(save)
    return {**told(run, module), "plan": " ".join(strategy.plan.explain().split())}


def single(model: dict[str, Any] | None = None, resume: str | None = None, **trainer: Any) -> dict[str, Any]:
    """Plain Lightning on the whole batch."""
    warnings.simplefilter("ignore")
    seed_everything(1, verbose=False)
    module = Net(**(model or {}))
    strategy = SingleDeviceStrategy(torch.device("cpu"))
    given = {"max_epochs": 2, "limit_train_batches": 3, "limit_val_batches": 2}
    run = Trainer(**{**QUIET, "accelerator": "cpu", "devices": 1, "strategy": strategy, **given, **trainer})
    run.fit(module, loader(8), loader(8), ckpt_path=resume)
    return told(run, module)


def by_hand(microbatches: int, model: dict[str, Any], epochs: int = 2, accumulate: int = 1) -> torch.Tensor:
    """One process that goes through the same microbatches, with nothing of Lightning or this package."""
    seed_everything(1, verbose=False)
    module = Net(**model)
    (optimizer,), (scheduler,) = module.configure_optimizers()
    for _ in range(epochs):
        for number, batch in enumerate(itertools.islice(loader(8), 3)):
            if number % accumulate == 0:
                optimizer.zero_grad()
            for part in batch.tensor_split(microbatches):
                (module.loss(part) * (len(part) / len(batch) / accumulate)).backward()
            if number % accumulate == accumulate - 1:
                optimizer.step()
                scheduler["scheduler"].step()
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def with_trainer(pipeline, model, overlap, trainer):
    return pipelined(pipeline, model, overlap, **trainer)


def close(one, other, tolerance=2e-5):
    assert one.keys() == other.keys()
    for key in one:
        assert one[key] == pytest.approx(other[key], rel=tolerance, abs=tolerance), key


def refused(kind, pipeline, different=False, validate=0, verify="auto"):
    warnings.simplefilter("ignore")
    env = {"cluster_environment": TorchElasticEnvironment(), "process_group_backend": "gloo"}
    try:
        seed_everything(1, verbose=False)
        strategy = OverlapStrategy(pipeline_parallel=PipelineParallel(**pipeline), verify_first_step=verify, **env)
        given = {
            "devices": dist.get_world_size(),
            "strategy": strategy,
            "use_distributed_sampler": False,
            "limit_val_batches": validate,
        }
        own = torch.Generator().manual_seed(dist.get_rank())  # torch's common one is the first rank's
        data = DataLoader(loader(8).dataset, batch_size=8, shuffle=different, generator=own)
        Trainer(**QUIET, accelerator="cpu", max_steps=5, val_check_interval=2, **given).fit(kind(), data, data)
    except (ConfigError, TransferError, ZeroDivisionError) as error:
        return f"{type(error).__name__}: {error}"
    return "trained"
