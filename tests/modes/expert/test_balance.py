"""Bias balancing and the balancing loss over ranks, alone. In a fit: tests/trainer/expert."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from lightning_overlap.decision import ConfigError
from lightning_overlap.model.expert_layers import ExpertLayer
from lightning_overlap.modes.expert.balance import BIAS, Balance, Router, find_routers, sum_batches, sum_tokens
from lightning_overlap.nn import Experts, MoELayer, TopKRouter
from tests.helpers.threads import on_ranks

HIDDEN, EXPERTS = 8, 4
CONFIG = transformers.DeepseekV3Config(
    hidden_size=HIDDEN, n_routed_experts=EXPERTS, num_local_experts=EXPERTS, n_group=2, topk_group=1, num_experts_per_tok=2
)


def hugging_face_router() -> Any:
    router = DeepseekV3TopkRouter(CONFIG)
    nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(3))
    return router


def own_router() -> TopKRouter:
    router = TopKRouter(HIDDEN, EXPERTS, 2, score="sigmoid", update_bias_rate=0.1)
    nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(3))
    return router


def tokens(rank: int) -> Tensor:
    return torch.randn(6, HIDDEN, generator=torch.Generator().manual_seed(rank)).requires_grad_()


def count(router: Any, x: Tensor) -> Tensor:
    return torch.bincount(router.eval()(x)[2].flatten(), minlength=EXPERTS)


@pytest.mark.parametrize("make", [hugging_face_router, own_router])
def test_a_bias_moves_once_a_step_by_the_tokens_of_all_ranks(make: Any) -> None:
    expected = sum(count(make(), tokens(rank)) for rank in range(2)) * 2  # two microbatches
    moved = 0.1 * (expected.double().mean() - expected).sign().float()
    assert moved.unique().numel() > 1

    def run(group: Any) -> Any:
        router = make()
        balance = Balance([Router("router", router, EXPERTS, 0.1)], group, copies=1)
        router.train()
        for reentrant in (False, True):  # two microbatches, with a validation between them
            output = checkpoint(router, tokens(group.rank), use_reentrant=reentrant)
            output[1].sum().backward()
            router.eval()
            router(tokens(5))[1].sum().backward()
            router.train()
            with torch.no_grad():
                router(tokens(5))
        with balance.trial():
            router(tokens(5))[1].sum().backward()
        assert not getattr(router, BIAS).any()
        balance.post()
        assert not getattr(router, BIAS).any(), "it moves when the sum is there"
        balance.apply()
        balance.apply()
        first = getattr(router, BIAS).clone()
        balance.post()  # a step without tokens
        balance.remove(complete=True)
        return first, getattr(router, BIAS), balance.counts["router"]

    for first, last, counts in on_ranks(2, run):
        torch.testing.assert_close(first, moved)
        torch.testing.assert_close(last, moved)
        assert not counts.any()


def test_a_bias_is_fp32() -> None:
    router = hugging_face_router().bfloat16()
    Balance([Router("router", router, EXPERTS, 0.1)], None, 1)  # type: ignore[arg-type]
    assert router.e_score_correction_bias.dtype == torch.float32
    assert set(router.state_dict()) == {"weight", BIAS}


def test_a_rate_without_a_bias_is_refused() -> None:
    def layers(**routers: nn.Module) -> tuple[nn.Module, list[ExpertLayer]]:
        return nn.ModuleDict(routers), [ExpertLayer("", nn.Identity(), 4, (), router=name) for name in routers]

    model, found = layers(linear=nn.Linear(2, 2), own=own_router())
    with pytest.raises(ConfigError, match=r"update_bias_rate=0.1: no router has a buffer e_score_correction_bias"):
        find_routers(model, found, 0.1)
    assert [(r.name, r.rate) for r in find_routers(model, found, 0.0)] == [("own", 0.1), ("linear", 0.0)]
    model, found = layers(linear=nn.Linear(2, 2), theirs=hugging_face_router())
    assert [(r.name, r.rate) for r in find_routers(model, found, 0.2)] == [("linear", 0.0), ("theirs", 0.2)]


def test_loads() -> None:
    balance = Balance([], None, 1)  # type: ignore[arg-type]
    balance.counts["layer"] = torch.tensor([4, 0, 2, 2])
    assert balance.loads(2) == {
        **{"layer/tokens_of_expert_0": 4, "layer/tokens_of_expert_1": 0, "layer/tokens_of_expert_2": 2, "layer/tokens_of_expert_3": 2},
        "layer/experts_max_over_mean": 2.0,
        **{"layer/tokens_of_rank_0": 4, "layer/tokens_of_rank_1": 4, "layer/ranks_max_over_mean": 1.0},
    }


@pytest.mark.parametrize("whole_batch", [False, True])
def test_the_balancing_loss_is_that_of_all_tokens(whole_batch: bool) -> None:
    """Megatron-LM 5047 and 5798: it does not depend on how tokens are spread over ranks."""
    torch.manual_seed(0)
    router, experts = TopKRouter(HIDDEN, EXPERTS, 2), Experts(EXPERTS, HIDDEN, HIDDEN)
    settings: dict[str, Any] = {"z_loss_coef": 0.1, "aux_loss_coef": 0.5, "global_batch_balance": whole_batch}
    layer = MoELayer(router, experts, **settings)
    parts = [torch.randn(n, HIDDEN, generator=torch.Generator().manual_seed(n)) for n in (5, 2)]
    _, loss = layer(torch.cat(parts))
    (expected,) = torch.autograd.grad(loss, router.weight)

    def run(group: Any) -> Any:
        mine = MoELayer(TopKRouter(HIDDEN, EXPERTS, 2), experts, **settings)
        mine.load_state_dict(layer.state_dict())
        undo = [sum_tokens(mine, group, averaged=2), sum_batches(mine, group)]
        _, loss = mine(parts[group.rank])
        loss.backward()
        for each in undo:
            each()
        assert "post_token_sums" not in vars(mine)
        return loss, mine.router.weight.grad

    results = on_ranks(2, run)
    for each, _ in results:
        torch.testing.assert_close(each, loss)
    torch.testing.assert_close(sum(grad for _, grad in results) / 2, expected)
