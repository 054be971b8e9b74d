"""The flex dispatcher against a stand-in for DeepEP."""

import itertools
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from lightning_overlap import ConfigError, ExpertParallel
from lightning_overlap.decision import Choice
from lightning_overlap.facts import Facts
from lightning_overlap.modes.expert import config, deep_ep
from lightning_overlap.modes.expert.config import ExpertFacts, decide
from lightning_overlap.modes.expert.deep_ep import Buffers
from lightning_overlap.modes.expert.flex import FlexDispatch
from lightning_overlap.modes.expert.grouped import LocalExperts
from lightning_overlap.modes.expert.layout import Layout
from lightning_overlap.modes.expert.mode import ExpertMode
from lightning_overlap.ranks.degrees import Degrees
from tests.helpers.deep_ep import StandIn
from tests.helpers.rank_threads import ThreadGroup, on_ranks
from tests.modes.expert.experts import FORMS, WIDTH, Experts, whole_pass
from tests.modes.expert.test_dispatch import Batch, batches_of, joined
from tests.trainer.expert.fits import compare, fit


def flex_pass(
    group: ThreadGroup,
    experts: Experts,
    batches: list[Batch],
    grads: list[Tensor],
    parts: int,
    overlap: bool,
    trains: tuple[str, ...] = ("hidden", "weights", "experts"),
) -> dict[str, Any]:
    """One forward and backward of a rank."""
    part, stand_in = experts.part(group.rank, group.size).requires_grad_("experts" in trains), StandIn(torch.float64)
    hidden, indices, weights = batches[group.rank]
    hidden, weights = hidden.clone().requires_grad_("hidden" in trains), weights.clone().requires_grad_("weights" in trains)
    buffers, layout = Buffers(stand_in.library, group), Layout(len(experts.down_proj), group.size, "tokens", parts)
    dispatch = FlexDispatch(group, layout, overlap=overlap, delay_wgrad=overlap, buffers=buffers)
    out = dispatch(hidden, indices, weights, LocalExperts(part))
    out.backward(grads[group.rank])
    buffers.close()
    assert not stand_in.buffers, "destroyed before the group ends"
    of_parameters = {name: p.grad for name, p in part.named_parameters()}
    return {"out": out.detach(), "hidden": hidden.grad, "weights": weights.grad, **of_parameters, "events": group.events}


def in_fp32(batches: list[Batch]) -> list[Batch]:
    """Weights that fp32 has, in which DeepEP sends them."""
    return [(hidden, indices, weights.float().to(weights.dtype)) for hidden, indices, weights in batches]


@pytest.mark.parametrize("routing", ["random", "skewed", "one expert", "one rank idle", "no tokens", "dropped"])
def test_equals_one_process(routing: str) -> None:
    """Outputs and all gradients, and with overlap the bits of without. Ranks and experts without tokens; dropped pairs."""
    torch.manual_seed(0)
    forms = itertools.cycle(FORMS)
    for ranks, experts, choices, parts in ((1, 4, 2, 2), (2, 8, 2, 1), (2, 6, 1, 4), (3, 9, 3, 3)):
        batches, module = in_fp32(batches_of(ranks, experts, choices, routing)), Experts(experts, next(forms))
        grads = [torch.randn_like(hidden) for hidden, _, _ in batches]
        expected = whole_pass(module, batches, grads)
        plain, overlapped = (joined(on_ranks(ranks, flex_pass, module, batches, grads, parts, overlap)) for overlap in (False, True))
        assert set(plain) == set(expected)
        for key, value in expected.items():
            within = 1e-6 if key == "weights" else 1e-10  # their gradients travel in fp32
            assert torch.allclose(plain[key], value, rtol=within, atol=within), (ranks, key)
            assert torch.equal(overlapped[key], plain[key]), (ranks, key)


