"""Models that more than one test trains."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler


class Attention(nn.Module):
    """Attention of ``heads`` heads, with q, k and v in one layer. It is causal, unless ``causal`` is set to False."""

    causal = True

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.attention, self.mlp = Attention(width, heads), MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


class Transformer(LightningModule):
    """A decoder that every mode can cut.

    Args:
        blocks: their number.
        width: features of a token.
        tied: embedding and head have one weight.
    """

    parallel_plan: ClassVar[dict[str, str]] = {
        "blocks": "blocks",
        "attention.qkv": "column[3]",
        "attention.proj": "row",
        "mlp.up": "column",
        "mlp.down": "row",
        "embedding": "vocab_embedding",
        "head": "vocab_head",
    }
    vocabulary = 64

    def __init__(self, blocks: int = 4, width: int = 32, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(self.vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, 4) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, self.vocabulary, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def loss(self, ids: Tensor) -> Tensor:
        """Of the next token, as a mean over tokens. ``ids``: (samples, tokens), int64."""
        x = self.embedding(ids[:, :-1])
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), ids[:, 1:].flatten())

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss, sync_dist=True)
        return loss

    def validation_step(self, batch: Tensor, index: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def configure_optimizers(self) -> Any:
        # Not Adam: it hides a gradient of a wrong size, and makes a whole step of the rounding of one that is zero.
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


def token_loader(batch_size: int, rank: int = 0, num_replicas: int = 1) -> DataLoader[Any]:
    """64 samples of 17 tokens, in one order.

    Args:
        batch_size: of this rank's batches.
        rank: of this rank among those that see different samples.
        num_replicas: how many these are. Their batches together are the batch of one of them alone.
    """
    tokens: Any = torch.randint(0, Transformer.vocabulary, (64, 17), generator=torch.Generator().manual_seed(3))
    sampler: DistributedSampler[Any] = DistributedSampler(tokens, num_replicas, rank, shuffle=False)
    return DataLoader(tokens, batch_size=batch_size, sampler=sampler)
