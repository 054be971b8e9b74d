"""Relations and pairs of pieces against the matrix of all pairs."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_overlap.modes.context.layout import TokenLayout
from lightning_overlap.modes.context.mask import Mask, Relation
from lightning_overlap.modes.context.pieces import PieceMethod, make_plan
from tests.modes.context.masks import NAMES, mask_of


def whole(mask: Mask, heads: int = 4) -> Tensor:
    """Whether each query sees each key, ``(B, H, S, S)``, by a loop over the conditions."""
    q, k = torch.arange(mask.tokens).view(-1, 1), torch.arange(mask.tokens).view(1, -1)
    seen = torch.ones(2, heads, mask.tokens, mask.tokens, dtype=torch.bool)
    seen &= (k <= q) if mask.causal else True
    if mask.window is not None:
        seen &= (k > q - mask.window) & (k < q + mask.window)
    for b in range(2):
        if mask.documents is not None:
            seen[b] &= mask.documents[b].view(-1, 1) == mask.documents[b].view(1, -1)
        if mask.keys is not None:
            seen[b] &= mask.keys[b].view(1, -1)
        for h in range(heads):
            if mask.rule is not None:
                seen[b, h] &= mask.rule(torch.tensor(b), torch.tensor(h), q, k)
    if mask.bias is not None:
        seen &= mask.bias if mask.bias.dtype == torch.bool else mask.bias > -torch.inf
    return seen


@pytest.mark.parametrize("name", NAMES)
def test_pairs(name: str) -> None:
    mask = mask_of(name, 13)
    expected = whole(mask)
    queries, keys = torch.tensor([0, 1, 5, 6, 11, 12]), torch.tensor([2, 3, 4, 9, 10])
    for heads in (range(4), range(1, 3)):
        visible = mask.visible(queries, keys, 2, heads)
        seen = visible if visible.dtype == torch.bool else visible > -torch.inf
        assert torch.equal(seen.expand(2, len(heads), 6, 5), expected[:, heads.start : heads.stop][:, :, queries][..., keys])


@pytest.mark.parametrize("name", NAMES)
def test_relations_are_those_of_the_pairs(name: str) -> None:
    mask = mask_of(name, 13)
    seen, told = whole(mask), set()
    ranges = [range(a, b) for a in range(13) for b in range(a, 14)]
    for queries, keys in itertools.product(ranges, ranges):
        relation, tile = mask.relation(queries, keys), seen[:, :, queries.start : queries.stop, keys.start : keys.stop]
        told.add(relation)
        if relation is Relation.NONE:
            assert not tile.any()
        elif relation is Relation.FULL:
            assert tile.all()
        elif relation is Relation.DIAGONAL:
            assert queries == keys
            assert torch.equal(tile, torch.ones_like(tile).tril())
        elif name in ("causal", "full", "window", "window_both_ways", "bool_bias"):  # of these everything is known
            assert tile.any()
            assert not tile.all()
    assert Relation.NONE in told
    assert (Relation.DIAGONAL in told) == (name in ("causal", "window", "packed", "padding"))


def test_an_additive_bias_is_given_as_it_is() -> None:
    mask = mask_of("head_bias", 9)
    queries, keys = torch.arange(3, 9), torch.arange(2, 5)
    visible = mask.visible(queries, keys, 2, range(1, 4))
    seen = queries.view(-1, 1) >= keys
    assert torch.equal(visible, mask.bias[None, 1:4, 3:9, 2:5].masked_fill(~seen, -torch.inf))


@pytest.mark.parametrize("name", ["causal", "full", "window", "window_both_ways", "documents", "packed"])
def test_visible_counts(name: str) -> None:
    mask = mask_of(name, 13)
    assert torch.equal(mask.visible_counts() * (2 if mask.documents is None else 1), whole(mask, 1).sum((0, 1, 3)))


def test_no_matrix_is_made_for_a_relation() -> None:
    documents = torch.arange(1 << 20).view(1, -1) // 1000
    mask = Mask(1 << 20, causal=True, documents=documents)
    assert mask.relation(range(1 << 19), range(1 << 19, 1 << 20)) is Relation.NONE
    assert mask.relation(range(1 << 20), range(1 << 20)) is Relation.PARTIAL


class OnDevice(Tensor):
    """A tensor whose numbers cannot be read, except by copying all of it to the host."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.__name__
        assert name not in ("__bool__", "__int__", "__index__", "item", "tolist", "nonzero", "__iter__", "equal"), f"{name} waits"
        result = super().__torch_function__(function, types, args, kwargs or {})
        if name == "cpu":
            copies.append(tuple(result.shape))
            return result.as_subclass(Tensor)
        return result


copies: list[tuple[int, ...]] = []


@pytest.mark.parametrize("method", ["p2p", "all_gather"])
def test_a_plan_copies_the_tensors_of_a_mask_to_the_host_once(method: PieceMethod) -> None:
    documents, keys = torch.arange(40).view(1, -1) // 7, torch.arange(40).view(1, -1) < 33
    for tensors in ({"documents": documents}, {"documents": documents, "keys": keys}, {"keys": keys}):
        copies.clear()
        mask = Mask(40, causal=True, **{name: x.as_subclass(OnDevice) for name, x in tensors.items()})  # type: ignore[arg-type]
        layout = TokenLayout.for_documents(mask, 2) if mask.documents is not None else TokenLayout.balanced(40, 2)
        for rank in range(2):
            plan = make_plan(mask, layout, rank, 4, method, tile=4)
            assert plan == make_plan(Mask(40, causal=True, **tensors), layout, rank, 4, method, tile=4)  # type: ignore[arg-type]
        assert copies == [(1, 40)] * len(tensors)


def test_what_is_no_mask_is_an_error() -> None:
    with pytest.raises(ValueError, match="window=0"):
        Mask(4, window=0)
    with pytest.raises(ValueError, match=r"\(batch, 4\)"):
        Mask(4, documents=torch.zeros(1, 5))
    with pytest.raises(ValueError, match="must broadcast"):
        Mask(4, bias=torch.zeros(3, 4))
