"""Experts that are spread over ranks compute what one process computes, whatever the routing, the parts and the order of transfers."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_overlap.modes.expert.dispatch import ExpertDispatch
from lightning_overlap.modes.expert.grouped import LocalExperts
from lightning_overlap.modes.expert.layout import Layout
from tests.helpers.rank_threads import ThreadGroup, on_ranks
from tests.modes.expert.experts import FORMS, WIDTH, Experts, whole_pass

Batch = tuple[Tensor, Tensor, Tensor]


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
) -> dict[str, Any]:
    """One forward and backward of a rank: outputs, gradients and the order of transfers."""
    part = experts.part(group.rank, group.size)
    hidden, indices, weights = batches[group.rank]
    hidden, weights = hidden.clone().requires_grad_(), weights.clone().requires_grad_()
    out = ExpertDispatch(group, layout, overlap=overlap, delay_wgrad=delayed)(hidden, indices, weights, LocalExperts(part))
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
        for key in results[0]
    }


LAYOUTS = [("experts", 1), ("experts", 2), ("experts+local", 3), ("tokens", 1), ("tokens", 4)]


@pytest.mark.parametrize("routing", ["random", "skewed", "one expert", "one rank idle", "no tokens", "dropped"])
@pytest.mark.parametrize(("ranks", "experts", "choices"), [(1, 4, 2), (2, 5, 1), (2, 8, 2), (3, 7, 2), (4, 8, 8)])
def test_equals_one_process(ranks: int, experts: int, choices: int, routing: str) -> None:
    torch.manual_seed(0)
    batches = batches_of(ranks, experts, choices, routing)
    grads = [torch.randn_like(hidden) for hidden, _, _ in batches]
    for (split, parts), form in zip(LAYOUTS, itertools.cycle(FORMS)):
        module, layout = Experts(experts, form), Layout(experts, ranks, split, parts)
        computed = joined(on_ranks(ranks, spread_pass, module, batches, grads, layout, parts == 2))
        for key, value in whole_pass(module, batches, grads).items():
            assert torch.allclose(computed[key], value, rtol=1e-10, atol=1e-10), (form, layout, key)
