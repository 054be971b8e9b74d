"""Plans: what is computed is the mask, what travels is what is needed."""

import pytest
import torch
from torch import Tensor

from lightning_overlap.modes.context.layout import TokenLayout
from lightning_overlap.modes.context.mask import Mask, Relation
from lightning_overlap.modes.context.pieces import Pair, Plan, Plans, Use, make_plan, make_stages
from tests.modes.context.masks import NAMES, mask_of
from tests.modes.context.test_mask import whole

LAYOUTS = {"balanced": TokenLayout.balanced, "contiguous": TokenLayout.contiguous}


def plans(mask: Mask, layout: TokenLayout, pieces: int = 8, method: str = "p2p", tile: int = 4) -> list[Plan]:
    return [make_plan(mask, layout, rank, pieces, method, tile) for rank in range(layout.size)]


def pairs_of(mask: Mask, layout: TokenLayout, plan: Plan, rank: int) -> Tensor:
    """How often a rank computes each pair of positions, ``(B, H, S, S)``."""
    return count(mask, layout.positions(rank), (*plan.local, *(use for one in plan.rounds for use in one.uses)))


def count(mask: Mask, positions: Tensor, uses: tuple[Use, ...]) -> Tensor:
    """How often each pair of positions is computed, ``(B, H, S, S)``; ``positions`` are those of the rows."""
    counts = torch.zeros(2, 4, mask.tokens, mask.tokens, dtype=torch.long)
    for use in uses:
        for pair in use.pairs:
            queries = positions[pair.queries.start : pair.queries.stop]
            keys = torch.tensor(list(use.piece.positions[pair.keys.start : pair.keys.stop]))
            assert queries.tolist() == [position for part in pair.query_positions for position in part]
            assert keys.tolist() == list(pair.key_positions)
            seen = torch.ones(len(queries), len(keys), dtype=torch.long)
            if pair.relation is Relation.DIAGONAL:
                seen = seen.tril()
            elif pair.relation is Relation.PARTIAL:
                visible = mask.visible(queries, keys, 2, range(4))
                seen = (visible if visible.dtype == torch.bool else visible > -torch.inf).long()
            counts[:, :, queries.view(-1, 1), keys] += seen
    return counts


@pytest.mark.parametrize(("ranks", "method"), [(1, "p2p"), (2, "p2p"), (3, "all_gather"), (4, "p2p"), (8, "p2p")])
@pytest.mark.parametrize("name", NAMES)
def test_each_visible_pair_is_computed_once(name: str, ranks: int, method: str) -> None:
    for tokens in (7, 19):
        mask = mask_of(name, tokens)
        for layout in (TokenLayout.balanced(tokens, ranks), TokenLayout.contiguous(tokens, ranks), TokenLayout.by_area(mask, ranks)):
            made = plans(mask, layout, 5, method)
            counts = torch.stack([pairs_of(mask, layout, plan, rank) for rank, plan in enumerate(made)]).sum(0)
            assert torch.equal(counts, whole(mask).long())


@pytest.mark.parametrize("name", NAMES)
def test_stages_have_each_visible_pair_once_by_whose_it_is(name: str) -> None:
    mask = mask_of(name, 29)
    for layout, members, rank in (
        (TokenLayout.balanced(29, 4), (0, 1, 2, 3), 1),
        (TokenLayout.by_area(mask, 4), (1, 3), 3),
        (TokenLayout.contiguous(29, 4), (2,), 2),
    ):
        positions = torch.cat([layout.positions(member) for member in members]).sort().values
        here = torch.zeros(29, dtype=torch.long).index_fill_(0, positions, 1)
        own = torch.zeros(29, dtype=torch.long).index_fill_(0, layout.positions(rank), 1)
        stages = make_stages(mask, layout, members, rank, tile=4)
        for uses, queries, keys in ((stages.own, own, own), (stages.keys, own, here - own), (stages.queries, here - own, here)):
            assert torch.equal(count(mask, positions, uses), whole(mask).long() * queries.view(-1, 1) * keys)


