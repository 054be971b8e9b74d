"""The mixture of experts, alone in one process."""

import copy
import pickle
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.mixtral.modeling_mixtral import MixtralExperts, MixtralTopKRouter, load_balancing_loss_func

from lightning_overlap.decision import ConfigError
from lightning_overlap.nn import Experts, MoELayer, TopKRouter, update_router_biases
from lightning_overlap.nn.moe import capacity_of, update_bias, within_capacity

TOKENS, HIDDEN, INNER, EXPERTS = 16, 8, 6, 4


def make_layer(*, top_k: int = 2, gated: bool = True, shared: bool = False, inner: int = INNER, **given: Any) -> MoELayer:
    """A layer; settings of the router and of the layer by name."""
    torch.manual_seed(0)
    router = {name: given.pop(name) for name in ("score", "normalize", "update_bias_rate") if name in given}
    activation = given.pop("activation", F.silu)
    experts = Experts(EXPERTS, HIDDEN, inner, gated=gated, activation=activation)
    shared_experts = nn.Linear(HIDDEN, HIDDEN) if shared else None
    return MoELayer(TopKRouter(HIDDEN, EXPERTS, top_k, **router), experts, shared_experts, **given)


SIZES = {"hidden_size": HIDDEN, "num_local_experts": EXPERTS, "num_experts_per_tok": 2}


def tokens(count: int = TOKENS, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, HIDDEN, dtype=dtype, generator=torch.Generator().manual_seed(1))


