"""What travels in an attention, in which order, and that it does so on gloo."""

import datetime
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.autograd.graph import saved_tensors_hooks

from lightning_overlap.decision import ConfigError
from lightning_overlap.modes.context.attention import ContextAttention
from lightning_overlap.modes.context.exchange import Chain
from lightning_overlap.modes.context.heads import HeadShares
from lightning_overlap.modes.context.kernel import FlashKernel
from lightning_overlap.modes.context.layout import TokenLayout
from lightning_overlap.modes.context.mask import Mask
from lightning_overlap.ranks.transfer import Transfer
from lightning_overlap.ranks.world import make_group
from tests.helpers.rank_threads import on_ranks
from tests.modes.context.masks import mask_of
from tests.modes.context.test_attention import HIERARCHICAL, METHODS, both_ways, whole_of
from tests.modes.context.whole import inputs, whole_attention

Events = list[tuple[str, str]]


class Recorder(FlashKernel):
    """Tells what it computes."""

    def __init__(self, events: Events) -> None:
        super().__init__(0.3)
        self.events = events

    def forward(self, *arguments: Any) -> Any:
        self.events.append(("compute", ""))
        return super().forward(*arguments)

    def backward(self, *arguments: Any) -> Any:
        self.events.append(("compute", ""))
        return super().backward(*arguments)


def record(group: Any, method: dict[str, Any], tokens: int) -> tuple[Events, Events, int]:
    """What a rank does in forward and in backward, in order, and the bytes that it sends."""
    layout = TokenLayout.balanced(tokens, group.size)
    q, k, v, grad = (x[:, :, layout.positions(group.rank)].clone() for x in inputs(tokens, 4, 4, torch.float32))
    q.requires_grad_()
    attention = ContextAttention(group, **method, kernels=lambda *_, **__: Recorder(group.events))
    output = attention(q, k, v, Mask(tokens, causal=True), layout)
    count = len(group.events)
    output.backward(grad)
    return group.events[:count], group.events[count:], group.nbytes


def recorded(size: int, method: dict[str, Any], tokens: int) -> list[tuple[Events, Events, int]]:
    """Records what each rank posts, waits for and computes."""
    return on_ranks(size, record, method, tokens)


@pytest.mark.parametrize("method", ["p2p", "all_gather"])
def test_pieces_are_posted_before_the_compute_that_hides_them(method: str) -> None:
    for rank, (forward, backward, _) in enumerate(recorded(2, {"method": method}, 64)):
        for events in (forward, backward):
            waits = [i for i, event in enumerate(events) if event[0] == "wait"]
            first = next(i for i, event in enumerate(events) if event[0] == "compute")
            assert first < waits[0], "local keys are used while the first piece travels"
            for i in waits:
                label = events[i][1]
                assert ("compute", "") in events[events.index(("post", label)) : i], f"nothing hides {label} of rank {rank}"
        kinds = [kind for kind, label in backward if kind != "wait" and "pieces" not in label]
        last = len(kinds) - 1 - kinds[::-1].index("post")
        assert "compute" in kinds[last:], "local keys are used while the last gradients leave"


def two_attentions(group: Any, method: dict[str, Any], *, chained: bool, saved: bool = False) -> tuple[list[torch.Tensor], Events]:
    """Gradients of two attentions one after the other, and what this rank does in backward."""
    layout = TokenLayout.balanced(32, group.size)
    q, k, v, grad = (x[:, :, layout.positions(group.rank)].clone().requires_grad_() for x in inputs(32, 4, 4, torch.float32))
    chain = Chain()
    attention = ContextAttention(group, **method, chain=(lambda: chain) if chained else None)
    with saved_tensors_hooks(lambda x: x, lambda x: x) if saved else nullcontext():
        between = attention(q, k, v, Mask(32, causal=True), layout)
        output = attention(between, k + between, v, Mask(32, causal=True), layout)
    count = len(group.events)
    output.backward(grad)
    return [x.grad for x in (q, k, v)], group.events[count:]