@pytest.mark.parametrize("method", ["p2p", "all_gather"])
@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("name", NAMES)
def test_ranks_agree_on_what_travels(name: str, ranks: int, method: str) -> None:
    mask = mask_of(name, 29)
    layout = TokenLayout.balanced(29, ranks)
    made = plans(mask, layout, 5, method)
    assert len({(len(plan.rounds), plan.ahead) for plan in made}) == 1
    for rank, plan in enumerate(made):
        for number, one in enumerate(plan.rounds):
            for other in range(ranks):
                assert one.receives[other] == made[other].rounds[number].sends[rank]
                assert all(piece.owner == other for piece in one.receives[other])
            received = {piece for pieces in one.receives for piece in pieces}
            assert {use.piece for use in one.uses} == received if method == "p2p" else {use.piece for use in one.uses} <= received


def sent(mask: Mask, layout: TokenLayout) -> float:
    """Tokens that travel, as a part of those of a ring in which all tokens go to all ranks."""
    tokens = sum(len(p.rows) for plan in plans(mask, layout, tile=64) for one in plan.rounds for to in one.sends for p in to)
    return tokens / (mask.tokens * (layout.size - 1))


def test_what_no_query_sees_does_not_travel() -> None:
    causal = Mask(4096, causal=True)
    assert sent(Mask(4096), TokenLayout.balanced(4096, 2)) == 1
    assert sent(causal, TokenLayout.balanced(4096, 2)) == 0.75
    assert sent(causal, TokenLayout.contiguous(4096, 2)) == 0.5
    assert sent(causal, TokenLayout.balanced(4096, 4)) == 0.75
    assert sent(Mask(4096, causal=True, window=256), TokenLayout.contiguous(4096, 2)) == 1 / 16  # one piece of eight of one rank
    apart = torch.arange(4096).view(1, -1) // 2048
    assert sent(Mask(4096, causal=True, documents=apart), TokenLayout.contiguous(4096, 2)) == 0
    packed = torch.arange(4096).view(1, -1) // 512
    assert sent(Mask(4096, causal=True, documents=packed), TokenLayout.balanced(4096, 2)) == 0
    padded = torch.arange(4096).view(1, -1) < 2048
    assert sent(Mask(4096, keys=padded), TokenLayout.contiguous(4096, 2)) == 0.5


def test_a_step_has_pieces_enough_to_hide_them() -> None:
    for ranks in (2, 3, 4, 8):
        plan = plans(Mask(4096), TokenLayout.balanced(4096, ranks))[0]
        assert len(plan.rounds) >= 8
        assert plan.ahead * (ranks - 1) == len(plan.rounds)


def calls(plan: Plan) -> list[Pair]:
    return [pair for use in plan.local for pair in use.pairs]


def test_few_calls() -> None:
    mask = Mask(4096, causal=True)
    for rank, plan in enumerate(plans(mask, TokenLayout.balanced(4096, 2))):
        assert [(pair.queries, pair.relation) for pair in calls(plan)] == [
            (range(2048), Relation.DIAGONAL),  # all queries see the early keys, the early ones those before themselves
            (range(1024, 2048), Relation.DIAGONAL),
        ]
        # Early queries of rank 1 see the early keys of rank 0; otherwise only late queries see something.
        expected = [range(2048)] * 4 if rank else [range(1024, 2048)] * 8
        assert [pair.queries for one in plan.rounds for use in one.uses for pair in use.pairs] == expected


def test_compute_follows_the_window() -> None:
    plan = make_plan(Mask(8192, causal=True, window=512), TokenLayout.contiguous(8192, 2), 1, 8, "p2p")
    area = sum(len(pair.queries) * len(pair.keys) for use in plan.local for pair in use.pairs)
    assert area < 4096 * 3 * 256 + 1
    assert sum(pair.relation is Relation.PARTIAL for pair in calls(plan)) == 14


def test_plans_are_made_once() -> None:
    made, layout = Plans("p2p", 8), TokenLayout.balanced(64, 2)
    assert made.of(Mask(64, causal=True), layout, 0) is made.of(Mask(64, causal=True), layout, 0)
    assert made.of(Mask(64, causal=True), layout, 0) is not made.of(Mask(64), layout, 0)
    packed = Mask(64, documents=torch.zeros(1, 64))
    assert made.of(packed, layout, 0) is made.of(packed, layout, 0)
    for mask in (Mask(64), packed):
        assert made.stages(mask, layout, (0, 1), 0) is made.stages(mask, layout, (0, 1), 0)
        assert made.stages(mask, layout, (0, 1), 0) is not made.stages(mask, layout, (0,), 0)
    assert made.of(packed, layout, 0) is not made.of(Mask(64, documents=torch.arange(64).view(1, -1)), layout, 0)