def one_by_one(experts: Experts, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Every token and each of its experts by itself."""
    rows = []
    for token, chosen, shares in zip(hidden, indices, weights, strict=True):
        row = torch.zeros_like(token)
        for expert, share in zip(chosen.tolist(), shares, strict=True):
            if expert == experts.num_experts:
                continue
            if experts.has_gate:
                gate, up = (experts.gate_up_proj[expert] @ token).chunk(2)
                inner = F.silu(gate) * up
            else:
                inner = F.silu(experts.up_proj[expert] @ token)
            row = row + share * (experts.down_proj[expert] @ inner)
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("gated", [True, False])
def test_experts_compute_what_each_computes_by_itself(gated: bool) -> None:
    torch.manual_seed(0)
    experts = Experts(EXPERTS, HIDDEN, INNER, gated=gated).double()
    indices = torch.tensor([[0, 2], [2, 0], [2, 4], [4, 4], [0, 2]])  # expert 1 and 3 have no token, 4 is no expert
    results = []
    for compute in (experts, lambda *given: one_by_one(experts, *given)):
        hidden, weights = tokens(5).requires_grad_(), torch.rand(5, 2, dtype=torch.float64).fill_(0.3).requires_grad_()
        output = compute(hidden, indices, weights)
        parameters = list(experts.parameters())
        grads = torch.autograd.grad(output.sin().sum(), [hidden, weights, *parameters], allow_unused=compute is not experts)
        results.append((output, *grads))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)
    assert not results[0][-1][1].any(), "an expert without tokens has the gradient zero"


def test_experts_are_hugging_faces() -> None:
    torch.manual_seed(0)
    ours, theirs = Experts(EXPERTS, HIDDEN, INNER), MixtralExperts(transformers.MixtralConfig(**SIZES, intermediate_size=INNER))
    theirs.config._experts_implementation = "eager"
    theirs.load_state_dict(ours.state_dict())
    for flag in ("has_gate", "has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm", "num_experts"):
        assert getattr(ours, flag) == getattr(theirs, flag)
    hidden, indices, weights = tokens(5, torch.float32), torch.tensor([[0, 2], [2, 0], [2, 1], [1, 3], [0, 2]]), torch.rand(5, 2)
    torch.testing.assert_close(ours(hidden, indices, weights), theirs(hidden, indices, weights))


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_routers_are_hugging_faces(score: Any) -> None:
    torch.manual_seed(0)
    ours = TopKRouter(HIDDEN, EXPERTS, 2, score=score, scale=2.5 if score == "sigmoid" else 1.0, update_bias_rate=0.1)
    theirs: Any = MixtralTopKRouter(transformers.MixtralConfig(**SIZES))
    if score == "sigmoid":
        theirs = DeepseekV3TopkRouter(
            transformers.DeepseekV3Config(
                **{**SIZES, "n_routed_experts": EXPERTS, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.5}
            )
        )
        ours.e_score_correction_bias.copy_(torch.tensor([0.3, -0.2, 0.1, 0.0]))
    theirs.load_state_dict(ours.state_dict(), strict=score == "sigmoid")
    hidden = tokens(dtype=torch.float32)
    logits, weights, indices = ours(hidden)
    their_logits, their_weights, their_indices = theirs(hidden)
    torch.testing.assert_close(logits, their_logits)
    order, their_order = indices.argsort(-1), their_indices.argsort(-1)
    assert torch.equal(indices.gather(-1, order), their_indices.gather(-1, their_order))
    torch.testing.assert_close(weights.gather(-1, order), their_weights.gather(-1, their_order))


def test_scores_are_fp32_in_any_precision() -> None:
    layer = make_layer(update_bias_rate=0.001)
    x = tokens(dtype=torch.float32)
    layer.router.e_score_correction_bias.fill_(1 / 3)
    bias = layer.router.e_score_correction_bias.clone()
    expected = layer.router(x.bfloat16().float())[0]
    with torch.autocast("cpu", torch.bfloat16):
        output, loss = layer(x.bfloat16())
        assert torch.equal(layer.router(x.bfloat16())[0], expected)
    assert (output.dtype, loss.dtype) == (torch.bfloat16, torch.float32)
    layer.bfloat16()
    assert torch.equal(layer.router.e_score_correction_bias, bias)
    assert layer.router(x.bfloat16())[0].dtype == torch.float32
    assert torch.equal(layer.state_dict()["router.e_score_correction_bias"], bias)
    assert layer(x.bfloat16())[0].dtype == torch.bfloat16


def test_balancing_loss_is_switch_transformers() -> None:
    layer = make_layer(aux_loss_coef=0.02)
    _, loss = layer(tokens(dtype=torch.float32).view(2, 8, HIDDEN))
    (gradient,) = torch.autograd.grad(loss, layer.router.weight)
    logits = layer.router(tokens(dtype=torch.float32))[0]
    expected = 0.02 / 2 * load_balancing_loss_func((logits,), EXPERTS, 2)  # theirs counts a token k times
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, layer.router.weight)[0])
    layer.aux_loss_coef, layer.z_loss_coef = 0.0, 0.1
    z = layer.router(tokens(dtype=torch.float32))[0].exp().sum(-1).log().square().mean()
    torch.testing.assert_close(layer(tokens(dtype=torch.float32))[1], 0.1 * z)
    with torch.no_grad():
        layer.router.weight.zero_()  # all scores are equal
    layer.aux_loss_coef, layer.z_loss_coef = 1.0, 0.0
    torch.testing.assert_close(layer(tokens(dtype=torch.float32))[1], torch.tensor(1.0))


def test_shared_experts_are_added() -> None:
    layer = make_layer(shared=True, gated=False)
    x = tokens(dtype=torch.float32)
    output, _ = layer(x)
    _, weights, indices = layer.router(x)
    torch.testing.assert_close(output, layer.experts(x, indices, weights) + layer.shared_experts(x))


@pytest.mark.parametrize(("tokens", "factor", "capacity"), [(32, 0.5, 2), (32, 1.0, 4), (33, 1.0, 5)])
def test_capacity(tokens: int, factor: float, capacity: int) -> None:
    assert capacity_of(tokens, 8, factor) == capacity


@pytest.mark.parametrize("policy", ["probs", "position"])
def test_an_expert_takes_at_most_its_capacity(policy: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    indices = torch.rand(TOKENS, EXPERTS, generator=generator).topk(2).indices
    weights = torch.rand(TOKENS, 2, generator=generator)
    kept = within_capacity(indices, weights, EXPERTS, 5, policy)
    expected = torch.zeros_like(kept)
    for expert in range(EXPERTS):
        choices = [(token, k) for token in range(TOKENS) for k in range(2) if indices[token, k] == expert]
        if policy == "probs":
            choices.sort(key=lambda choice: -weights[choice])
        for choice in choices[:5]:
            expected[choice] = True
    assert torch.equal(kept, expected)
    assert not kept.all()


def test_what_passes_an_expert_by_adds_nothing() -> None:
    """Oracle: equal weights and experts that return their input give the input times the share of its choices that was kept."""
    layer = make_layer(inner=HIDDEN, gated=False, activation=lambda x: x, capacity_factor=0.75, normalize=False)
    for weight in layer.experts.parameters():
        weight.data.copy_(torch.eye(HIDDEN).expand_as(weight))
    x = tokens(dtype=torch.float32).requires_grad_()
    logits, weights, indices = layer.router(x)
    layer.router.forward = lambda hidden: (logits, torch.full_like(weights, 0.5), indices)  # type: ignore[method-assign]
    kept = within_capacity(indices, torch.full_like(weights, 0.5), EXPERTS, capacity_of(32, EXPERTS, 0.75), "probs")
    assert kept.sum() < 32
    output, _ = layer(x)
    share = kept.sum(-1, keepdim=True) / 2
    torch.testing.assert_close(output, x * share)
    torch.testing.assert_close(torch.autograd.grad(output, x, x.detach())[0], x * share)


def test_bias_rule() -> None:
    bias = torch.zeros(2)
    update_bias(bias, torch.tensor([0, 2]), 0.25)
    assert bias.tolist() == [0.25, -0.25]


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_each_trained_token_moves_the_bias_once(reentrant: bool | None) -> None:
    """torchtitan 1593, 4148, AutoModel 3247: recompute and validation do not count. torchtitan 1304: a microbatch is no step."""
    layer = make_layer(update_bias_rate=0.1)
    x = tokens(dtype=torch.float32).requires_grad_()
    expected = torch.bincount(layer.router(x)[2].flatten(), minlength=EXPERTS)
    for _ in range(2):
        output, loss = layer(x) if reentrant is None else checkpoint(layer, x, use_reentrant=reentrant)
        (output.sum() + loss).backward()
        with torch.no_grad():
            layer(x)
        layer.eval()
        layer(x)[0].sum().backward()
        layer.train()
    assert torch.equal(layer.router.tokens_per_expert, 2 * expected)
    assert expected.unique().numel() > 1
    assert not layer.router.e_score_correction_bias.any(), "the bias does not change before the step"
    for _ in range(2):  # the second call has no new tokens
        update_router_biases(layer)
        torch.testing.assert_close(layer.router.e_score_correction_bias, 0.1 * (expected.double().mean() - expected).sign().float())


def test_the_bias_balances() -> None:
    torch.manual_seed(0)
    router = TopKRouter(HIDDEN, EXPERTS, 1, score="sigmoid", update_bias_rate=0.02)
    x = tokens(256, torch.float32) + 2.0
    for _ in range(200):
        router(x)[1].sum().backward()
        counts = router.tokens_per_expert
        update_router_biases(router)
    assert counts.max() < 1.2 * 256 / EXPERTS


def test_a_copy_is_an_ordinary_layer() -> None:
    layer = make_layer(update_bias_rate=0.1, shared=True)
    layer(tokens(dtype=torch.float32))[0].sum().backward()
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(copied.router.tokens_per_expert, layer.router.tokens_per_expert)
        torch.testing.assert_close(copied(tokens(dtype=torch.float32)), layer(tokens(dtype=torch.float32)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top_k": 5}, "top_k=5"),
        ({"score": "tanh"}, "score='tanh'"),
        ({"update_bias_rate": -1.0}, "update_bias_rate=-1.0"),
        ({"capacity_factor": 0.0}, "capacity_factor=0.0"),
        ({"drop_policy": "random"}, "drop_policy='random'"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_layer(**arguments)


def test_router_and_experts_fit() -> None:
    with pytest.raises(ConfigError, match="among 4 experts, but there are 3"):
        MoELayer(TopKRouter(HIDDEN, 4, 2), Experts(3, HIDDEN, INNER))
