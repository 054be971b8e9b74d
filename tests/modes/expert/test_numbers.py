"""Precision, memory and recomputation of experts that are spread over ranks, and that they run on gloo."""

import datetime
import gc
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_overlap.modes.expert import grouped
from lightning_overlap.modes.expert.dispatch import Dispatch, ExpertDispatch
from lightning_overlap.modes.expert.gather import GatherDispatch
from lightning_overlap.modes.expert.grouped import LocalExperts
from lightning_overlap.modes.expert.layout import Layout
from lightning_overlap.nn.moe import Experts as GroupedExperts
from lightning_overlap.ranks.world import make_group
from tests.helpers.rank_threads import ThreadGroup, on_ranks
from tests.helpers.world import World
from tests.modes.expert.experts import INNER, WIDTH, Experts, whole_pass
from tests.modes.expert.test_dispatch import Batch, batches_of, joined, spread_pass

LAYOUT = Layout(8, 2, "experts+local", 3)


def with_dtype(batches: list[Batch], dtype: torch.dtype) -> list[Batch]:
    return [(hidden.to(dtype), indices, weights.to(dtype)) for hidden, indices, weights in batches]


def test_16_bit() -> None:
    """Errors are those of 16-bit experts of one process."""
    torch.manual_seed(0)
    batches, module = batches_of(2, 8, 2), Experts(8, "transposed")
    grads = [torch.randn_like(hidden) for hidden, _, _ in batches]
    exact = whole_pass(module, batches, grads)
    low = module.to(torch.bfloat16), with_dtype(batches, torch.bfloat16), [grad.bfloat16() for grad in grads]
    one_process, spread = whole_pass(*low), joined(on_ranks(2, spread_pass, *low, LAYOUT))
    for key, value in exact.items():
        ours, theirs = (float((each[key] - value).norm() / value.norm()) for each in (spread, one_process))
        assert ours <= 1.5 * theirs, (key, ours, theirs)
        assert ours > 1e-4, "computed in 16 bits"


def autocast_pass(group: ThreadGroup, *arguments: Any) -> tuple[dict[str, Any], int]:
    with torch.autocast("cpu", torch.bfloat16):
        result = spread_pass(group, *arguments)  # type: ignore[arg-type]
    return result, group.nbytes


def test_autocast() -> None:
    """Rows travel in autocast's dtype, and gradients come in the parameters' dtype."""
    torch.manual_seed(0)
    batches, module = with_dtype(batches_of(2, 8, 2), torch.float32), Experts(8, dtype=torch.float32)
    grads = [torch.randn_like(hidden) for hidden, _, _ in batches]
    exact = whole_pass(module, batches, grads)
    results, sizes = zip(*on_ranks(2, autocast_pass, module, batches, grads, LAYOUT), strict=True)
    for key, value in joined(list(results)).items():
        assert value.dtype == torch.float32
        assert 1e-4 < float((value - exact[key]).norm() / exact[key].norm()) < 2e-2, key
    whole_width = on_ranks(2, lambda group: (spread_pass(group, module, batches, grads, LAYOUT), group.nbytes)[1])
    of_counts = 8 // 2 * 8
    assert [2 * (nbytes - of_counts) for nbytes in sizes] == [nbytes - of_counts for nbytes in whole_width]


class Unchanged:
    """Experts that return their rows, in 16 bits."""

    dtype = torch.bfloat16

    def start(self, *, delay_wgrad: bool) -> Any:
        return lambda rows, experts, sizes: rows


def weighted_pass(group: ThreadGroup, dispatcher: Any, batches: list[Batch]) -> tuple[Tensor, list[Tensor]]:
    """The output, and in fp32 what the experts of each rank give to it."""
    hidden, indices, weights = batches[group.rank]
    hidden, layout = hidden.bfloat16().float(), Layout(8, 2, "tokens", 3)
    with torch.autocast("cpu", torch.bfloat16):
        output = dispatcher(group, layout)(hidden, indices, weights, Unchanged())
    of_ranks = []
    for rank in range(2):
        mine = layout.experts_of(rank)
        factors = weights * ((indices >= mine.start) & (indices < mine.stop))
        of_ranks.append(sum(hidden * factor.unsqueeze(1) for factor in factors.unbind(1)))
    return output, of_ranks


@pytest.mark.parametrize("dispatcher", [ExpertDispatch, GatherDispatch])
def test_autocast_rounds_no_weights(dispatcher: Any) -> None:
    """Routers compute in fp32, and outputs of experts are weighted in fp32. Where a rank sends a sum, it rounds that, once."""
    torch.manual_seed(0)
    for output, of_ranks in on_ranks(2, weighted_pass, dispatcher, with_dtype(batches_of(2, 8, 2), torch.float32)):
        sent = [x.bfloat16().float() for x in of_ranks] if dispatcher is GatherDispatch else of_ranks
        torch.testing.assert_close(output, sum(sent), rtol=1e-6, atol=1e-6)


def saved_bytes(compute: Callable[[], Tensor], parameters: list[Tensor]) -> int:
    """Bytes that a forward keeps for backward, without parameters."""
    kept: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        compute()
    known = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    return sum(x.untyped_storage().nbytes() for pointer, x in kept.items() if pointer not in known)


