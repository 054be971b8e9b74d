"""Which experts are found in a model, and what is refused: every architecture of transformers with a plan, and own models."""

import re
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from lightning_overlap import ConfigError
from lightning_overlap.model.expert_layers import ExpertLayer, find_experts, locate_experts, routed_modules
from lightning_overlap.nn.moe import Experts, MoELayer, TopKRouter
from tests.helpers.experts import ARCHITECTURES, OwnMoE, build

USUAL = {"has_gate": True, "has_bias": False, "is_transposed": False, "is_concatenated": True, "has_post_expert_norm": False}
UNUSUAL: dict[str, dict[str, bool]] = {
    "aria_text": {"is_transposed": True},
    "gpt_oss": {"has_bias": True, "is_transposed": True, "is_concatenated": False},
    "openai_privacy_filter": {"has_bias": True, "is_transposed": True},
    "nemotron_h": {"has_gate": False},
    "muse_spark_text": {"has_post_expert_norm": True},
}
WITHOUT_SHARED = {
    *("mixtral", "qwen3_moe", "olmoe", "gpt_oss", "phimoe", "minimax", "flex_olmo", "jamba", "granitemoe", "mellum", "inkling2_text"),
    *("granitemoe_swa", "granitemoehybrid", "granitemoeshared", "cohere2_moe", "mimo_v2_flash", "minimax_m2", "muse_spark_text"),
    *("openai_privacy_filter", "qwen3_vl_moe_text", "zaya"),
}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_architecture_with_a_plan(kind: str) -> None:
    model = nn.ModuleDict({"model": build(kind)})
    source, layers = find_experts(model, {}, 2)
    assert source.startswith("plan of ")
    for layer in layers:
        module: Any = layer.module
        assert model.get_submodule(layer.name) is module
        assert {flag: getattr(module, flag) for flag in USUAL} == USUAL | UNUSUAL.get(kind, {})
        first = "gate_up_proj" if module.has_gate else "up_proj"
        biases = (f"{first}_bias", "down_proj_bias") if module.has_bias else ()
        assert set(layer.parameters) == {first, "down_proj", *biases}
        assert all(module.get_parameter(name).shape[0] == layer.count for name in layer.parameters)
        assert layer.router is not None
        assert (layer.shared is None) == (kind in WITHOUT_SHARED), layer.shared


def problem(model: nn.Module, roles: dict[str, str] | None = None, size: int = 2) -> str:
    with pytest.raises(ConfigError) as caught:
        find_experts(model, roles or {}, size)
    return str(caught.value)


def test_what_has_no_plan_is_refused_by_name() -> None:
    llama4 = build("llama4_text")
    assert "Llama4ForCausalLM (llama4_text) of transformers has no plan for experts" in problem(llama4)
    with torch.device("meta"):
        dense = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=1))
    assert "LlamaForCausalLM (llama)" in problem(dense)
    assert "use that layer" in problem(nn.Linear(2, 2))


def test_an_unknown_style_is_refused_with_the_known_ones() -> None:
    model = build("mixtral")
    model.ep_plan = model.ep_plan | {"model.layers.*.mlp.gate": "replicated_with_grad_allreduce"}
    find_experts(model, {}, 2)
    model._ep_plan["model.layers.*.mlp.gate"] = "ep_router"
    assert re.search(r"'ep_router' for model.layers.\*.mlp.gate; known are ep_dispatch_experts, grouped_gemm", problem(model))


def test_own_models_by_their_roles() -> None:
    model = nn.ModuleDict({"blocks": nn.ModuleList([OwnMoE(), OwnMoE()])})
    assert locate_experts(model, {}) == ("", [])
    roles = {"blocks.*.ffns": "experts", "route": "router", "everybody": "shared_experts"}
    source, (layer, _) = find_experts(model, roles, 2)
    assert (source, layer.name, layer.count) == ("parallel_plan", "blocks.0.ffns", 4)
    assert (layer.router, layer.shared, layer.block) == ("blocks.0.route", "blocks.0.everybody", "blocks.0")
    assert routed_modules(model, roles, "blocks") == {f"blocks.{n}.{key}" for n in (0, 1) for key in ("ffns", "route")}
    model.parallel_plan = roles  # type: ignore[assignment]
    assert find_experts(model, {}, 2)[1][1].router == "blocks.1.route"


def test_layers_of_our_own() -> None:
    def layer(shared: nn.Module | None) -> MoELayer:
        return MoELayer(TopKRouter(8, num_experts=4, top_k=2), Experts(4, 8, 16), shared)

    model = nn.ModuleDict({"a": layer(None), "b": layer(nn.Linear(8, 8))})
    source, layers = find_experts(model, {}, 2)
    assert (source, [x.name for x in layers]) == ("layers of lightning_overlap.nn", ["a.experts", "b.experts"])
    assert [(x.router, x.shared, x.count) for x in layers] == [("a.router", None, 4), ("b.router", "b.shared_experts", 4)]


def experts_of(model: nn.Module) -> Any:
    return model.get_submodule("blocks.0.ffns")


def test_problems_are_named() -> None:
    roles = {"ffns": "experts"}
    model = nn.ModuleDict({"blocks": nn.ModuleList([OwnMoE()])})
    assert "blocks.0.ffns has 4 experts, fewer than the 5 ranks" in problem(model, roles, 5)
    experts_of(model).other = nn.Parameter(torch.zeros(4))
    assert "has the parameters other, which are not known" in problem(model, roles)
    del experts_of(model).other
    experts_of(model).has_bias = None
    assert "without has_bias" in problem(model, roles)
    experts_of(model).has_bias = True
    assert "has no parameter gate_up_proj_bias, down_proj_bias, which its flags promise" in problem(model, roles)
    experts_of(model).has_bias = False
    model["tied"] = nn.Module()
    model["tied"].weight = experts_of(model).down_proj
    assert "blocks.0.ffns.down_proj is shared with another module" in problem(model, roles)
    model["tied"].weight = None
    experts_of(model).down_proj = nn.Parameter(torch.zeros(3, 8, 8))
    assert "different first dims: [3, 4]" in problem(model, roles)


def test_a_list_of_experts_is_refused() -> None:
    model = nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(4, 4) for _ in range(4))})
    assert "experts is a ModuleList without has_gate" in problem(model, {"experts": "experts"})


def test_the_block_of_a_layer() -> None:
    layer = ExpertLayer("model.layers.3.mlp.experts", nn.Module(), 4, ())
    assert layer.block == "model.layers.3.mlp"
