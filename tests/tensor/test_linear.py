"""Cut linear layers against whole ones: values and gradients, in real worlds."""

import itertools
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_overlap.modes.tensor.gemm import Exchange, shares
from lightning_overlap.modes.tensor.linear import prepare, read, row_product
from tests.tensor.group import tensor_group


class Region(nn.Module):
    """Two column linears, something beside them that reads the same input, and a row linear."""

    def __init__(self, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k = nn.Linear(8, 12, bias=bias, dtype=dtype), nn.Linear(8, 12, bias=bias, dtype=dtype)
        self.out = nn.Linear(12, 8, bias=bias, dtype=dtype)

    def forward(self, x: Tensor, beside: bool) -> Tensor:
        y = self.q(x).sin() * self.k(x)
        return self.out(y * (1 + x.mean(-1, keepdim=True)) if beside else y)

    def cut(self, rank: int, size: int) -> None:
        mine = slice(*shares(12, size)[rank : rank + 2])
        for layer in (self.q, self.k):
            layer.weight.data = layer.weight.data[mine].clone()
            if layer.bias is not None:
                layer.bias.data = layer.bias.data[mine].clone()
        self.out.weight.data = self.out.weight.data[:, mine].clone()


def against_whole(settings: dict[str, Any], tokens: int, leading: tuple[int, ...], bias: bool, dtype: str, beside: bool) -> float:
    """The largest difference, of output, the input's gradient and every parameter's, to the uncut region."""
    group = tensor_group(dist.get_world_size())
    exchange = Exchange(group, **settings)
    kind = getattr(torch, dtype)
    whole, cut = Region(bias, kind), Region(bias, kind)
    cut.cut(group.rank, group.size)
    cut.out.forward = partial(row_product, layer=cut.out, exchange=exchange, name="region")  # type: ignore[method-assign]
    x = torch.randn(*leading, tokens, 8, dtype=kind, generator=torch.Generator().manual_seed(1))
    weights = torch.randn(*leading, tokens, 8, dtype=kind, generator=torch.Generator().manual_seed(2))
    a, b = exchange.parts(tokens)[exchange.own : exchange.own + 2]
    mine = slice(*shares(12, group.size)[group.rank : group.rank + 2])

    expected_in = x.clone().requires_grad_()
    expected = whole(expected_in * 1, beside)
    (expected * weights).sum().backward()
    own = x[..., a:b, :].clone().requires_grad_()
    handle = read(own * 1, [cut.q, cut.k], prepare([cut.q, cut.k], exchange, "region"), tokens)
    assert handle.shape == x.shape
    found = cut(handle, beside)
    (found * weights[..., a:b, :]).sum().backward()

    assert own.grad is not None
    assert expected_in.grad is not None
    pairs = [(found, expected[..., a:b, :]), (own.grad, expected_in.grad[..., a:b, :])]
    pairs += [(p.grad, w.grad[mine]) for p, w in zip(_params(cut.q, cut.k), _params(whole.q, whole.k), strict=True)]
    pairs += [(cut.out.weight.grad, whole.out.weight.grad[:, mine])]  # type: ignore[index]
    if bias:
        of_bias = cut.out.bias.grad
        if exchange.scattered:
            of_bias = group.all_reduce(of_bias.clone(), label="tensor.test").wait()
        pairs += [(of_bias, whole.out.bias.grad)]
    assert all(p.shape == q.shape for p, q in pairs)
    return max((p.double() - q.double()).abs().max().item() if p.numel() else 0.0 for p, q in pairs)


def _params(*layers: nn.Module) -> list[Any]:
    return list(itertools.chain.from_iterable(layer.parameters() for layer in layers))


@pytest.mark.parametrize("scattered", [True, False])
@pytest.mark.parametrize("size", [2, 4])
def test_a_cut_region_is_the_whole_one(world: Any, size: int, scattered: bool) -> None:
    ways = [{}, {"overlapped": False}, {"splits": 3}, {"splits": 2, "keep_gathered": True}]
    shapes: list[tuple[int, tuple[int, ...]]] = [(8, (1,)), (7, (2,)), (9, ()), (1, (3,)), (5, (2, 2))]
    for way, (tokens, leading), bias, beside in itertools.product(ways, shapes, [True, False], [True, False]):
        settings = {"scattered": scattered, **way}
        differences = world(size).run(against_whole, settings, tokens, leading, bias, "float64", beside)
        assert max(differences) < 1e-11, (settings, tokens, leading, bias, beside)


@pytest.mark.parametrize(("dtype", "close"), [("float32", 1e-5), ("bfloat16", 0.3)])
def test_in_lower_precision(world: Any, dtype: str, close: float) -> None:
    for overlapped in (True, False):
        settings = {"scattered": True, "overlapped": overlapped}
        assert max(world(2).run(against_whole, settings, 6, (2,), True, dtype, False)) < close


def transfers(settings: dict[str, Any], beside: bool) -> list[str]:
    group = tensor_group(dist.get_world_size())
    group.log = []
    try:
        against_whole(settings, 8, (1,), False, "float32", beside)
        return [transfer.label.removeprefix("tensor.").removesuffix("[region]") for transfer in group.log]
    finally:
        group.log = None


def test_what_is_transferred_and_in_which_order(world: Any) -> None:
    forward, backward = ["input", "output"], ["output_grad", "input", "input_grad"]
    assert world(2).run(transfers, {"scattered": True}, False)[0] == forward + backward  # one gather for both columns
    assert world(2).run(transfers, {"scattered": True, "keep_gathered": True}, False)[0] == [*forward, "output_grad", "input_grad"]
    assert world(2).run(transfers, {"scattered": False}, False)[0] == ["output", "input_grad"]