def test_memory_kept_for_backward() -> None:
    """The values of each row once, and the weights: less than in one process, which also keeps where rows go."""
    tokens, choices = 64, 2
    module = GroupedExperts(8, WIDTH, INNER)
    hidden, weights = torch.randn(tokens, WIDTH, requires_grad=True), torch.rand(tokens, choices, requires_grad=True)
    indices = torch.rand(tokens, 8).topk(choices, -1).indices

    def spread(group: ThreadGroup) -> int:
        dispatch = ExpertDispatch(group, Layout(8, 1, "experts", 4))
        return saved_bytes(lambda: dispatch(hidden, indices, weights, LocalExperts(module)), list(module.parameters()))

    unsharded = saved_bytes(lambda: module(hidden, indices, weights), list(module.parameters()))
    of_row = WIDTH + 2 * INNER + INNER + INNER + WIDTH  # as it came, gate and up, the activation, their product, as it goes back
    assert on_ranks(1, spread)[0] == (tokens * choices * of_row + tokens * choices) * 4 < unsharded


def recomputed_pass(group: ThreadGroup, module: Experts, batches: list[Batch], recompute: bool) -> list[Tensor]:
    part, (hidden, indices, weights) = module.part(group.rank, group.size), batches[group.rank]
    hidden, weights = hidden.clone().requires_grad_(), weights.clone().requires_grad_()
    layer = ExpertDispatch(group, LAYOUT, delay_wgrad=True)

    def block(x: Tensor, weights: Tensor) -> Tensor:
        return x + layer(x.tanh(), indices, weights, LocalExperts(part))

    for _ in range(2):  # steps of two layers: the backward of the second comes before the recomputation of the first
        options: Any = {"use_reentrant": False, "preserve_rng_state": False}
        hidden_out = checkpoint(block, hidden, weights, **options) if recompute else block(hidden, weights)
        out = checkpoint(block, hidden_out, weights, **options) if recompute else block(hidden_out, weights)
        out.square().sum().backward()
    return [out.detach(), hidden.grad, weights.grad, *(p.grad for p in part.parameters())]  # type: ignore[list-item]


def test_activation_checkpointing_changes_no_bit() -> None:
    torch.manual_seed(0)
    batches, module = batches_of(2, 8, 2, "skewed"), Experts(8)
    kept, recomputed = (on_ranks(2, recomputed_pass, module, batches, recompute) for recompute in (False, True))
    for a, b in zip(kept, recomputed, strict=True):
        assert all(map(torch.equal, a, b))


def grouped_mm(x: Tensor, other: Tensor, *, offs: Tensor) -> Tensor:
    """torch's operator; a gradient of an expert without rows is not written, as on CUDA (PT 154557)."""
    products = F.grouped_mm(x, other, offs=offs)
    if products.dim() == 3:
        products[torch.diff(offs, prepend=offs.new_zeros(1)) == 0] = torch.nan
    return products


def test_grouped_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator that CUDA uses, here on the CPU: equal up to rounding, and experts without rows have the gradient zero."""
    torch.manual_seed(0)
    layout = Layout(8, 2, "experts", 1)
    for form, routing in (("gated", "one expert"), ("transposed", "skewed")):
        batches, module = with_dtype(batches_of(2, 8, 2, routing), torch.float32), Experts(8, form, torch.float32)
        grads = [torch.randn_like(hidden) for hidden, _, _ in batches]
        loop = joined(on_ranks(2, spread_pass, module, batches, grads, layout))
        with monkeypatch.context() as patch:
            patch.setattr(grouped, "can_group", lambda x, other: len(x) > 0)
            patch.setattr(grouped, "F", SimpleNamespace(grouped_mm=grouped_mm))
            kernel = joined(on_ranks(2, spread_pass, module, batches, grads, layout))
        for key, value in loop.items():
            assert torch.allclose(kernel[key], value, rtol=1e-4, atol=1e-5), (form, key)


def pass_on_gloo(batches: list[Batch], module: Experts, grads: list[Tensor]) -> dict[str, Any]:
    group: Any = make_group([list(range(dist.get_world_size()))], "expert", datetime.timedelta(seconds=30), gathers=False)
    group.events = []
    try:
        return spread_pass(group, module, batches, grads, Layout(8, group.size, "experts+local", 2), True)
    finally:
        group.close()


@pytest.mark.parametrize("size", [2, 4])
def test_on_gloo(world: Callable[[int], World], size: int) -> None:
    torch.manual_seed(0)
    batches, module = batches_of(size, 8, 2, "skewed"), Experts(8)
    grads = [torch.randn_like(hidden) for hidden, _, _ in batches]
    on_gloo = joined(world(size).run(pass_on_gloo, batches, module, grads))
    in_threads = joined(on_ranks(size, spread_pass, module, batches, grads, Layout(8, size, "experts+local", 2), True))
    for key, value in in_threads.items():
        assert torch.equal(on_gloo[key], value), key


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("dispatcher", [ExpertDispatch, GatherDispatch])
def test_graph_is_freed(dispatcher: type[Dispatch], backward: bool) -> None:
    """Without garbage collection, which does not see cycles through autograd's nodes."""

    def run(group: ThreadGroup) -> Any:
        (hidden, indices, weights), module = batches_of(1, 8, 2)[0], Experts(8)
        hidden = hidden.clone().requires_grad_()
        out = dispatcher(group, Layout(8, 1, "experts+local", 3), delay_wgrad=True)(hidden, indices, weights, LocalExperts(module))
        if backward:
            out.sum().backward()
        return weakref.ref(hidden), weakref.ref(module.down_proj)

    gc.disable()
    try:
        assert [reference() for reference in on_ranks(1, run)[0]] == [None, None]
    finally:
        gc.enable()
