"""A GPT of one's own, and what people change in it: parts that other models of the zoo are made of."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.zoo.case import TOKENS, VOCABULARY, WIDTH, Task

HEADS, BLOCKS = 4, 4


class Attention(nn.Module):
    """Causal self-attention that reads the number of heads from its input, as a cut one must."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.head_dim = WIDTH // HEADS
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH, bias=bias) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH, bias=bias)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (layer(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.scaled_dot_product_attention(*self.heads(x), is_causal=True).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """Norms first. ``number`` is the block's in the list."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention, self.mlp = Attention(), MLP()

    def forward(self, x: Tensor) -> Any:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GPT(Task):
    """Embedding, positions, blocks, norm and head."""

    block: type[nn.Module] = Block
    parallel_plan: ClassVar[dict[str, str]] = {
        "attention.query": "column",
        "attention.key": "column",
        "attention.value": "column",
        "attention.out": "row",
        "mlp.up": "column",
        "mlp.down": "row",
        "embedding": "vocab_embedding",
        "head": "vocab_head",
    }

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Parameter(0.02 * torch.randn(TOKENS, WIDTH))
        self.blocks = nn.ModuleList(self.block(number) for number in range(BLOCKS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)

    def embed(self, ids: Tensor) -> Tensor:
        return self.embedding(ids) + self.positions[: ids.shape[1]]

    def run_blocks(self, x: Tensor) -> Any:
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.run_blocks(self.embed(ids))))

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


class Tied(GPT):
    def __init__(self) -> None:
        super().__init__()
        self.head.weight = self.embedding.weight


class FusedAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head_dim = WIDTH // HEADS
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class FusedBlock(Block):
    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.attention = FusedAttention()  # type: ignore[assignment]


class Fused(GPT):
    block = FusedBlock
    parallel_plan: ClassVar[dict[str, str]] = {
        "attention.qkv": "column[3]",
        "attention.out": "row",
        "mlp.up": "column",
        "mlp.down": "row",
        "embedding": "vocab_embedding",
        "head": "vocab_head",
    }


class GroupedAttention(Attention):
    """Two heads of keys and values for four of queries."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.value = nn.Linear(WIDTH, WIDTH // 2), nn.Linear(WIDTH, WIDTH // 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        k, v = (each.repeat_interleave(2, dim=1) for each in (k, v))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class GroupedBlock(Block):
    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.attention = GroupedAttention()


class Grouped(GPT):
    block = GroupedBlock


class RotaryAttention(Attention):
    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().heads(x)
        half = self.head_dim // 2
        angles = torch.arange(q.shape[2])[:, None] * 10000.0 ** (-torch.arange(half) / half)
        cos, sin = torch.cat([angles.cos()] * 2, -1), torch.cat([angles.sin()] * 2, -1)

        def turn(y: Tensor) -> Tensor:
            return y * cos + torch.cat([-y[..., half:], y[..., :half]], -1) * sin

        return turn(q), turn(k), v


class RotaryBlock(Block):
    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.attention = RotaryAttention()


class Rotary(GPT):
    block = RotaryBlock


class AlibiAttention(Attention):
    """Slopes by the number of heads that it has been told."""

    def __init__(self) -> None:
        super().__init__()
        self.n_head = HEADS

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        slopes = 2.0 ** (-8 * torch.arange(1, self.n_head + 1) / self.n_head)
        places = torch.arange(q.shape[2])
        far = (places[None] - places[:, None]).float()
        bias = (slopes[:, None, None] * far).masked_fill(far > 0, float("-inf"))
        return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2))


class AlibiBlock(Block):
    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.attention = AlibiAttention()


class Alibi(GPT):
    block = AlibiBlock


class NoRoles(GPT):
    """Tells nobody how its layers are to be cut."""

    parallel_plan = None  # type: ignore[assignment]
