"""Experts that are spread over ranks compute what one process computes, whatever the routing, the parts and the order of transfers."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_overlap.modes.expert.dispatch import Dispatch, ExpertDispatch
from lightning_overlap.modes.expert.gather import GatherDispatch
from lightning_overlap.modes.expert.grouped import LocalExperts
from lightning_overlap.modes.expert.layout import Layout, Split
from tests.helpers.rank_threads import ThreadGroup, on_ranks
from tests.modes.expert.experts import FORMS, WIDTH, Experts, whole_pass

Batch = tuple[Tensor, Tensor, Tensor]
ALL = ("hidden", "weights", "experts")


def batches_of(ranks: int, experts: int, choices: int, routing: str = "random", dtype: torch.dtype = torch.float64) -> list[Batch]:
    """By rank, its tokens and where they go."""
    made = []
    for rank in range(ranks):
        tokens = {"no tokens": [0, 9][rank > 0]}.get(routing, 7 + 2 * rank)
        logits = torch.randn(tokens, experts)
        if routing == "one rank idle":
            logits[:, experts // ranks * (ranks - 1) :] -= 1e6
        if routing == "skewed":
            logits[:, 0] += 3
        indices = logits.topk(choices, -1).indices
        if routing == "one expert":
            indices = torch.zeros_like(indices)
        if routing == "dropped":
            indices = torch.where(torch.rand(indices.shape) < 0.4, experts, indices)
        made.append((torch.randn(tokens, WIDTH, dtype=dtype), indices, torch.rand(tokens, choices, dtype=dtype)))
    return made


def spread_pass(
    group: ThreadGroup,
    experts: Experts,
    batches: list[Batch],
    grads: list[Tensor],
    layout: Layout,
    delayed: bool = False,
    overlap: bool = True,
    trains: tuple[str, ...] = ALL,
    dispatcher: type[Dispatch] = ExpertDispatch,
) -> dict[str, Any]:
    """One forward and backward of a rank: outputs, gradients and the order of transfers."""
    part = experts.part(group.rank, group.size).requires_grad_("experts" in trains)
    hidden, indices, weights = batches[group.rank]
    hidden, weights = hidden.clone().requires_grad_("hidden" in trains), weights.clone().requires_grad_("weights" in trains)
    out = dispatcher(group, layout, overlap=overlap, delay_wgrad=delayed)(hidden, indices, weights, LocalExperts(part))
    group.events.append(("backward", ""))
    out.backward(grads[group.rank])
    of_parameters = {name: p.grad for name, p in part.named_parameters()}
    return {"out": out.detach(), "hidden": hidden.grad, "weights": weights.grad, **of_parameters, "events": group.events}


def joined(results: list[dict[str, Any]]) -> dict[str, Any]:
    """What the ranks have, as one process has it. A module that all ranks have sums its gradients."""
    events = [result.pop("events") for result in results]
    assert events.count(events[0]) == len(events), "ranks post and wait in one order"
    return {
        key: sum(result[key] for result in results) if "norm" in key else torch.cat([result[key] for result in results])
        for key, value in results[0].items()
        if value is not None
    }


LAYOUTS: list[tuple[Split, int]] = [("experts", 1), ("experts", 2), ("experts+local", 3), ("tokens", 1), ("tokens", 4)]


@pytest.mark.parametrize("routing", ["random", "skewed", "one expert", "one rank idle", "no tokens", "dropped"])
@pytest.mark.parametrize(("ranks", "experts", "choices"), [(1, 4, 2), (2, 5, 1), (2, 8, 2), (3, 7, 2), (4, 8, 8)])
def test_equals_one_process(ranks: int, experts: int, choices: int, routing: str) -> None:
    """Outputs and all gradients, with every dispatcher, expert biases included (AM 2591).

    The weights' gradient is the router's (TF 48687, AM 1260, DS 8213). Ranks and experts without tokens do not hang (MLM 4851, AM 935,
    DS 4966), and such an expert has the gradient zero, so that weight decay and momentum go on (AM 2995).
    """
    torch.manual_seed(0)
    batches = batches_of(ranks, experts, choices, routing)
    grads = [torch.randn_like(hidden) for hidden, _, _ in batches]
    for (split, parts), form in zip(LAYOUTS, itertools.cycle(FORMS)):
        module, layout = Experts(experts, form), Layout(experts, ranks, split, parts)
        computed = joined(on_ranks(ranks, spread_pass, module, batches, grads, layout, parts == 2))
        expected = whole_pass(module, batches, grads)
        for key, value in expected.items():
            assert torch.allclose(computed[key], value, rtol=1e-10, atol=1e-10), (form, layout, key)
    for overlap in (False, True):  # the last layout
        gathered = bits_of(ranks, module, batches, grads, layout, overlap, overlap, ALL, GatherDispatch)
        for key, value in expected.items():
            assert torch.allclose(gathered[key], value, rtol=1e-10, atol=1e-10), (form, overlap, key)


def bits_of(ranks: int, *arguments: Any) -> dict[str, Tensor]:
    return joined(on_ranks(ranks, spread_pass, *arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_overlap_changes_no_bit(dtype: torch.dtype) -> None:
    """Nor does the number of parts, if these are whole experts; nor memory that was not written, which is NaN here (TF 48205)."""
    torch.manual_seed(0)
    batches = batches_of(2, 8, 2, "skewed", dtype)
    grads = [torch.randn_like(hidden) for hidden, _, _ in batches]
    module = Experts(8, "transposed", dtype)
    one_part = bits_of(2, module, batches, grads, Layout(8, 2, "experts", 1), False, False)
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        for split, parts in (*LAYOUTS, ("experts", 4), ("experts", 5)):
            layout = Layout(8, 2, split, parts)
            plain = one_part if split == "experts" else bits_of(2, module, batches, grads, layout, False, False)
            for delayed in (False, True):
                overlapped = bits_of(2, module, batches, grads, layout, delayed, True)
                for key, value in plain.items():
                    assert torch.equal(overlapped[key], value), (layout, delayed, key)
    finally:
        torch.use_deterministic_algorithms(False)


def autocast_pass(group: ThreadGroup, dispatcher: type[Dispatch], split: Split) -> tuple[Tensor, list[tuple[str, torch.dtype]]]:
    """The output of fp32 tokens under autocast, and what was posted in which dtype."""
    posted, all_to_all = [], group.all_to_all

    def note(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        posted.append((kwargs["label"], x.dtype))
        return all_to_all(x, *args, **kwargs)

    group.all_to_all = note  # type: ignore[method-assign]
    torch.manual_seed(1)
    hidden, indices, weights = batches_of(2, 4, 2, dtype=torch.float32)[group.rank]
    experts = Experts(4, dtype=torch.float32).part(group.rank, 2)
    with torch.autocast("cpu", torch.bfloat16):
        out = dispatcher(group, Layout(4, 2, split, 2))(hidden.requires_grad_(), indices, weights, LocalExperts(experts))
    out.sum().backward()
    return out.detach(), posted


@pytest.mark.parametrize(("dispatcher", "split"), [(ExpertDispatch, "experts"), (GatherDispatch, "tokens")])
def test_rows_travel_in_the_dtype_of_the_products(dispatcher: type[Dispatch], split: Split) -> None:
    """Under autocast in 16 bits, there and back, in backward too; outputs are fp32 sums, as without ranks."""
    for out, posted in on_ranks(2, autocast_pass, dispatcher, split):
        rows = {dtype for label, dtype in posted if label.partition("[")[0] in ROWS}
        assert {label.partition("[")[0] for label, _ in posted} >= ROWS
        assert rows == {torch.bfloat16}
        assert out.dtype == torch.float32
        assert not torch.equal(out, out.bfloat16().float()), "not rounded after the sum over ranks"


ROWS = {"expert.dispatch", "expert.combine", "expert.dispatch_grads", "expert.combine_grads"}


def test_part_of_the_layer_is_frozen() -> None:
    torch.manual_seed(0)
    batches, module, layout = batches_of(2, 4, 2), Experts(4, "normed"), Layout(4, 2, "experts+local", 2)
    grads = [torch.randn_like(hidden) for hidden, _, _ in batches]
    expected = whole_pass(module, batches, grads)
    for trains in (("hidden",), ("weights",), ("experts",), ("hidden", "experts")):
        results = on_ranks(2, spread_pass, module, batches, grads, layout, False, True, trains)
        posted = {label.partition("[")[0] for _, label in results[0]["events"]}
        assert ("expert.combine_grads" in posted) == (trains != ("weights",))
        assert ("expert.dispatch_grads" in posted) == ("hidden" in trains)
        computed = joined(results)
        kinds = {key: key if key in ("hidden", "weights") else "experts" for key in expected if key != "out"}
        assert set(computed) - {"out"} == {key for key, kind in kinds.items() if kind in trains}
        for key, value in computed.items():
            assert torch.allclose(value, expected[key], rtol=1e-10, atol=1e-10), (trains, key)


class Unchanged:
    """Experts that return their rows."""

    dtype = torch.float64

    def start(self, *, delay_wgrad: bool) -> Any:
        return lambda rows, experts, sizes: rows


def round_trip(group: ThreadGroup, batches: list[Batch], layout: Layout) -> tuple[Tensor, ...]:
    hidden, indices, weights = batches[group.rank]
    hidden, weights = hidden.clone().requires_grad_(), torch.full_like(weights, 1 / weights.shape[1])
    out = ExpertDispatch(group, layout)(hidden, indices, weights, Unchanged())  # type: ignore[arg-type]
    out.backward(hidden.detach())
    return hidden.detach(), out.detach(), hidden.grad, (indices < layout.experts).double().mean(1, keepdim=True)


@pytest.mark.parametrize(("split", "parts"), LAYOUTS)
def test_round_trip(split: Split, parts: int) -> None:
    """A token comes back as itself, times the share of its pairs that were kept: Megatron's tests of dispatchers."""
    torch.manual_seed(0)
    for ranks, routing in ((1, "random"), (3, "random"), (4, "dropped")):
        for hidden, out, gradient, kept in on_ranks(
            ranks, round_trip, batches_of(ranks, 8, 2, routing), Layout(8, ranks, split, parts)
        ):
            assert torch.allclose(out, hidden * kept)
            assert torch.allclose(gradient, hidden * kept)


