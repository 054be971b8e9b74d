"""How experts and their rows are spread over ranks and parts."""

import itertools

import pytest

from lightning_overlap.modes.expert.layout import SPLITS, Layout, Split, choose


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(("experts", "ranks", "parts"), [(8, 2, 4), (7, 3, 2), (5, 4, 3), (4, 4, 8), (3, 1, 1), (8, 2, 1)])
def test_each_row_is_in_one_part_of_one_rank(experts: int, ranks: int, parts: int, split: Split) -> None:
    layout = Layout(experts, ranks, split, parts)
    assert [expert for rank in range(ranks) for expert in layout.experts_of(rank)] == list(range(experts))
    assert max(len(layout.experts_of(rank)) for rank in range(ranks)) - experts // ranks <= 1
    for rows in range(6):
        places = [
            (expert, row)
            for part, rank in itertools.product(range(parts), range(ranks))
            for expert in layout.experts_in(part, rank)
            for row in layout.rows_in(part, rows)
        ]
        assert sorted(places) == list(itertools.product(range(experts), range(rows)))
    sources = [source for part in range(parts) for number, source in layout.products() if number == part]
    divided = [source for source in sources if source != "all"]
    assert sorted(divided) == sorted(["local", "remote"] * (0 if split == "experts" else min(parts, 2)))


def test_local_rows_run_under_the_first_dispatch_and_the_last_combine() -> None:
    assert list(Layout(8, 2, "experts+local", 4).products()) == [
        *((0, "local"), (0, "remote"), (1, "all"), (2, "all"), (3, "remote"), (3, "local"))
    ]
    assert list(Layout(8, 2, "experts", 2).products()) == [(0, "all"), (1, "all")]


def test_first_and_last_part_of_tokens_are_half_as_large() -> None:
    layout = Layout(2, 2, "tokens", 4)
    assert [len(layout.rows_in(part, 600)) for part in range(4)] == [100, 200, 200, 100]
    assert [len(Layout(2, 2, "tokens", 1).rows_in(0, 9))] == [9]


def test_choice() -> None:
    """Whole experts where ranks have enough of them; no more parts than a rank has experts, unless they are asked for."""
    chosen = {(e, n): choose(e, n) for e, n in ((8, 2), (8, 4), (8, 8), (64, 8), (128, 2), (4, 2), (2, 2), (5, 2))}
    assert chosen == {
        (8, 2): ("experts+local", 4),
        (8, 4): ("tokens", 5),
        (8, 8): ("tokens", 8),
        (64, 8): ("experts+local", 8),
        (128, 2): ("experts+local", 4),
        (4, 2): ("experts+local", 2),
        (2, 2): ("tokens", 4),
        (5, 2): ("experts+local", 2),
    }
    assert choose(128, 2, "experts") == ("experts", 8)
    assert choose(6, 2, "experts") == ("experts", 3)
    assert choose(8, 2, "tokens", 6) == ("tokens", 6)
    assert choose(8, 2, parts=9) == ("experts+local", 9)
