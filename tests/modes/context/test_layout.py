"""Layouts against known examples of early and late chunks, and what they are for: balance."""

import itertools

import pytest
import torch

from lightning_overlap.decision import ConfigError
from lightning_overlap.modes.context.layout import CHUNKS_BY_AREA, TokenLayout
from lightning_overlap.modes.context.mask import Mask


def positions(layout: TokenLayout) -> list[list[int]]:
    return [layout.positions(rank).tolist() for rank in range(layout.size)]


def test_balanced_gives_each_rank_an_early_and_a_late_range() -> None:
    assert positions(TokenLayout.balanced(8, 2)) == [[0, 1, 6, 7], [2, 3, 4, 5]]
    assert positions(TokenLayout.balanced(12, 2)) == [[0, 1, 2, 9, 10, 11], [3, 4, 5, 6, 7, 8]]
    assert positions(TokenLayout.balanced(8, 4)) == [[0, 7], [1, 6], [2, 5], [3, 4]]


def test_causal_work_is_equal_where_the_chunks_are() -> None:
    counts = Mask(96, causal=True).visible_counts()
    for ranks in (2, 3, 4, 8):
        layout = TokenLayout.balanced(96, ranks)
        assert len({int(counts[layout.positions(rank)].sum()) for rank in range(ranks)}) == 1


@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 10, 17, 64])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_each_position_belongs_to_one_rank(tokens: int, ranks: int) -> None:
    for layout, chunks in (
        (TokenLayout.contiguous(tokens, ranks), 1),
        (TokenLayout.balanced(tokens, ranks), 2),
        (TokenLayout.by_area(Mask(tokens, causal=True), ranks), CHUNKS_BY_AREA),
    ):
        mine = positions(layout)
        assert sorted(itertools.chain(*mine)) == list(range(tokens))
        assert all(part == sorted(part) for part in mine)
        assert [len(part) for part in mine] == [layout.count(rank) for rank in range(ranks)]
        assert max(map(len, mine)) - min(map(len, mine)) <= chunks
        assert min(map(len, mine)) > 0 or tokens < ranks


def test_by_area_balances_packed_documents() -> None:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.empty(40).log_normal_(5, 1, generator=generator).long() + 1
    documents = torch.arange(40).repeat_interleave(lengths)[None, :4096]
    mask = Mask(4096, causal=True, documents=documents)
    counts = mask.visible_counts()

    def heaviest(layout: TokenLayout) -> float:
        areas = [int(counts[layout.positions(rank)].sum()) for rank in range(4)]
        return max(areas) / (sum(areas) / 4)

    assert heaviest(TokenLayout.by_area(mask, 4)) < 1.05 < heaviest(TokenLayout.balanced(4096, 4))


def test_a_layout_that_is_none_is_an_error() -> None:
    for ranges in (((range(3),), (range(2, 5),)), ((range(3),), (range(3, 4),)), ((range(2, 5), range(2)),)):
        with pytest.raises(ValueError, match="belongs to one rank"):
            TokenLayout(5, ranges)
    with pytest.raises(ConfigError, match="0 tokens"):
        TokenLayout.balanced(0, 2)


@pytest.mark.parametrize(
    ("lengths", "order"),
    [([16] * 16, "contiguous"), ([128, 32, 16, 16, 16, 16, 16, 16], "by_area"), ([256], "balanced")],
)
def test_documents_get_the_layout_of_least_traffic_that_balances(lengths: list[int], order: str) -> None:
    documents = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).unsqueeze(0)
    mask = Mask(256, causal=True, documents=documents)
    make = TokenLayout.by_area if order == "by_area" else lambda mask, ranks: getattr(TokenLayout, order)(mask.tokens, ranks)
    assert TokenLayout.for_documents(mask, 4) == make(mask, 4)


@pytest.mark.parametrize("tokens", [8, 44, 96, 256])
def test_even_layouts_of_documents_give_ranks_as_many_tokens_under_any_mask(tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    for _ in range(20):
        documents = torch.randint(0, 8, (2, tokens), generator=generator).eq(0).cumsum(1)
        mask = Mask(tokens, causal=True, documents=documents)
        for layout in (TokenLayout.for_documents(mask, 4, even=True), TokenLayout.by_area(mask, 4, even=True)):
            assert [layout.count(rank) for rank in range(4)] == [tokens // 4] * 4