def recorded_pass(group: ThreadGroup, experts: Experts, batches: list[Batch], layout: Layout, delayed: bool) -> list[str]:
    """The order of transfers and products: ``>`` posts, ``<`` waits, a number is a product's rows, in backward a gradient's."""
    part, (hidden, indices, weights) = experts.part(group.rank, group.size), batches[group.rank]
    gate, into = part._apply_gate, part.gate_up_proj

    def note(x: Tensor, name: str) -> None:
        group.events.append((name, ""))
        if x.requires_grad:
            x.register_hook(lambda _: group.events.append((name, "")))

    def noted_gate(x: Tensor) -> Tensor:
        note(x, str(len(x)))
        return gate(x)

    part._apply_gate = noted_gate  # type: ignore[method-assign]
    into.register_hook(lambda _: group.events.append(("weights", "")))
    hidden = hidden.clone().requires_grad_()
    shared: list[Tensor] = []

    def run_shared() -> None:
        shared.append(hidden * 2)
        note(shared[0], "shared")

    out = ExpertDispatch(group, layout, delay_wgrad=delayed)(hidden, indices, weights, LocalExperts(part), run_shared) + shared[0]
    group.events.append(("|", ""))
    out.sum().backward()
    signs = {"post": ">", "wait": "<"}
    short = {"expert.dispatch": "D", "expert.combine": "C", "expert.dispatch_grads": "d", "expert.combine_grads": "c"}
    return [signs.get(what, what) + short.get(label[:-3], label) + label[-2:-1] for what, label in group.events]


def test_order() -> None:
    """Forward and backward: what hides a transfer lies between its post and its wait."""
    batches, experts = [], Experts(6)
    for _ in range(2):  # 1 token for expert 0, 2 for expert 1 ...
        indices = torch.arange(6).repeat_interleave(torch.arange(1, 7)).view(-1, 1)
        batches.append((torch.randn(21, WIDTH, dtype=torch.float64), indices, torch.ones(21, 1, dtype=torch.float64)))
    for order in on_ranks(2, recorded_pass, experts, batches, Layout(6, 2, "experts+local", 3), True)[:1]:
        assert " ".join(order) == (
            ">expert.countst <expert.countst >D0 >D1 >D2 shared 1 <D0 1 >C0 <D1 4 >C1 <D2 3 >C2 3 <C0 <C1 <C2 | "
            ">c2 >c1 >c0 3 <c2 3 >d2 <c1 4 >d1 <c0 1 >d0 1 weights shared <d0 <d1 <d2"
        )
