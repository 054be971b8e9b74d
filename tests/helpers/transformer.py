"""A transformer block whose layers tensor parallelism can shard."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Causal attention with heads of 4 features, and a norm of each query's head if ``norm_queries``."""

    def __init__(self, width: int, bias: bool = True, norm_queries: bool = False) -> None:
        super().__init__()
        self.head_dim = 4
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=bias), nn.Linear(width, width, bias=bias)
        self.query_norm = nn.LayerNorm(self.head_dim) if norm_queries else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(self.query_norm(q), k, v, is_causal=True).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and mlp, each after a norm, with residuals."""

    def __init__(self, width: int, attention: Callable[[], nn.Module], mlp: Callable[[], nn.Module], dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.mlp = attention(), mlp()
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.mlp(self.norm2(x)))
