"""Attention over sharded tokens against unsharded attention: outputs and all gradients, every method and mask."""

from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_overlap.modes.context import attention
from lightning_overlap.modes.context.attention import ContextAttention
from lightning_overlap.modes.context.layout import TokenLayout
from lightning_overlap.modes.context.mask import Mask
from tests.helpers.rank_threads import on_ranks
from tests.modes.context.masks import NAMES, mask_of
from tests.modes.context.whole import inputs, whole_attention


def sharded(
    group: Any, attention: ContextAttention, tensors: list[Tensor], mask: Mask, layout: TokenLayout, **how: Any
) -> list[Tensor]:
    """This rank's output and gradients of ``q``, ``k``, ``v`` and ``sinks``."""
    q, k, v, grad = (x[:, :, layout.positions(group.rank)] for x in tensors)
    variables = [x.clone().requires_grad_() for x in (q, k, v)]
    if how.get("sinks") is not None:
        how["sinks"] = how["sinks"].clone().requires_grad_()
        variables.append(how["sinks"])
    output = attention(*variables[:3], mask, layout, **how)
    output.backward(grad)
    return [output.detach(), *(x.grad for x in variables)]


def both_ways(group: Any, method: dict[str, Any], *arguments: Any, **how: Any) -> list[Tensor]:
    """As :func:`sharded`, overlapped; its plain twin gives the same bits."""
    overlapped = sharded(group, ContextAttention(group, **method), *arguments, **how)
    plain = sharded(group, ContextAttention(group, **method, overlapped=False), *arguments, **how)
    assert all(map(torch.equal, overlapped, plain))
    return overlapped


def whole_of(parts: list[list[Tensor]], layout: TokenLayout) -> list[Tensor]:
    """Results of all ranks, put together: tokens at their positions, gradients of sinks summed."""
    order = torch.cat([layout.positions(rank) for rank in range(layout.size)]).argsort()
    return [torch.cat(each, 2)[:, :, order] if each[0].ndim == 4 else torch.stack(each).sum(0) for each in zip(*parts, strict=True)]


