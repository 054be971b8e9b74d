"""Which method an attention takes, by its mask."""

from typing import Any

import pytest
import torch

from lightning_overlap.modes.context.layout import TokenLayout
from lightning_overlap.modes.context.mask import Mask
from lightning_overlap.modes.context.methods import AttentionByMask
from tests.helpers.rank_threads import on_ranks

TOKENS = 64
CAUSAL = Mask(TOKENS, causal=True)
WINDOW = Mask(TOKENS, causal=True, window=4)
DOCUMENTS = Mask(TOKENS, causal=True, documents=torch.arange(8).repeat_interleave(8).unsqueeze(0))
BALANCED, CONTIGUOUS = TokenLayout.balanced(TOKENS, 4), TokenLayout.contiguous(TOKENS, 4)
AUTO = dict.fromkeys(("full_attention", "sliding_attention"), "by mask")


def transfers(group: Any, methods: Any, heads: int, kv_heads: int, mask: Mask, layout: TokenLayout) -> tuple[set[str], int]:
    """Names of this rank's transfers in a forward, and the bytes that it sends."""
    q, k, v = (torch.zeros(1, count, layout.count(group.rank), 4) for count in (heads, kv_heads, kv_heads))
    AttentionByMask(group, methods)(q, k, v, mask, layout)
    return {label.partition("[")[0] for _, label in group.events}, group.nbytes


@pytest.mark.parametrize(
    ("heads", "kv_heads", "mask", "layout", "method"),
    [
        (8, 8, CAUSAL, BALANCED, "a2a"),
        (8, 2, CAUSAL, BALANCED, "p2p"),
        (6, 6, CAUSAL, BALANCED, "p2p"),
        (8, 8, Mask(TOKENS), CONTIGUOUS, "a2a"),
        (8, 8, WINDOW, CONTIGUOUS, "p2p"),
        (8, 8, DOCUMENTS, CONTIGUOUS, "p2p"),
    ],
)
def test_by_mask_sends_the_fewest_bytes(heads: int, kv_heads: int, mask: Mask, layout: TokenLayout, method: str) -> None:
    def most(methods: Any) -> tuple[set[str], int]:
        names, counts = zip(*on_ranks(4, transfers, methods, heads, kv_heads, mask, layout), strict=True)
        return set().union(*names), max(counts)

    names, nbytes = most(AUTO)
    assert ("context.heads" in names) == (method == "a2a")
    others = ["p2p"] if heads % 4 else ["p2p", "a2a"]
    assert nbytes == min(most(dict.fromkeys(AUTO, other))[1] for other in others)


def test_windows_have_a_method_of_their_own() -> None:
    methods = {"full_attention": "a2a", "sliding_attention": "p2p"}
    for mask, layout, name in ((CAUSAL, BALANCED, "context.heads"), (WINDOW, BALANCED, "context.pieces")):
        for names, _ in on_ranks(4, transfers, methods, 8, 8, mask, layout):
            assert name in names
