"""Tensor and sequence parallelism through Trainer: the numbers of one process, and what Lightning's users rely on."""

import warnings
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_overlap import OverlapStrategy, TensorParallel

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


class Attention(nn.Module):
    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.head_dim = 4
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=bias), nn.Linear(width, width, bias=bias)
        self.query_norm = nn.LayerNorm(self.head_dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(self.query_norm(q), k, v, is_causal=True).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, 4 * width, bias=bias), nn.Linear(width, 4 * width, bias=bias)
        self.down = nn.Linear(4 * width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, width: int, bias: bool, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.mlp = Attention(width, bias), MLP(width, bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.mlp(self.norm2(x)))


class Net(LightningModule):
    parallel_plan: ClassVar = {
        "attention.qkv": "column[3]",
        "attention.out": "row",
        "mlp.gate": "column",
        "mlp.up": "column",
        "mlp.down": "row",
    }

    def __init__(
        self,
        bias: bool = True,
        dropout: float = 0.0,
        tied: bool = False,
        recompute: bool | None = None,
        tokens: int = 9,
        optimizer: str = "sgd",
    ) -> None:
        super().__init__()
        self.recompute, self.length, self.optimizer = recompute, tokens, optimizer
        self.embedding = nn.Embedding(32, 16)
        self.blocks = nn.ModuleList(Block(16, bias, dropout) for _ in range(3))
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 32, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        self.losses: list[float] = []
        self.masks: list[Any] = []

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x) if self.recompute is None else checkpoint(block, x, use_reentrant=self.recompute)
        return self.head(self.norm(x))

    def loss(self, batch: Tensor) -> Tensor:
        return F.cross_entropy(self(batch[:, :-1]).flatten(0, 1).float(), batch[:, 1:].flatten())

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Tensor, index: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def configure_optimizers(self) -> Any:
        if self.optimizer == "adamw":
            return torch.optim.AdamW(self.parameters(), 1e-3)
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)

    def loader(self) -> DataLoader:
        data = torch.randint(0, 32, (40, self.length + 1), generator=torch.Generator().manual_seed(3))
        return DataLoader(data, batch_size=self.per_rank)  # type: ignore[arg-type]

    train_dataloader = val_dataloader = loader
    per_rank = 4


def train(
    strategy: dict[str, Any] | None, model: dict[str, Any], resume: str | None = None, save: str | None = None, **trainer: Any
) -> Any:
    """Trains as one rank of the world, or alone."""
    warnings.simplefilter("ignore")
    seed_everything(5, verbose=False)
    chosen: Any = SingleDeviceStrategy(torch.device("cpu"))
    devices = 1
    module = Net(**model)
    if strategy is not None:
        devices = dist.get_world_size()
        env = {"cluster_environment": TorchElasticEnvironment(), "process_group_backend": "gloo"}
        chosen = OverlapStrategy(**strategy, **env)
        module.per_rank = 4 // chosen.config.degrees(devices).dp
    length = {"max_steps": 5, "limit_val_batches": 1, "num_sanity_val_steps": 0, "val_check_interval": 2}
    length["use_distributed_sampler"] = False  # it shuffles
    run = Trainer(**{"accelerator": "cpu", "devices": devices, "strategy": chosen, **QUIET, **length, **trainer})  # type: ignore[arg-type]
    run.fit(module, ckpt_path=resume)
    if save is not None:
        run.save_checkpoint(save)
    return {
        "losses": module.losses,
        "weights": {name: p.detach().clone() for name, p in module.named_parameters()},
        "val_loss": float(run.callback_metrics["val_loss"]),
        "plan": chosen.plan.explain() if strategy is not None else "",
    }


def compare(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found["losses"], expected["losses"], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found["val_loss"], expected["val_loss"], rtol=tolerance, atol=tolerance)
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "even length": ({"tokens": 8}, {}),
    "no bias, tied": ({"bias": False, "tied": True}, {}),
    "one token": ({"tokens": 1}, {}),
    "accumulation and clipping": ({}, {"accumulate_grad_batches": 3, "gradient_clip_val": 0.1}),
    "recomputed": ({"recompute": False}, {}),
    "recomputed, reentrant": ({"recompute": True}, {}),
}


@pytest.mark.parametrize("sequence", [True, False])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_close_to_one_process(world: Any, case: str, size: int, sequence: bool) -> None:
    model, trainer = CASES[case]
    expected = train(None, model, **trainer)
    strategy = {"tensor_parallel": TensorParallel(size=size, sequence_parallel=sequence)}
    found = world(size).run(train_with, strategy, model, trainer)
    for rank in range(size):
        compare(found[rank], expected)
    assert f"tensor {size}" in found[0]["plan"]


def train_with(strategy: dict[str, Any], model: dict[str, Any], trainer: dict[str, Any]) -> Any:
    return train(strategy, model, **trainer)