@pytest.mark.parametrize("trains", [("hidden",), ("weights",), ("experts",)])
def test_part_of_the_layer_is_frozen(trains: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    batches, module = in_fp32(batches_of(2, 4, 2)), Experts(4)
    grads = [torch.randn_like(hidden) for hidden, _, _ in batches]
    expected = whole_pass(module, batches, grads)
    results = on_ranks(2, flex_pass, module, batches, grads, 2, True, trains)
    posted = {label.partition("[")[0] for _, label in results[0]["events"]}
    assert ("expert.dispatch_grads" in posted) == (trains != ("experts",))
    computed = joined(results)
    assert ("hidden" in computed, "weights" in computed, "down_proj" in computed) == tuple(
        name in trains for name in ("hidden", "weights", "experts")
    )
    for key, value in computed.items():
        assert torch.allclose(value, expected[key], rtol=1e-6, atol=1e-6), key


def recorded_pass(group: ThreadGroup) -> list[str]:
    """The calls of DeepEP, products and shared experts, in their order."""
    stand_in, experts = StandIn(torch.float64), Experts(4).part(group.rank, group.size)
    calls, gate = stand_in.calls, experts._apply_gate

    def noted_gate(x: Tensor) -> Tensor:
        calls.append("product")
        x.register_hook(lambda _: calls.append("product"))
        return gate(x)

    experts._apply_gate = noted_gate  # type: ignore[method-assign]
    hidden = torch.randn(12, WIDTH, dtype=torch.float64, requires_grad=True)
    indices = torch.arange(12).view(12, 1) % 4
    layout, buffers = Layout(4, group.size, "tokens", 3), Buffers(stand_in.library, group)
    dispatch = FlexDispatch(group, layout, buffers=buffers)
    out = dispatch(hidden, indices, torch.ones(12, 1), LocalExperts(experts), lambda: calls.append("shared"))
    calls.append("|")
    out.sum().backward()
    short = {"dispatch after": ">D", "dispatch": ">d", "combine": ">C", "wait": "<"}
    return [short.get(call, call) for call in calls]


def test_order() -> None:
    """The next part is posted under the products of this one, and depends only on what was done before the first."""
    for calls in on_ranks(2, recorded_pass):
        assert " ".join(calls) == (
            "capture >D shared < product >D >C < product >D >C < product >C < < < | "
            ">d >d >d < product >C < product >C < product >C < < <"
        )


def test_buffers_at_least_double_and_old_ones_stay_for_their_backward() -> None:
    made: list[dict[str, Any]] = []

    def make(group: Any, **settings: Any) -> Any:
        made.append(settings)
        return mock.Mock()

    buffers = Buffers(deep_ep.Library(make, torch.int64), mock.Mock())
    first = buffers.get(5, 8, 2)
    assert buffers.get(4, 8, 2) is first
    assert buffers.get(6, 8, 2).tokens == 10
    assert buffers.get(30, 8, 2).tokens == 30
    assert buffers.get(5, 16, 2) is not first
    assert [settings["num_max_tokens_per_rank"] for settings in made] == [5, 10, 30, 5]
    buffers.close()
    first._buffer.destroy.assert_called_once_with()


def wrong_dtype(group: ThreadGroup) -> None:
    dispatch = FlexDispatch(group, Layout(4, 1, "tokens", 1), buffers=Buffers(StandIn(torch.bfloat16).library, group))
    hidden, indices, weights = batches_of(1, 4, 2)[0]
    with pytest.raises(ConfigError, match=r"flex sums tokens in torch.bfloat16, and the experts compute in torch.float64"):
        dispatch(hidden, indices, weights, LocalExperts(Experts(4)))


def test_tokens_in_a_dtype_that_it_cannot_sum_are_refused() -> None:
    on_ranks(1, wrong_dtype)


@pytest.mark.parametrize("names", [{}, {"ElasticBuffer": SimpleNamespace(dispatch=lambda x, do_expand: None)}])
def test_an_old_version_is_refused(names: dict[str, Any]) -> None:
    with (
        mock.patch.dict("sys.modules", deep_ep=SimpleNamespace(**names)),
        pytest.raises(ConfigError, match=r"needs DeepEP 2\.1 or newer"),
    ):
        deep_ep.library()


def test_a_version_that_cannot_be_imported_is_refused() -> None:
    with mock.patch.dict("sys.modules", deep_ep=None), pytest.raises(ConfigError, match=r"which cannot be imported .*: build it for"):
        deep_ep.library()


def test_the_newer_name_of_the_buffer_comes_first() -> None:
    newer = SimpleNamespace(dispatch=lambda x, do_zero_padding: None)
    module = SimpleNamespace(EPBuffer=newer, ElasticBuffer=None, topk_idx_t=torch.int32)
    with mock.patch.dict("sys.modules", deep_ep=module):
        assert deep_ep.library() == deep_ep.Library(newer, torch.int32)  # type: ignore[arg-type]


def planned(experts: int = 8, **facts: Any) -> Any:
    about = {"device": "cuda", "precision": "bf16-mixed", "deep_ep": True, **facts}
    model = ExpertFacts("", experts, "", counts=(experts,))
    return decide(
        ExpertParallel(size=2, dispatcher="flex"), Degrees(data=2, expert=2), Facts(2, **about, of_modes=(model,)), overlap=True
    )


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"device": "cpu"}, "it needs CUDA, and the device is cpu"),
        ({"deep_ep": False}, r"DeepEP is not installed \(deep_ep 2.1 or newer, .*HybridEP and NCCL-EP"),
        ({"precision": "32-true"}, "precision is 32-true: set precision: bf16-mixed"),
        ({"experts": 5}, "5 are not divisible by 2"),
        ({"device": "cpu", "deep_ep": False}, "needs CUDA, .*DeepEP is not installed.*Or use dispatcher: alltoall"),
    ],
)
def test_it_is_refused_where_it_cannot_run(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=f"expert_parallel.dispatcher: flex cannot run here: .*{words}"):
        planned(**given)


