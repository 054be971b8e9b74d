"""A small model with every awkwardness, trained through Trainer inside a world's workers."""

import hashlib
import tempfile
import warnings
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader

from lightning_overlap import DataParallel, OverlapStrategy


class Net(LightningModule):
    """Tied weights, a frozen parameter, one that is never used, one used in every other step, attention that reads a
    child's weight without calling it, and two groups with and without decay."""

    def __init__(self, optimizer: str = "adamw") -> None:
        super().__init__()
        self.optimizer = optimizer
        self.embedding = nn.Embedding(32, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.sometimes = nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)
        self.unused = nn.Linear(4, 4)
        self.frozen = nn.Parameter(torch.ones(16), requires_grad=False)
        self.head = nn.Linear(16, 32, bias=False)
        self.head.weight = self.embedding.weight
        self.losses: list[float] = []

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        x = self.embedding(batch[:, :-1])
        x = x + self.attention(x, x, x, need_weights=False)[0] * self.frozen
        if index % 2:
            x = self.sometimes(x)
        x = x + self.down(self.up(self.norm(x)).relu())
        loss = nn.functional.cross_entropy(self.head(x).flatten(0, 1).float(), batch[:, 1:].flatten())
        self.log("loss", loss)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val_loss", self.head(self.embedding(batch)).float().square().mean(), sync_dist=True)

    def configure_optimizers(self) -> Any:
        decay = [p for n, p in self.named_parameters() if p.dim() >= 2 and not n.startswith("frozen")]
        rest = [p for n, p in self.named_parameters() if p.dim() < 2 and p.requires_grad]
        groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
        made: torch.optim.Optimizer
        if self.optimizer == "sgd":
            made = torch.optim.SGD(groups, 0.1, momentum=0.9)
        elif self.optimizer == "adafactor":
            made = torch.optim.Adafactor(groups, 1e-2)
        else:
            made = torch.optim.AdamW(groups, 1e-2)
        schedule = torch.optim.lr_scheduler.StepLR(made, 2, 0.9)
        return [made], [{"scheduler": schedule, "interval": "step"}]

    def loader(self) -> DataLoader:
        data = torch.randint(0, 32, (96, 9), generator=torch.Generator().manual_seed(3))
        # One batch over all ranks is the same whatever their number.
        return DataLoader(data, batch_size=8 // dist.get_world_size())  # type: ignore[arg-type]

    train_dataloader = val_dataloader = loader


class Plain(Net):
    """All parameters are used in each step, so that DDP, which skips what nobody used, has the same to do."""

    def __init__(self, optimizer: str = "adamw") -> None:
        super().__init__(optimizer)
        del self.unused
        self.sometimes = nn.Identity()  # type: ignore[assignment]


def strategy(name: str, data: dict[str, Any], overlap: str, kwargs: dict[str, Any]) -> Any:
    kwargs = {"cluster_environment": TorchElasticEnvironment(), "process_group_backend": "gloo", **kwargs}
    if name == "ddp":
        return DDPStrategy(find_unused_parameters=True, **kwargs)
    return OverlapStrategy(DataParallel(**{"bucket_size": 500, **data}), overlap=overlap, **kwargs)  # type: ignore[arg-type]


def train(
    name: str = "overlap",
    data: dict[str, Any] | None = None,
    overlap: str = "auto",
    optimizer: str = "adamw",
    resume: str | None = None,
    save: str | None = None,
    module: type[Net] = Net,
    strategy_kwargs: dict[str, Any] | None = None,
    made: list[Trainer] | None = None,
    **trainer: Any,
) -> dict[str, Any]:
    """Trains in this process as one rank of the world, and tells how it went."""
    warnings.simplefilter("ignore")
    size = dist.get_world_size()
    # Ranks start with different weights and seeds; rank 0's count. (DDP's samplers would draw overlapping shares.)
    seed_everything(5 if name == "ddp" else 5 + dist.get_rank(), verbose=False)
    model = module(optimizer)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    length = {"max_steps": 6, "limit_val_batches": 2, "default_root_dir": tempfile.gettempdir()}
    plan = strategy(name, data or {}, overlap, strategy_kwargs or {})
    run = Trainer(**{"accelerator": "cpu", "devices": size, "strategy": plan, **quiet, **length, **trainer})  # type: ignore[arg-type]
    if made is not None:
        made.append(run)
    run.fit(model, ckpt_path=resume)
    real = [torch.view_as_real(p.detach()) if p.is_complex() else p.detach() for p in model.parameters()]
    weights = torch.cat([p.flatten().float() for p in real])
    return {
        "losses": model.losses,
        "weights": weights.tolist(),
        "hash": hashlib.sha256(weights.numpy().tobytes()).hexdigest(),
        "metrics": {key: float(value) for key, value in run.callback_metrics.items()},
        "keys": list(model.state_dict()),
        "plan": " ".join(run.strategy.plan.explain().split()) if name == "overlap" else "",
        "step": run.global_step,
        "types": sorted({type(module._parameters).__name__ for module in model.modules()}),
    }
