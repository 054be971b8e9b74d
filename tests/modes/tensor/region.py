"""A region with sharded layers and its unsharded twin: the model of the tests of every backend."""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_overlap.modes.tensor.gemm import Exchange
from lightning_overlap.state.pieces import shares


class Region(nn.Module):
    """Two column layers, a direct reader of the same input, and a row layer."""

    def __init__(self, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k = nn.Linear(8, 12, bias=bias, dtype=dtype), nn.Linear(8, 12, bias=bias, dtype=dtype)
        self.out = nn.Linear(12, 8, bias=bias, dtype=dtype)

    def forward(self, x: Tensor, direct: bool) -> Tensor:
        y = self.q(x).sin() * self.k(x)
        return self.out(y * (1 + x.mean(-1, keepdim=True)) if direct else y)

    def shard(self, rank: int, size: int) -> None:
        local = slice(*shares(12, size)[rank : rank + 2])
        for layer in (self.q, self.k):
            layer.weight.data = layer.weight.data[local].clone()
            if layer.bias is not None:
                layer.bias.data = layer.bias.data[local].clone()
        self.out.weight.data = self.out.weight.data[:, local].clone()


Connect = Callable[[Region, int], Callable[[Tensor], Tensor]]
"""Sets the forward of a sharded region's row layer, for a number of tokens. Returns the function that gathers the region's input."""


def result_pairs(
    exchange: Exchange, connect: Connect, tokens: int, leading: tuple[int, ...], bias: bool, dtype: str, direct: bool
) -> list[tuple[Tensor, Tensor]]:
    """Results of a sharded region and this rank's part of its twin's: the output, and the gradients of input and parameters."""
    group, kind = exchange.group, getattr(torch, dtype)
    twin, sharded = Region(bias, kind), Region(bias, kind)
    sharded.shard(group.rank, group.size)
    x = torch.randn(*leading, tokens, 8, dtype=kind, generator=torch.Generator().manual_seed(1))
    weights = torch.randn(*leading, tokens, 8, dtype=kind, generator=torch.Generator().manual_seed(2))
    a, b = exchange.bounds(tokens)[exchange.part_index : exchange.part_index + 2]
    local = slice(*shares(12, group.size)[group.rank : group.rank + 2])
    complete, part = x.clone().requires_grad_(), x[..., a:b, :].clone().requires_grad_()

    expected = twin(complete * 1, direct)
    (expected * weights).sum().backward()
    gathered = connect(sharded, tokens)(part * 1)
    assert gathered.shape == x.shape
    output = sharded(gathered, direct)
    (output * weights[..., a:b, :]).sum().backward()

    pairs: list[tuple[Any, Any]] = [(output, expected[..., a:b, :]), (part.grad, complete.grad[..., a:b, :])]  # type: ignore[index]
    for name in "qk":
        layers = (getattr(region, name).parameters() for region in (sharded, twin))
        pairs += [(p.grad, q.grad[local]) for p, q in zip(*layers, strict=True)]
    pairs += [(sharded.out.weight.grad, twin.out.weight.grad[:, local])]  # type: ignore[index]
    if bias:
        grad: Any = sharded.out.bias.grad
        total = group.all_reduce(grad.clone(), label="tensor.test").wait() if exchange.sharded else grad
        pairs += [(total, twin.out.bias.grad)]
    assert all(p.shape == q.shape for p, q in pairs)
    return pairs


def different_cases(exchange: Exchange, connect: Connect, dtype: str) -> list[Any]:
    """Cases in which a result of a fused backend differs from its twin's, and the result's number."""
    close, cases = 1e-11 if dtype == "float64" else 0.3, []
    for case in itertools.product([4, 8], [(), (3,), (2, 2)], [True, False], [True, False]):
        tokens, leading, bias, direct = case
        pairs = result_pairs(exchange, connect, tokens, leading, bias, dtype, direct)
        cases += [(case, n) for n, (p, q) in enumerate(pairs) if not torch.allclose(p, q, rtol=0, atol=close)]
    return cases