def test_the_plan_says_that_it_was_never_run() -> None:
    choices = planned()
    assert (choices.dispatcher.value, choices.split.value) == ("flex", "tokens")
    assert choices.dispatcher.why.endswith("(never run by the authors)")


def test_the_first_step_is_compared_only_where_it_is_in_bf16() -> None:
    """The comparison turns autocast off."""
    assert planned().first_step_blocker == "expert_parallel.dispatcher: flex computes only in bf16"
    assert not planned(precision="bf16-true").first_step_blocker


def fit_with_stand_in(*arguments: Any) -> Any:
    stand_in = StandIn(torch.float32)
    with (
        mock.patch.object(deep_ep, "library", return_value=stand_in.library),
        mock.patch.object(config, "_against_flex", return_value=[]),
    ):
        told = fit(*arguments)
    assert not stand_in.buffers
    return {**told, "calls": stand_in.calls}


@pytest.mark.parametrize(("name", "strategy"), [("qwen2", {}), ("gpt_oss", {"overlap": "off"})])
def test_training_is_that_of_one_process(world: Any, name: str, strategy: dict[str, Any]) -> None:
    expected = fit(None, name)
    ranks = world(2).run(fit_with_stand_in, {"expert_parallel": ExpertParallel(size=2, dispatcher="flex"), **strategy}, name)
    compare(ranks, expected)
    for each in ranks:
        assert "dispatcher flex flex" in each["plan"]
        assert each["calls"].count("combine") >= 5 * 2 * 2  # of five steps, two layers, forward and backward


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather", "flex"])
def test_transfers_of_deep_ep_are_said_to_be_unseen(dispatcher: str) -> None:
    mode: Any = object.__new__(ExpertMode)
    mode.choices = SimpleNamespace(dispatcher=Choice(dispatcher, dispatcher, ""))
    assert mode.uncounted_transfers.startswith("expert_parallel.dispatcher flex sends by kernels of DeepEP") == (dispatcher == "flex")
