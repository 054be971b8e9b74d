"""A model whose blocks sleep in place of computing, which takes no core: a pipeline of more ranks than cores can be measured."""

import time
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader


class Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: float, backward: float) -> Tensor:
        ctx.backward = backward
        time.sleep(forward)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        time.sleep(ctx.backward)
        return gradient, None, None


class Block(nn.Module):
    """Sleeps for ``forward`` and ``backward`` seconds."""

    def __init__(self, forward: float, backward: float) -> None:
        super().__init__()
        self.seconds = forward, backward
        self.scale = nn.Parameter(torch.ones(1))  # something to be trained

    def forward(self, x: Tensor) -> Tensor:
        return Sleep.apply(x, *self.seconds) + x * self.scale


class SleepingModel(LightningModule):
    """``blocks`` of them; hidden states are 256 x ``width`` a sample."""

    def __init__(self, blocks: int = 8, width: int = 384, forward_ms: float = 20, backward_ms: float = 40) -> None:
        super().__init__()
        self.tokens = nn.Embedding(64, width)
        self.blocks = nn.ModuleList(Block(forward_ms / 1e3, backward_ms / 1e3) for _ in range(blocks))

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        x = self.tokens(batch)
        for block in self.blocks:
            x = block(x)
        return x.square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-3)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(torch.randint(0, 64, (4000, 256)), batch_size=8)  # type: ignore[arg-type]
