"""Parts of an attention, merged, against the whole of it, and their gradients."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_overlap.modes.context.kernel import (
    FlashKernel,
    Kernel,
    Merger,
    PlainKernel,
    Tile,
    finite,
    grad_of_sinks,
    kept,
    kernel_for,
)
from tests.modes.context.masks import NAMES, mask_of
from tests.modes.context.whole import inputs, whole_attention

TOKENS = 13
PARTS = [range(3), range(3, 4), range(4, 9), range(9, 13)]


def tile_of(q: Tensor, keys: range, **how: Any) -> Tile:
    """A tile of all queries and heads."""
    return Tile(queries=(range(q.shape[2]),), keys=keys, heads=range(q.shape[1]), **how)


def by_parts(kernel: Kernel, name: str, tensors: list[Tensor], sinks: Tensor | None) -> list[Tensor]:
    q, k, v, grad = tensors
    mask, positions = mask_of(name, TOKENS, q.shape[1], q.dtype), torch.arange(TOKENS)
    tiles = [
        tile_of(q, part, visible=mask.visible(positions, positions[part.start : part.stop], 2, range(q.shape[1]))) for part in PARTS
    ]
    cuts = [(k[:, :, part.start : part.stop], v[:, :, part.start : part.stop]) for part in PARTS]
    merger = Merger(torch.zeros_like(q), sinks)
    for tile, (keys, values) in zip(tiles, cuts, strict=True):
        merger.add(range(TOKENS), *kernel.forward(q, keys, values, tile))
    lse = finite(merger.lse)
    parts = [kernel.backward(grad, q, *cut, merger.output, lse, tile) for cut, tile in zip(cuts, tiles, strict=True)]
    of_q = torch.stack([part[0] for part in parts]).sum(0)
    grads = [of_q, torch.cat([part[1] for part in parts], 2), torch.cat([part[2] for part in parts], 2)]
    return [merger.output, *grads, *([] if sinks is None else [grad_of_sinks(sinks, grad, merger.output, lse)])]


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("settings", [{}, {"sinks": True}, {"softcap": 1.5}, {"softcap": 2.0, "sinks": True}], ids=str)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_parts_are_the_whole(name: str, kv_heads: int, settings: dict[str, Any]) -> None:
    tensors = inputs(TOKENS, 4, kv_heads, torch.float64)
    sinks = torch.linspace(-1, 1, 4, dtype=torch.float64) if settings.get("sinks") else None
    softcap, scale = settings.get("softcap"), 0.3
    expected = whole_attention(*tensors, mask_of(name, TOKENS), scale=scale, softcap=softcap, sinks=sinks)
    kernels: list[Kernel] = [PlainKernel(scale, softcap=softcap), *([FlashKernel(scale)] if softcap is None else [])]
    for kernel in kernels:
        torch.testing.assert_close(by_parts(kernel, name, tensors, sinks), expected, rtol=1e-12, atol=1e-12)


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain kernel goes through several blocks of queries."""
    monkeypatch.setattr("lightning_overlap.modes.context.kernel.PLAIN_ROWS", 5)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("kernel", [FlashKernel(0.3), PlainKernel(0.3)])
@pytest.mark.parametrize("keys", [4, 7])
def test_causal_tiles(kernel: Kernel, keys: int) -> None:
    q, k, v, grad = inputs(7, 4, 2, torch.float64)
    k, v = k[:, :, :keys], v[:, :, :keys]
    visible = torch.ones(7, keys, dtype=torch.bool).tril()
    causal, same = tile_of(q, range(keys), causal=True), tile_of(q, range(keys), visible=visible)
    output, lse = kernel.forward(q, k, v, causal)
    torch.testing.assert_close((output, lse), kernel.forward(q, k, v, same), rtol=1e-12, atol=1e-12)
    grads = [kernel.backward(grad, q, k, v, output, lse, tile) for tile in (causal, same)]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("blocks")
def test_dropout_is_that_of_the_positions_in_any_tile() -> None:
    tensors = inputs(TOKENS, 4, 2, torch.float64)
    positions = torch.arange(TOKENS)
    pairs = kept(0.4, 7, 2, range(4), positions, positions)
    expected = whole_attention(*tensors, mask_of("causal", TOKENS), scale=0.3, kept=pairs / 0.6)
    torch.testing.assert_close(
        by_parts(PlainKernel(0.3, dropout=0.4, seed=7), "causal", tensors, None), expected, rtol=1e-12, atol=1e-12
    )
    q, k, v = tensors[:3]
    tile = tile_of(q, range(TOKENS), causal=True)
    assert not torch.allclose(PlainKernel(0.3, dropout=0.4, seed=8).forward(q, k, v, tile)[0], expected[0])
    assert not PlainKernel(0.3, dropout=1.0).forward(q, k, v, tile)[0].any()


def test_dropped_pairs_are_independent() -> None:
    pairs = kept(0.3, 5, 4, range(8), torch.arange(96), torch.arange(96)).double()
    assert abs(pairs.mean() - 0.7) < 0.003  # 4.5 standard deviations
    for dim in range(4):
        means = pairs.mean([other for other in range(4) if other != dim])
        assert (means - 0.7).abs().max() < 4.5 * 0.46 / math.sqrt(pairs.numel() / len(means))
        # Neighbours, and those a piece away, agree as often as chance has it: 0.58 of all.
        for distance in (1, 2, min(32, pairs.shape[dim] - 1)):
            one, other = (pairs.narrow(dim, start, pairs.shape[dim] - distance) for start in (0, distance))
            assert abs((one == other).double().mean() - 0.58) < 4.5 * 0.5 / math.sqrt(one.numel())


def test_large_logits_do_not_overflow() -> None:
    q, k, v, grad = (6 * x for x in inputs(TOKENS, 4, 4, torch.float32))
    for output, expected in zip(
        by_parts(FlashKernel(1.0), "causal", [q, k, v, grad], None),
        whole_attention(*(x.double() for x in (q, k, v, grad)), mask_of("causal", TOKENS), scale=1.0),
        strict=True,
    ):
        torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_the_fastest_kernel_that_can_do_it() -> None:
    q = torch.empty(1, 1, 1, 8)
    assert type(kernel_for(q, q, 1.0)) is FlashKernel
    for other in (kernel_for(q, q, 1.0, dropout=0.1), kernel_for(q, q, 1.0, softcap=2.0), kernel_for(q, q[..., :4], 1.0)):
        assert type(other) is PlainKernel


def test_the_oracle_is_attention() -> None:
    q, k, v, grad = inputs(TOKENS, 4, 2, torch.float64)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(whole_attention(q, k, v, grad, mask_of("causal", TOKENS))[0], expected)
