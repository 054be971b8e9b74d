"""An own model with roles: ``python -m examples.train_own_model`` trains it on two processes of the CPU, sharded over both."""

from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_overlap import OverlapStrategy


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class Regressor(LightningModule):
    # The ends of layers' names, with their roles: a rank has half of the hidden features of each mlp.
    parallel_plan: ClassVar = {"mlp.0": "column", "mlp.2": "row"}

    def __init__(self, width: int = 32, depth: int = 4) -> None:
        super().__init__()
        self.first = nn.Linear(8, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.last = nn.Linear(width, 1)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        loss = F.mse_loss(self.last(self.blocks(self.first(batch[0]))), batch[1])
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def train_dataloader(self) -> DataLoader[Any]:
        x = torch.rand(4096, 8, generator=torch.Generator().manual_seed(1))
        return DataLoader(TensorDataset(x, x.sin().sum(1, keepdim=True)), batch_size=64)


if __name__ == "__main__":
    Trainer(strategy=OverlapStrategy(tensor_parallel=2), devices=2, accelerator="cpu", max_epochs=2).fit(Regressor())
