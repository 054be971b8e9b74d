"""Attention over sharded tokens against unsharded attention: outputs and all gradients, every method and mask."""

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from lightning_overlap.modes.context import attention
from lightning_overlap.modes.context.attention import ContextAttention
from lightning_overlap.modes.context.kernel import kept
from lightning_overlap.modes.context.layout import TokenLayout
from lightning_overlap.modes.context.mask import Mask
from lightning_overlap.modes.context.options import AttentionOptions
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
    output = attention(*variables[:3], mask, layout, AttentionOptions(**how))
    output.backward(grad)
    return [output.detach(), *(x.grad for x in variables)]


def overlapped(group: Any, method: dict[str, Any], *arguments: Any, **how: Any) -> list[Tensor]:
    """As :func:`sharded`, with a method."""
    return sharded(group, ContextAttention(group, **method), *arguments, **how)


def both_ways(group: Any, method: dict[str, Any], *arguments: Any, **how: Any) -> list[Tensor]:
    """As :func:`sharded`, overlapped; its plain twin, and it itself a second time, give the same bits."""
    results = overlapped(group, method, *arguments, **how)
    for other in (method, {**method, "overlapped": False}):
        assert all(map(torch.equal, results, overlapped(group, other, *arguments, **how)))
    return results


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
    run: Callable[..., list[Tensor]] | None = None,
    **how: Any,
) -> None:
    """Compares all ranks' results with unsharded attention.

    Args:
        size: ranks.
        method: arguments of :class:`ContextAttention`.
        name: of the mask.
        tokens: of the sequence.
        heads: query and key/value heads.
        layout: of the tokens: a method of :class:`TokenLayout`, or ``area``.
        dtype: of all tensors.
        run: what a rank does; :func:`overlapped` unless it is given.
        how: options of the attention.
    """
    mask = mask_of(name, tokens, heads[0], dtype)
    made = TokenLayout.by_area(mask, size) if layout == "area" else getattr(TokenLayout, layout)(tokens, size)
    tensors = inputs(tokens, *heads, dtype)
    dropout, of_whole = how.get("dropout"), {name: setting for name, setting in how.items() if name != "dropout"}
    if dropout:
        positions = torch.arange(tokens)
        of_whole["kept"] = kept(dropout, SEED, 2, range(heads[0]), positions, positions) / (1 - dropout)
    expected = whole_attention(*(x.double() for x in tensors), mask, **of_whole)
    with mock.patch.object(attention.torch, "randint", return_value=torch.tensor(SEED)):
        computed = whole_of(on_ranks(size, partial(run or overlapped, **how), method, tensors, mask, made), made)
    close = {"rtol": 1e-11, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    for x, y in zip(computed, expected, strict=True):
        assert x.dtype == dtype
        torch.testing.assert_close(x.double(), y, **close)


SEED = 7
PIECES = [{"method": method, "pieces": pieces} for method in ("p2p", "all_gather") for pieces in (1, 8)]
METHODS = [*PIECES, {"method": "a2a"}]
HIERARCHICAL = [{"method": "a2a+p2p", "hierarchical_sizes": sizes} for sizes in ((2, 2), (4, 1), (1, 4))]


HEADS = {2: (4, 2), 3: (6, 2), 4: (4, 2)}
"""Query and key/value heads by size; at 4 there are fewer of the latter than ranks."""
SIZES = [(3, method) for method in METHODS] + [(size, method) for size in (2, 4) for method in METHODS[1::3]]
"""All methods on three ranks, p2p and a2a also on two and four."""


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("size", "method"), SIZES, ids=str)
def test_every_mask(method: dict[str, Any], size: int, name: str) -> None:
    compare(size, method, name, heads=HEADS[size])


@pytest.mark.parametrize("method", [*METHODS, *HIERARCHICAL], ids=str)
def test_overlapped_has_the_bits_of_plain(method: dict[str, Any]) -> None:
    for name in ("causal", "packed"):
        compare(4, method, name, run=both_ways)


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


@pytest.mark.parametrize("heads", [(8, 1), (8, 2), (8, 8), (28, 7), (12, 3)], ids=str)
@pytest.mark.parametrize("method", [*METHODS[1::2], METHODS[-1], *HIERARCHICAL], ids=str)
def test_grouped_heads(method: dict[str, Any], heads: tuple[int, int]) -> None:
    compare(4, method, tokens=17, heads=heads)


@pytest.mark.parametrize("method", [*METHODS, *HIERARCHICAL], ids=str)
def test_fp32(method: dict[str, Any]) -> None:
    compare(4, method, heads=(8, 2), dtype=torch.float32)


@pytest.mark.parametrize("name", NAMES)
def test_heads_inside_and_pieces_outside(name: str) -> None:
    compare(4, HIERARCHICAL[0], name, heads=(8, 4))
    if name in ("packed", "head_bias"):
        for method in HIERARCHICAL[1:]:  # one group, and groups of one rank
            compare(4, method, name, heads=(8, 4))


@pytest.mark.parametrize("method", [*METHODS[1::2], METHODS[-1], *HIERARCHICAL], ids=str)
def test_sinks_soft_cap_and_scale(method: dict[str, Any]) -> None:
    sinks = torch.linspace(-1, 1, 8, dtype=torch.float64)
    compare(4, method, "padding", tokens=17, heads=(8, 4), sinks=sinks)
    compare(4, method, tokens=17, heads=(8, 4), sinks=sinks, softcap=2.0, scale=0.7)


@pytest.mark.parametrize("method", [*METHODS, {"method": "a2a+p2p", "hierarchical_sizes": (4, 2)}], ids=str)
def test_eight_ranks(method: dict[str, Any]) -> None:
    compare(8, method, "packed", heads=(8, 4))
    compare(8, method, tokens=7, heads=(8, 2))


@pytest.mark.parametrize("method", [*METHODS, *HIERARCHICAL], ids=str)
def test_dropout_is_that_of_the_positions(method: dict[str, Any]) -> None:
    """Whatever the method, the layout and the number of ranks, in forward and in backward."""
    compare(4, method, heads=(8, 4), dropout=0.5)
    compare(4, method, "packed", heads=(8, 4), layout="area", dropout=0.2, sinks=torch.linspace(-1, 1, 8, dtype=torch.float64))


def autocast(group: Any, layout: TokenLayout) -> None:
    q, k, v, _ = (x[:, :, layout.positions(group.rank)] for x in inputs(8, 2, 2, torch.float32))
    q.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        output = ContextAttention(group)(q, k, v, Mask(8), layout)
    output.float().sum().backward()
    assert (output.dtype, q.grad.dtype) == (torch.bfloat16, torch.float32)


def test_autocast() -> None:
    on_ranks(2, autocast, TokenLayout.balanced(8, 2))
