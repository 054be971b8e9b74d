"""Failures of attention over sharded sequences that users of other packages have reported: they must not happen here.

A test's name has the reports (TE: TransformerEngine). Those of whole models are in
``tests/trainer/context/test_reported_elsewhere.py``.
"""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from lightning_overlap.modes.context.layout import TokenLayout
from lightning_overlap.modes.context.mask import Mask
from tests.helpers.rank_threads import on_ranks
from tests.modes.context.masks import mask_of
from tests.modes.context.test_attention import METHODS, both_ways, compare, whole_of
from tests.modes.context.whole import inputs, whole_attention


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_diffusers_14265_gradients_of_each_number_of_pieces(size: int) -> None:
    """Another ring used the first keys and values again in its backward: the loss was right, and the gradients wrong."""
    for of_each_rank in (1, 2, 3, 5):
        for method in ("p2p", "all_gather"):
            compare(size, {"method": method, "pieces": of_each_rank * (size - 1)}, tokens=17)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_te_3331_and_1930_every_token_counts(method: dict[str, Any]) -> None:
    """698 tokens on 4 ranks; 7 of 10 that count: as 7 tokens alone, and with the same bits again."""
    compare(4, method, tokens=698, run=both_ways)
    padded = Mask(10, causal=True, keys=(torch.arange(10) < 7).view(1, -1))
    tensors = inputs(10, 4, 2, torch.float64)
    tensors[3][:, :, 7:] = 0
    layout = TokenLayout.balanced(10, 4)
    computed = whole_of(on_ranks(4, both_ways, method, tensors, padded, layout), layout)
    expected = whole_attention(*(x[:, :, :7] for x in tensors), Mask(7, causal=True))
    for x, y in zip(computed, expected, strict=True):
        torch.testing.assert_close(x[:, :, :7], y, rtol=1e-11, atol=1e-12)
    for of_token in computed[1:]:
        assert not of_token[:, :, 7:].any()


@pytest.mark.parametrize("heads", [(8, 2), (28, 7)], ids=str)
def test_verl_1226_and_vllm_omni_5716_fewer_key_heads_than_ranks(heads: tuple[int, int]) -> None:
    compare(4, {"method": "a2a"}, "packed", heads=heads)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_te_2541_sinks(method: dict[str, Any]) -> None:
    compare(3, method, "window", heads=(6, 3), sinks=torch.linspace(-1, 1, 6, dtype=torch.float64))


def test_ring_flash_attention_42_and_easycontext_14_error_of_many_ranks() -> None:
    """bf16 on 8 ranks, with large logits, is as exact as unsharded."""
    mask, layout = mask_of("causal", 256), TokenLayout.balanced(256, 8)
    tensors = [(3 * x).bfloat16() for x in inputs(256, 4, 2, torch.float64, size=16)]
    exact = whole_attention(*(x.double() for x in tensors), mask)
    variables = [x.clone().requires_grad_() for x in tensors[:3]]
    output = F.scaled_dot_product_attention(*variables, is_causal=True, enable_gqa=True)
    output.backward(tensors[3])
    computed = whole_of(on_ranks(8, both_ways, {}, tensors, mask, layout), layout)
    for unsharded, mine, right in zip([output, *(x.grad for x in variables)], computed, exact, strict=True):
        assert (mine - right).norm() <= 1.5 * (unsharded - right).norm()
