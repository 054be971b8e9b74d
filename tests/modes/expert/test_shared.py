"""Shared experts under dispatch: how a block calls them is found out, and their early computation changes no bit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_overlap.model.expert_layers import ExpertLayer, find_experts
from lightning_overlap.modes.expert.shared import SharedExperts, _State, order_of_calls
from lightning_overlap.steps.forward import Forwards
from tests.helpers.experts import ARCHITECTURES, OwnMoE, build, tiny

BEFORE = {
    *("qwen2_moe", "qwen3_5_moe_text", "qwen3_next", "qwen4_exp_text", "ernie4_5_moe", "laguna", "minimax_m3_vl_text"),
}
SPECIAL = {
    "afmoe": "the order is router, shared, experts",
    "aria_text": "not with the input of model.layers.0.mlp",
    "deepseek_v2": "cannot be run apart from the model",  # its default config has no num_experts_per_tok
    "deepseek_v4": "cannot be run apart from the model",  # its first router looks at token ids
    "inkling_text": "calls model.layers.0.mlp.shared_experts in a way that is not known",  # it passes weights along
}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_orders_of_calls(kind: str) -> None:
    model = build(kind)
    layer = find_experts(model, {}, 2)[1][0]
    order = order_of_calls(model, layer)
    if layer.shared is None:
        assert order.obstacle == "the model has no shared experts"
    elif kind in SPECIAL:
        assert SPECIAL[kind] in order.obstacle
    else:
        assert not order.obstacle
        assert order.when == ("before" if kind in BEFORE else "after")


class Recorder:
    """Dispatches in one process, and notes the order of what runs."""

    def __init__(self, experts: Callable[..., Tensor], events: list[str]) -> None:
        self.experts, self.events = experts, events

    def __call__(self, hidden: Tensor, indices: Tensor, weights: Tensor, shared: Callable[[], None] | None) -> Tensor:
        self.events.append("post")
        hidden = Travel.apply(hidden, self.events, "gradients arrive", "")
        if shared is not None:
            shared()
        self.events.append("wait")
        hidden = Travel.apply(hidden, self.events, "", "gradients leave")
        return self.experts(hidden, indices, weights)


class Travel(torch.autograd.Function):
    """A node that notes its backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, events: list[str], *names: str) -> Tensor:
        ctx.events, ctx.names = events, names
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        ctx.events += filter(None, ctx.names)
        return gradient, None, None, None


def block_of(name: str) -> tuple[nn.Module, ExpertLayer]:
    torch.manual_seed(1)
    model = nn.ModuleDict({"model": tiny(name)})
    layer = find_experts(model, {}, 2)[1][-1]
    return model, layer


def run(name: str, *, early: bool, recompute: bool = False) -> tuple[list[Tensor], list[str]]:
    """Output and gradients of a block, and the order of its events."""
    model, layer = block_of(name)
    events: list[str] = []
    forwards = Forwards()
    assert layer.shared is not None
    shared, experts = model.get_submodule(layer.shared), layer.module
    shared.act_fn.register_forward_hook(lambda *_: events.append("shared"))
    shared.register_forward_hook(lambda *_: events.append("block has shared"))
    order = order_of_calls(model, layer)
    dispatch = Recorder(experts.forward, events)
    undo = list(SharedExperts(model, layer, order, dispatch, forwards, overlapped=early).install())
    block = model.get_submodule(layer.block)
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(2), requires_grad=True)
    y = checkpoint(block, x * 1.0, use_reentrant=False) if recompute else block(x * 1.0)
    y.square().sum().backward()
    assert not forwards.current.of(_State).kept, "nothing that was recomputed is kept alive"
    for function in undo:
        function()
    assert not [module for module in model.modules() if "forward" in vars(module)], "everything is put back"
    return [y, x.grad, *(p.grad for p in block.parameters() if p.grad is not None)], events  # type: ignore[list-item]


@pytest.mark.parametrize("name", ["deepseek", "qwen2"])
def test_early_shared_experts_change_no_bit(name: str) -> None:
    plain, late = run(name, early=False)
    found, events = run(name, early=True)
    assert len(plain) == len(found)
    assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))
    assert late.index("shared") != late.index("post") + 1
    assert events[: events.index("wait") + 1][-3:] == ["post", "shared", "wait"]
    assert events.count("shared") == events.count("block has shared") == 1, "they are computed once"
    assert events[-2:] == ["gradients leave", "gradients arrive"], "their backward lies between these"


@pytest.mark.parametrize("name", ["deepseek", "qwen2"])
def test_recomputed(name: str) -> None:
    plain, _ = run(name, early=False)
    found, events = run(name, early=True, recompute=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))
    assert events.count("shared") == 2


def problem(change: Callable[[Any], None], roles: dict[str, str] | None = None) -> str:
    model = nn.ModuleDict({"moe": OwnMoE()})
    change(model["moe"])
    roles = roles or {"ffns": "experts", "route": "router", "everybody": "shared_experts"}
    return order_of_calls(model, find_experts(model, roles, 2)[1][0]).obstacle


def test_obstacles() -> None:
    assert not problem(lambda moe: None)
    assert "has dropout" in problem(lambda moe: setattr(moe, "everybody", nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.1))))
    assert "the router of moe.ffns is not known" in problem(lambda moe: None, {"ffns": "experts", "everybody": "shared_experts"})

    class Detached(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            _, weights, indices = self.route(x.flatten(0, -2))  # type: ignore[operator]
            y: Tensor = self.ffns(x.flatten(0, -2), indices, weights)  # type: ignore[operator]
            return y.view_as(x) + self.everybody(x.detach().flatten(0, -2)).view_as(x)  # type: ignore[operator]

    model = nn.ModuleDict({"moe": Detached()})
    own = OwnMoE()
    model["moe"].route, model["moe"].ffns, model["moe"].everybody = own.route, own.ffns, own.everybody
    roles = {"ffns": "experts", "route": "router", "everybody": "shared_experts"}
    assert "not with the input of moe" in order_of_calls(model, find_experts(model, roles, 2)[1][0]).obstacle


def test_a_changed_input_is_computed_again() -> None:
    """A block that changes its input in place, after the shared experts have seen it, gets their output for the new input."""
    model = nn.ModuleDict({"moe": OwnMoE()})
    roles = {"ffns": "experts", "route": "router", "everybody": "shared_experts"}
    layer = find_experts(model, roles, 2)[1][0]
    model.moe.ffns.register_forward_hook(lambda module, args, output: args[0].mul_(2))
    x = torch.randn(1, 3, 8)
    expected = model.moe(x.clone())
    dispatch = Recorder(layer.module.forward, [])
    list(SharedExperts(model, layer, order_of_calls(model, layer), dispatch, Forwards(), overlapped=True).install())
    with torch.no_grad():
        torch.testing.assert_close(model.moe(x.clone()), expected)
