"""AutoModel 3325 and 3140, torchtitan 3336: a recompute rounds otherwise, and routers must choose as in the forward."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from lightning_overlap.modes.expert.replay import RoutingReplay
from lightning_overlap.nn import Experts, MoELayer, TopKRouter
from lightning_overlap.steps.forward import Forwards

HIDDEN = 8
SIZES = {"hidden_size": HIDDEN, "num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 8, "moe_intermediate_size": 8}
DEEPSEEK = {**SIZES, "n_routed_experts": 8, "n_shared_experts": 1, "n_group": 4, "topk_group": 2}


class SwitchRouter(nn.Module):
    """A router that chooses by ``max``."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(8, HIDDEN))

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = F.linear(hidden, self.weight)
        weights, indices = logits.softmax(-1).max(dim=-1)
        assert torch.equal(logits.argmax(-1), indices)
        return logits, weights[:, None], indices[:, None]


KINDS = {
    "own": lambda: MoELayer(TopKRouter(HIDDEN, 8, 2), Experts(8, HIDDEN, 8)),
    "mixtral": lambda: MixtralSparseMoeBlock(transformers.MixtralConfig(**SIZES)),
    "deepseek": lambda: DeepseekV3MoE(transformers.DeepseekV3Config(**DEEPSEEK)),
    "gpt_oss": lambda: GptOssMLP(transformers.GptOssConfig(**SIZES)),
    "switch": lambda: Switch(),
}


class Switch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = SwitchRouter(), Experts(8, HIDDEN, 8)

    def forward(self, x: Tensor) -> Tensor:
        _, weights, indices = self.router(x.flatten(0, 1))
        return self.experts(x.flatten(0, 1), indices, weights).view_as(x)


class Net(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(KINDS[kind]() for _ in range(2))
        self.routers = [block.router if hasattr(block, "router") else block.gate for block in self.blocks]
        for module in self.modules():
            if hasattr(getattr(module, "config", None), "_experts_implementation"):
                module.config._experts_implementation = "eager"
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5, generator=generator)
        for router in self.routers:
            nn.init.zeros_(router.weight)  # all scores are tied
            if getattr(router, "bias", None) is not None:
                nn.init.zeros_(router.bias)

    def forward(self, x: Tensor, calls: int, reentrant: bool | None) -> Tensor:
        total = torch.zeros(())
        for call in range(calls):
            y = x + call
            for block in self.blocks:
                out = block(y) if reentrant is None else checkpoint(block, y, use_reentrant=reentrant)
                y = y + (out[0] if isinstance(out, tuple) else out)
            total = total + y.square().mean()
        return total


@contextmanager
def rounding_otherwise(routers: list[Any]) -> Iterator[None]:
    """Inside, the scores of routers are no longer tied. Afterwards they are again."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        before = [router.weight.clone() for router in routers]
        for router in routers:
            router.weight += 1e-7 * torch.randn(router.weight.shape, generator=generator)
        yield
        for router, weight in zip(routers, before, strict=True):
            router.weight.copy_(weight)


def gradients(kind: str, reentrant: bool | None, calls: int, *, replayed: bool = False) -> tuple[list[Tensor], list[Tensor]]:
    """The gradients of the parameters and the input, and the choices of the routers in the forward and in the recompute."""
    net, forwards = Net(kind), Forwards()
    replay = RoutingReplay(forwards, net.routers if replayed else [])
    chosen: list[Tensor] = []
    for router in net.routers:
        router.register_forward_hook(lambda module, args, output: chosen.append(output[2].sort(-1).values))
    x = torch.randn(2, 6, HIDDEN, generator=torch.Generator().manual_seed(1)).requires_grad_()
    forward = forwards.start()
    loss = net(x, calls, reentrant)
    with rounding_otherwise(net.routers if reentrant is not None else []), forwards.backward(forward), torch.enable_grad():
        loss.backward()
    replay.remove()
    assert not any("forward" in vars(router) for router in net.routers)
    return [x.grad, *(p.grad for p in net.parameters() if p.grad is not None)], chosen


@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_recompute_routes_as_the_forward(kind: str, reentrant: bool, calls: int) -> None:
    expected, forward = gradients(kind, None, calls)
    replayed, chosen = gradients(kind, reentrant, calls, replayed=True)
    assert len(chosen) == 2 * len(forward), "each router is called again"
    recomputed = sorted(chosen[len(forward) :], key=str)
    assert all(map(torch.equal, recomputed, sorted(forward, key=str)))
    for ours, whole in zip(replayed, expected, strict=True):
        torch.testing.assert_close(ours, whole, rtol=1e-3, atol=1e-4)  # gradients of other experts are far from these


def test_without_it_other_experts_are_chosen() -> None:
    """What the other tests rest on."""
    _, forward = gradients("mixtral", None, 1)
    try:
        _, chosen = gradients("mixtral", True, 1)
    except RuntimeError:  # rows of another shape
        return
    assert not all(map(torch.equal, sorted(chosen[2:], key=str), sorted(forward, key=str)))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_bit_equal_to_those_without_it(kind: str) -> None:
    expected, _ = gradients(kind, None, 1)
    ours, _ = gradients(kind, None, 1, replayed=True)
    assert all(map(torch.equal, ours, expected))


def test_evaluation_is_left_alone() -> None:
    net, forwards = Net("mixtral").eval(), Forwards()
    RoutingReplay(forwards, net.routers)
    net(torch.randn(1, 3, HIDDEN), 1, None)
    assert not vars(forwards.current)["_states"]