@pytest.mark.parametrize("method", [{"method": "p2p"}, {"method": "all_gather"}])
@pytest.mark.parametrize("size", [2, 3])
def test_in_backward_keys_and_values_are_posted_under_the_attention_that_comes_after(size: int, method: dict[str, Any]) -> None:
    chained = on_ranks(size, partial(two_attentions, method=method, chained=True))
    alone = on_ranks(size, partial(two_attentions, method=method, chained=False))
    for (grads, events), (expected, unchained) in zip(chained, alone, strict=True):
        assert all(map(torch.equal, grads, expected))
        assert sorted(events) == sorted(unchained), "each is posted once and waited for once"
        half = len(events) // 2
        assert events[half:] != unchained[half:]
        last = max(i for i, (kind, label) in enumerate(unchained[:half]) if kind == "wait" and "grads" in label)
        early = [label for kind, label in events[:last] if kind == "post" and "pieces" in label]
        assert early.count("context.pieces[0]") == 2
        of_grads = [i for i, (kind, label) in enumerate(events) if kind == "post" and "grads" in label]
        second = [i for i, event in enumerate(events) if event == ("post", "context.pieces[0]")][1]
        assert of_grads[len(of_grads) // 2 - 1] < second, "what the later attention waits for goes first"


def test_a_plain_attention_and_one_whose_tensors_are_saved_elsewhere_post_no_keys_ahead() -> None:
    for how in ({"method": {"method": "p2p", "overlapped": False}}, {"method": {"method": "p2p"}, "saved": True}):
        chained, alone = (on_ranks(2, partial(two_attentions, chained=chained, **how)) for chained in (True, False))
        assert [events for _, events in chained] == [events for _, events in alone]


def test_plain_transfers_are_waited_for_where_they_are_posted() -> None:
    for method in ({"method": "p2p"}, {"method": "all_gather"}, {"method": "a2a"}):
        for forward, backward, _ in recorded(2, {**method, "overlapped": False}, 64):
            for events in (forward, backward):
                posts = [i for i, (kind, _) in enumerate(events) if kind == "post"]
                assert posts
                assert all(events[i + 1] == ("wait", events[i][1]) for i in posts)


def test_an_exchange_of_heads_travels_while_others_are_computed() -> None:
    for rank in (0, 1):
        for events in recorded(2, {"method": "a2a"}, 64)[rank][:2]:
            kinds = [kind for kind, _ in events]
            first = next(i for i, (kind, label) in enumerate(events) if kind == "wait" and label.endswith("[0]"))
            assert "compute" in kinds[: kinds.index("wait")], "this rank's queries meet its keys (in backward the others' keys) first"
            assert kinds[first + 1] == "post", "the second group travels while the first one is computed"
            posts = [i for i, (kind, label) in enumerate(events) if kind == "post" and label.endswith("]")]
            assert len(posts) == 4, "two groups come and leave"
            assert "compute" in kinds[posts[2] : posts[3]], "what the first group leaves travels while the second one is computed"
            assert "compute" in kinds[posts[3] :], "what leaves last travels under what only this rank needs"


def test_bytes() -> None:
    """Without transfers each rank would attend to its own tokens, and look fast."""
    kv = 2 * 4 * 64 * 8 * 4 * 2  # of all tokens: 2 samples, 4 heads, 64 tokens, 8 features, fp32, keys and values
    ring = 3 * kv  # twice in forward and backward, and gradients once
    assert sum(sent for _, _, sent in recorded(2, {"method": "p2p"}, 64)) == 0.75 * ring
    assert sum(sent for _, _, sent in recorded(4, {"method": "p2p"}, 64)) == 0.75 * ring * 3
    heads = 2 * (4 * kv // 2)  # q, k, v and the output, half of each, and the same of gradients
    assert sum(sent for _, _, sent in recorded(2, {"method": "a2a"}, 64)) == heads // 2


def test_a_key_head_travels_once_to_each_rank_that_needs_it() -> None:
    for heads, kv_heads, ranks in ((8, 2, 4), (28, 7, 4), (16, 8, 2), (12, 3, 4)):
        shares = HeadShares.of(heads, kv_heads, ranks, kv_heads_apart=False)
        assert shares.groups > 1
        for rank in range(ranks):
            used = {head // (heads // kv_heads) for mine in shares.queries[rank] for head in mine}
            for each in (shares.first, shares.last):
                travels = [head for group in range(shares.groups) for head in each(rank, group)]
                assert travels == sorted(used)


# -- gloo --------------------------------------------------------------------------------------------------------------------


def on_gloo(methods: list[dict[str, Any]]) -> list[tuple[list[Any], list[Transfer]]]:
    """Results of each method, and the transfers of the last one's."""
    size = dist.get_world_size()
    group = make_group([list(range(size))], "context", datetime.timedelta(seconds=30))
    try:
        results = []
        for method in methods:
            mask = mask_of("causal", 29)
            group.log = []
            parts = both_ways(group, method, inputs(29, 4, 2, torch.float64), mask, TokenLayout.balanced(29, size))
            results.append((parts, [(each.label, each.nbytes, each.complete) for each in group.log]))
        return results
    finally:
        group.close()


@pytest.mark.parametrize("size", [2, 4])
def test_gloo(world: Any, size: int) -> None:
    methods = [*METHODS, *(HIERARCHICAL if size == 4 else [])]
    expected = whole_attention(*inputs(29, 4, 2, torch.float64), mask_of("causal", 29))
    by_rank = world(size).run(on_gloo, methods)
    for number in range(len(methods)):
        results = [rank[number] for rank in by_rank]
        computed = whole_of([parts for parts, _ in results], TokenLayout.balanced(29, size))
        torch.testing.assert_close(computed, expected, rtol=1e-11, atol=1e-12)
        for _, log in results:
            assert sum(nbytes for _, nbytes, _ in log) > 0
            assert all(complete for _, _, complete in log), "all is waited for"


def without_an_earlier_backward() -> list[float]:
    """The backward of a later attention only, and then of a whole chain: what has travelled in vain is mixed up with nothing."""
    size, rank = dist.get_world_size(), dist.get_rank()
    group = make_group([list(range(size))], "context", datetime.timedelta(seconds=30))
    try:
        layout, mask = TokenLayout.balanced(29, size), Mask(29, causal=True)
        q, k, v, grad = (x[:, :, layout.positions(rank)].clone().requires_grad_() for x in inputs(29, 4, 2, torch.float64))
        results = []
        for partly in (True, False):
            chain = Chain()
            attention = ContextAttention(group, chain=lambda chain=chain: chain)  # type: ignore[misc]
            between = attention(q, k, v, mask, layout)
            output = attention(between, k, v * 2, mask, layout)
            inputs_of = [between] if partly else [q, k, v]
            results.append([x.sum().item() for x in torch.autograd.grad(output, inputs_of, grad)])
        alone = ContextAttention(group)
        between = alone(q, k, v, mask, layout)
        expected = torch.autograd.grad(alone(between, k, v * 2, mask, layout), [q, k, v, between], grad)
        assert [*results[1], *results[0]] == [x.sum().item() for x in expected]
        return results[1]
    finally:
        group.close()


def test_keys_that_travel_in_vain_do_no_harm(world: Any) -> None:
    world(2).run(without_an_earlier_backward)


# -- errors ------------------------------------------------------------------------------------------------------------------


def refusal(group: Any, method: dict[str, Any], heads: int, mask: Mask) -> str:
    layout = TokenLayout.balanced(8, group.size)
    q, k, v, _ = (x[:, :, layout.positions(group.rank)] for x in inputs(8, heads, heads, torch.float32))
    with pytest.raises((ConfigError, ValueError)) as error:
        ContextAttention(group, **method)(q, k, v, mask, layout)
    return str(error.value)


@pytest.mark.parametrize(
    ("method", "heads", "mask", "said"),
    [
        ({"method": "a2a"}, 3, Mask(8), "3 query heads cannot be shared evenly by 2 ranks"),
        ({"method": "a2a+p2p"}, 4, Mask(8), "needs the numbers of ranks"),
        ({"method": "a2a+p2p", "hierarchical_sizes": (2, 2)}, 4, Mask(8), "4 ranks of 2"),
        ({"method": "p2p", "hierarchical_sizes": (2, 1)}, 4, Mask(8), "other methods have none"),
        ({"method": "p2p"}, 4, Mask(8, bias=torch.zeros(8, 8, requires_grad=True)), "detach the bias"),
        ({"method": "p2p"}, 4, Mask(9), "a mask of 9 tokens"),
    ],
)
def test_what_cannot_be_is_an_error(method: dict[str, Any], heads: int, mask: Mask, said: str) -> None:
    assert all(said in text for text in on_ranks(2, refusal, method, heads, mask))