def compare(
    size: int,
    method: dict[str, Any],
    name: str = "causal",
    *,
    tokens: int = 29,
    heads: tuple[int, int] = (4, 2),
    layout: str = "balanced",
    dtype: torch.dtype = torch.float64,
    **how: Any,
) -> None:
    mask = mask_of(name, tokens, heads[0], dtype)
    made = TokenLayout.by_area(mask, size) if layout == "area" else getattr(TokenLayout, layout)(tokens, size)
    tensors = inputs(tokens, *heads, dtype)
    expected = whole_attention(*(x.double() for x in tensors), mask, **how)
    computed = whole_of(on_ranks(size, partial(both_ways, **how), method, tensors, mask, made), made)
    close = {"rtol": 1e-11, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    for x, y in zip(computed, expected, strict=True):
        assert x.dtype == dtype
        torch.testing.assert_close(x.double(), y, **close)


PIECES = [{"method": method, "pieces": pieces} for method in ("p2p", "all_gather") for pieces in (1, 8)]
METHODS = [*PIECES, {"method": "a2a"}]
HIERARCHICAL = [{"method": "a2a+p2p", "hierarchical_sizes": sizes} for sizes in ((2, 2), (4, 1), (1, 4))]


HEADS = {2: (4, 2), 3: (6, 2), 4: (4, 2)}
"""Query and key/value heads by size; at 4 there are fewer of the latter than ranks."""


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_every_mask(method: dict[str, Any], size: int, name: str) -> None:
    compare(size, method, name, heads=HEADS[size])


@pytest.mark.parametrize("layout", ["contiguous", "area"])
@pytest.mark.parametrize("name", ["causal", "window", "packed"])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_every_layout(method: dict[str, Any], name: str, layout: str) -> None:
    compare(3, method, name, heads=(6, 3), layout=layout)


@pytest.mark.parametrize("tokens", [1, 2, 7, 64])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_every_length(method: dict[str, Any], size: int, tokens: int) -> None:
    """With 1 token, all ranks but one have none."""
    compare(size, method, tokens=tokens)


@pytest.mark.parametrize("heads", [(8, 1), (8, 2), (8, 4), (8, 8), (28, 7), (12, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", [*METHODS, *HIERARCHICAL], ids=str)
def test_grouped_heads(method: dict[str, Any], heads: tuple[int, int], dtype: torch.dtype) -> None:
    compare(4, method, heads=heads, dtype=dtype)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", HIERARCHICAL, ids=str)
def test_heads_inside_and_pieces_outside(method: dict[str, Any], name: str) -> None:
    compare(4, method, name, heads=(8, 4))


@pytest.mark.parametrize("settings", [{}, {"softcap": 2.0}, {"scale": 0.7}], ids=str)
@pytest.mark.parametrize("method", [*METHODS, *HIERARCHICAL], ids=str)
def test_sinks_and_soft_cap(method: dict[str, Any], settings: dict[str, Any]) -> None:
    for name in ("causal", "padding"):
        compare(4, method, name, heads=(8, 4), sinks=torch.linspace(-1, 1, 8, dtype=torch.float64), **settings)


@pytest.mark.parametrize("method", [*METHODS, {"method": "a2a+p2p", "hierarchical_sizes": (4, 2)}], ids=str)
def test_eight_ranks(method: dict[str, Any]) -> None:
    for name in ("causal", "packed", "padding"):
        compare(8, method, name, heads=(8, 4))
    compare(8, method, tokens=7, heads=(8, 2))


def test_bf16_is_as_exact_as_unsharded() -> None:
    mask, layout = mask_of("causal", 256), TokenLayout.balanced(256, 8)
    tensors = [(3 * x).bfloat16() for x in inputs(256, 4, 2, torch.float64, size=16)]
    exact = whole_attention(*(x.double() for x in tensors), mask)
    variables = [x.clone().requires_grad_() for x in tensors[:3]]
    output = F.scaled_dot_product_attention(*variables, is_causal=True, enable_gqa=True)
    output.backward(tensors[3])
    computed = whole_of(on_ranks(8, both_ways, {}, tensors, mask, layout), layout)
    for unsharded, mine, right in zip([output, *(x.grad for x in variables)], computed, exact, strict=True):
        assert (mine - right).norm() <= 1.5 * (unsharded - right).norm()


def dropped(group: Any, method: dict[str, Any], layout: TokenLayout) -> list[Tensor]:
    """Where values are one-hot, the output has the weights; the gradient of values has them too."""
    tokens = layout.tokens
    q, v = torch.zeros(1, 4, tokens, 4, dtype=torch.float64), torch.eye(tokens, dtype=torch.float64).expand(1, 4, tokens, tokens)
    q, k, v = (x[:, :, layout.positions(group.rank)].clone().requires_grad_() for x in (q, q, v))
    weights = ContextAttention(group, **method)(q, k, v, Mask(tokens), layout, dropout=0.5)
    grad = torch.zeros_like(weights)
    grad[..., 0], grad[..., 1] = layout.positions(group.rank) + 1, 1
    weights.backward(grad)
    return [weights.detach(), v.grad]


@pytest.mark.parametrize("method", [*METHODS, *HIERARCHICAL], ids=str)
def test_dropout_is_the_same_in_backward(method: dict[str, Any]) -> None:
    layout = TokenLayout.balanced(16, 4)
    with mock.patch.object(attention.torch, "randint", return_value=torch.tensor(7)):
        weights, of_values = whole_of(on_ranks(4, dropped, method, layout), layout)
        again, _ = whole_of(on_ranks(4, dropped, method, layout), layout)
    assert torch.equal(weights, again)
    assert set((weights * 16).round(decimals=9).unique().tolist()) == {0.0, 2.0}
    assert 0.4 < (weights == 0).double().mean() < 0.6
    kept = (weights[0] > 0).tolist()
    assert len({str(head) for head in kept}) == 4, "heads have masks of their own"
    assert all(len(set(map(str, head))) == 16 for head in kept), "queries have masks of their own"
    # A query's mark, and a count, summed over the queries that have kept the key.
    torch.testing.assert_close(of_values[..., 0], (weights * torch.arange(1, 17).view(-1, 1)).sum(-2))
    torch.testing.assert_close(of_values[..., 1], weights.sum(-2))


def autocast(group: Any, layout: TokenLayout) -> None:
    q, k, v, _ = (x[:, :, layout.positions(group.rank)] for x in inputs(8, 2, 2, torch.float32))
    q.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        output = ContextAttention(group)(q, k, v, Mask(8), layout)
    output.float().sum().backward()
    assert (output.dtype, q.grad.dtype) == (torch.bfloat16, torch.float32)


def test_autocast() -> None:
    on_ranks(2, autocast, TokenLayout.balanced(8, 2))
